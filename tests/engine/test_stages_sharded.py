"""Fine-tuning and reward-model training on two ranks, under every ZeRO stage, are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine import stage_cases as cases
from tests.engine.rank_cases import Cases
from tests.engine.test_sharded import ended, start

pytest.importorskip("deepspeed")

CLOSE = 1e-5
"""Of losses, figures, norms (relative above 1) and weights, in float32: the order of sums differs."""
ROUNDED = 0.05
"""The same in bfloat16."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stages")
    cases.prepare(root)
    return root


@pytest.fixture(scope="module")
def on_two(folder) -> Cases:
    ended(start("stages", str(folder), ranks=2))
    return Cases(folder / "stages.json")


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, dict[str, Any]]:
    """Each variant in one process of plain torch."""
    return {name: cases.run(cases.config_of(folder, name, None)) for name in cases.VARIANTS}


def assert_same(got: dict[str, Any], want: dict[str, Any], close: float) -> None:
    assert len(got["rows"]) == len(want["rows"]) == cases.STEPS
    for mine, theirs in zip(got["rows"], want["rows"], strict=True):
        assert mine == {name: pytest.approx(x, rel=close, abs=close) for name, x in theirs.items()}
    assert got["weights"].keys() == want["weights"].keys()
    for name, x in want["weights"].items():
        assert got["weights"][name] == pytest.approx(x, abs=max(close, 2e-5) * max(1.0, *map(abs, x))), name
    assert got["offset"] == pytest.approx(want["offset"], rel=close, abs=close)


@pytest.mark.parametrize(
    "case", [f"{name} {stage}" for name, (_, _, stages) in cases.VARIANTS.items() for stage in stages]
)
def test_two_ranks_are_one_process(on_two, alone, case: str) -> None:
    name = case[:-2]
    rounded = "bfloat16" in name or "autocast" in name
    assert_same(on_two[case], alone[name], ROUNDED if rounded else CLOSE)


@pytest.mark.parametrize(
    ("variant", "stage"), [("sft", 3), ("sft", 1), ("reward, untied", 3), ("sft, lora", 3), ("sft, bfloat16", 3)]
)
def test_resumed_to_the_bit(on_two, variant: str, stage: int) -> None:
    assert on_two[f"resumed {variant} {stage}"] == on_two[f"{variant} {stage}"]


def test_one_process_goes_on_from_two_ranks(on_two, alone, folder) -> None:
    assert_same(cases.from_half(folder, "reward", None, "reward-3", "reward-from-3"), alone["reward"], CLOSE)


def test_micro_batches_add_up_to_the_batch(alone, folder) -> None:
    """`alone` is cut at 12 tokens."""
    from dataclasses import replace

    config = cases.config_of(folder, "sft", None, out="whole")
    assert_same(cases.run(replace(config, micro_tokens=1000)), alone["sft"], CLOSE)


def test_ranks_that_read_other_rows_are_refused(on_two) -> None:
    assert all("the rows that rank 1 read are not those of rank" in said or "rank 0 read" in said
               for said in on_two.on_all("other rows"))  # fmt: skip
