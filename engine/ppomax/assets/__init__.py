"""What ships with ppomax: tokenizer, policy, reward model, prompts and a sentiment classifier, made by
`ppomax build-default` (see default/)."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "default"
DEFAULT = "default"
"""The name by which commands know the models that ship with ppomax."""


def named_model(name: str | Path, part: str = "policy") -> str:
    """`name` itself, a folder or hub name; for `default` what ships, and of a run's folder what it wrote: its `policy`,
    or another `part`."""
    if str(name) == DEFAULT:
        return str(shipped(part))
    written = (Path(name) / part / "config.json").is_file() and not (Path(name) / "config.json").is_file()
    return str(Path(name) / part) if written else str(name)


def named_prompts(name: str, *, held_out: bool = False) -> str:
    """`name` itself, any source of rows; for `default` the prompts that ship, those of training or those held out."""
    file = "held_out_prompts.jsonl" if held_out else "prompts.jsonl"
    return str(shipped(file)) if name == DEFAULT else name


def shipped(name: str) -> Path:
    """`policy`, `reward_model`, `prompts.jsonl`, `held_out_prompts.jsonl`, `classifier.json` or `MODEL_CARD.md` of what
    ships.
    FileNotFoundError: the package was installed in part."""
    if not (FOLDER / "policy" / "config.json").is_file():
        raise FileNotFoundError(
            f"the model that ships with ppomax is not in {FOLDER}; install the package whole, "
            "or rebuild it with `ppomax build-default --data DIR`"
        )
    return FOLDER / name
