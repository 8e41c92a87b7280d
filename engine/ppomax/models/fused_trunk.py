"""A trunk's forward and backward on our own kernels, on a CPU in float32, while a phase lasts: every linear layer by
our product; RMS norms, SwiGLU blocks and rotary embeddings in one pass each; query, key and value, and gate and up, as
one product on weights that are joined while it runs. Scoring and update run under it alike, so that the first
minibatch's ratio stays 1 to the bit, and so do a model and its frozen copy, so that the first KL is 0 to the bit.

Families name and write their parts each in its own way, so a part's answer to a probe decides whether it computes what
we would put in its place."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple, TypeGuard
from weakref import WeakKeyDictionary

import torch
from ppomax_kernels.internal.linear import linear
from ppomax_kernels.internal.packed_linear import DTYPES
from ppomax_kernels.internal.rms_norm import NormTerms, rms_norm
from ppomax_kernels.internal.rotate import rotate, rotate_pair
from ppomax_kernels.internal.silu_mul import silu_mul
from torch import Tensor, nn

from ppomax.models.rotary_table import rotary_table

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 4e-3}
"""Between a module's answer to the probe and ours; bfloat16 keeps 8 bits, float16 11, and modules round more than
once."""
ROTARY = "apply_rotary_pos_emb"
"""What transformers' families call it."""

Run = Callable[..., Tensor]
Join = Callable[[list[nn.Linear]], Run]
"""From layers that read the same input, a function from that input to all their outputs side by side."""


@contextmanager
def fused_trunk(*owners: Any, impl: str = "auto") -> Iterator[None]:
    """Inside, the trunks of these models, or of what holds one as `module`, run so, those that can: whole weights in
    float32 on a CPU. impl: back-end of the kernels; "ref" leaves all as it is."""
    runs: dict[nn.Module, Run] = {}
    if impl in ("auto", "cpu"):
        for owner in owners:
            model = owner if isinstance(owner, nn.Module) else getattr(owner, "module", None)
            runs |= {} if model is None or not _suits(model) else all_runs(model, _product)
    with in_place(runs), fused_rotary(runs):
        yield


@contextmanager
def in_place(runs: dict[nn.Module, Run]) -> Iterator[None]:
    """Inside, each of these modules' forward is the function beside it; afterwards what it was, which may be something
    that was put around the module's own before."""
    before = {module: module.__dict__["forward"] for module in runs if "forward" in module.__dict__}
    try:
        for module, run in runs.items():
            module.forward = run  # type: ignore[method-assign]
        yield
    finally:
        for module in runs:
            module.__dict__.pop("forward", None)
        for module, forward in before.items():
            module.forward = forward  # type: ignore[method-assign]


@contextmanager
def fused_shapes(model: nn.Module) -> Iterator[None]:
    """The same for a model on the meta device: inside, a forward and backward hold what they would on a CPU."""
    runs = all_runs(model, _product)
    with in_place(runs), fused_rotary(runs):
        yield


def all_runs(model: nn.Module, join: Join) -> dict[nn.Module, Run]:
    """What `runs_of` gives, and of each linear layer that no part of it holds."""
    runs = runs_of(model, join)
    inside = {layer for block in runs for layer in swiglu_layers(block) or ()}
    return runs | {m: join([m]) for m in model.modules() if _plain(m) and m not in runs and m not in inside}


def runs_of(model: nn.Module, join: Join) -> dict[nn.Module, Run]:
    """What is put in place of the model's norms, rotary embeddings, SwiGLU blocks, and query, key and value layers."""
    runs: dict[nn.Module, Run] = {}
    for module in model.modules():
        if (norm := norm_of(module)) is not None:
            runs[module] = norm
        elif (table := rotary_table(module)) is not None:
            runs[module] = table
        elif (inside := swiglu_layers(module)) is not None:
            gate, up, down = inside
            runs[module] = partial(_swiglu, join([gate, up]), join([down]))
        elif (three := query_key_value(module)) is not None:
            runs |= Together(join([*three]), three).runs()
    return runs


def _suits(model: nn.Module) -> bool:
    """In float32 on a CPU, and not cut over ranks."""
    return all(p.is_cpu and p.dtype == torch.float32 and not hasattr(p, "ds_id") for p in model.parameters())


def _product(layers: list[nn.Linear]) -> Run:
    """One product on the layers' weights side by side; each call joins them anew, since they are trained."""

    def run(x: Tensor) -> Tensor:
        return linear(x, [m.weight for m in layers], [m.bias for m in layers if m.bias is not None])

    return run


# ---- norms ----------------------------------------------------------------------------------------------------------


def norm_terms(module: nn.Module, impl: str = "auto") -> NormTerms | None:
    """What the module is as an rms_norm; None for every other module."""
    weight = getattr(module, "weight", None)
    eps = next((e for n in ("variance_epsilon", "eps") if isinstance(e := getattr(module, n, None), float)), None)
    if "RMSNorm" not in type(module).__name__ or weight is None or eps is None or weight.dtype not in TOLERANCE:
        return None

    def run(offset: float) -> Run:
        return partial(rms_norm, weight=weight, offset=offset, eps=eps, impl=impl)

    if module not in _found and weight.is_meta:
        terms = norm_terms(_twin(module), impl)
        _found[module] = None if terms is None else terms.offset
    elif module not in _found:
        _found[module] = next((o for o in (0.0, 1.0) if same(module, run(o), weight.shape[0], weight)), None)
    offset = _found[module]
    return None if offset is None else NormTerms(weight, offset, eps)


def norm_of(module: nn.Module) -> Run | None:
    """rms_norm with the module's weight, if that is what the module computes; None for every other module."""
    if getattr(module, "weight", None) is None or module.weight.dtype not in DTYPES:
        return None
    terms = norm_terms(module)
    return None if terms is None else partial(rms_norm, **terms._asdict())


# ---- SwiGLU ---------------------------------------------------------------------------------------------------------


def swiglu_layers(block: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear] | None:
    """Gate, up and down of a block that is `down(silu(gate(x)) * up(x))`, gate and up without bias; None for every
    other module."""
    gate, up, down = (getattr(block, f"{n}_proj", None) for n in ("gate", "up", "down"))
    if not (_plain(gate) and _plain(up) and _plain(down)) or gate.bias is not None or up.bias is not None:
        return None
    if gate.weight.dtype not in DTYPES:
        return None

    def plain(x: Tensor) -> Tensor:
        return down(silu_mul(torch.cat([gate(x), up(x)], -1)))  # type: ignore[no-any-return]

    if block not in _found and gate.weight.is_meta:
        _found[block] = None if swiglu_layers(_twin(block)) is None else 0.0
    elif block not in _found:
        _found[block] = 0.0 if same(block, plain, gate.in_features, gate.weight) else None
    return None if _found[block] is None else (gate, up, down)


def _swiglu(first: Run, last: Run, x: Tensor) -> Tensor:
    return last(silu_mul(first(x)))


# ---- query, key and value -------------------------------------------------------------------------------------------


def query_key_value(module: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear] | None:
    """The three layers of an attention that has them apart, all with a bias or none; None for every other module."""
    q, k, v = (getattr(module, f"{n}_proj", None) for n in "qkv")
    if not (_plain(q) and _plain(k) and _plain(v)):
        return None
    kinds = {(layer.bias is None, layer.in_features, layer.weight.dtype) for layer in (q, k, v)}
    return (q, k, v) if len(kinds) == 1 else None


class _Seen(NamedTuple):
    """An input, and the outputs of it that are not called for yet."""

    x: Tensor
    outputs: dict[nn.Linear, Tensor]


class Together:
    """Three layers, called one after the other on one input: the first call computes all. Another input in between, or
    the same layer twice, starts anew."""

    def __init__(self, run: Run, layers: tuple[nn.Linear, nn.Linear, nn.Linear]):
        self.run, self.layers = run, layers
        self.seen: _Seen | None = None

    def runs(self) -> dict[nn.Module, Run]:
        """By layer."""
        return {layer: partial(self.call, layer) for layer in self.layers}

    def call(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """This layer's output."""
        if self.seen is None or self.seen.x is not x or layer not in self.seen.outputs:
            outputs = self.run(x).split([m.out_features for m in self.layers], -1)
            self.seen = _Seen(x, dict(zip(self.layers, outputs, strict=True)))
        found = self.seen.outputs.pop(layer)
        if not self.seen.outputs:
            self.seen = None
        return found


# ---- rotary embedding -----------------------------------------------------------------------------------------------


@contextmanager
def fused_rotary(modules: Iterable[nn.Module], impl: str = "cpu") -> Iterator[None]:
    """Inside, the families of these modules rotate query and key by our kernel, "cpu" or "triton", where that is what
    they do."""
    files = {sys.modules[type(m).__module__] for m in modules}
    theirs = {file: real for file in files if (real := getattr(file, ROTARY, None)) and _turns_halves(real)}
    try:
        for file, function in theirs.items():
            setattr(file, ROTARY, _rotary(function, impl))
        yield
    finally:
        for file, function in theirs.items():
            setattr(file, ROTARY, function)


def _rotary(real: Any, impl: str) -> Any:
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **named: Any) -> Any:
        fits = q.dtype == k.dtype == cos.dtype and cos.shape[-1] == q.shape[-1]
        fits = fits and (impl != "cpu" or (q.dtype == torch.float32 and not q.is_cuda))
        if args or named or not fits or cos.ndim != 3 or cos.shape[0] not in (1, q.shape[0]):
            return real(q, k, cos, sin, *args, **named)
        if impl == "cpu":
            return rotate(q, cos, sin), rotate(k, cos, sin)
        return rotate_pair(q, k, cos, sin, impl=impl)

    return apply_rotary_pos_emb


@cache
@torch.no_grad()
def _turns_halves(real: Any) -> bool:
    """Whether the function's answer to a probe is that of `rotate`."""
    probe = torch.linspace(-1.0, 2.0, 2 * 3 * 4 * 8, device="cpu")
    q, angles = probe.view(2, 3, 4, 8), probe[:32].view(1, 4, 8)
    k = q[:, :1] + 1.0
    try:
        found = real(q, k, angles.cos(), angles.sin())
    except Exception:  # whatever a function of another kind makes of these arguments: it is not ours to replace
        return False
    halves = (torch.cat([-x[..., 4:], x[..., :4]], -1) for x in (q, k))
    ours = [x * angles.cos() + half * angles.sin() for x, half in zip((q, k), halves, strict=True)]
    return len(found) == 2 and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, ours, strict=True))


# ---- probes ---------------------------------------------------------------------------------------------------------


_found: WeakKeyDictionary[nn.Module, float | None] = WeakKeyDictionary()
"""What a module's answer to its probe was, which is asked for once: what of a formula it is, or None for another."""


def _twin(module: nn.Module) -> nn.Module:
    """A copy of a module on the meta device that can be asked: on the CPU, with weights of its own."""
    twin = copy.deepcopy(module).to_empty(device="cpu")
    for parameter in twin.parameters():
        nn.init.normal_(parameter, std=0.1)
    return twin


def _plain(layer: Any) -> TypeGuard[nn.Linear]:
    """A linear layer that nothing was put around."""
    return type(layer) is nn.Linear and "forward" not in layer.__dict__


def same(module: Run, run: Run, width: int, weight: Tensor) -> bool:
    """Whether both give the same, but for rounding, of a probe (2, width) of the weight's dtype on its device."""
    probe = torch.linspace(-2.0, 3.0, 2 * width, device=weight.device).view(2, -1).to(weight.dtype)
    limit = TOLERANCE[weight.dtype]
    with torch.no_grad():
        want = module(probe)
        return torch.allclose(run(probe), want, rtol=limit, atol=limit * float(want.abs().max()))
