"""Attention of a rollout on other devices, forced on a CPU: torch's scaled_dot_product_attention, and our Triton
kernels in their interpreter, against `generate`, the plain rollout, and paged_attention's reference."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ppomax.rollout.arena import Arena, Step
from ppomax.rollout.attention import Attention, choose, page_of
from torch import Tensor

from tests.engine.families import FAMILIES, family
from tests.engine.sampled import decode
from tests.engine.stand_ins import attend_by
from tests.engine.test_rollout import ENDS, GIVEN, generated, prompts_of

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(params=["sdpa", "triton"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    attend_by(monkeypatch, request.param)
    return request.param


def test_choice() -> None:
    model = family("llama")
    assert choose(model) == "native"
    assert choose(model, "ref") == "ref"

    def on_a_device(dtype: torch.dtype, head_dim: int) -> str:
        model.config.head_dim = head_dim
        return choose(SimpleNamespace(device=torch.device("cuda"), dtype=dtype, config=model.config))

    assert on_a_device(torch.bfloat16, 64) == "triton"
    assert on_a_device(torch.float16, 256) == "triton"
    assert on_a_device(torch.float32, 20) == "triton"
    assert on_a_device(torch.bfloat16, 264) == "sdpa"
    assert on_a_device(torch.float64, 64) == "sdpa"


WAYS = [("sdpa", name) for name in FAMILIES] + [("triton", name) for name in ("llama", "gemma2")]
"""The interpreter is slow; the other families run it with `-m slow`."""
SLOW = [pytest.param("triton", name, marks=pytest.mark.slow) for name in FAMILIES if ("triton", name) not in WAYS]


@pytest.mark.parametrize(("way", "name"), WAYS + SLOW, indirect=["way"])
def test_greedy_tokens_equal_generate(name: str, way: str) -> None:
    model, told = family(name), []
    given, new = (GIVEN, 20) if way == "sdpa" else (GIVEN[1:5], 5)
    got = decode(
        model, given, range(len(given)), eos_ids=ENDS, max_new_tokens=new, temperature=0, slots=3, announce=told.append
    )
    assert told[0].attention == way
    assert got.tokens == [generated(model, p, new) for p in given]


@pytest.mark.parametrize(
    ("way", "name"),
    [("sdpa", "llama"), ("sdpa", "mistral"), ("sdpa", "gemma2"), ("sdpa", "gpt2"), ("triton", "mistral")],
    indirect=["way"],
)
def test_shared_prompts_are_sampled_as_by_our_own(way: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family(name)
    lengths, new = ([18, 5, 32, 16, 1], 20) if way == "sdpa" else ([33, 5], 6)
    given = [p for p in prompts_of(lengths, seed=2) for _ in range(4)]
    options = dict(eos_ids=ENDS, max_new_tokens=new, seed=1, slots=6)
    got = decode(model, given, range(len(given)), **options)
    attend_by(monkeypatch, "native")
    want = decode(model, given, range(len(given)), **options)
    assert len({tuple(t) for t in want.tokens}) > len(given) * 3 // 4
    assert got.tokens == want.tokens
    assert got.stats.prefill_tokens == want.stats.prefill_tokens
    for ours, theirs in zip(want.logprobs, got.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(theirs), torch.tensor(ours), rtol=0, atol=TOLERANCE[torch.float32])


DECODING = [(0, 3), (1, 0), (2, 40), (4, 256), (5, 300)]
"""Slot and position of each decoding row."""
PROMPTS = [7, 1, 20]


def attended(name: str, dtype: torch.dtype, window: int, softcap: float, longest: int) -> Tensor:
    """One layer's attention over an arena filled with random keys: 4 query heads, 2 key heads of 16."""
    model, generator = family("llama"), torch.Generator().manual_seed(1)
    model.config.head_dim = 16
    arena = Arena(model.config, 200, dtype, torch.device("cpu"), page_of(name))
    served = Attention(model, arena, name)
    heads, kv = 4, 2
    past = torch.randn(2, 6, 512, kv, 16, generator=generator).to(dtype)
    fresh = [torch.randn(5 + sum(PROMPTS), h, 16, generator=generator).to(dtype) for h in (heads, kv, kv)]
    blocks = 512 // arena.page
    tables = torch.randperm(200, generator=generator)[: 6 * blocks].view(6, blocks).int()
    for slot, at in DECODING:  # what came before, by the plainest means
        for i in range(at):
            page, inside = tables[slot, i // arena.page], i % arena.page
            for store, x in zip(arena.stores[0], past[:, slot, i], strict=True):
                if store.shape[-1] == arena.page and store is arena.stores[0][0]:
                    store[page, :, :, inside] = x
                else:
                    store[page, :, inside] = x
    rows = [6 + i for i, n in enumerate(PROMPTS) for _ in range(n)]
    tables = torch.cat([tables, torch.arange(3 * blocks).view(3, blocks).int() % 200])
    served.step = Step(
        tables=tables,
        slots=torch.tensor([s for s, _ in DECODING] + rows).int(),
        positions=torch.tensor([p for _, p in DECODING] + [i for n in PROMPTS for i in range(n)]).int(),
        decoding=len(DECODING),
        longest=longest,
        prompts=PROMPTS,
    )
    return served.attend(*fresh, 0, 0.3, window, softcap)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (5, 0.0), (0, 2.0), (17, 2.0)])
@pytest.mark.parametrize("longest", [301, 512])
def test_one_layer_equals_the_reference(
    dtype: torch.dtype, window: int, softcap: float, longest: int, way: str
) -> None:
    want = attended("ref", dtype, window, softcap, 301)
    got = attended(way, dtype, window, softcap, longest)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
