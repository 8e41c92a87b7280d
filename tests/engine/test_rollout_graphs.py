"""Bucketed decoding from captured forwards, with a tape in the graph's place: what is captured and replayed equals the
plain loop. That a CUDA device captures it too is not tested here."""

from __future__ import annotations

import logging

import pytest
import torch
from ppomax.models import base_of
from ppomax.rollout import RolloutSizes
from ppomax.rollout.arena import Arena, cache_shape
from ppomax.rollout.graphs import MEETINGS, WARM_UPS, capture_for, page_bucket, row_bucket
from ppomax.rollout.sizes import RolloutError
from transformers import LlamaConfig, LlamaForCausalLM

from tests.engine.families import BOS, FAMILIES, SHARED, family
from tests.engine.sampled import decode
from tests.engine.stand_ins import DECODE, attend_by, captures_by_tape
from tests.engine.test_rollout import ENDS, GIVEN, LENGTHS, forwards, generated, prompts_of


def test_buckets() -> None:
    assert [row_bucket(n, 100) for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 97)] == [1, 2, 4, 4, 8, 8, 16, 16, 32, 100]
    assert [row_bucket(n, 999) for n in (64, 65, 128, 129, 200, 257)] == [64, 96, 128, 192, 256, 384]
    assert [row_bucket(n, 6) for n in (1, 3, 5, 6)] == [1, 4, 6, 6]
    assert [page_bucket(n, 7) for n in (1, 2, 3, 4, 5, 7)] == [1, 2, 4, 4, 7, 7]
    for slots in range(1, 70):
        for n in range(1, slots + 1):
            assert n <= row_bucket(n, slots) <= slots
            assert n <= page_bucket(n, slots) <= slots


@pytest.mark.parametrize("way", ["sdpa", "ref"])
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_equal_generate(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tapes = family(name), captures_by_tape(monkeypatch)
    attend_by(monkeypatch, way)
    got = decode(model, GIVEN, range(10), eos_ids=ENDS, max_new_tokens=20, temperature=0, slots=5, cuda_graphs=True)
    assert got.tokens == [generated(model, p, 20) for p in GIVEN]
    assert len(set(map(len, got.tokens))) > 1, "ends should be uneven"
    assert tapes


def test_sampled_tokens_are_those_of_the_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = family("llama"), [p for p in prompts_of(LENGTHS, seed=1) for _ in range(3)]
    options = dict(eos_ids=ENDS, max_new_tokens=40, seed=5)
    want = decode(model, given, range(30), **options)
    assert len({tuple(t) for t in want.tokens}) > 25
    for slots in (1, 3, 9, 30):
        tapes = captures_by_tape(monkeypatch)
        got = decode(model, given, range(30), slots=slots, cuda_graphs=True, **options)
        assert got.tokens == want.tokens
        assert tapes
        for ours, theirs in zip(want.logprobs, got.logprobs, strict=True):
            torch.testing.assert_close(torch.tensor(theirs), torch.tensor(ours), rtol=0, atol=1e-5)


def test_a_bucket_is_captured_once_it_has_been_met_often(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tapes = family("llama"), captures_by_tape(monkeypatch)
    options = dict(eos_ids=[], slots=5, cuda_graphs=True)
    steps = MEETINGS + 1  # the first step takes the prompts in
    with forwards(model) as seen:
        decode(model, prompts_of([3] * 5), range(5), max_new_tokens=steps, **options)
    assert not tapes
    assert seen == [15] + [5] * MEETINGS
    with forwards(model) as seen:
        decode(model, prompts_of([3] * 5), range(5), max_new_tokens=steps + 6, **options)
    assert len(tapes) == 1
    assert seen == [15] + [5] * MEETINGS + [5, 5]  # warm-up and capture; six replays


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_recorded_states_equal_a_full_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, layer, tapes = family(name), 2, captures_by_tape(monkeypatch)
    given = [*GIVEN, GIVEN[2], GIVEN[2]]
    options = dict(eos_ids=ENDS, max_new_tokens=20, slots=5, trunk_layers=layer, cuda_graphs=True)
    got = decode(model, given, range(12), **options)
    assert tapes
    for prompt, response, trunk in zip(given, got.tokens, got.trunk, strict=True):
        tokens = torch.tensor([(prompt + response)[:-1]])
        with torch.no_grad():
            want = base_of(model)(tokens, output_hidden_states=True, use_cache=False).hidden_states[layer][0]
        torch.testing.assert_close(trunk, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["sdpa"])
def test_living_rows_do_not_read_the_scratch_page(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is far from all else beyond the position that fillers write, and nobody is given it."""
    made: list[Arena] = []

    class Poisoned(Arena):
        def __init__(self, *args: object, **kwargs: object):
            super().__init__(*args, **kwargs)
            made.append(self)
            for pages in (p for store in self.stores for p in store):
                pages[self.scratch] = 1e4

    model, tapes = family("gemma2"), captures_by_tape(monkeypatch)
    want = decode(model, GIVEN, range(10), eos_ids=ENDS, max_new_tokens=40, seed=3, slots=5)
    monkeypatch.setattr(DECODE, "Arena", Poisoned)
    got = decode(model, GIVEN, range(10), eos_ids=ENDS, max_new_tokens=40, seed=3, slots=5, cuda_graphs=True)
    assert tapes
    assert got.tokens == want.tokens
    (arena,) = made
    assert arena.scratch == arena.pages
    assert sorted(arena.free) == list(range(arena.pages))
    assert len(arena.stores[0][0]) == arena.pages + 1
    assert (arena.stores[0][0][arena.scratch] != 1e4).any(), "no row ever filled up a bucket"


def test_what_cannot_be_captured_is_decoded_plainly_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rotary embeddings that stretch with the longest position read it from the device."""
    torch.manual_seed(0)
    stretch = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = LlamaForCausalLM(LlamaConfig(**SHARED, rope_parameters=stretch)).eval()
    want = decode(model, GIVEN, range(10), eos_ids=ENDS, max_new_tokens=30, seed=3, slots=4)
    tapes = captures_by_tape(monkeypatch)
    with caplog.at_level(logging.WARNING, logger="ppomax"):
        got = decode(model, GIVEN, range(10), eos_ids=ENDS, max_new_tokens=30, seed=3, slots=4, cuda_graphs=True)
    assert got.tokens == want.tokens
    assert not tapes
    (record,) = caplog.records
    assert "without CUDA graphs, since the model cannot be captured: aten._local_scalar_dense" in record.getMessage()


@pytest.mark.parametrize("prompts", [[[BOS] * 3], []])
def test_graphs_on_a_cpu_are_refused_before_a_token_is_made(prompts: list[list[int]]) -> None:
    model, told = family("llama"), []
    with forwards(model) as seen, pytest.raises(RolloutError, match=r"rollout.cuda_graphs=true needs .* CUDA device"):
        decode(
            model, prompts, range(len(prompts)), eos_ids=[], max_new_tokens=4, cuda_graphs=True, announce=told.append
        )
    assert seen == told == []


def test_the_plan_counts_the_scratch_page_and_the_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[RolloutSizes] = []
    model = family("llama")
    captures_by_tape(monkeypatch)
    for graphs in (False, True):
        options = dict(eos_ids=[], max_new_tokens=4, slots=2, cuda_graphs=graphs, trunk_layers=1)
        decode(model, GIVEN, range(10), announce=told.append, **options)
    plain, graphed = told
    assert plain.graph_bytes == 0
    assert "CUDA graphs" not in plain.sentence()
    assert graphed.arena_bytes - plain.arena_bytes == 16 * cache_shape(model.config).token_bytes(torch.float32)
    buffers = 2 * (5 * 8 + 8 + 4)  # ids, positions, rows, numbers and counts; tokens and logprobs
    gathered = 3 * 2 * (3 * 16) * (2 * 8) * 4  # two slots of three pages, two heads of 8
    activations = round(2.4 * 2 * (3 * 32 + 3 * 48) * 4)
    assert graphed.graph_bytes == buffers + gathered + activations
    assert graphed.peak_bytes - plain.peak_bytes == graphed.graph_bytes + graphed.arena_bytes - plain.arena_bytes
    assert f"CUDA graphs {graphed.graph_bytes / 2**20:.1f})" in graphed.sentence()


def test_a_device_captures_on_one_stream_after_warm_ups_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls alone, on stand-ins for torch.cuda's parts."""
    log: list[str] = []
    cuda, graph_options = torch.cuda, []

    class Named:
        def __init__(self, name: str):
            self.name = name

        def wait_stream(self, other: Named) -> None:
            log.append(f"{self.name} waits for {other.name}")

        def __enter__(self) -> None:
            log.append(f"in {self.name}")

        def __exit__(self, *args: object) -> None:
            log.append(f"out of {self.name}")

        def replay(self) -> None:
            log.append("replay")

    def graph(graph: Named, **options: object) -> Named:
        graph_options.append(options)
        return Named("capture")

    monkeypatch.setattr(cuda, "Stream", lambda device: Named("side"))
    monkeypatch.setattr(cuda, "graph_pool_handle", lambda: object())
    monkeypatch.setattr(cuda, "current_stream", lambda: Named("main"))
    monkeypatch.setattr(cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(cuda, "set_sync_debug_mode", lambda mode: log.append(f"sync {mode}"))
    monkeypatch.setattr(cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(cuda, "device", lambda device: Named("device"))
    monkeypatch.setattr(cuda, "CUDAGraph", lambda: Named("graph"))
    monkeypatch.setattr(cuda, "graph", graph)
    capture = capture_for(torch.device("cuda:0"))
    first = capture(lambda: log.append("run"))
    warm_up = ["side waits for main", "in side", "run", "sync error", *["run"] * (WARM_UPS - 1), "out of side"]
    after = ["sync 0", "main waits for side"]
    assert log == ["in device", *warm_up, *after, "in capture", "run", "out of capture", "out of device"]
    first()
    assert log[-1] == "replay"
    capture(lambda: None)
    assert graph_options[0] == graph_options[1]
    assert graph_options[0].keys() == {"pool", "stream", "capture_error_mode"}

    def broken() -> None:
        raise RuntimeError("it waits")

    log.clear()
    with pytest.raises(RuntimeError, match="it waits"):
        capture(broken)
    assert log == ["in device", "side waits for main", "in side", "out of side", *after, "out of device"]
    assert len(graph_options) == 2
