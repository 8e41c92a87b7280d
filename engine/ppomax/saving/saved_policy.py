"""The policy of a run or a checkpoint, in whatever mode it was trained, without an engine around it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ppomax.assets import named_model
from ppomax.config import TrainConfig, build
from ppomax.models import load_policy, load_tokenizer
from ppomax.models.fingerprints import fingerprint
from ppomax.models.frozen_bits import place
from ppomax.models.modes import set_up
from ppomax.saving.dealt import DealtTensors
from ppomax.saving.engine_state import STATE, read_state
from ppomax.saving.folder import CheckpointError, newest
from ppomax.sharding import copy_into

log = logging.getLogger(__name__)


class SavedPolicy(NamedTuple):
    """What a checkpoint holds of its policy."""

    model: PreTrainedModel
    """As it was trained: adapters on it, frozen blocks taken from the model that the run began with."""
    tokenizer: PreTrainedTokenizerBase | None
    state: dict[str, Any]
    """The checkpoint's engine.json."""
    checkpoint: Path


def checkpoint_of(path: Path) -> Path | None:
    """The checkpoint that `path` is, or the newest whole one of the run whose folder it is; None: it is neither.
    CheckpointError: a run that has none."""
    if (path / STATE).is_file():
        return path
    if not (path / "checkpoints").is_dir():
        return None
    found = newest(path / "checkpoints")
    if found is None:
        raise CheckpointError(f"{path} is the folder of a run that has written no checkpoint yet")
    return found


def saved_policy(path: Path, base: str | None = None, *, trust_remote_code: bool = False) -> SavedPolicy:
    """The policy of the checkpoint (or of the newest one of the run) `path`. base: the model that the run began with,
    where its path of then is no longer right; only what was frozen is read from it.

    CheckpointError: nothing is there, it is damaged, or `base` is not the model that the run began with."""
    checkpoint = checkpoint_of(path)
    if checkpoint is None:
        raise CheckpointError(f"{path} is neither a checkpoint (no {STATE}) nor the folder of a run (no checkpoints/)")
    state = read_state(checkpoint)
    if "config" not in state:
        raise CheckpointError(
            f"{checkpoint} is of a stage before PPO, which writes its model as a Hugging Face folder when it ends; use "
            "that, or end the run by --resume"
        )
    config = build(TrainConfig, state["config"])
    dtype = torch.float32 if config.model.dtype == "float32" else torch.bfloat16
    start = base or state["sources"]["policy"]
    if config.model.train == "full":
        known = AutoConfig.from_pretrained(checkpoint / "policy_config", trust_remote_code=trust_remote_code)
        policy = load_policy(AutoModelForCausalLM.from_config(known, trust_remote_code=trust_remote_code), dtype)
        if start and (Path(start) / "generation_config.json").is_file():
            policy.generation_config = GenerationConfig.from_pretrained(start)
    else:
        if not start:
            raise CheckpointError(
                f"{checkpoint} was trained as {config.model.train}, so what was frozen of its policy is not in it, and "
                "it records no path of that; name the model that the run began with (--base)"
            )
        try:
            policy = load_policy(start, dtype, trust_remote_code=trust_remote_code)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{checkpoint} was trained from {start}, which has moved (--base): {error}"
            ) from error
        place(policy, policy.device, config.model, trained=True)
        set_up(policy, None, config.model, seed=config.run.seed)
    if fingerprint(policy) != state["fingerprints"]["policy"]:
        raise CheckpointError(f"{checkpoint} was trained from another model than {start}; name that one (--base)")
    copy_into(policy, DealtTensors(checkpoint, "policy"))
    source = config.model.tokenizer or base or state["sources"]["tokenizer"]
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code) if source else None
    return SavedPolicy(policy.eval(), tokenizer, state, checkpoint)


def open_policy(
    name: str, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Policy and tokenizer of whatever `name` is: a run's folder, a checkpoint in one, a HF folder, a hub name, or
    `default`."""
    where = named_model(name)
    path = Path(where)
    if not (path / "config.json").is_file() and checkpoint_of(path) is not None:
        found = saved_policy(path, trust_remote_code=trust_remote_code)
        if found.tokenizer is None:
            raise CheckpointError(f"{found.checkpoint} records no tokenizer; use the exported policy instead")
        return load_policy(found.model, dtype), found.tokenizer
    return load_policy(where, dtype, trust_remote_code=trust_remote_code), load_tokenizer(
        where, trust_remote_code=trust_remote_code
    )
