"""Figures that a loss op returns beside the loss: one small fp32 tensor, read by name, without a host sync until
`to_dict`."""

from collections.abc import Iterator

from torch import Tensor

POLICY_METRICS = (
    "pg_loss", "approx_kl", "clipfrac", "dual_clipfrac", "ratio_mean", "ratio_max", "kl", "entropy", "tokens",
    "ratio_gap",
)  # fmt: skip
"""What ppo_loss tells, in the order in which every back-end writes it; so do the next two."""
VALUE_METRICS = ("v_loss", "clipfrac", "value_mean", "return_mean", "squared_error", "tokens")
NLL_METRICS = ("nll", "entropy", "tokens")


class Metrics:
    """`metrics["approx_kl"]` is a 0-d view of `metrics.tensor`; `metrics.to_dict()` reads all of them back at once."""

    __slots__ = ("names", "tensor")

    def __init__(self, names: tuple[str, ...], tensor: Tensor) -> None:
        self.names = names
        self.tensor = tensor

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(f"no metric {name!r}; there are {', '.join(self.names)}")
        return self.tensor[self.names.index(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def to_dict(self) -> dict[str, float]:
        """Plain floats; on a GPU this waits for the queue."""
        return dict(zip(self.names, self.tensor.tolist(), strict=True))

    def __repr__(self) -> str:
        return f"Metrics({', '.join(f'{k}={v:.6g}' for k, v in self.to_dict().items())})"
