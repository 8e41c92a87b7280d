"""A back-end under test: its name and the device of its tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

NAMES = ("ref", "cpu", "triton", "cuda")


@dataclass(frozen=True)
class Backend:
    name: str
    device: str

    def bind(self, op: Callable[..., Any]) -> Callable[..., Any]:
        return partial(op, impl=self.name)

    @property
    def interpreted(self) -> bool:
        """Triton's interpreter: right, but about a thousand times slower."""
        return self.name == "triton" and self.device == "cpu"

    @property
    def fused(self) -> bool:
        return self.name != "ref"
