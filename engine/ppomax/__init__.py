"""ppomax: PPO-max for language models on fused kernels.

Names below load on first use, so that `import ppomax` and `--help` stay fast.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppomax.config import TrainConfig, load_config
    from ppomax.engine import Engine, StepResult
    from ppomax.recipe.batch import Experience, Rollout
    from ppomax.rollout import Responses, Sampling
    from ppomax.saving.export_policy import export_policy

_HOMES = {
    "Engine": "engine",
    "StepResult": "engine",
    "Rollout": "recipe.batch",
    "Experience": "recipe.batch",
    "Responses": "rollout",
    "Sampling": "rollout",
    "TrainConfig": "config",
    "load_config": "config",
    "export_policy": "saving.export_policy",
}

__all__ = [
    "Engine",
    "Experience",
    "Responses",
    "Rollout",
    "Sampling",
    "StepResult",
    "TrainConfig",
    "export_policy",
    "load_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ppomax' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"ppomax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
