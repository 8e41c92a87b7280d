"""A model's folder, looked at before transformers opens anything in it.

    folder = model_folder(source)              the folder itself, or that of a hub name, fetched in one try
    config = model_config(folder)              its configuration; nothing in it may name code
    places = tensor_files(folder)              every tensor and the safetensors file that holds it
    compare_names(folder, ...)                 what the model needs against what the files hold, for every reader
An index may name pickles or files elsewhere, and a configuration kernels to be fetched: transformers would follow both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CODE_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
"""Knobs of a configuration that may name a repository of compiled kernels (`owner/name`)."""
OTHER_HEADS = re.compile(r"(lm_head|embed_out|v_head|value_head)\.")
"""Heads that a model of the other kind was saved with; they are left out, and the log says so."""
SCORE_NAMES = re.compile(r"(v_head|value_head|reward_head|scalar_head|regression_head|rm_head|head|classifier)\.")
"""What others call `score`."""


class LoadingError(ValueError):
    """A checkpoint whose files or names do not make the model that its config describes."""


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies."""

    file: Path
    name: str


# ---- folders --------------------------------------------------------------------------------------------------------


def model_folder(source: str | Path, *, trust_remote_code: bool = False) -> Path:
    """The folder `source`, or the one that the hub's `owner/name` was fetched to: from the hub in one short try, or as
    it was fetched before. FileNotFoundError names the path and the nearest folder on disk; LoadingError: the folder is
    an adapter's alone."""
    folder = Path(source)
    if folder.is_dir():
        return _whole_model(folder)
    text = str(source)
    missing = f"no model folder {text}{_nearest(folder)}; give a folder with config.json and model.safetensors"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) or text.startswith("."):
        raise FileNotFoundError(f"{missing}, or a hub name")
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", *(["*.py"] if trust_remote_code else [])]
    try:
        return _whole_model(Path(snapshot_download(text, allow_patterns=patterns)))
    except LoadingError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"{missing}; as a hub name it could not be fetched either ({reason})") from error


def _whole_model(folder: Path) -> Path:
    there = {
        name: (folder / name).is_file() for name in ("config.json", "tokenizer_config.json", "adapter_config.json")
    }
    if there["adapter_config.json"] and not (folder / SINGLE).is_file() and not (folder / INDEX).is_file():
        raise LoadingError(
            f"{folder} is a PEFT adapter, not a model; merge it into its base first: AutoPeftModelForCausalLM"
            f".from_pretrained('{folder}').merge_and_unload().save_pretrained('merged'), and the tokenizer beside it"
        )
    if not there["config.json"] and not there["tokenizer_config.json"]:
        if (folder / "engine.json").is_file() or (folder / "checkpoints").is_dir():
            raise LoadingError(
                f"{folder} is a checkpoint, or the folder of a run that has not ended; make a model folder of it by "
                f"`ppomax export {folder} OUT`"
            )
        raise FileNotFoundError(f"{folder} holds neither config.json nor tokenizer_config.json; give a HF model folder")
    return folder


def _nearest(folder: Path) -> str:
    """What stands beside the missing `folder` and is called most like it."""
    parent = next((p for p in folder.parents if p.is_dir()), Path())
    gone = folder.parts[len(parent.parts)] if parent != Path() else folder.parts[0]
    close = get_close_matches(gone, [p.name for p in parent.iterdir() if p.is_dir()], 1)
    return f" (did you mean {parent / close[0]}?)" if close else ""


def read_json(file: Path) -> dict[str, Any]:
    """An object of a model's folder. LoadingError: it is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LoadingError(f"{file} is damaged: {error}; fetch it again") from error
    if not isinstance(found, dict):
        raise LoadingError(f"{file} holds {type(found).__name__}, a JSON object is wanted; fetch it again")
    return found


def model_config(source: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The HF configuration of a folder or hub name. LoadingError: it is damaged, names code that would be fetched, or
    describes no model that transformers knows."""
    folder = model_folder(source, trust_remote_code=trust_remote_code)
    if not (folder / "config.json").is_file():
        raise LoadingError(f"{folder} has no config.json; give a HF model folder")
    refuse_code(read_json(folder / "config.json"), folder / "config.json")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a wrong value sets off in transformers
        raise LoadingError(f"{folder / 'config.json'} is no configuration of a model: {said(error)}") from error


def refuse_code(knobs: Any, file: Path) -> None:
    """LoadingError if a configuration, however deep, names a repository of kernels or asks for quantised weights."""
    for key, value in knobs.items() if isinstance(knobs, dict) else ():
        inner = value.values() if isinstance(value, dict) else (value,)
        if key in CODE_KEYS and any(isinstance(x, str) and "/" in x for x in inner):
            raise LoadingError(
                f"{file}: {key} is {value!r}, which names compiled kernels to be fetched and run; take it out of the "
                "file if you want the model without them"
            )
        if key == "quantization_config" and value:
            raise LoadingError(
                f"{file}: quantised weights cannot be trained or scored here; save the model unquantised"
            )
        refuse_code(value, file)


def said(error: Exception) -> str:
    """An exception of a library in one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]}"


# ---- files and names ------------------------------------------------------------------------------------------------


def tensor_files(path: str | Path) -> dict[str, TensorPlace]:
    """Every tensor of a checkpoint folder and the file that holds it. LoadingError: a file is missing, is not
    safetensors, lies elsewhere, or lacks a tensor that the index places in it."""
    folder = Path(path)
    if (folder / INDEX).is_file():
        placed = _placed_by_index(folder)
    elif (folder / SINGLE).is_file():
        placed = dict.fromkeys(_names_in(folder / SINGLE), SINGLE)
    else:
        raise LoadingError(f"{folder} holds neither {SINGLE} nor {INDEX}; save the model with safe_serialization")
    there = {file: set(_names_in(folder / file)) for file in sorted(set(placed.values()))}
    lost = [name for name, file in placed.items() if name not in there[file]]
    if lost:
        raise LoadingError(f"{folder}: {INDEX} places {lost[0]} in {placed[lost[0]]}, which does not hold it")
    return {name: TensorPlace(folder / file, name) for name, file in placed.items()}


def _placed_by_index(folder: Path) -> dict[str, str]:
    placed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise LoadingError(f"{folder / INDEX} has no weight_map of tensors to files; fetch it again")
    for file in set(map(str, placed.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise LoadingError(
                f"{folder}: {INDEX} places tensors in {file!r}; only .safetensors files of the same folder are read"
            )
    absent = sorted({file for file in placed.values() if not (folder / file).is_file()})
    if absent:
        raise LoadingError(
            f"{folder}: {absent[0]} is missing{f' and {len(absent) - 1} more' if len(absent) > 1 else ''}, though "
            f"{INDEX} places tensors in it; fetch the whole checkpoint again"
        )
    return placed


def _names_in(file: Path) -> list[str]:
    try:
        with safe_open(file, "pt") as opened:  # type: ignore[no-untyped-call]
            return list(opened.keys())
    except SafetensorError as error:
        raise LoadingError(f"{file} is cut short or is not a safetensors file: {error}") from error


def shape_in(place: TensorPlace) -> tuple[int, ...]:
    """Of the file's header."""
    with safe_open(place.file, "pt") as opened:  # type: ignore[no-untyped-call]
        return tuple(opened.get_slice(place.name).get_shape())


def compare_names(
    folder: Path, model: Any, found: dict[str, TensorPlace], missing: Sequence[str], unexpected: Iterable[str]
) -> list[str]:
    """LoadingError if tensors of `model` are `missing`, or the files hold ones that it has no place for. Returns those
    that are left out knowingly: heads of the other kind, and what transformers leaves out of every such model."""
    kind = type(model).__name__
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    extra = sorted(n for n in unexpected if not any(re.search(p, n) for p in patterns))
    if missing:
        raise LoadingError(_what_is_missing(folder, kind, found, missing, extra))
    if any(name.startswith("score.") for name in extra):
        raise LoadingError(
            f"{folder} is a reward model (it holds {next(n for n in extra if n.startswith('score.'))}), where a "
            f"{kind} is wanted; name the language model"
        )
    foreign = [name for name in extra if not OTHER_HEADS.match(name)]
    if foreign:
        raise LoadingError(
            f"{folder}: {kind} has no place for {foreign[0]}{_and_more(foreign)}; its config.json and its weights are "
            "of two models"
        )
    return extra


def compare_shape(folder: Path, kind: str, place: TensorPlace, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """LoadingError if a tensor's shape in its file is not what the model wants."""
    if shape != wanted:
        raise LoadingError(
            f"{folder}: {place.name} is {shape} in {place.file.name}, {kind} wants {wanted}; its config.json and its "
            "weights are of two models"
        )


def _what_is_missing(
    folder: Path, kind: str, found: dict[str, TensorPlace], missing: Sequence[str], extra: list[str]
) -> str:
    words = f"{folder}: no tensor for {missing[0]}{_and_more(missing)} of {kind}"
    if any(name.startswith("score.") for name in missing):
        head = next((n for n in extra if SCORE_NAMES.match(n)), None)
        if head is not None:
            shape = shape_in(found[head])
            return f"{words}, but {head} {shape} is there; if that is the score head, save it as score.weight (1, D)"
        if "ForSequenceClassification" in kind:
            return f"{words}; a language model has no score head: train one by `ppomax reward-model --model {folder}`"
    if any(name.startswith("score.") for name in extra):
        return f"{words}, and {next(n for n in extra if n.startswith('score.'))} is there: it is a reward model"
    return f"{words} ({len(found)} tensors are there); name a checkpoint of this architecture, or fetch it whole again"


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
