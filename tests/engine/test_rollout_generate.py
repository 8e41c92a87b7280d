"""`ppomax generate`: what it reads, what it shows, what it counts."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from ppomax.cli import main
from ppomax.config import ConfigError
from ppomax.config.stages import GenerateConfig
from ppomax.models import load_tokenizer
from ppomax.rollout.text import TextStream
from ppomax.stages.evaluate import shipped
from ppomax.stages.generate import generate

from tests.engine.tiny import tiny_assets


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(tiny_assets(tmp_path)["model.policy"])


def test_text_of_prompt_file_and_input(model: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("w5 w6\n\nw7\n", encoding="utf-8")
    shared = dict(model=model, max_new_tokens=6, seed=3)
    by_file, shown = GenerateConfig(**shared, file=str(tmp_path / "prompts.txt"), samples=2), io.StringIO()
    texts = generate(by_file, sink=shown)
    assert len(texts) == 4
    lines = shown.getvalue().splitlines()
    assert [line for line in lines if line.startswith(">")] == ["> w5 w6", "> w5 w6", "> w7", "> w7"]
    assert all(text in shown.getvalue() for text in texts)
    assert "4 responses" in lines[-1]
    assert "5 tokens run once" in lines[-1]  # <s> w5 w6 and <s> w7, each once for its two samples
    by_input = generate(GenerateConfig(**shared, samples=2), source=io.StringIO("w5 w6\nw7\n"), sink=io.StringIO())
    assert by_input == texts
    assert generate(GenerateConfig(**shared, prompt="w5 w6"), sink=io.StringIO()) == texts[:1]


def test_stop_string_ends_the_text(model: str) -> None:
    shared = dict(model=model, prompt="w5", max_new_tokens=30, min_new_tokens=29)
    whole = generate(GenerateConfig(**shared), sink=io.StringIO())[0]
    word = whole.split()[3]
    shared["min_new_tokens"] = 0
    cut = generate(GenerateConfig(**shared | {"stop": word}), sink=io.StringIO())[0]
    assert cut.endswith(word) or len(cut) < len(whole)


def test_pieces_make_the_whole_text() -> None:
    tokenizer = load_tokenizer(shipped("policy"))
    text = "a naïve café — 12 € for “one” 日本語 movie ; isn't it ?"
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    pieces = [stream.push(t) for t in ids]
    assert "".join(pieces) == stream.text == tokenizer.decode(ids, skip_special_tokens=True)
    assert stream.ends_with_stop(["it ?"], pieces[-1]) or stream.ends_with_stop([stream.text[-3:]], pieces[-1])
    assert not stream.ends_with_stop(["caf"], pieces[-1])


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"prompt": "a", "file": "b"}, "prompt and file are both given"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"dtype": "int8"}, "dtype must be one of"),
    ],
)
def test_bad_knobs(knobs: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GenerateConfig(**knobs)


def test_no_prompt_and_no_file(model: str) -> None:
    with pytest.raises(ConfigError, match="no prompt was given"):
        generate(GenerateConfig(model=model), source=io.StringIO("\n"))
    with pytest.raises(ConfigError, match=r"nothing\.txt does not exist"):
        generate(GenerateConfig(model=model, file="nothing.txt"))


def test_command(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jsonargparse", reason="the command line needs jsonargparse")
    assert main(["generate", "--model", model, "--prompt", "w5", "--max_new_tokens", "4"]) == 0
    assert "tokens/s" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert "--max_new_tokens" in capsys.readouterr().out
