"""Safetensors shards straight into the ranks' partitions, one tensor at a time.

    model = load_partitioned(path, torch.bfloat16, settings=zero_config.trained(...))   ZeRO-3: each rank its part
The module is made without its weights; then each parameter in turn gets room, is cut by DeepSpeed, and this rank reads
the rows that hold its part and no others. So a rank's host holds at no time more than its part, the largest single
tensor, and the pages that this was read from. Tied parameters are read once. Names must match: a missing tensor is an
error, one too many is logged, a change of type is logged, a shard that is not there is named. Models that stay whole on
a rank are read by transformers, which also knows checkpoints laid out otherwise than the module (fused experts, old
names)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping

from ppomax.models.files import (
    LoadingError,
    TensorPlace,
    compare_names,
    compare_shape,
    model_config,
    model_folder,
    tensor_files,
)
from ppomax.models.score_head import draw_score_head
from ppomax.models.scorer_class import auto_scorer
from ppomax.models.sources import say_left_out
from ppomax.sharding.zero_engine import library

log = logging.getLogger(__name__)

Kind = Literal["causal_lm", "sequence_classification"]


def load_partitioned(
    path: str | Path,
    dtype: torch.dtype,
    kind: Kind = "causal_lm",
    *,
    settings: dict[str, Any],
    new_head: bool = False,
    seed: int = 0,
) -> PreTrainedModel:
    """A HF model cut over the ranks as ZeRO-3 cuts it, ready for deepspeed.initialize.

    settings: the DeepSpeed configuration that it will be initialised with (offload, hpZ). new_head: let a scorer's
    `score` be missing; it then starts as score_head.py draws it from `seed`. Every rank must call this. Raises
    LoadingError for files and names that do not fit; a rank that fails alone leaves the others waiting, so all files
    are looked at before the first exchange."""
    model, places = prepare(path, dtype, kind, new_head)
    first: nn.Parameter | None = None
    for name, source, file in _opened(places):
        p = _materialise(model, name, dtype, _compute_device())
        if source is None:
            draw_score_head(p, seed)
        first = _cut(p, first, settings)
        if source is not None:
            _fill(p, file, source.name)
    return model


def in_parts(source: str | Path, kind: Kind = "causal_lm") -> bool:
    """Whether a model can be read straight into partitions: the tensors of its files are those of the module. Where
    transformers converts them as it loads (experts fused, old names), every rank reads the whole model by transformers,
    and it is cut afterwards."""
    folder = model_folder(source)
    model = _empty_model(model_config(folder), folder, torch.float32, kind)
    if not get_model_conversion_mapping(model, add_legacy=False):
        return True
    log.info("%s: transformers converts its tensors, so each rank reads all of them before its part is cut", folder)
    return False


@contextmanager
def gathered(what: nn.Module | nn.Parameter, modify: bool = False) -> Iterator[None]:
    """Inside, a module's sharded parameters, or the one parameter, are gathered on every rank; nothing happens to
    others. Every rank must enter. modify: what rank 0 makes of them is kept, else nothing is."""
    sharded = [p for p in (what.parameters() if isinstance(what, nn.Module) else [what]) if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if modify else None):
        yield


# ---- files and names ------------------------------------------------------------------------------------------------


def prepare(
    path: str | Path, dtype: torch.dtype, kind: Kind = "causal_lm", new_head: bool = False
) -> tuple[PreTrainedModel, dict[str, TensorPlace | None]]:
    """The module without weights, and where each of its parameters lies (None: it is new). LoadingError if files and
    names do not fit."""
    folder = model_folder(path)
    config, found = model_config(folder), tensor_files(folder)
    model = _empty_model(config, folder, dtype, kind)
    places: dict[str, TensorPlace | None] = {}
    used: set[str] = set()
    missing: list[str] = []
    for names in _aliases(model):
        spellings = [s for name in names for s in _spellings(name, model.base_model_prefix)]
        source = next((found[s] for s in spellings if s in found), None)
        if source is None and not (new_head and names[0].startswith("score.")):
            missing.append(names[0])
        places[names[0]] = source
        used.update(s for s in spellings if s in found)
    say_left_out(folder, model, compare_names(folder, model, found, missing, found.keys() - used))
    _compare(model, places, folder, dtype)
    return model, places


def _compare(model: PreTrainedModel, places: dict[str, TensorPlace | None], folder: Path, dtype: torch.dtype) -> None:
    """Shapes against the files' headers; a change of type is said once."""
    wanted, types = dict(model.named_parameters()), set()
    for name, source, file in _opened(places):
        if source is None:
            continue
        part = file.get_slice(source.name)
        types.add(part.get_dtype())
        compare_shape(folder, type(model).__name__, source, tuple(part.get_shape()), tuple(wanted[name].shape))
    other = types - {{torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]}
    if other:
        log.info("%s: weights are cast from %s to %s", folder, " and ".join(sorted(other)), str(dtype)[6:])


def _aliases(model: nn.Module) -> Iterator[list[str]]:
    """All names of each parameter; tied ones have several."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return iter(names.values())


def _spellings(name: str, prefix: str) -> list[str]:
    """`name`, and what it is called in a checkpoint of the trunk alone, or of a model that wraps the trunk."""
    bare = name.removeprefix(f"{prefix}.")
    return [name, bare if bare != name else f"{prefix}.{name}"]


# ---- one parameter --------------------------------------------------------------------------------------------------


class _LargeEmpty(TorchFunctionMode):
    """Parameters without room: `torch.empty` makes nothing, so that constants and buffers alone are really there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _empty_model(config: Any, folder: Path, dtype: torch.dtype, kind: Kind) -> PreTrainedModel:
    auto: Any = AutoModelForCausalLM
    if kind == "sequence_classification":
        auto, config.num_labels = auto_scorer(config), 1
    with _LargeEmpty():
        model: PreTrainedModel = auto.from_config(config, dtype=dtype).eval()  # as from_pretrained gives it
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    lost = [name for name, b in model.named_buffers() if b.is_meta]
    if lost:
        raise LoadingError(f"{type(model).__name__} makes its buffer {lost[0]} by torch.empty, which is not known here")
    return model


def _opened(places: dict[str, TensorPlace | None]) -> Iterator[tuple[str, TensorPlace | None, Any]]:
    """Parameters and their opened files. A file is opened anew for each: it is mapped into memory, and only closing it
    gives the pages back that were read."""
    for name, source in places.items():
        if source is None:
            yield name, None, None
        else:
            with safe_open(source.file, "pt") as file:  # type: ignore[no-untyped-call]
                yield name, source, file


def _materialise(model: nn.Module, name: str, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Give the parameter `name` (and whatever is tied to it) room on `device`; its values are undefined."""
    old = model.get_parameter(name)
    new = nn.Parameter(torch.empty(old.shape, dtype=dtype, device=device), requires_grad=old.requires_grad)
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is old:
                module._parameters[key] = new
    return new


def _compute_device() -> torch.device:
    """Where DeepSpeed gathers parameters."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def _cut(p: nn.Parameter, first: nn.Parameter | None, settings: dict[str, Any]) -> nn.Parameter:
    """Have ZeRO-3 cut `p`; returns the first parameter so cut, whose settings all others take."""
    if first is None:
        deepspeed = library()
        from deepspeed.utils import groups

        holder = nn.Module()
        holder.p = p
        hpz = settings["zero_optimization"].get("zero_hpz_partition_size", 1) > 1
        # hpZ's group is made with the first model of a process, and refused to be made again
        group = groups._get_zero_param_intra_parallel_group() if hpz else None
        deepspeed.zero.Init(module=holder, config_dict_or_path=settings, zero_param_parallel_group=group)
        return p
    convert: Callable[..., None] = first.convert_to_zero_parameters  # type: ignore[attr-defined]
    convert(param_list=[p])
    return first


@torch.no_grad()
def _fill(p: Any, file: Any, name: str) -> None:
    """Read this rank's stretch of the flat parameter, and the rows that it lies in only."""
    part: Tensor = p.ds_tensor
    if hasattr(part, "ds_quant_scale"):
        raise LoadingError(f"{name}: partitions quantised to int8 cannot be filled; load the model whole")
    numel, count = p.ds_shape.numel(), part.numel()
    start = torch.distributed.get_rank(p.ds_process_group) * count
    stop = min(start + count, numel)
    if p.ds_secondary_tensor is not None:  # hpZ's second copy was made of what is not there yet; it is made anew
        p.ds_secondary_tensor = None
    if start >= stop:
        part.zero_()
        return
    if not p.ds_shape:
        part[:1].copy_(file.get_tensor(name).flatten())
        return
    stride = numel // p.ds_shape[0]
    above, below = start // stride, -(-stop // stride)
    rows = file.get_slice(name)[above:below].flatten()
    part[: stop - start].copy_(rows[start - above * stride : stop - above * stride])
    part[stop - start :].zero_()
