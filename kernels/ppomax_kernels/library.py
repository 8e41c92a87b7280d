"""The torch library `ppomax`: how an op becomes known to torch.

Three kinds of entry. A *primitive* computes and has no gradient of its own (`token_logprobs_fwd`, `gae` ...): one
Python function for every device, and one which gives only shapes, for tracing. A *differentiable op*
(`token_logprobs` ...) is written in terms of primitives with an autograd.Function, so it needs no shapes of its own.
Public functions call the primitive or the autograd.Function directly: a dispatcher hop costs about 6 us on a CPU, one
is enough.
"""

from collections.abc import Callable
from typing import Any

import torch

LIB = torch.library.Library("ppomax", "DEF")


def primitive(schema: str, compute: Callable[..., Any], shapes: Callable[..., Any]) -> Any:
    """Register `schema` with its computation and its shape rule; returns the callable op."""
    name = schema.split("(", 1)[0]
    LIB.define(schema)
    LIB.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ppomax::{name}", shapes, lib=LIB)
    return getattr(torch.ops.ppomax, name).default


def differentiable(schema: str, compose: Callable[..., Any]) -> Any:
    """Register `schema` as a composition of primitives and autograd Functions; returns the callable op."""
    name = schema.split("(", 1)[0]
    LIB.define(schema)
    LIB.impl(name, compose, "CompositeImplicitAutograd")
    return getattr(torch.ops.ppomax, name).default
