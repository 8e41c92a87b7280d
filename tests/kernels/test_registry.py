"""One list of ops, and everything that an op needs is there; one table of the C ABI, and the header says the same."""

import re
from pathlib import Path

import ppomax_kernels as K
import pytest
from ppomax_kernels import registry
from ppomax_kernels.backends import abi
from ppomax_kernels.metrics import POLICY_METRICS, VALUE_METRICS

from . import oracle, sampling
from .calls import WANTS, arguments
from .mutants import MUTANTS

HEADER = Path(__file__).resolve().parents[2] / "csrc" / "ppomax_kernels.h"
TEXT = re.sub(r"/\*.*?\*/", "", HEADER.read_text(encoding="utf-8"), flags=re.S)
PROTOTYPES = {
    name: [word for word in " ".join(given.split()).split(", ") if word != "void"]
    for name, given in re.findall(r"PPOMAX_API int (ppomax_\w+)\(([^)]*)\);", TEXT)
}
KINDS = {"int": abi.I, "int64_t": abi.L, "double": abi.D}


@pytest.mark.parametrize("op", registry.OPS)
def test_everything_that_an_op_needs_is_there(op: str) -> None:
    """The op's own files, an oracle, mutants and arguments for the tests that go over all ops."""
    assert callable(getattr(K, op)), f"ppomax_kernels/__init__.py does not export {op}"
    assert {"ref", "cpu", "triton"} <= set(registry.table_of(op))
    assert op in arguments(), f"tests/kernels/calls.py has no arguments for {op}"
    assert MUTANTS.get(op), f"tests/kernels/mutants.py has no mutants of {op}"
    plain = op.removeprefix("linear_").replace("nll", "token_logprobs")
    assert any(n.startswith(plain) for n in vars(oracle) | vars(sampling)), (
        f"tests/kernels/oracle.py has no truth for {op}"
    )


def test_the_face_shows_the_ops_of_the_registry() -> None:
    assert {name for name in K.__all__ if name[0].islower()} == set(registry.OPS)
    assert set(WANTS) <= set(arguments()) == set(registry.OPS)


def test_every_op_is_measured() -> None:
    import torch

    from bench.ops import OPS

    made = {p.op for make in OPS.values() for p in make(torch.device("cpu"), torch.float32, "quick")}
    lost = [op for op in registry.OPS if not any(name.split()[0] == op for name in made)]
    assert not lost, f"bench has no problem for {lost}"


@pytest.mark.parametrize("name", sorted(abi.SIGNATURES))
def test_the_table_of_functions_is_the_header(name: str) -> None:
    """Number and kind of the arguments of each function that ctypes calls."""
    kinds = [abi.P if "*" in word else KINDS[word.split()[-2]] for word in PROTOTYPES[name]]
    assert abi.SIGNATURES[name] == kinds, f"{name}({', '.join(PROTOTYPES[name])})"


def test_no_function_of_the_header_is_forgotten() -> None:
    assert {n for n in PROTOTYPES if n.endswith(("_cpu", "_cuda"))} == set(abi.SIGNATURES)


def test_codes_are_those_of_the_header() -> None:
    codes = {name: int(value) for name, value in re.findall(r"(PPOMAX_\w+)\s*=\s*(-?\d+)", TEXT)}
    for name in ("BAD_LABEL", "BAD_SEQLENS", "BAD_LOGITS", "CUDA_ERROR", "BAD_PAGE"):
        assert getattr(abi, name) == codes[f"PPOMAX_{name}"]
    assert list(abi.DTYPES.values()) == [codes[f"PPOMAX_{n}"] for n in ("FP32", "BF16", "FP16")]
    assert list(abi.ESTIMATORS.values()) == [codes[f"PPOMAX_{n}"] for n in ("K1", "K2", "K3", "KABS")]


@pytest.mark.parametrize(("op", "names"), [("ppo", POLICY_METRICS), ("value", VALUE_METRICS)])
def test_as_many_metrics_are_written_as_are_named(op: str, names: tuple[str, ...]) -> None:
    """The header states how many floats `metrics` holds."""
    after = HEADER.read_text(encoding="utf-8").split(f"ppomax_{op}_loss_cpu(")[0]
    stated = re.findall(r"metrics[^.]*?(\d+) floats", after, flags=re.S)
    assert stated, "the header does not say how many metrics there are"
    assert int(stated[-1]) == len(names)
