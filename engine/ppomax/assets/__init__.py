"""The embedded default: tokenizer, policy, reward model, prompts and a sentiment classifier, made by
`build_default`."""

from __future__ import annotations

from pathlib import Path


def default_assets() -> Path:
    """Folder with `policy/`, `reward_model/`, `prompts.jsonl`, `classifier.json` and `MODEL_CARD.md`."""
    path = Path(__file__).parent / "default"
    if not (path / "policy" / "config.json").is_file():
        raise FileNotFoundError(
            f"the embedded default model is not in {path}; install the package whole, "
            "or rebuild it with `ppomax build-default --data DIR`"
        )
    return path
