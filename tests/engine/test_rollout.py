"""The rollout: tokens of every family, logprobs, independence of slots and order, one prefill a prompt, ends of all
kinds, states on the way, memory, refusals."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ppomax.models import base_of, blocks_of
from ppomax.recipe.scoring import score_states
from ppomax.rollout import RolloutSizes
from ppomax.rollout.arena import cache_shape
from ppomax.rollout.attention import UnsupportedModel
from ppomax.rollout.sizes import RolloutError, arena_bytes
from ppomax.sharding import ranks
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from tests.engine.families import BOS, EOS, FAMILIES, VOCABULARY, family
from tests.engine.sampled import decode
from tests.engine.tiny import tiny_tokenizer

LENGTHS = [1, 2, 17, 5, 33, 9, 16, 3, 1, 24]


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [[BOS, *torch.randint(3, VOCABULARY, (n - 1,), generator=generator).tolist()] for n in lengths]


GIVEN = prompts_of(LENGTHS)
ENDS = [EOS, 7, 11, 30]


def generated(model: PreTrainedModel, prompt: list[int], new: int) -> list[int]:
    """What transformers' generate makes of one prompt, greedily."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=ENDS,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("impl", ["auto", "ref"])
def test_greedy_tokens_equal_generate(name: str, impl: str) -> None:
    model = family(name)
    before = model.config._attn_implementation
    got = decode(model, GIVEN, range(10), eos_ids=ENDS, max_new_tokens=20, temperature=0, slots=3, impl=impl)
    assert model.config._attn_implementation == before
    assert got.tokens == [generated(model, p, 20) for p in GIVEN]
    assert len(set(map(len, got.tokens))) > 1, "lengths should differ, or slots are not reused unevenly"


@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_equal_a_full_forward(name: str) -> None:
    model = family(name)
    got = decode(model, GIVEN, range(10), eos_ids=ENDS, max_new_tokens=20, temperature=0.7, slots=4)
    for prompt, response, logprobs in zip(GIVEN, got.tokens, got.logprobs, strict=True):
        tokens, count = torch.tensor(prompt + response), len(prompt) + len(response)
        states = torch.arange(len(prompt) - 1, count - 1)
        cu = torch.tensor([0, count], dtype=torch.int32)
        want = score_states(model, tokens, cu, states, temperature=0.7).logprobs
        torch.testing.assert_close(torch.tensor(logprobs), want.detach(), rtol=0, atol=1e-5)


@contextlib.contextmanager
def forwards(model: PreTrainedModel) -> Iterator[list[int]]:
    """How many tokens each forward of the trunk takes in."""
    seen: list[int] = []
    hook = base_of(model).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    yield seen
    hook.remove()


def test_sampled_tokens_do_not_depend_on_slots_order_or_room() -> None:
    model = family("llama")
    given, options = prompts_of(LENGTHS * 2, seed=1), dict(eos_ids=ENDS, max_new_tokens=24, seed=5)
    uids = list(range(100, 120))
    want = decode(model, given, uids, **options).tokens
    assert len({tuple(t) for t in want}) > 15
    for slots in (1, 3, 8, 64):
        assert decode(model, given, uids, slots=slots, **options).tokens == want
    assert decode(model, given, uids, cache_tokens=70, **options).tokens == want
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3)).tolist()
    shuffled = decode(model, [given[i] for i in order], [uids[i] for i in order], slots=6, **options).tokens
    assert shuffled == [want[i] for i in order]
    assert decode(model, given, uids, **options | {"seed": 6}).tokens != want


@pytest.mark.parametrize("count", [2, 3])
def test_sampled_tokens_do_not_depend_on_the_rank_count(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ranks do: each decodes its share, with the uids of the whole."""
    model, given = family("llama"), prompts_of(LENGTHS * 2, seed=1)
    options = dict(eos_ids=ENDS, max_new_tokens=24, seed=5, slots=6)
    want, parts = decode(model, given, range(20), **options).tokens, []
    monkeypatch.setattr(ranks, "world_size", lambda: count)
    for rank in range(count):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        mine = ranks.part_of(len(given))
        assert 0 < len(mine) < len(given)
        parts += decode(model, [given[i] for i in mine], list(mine), **options).tokens
    assert parts == want


def test_equal_prompts_are_prefilled_once() -> None:
    model, samples = family("mistral"), 6
    distinct = prompts_of([18, 5, 32, 16, 1], seed=2)  # pages filled in part, exactly, and not at all
    given = [p for p in distinct for _ in range(samples)]
    options = dict(eos_ids=ENDS, max_new_tokens=20, seed=1)
    alone = [decode(model, [p], [i], **options).tokens[0] for i, p in enumerate(given)]
    for slots in (4, 30):
        with forwards(model) as seen:
            got = decode(model, given, range(30), slots=slots, **options)
        assert got.tokens == alone
        assert got.stats.prefill_tokens == sum(map(len, distinct))
        assert sum(seen) == sum(map(len, distinct)) + sum(len(t) - 1 for t in got.tokens)
    scattered = decode(
        model, distinct * samples, [s + samples * i for s in range(samples) for i in range(5)], **options
    )
    assert scattered.stats.prefill_tokens == sum(map(len, distinct))
    assert scattered.tokens == [alone[s + samples * i] for s in range(samples) for i in range(5)]


def test_finished_rows_are_not_run_on() -> None:
    model = family("llama")
    with forwards(model) as seen:
        got = decode(model, GIVEN, range(10), eos_ids=ENDS, max_new_tokens=30, slots=4)
    assert sum(seen) == sum(map(len, set(map(tuple, GIVEN)))) + sum(len(t) - 1 for t in got.tokens)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_recorded_states_equal_a_full_forward(name: str) -> None:
    model, layer = family(name), 2
    given = [*GIVEN, GIVEN[2], GIVEN[2]]
    got = decode(model, given, range(12), eos_ids=ENDS, max_new_tokens=20, slots=5, trunk_layers=layer)
    assert not blocks_of(model)[layer]._forward_pre_hooks
    for prompt, response, trunk in zip(given, got.tokens, got.trunk, strict=True):
        tokens = torch.tensor([(prompt + response)[:-1]])
        with torch.no_grad():
            want = base_of(model)(tokens, output_hidden_states=True, use_cache=False).hidden_states[layer][0]
        torch.testing.assert_close(trunk, want, rtol=1e-5, atol=1e-5)


def test_ends() -> None:
    model = family("llama")
    everything = list(range(VOCABULARY))
    empty = decode(model, GIVEN, range(10), eos_ids=everything, max_new_tokens=9, slots=3, trunk_layers=1)
    assert [len(t) for t in empty.tokens] == [1] * 10
    assert all(empty.finished)
    assert [len(t) for t in empty.trunk] == LENGTHS
    cut = decode(model, GIVEN, range(10), eos_ids=[], max_new_tokens=9, slots=3)
    assert [len(t) for t in cut.tokens] == [9] * 10
    assert not any(cut.finished)
    late = decode(model, GIVEN, range(10), eos_ids=everything[8:], max_new_tokens=30, min_new_tokens=4, slots=3)
    assert min(len(t) for t in late.tokens) == 5  # forbidden four times, then near certain
    assert all(set(t[:4]) <= set(range(8)) for t in late.tokens)
    one = decode(model, [[BOS]], [0], eos_ids=[], max_new_tokens=1)
    assert len(one.tokens[0]) == 1
    assert decode(model, [], [], eos_ids=[], max_new_tokens=4).tokens == []


def test_stop_strings() -> None:
    model, tokenizer = family("llama"), tiny_tokenizer()
    options = dict(max_new_tokens=30, seed=2, eos_ids=[])
    free = decode(model, GIVEN, range(10), **options)
    words = [tokenizer.decode(t) for t in free.tokens]
    stop = " ".join(words[0].split()[4:6])
    got = decode(model, GIVEN, range(10), stop=[stop], tokenizer=tokenizer, **options)
    for whole, cut, finished in zip(free.tokens, got.tokens, got.finished, strict=True):
        assert cut == whole[: len(cut)]
        assert finished == (stop in tokenizer.decode(cut))
        assert stop not in tokenizer.decode(cut[:-1])
    assert got.finished[0]
    assert len(got.tokens[0]) <= 6


def test_stats() -> None:
    got = decode(family("llama"), GIVEN, range(10), eos_ids=[], max_new_tokens=8, slots=5)
    metrics = got.stats.metrics()
    assert metrics["rollout/slot_occupancy"] == 1.0  # two rounds of five
    assert 0 < metrics["rollout/cache_use"] <= 1
    assert metrics["perf/prefill_tokens_per_second"] > 0
    assert metrics["perf/decode_tokens_per_second"] > 0


def test_arena_bytes() -> None:
    config = family("qwen3").config
    assert cache_shape(config).head_dim == 20
    # 3 layers, keys and values, 2 heads of 20, 4 bytes; 33 tokens take three pages of 16
    assert arena_bytes(config, 5 * 3, 16, torch.float32) == 5 * 48 * 3 * 2 * 2 * 20 * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": [[BOS] * 120]}, "120 tokens with rollout.max_new_tokens=9 is over the model's window of 128"),
        ({"prompts": [[BOS], []]}, r"prompt \[1\] is empty"),
        ({"eos_ids": [2, 64]}, r"stop token \[64\] is not in the model's vocabulary of 64"),
        ({"cache_tokens": 20}, r"cannot hold one sequence .* raise rollout.cache_tokens to 32 or more"),
        ({"uids": [1, 2]}, "2 prompts need as many uids, got 2|1 prompts need as many uids"),
        ({"slots": 0}, "slots must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"stop": ["a"]}, "pass tokenizer="),
        ({"stop": [""], "tokenizer": "any"}, "a stop string is empty"),
        ({"trunk_layers": 3}, r"trunk_layers must be in 0\.\.2"),
    ],
)
def test_bad_input_is_named_before_a_token_is_made(changes: dict, message: str) -> None:
    options = dict(prompts=[[BOS] * 20], uids=[0], eos_ids=[2], max_new_tokens=9) | changes
    options["uids"] = changes.get("uids", list(range(len(options["prompts"]))))
    model = family("llama")
    with forwards(model) as seen, pytest.raises(RolloutError, match=message):
        decode(model, options.pop("prompts"), options.pop("uids"), **options)
    assert seen == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
        lambda: MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)),
    ],
)
def test_models_that_cannot_take_the_arena_are_named(make) -> None:  # type: ignore[no-untyped-def]
    model = make().eval()
    with forwards(model) as seen, pytest.raises(UnsupportedModel, match=f"{type(model).__name__}.*interface"):
        decode(model, [[BOS]], [0], eos_ids=[2], max_new_tokens=4)
    assert seen == []


def test_a_window_that_the_layer_does_not_name_is_refused() -> None:
    model = family("llama")
    model.config.sliding_window = 4  # Llama's attention knows no window
    with pytest.raises(UnsupportedModel, match="sliding window of 4 in the config, and attends with None"):
        decode(model, [[BOS]], [0], eos_ids=[2], max_new_tokens=4)
    assert model.config._attn_implementation == "sdpa"


def test_plan_is_told_before_the_rollout() -> None:
    told: list[RolloutSizes] = []
    model = family("llama")
    with forwards(model) as seen:
        decode(
            model, GIVEN, range(10), eos_ids=[], max_new_tokens=4, slots=2, announce=lambda p: told.append((p, *seen))
        )
    ((plan,),) = told
    assert plan.attention == "native"
    assert plan.arena_bytes == plan.pages * 16 * cache_shape(model.config).token_bytes(torch.float32)
    assert "attention native" in plan.sentence()


MEMORY = """
import sys, torch
sys.path[:0] = ["{root}"]
from pathlib import Path
from bench.memory import _give_back_free_memory, _status
from tests.engine.sampled import decode
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_num_threads(1)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=6,
    num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=1024)).eval()
prompts = torch.randint(3, 2048, (40, 200)).tolist()
told = []
decode(model, prompts, range(40), eos_ids=[], max_new_tokens=2, slots=40)  # code and threads are loaded by now
_give_back_free_memory()
before = _status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
decode(model, prompts, range(40), eos_ids=[], max_new_tokens=20, slots=40, announce=told.append)
print(told[0].peak_bytes, _status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_what_was_announced() -> None:
    script = MEMORY.format(root=Path(__file__).parents[2])
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}  # what is freed is not kept by the heap
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-800:]
    planned, measured = map(int, done.stdout.split())
    assert abs(measured - planned) <= 0.1 * planned, f"announced {planned / 2**20:.1f} MiB, took {measured / 2**20:.1f}"
