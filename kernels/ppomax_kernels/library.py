"""The torch library `ppomax`: how an op becomes known to torch.

Three kinds of entry. A *primitive* computes and has no gradient of its own (`token_logprobs_fwd`, `gae` ...): one
Python function for every device, and one which gives only shapes, for tracing. A *differentiable op*
(`token_logprobs` ...) is written in terms of primitives with an autograd.Function, so it needs no shapes of its own.
Public functions call the primitive or the autograd.Function directly: a dispatcher hop costs about 6 us on a CPU, one
is enough.

A schema is made from the function's own signature: a parameter that is a NamedTuple (terms.py) stands for its fields,
one after the other, and is put together again before the function is called. Keyword-only parameters are no part of it.
"""

import inspect
import typing
from collections.abc import Callable, Sequence
from functools import wraps
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from .checks import stored

LIB = torch.library.Library("ppomax", "DEF")
SCHEMA_TYPES = {Tensor: "Tensor", float: "float", int: "int", bool: "bool", str: "str"}

Group = tuple[Callable[..., Any] | None, int, int]
"""A parameter's NamedTuple (None: it is a plain one) and the stretch of flat arguments that it takes."""


def primitive(
    name: str, compute: Callable[..., Any], shapes: Callable[..., Any], results: str, *, by_torch: bool = False
) -> Any:
    """Register `compute` under `name` with its shape rule, which takes the same arguments; returns the callable op,
    which takes them flat. results: what the schema says of them, such as "(Tensor loss, Tensor metrics)". by_torch: it
    reads its arguments by torch's own operations too, which need storages to be there."""
    arguments, groups = schema_of(compute)
    LIB.define(f"{name}({arguments}) -> {results}")
    run = regrouped(compute, groups)
    LIB.impl(name, _after_looking(name, run) if by_torch else run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ppomax::{name}", regrouped(shapes, groups), lib=LIB)
    return getattr(torch.ops.ppomax, name).default


def _after_looking(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    def looked_at(*flat: Any) -> Any:
        stored(name, *flat)
        return run(*flat)

    return looked_at


def differentiable(name: str, compose: Callable[..., Any], results: str) -> Any:
    """Register `compose`, made of primitives and autograd Functions, under `name`; returns the callable op."""
    arguments, groups = schema_of(compose)
    LIB.define(f"{name}({arguments}) -> {results}")
    LIB.impl(name, regrouped(compose, groups), "CompositeImplicitAutograd")
    return getattr(torch.ops.ppomax, name).default


def first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that cannot itself be differentiated, and says so when it is: torch's own once_differentiable gives a
    constant where the incoming gradient is one, and a second derivative of zero in silence."""

    @wraps(backward)
    def once(ctx: Any, *gradients: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        with torch.no_grad():
            found = backward(ctx, *gradients)
            found = found if isinstance(found, tuple) else (found,)
        words = b"a kernel of ppomax has first derivatives alone; pass impl='ref' for second ones"
        refusing = torch._C._functions.DelayedError(words, len(found))
        leaves: list[Any] = [x if x is None else x.detach().requires_grad_() for x in found]
        return refusing(*leaves)

    return once


def schema_of(function: Callable[..., Any]) -> tuple[str, list[Group]]:
    """The arguments of `function` as a torch schema has them, and how to group them again."""
    hints = typing.get_type_hints(function)
    fields: list[str] = []
    groups: list[Group] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            continue
        kind, at = hints[parameter.name], len(fields)
        named = typing.get_type_hints(kind) if hasattr(kind, "_fields") else None
        fields += [f"{schema_type(k)} {n}" for n, k in (named or {parameter.name: kind}).items()]
        groups.append((kind._make if named else None, at, len(fields)))
    return ", ".join(fields), groups


def schema_type(kind: Any) -> str:
    """`Tensor | None` -> "Tensor?" and so on; KeyError for a type that ops do not take."""
    parts = typing.get_args(kind)
    if NoneType in parts:
        return SCHEMA_TYPES[next(k for k in parts if k is not NoneType)] + "?"
    return SCHEMA_TYPES[kind]


def regrouped(function: Callable[..., Any], groups: Sequence[Group]) -> Callable[..., Any]:
    """`function` taking flat arguments. Written out and compiled, as namedtuple does: a loop over the groups would cost
    a small call a tenth of its time."""
    if all(make is None for make, _, _ in groups):
        return function
    names = [f"x{i}" for i in range(groups[-1][2])]
    makes = {f"make{a}": make for make, a, _ in groups if make is not None}
    parts = [names[a] if make is None else f"make{a}(({', '.join(names[a:b])}))" for make, a, b in groups]
    return eval(f"lambda {', '.join(names)}: function({', '.join(parts)})", {"function": function, **makes})  # type: ignore[no-any-return]


def split(flat: Sequence[Any], *kinds: type) -> list[Any]:
    """`flat`, the fields of these NamedTuples one after the other, as the NamedTuples."""
    out, at = [], 0
    for kind in kinds:
        count = len(kind._fields)  # type: ignore[attr-defined]
        out.append(kind._make(flat[at : at + count]))  # type: ignore[attr-defined]
        at += count
    return out
