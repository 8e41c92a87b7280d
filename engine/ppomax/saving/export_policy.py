"""A trained policy, or another trained model, as a HF directory, written by rank 0.

One that is cut over the ranks (ZeRO-3) or has adapters is made whole tensor by tensor and written shard by shard,
so that no process holds more of it than one layer beside what it holds anyway."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping

from ppomax.models.adapters import has_adapters, merged_weights
from ppomax.models.trunk import config_as_given
from ppomax.saving.beside import beside
from ppomax.saving.engine_state import refuse_not_finite
from ppomax.saving.model_folder import save_model
from ppomax.saving.tensor_files import shards, size_of, write_gathered, write_tensors
from ppomax.sharding import Lazy, Trained, ranks
from ppomax.sharding.weights import made_weights

SHARD_BYTES = 4 << 30
INDEX = "model.safetensors.index.json"


class HasPolicy(Protocol):
    """What is exported from: an engine, or anything else that holds a trained policy and its tokenizer."""

    policy: Trained[PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase | None


def weights_to_hand_over(policy: Trained[PreTrainedModel]) -> dict[str, Lazy]:
    """Every weight of the policy under transformers' names, adapters merged in, each made whole when it is asked for.
    ValueError for a model that transformers lays out otherwise in memory than in files."""
    if get_model_conversion_mapping(policy.module, add_legacy=False):
        raise ValueError(
            f"{type(policy.module).__name__}: transformers converts this model's weights between memory and files, so "
            "they cannot be handed over one by one; use rollout.sampler: builtin"
        )
    weights = policy.all_weights()
    return merged_weights(policy.module, weights)[0] if has_adapters(policy.module) else weights


def export_policy(engine: HasPolicy, path: str | Path, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write the policy as a HF directory that AutoModelForCausalLM loads, its tokenizer included if there is one, and
    return the path; a folder of that name is replaced. Adapters are merged in, and lie beside the weights in `adapter`,
    in PEFT's format. Every rank calls; rank 0 writes, in files of at most `shard_bytes`. CheckpointError: a weight is
    not finite."""
    refuse_not_finite({"policy": engine.policy})
    return export_model(engine.policy, engine.tokenizer, path, shard_bytes=shard_bytes)


def export_model(
    trained: Trained[Any],
    tokenizer: PreTrainedTokenizerBase | None,
    path: str | Path,
    *,
    part: str = "",
    beside_adapters: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """The same of any trained module, or of the HF model that is its submodule `part`. beside_adapters off: without the
    folder `adapter`, for a model that is more than its start and the adapters."""
    path, model = Path(path), trained.module.get_submodule(part)
    prefix = f"{part}." if part else ""
    weights = {n.removeprefix(prefix): x for n, x in trained.all_weights().items() if n.startswith(prefix)}
    adapters = dict[str, Lazy]()
    if has_adapters(model):
        weights, adapters = merged_weights(model, weights)
        adapters = adapters if beside_adapters else {}
    elif not trained.sharded and not made_weights(model):
        with ranks.fail_together():
            if ranks.rank() == 0:
                save_model(model, tokenizer, path)
        return path
    parts = shards(weights, shard_bytes)

    def write(stream: Iterator[Tensor]) -> None:
        with beside(path) as folder:
            folder.mkdir()
            if get_model_conversion_mapping(model, add_legacy=False):
                _write_converted(folder, model, weights, stream, shard_bytes)
            else:
                _write_weights(folder, weights, parts, stream)
            if adapters:
                whole = {name: next(stream).detach().cpu().clone() for name in adapters}
                model.save_pretrained(folder / "adapter", state_dict=whole, safe_serialization=True)
            _write_configs(folder, model)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)

    write_gathered([*weights.values(), *adapters.values()], write)
    return path


def _write_converted(
    folder: Path, model: PreTrainedModel, weights: dict[str, Lazy], stream: Iterator[Tensor], shard_bytes: int
) -> None:
    """By transformers, which lays the tensors out in the files as others know them (experts one by one, old names); all
    of them are held at once."""
    whole = {name: next(stream).detach().cpu().clone() for name in weights}
    with torch.device("meta"):
        plain = type(model)(model.config)
    plain.save_pretrained(folder, state_dict=whole, max_shard_size=shard_bytes)


def _write_weights(folder: Path, weights: dict[str, Lazy], parts: list[list[str]], stream: Iterator[Tensor]) -> None:
    """The safetensors files, and the index that transformers reads where there are several."""
    files = ["model.safetensors"]
    if len(parts) > 1:
        files = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
        placed = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": sum(map(size_of, weights.values()))}, "weight_map": placed}
        (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    for file, part in zip(files, parts, strict=True):
        write_tensors(folder / file, [(name, weights[name]) for name in part], stream)


def _write_configs(folder: Path, policy: PreTrainedModel) -> None:
    with config_as_given(policy):
        config = copy.deepcopy(policy.config)
    config.architectures, config.dtype = [type(policy).__name__], policy.dtype  # as save_pretrained does
    config.save_pretrained(folder)
    if getattr(policy, "generation_config", None) is not None:
        policy.generation_config.save_pretrained(folder)
