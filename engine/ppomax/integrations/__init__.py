"""Our ops inside other trainers. Each module stands by itself: the engine imports none; each imports what it serves.

- `ppomax.integrations.verl`: policy loss and advantage estimator, registered through verl's `external_lib`
- `ppomax.integrations.openrlhf`: its losses, advantages and logprobs, put in their places by `install()`
- `ppomax.integrations.trl`: its PPOTrainer on our engine; its own trainers on our ops; its older form
- `ppomax.integrations.transformers`: a causal LM's loss without its logits, `fuse_loss(model)`"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


class IntegrationError(RuntimeError):
    """Another trainer's function is not the one that ours was written to stand in for."""


def check_signature(function: Callable[..., Any], known: tuple[str, ...], version: str) -> None:
    """IntegrationError unless `function` takes the parameters `known`, in that order: a loss that is called otherwise
    would be another loss, in silence."""
    found = tuple(inspect.signature(function).parameters)
    if found != known:
        gone, new = [n for n in known if n not in found], [n for n in found if n not in known]
        changed = [f"without {', '.join(gone)}"] * bool(gone) + [f"with {', '.join(new)}"] * bool(new)
        raise IntegrationError(
            f"{function.__module__}.{function.__name__} of {version} is {' and '.join(changed) or 'in another order'} "
            f"of parameters ({', '.join(known)} are known); use a version that ppomax knows, or tell us"
        )
