"""Attention of scoring and update over packed sequences: no padding, no mask, no cap on the scores. By torch's
variable-length kernel on a CUDA device, in bfloat16 or float16, for heads of up to 256; by our own on a CPU in float32,
where a token's result is to the bit what decoding gives.

    set_attention(model, "auto")       from here on the model attends by the best there is; returns its name

A model that attends by "varlen" does so where `packed_forward` tells it where sequences end; every other call, a user's
own with a mask or a cache, goes to torch's scaled_dot_product_attention as transformers would send it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from ppomax_kernels.internal.packed_attention import packed_attention
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ppomax.models.trunk import base_of, with_blocks

NAME = "ppomax_varlen"
PACKED = "ppomax_packed"
"""What NAME is called during a packed forward: transformers makes no mask for an attention without a mask function."""
Attention = Literal["auto", "varlen", "sdpa", "eager", "flash_attention_2"]
WIDEST_HEAD = 256

_PACKED: ContextVar[bool] = ContextVar("ppomax_packed", default=False)


def set_attention(model: nn.Module, wanted: str = "auto") -> str:
    """Let a transformers model, or what holds one, attend by `wanted`; returns what that is.

    auto: varlen where it serves; else what the model has, but eager for a model that caps its scores, since torch's
    attention has no cap and transformers below 5.18 leaves it out in silence. ValueError for varlen where it does not
    serve."""
    if wanted not in get_args(Attention):
        raise ValueError(f"attention must be one of {', '.join(get_args(Attention))}, got {wanted!r}")
    inner = inner_model(model)
    if inner is None:
        raise ValueError(f"set_attention: {type(model).__name__} holds no transformers model")
    why_not = why_not_varlen(inner)
    if wanted == "varlen" and why_not:
        raise ValueError(f"attention varlen does not serve {type(inner).__name__}: {why_not}; leave it auto")
    if wanted == "auto":
        present = str(inner.config._attn_implementation)
        capped = bool(getattr(inner.config.get_text_config(), "attn_logit_softcapping", None))
        wanted = "varlen" if not why_not else "eager" if capped and present == "sdpa" else present
    if wanted == "varlen":
        _register()
    name = NAME if wanted == "varlen" else wanted
    if name != inner.config._attn_implementation:
        inner.set_attn_implementation(name)
    return "varlen" if wanted == NAME else wanted


def inner_model(owner: Any) -> PreTrainedModel | None:
    """The transformers model that this is, or that it holds as a part or as `module`; None if there is none."""
    module = owner if isinstance(owner, nn.Module) else getattr(owner, "module", None)
    return None if module is None else next((m for m in module.modules() if isinstance(m, PreTrainedModel)), None)


def serves(dim: int, dtype: torch.dtype) -> bool:
    """Whether torch has the kernel, for heads of this width and dtype."""
    half = dtype in (torch.bfloat16, torch.float16)
    return half and dim % 8 == 0 and dim <= WIDEST_HEAD and torch_varlen() is not None


def by_ours(device: torch.device) -> bool:
    """Whether varlen is our own kernel there, and not torch's."""
    return device.type == "cpu"


def why_not_varlen(model: PreTrainedModel, device: torch.device | None = None) -> str:
    """Why this model cannot attend by varlen on `device`, or where it is; empty if it can."""
    config, device = model.config.get_text_config(), model.device if device is None else device
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cpu, half = device.type == "cpu", model.dtype in (torch.bfloat16, torch.float16)
    for bad, reason in (
        (device.type not in ("cpu", "cuda"), f"it is on {device}, not on a CPU or a CUDA device"),
        (cpu and model.dtype != torch.float32, f"its weights are {model.dtype}, not float32 as on a CPU they must be"),
        (not cpu and not half, f"its weights are {model.dtype}, not 16 bits wide"),
        (
            not cpu and (dim % 8 or dim > WIDEST_HEAD),
            f"its heads are {dim} wide, not a multiple of 8 up to {WIDEST_HEAD}",
        ),
        (getattr(config, "attn_logit_softcapping", None), "it caps its attention scores"),
        (
            not cpu and torch_varlen() is None,
            f"torch {torch.__version__} has no variable-length attention; 2.11 has",
        ),
        (not getattr(model, "_supports_attention_backend", False), "its attention is no backend of transformers"),
    ):
        if bad:
            return reason
    return _why_not_asked(model)


def _why_not_asked(model: PreTrainedModel) -> str:
    """The same of what only a forward tells: one block of the family runs on the meta device, up to its attention."""
    base = base_of(model)
    if type(base) not in _asked:
        _register()
        config = with_blocks(base.config, slice(0, 1))
        config._attn_implementation_internal = PACKED
        config.pad_token_id = None  # some models look for it among the tokens
        ends = torch.zeros(2, dtype=torch.int32)
        told = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 2, "max_length_k": 2}
        reason = "its first block attends by no backend of transformers"
        try:
            with torch.device("meta"), torch.no_grad():
                ids = torch.zeros(1, 2, dtype=torch.int64)
                type(base)(config).eval()(input_ids=ids, position_ids=ids, use_cache=False, **told)
        except _Asked as asked:
            reason = str(asked)
        except Exception as error:  # whatever a family's own code raises is why it is not served
            reason = f"a block of it does not run on its own, {type(error).__name__}: {error}"
        _asked[type(base)] = reason
    return _asked[type(base)]


class _Asked(Exception):
    """Raised by an attention on the meta device: why it is not served, empty if it is."""


_asked: WeakKeyDictionary[type, str] = WeakKeyDictionary()
"""By class of trunk, so that each is asked once."""


def _register() -> None:
    AttentionInterface.register(NAME, _attend)
    AttentionInterface.register(PACKED, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def varlen(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, *, scale: float, window: int = 0
) -> Tensor:
    """Causal attention within packed sequences: query (N, H, D), key and value (N, G, D) -> (N, H, D). ends (S+1,)
    int32: where each starts, and where the last ends; `longest` of them in tokens. window 0: none. Differentiable; on
    the device torch's kernel asks for. Key heads are repeated where this torch does not take groups."""
    found = torch_varlen()
    assert found is not None
    attend, grouped = found
    more = {"enable_gqa": True} if grouped else {}
    repeat = query.shape[1] // key.shape[1]
    if not grouped and repeat > 1:
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    left = window - 1 if window else -1  # keys to the left of its own
    return attend(query, key, value, ends, ends, longest, longest, scale=scale, window_size=(left, 0), **more)  # type: ignore[no-any-return]


@cache
def torch_varlen() -> tuple[Callable[..., Any], bool] | None:
    """torch's function, and whether it takes fewer key heads than query heads; None before 2.11."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return (varlen_attn, "enable_gqa" in known) if "window_size" in known else None


@contextmanager
def packed_call(config: PreTrainedConfig) -> Iterator[None]:
    """Inside, a forward of the model with this config is of packed sequences, and no mask is made."""
    configs = {id(c): c for c in (config, config.get_text_config())}.values()
    token = _PACKED.set(True)
    try:
        for each in configs:
            each._attn_implementation_internal = PACKED
        yield
    finally:
        for each in configs:
            each._attn_implementation_internal = NAME
        _PACKED.reset(token)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """One layer: query (1, H, N, D), key and value (1, G, N, D) -> (1, N, H, D)."""
    handed = cu_seq_lens_q is not None and max_length_q is not None
    apart = dropout or attention_mask is not None or rest.get("softcap") or rest.get("s_aux") is not None
    if query.is_meta:
        unlike = "its attention has dropout, a mask, a cap or sinks" if apart else ""
        raise _Asked(unlike if handed else "its attention does not hand on where packed sequences end")
    if not handed:
        if _PACKED.get():
            raise ValueError(
                f"{type(module).__name__} does not hand on where packed sequences end; set model.attention: sdpa"
            )
        named = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, **rest}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **named)  # type: ignore[no-any-return]
    if apart:
        raise ValueError(
            f"{type(module).__name__} attends with dropout, a mask, a cap or sinks, which variable-length attention "
            "has not; set model.attention: sdpa"
        )
    assert cu_seq_lens_q is not None
    assert max_length_q is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if by_ours(q.device):  # in float32 whatever autocast, or a model cast after the choice, hands over
        whole = (q.float(), k.float(), v.float())
        out = packed_attention(*whole, cu_seq_lens_q, scale=scale, window=sliding_window or 0).to(v.dtype)
    else:
        out = varlen(q, k, v, cu_seq_lens_q, max_length_q, scale=scale, window=sliding_window or 0)
    return out[None], None
