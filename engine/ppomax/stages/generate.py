"""`ppomax generate`: try a model by hand. Text appears as it is sampled; the decoding is the rollout's own."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, TextIO

from ppomax.assets import DEFAULT, named_model
from ppomax.config import ConfigError
from ppomax.config.stages import GenerateConfig


def generate(config: GenerateConfig, source: TextIO | None = None, sink: TextIO | None = None) -> list[str]:
    """Write prompt and response of each sequence to `sink` (standard output), the first one as it comes; returns the
    responses' texts. A last line tells tokens and tokens a second."""
    from ppomax.data import encode_prompt
    from ppomax.models import pick_device
    from ppomax.models.checks import eos_ids_of
    from ppomax.rollout import Sampling, decode
    from ppomax.saving.saved_policy import open_policy

    texts = prompts_of(config, source or sys.stdin)
    sink = sink or sys.stdout
    path = named_model(config.model or DEFAULT)
    model, tokenizer = open_policy(path, dtype=dtype_of(path, config), trust_remote_code=config.trust_remote_code)
    model = model.to(pick_device(config.device)).eval()  # type: ignore[arg-type]
    turns: list[Any] = [[{"role": "user", "content": text}] if config.chat else text for text in texts]
    ids = [encode_prompt(turn, tokenizer) for turn in turns for _ in range(config.samples)]
    titles = [text for text in texts for _ in range(config.samples)]
    shown = Shown(titles, tokenizer, sink)
    began = time.perf_counter()
    sampling = Sampling(
        config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        repetition_penalty=config.repetition_penalty,
        stop=tuple(config.stop.split("|")) if config.stop else (),
        seed=config.seed,
        slots=config.slots,
    )
    eos_ids = eos_ids_of(model, tokenizer)
    given = decode(model, ids, range(len(ids)), sampling, eos_ids=eos_ids, tokenizer=tokenizer, on_token=shown.take)
    seconds = time.perf_counter() - began
    shown.close()
    count = sum(map(len, given.tokens))
    sink.write(
        f"{len(ids)} responses, {count} tokens in {seconds:.2f} s: {count / seconds:.0f} tokens/s "
        f"(prompts: {given.stats.prefill_tokens} tokens run once)\n"
    )
    return shown.responses


def prompts_of(config: GenerateConfig, source: TextIO) -> list[str]:
    """The prompts that the configuration names; ConfigError if there are none."""
    if config.prompt is not None:
        return [config.prompt]
    if config.file is None or config.file == "-":
        lines = source.read().splitlines()
    else:
        if not Path(config.file).is_file():
            raise ConfigError(f"config: file={config.file} does not exist; give a text file with one prompt a line")
        lines = Path(config.file).read_text(encoding="utf-8").splitlines()
    found = [line for line in lines if line.strip()]
    if not found:
        raise ConfigError("config: no prompt was given; use --prompt TEXT, --file FILE, or lines on standard input")
    return found


class Shown:
    """Responses on their way to a terminal: sequence 0 piece by piece, each later one once those before it are out."""

    def __init__(self, titles: list[str], tokenizer: Any, sink: TextIO):
        from ppomax.rollout.text import TextStream

        self.titles, self.sink, self.next = titles, sink, 0
        self.streams = [TextStream(tokenizer) for _ in titles]
        self.done = [False] * len(titles)
        self._begin()

    @property
    def responses(self) -> list[str]:
        return [stream.text for stream in self.streams]

    def take(self, index: int, token: int, last: bool) -> None:
        """One token of sequence `index`."""
        piece = self.streams[index].push(token)
        self.done[index] = last
        if index == self.next:
            self._write(piece)
        while self.next < len(self.titles) and self.done[self.next]:
            self._write("\n\n")
            self.next += 1
            if self.next < len(self.titles):
                self._begin()
                self._write(self.streams[self.next].text)

    def close(self) -> None:
        self.sink.flush()

    def _begin(self) -> None:
        self._write(f"> {self.titles[self.next]}\n")

    def _write(self, text: str) -> None:
        self.sink.write(text)
        self.sink.flush()


def dtype_of(path: str, config: GenerateConfig) -> Any:
    """The dtype asked for, or the one of the checkpoint's config (float32 if it names none)."""
    import torch

    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    from ppomax.models.files import model_config

    if not (Path(path) / "config.json").is_file() and Path(path).is_dir():  # a checkpoint: as it computes
        return torch.float32
    return model_config(path, trust_remote_code=config.trust_remote_code).dtype or torch.float32
