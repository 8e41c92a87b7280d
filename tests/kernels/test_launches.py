"""Triton launches: nothing is compiled anew for a length or a number, tokens are on grid-x alone, and no launcher
waits for the device."""

import ast
from pathlib import Path

import ppomax_kernels as K
import pytest
import torch
from ppomax_kernels.registry import OPS

from .backends import Backend
from .cases import Logits

KERNELS = Path(__file__).resolve().parents[2] / "kernels" / "ppomax_kernels"


def test_the_cache_stays_as_it_is() -> None:
    """No recompilation for a length or a temperature, counted in Triton's own cache (test_triton_compile.py does
    without a GPU, for every launcher)."""
    if not torch.cuda.is_available():
        pytest.skip("triton: no GPU, so nothing is compiled at a call")
    from ppomax_kernels import token_logprobs_triton as module

    def run(n: int, temperature: float) -> None:
        logits, labels, _, _ = Logits((n,), 1000).draw("cuda")
        K.token_logprobs(logits, labels, temperature=temperature, return_entropy=True, impl="triton")

    for n in (32, 33):
        run(n, 1.0)
    cache = module._token_logprobs_kernel.device_caches[torch.cuda.current_device()][0]
    before = len(cache)
    for n, temperature in ((64, 0.5), (65, 0.7), (1000, 0.9), (1001, 1.1)):
        run(n, temperature)
    assert len(cache) == before


def test_tokens_on_grid_x(impl: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grid-y and -z end at 65535."""
    if not impl.interpreted:
        pytest.skip(f"{impl.name}: grids are recorded in Triton's interpreter")
    from triton.runtime import interpreter

    from .calls import Call

    grids = []
    run = interpreter.GridExecutor.__call__

    def record(self: object, *args: object, **kwargs: object) -> None:
        grids.append(self.grid)  # type: ignore[attr-defined]
        run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", record)
    for op in OPS:
        Call(op, impl).forward()
    assert len(grids) >= len(OPS) - 2
    for grid in grids:
        assert len(grid) == 1 or set(grid[1:]) == {1}, f"grid {grid}"


# Calls through which the host waits for the device. (int() and float() of a tensor and bool() of one are .item() in
# disguise; see the fake tensors of test_registration.py, where any of them fails.)
WAITS = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize", "any", "all", "unique", "masked_select"}
# What reads values back on purpose: on a CPU, where it is free, or when a user asks for floats.
MAY_WAIT = {
    ("checks.py", "cu_seqlens_values"),
    ("checks.py", "labels_values"),
    ("checks.py", "fractions"),
    ("metrics.py", "to_dict"),
    ("chunks.py", "kept_rows"),
    ("vocab_shard.py", "of"),
}
HOT = sorted(
    p for p in KERNELS.rglob("*.py") if p.name not in ("reference.py", "__main__.py", "compile_triton.py", "native.py")
)


@pytest.mark.parametrize("path", HOT, ids=lambda p: p.stem)
def test_no_host_sync_in_the_source(path: Path) -> None:
    for function in (
        n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.FunctionDef)
    ):
        if (path.name, function.name) in MAY_WAIT or any("jit" in ast.unparse(d) for d in function.decorator_list):
            continue
        for call in (n for n in ast.walk(function) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)):
            assert call.func.attr not in WAITS, (
                f"{path.name}, {function.name}, line {call.lineno}: {ast.unparse(call)} waits for the device"
            )
