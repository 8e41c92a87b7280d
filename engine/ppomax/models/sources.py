"""Where models and tokenizers are read from: a folder, a hub name, or a model in memory; and the device they go to."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ppomax.models.files import (
    LoadingError,
    TensorPlace,
    compare_names,
    compare_shape,
    model_config,
    model_folder,
    said,
    shape_in,
    tensor_files,
)

log = logging.getLogger(__name__)

ModelSource = str | Path | PreTrainedModel


def read_whole(
    auto: Any, source: str | Path, dtype: torch.dtype, *, trust_remote_code: bool = False, **options: Any
) -> PreTrainedModel:
    """`auto.from_pretrained(source)`, from safetensors alone, with every tensor that the model needs found in the
    files: LoadingError where one is missing, has another shape, or has no place in the model. `options` go to
    from_pretrained."""
    folder = model_folder(source, trust_remote_code=trust_remote_code)
    config, found = model_config(folder, trust_remote_code=trust_remote_code), tensor_files(folder)
    try:
        _compare_shapes(auto, config, folder, found, trust_remote_code)
        model, info = auto.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except (LoadingError, OSError, MemoryError, ImportError):
        raise
    except Exception as error:  # whatever a wrong value sets off in transformers
        raise LoadingError(f"{folder}: transformers makes no model of it: {said(error)}") from error
    left = compare_names(folder, model, found, sorted(info["missing_keys"]), info["unexpected_keys"])
    say_left_out(folder, model, left)
    return model  # type: ignore[no-any-return]


def _compare_shapes(
    auto: Any, config: Any, folder: Path, found: dict[str, TensorPlace], trust_remote_code: bool
) -> None:
    """Before room is made for what the configuration describes: it may be another model, of any size. Tensors that
    transformers lays out otherwise in memory than in the files have other names there, and are its own to check."""
    with torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=trust_remote_code)
    for name, p in model.named_parameters():
        if name in found:
            compare_shape(folder, type(model).__name__, found[name], shape_in(found[name]), tuple(p.shape))


def say_left_out(folder: Path, model: PreTrainedModel, names: list[str]) -> None:
    """Log the tensors of the files that the model does without."""
    if names:
        log.warning("%s: %d tensors are not part of %s: %s ...", folder, len(names), type(model).__name__, names[0])


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """AutoTokenizer.from_pretrained(path); data.check_tokenizer says whether it is fit for PPO. LoadingError: its
    files are damaged."""
    folder = model_folder(path, trust_remote_code=trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ImportError:
        raise
    except Exception as error:  # whatever a damaged file sets off in transformers and tokenizers
        raise LoadingError(f"{folder} holds no tokenizer that transformers can read: {said(error)}") from error


def pick_device(name: str) -> torch.device:
    """`auto`: the GPU if there is one. ValueError: torch knows no such device, or it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # RuntimeError, AssertionError and others, by back end
        raise ValueError(f"run.device: {name!r} cannot be used here ({said(error)}); give auto, cpu or cuda") from error
    return device


def use_threads(count: int) -> None:
    """Have torch compute with `count` CPU threads; 0 leaves it as it is. ValueError: there are not as many CPUs."""
    there = os.cpu_count() or 1
    if count > there:
        raise ValueError(f"threads: {count} were asked for on a machine with {there} CPUs; give at most {there}")
    if count:
        torch.set_num_threads(count)
