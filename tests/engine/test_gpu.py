"""The rollout and the engine on a CUDA device: the CPU's tokens, plain and from captured graphs; no wait in a step; the
first ratio 1; two streams at once. Skipped where there is none."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)

from ppomax.models import base_of, packed_hidden, set_attention
from ppomax.recipe import rollout as scoring
from ppomax.recipe import update
from ppomax.rollout.forward import Forward
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from tests.engine.families import FAMILIES, SHARED, family
from tests.engine.sampled import decode
from tests.engine.test_rollout import ENDS, GIVEN, generated, prompts_of
from tests.engine.tiny import prompts, small_config, tiny_engine

DEVICE = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def nothing_was_refused(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.WARNING, logger="ppomax"):
        yield
    assert not [r.getMessage() for r in caplog.records if "CUDA graphs" in r.getMessage()]


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "graphs"])
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_equal_generate_on_the_cpu(name: str, graphs: bool) -> None:
    model = family(name)
    want = [generated(model, p, 20) for p in GIVEN]
    told = []
    for slots in (3, 10):
        got = decode(
            model.to(DEVICE), GIVEN, range(10), eos_ids=ENDS, max_new_tokens=20, temperature=0, slots=slots,
            cuda_graphs=graphs, announce=told.append,
        )  # fmt: skip
        assert got.tokens == want
    assert told[0].attention == "triton"


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_half_precision_draws_near_the_full_forward(name: str) -> None:
    """In bfloat16 prompts go through torch's variable-length attention: logprobs near those of one plain forward."""
    torch.manual_seed(0)
    shape = SHARED | {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512}
    model = LlamaForCausalLM(LlamaConfig(**shape)).eval().bfloat16().to(DEVICE)
    given = [p for p in prompts_of([40, 7, 1, 33]) for _ in range(3)]
    got = decode(model, given, range(12), eos_ids=ENDS, max_new_tokens=30, seed=3, slots=5, cuda_graphs=True)
    for prompt, tokens, logprobs in zip(given, got.tokens, got.logprobs, strict=True):
        ids = torch.tensor([prompt + tokens], device=DEVICE)
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
        want = torch.log_softmax(logits, -1).gather(-1, ids[0, len(prompt) :, None])[:, 0].cpu()
        torch.testing.assert_close(torch.tensor(logprobs), want, rtol=0, atol=0.05)


def test_sampled_tokens_do_not_depend_on_slots_or_graphs() -> None:
    model = family("llama").to(DEVICE)
    given = [p for p in prompts_of([18, 5, 32, 16, 1], seed=2) for _ in range(6)]
    options = dict(eos_ids=ENDS, max_new_tokens=40, seed=1, min_new_tokens=3)
    want = decode(family("llama"), given, range(30), **options)
    assert len({tuple(t) for t in want.tokens}) > 25
    for slots, graphs in ((30, False), (30, True), (7, False), (7, True)):
        got = decode(model, given, range(30), slots=slots, cuda_graphs=graphs, **options)
        assert got.tokens == want.tokens, (slots, graphs)


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "graphs"])
def test_recorded_states_equal_a_full_forward(graphs: bool) -> None:
    model, layer = family("llama").to(DEVICE), 2
    given = [*GIVEN, GIVEN[2], GIVEN[2]]
    options = dict(eos_ids=ENDS, max_new_tokens=20, slots=5, trunk_layers=layer, cuda_graphs=graphs)
    got = decode(model, given, range(12), **options)
    for prompt, response, trunk in zip(given, got.tokens, got.trunk, strict=True):
        tokens = torch.tensor([(prompt + response)[:-1]], device=DEVICE)
        with torch.no_grad():
            want = base_of(model)(tokens, output_hidden_states=True, use_cache=False).hidden_states[layer][0]
        torch.testing.assert_close(trunk, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "graphs"])
def test_no_step_waits_for_the_device(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the start of a step until its tokens are drawn; a capture sets itself up with waits."""
    model, real, steps = family("llama").bfloat16().to(DEVICE), Forward.tokens, []

    def watched(self: Forward, *args: object) -> object:
        captured = 0 if self.graphs is None else len(self.graphs.replays)
        steps.append(captured)
        capturing = self.graphs is not None and len(set(steps)) == 1 and not captured
        if len(steps) < 3 or capturing:  # the first: kernels are compiled and libraries set up
            return real(self, *args)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return real(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    options = dict(eos_ids=[], max_new_tokens=12, slots=5, cuda_graphs=graphs, min_new_tokens=2)
    decode(model, [GIVEN[2]] * 5, range(5), **options)
    monkeypatch.setattr(Forward, "tokens", watched)
    decode(model, [GIVEN[2]] * 5, range(5), **options)
    assert len(steps) == 12
    assert bool(max(steps)) == graphs


def test_weights_that_changed_are_seen_by_the_next_rollout() -> None:
    model = family("llama").to(DEVICE)
    options = dict(eos_ids=[], max_new_tokens=20, temperature=0, slots=10, cuda_graphs=True)
    before = decode(model, GIVEN, range(10), **options)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-0.5)
    after = decode(model, GIVEN, range(10), **options)
    fresh = family("llama")
    with torch.no_grad():
        for p in fresh.parameters():
            p.mul_(-0.5)
    assert after.tokens == decode(fresh, GIVEN, range(10), **options | {"cuda_graphs": False}).tokens != before.tokens


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_batches_are_those_of_the_padded_ones(name: str) -> None:
    """States and gradients in bfloat16, by torch's variable-length attention, no further from float32's than padded."""
    torch.manual_seed(0)
    window = {} if name == "llama" else {"sliding_window": 7}
    shape = SHARED | {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512}
    kind, config = (LlamaForCausalLM, LlamaConfig) if name == "llama" else (MistralForCausalLM, MistralConfig)
    exact = kind(config(**shape, **window)).eval().to(DEVICE)
    cu = torch.tensor([0, 3, 4, 40, 51], device=DEVICE).int()
    tokens = torch.randint(3, 60, (51,), device=DEVICE)

    def found(model: torch.nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        hidden = packed_hidden(model, tokens, cu)
        hidden.float().pow(2).mean().backward()
        return [hidden.detach().float(), *(p.grad.float() for p in model.parameters() if p.grad is not None)]

    want, half = found(exact), copy.deepcopy(exact).bfloat16()
    padded = found(half)
    assert set_attention(half) == "varlen"
    packed = found(half)
    assert len(packed) == len(padded) == len(want)
    for x, y, truth in zip(packed, padded, want, strict=True):
        assert (x - truth).norm() <= 1.5 * (y - truth).norm() + 1e-6 * truth.norm()


@pytest.mark.parametrize("mode", ["full", "hydra"])
def test_no_micro_batch_waits_for_the_device(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of scoring and update, once kernels are compiled and libraries set up: from its packing to its losses."""
    knobs = {"run__device": "cuda", "impl": "auto", "model__train": mode, "model__trained_layers": 1}
    engine = tiny_engine(small_config(**knobs, model__dtype="bfloat16"))
    engine.step(prompts())
    watched: list[str] = []

    def watch(module: object, name: str) -> None:
        real = getattr(module, name)

        def strict(*args: object, **named: object) -> object:
            watched.append(name)
            torch.cuda.set_sync_debug_mode("error")
            try:
                return real(*args, **named)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(module, name, strict)

    for module, name in ((scoring, "_micro"), (scoring, "score_states"), (scoring, "state_values")):
        watch(module, name)
    for name in ("policy_loss", "critic_loss"):
        watch(update, name)
    engine.step(prompts())
    assert set(watched) == {"_micro", "score_states", "state_values", "policy_loss", "critic_loss"}


def test_two_streams_at_once() -> None:
    """The kernels keep no state beside their arguments."""
    model = family("llama").to(DEVICE)
    options = dict(eos_ids=ENDS, max_new_tokens=20, seed=1, slots=10)
    want = decode(model, GIVEN, range(10), **options).tokens
    noise = torch.randn(2048, 2048, device=DEVICE)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(200):
            noise = torch.tanh(noise @ noise)
    assert decode(model, GIVEN, range(10), **options).tokens == want
    with torch.cuda.stream(side):
        assert decode(model, GIVEN, range(10), **options).tokens == want


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["full", "lora", "hydra"])
def test_a_step_of_the_engine(mode: str, dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    knobs = {"run__device": "cuda", "impl": "auto", "model__train": mode, "model__trained_layers": 1}
    with caplog.at_level(logging.INFO, logger="ppomax"):
        engine = tiny_engine(small_config(**knobs, model__dtype=dtype))
    assert f"attention of scoring and update: {'varlen' if dtype == 'bfloat16' else 'sdpa'}" in caplog.text
    for _ in range(2):
        metrics = engine.step(prompts()).metrics
        assert metrics["val/first_ratio_gap"] == 0.0
        assert all(value == value for value in metrics.values())


@pytest.mark.parametrize("mode", ["full", "lora", "hydra"])
def test_idle_models_leave_the_device_and_change_nothing(mode: str) -> None:
    knobs = {"run__device": "cuda", "impl": "auto", "model__train": mode, "model__trained_layers": 1}
    scores = []
    for idle in ("device", "host"):
        engine = tiny_engine(small_config(**knobs, sharding__idle=idle))
        scores.append([engine.step(prompts()).scores.tolist() for _ in range(3)])
    assert scores[0] == scores[1]
    assert engine.critic.params[0].is_cuda
    engine.idle.work_with()
    assert not engine.critic.params[0].is_cuda
    assert not next(engine.reward_model.parameters()).is_cuda
    assert next(engine.policy.module.parameters()).is_cuda


@pytest.mark.parametrize("bits", [8, 4])
def test_frozen_weights_in_few_bits_keep_the_first_ratio_1(bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    knobs = {"run__device": "cuda", "model__train": "lora", "model__critic_train": "lora", "model__dtype": "bfloat16"}
    engine = tiny_engine(small_config(**knobs, impl="auto", model__frozen_bits=bits))
    for _ in range(2):
        metrics = engine.step(prompts()).metrics
        assert metrics["val/first_ratio_gap"] == 0.0
        assert all(value == value for value in metrics.values())
