"""ppomax: PPO-max for language models on fused kernels.

Names below load on first use, so that `import ppomax` and `--help` stay fast.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppomax.config import TrainConfig, load_config
    from ppomax.engine import Engine
    from ppomax.recipe.batch import Experience, Rollout

_HOMES = {
    "Engine": "engine",
    "Rollout": "batch",
    "Experience": "batch",
    "TrainConfig": "config",
    "load_config": "config",
}

__all__ = ["Engine", "Experience", "Rollout", "TrainConfig", "load_config"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ppomax' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"ppomax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
