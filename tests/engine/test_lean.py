"""What a decoding step on a GPU launches, counted on a CPU: torch's ops that launch and our own kernels, under the
interpreter; and that a step asks nothing of the host."""

from __future__ import annotations

import importlib.util
from collections import Counter
from typing import Any

import pytest
from ppomax.models import blocks_of
from ppomax.rollout.forward import Forward
from ppomax_kernels.dispatch import triton_interprets
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.families import family
from tests.engine.sampled import decode
from tests.engine.stand_ins import WAITS, attend_by

if importlib.util.find_spec("triton") is None or not triton_interprets():
    pytest.skip("Triton's interpreter is not at work", allow_module_level=True)

from ppomax_kernels.internal import gated_mul_triton, paged_decode_triton, rms_norm_triton, rotate_triton

MODULES = (gated_mul_triton, paged_decode_triton, rms_norm_triton, rotate_triton)
MOST = 12
QUIET = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "lift_fresh", "_unsafe_view"}


class Launches(TorchDispatchMode):
    """Counts what would launch a kernel on a GPU, views and allocations left out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        view = not func._schema.is_mutable and any(r.alias_info is not None for r in func._schema.returns)
        if not self.inside:  # the interpreter copies tensors about
            assert func not in WAITS, f"{name} waits for the device"
            self.seen[name] += not view and name not in QUIET
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2"])
def test_a_layer_of_a_decoding_step_takes_few_launches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages of these models fit into one split, so the join of splits, one launch more a layer, is added."""
    model, counted, real = family(name), [], Forward._next
    attend_by(monkeypatch, "triton")

    def watched(self: Forward, *args: Any) -> Any:
        with Launches() as count:
            for module in MODULES:
                launch = module.launch

                def one(kernel: Any, *rest: Any, launch: Any = launch, **named: Any) -> None:
                    count.seen[kernel.__name__] += 1
                    count.inside = True
                    launch(kernel, *rest, **named)
                    count.inside = False

                monkeypatch.setattr(module, "launch", one)
            out = real(self, *args)
        counted.append(count.seen)
        return out

    monkeypatch.setattr(Forward, "_next", watched)
    decode(model, [[1, 2, 3], [1, 4]], [0, 1], eos_ids=[], max_new_tokens=2, slots=2)
    (seen,) = counted
    layers = len(blocks_of(model))
    assert seen["_decode_kernel"] == seen["_rotate_kernel"] == seen["_gated_mul_kernel"] == layers
    outside = {"embedding", "cos", "sin", "cat", "_to_copy", "mul", "index", "sample", "div", "tanh"}
    inside = sum(n for op, n in seen.items() if op not in outside) - 1 - 1  # the last norm, the head
    assert inside / layers + 1 <= MOST, dict(seen)
    assert sum(seen[op] for op in outside) <= 16, dict(seen)
