"""The README's blocks run word for word: Python with the names that its comments promise, commands with their flags."""

import re
import shlex
from pathlib import Path
from typing import Any

import ppomax
import pytest
import torch
from ppomax.cli import COMMANDS, main
from ppomax.command.options import RUN_FLAGS, Options
from ppomax.config import TrainConfig
from ppomax.config.stages import EvaluateConfig
from ppomax.planning.command import split

from tests.engine.tiny import prompts, small_config, tiny_policy, tiny_reward, tiny_tokenizer

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def names_of_kernels() -> dict[str, Any]:
    torch.manual_seed(0)
    tokens, vocabulary, width = 6, 11, 5
    one = dict.fromkeys(("rewards", "values", "old_logprobs", "advantages"))
    return {
        **{name: torch.randn(tokens) for name in one},
        "logits": torch.randn(tokens, vocabulary, requires_grad=True),
        "labels": torch.randint(vocabulary, (tokens,)),
        "cu_seqlens": torch.tensor([0, 2, 6], dtype=torch.int32),
        "hidden": torch.randn(tokens, width, requires_grad=True),
        "lm_head": torch.nn.Linear(width, vocabulary, bias=False),
    }


def names_of_engine() -> dict[str, Any]:
    return {"policy": tiny_policy(), "reference": None, "critic": None, "reward": tiny_reward(), "prompts": prompts(8)}


@pytest.mark.parametrize(("imports", "names"), [("ppomax_kernels", names_of_kernels), ("ppomax\n", names_of_engine)])
def test_python_runs_as_it_stands(imports: str, names: Any) -> None:
    (code,) = (text for kind, text in BLOCKS if kind == "python" and f"import {imports}" in text)
    after: dict[str, Any] = names()
    exec(code, after)  # our own README
    if "metrics" in after and isinstance(after["metrics"], dict):
        assert after["metrics"]["loss/policy_avg"] == after["metrics"]["loss/policy_avg"]


def test_every_python_block_is_run() -> None:
    """Here or in the tests above."""
    assert sum(kind == "python" for kind, _ in BLOCKS) == 3


def test_the_reward_function_of_the_readme_scores_rows() -> None:
    (block,) = [text for kind, text in BLOCKS if kind == "python" and "def right" in text]
    space: dict[str, Any] = {}
    exec(block, space)
    engine = ppomax.Engine(
        tiny_policy(), None, None, space["right"], small_config(model__critic="policy"), tokenizer=tiny_tokenizer()
    )
    assert set(engine.step(prompts(8), {"answer": ["w"] * 8}).scores.tolist()) <= {0.0, 1.0}


def test_an_engine_needs_no_configuration() -> None:
    engine = ppomax.Engine(tiny_policy(), None, None, tiny_reward())
    assert engine.config.ptx.coef == 0
    assert engine.step(prompts(8)).scores.shape == (8,)


def commands() -> list[list[str]]:
    """The words of each `ppomax` command in blocks and in running text, variables and what is left open taken out."""
    text = README.replace("\\\n", " ")
    lines = [line for kind, block in BLOCKS if not kind for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`(ppomax [a-z-]+[^`]*)`", text)
    found = []
    for line in [*lines, *inline]:
        at = re.search(rf"\bppomax ({'|'.join(COMMANDS)})(?![\w-])", line)
        if at:
            words = shlex.split(re.sub(r"'\"?\$\w+\"?'?|\$\w+", "", line[at.end() :].split("  #")[0]), comments=True)
            if at[1] == "report" or not words or words[0].startswith("-"):  # others are output
                found.append([at[1], *(w for w in words if w not in ("&&", "'"))])
    return found


def test_every_command_of_the_readme_has_the_flags_that_it_gives() -> None:
    kinds: dict[str, tuple[Any, dict[str, str]]] = {
        "train": (TrainConfig, RUN_FLAGS),
        "plan": (TrainConfig, RUN_FLAGS),
        "evaluate": (EvaluateConfig, {}),
    }
    seen = commands()
    assert {"train", "plan", "evaluate", "report"} <= {command for command, *_ in seen}
    for command, *words in seen:
        if words and command in kinds and "--help" not in words:
            Options(command, *kinds[command]).parse(split(words)[1] if command == "plan" else words)


def test_the_plan_of_the_readme_is_printed_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    (words,) = [w for w in commands() if w[:3] == ["plan", "--config", "llama-7b"]]
    assert main(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "fits: 62.5 GiB of 80.0 GiB a rank, fullest in rollout" in shown
