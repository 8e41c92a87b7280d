"""Frozen linear layers in 8 or 4 bits (`model.frozen_bits`), by bitsandbytes: int8 with a scale for each row, or NF4
with one for each 64 numbers.

The weights alone are stored so. A product makes its layer's whole again, to the same numbers each time, and drops them;
its backward makes them once more. Sampling, scoring and the update therefore see one model, a policy by adapters and
its reference too, and the first KL and ratio are what they are without. Left as they are: embeddings, heads, norms,
experts that a family holds in one tensor, and GPT-2's transposed layers."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppomax.config import ModelConfig
from ppomax.models.trunk import blocks_of
from ppomax.sharding import Lazy

log = logging.getLogger(__name__)

NF4_BLOCK = 64
"""Numbers that share a scale in 4 bits."""
M = TypeVar("M", bound=nn.Module)


def place(model: M, device: torch.device, config: ModelConfig, *, trained: bool = False) -> M:
    """`model.to(device)`, what `config.frozen_bits` says of it done on the way, so that no more than one layer is there
    in full. trained: it is the policy, of which `config.train` leaves blocks frozen, or none."""
    inner = model if isinstance(model, PreTrainedModel) else getattr(model, "model", None)
    if config.frozen_bits is not None and isinstance(inner, PreTrainedModel):
        blocks = list(blocks_of(inner))
        trained_blocks = {"full": len(blocks), "hydra": config.trained_layers, "lora": 0}[config.train]
        frozen = blocks[: len(blocks) - trained_blocks] if trained else blocks
        if frozen:
            _store(inner, frozen, config.frozen_bits, device)
    return model.to(device)


def _store(model: PreTrainedModel, blocks: list[nn.Module], bits: int, device: torch.device) -> None:
    whole = stored = count = 0
    for block in blocks:
        for owner in list(block.modules()):
            for name, layer in owner.named_children():
                if type(layer) is nn.Linear:
                    small = FrozenLinear(layer.to(device), bits)
                    setattr(owner, name, small)
                    whole, stored, count = whole + small.whole_bytes, stored + small.stored_bytes, count + 1
    if not count and not any(isinstance(m, FrozenLinear) for block in blocks for m in block.modules()):
        raise ValueError(
            f"model.frozen_bits is {bits}, but the blocks of {type(model).__name__} hold no nn.Linear; leave it null"
        )
    if count:
        words = "%s: %d frozen linear layers in %d bits, %.1f MiB of %.1f"
        log.info(words, type(model).__name__, count, bits, stored / 2**20, whole / 2**20)


class FrozenLinear(nn.Linear):
    """`nn.Linear` on a weight that is stored in 8 or 4 bits and made whole on each use. Only the input gets a
    gradient."""

    codes: Tensor
    """int8 (out, in), or two numbers of 4 bits a byte."""
    scales: Tensor
    """float32, of the rows or of the blocks."""

    def __init__(self, layer: nn.Linear, bits: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bits = layer.in_features, layer.out_features, bits
        self.dtype = layer.weight.dtype
        codes, scales = _codes(layer.weight.detach(), bits)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_parameter("bias", layer.bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(out, in), made here."""
        with torch.no_grad():
            return _weight(self.codes, self.scales, self.bits, (self.out_features, self.in_features), self.dtype)

    def lazy_weight(self) -> Lazy:
        """For who writes it or hands it over."""
        return Lazy(self.dtype, torch.Size([self.out_features, self.in_features]), lambda: self.weight)

    @property
    def whole_bytes(self) -> int:
        """Of the weight as the model would hold it."""
        return self.out_features * self.in_features * self.dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        out: Tensor = _Product.apply(x, self)
        return out if self.bias is None else out + self.bias

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenLinear:
        """Moves all of it; a cast is of what is made, never of the scales."""
        kept = self.scales
        super()._apply(fn, recurse)
        self.scales = kept.to(self.scales.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=kept.device)).dtype
        return self


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.layer.weight, None


def _codes(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    functional = _bitsandbytes()
    if bits == 8:
        # float16 is what its CUDA kernel takes; its 11 bits are more than the 8 that are kept.
        codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return codes, scales
    codes, state = functional.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4")
    return codes, state.absmax


def _weight(codes: Tensor, scales: Tensor, bits: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    if bits == 8:  # in one pass on a GPU, where bitsandbytes' own would write float32 first
        return torch.mul(codes, scales[:, None] / 127, out=torch.empty(shape, dtype=dtype, device=codes.device))
    functional = _bitsandbytes()
    state = functional.QuantState(scales, torch.Size(shape), _nf4(codes.device), NF4_BLOCK, "nf4", dtype)
    return functional.dequantize_4bit(codes, state)  # type: ignore[no-any-return]


@cache
def _nf4(device: torch.device) -> Tensor:
    """The sixteen values."""
    return _bitsandbytes().get_4bit_type("nf4", device=device)  # type: ignore[no-any-return]


@contextmanager
def nothing_fetched() -> Iterator[None]:
    """Inside, the package `kernels` looks as if it were not installed: through it bitsandbytes, as it is imported on
    some CPUs, fetches compiled code from the hub and runs it."""
    absent = object()
    there: Any = sys.modules.get("kernels", absent)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if there is absent:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = there


@cache  # a product in 4 bits asks for it each time
def _bitsandbytes() -> Any:
    try:
        with nothing_fetched():
            from bitsandbytes import functional
    except ImportError as error:
        raise ModuleNotFoundError(
            "model.frozen_bits needs bitsandbytes, which is not installed; pip install 'ppomax[bits]'"
        ) from error
    return functional
