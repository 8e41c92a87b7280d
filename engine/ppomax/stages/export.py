"""`ppomax export`: the policy of a run, or of one of its checkpoints, as a Hugging Face folder with a model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppomax.config import ConfigError, OptimConfig
from ppomax.config.mapping import flat
from ppomax.saving.export_policy import export_policy
from ppomax.saving.jsonl import read_rows
from ppomax.saving.saved_policy import SavedPolicy, saved_policy
from ppomax.sharding import Trained

FIGURES = {
    "objective/scores": "mean raw score of a buffer",
    "objective/kl_per_token": "KL to the start (k3, nats a token)",
    "rollout/ref_perplexity": "perplexity of its responses under the start",
    "rollout/length": "tokens a response",
    "rollout/distinct_2": "distinct bigrams",
    "eval/win_rate": "win rate over the start on held-out prompts",
}
"""What the card tells of the last step, where it was measured."""


@dataclass
class Held:
    """What `export_policy` takes from an engine."""

    policy: Trained[PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase | None


def export(
    source: Path, out: Path, *, base: str | None = None, push_to_hub: str | None = None, trust_remote_code: bool = False
) -> Path:
    """Write the policy of `source` (a run's folder: its newest checkpoint; or a checkpoint) to the HF folder `out`:
    weights with adapters merged in, tokenizer, chat template, generation config, README.md. Returns `out`.

    base: the model that the run began with, where it has moved. push_to_hub: a repository name; the folder is uploaded
    there, as the user who is logged in. ConfigError: `out` holds something else; CheckpointError: see
    `saved_policy`."""
    if out.exists() and not (out / "config.json").is_file():
        raise ConfigError(f"{out} is there and holds no exported model; name a new folder")
    found = saved_policy(source, base, trust_remote_code=trust_remote_code)
    export_policy(Held(Trained(found.model, OptimConfig(), 1), found.tokenizer), out)
    (out / "README.md").write_text(card(found), encoding="utf-8")
    if push_to_hub is not None:
        upload(out, push_to_hub)
    return out


def upload(folder: Path, name: str) -> None:
    """Put the folder into the hub's repository `name`, made if need be."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(name, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=folder)


def card(found: SavedPolicy) -> str:
    """The model card: what it started from, on what data, its figures, and the command that trains it."""
    config, sources = found.state["config"], found.state["sources"]
    step = found.state["extra"].get("progress", {}).get("step", 0)  # an engine saved by hand has no such count
    rows = [r for r in read_rows(found.checkpoint.parents[1] / "metrics.jsonl") if r["step"] == step and step]
    figures = [f"| {words} | {rows[-1][key]:.4g} |" for key, words in FIGURES.items() if rows and key in rows[-1]]
    reward = config["reward"]["function"] or config["model"]["reward_model"] or sources["reward"]
    start = config["model"]["policy"] or "the model that ships with ppomax"
    lines = [
        "---",
        "library_name: transformers",
        "tags: [ppo, rlhf, ppomax]",
        "---",
        f"# {found.checkpoint.parents[1].resolve().name}",
        "",
        f"Trained by PPO-max with ppomax from {start}, {config['model']['train']}, {step} steps of "
        f"{config['batch']['rollout_size']} responses.",
        "",
        f"- prompts: {config['data']['prompts'] or 'those that ship with ppomax'}",
        f"- reward: {reward or 'given as an object'}",
        "",
        *(["| at its last step | |", "|---|---|", *figures, ""] if figures else []),
        "```",
        f"ppomax train --preset {config['preset']} {changed(config)}".rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def changed(config: dict[str, Any]) -> str:
    """The flags in which a configuration differs from its preset; where it ran and wrote left out."""
    from ppomax.config import load_config, to_dict

    plain = flat(to_dict(load_config(preset=config["preset"])))
    own = ("run.out", "run.resume", "run.device", "run.threads", "preset")
    flags = {k: v for k, v in flat(config).items() if v != plain.get(k) and k not in own}
    return " ".join(f"--{knob} {written(value)}" for knob, value in flags.items())


def written(value: Any) -> str:
    """As a command line takes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
