"""Decoding a random model of a shipped 7B's or another shape on a GPU: the engine's rollout, plain and from captured
graphs, against `generate`, and a decode step against the floor of its bytes.

    python -m bench.decode [--shape llama-2-7b llama-3-8b qwen2.5-7b] [--rows 64 256] [--prompt 128] [--new 128]
                           [--rivals]

A step reads all weights once, and the keys and values of all sequences once: that over the bandwidth of a large copy on
this device is the floor. A step's seconds are those of a rollout of NEW tokens less those of one of NEW/2, over the
difference, so prompts, captures and set-up cancel; all are said. --rivals: `generate` with a static cache, compiled as
transformers does by itself, and with a growing one. Random weights, temperature 1, bfloat16."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from ppomax.rollout import Sampling, decode
from ppomax.rollout.arena import cache_shape
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

SHAPES = {
    "llama-2-7b": (
        LlamaForCausalLM,
        LlamaConfig,
        dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=32),
    ),
    "llama-3-8b": (
        LlamaForCausalLM,
        LlamaConfig,
        dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=8),
    ),
    "qwen2.5-7b": (
        Qwen2ForCausalLM,
        Qwen2Config,
        dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
             num_attention_heads=28, num_key_value_heads=4),
    ),
}  # fmt: skip
"""Of the published models."""


def made(shape: str) -> PreTrainedModel:
    """A random model of that shape in bfloat16 on the GPU."""
    kind, config, sizes = SHAPES[shape]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return kind(config(**sizes, max_position_embeddings=4096, tie_word_embeddings=False)).eval()
    finally:
        torch.set_default_dtype(before)


def bandwidth() -> float:
    """Bytes a second of a large copy, read and written."""
    a = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * 2**30 / min(seconds(lambda: b.copy_(a)) for _ in range(5))


def seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def floor(model: PreTrainedModel, rows: int, length: float, rate: float) -> float:
    """Seconds in which a step's weights, keys and values can be read: all but the embedding, of which it reads rows."""
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    return (weights + rows * length * cache_shape(model.config).token_bytes(model.dtype)) / rate


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.decode", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["llama-3-8b"])
    parser.add_argument("--rows", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rivals", action="store_true")
    args = parser.parse_args(arguments)
    rate = bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copies at {rate / 1e9:.0f} GB/s", flush=True)
    for shape in args.shape:
        measure(shape, args, rate)
        torch.cuda.empty_cache()


def measure(shape: str, args: argparse.Namespace, rate: float) -> None:
    """The rows of one shape."""
    model = made(shape)
    for rows in args.rows:
        generator = torch.Generator().manual_seed(rows)
        given = torch.randint(3, model.config.vocab_size, (rows, args.prompt), generator=generator)
        least = floor(model, rows, args.prompt + 0.75 * args.new, rate)
        for graphs in (False, True):
            name = f"{shape} {rows:4} rows, {'graphs' if graphs else 'plain'}"
            row(name, partial(ours, model, given, graphs), args.new, rows, least)
        for cache in ("static", None) if args.rivals else ():
            name = f"{shape} {rows:4} rows, generate, {cache or 'growing'} cache"
            try:
                row(name, partial(theirs, model, given.cuda(), cache), args.new, rows, least)
            except Exception as error:  # a rival's failure is a result here
                print(f"{name}: {type(error).__name__}: {str(error)[:200]}", flush=True)


def ours(model: PreTrainedModel, given: torch.Tensor, graphs: bool, new: int) -> None:
    how = Sampling(new, min_new_tokens=new, slots=len(given), cuda_graphs=graphs)
    decode(model, given.tolist(), range(len(given)), how, eos_ids=[])


def theirs(model: PreTrainedModel, given: torch.Tensor, cache: str | None, new: int) -> None:
    model.generate(  # type: ignore[operator]
        given, attention_mask=torch.ones_like(given), max_new_tokens=new, min_new_tokens=new, do_sample=True, top_k=0,
        top_p=1.0, cache_implementation=cache, pad_token_id=0,
    )  # fmt: skip


def row(name: str, run: Callable[[int], object], new: int, rows: int, least: float) -> None:
    """Print what a whole run and one of its steps took."""
    seconds(lambda: run(new))
    half, whole = seconds(lambda: run(new // 2)), seconds(lambda: run(new))
    step = (whole - half) / (new - new // 2)
    print(
        f"{name}: {whole:.2f} s for {rows} x {new} tokens ({rows * new / whole:.0f} a second), half of it "
        f"{half:.2f} s; a step {step * 1e3:.2f} ms, floor {least * 1e3:.2f}, ratio {step / least:.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
