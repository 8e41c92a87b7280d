"""What tests against several trainers share: a stand-in for a module that is not needed, and padded batches."""

import types
from typing import Any

import torch
from torch import Tensor

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def stub(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(members)
    return module


def batch(seed: int, mask: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    rows, columns = 5, 23
    new = torch.randn(rows, columns, generator=g) - 3
    lengths = torch.randint(1, columns + 1, (rows,), generator=g)
    on = torch.arange(columns) < lengths[:, None]
    if mask == "multi-turn":
        on &= torch.rand(rows, columns, generator=g) > 0.4
        on[:, 0] = True
    if mask == "an empty row":
        on[2] = False
    return {
        "old_log_prob": new + 0.3 * torch.randn(rows, columns, generator=g),
        "log_prob": new,
        "advantages": torch.randn(rows, columns, generator=g),
        "response_mask": on.float(),
        "weights": torch.rand(rows, columns, generator=g) + 0.5,
        "rewards": torch.randn(rows, columns, generator=g) * on,
        "values": torch.randn(rows, columns, generator=g),
    }


MASKS = ("ragged", "multi-turn", "an empty row")
