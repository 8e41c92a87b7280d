"""The whole state of an engine in a folder: written atomically, checked on reading, resumed to the bit.

    step-000040/
      policy.safetensors  policy_optim.safetensors  policy_config/   weights, AdamW state, HF config
      critic.safetensors  critic_optim.safetensors  critic_config/
      rng.safetensors     engine.json                                random states (uint8), everything small
      MANIFEST.json                                                  size and SHA-256 of every file; written last

A folder is filled under another name, synced, then renamed, so at any kill it is whole or not there. Only safetensors
and JSON: reading a checkpoint cannot run code. Frozen weights are not stored, be it a whole model's, a hydra's trunk or
those under adapters; a fingerprint refuses others in their place."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ppomax.config import TrainConfig, build, to_dict
from ppomax.models import Critic
from ppomax.sharding import Lazy, Trained, agree, everyone, rank, together
from ppomax.tensor_files import TensorFile, size_of, write_tensors, write_together

if TYPE_CHECKING:
    from ppomax.engine import Engine

log = logging.getLogger(__name__)

MANIFEST, STATE, RNG = "MANIFEST.json", "engine.json", "rng.safetensors"
PART, OLD = ".part-", ".old-"
FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or must not be read; the message names the folder and the mend."""


# ---- an engine's state ----------------------------------------------------------------------------------------------


def save_engine(engine: Engine, path: Path, extra: dict[str, Any]) -> Path:
    """Write `engine` to the folder `path`, replacing one of that name. CheckpointError if the disk does not take it."""
    trained: dict[str, Trained[Any]] = {"policy": engine.policy, "critic": engine.critic}
    generators = {_of_rank(r, name): x for r, found in enumerate(everyone(random_state())) for name, x in found.items()}
    files: dict[str, dict[str, Lazy]] = {RNG: {name: Lazy.of(x) for name, x in generators.items()}}
    for role, part in trained.items():
        weights, optim = part.lazy()
        # In the order of names, so that the bytes do not tell in which order a run came by its tensors.
        files[f"{role}.safetensors"], files[f"{role}_optim.safetensors"] = (
            dict(sorted(d.items())) for d in (weights, optim)
        )
    state = {
        "format": FORMAT,
        "torch": torch.__version__,
        "config": to_dict(engine.config),
        "sources": engine.sources,
        "fingerprints": engine.fingerprints,
        "optimizer_steps": {role: part.steps for role, part in trained.items()},
        "buffers": engine.buffers,
        "episodes": engine.episodes,
        "moments": engine.moments.state(),
        "kl_coef": engine.controller.coef,
        "skipped": engine.health.skipped,
        "skipped_in_a_row": engine.health.in_a_row,
        "random": everyone(python_random_state()),
        "extra": extra,
    }
    need = sum(size_of(x) for file in files.values() for x in file.values())
    with together():
        if rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                check_space(path.parent, need)
            except OSError as error:
                raise unwritten(path, error) from error
    tensors = [x for file in files.values() for x in file.values()]
    write_together(tensors, lambda stream: _write_state(engine, path, files, stream, state))
    return path


def _write_state(
    engine: Engine, path: Path, files: dict[str, dict[str, Lazy]], stream: Iterator[Tensor], state: dict[str, Any]
) -> None:
    """The folder `path`; tensors are taken from `stream` as they become whole."""
    with written_whole(path) as part_dir:
        for name, file in files.items():
            write_tensors(part_dir / name, file.items(), stream)
        engine.policy.module.config.save_pretrained(part_dir / "policy_config")
        if isinstance(engine.critic.module, Critic):
            engine.critic.module.model.config.save_pretrained(part_dir / "critic_config")
        (part_dir / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")


def restore_engine(engine: Engine, path: Path) -> dict[str, Any]:
    """Put the state in `path` into `engine`; returns `extra`. CheckpointError if it is damaged or of other models."""
    state = read_state(path)
    compare_fingerprints(state["fingerprints"], engine.fingerprints, path)
    trained: dict[str, Trained[Any]] = {"policy": engine.policy, "critic": engine.critic}
    for role, part in trained.items():
        part.load(
            TensorFile(path / f"{role}.safetensors"),
            TensorFile(path / f"{role}_optim.safetensors"),
            state["optimizer_steps"][role],
        )
    engine.buffers, engine.episodes = state["buffers"], state["episodes"]
    engine.moments.load(state["moments"])
    engine.controller.coef = state["kl_coef"]
    engine.health.skipped, engine.health.in_a_row = state["skipped"], state["skipped_in_a_row"]
    own = min(rank(), len(state["random"]) - 1)  # a rank that the saved run did not have takes the last one's
    generators = dict(TensorFile(path / RNG).items())
    restore_random_state({n: generators[_of_rank(own, n)] for n in random_state()}, state["random"][own])
    return state["extra"]  # type: ignore[no-any-return]


def load_engine(cls: type[Engine], path: Path, parts: dict[str, Any]) -> Engine:
    """Build the models from their configs, then restore. What a checkpoint lacks comes from its recorded paths or
    `parts`."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from ppomax.models import load_tokenizer

    state = read_state(path)
    config = parts.pop("config", None) or build(TrainConfig, state["config"])
    trust = config.model.trust_remote_code
    shared = config.model.train != "full"  # then the checkpoint lacks what is frozen of the policy
    for name in ("policy" if shared else "reference", "reward"):
        if parts.get(name) is None and not state["sources"].get(name):
            raise CheckpointError(
                f"{path} records no path of its {name}, which was passed as an object; give Engine.load(..., {name}=)"
            )
        parts[name] = parts.get(name) or state["sources"][name]
    parts.setdefault("reference", None)
    if parts.get("tokenizer") is None and state["sources"]["tokenizer"]:
        parts["tokenizer"] = load_tokenizer(state["sources"]["tokenizer"], trust_remote_code=trust)
    policy = parts.pop("policy", None)
    if not shared:
        policy_config = AutoConfig.from_pretrained(path / "policy_config", trust_remote_code=trust)
        policy = AutoModelForCausalLM.from_config(policy_config, trust_remote_code=trust)
    critic = None
    if (path / "critic_config").is_dir():
        critic_config = AutoConfig.from_pretrained(path / "critic_config", trust_remote_code=trust)
        critic = Critic(AutoModelForSequenceClassification.from_config(critic_config, trust_remote_code=trust))
    engine = cls(policy, parts.pop("reference"), critic, parts.pop("reward"), config, **parts)
    engine.sources = state["sources"]
    restore_engine(engine, path)
    return engine


def _of_rank(number: int, name: str) -> str:
    return name if number == 0 else f"rank{number}/{name}"


# ---- whose checkpoint it is -----------------------------------------------------------------------------------------


def compare_fingerprints(saved: dict[str, str | None], now: dict[str, str | None], path: Path) -> None:
    """CheckpointError naming the first model that is not the one `path` was saved with."""
    for role, print_ in saved.items():
        if now.get(role) != print_:
            raise CheckpointError(
                f"{path} was saved with another {role}; resume with the models of that run, "
                "or start anew in another folder"
            )


# ---- files ----------------------------------------------------------------------------------------------------------


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes `path` only once every file in it is listed, synced and named in a manifest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part, old = path.with_name(PART + path.name), path.with_name(OLD + path.name)
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        yield part
        listing = {str(f.relative_to(part)): {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in _files(part)}
        (part / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": listing}, indent=1), encoding="utf-8")
        for file in _files(part):
            _sync(file)
        _sync(part)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise unwritten(path, error) from error
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    os.replace(part, path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def unwritten(path: Path, error: Exception) -> CheckpointError:
    """What stopped `path` from being written, and the mend."""
    reason = f"the disk is full ({error})" if _is_full(error) else f"{type(error).__name__}: {error}"
    return CheckpointError(
        f"{path} could not be written: {reason}. Free some space or choose another run.out; "
        "earlier checkpoints are untouched"
    )


def check_space(folder: Path, need: int) -> None:
    """OSError before a byte is written if `need` bytes are not free."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OSError(errno.ENOSPC, f"{need / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")


def verify(path: Path) -> None:
    """CheckpointError unless every file that the manifest names is there with its size and SHA-256."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        listing = manifest["files"].items()
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} has no readable {MANIFEST}, so it is no whole checkpoint ({error})") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest.get('format')}, this version reads {FORMAT}; use the ppomax that wrote it"
        )
    for name, entry in listing:
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{file} is missing or cut short (wanted {entry['bytes']} bytes); use an earlier checkpoint"
            )
        if sha256(file) != entry["sha256"]:
            raise CheckpointError(f"{file} is damaged (its SHA-256 is not the manifest's); use an earlier checkpoint")


def read_state(path: Path) -> dict[str, Any]:
    """engine.json of a checkpoint that rank 0 has verified."""
    with together():
        if rank() == 0:
            if not path.is_dir():
                raise CheckpointError(f"no checkpoint folder {path}")
            verify(path)
    return json.loads((path / STATE).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def checkpoints(root: Path) -> list[Path]:
    """Finished checkpoint folders under `root`, oldest first; unfinished ones have other names."""
    return sorted(root.glob("step-*")) if root.is_dir() else []


def newest(root: Path) -> Path | None:
    """The newest whole checkpoint under `root`; damaged ones are passed over with a warning each. None: there are none
    at all. CheckpointError: there are some and none is whole."""
    found: Path | None = None
    with together():
        found = _newest(root) if rank() == 0 else None
    return agree(found)


def _newest(root: Path) -> Path | None:
    found = checkpoints(root)
    for path in reversed(found):
        try:
            verify(path)
            return path
        except CheckpointError as error:
            warnings.warn(f"CHECKPOINT PASSED OVER: {error}", stacklevel=2)
            log.error("checkpoint passed over: %s", error)
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints under {root} is whole; start anew in another folder"
        )
    return None


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what killed saves left behind."""
    if rank():
        return
    for path in checkpoints(root)[:-keep]:
        gone = path.with_name(OLD + path.name)
        os.replace(path, gone)  # so that a kill while deleting leaves no half checkpoint under a real name
        shutil.rmtree(gone)
    for pattern in (PART + "*", OLD + "*"):
        for leftover in root.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.is_file())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_full(error: BaseException) -> bool:
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


# ---- random states --------------------------------------------------------------------------------------------------


def random_state() -> dict[str, Tensor]:
    """torch's generators as uint8 tensors. The engine itself draws from none of them; reward functions may."""
    state = {"torch_cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["torch_cuda"] = torch.cuda.get_rng_state()
    return state


def python_random_state() -> dict[str, Any]:
    """Python's and numpy's generators as plain data."""
    import numpy

    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = numpy.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
    }


def restore_random_state(tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Undo `random_state` and `python_random_state`."""
    import numpy

    torch.set_rng_state(tensors["torch_cpu"])
    if "torch_cuda" in tensors:
        torch.cuda.set_rng_state(tensors["torch_cuda"])
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = plain["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
