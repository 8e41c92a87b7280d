"""A rollout's forwards on our own kernels, on a GPU, while the phase lasts: norms, each with the residual sum before it
where a block is of a known form; gates; rotary embeddings; and query, key and value as one product on joined weights,
as gate and up are where the copies stay small. Parts are known by their answers to a probe, as in
models/fused_trunk.py.

Of a Llama's layer some 35 launches become 11: query-key-value, rotary, attention, the join of its splits, output, sum
and norm, gate, up, their product, down, sum and norm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from ppomax_kernels.internal.gated_mul import ACTIVATIONS, gated_mul
from ppomax_kernels.internal.rms_norm import add_rms_norm, rms_norm
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppomax.models import base_of, blocks_of
from ppomax.models.fused_trunk import (
    NormTerms,
    Run,
    Together,
    fused_rotary,
    in_place,
    norm_terms,
    query_key_value,
    same,
)

MOST_BYTES = 4 * 2**30
"""Of weights that are held twice to be joined. On an H200, at 256 rows, joined query, key and value take 41 us for 63
where heads are not grouped, 14 for 25 where they are; gate and up gain nothing above 10^7 weights each."""
IMPL = "triton"


def joined(model: PreTrainedModel) -> list[tuple[nn.Linear, ...]]:
    """The layers whose weights a rollout on a GPU holds side by side: query, key and value if all of them fit, gate and
    up if those fit too. The planner asks this of a model without weights."""
    modules = list(base_of(model).modules())
    found: list[tuple[nn.Linear, ...]] = []
    for groups in ([query_key_value(m) for m in modules], [_gate_and_up(m) for m in modules]):
        more = [g for g in groups if g is not None]
        if joined_bytes(found) + joined_bytes(more) <= MOST_BYTES:
            found += more
    return found


def joined_bytes(groups: Sequence[tuple[nn.Linear, ...]]) -> int:
    """Bytes of the copies."""
    return sum(layer.weight.nbytes for group in groups for layer in group)


@contextmanager
def gpu_trunk(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the trunk runs on our kernels; copies of weights are made on entry."""
    with torch.no_grad():
        groups = {group[0]: group for group in joined(model)}
        runs: dict[nn.Module, Run] = {}
        norms = {m: _Norm(terms) for m in base_of(model).modules() if (terms := norm_terms(m, IMPL)) is not None}
        for module in base_of(model).modules():
            three = query_key_value(module)
            if three is not None and three[0] in groups:
                runs |= Together(_product(three), three).runs()
            elif (gated := _gated(module, groups)) is not None:
                runs[module] = gated
        runs |= norms
        runs |= _layers(model, norms)
    with in_place(runs), fused_rotary(list(runs), IMPL):
        yield


def _product(layers: tuple[nn.Linear, ...]) -> Run:
    weight = torch.cat([m.weight for m in layers])
    bias = None if layers[0].bias is None else torch.cat([m.bias for m in layers])
    return partial(nn.functional.linear, weight=weight, bias=bias)


# ---- gates ----------------------------------------------------------------------------------------------------------


def _gate_and_up(block: nn.Module) -> tuple[nn.Linear, nn.Linear] | None:
    gate, up = getattr(block, "gate_proj", None), getattr(block, "up_proj", None)
    if type(gate) is not nn.Linear or type(up) is not nn.Linear:
        return None
    alike = gate.weight.shape == up.weight.shape and (gate.bias is None) == (up.bias is None)
    return (gate, up) if alike else None


def _gated(block: nn.Module, groups: dict[nn.Linear, tuple[nn.Linear, ...]]) -> Run | None:
    """The block on our kernel if it is `down(act(gate(x)) * up(x))`; None for every other module."""
    pair, down = _gate_and_up(block), getattr(block, "down_proj", None)
    if pair is None or not isinstance(down, nn.Module):
        return None
    gate, up = pair

    def apart(x: Tensor, activation: str) -> Tensor:
        return down(gated_mul(gate(x), up(x), activation, impl=IMPL))  # type: ignore[no-any-return]

    form = next(
        (a for a in ACTIVATIONS if same(block, partial(apart, activation=a), gate.in_features, gate.weight)), None
    )
    if form is None:
        return None
    if gate not in groups:
        return partial(apart, activation=form)
    product = _product(pair)

    def together(x: Tensor) -> Tensor:
        left, right = product(x).chunk(2, -1)
        return down(gated_mul(left, right, form, impl=IMPL))  # type: ignore[no-any-return]

    return together


# ---- norms and the sums before them ---------------------------------------------------------------------------------


class _Norm:
    """A norm, which may have been computed with the sum that it is of."""

    def __init__(self, terms: NormTerms):
        self.terms = terms._asdict()
        self.known: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        known, self.known = self.known, None
        return known[1] if known is not None and known[0] is x else rms_norm(x, **self.terms, impl=IMPL)

    def of_sum(self, x: Tensor, delta: Tensor) -> Tensor:
        """x + delta, whose norm is there when it is asked for."""
        self.known = add_rms_norm(x, delta, **self.terms, impl=IMPL)
        return self.known[0]


def _layers(model: PreTrainedModel, norms: dict[nn.Module, _Norm]) -> dict[nn.Module, Run]:
    """The blocks of a known form, each with the norm that its result goes to."""
    blocks = list(blocks_of(model))
    base = base_of(model)
    last = next((n for name in ("norm", "final_layernorm") if (n := getattr(base, name, None)) in norms), None)
    following = [norms.get(getattr(b, "input_layernorm", None)) for b in blocks[1:]]  # type: ignore[arg-type]
    following.append(None if last is None else norms[last])
    made = {b: _layer(b, norms, n) for b, n in zip(blocks, following, strict=True)}
    return {block: run for block, run in made.items() if run is not None}


def _layer(block: nn.Module, norms: dict[nn.Module, _Norm], following: _Norm | None) -> Run | None:
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`, each with a norm more of what is added in Gemma's form; None
    for a block that is neither."""
    first, second = getattr(block, "input_layernorm", None), getattr(block, "post_attention_layernorm", None)
    attention, mlp = getattr(block, "self_attn", None), getattr(block, "mlp", None)
    after_attention: nn.Module | None = None
    after_mlp = getattr(block, "post_feedforward_layernorm", None)
    if (before_mlp := getattr(block, "pre_feedforward_layernorm", None)) is not None:
        after_attention, second = second, before_mlp
    if first not in norms or second not in norms or attention is None or mlp is None:
        return None
    into = norms[second]

    def run(hidden_states: Tensor, following: _Norm | None = following, **rest: Any) -> Tensor:
        x = hidden_states
        more = attention(hidden_states=first(x), **rest)[0]
        x = into.of_sum(x, more if after_attention is None else after_attention(more))
        more = mlp(second(x))
        more = more if after_mlp is None else after_mlp(more)
        return x + more if following is None else following.of_sum(x, more)

    weight = into.terms["weight"]
    stand_ins: dict[nn.Module, Any] = {attention: _stand_in_attention, mlp: _stand_in_mlp, **norms}
    with in_place(stand_ins):
        try:
            real = partial(type(block).forward, block, attention_mask=None, position_embeddings=None)
            fits = same(real, partial(run, following=None), len(weight), weight)
        except Exception:  # whatever a block of another kind makes of these arguments: it is not ours to replace
            fits = False
    return run if fits else None


def _stand_in_attention(hidden_states: Tensor, **rest: Any) -> tuple[Tensor, None]:
    return hidden_states.flip(-1) * 0.5, None


def _stand_in_mlp(x: Tensor) -> Tensor:
    return x * x.abs().clamp(max=1.0)
