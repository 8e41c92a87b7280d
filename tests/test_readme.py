"""The README's and the guide's blocks run word for word: Python with the names that its comments promise, commands with
their flags. Links lead somewhere, and metrics are those that a run has."""

import re
import shlex
from pathlib import Path
from typing import Any

import ppomax
import pytest
import torch
from ppomax.cli import COMMANDS, main
from ppomax.command.options import RUN_FLAGS, Options
from ppomax.config import TrainConfig, to_dict
from ppomax.config.mapping import flat
from ppomax.config.stages import EvaluateConfig, RewardModelConfig, SftConfig
from ppomax.planning.command import split

from tests.engine.tiny import prompts, small_config, tiny_policy, tiny_reward, tiny_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "engine" / "guide").glob("*.md"))}


def blocks_of(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


BLOCKS = blocks_of(README)


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


def commands(page: str = README) -> list[list[str]]:
    """The words of each `ppomax` command in blocks and in running text, variables and what is left open taken out."""
    text = page.replace("\\\n", " ")
    blocks = [block for kind, block in blocks_of(page) if kind != "python"]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`(ppomax [a-z-]+[^`]*)`", text)
    found = []
    for line in [*lines, *inline]:
        at = re.search(rf"\bppomax ({'|'.join(COMMANDS)})(?![\w-])", line)
        if at:
            words = shlex.split(re.sub(r"'\"?\$\w+\"?'?|\$\w+", "", line[at.end() :].split("  #")[0]), comments=True)
            if at[1] == "report" or not words or words[0].startswith("-"):  # others are output
                found.append([at[1], *(w for w in words if w not in ("&&", "'"))])
    return found


KINDS: dict[str, tuple[Any, dict[str, str]]] = {
    "train": (TrainConfig, RUN_FLAGS),
    "sft": (SftConfig, RUN_FLAGS),
    "reward-model": (RewardModelConfig, RUN_FLAGS),
    "evaluate": (EvaluateConfig, {}),
}


@pytest.mark.parametrize("page", ["README", *GUIDE])
def test_every_command_has_the_flags_that_it_gives(page: str) -> None:
    seen = commands(README if page == "README" else GUIDE[page])
    if page == "README":
        assert {"train", "plan", "sft", "reward-model", "evaluate", "report"} <= {command for command, *_ in seen}
    for command, *words in seen:
        if command == "plan":
            command, words = (words[0], words[1:]) if words and words[0] in KINDS else ("train", words)
            words = [*split(words)[1], *(["--data", "none"] if command != "train" else [])]
        if words and command in KINDS and not {"--help", "..."} & set(words):
            Options(command, *KINDS[command]).parse(words)


@pytest.mark.parametrize("page", GUIDE)
def test_links_of_the_guide_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", GUIDE[page]):
        file, _, anchor = target.partition("#")
        path = ROOT / "engine" / "guide" / (file or page)
        assert path.exists(), target
        heads = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in heads], target


def test_the_index_has_thirty_wishes() -> None:
    _, wishes = GUIDE["README.md"].split("## I want to ...")
    assert len(re.findall(r"^\| [a-z]", wishes, re.MULTILINE)) - 1 >= 30


def test_metrics_and_knobs_of_the_guide_are_there() -> None:
    config = small_config(ptx__coef=0.0, rollout__temperature=0.9)  # which has metrics of its own
    engine = ppomax.Engine(tiny_policy(), None, None, tiny_reward(), config)
    known = set(engine.step(prompts(8)).metrics)
    knobs = set(flat(to_dict(TrainConfig())))
    text = "".join(GUIDE.values())
    named = re.findall(r"`((?:objective|policy|rollout|val|loss|critic)/\w+)`", text)
    assert len(named) > 8
    assert [name for name in named if name not in known] == []
    dotted = re.findall(r"`((?:reward|monitor|kl|rollout|batch|critic|data|sharding)\.\w+)[`: ]", text)
    assert len(dotted) > 3
    assert [name for name in dotted if name not in knobs] == []


def test_the_reward_functions_of_the_guide_give_what_they_say() -> None:
    space: dict[str, Any] = {}
    for kind, block in blocks_of(GUIDE["rewards.md"]):
        if kind == "python":
            exec(block, space)
    assert space["right"](["2+2="] * 2, ["4", "5"], ["4", "4"]) == [1.0, 0.0]
    assert space["by_line"](["p"], ["a"], [[5, 198, 7, 198]]) == [[0.0, 1.0, 0.0, 1.0]]


def test_the_plan_of_the_readme_is_printed_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    (words,) = [w for w in commands() if w[:3] == ["plan", "--config", "llama-7b"]]
    assert main(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "fits: 62.5 GiB of 80.0 GiB a rank, fullest in rollout" in shown
