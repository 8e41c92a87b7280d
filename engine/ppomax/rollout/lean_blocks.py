"""A rollout's blocks on a CPU by one call each, without what is around their kernels: modules, cache, attention
interface and the Python between them (bench/LOG.md). For blocks of the form

    x + o(attention(rotary(qkv(norm(x)))));  x + down(silu(gate(norm(x))) * up(norm(x)))

with norms of query and key where there are any (Llama, Mistral, Qwen). A block's first forward of a phase is its own,
which the arena's checks look at. The next are ours, once ours has given the same on the same input: the queries, keys
and values, too, since in the sum of a block an angle or a norm may hardly show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from ppomax_kernels.internal.decode_block import DecodeBlock, Parts
from ppomax_kernels.internal.packed_linear import Packed
from ppomax_kernels.internal.rms_norm import NormTerms, rms_norm
from ppomax_kernels.internal.rotate import rotate
from ppomax_kernels.internal.silu_mul import silu_mul
from torch import Tensor, nn

from ppomax.models.fused_trunk import TOLERANCE, Run, norm_terms, query_key_value, swiglu_layers
from ppomax.models.recompute import Recomputed
from ppomax.rollout.attention import Attention

_same: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Whether a block gave what ours gave, which is asked once."""


def lean_blocks(
    blocks: Sequence[nn.Module], join: Callable[[list[nn.Linear]], Packed], attention: Attention
) -> dict[nn.Module, Run]:
    """The blocks whose parts are all known, each with what runs in its place."""
    found = [layers_of(block, index) for index, block in enumerate(blocks)]
    return {
        block: LeanBlock(block, index, attention, layers, join)
        for index, (block, layers) in enumerate(zip(blocks, found, strict=True))
        if layers is not None
    }


class Layers(NamedTuple):
    """Of one block."""

    norms: tuple[NormTerms, NormTerms]
    of_heads: tuple[NormTerms, NormTerms] | None
    three: tuple[nn.Linear, nn.Linear, nn.Linear]
    out: nn.Linear
    gated: tuple[nn.Linear, nn.Linear, nn.Linear]


def layers_of(block: nn.Module, index: int) -> Layers | None:
    """The parts of a block of the form above; None for every other one."""
    inner, mlp = getattr(block, "self_attn", None), getattr(block, "mlp", None)
    if not isinstance(inner, nn.Module) or not isinstance(mlp, nn.Module) or getattr(inner, "layer_idx", None) != index:
        return None
    before, after = _norm(block, "input_layernorm"), _norm(block, "post_attention_layernorm")
    of_query, of_key = _norm(inner, "q_norm"), _norm(inner, "k_norm")
    three, gated, out = query_key_value(inner), swiglu_layers(mlp), getattr(inner, "o_proj", None)
    if before is None or after is None or three is None or gated is None or type(out) is not nn.Linear:
        return None
    if len({p.dtype for p in block.parameters()}) > 1 or (of_query is None) != (of_key is None):
        return None
    if not isinstance(block.__dict__.get("forward"), (Recomputed, type(None))):
        return None  # something was put around it
    if any(m._forward_hooks or m._forward_pre_hooks for m in block.modules() if m is not block):
        return None  # somebody looks inside
    heads = None if of_query is None or of_key is None else (of_query, of_key)
    return Layers((before, after), heads, three, out, gated)


def _norm(owner: nn.Module, name: str) -> NormTerms | None:
    module = getattr(owner, name, None)
    return None if module is None else norm_terms(module)


class LeanBlock:
    """One block: called as the module is."""

    def __init__(
        self,
        block: nn.Module,
        index: int,
        attention: Attention,
        layers: Layers,
        join: Callable[[list[nn.Linear]], Packed],
    ):
        self.block, self.index, self.attention = block, index, attention
        gate, up, down = layers.gated
        qkv, out, gate_up = join([*layers.three]), join([layers.out]), join([gate, up])
        self.parts = Parts(*layers.norms, layers.of_heads, qkv, out, gate_up, join([down]))
        shape = attention.arena.shape
        self.groups, self.dim = shape.kv_heads, shape.head_dim
        self.heads = layers.three[0].out_features // self.dim
        self.native = DecodeBlock(self.parts, self.heads, self.groups, self.dim)

    def __call__(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        """What the block gives."""
        checked, known = self.index in self.attention.terms, _same.get(self.block)
        angles = named.get("position_embeddings")
        if checked and known:
            return self.at_once(hidden_states, *angles)  # type: ignore[misc]
        if checked and known is None:
            theirs = self.seen(type(self.block).forward, self.block, hidden_states, *args, **named)
            ours = self.seen(self.run, hidden_states, *angles) if self.fits(angles) else []  # type: ignore[misc]
            _same[self.block] = _alike(ours, theirs)
            if _same[self.block]:
                return ours[-1]  # as of every later phase, so that a run that was resumed goes on to the bit
        return type(self.block).forward(self.block, hidden_states, *args, **named)

    def fits(self, angles: Any) -> bool:
        """Whether these are cosines and sines of all that a head holds."""
        return isinstance(angles, tuple) and len(angles) == 2 and all(a.shape[-1] == self.dim for a in angles)

    def seen(self, forward: Run, *given: Any, **named: Any) -> list[Any]:
        """The query, key and value that a forward attends with, and what it gives."""
        witness: list[Any] = []
        self.attention.witness = witness
        try:
            witness.append(forward(*given, **named))
        finally:
            self.attention.witness = None
        return witness

    def at_once(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """`run` by one kernel, to the same bits."""
        attention, step = self.attention, self.attention.step
        assert step is not None
        where = (step.tables, step.slots, step.positions)
        pages, terms = attention.arena.stores[self.index], attention.terms[self.index]
        return self.native(hidden[0], (cosine[0].contiguous(), sine[0].contiguous()), pages, where, terms)[None]

    def run(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """hidden (1, N, D) of the step's tokens, cosine and sine (1, N, head width) -> the same shape."""
        x, heads, groups, parts = hidden[0], self.heads, self.groups, self.parts
        every = parts.qkv(rms_norm(x, **parts.before_attention._asdict())).view(len(x), heads + 2 * groups, self.dim)
        turned, value = every[:, : heads + groups], every[:, heads + groups :]
        if parts.of_heads is not None:
            of_query, of_key = parts.of_heads
            turned = torch.cat(
                [rms_norm(turned[:, :heads], **of_query._asdict()), rms_norm(turned[:, heads:], **of_key._asdict())], 1
            )
        heads_first = turned.float().transpose(0, 1)[None]
        turned = rotate(heads_first, cosine.float(), sine.float())[0].transpose(0, 1).to(x.dtype)
        attended = self.attention.attend_as_before(turned[:, :heads], turned[:, heads:], value, self.index)
        x = x + parts.out(attended.view(len(x), -1))
        return (x + parts.down(silu_mul(parts.gate_up(rms_norm(x, **parts.before_mlp._asdict())))))[None]


def _alike(ours: list[Any], theirs: list[Any]) -> bool:
    """Whether all are tensors of the same numbers, but for rounding."""

    def near(a: Any, b: Any) -> bool:
        if not isinstance(b, Tensor) or a.shape != b.shape:
            return False
        limit = TOLERANCE[b.dtype]
        return torch.allclose(a, b, limit, limit * float(b.abs().max()))

    return len(ours) == len(theirs) and all(near(a, b) for a, b in zip(ours, theirs, strict=True))
