"""The whole state of an engine in a folder: written atomically, checked on reading, resumed to the bit.

    step-000040/
      policy.safetensors  policy_optim.safetensors  policy_config/   weights, AdamW state, HF config; of several ranks
      critic.safetensors  critic_optim.safetensors  critic_config/   each has files of its own (dealt.py)
      rng.safetensors     engine.json                                random states (uint8), everything small
      MANIFEST.json                                                  size and SHA-256 of every file; written last
Frozen weights are not stored, be it a whole model's, a hydra's trunk or those under adapters; a fingerprint refuses
others in their place. A reference that follows the policy (`kl.refresh_every`) is: reference.safetensors."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ppomax.config import TrainConfig, build
from ppomax.models import Critic, load_tokenizer
from ppomax.models.scorer_class import auto_scorer
from ppomax.models.trunk import config_as_given
from ppomax.saving.dealt import DealtTensors
from ppomax.saving.folder import FORMAT, CheckpointError, verify, write_together
from ppomax.saving.random_state import python_random_state, random_state, restore_random_state
from ppomax.sharding import Lazy, Trained, ranks
from ppomax.sharding.weights import lazy_weights, overwrite

log = logging.getLogger(__name__)

STATE, RNG = "engine.json", "rng.safetensors"


class Parts(NamedTuple):
    """The models that a checkpoint holds, by role."""

    trained: dict[str, Trained[Any]]
    """Those that an optimiser steps."""
    frozen: dict[str, nn.Module]
    """Others whose weights are not those that the run started from."""


def save_state(path: Path, parts: Parts, state: dict[str, Any], extra: dict[str, Any]) -> Path:
    """Write a checkpoint to the folder `path`, replacing one of that name. CheckpointError if the disk does not take
    it. Every rank calls.

    state: everything else that an engine is, plain data (see `Engine.state`); extra: what the caller wants back."""
    write_together(path, *contents(parts, state, extra))
    return path


def contents(
    parts: Parts, state: dict[str, Any], extra: dict[str, Any]
) -> tuple[dict[str, dict[str, Lazy]], Callable[[Path], None]]:
    """The tensors of a checkpoint by file, and what rank 0 adds to its folder: all else, as it is now. Arguments as of
    `save_state`; every rank calls."""
    trained = parts.trained
    refuse_not_finite(trained)
    generators = {
        _of_rank(r, name): x
        for r, found in enumerate(ranks.gather_objects(random_state()))
        for name, x in found.items()
    }
    files: dict[str, dict[str, Lazy]] = {}
    for role, part in trained.items():
        weights, optim = part.lazy()
        # In the order of names, so that the bytes do not tell in which order a run came by its tensors.
        files[role], files[f"{role}_optim"] = (dict(sorted(d.items())) for d in (weights, optim))
    files |= {role: dict(sorted(lazy_weights(module).items())) for role, module in parts.frozen.items()}
    written = json.dumps(
        {
            "format": FORMAT,
            "torch": torch.__version__,
            **state,
            "optimizer_steps": {role: part.steps for role, part in trained.items()},
            "random": ranks.gather_objects(python_random_state()),
            "extra": extra,
        },
        indent=1,
    )  # now: what it is made from goes on changing

    def finish(folder: Path) -> None:
        save_file(generators, folder / RNG)
        for role, part in trained.items():
            model = part.module.model if isinstance(part.module, Critic) else part.module
            if isinstance(model, PreTrainedModel):  # a critic on the policy's trunk has no configuration of its own
                with config_as_given(model):
                    model.config.save_pretrained(folder / f"{role}_config")
        (folder / STATE).write_text(written, encoding="utf-8")

    return files, finish


def refuse_not_finite(trained: dict[str, Trained[Any]]) -> None:
    """CheckpointError on all ranks if a model has a weight that is NaN or infinite: it is neither to be gone on from
    nor to be used."""
    for role, part in trained.items():
        own = [getattr(p, "ds_tensor", p).detach() for p in part.params]
        bad = torch.stack([~torch.isfinite(x).all() for x in own if x.numel()] or [torch.tensor(False)]).any()
        if bool(ranks.max(bad.float().to(own[0].device))):
            raise CheckpointError(
                f"the {role} has weights that are not finite, so it is not written; go on from the newest checkpoint "
                "with lower learning rates"
            )


def read_state(path: Path, *, verified: bool = False) -> dict[str, Any]:
    """engine.json of a checkpoint that the ranks verify, unless they just have. CheckpointError: it is damaged."""
    if not verified:
        verify(path)
    return json.loads((path / STATE).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def restore_state(
    path: Path,
    state: dict[str, Any],
    parts: Parts,
    fingerprints: dict[str, str | None],
    accept_changes: bool = False,
) -> dict[str, Any]:
    """Put weights, optimisers and random states of the checkpoint `path` in place, whose `state` was read; returns the
    `extra` that `save_state` was given. CheckpointError if it is of models with other `fingerprints`, unless
    accept_changes."""
    compare_fingerprints(state["fingerprints"], fingerprints, path, accept_changes)
    for role, part in parts.trained.items():
        part.load(
            DealtTensors(path, role),
            DealtTensors(path, f"{role}_optim"),
            state["optimizer_steps"][role],
        )
    for role, module in parts.frozen.items():
        overwrite(module, DealtTensors(path, role))
    own = min(ranks.rank(), len(state["random"]) - 1)  # a rank that the saved run did not have takes the last one's
    generators = load_file(path / RNG)
    restore_random_state({n: generators[_of_rank(own, n)] for n in random_state()}, state["random"][own])
    return state["extra"]  # type: ignore[no-any-return]


def saved_parts(path: Path, state: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The arguments that make an engine like the one saved in `path`, whose `state` was read: models built from their
    saved configurations (weights are restored later), the rest from `given` or from the paths that it recorded.
    CheckpointError names what has neither."""
    config = given.get("config") or build(TrainConfig, state["config"])
    trust, sources = config.model.trust_remote_code, state["sources"]
    shared = config.model.train != "full"  # the checkpoint then lacks what is frozen of the policy
    parts = {"reference": None, "tokenizer": None, **given, "config": config, "critic": None}
    for name in ("policy" if shared else "reference", "reward"):
        if parts.get(name) is None and not sources.get(name):
            raise CheckpointError(
                f"{path} records no path of its {name}, which was passed as an object; give Engine.load(..., {name}=)"
            )
        parts[name] = parts.get(name) or sources[name]
    if parts["tokenizer"] is None and sources["tokenizer"]:
        parts["tokenizer"] = load_tokenizer(sources["tokenizer"], trust_remote_code=trust)
    if not shared:
        saved = AutoConfig.from_pretrained(path / "policy_config", trust_remote_code=trust)
        parts["policy"] = AutoModelForCausalLM.from_config(saved, trust_remote_code=trust)
    if (path / "critic_config").is_dir():
        saved = AutoConfig.from_pretrained(path / "critic_config", trust_remote_code=trust)
        parts["critic"] = Critic(auto_scorer(saved).from_config(saved, trust_remote_code=trust))
    return parts


def compare_fingerprints(
    saved: dict[str, str | None], now: dict[str, str | None], path: Path, accept_changes: bool
) -> None:
    """CheckpointError naming the first model or data that is not the one `path` was saved with; with `accept_changes`
    a warning for each."""
    for what, print_ in saved.items():
        if now.get(what) == print_:
            continue
        words = f"{path} was saved with {'other' if what.endswith('s') else 'another'} {what}"
        if not accept_changes:
            raise CheckpointError(
                f"{words}; resume with the models and data of that run, start anew in another folder, or set "
                "run.accept_changes=true to go on with what is here now"
            )
        log.warning("%s; going on, as run.accept_changes says", words)


def _of_rank(number: int, name: str) -> str:
    return name if number == 0 else f"rank{number}/{name}"
