"""`rollout.exact`: what decoding records is what scoring and update compute, to the bit."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import ppomax_kernels as K
import pytest
import torch
from ppomax.assets import FOLDER
from ppomax.config import ConfigError
from ppomax.engine import Engine
from ppomax.models import load_reward_model, packed_hidden, set_attention
from ppomax.models.exact import check_exact
from ppomax.models.fused_trunk import fused_trunk
from ppomax.models.rotary_table import rotary_table
from ppomax.recipe import rollout as scoring
from ppomax.recipe.batch import Rollout
from ppomax.recipe.rollout import Scorers, score
from ppomax.rollout import Sampling, decode
from ppomax.rollout.responses import Responses
from ppomax_kernels.internal.linear import linear
from torch import Tensor

from .families import BOS, VOCABULARY, family
from .tiny import prompts, small_config, tiny_reward

SERVED = ("llama", "qwen2", "qwen3", "mistral")
MODES: dict[str, dict[str, object]] = {
    "full": {},
    "hydra": {"model__train": "hydra", "model__trained_layers": 1},
    "trunk": {"model__train": "hydra", "model__trained_layers": 1, "model__critic": "trunk"},
}


def exact_engine(model: Any, **knobs: Any) -> Engine:
    options = {"impl": "auto", "rollout__exact": True, "policy_optim__lr": 1e-2, "policy_optim__warmup": 0.0, **knobs}
    return Engine(model, None, None, tiny_reward(), small_config(**options))


def scored_again(engine: Engine, roll: Rollout) -> Rollout:
    """The same responses, as those of a sampler that knows nothing of scoring."""
    ends, cu = roll.response_cu.tolist(), roll.cu_seqlens.tolist()
    whole = [roll.tokens[a:b].tolist() for a, b in pairwise(cu)]
    lengths = [b - a for a, b in pairwise(ends)]
    asked = [t[: len(t) - n] for t, n in zip(whole, lengths, strict=True)]
    given = [t[len(t) - n :] for t, n in zip(whole, lengths, strict=True)]
    responses = Responses(given, [[0.0] * n for n in lengths], [True] * len(lengths))
    temperature = engine.config.rollout.temperature
    with engine.policy.gathered() as policy:
        models = Scorers(policy, engine.reference, engine.critic, engine.trunk_layers)
        return score(models, asked, responses, roll.micro_batches, temperature=temperature)


def assert_same(roll: Rollout, again: Rollout) -> None:
    assert torch.equal(roll.logprobs, again.logprobs)
    assert torch.equal(roll.entropy, again.entropy)
    assert torch.equal(roll.ref_logprobs, again.ref_logprobs)
    assert torch.equal(roll.values, again.values)
    assert (roll.untempered is None) == (again.untempered is None)
    for a, b in zip(roll.untempered or (), again.untempered or (), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", SERVED)
def test_recorded_is_scored_to_the_bit(name: str, temperature: float, mode: str) -> None:
    """Before and after updates; the first ratio is 1, and the first KL 0, as ever."""
    engine = exact_engine(family(name), rollout__temperature=temperature, **MODES[mode])
    for step in range(2):
        roll = engine.rollout(prompts(8, seed=step))
        assert_same(roll, scored_again(engine, roll))
        if step == 0:
            assert torch.equal(roll.logprobs, roll.ref_logprobs)
        metrics = engine.update(engine.experience(roll))
        assert metrics["val/first_ratio_gap"] == 0
        assert metrics["policy/grad_norm"] > 0


def test_the_shipped_model_is_exact() -> None:
    config = small_config(impl="auto", rollout__exact=True, rollout__max_new_tokens=24)
    engine = Engine(FOLDER / "policy", None, None, load_reward_model(FOLDER / "reward_model"), config)
    roll = engine.rollout(prompts(8))
    assert_same(roll, scored_again(engine, roll))


@pytest.mark.parametrize("name", SERVED)
def test_over_the_whole_vocabulary(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every entry of the logits that a token is drawn from, not the drawn one alone."""
    rows: list[Tensor] = []
    real = K.token_logprobs

    def seen(logits: Tensor, *rest: Any, **named: Any) -> Any:
        rows.append(logits.clone())
        return real(logits, *rest, **named)

    model = family(name)
    set_attention(model, "varlen")
    monkeypatch.setattr("ppomax.rollout.forward.K.token_logprobs", seen)
    given = decode(model, [[BOS, 5, 9]], [0], Sampling(max_new_tokens=9, exact=True), eos_ids=[])
    with torch.no_grad(), fused_trunk(model):
        ids = torch.tensor([[BOS, 5, 9, *given.tokens[0]]])
        hidden = scoring_states(model, ids[0])
        want = linear(hidden, [model.get_output_embeddings().weight])
    assert torch.equal(torch.cat(rows), want[2:-1])
    assert want.shape[1] == VOCABULARY


def scoring_states(model: Any, tokens: Tensor) -> Tensor:
    return packed_hidden(model, tokens, torch.tensor([0, len(tokens)], dtype=torch.int32))


@pytest.mark.parametrize("slots", [1, 3])
def test_neighbours_and_slots_do_not_matter(slots: int) -> None:
    model, asked = family("llama"), prompts(7)

    def scored(**more: Any) -> list[Tensor]:
        given = decode(model, asked, range(7), Sampling(max_new_tokens=8, exact=True, **more), eos_ids=[2])
        assert given.scored is not None
        return given.scored

    for a, b in zip(scored(), scored(slots=slots), strict=True):
        assert torch.equal(a, b)


def test_one_scoring_pass_less(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, runs = exact_engine(family("llama")), []
    real = scoring.score_states

    def counted(policy: Any, *rest: Any, **named: Any) -> Any:
        runs.append(policy is engine.policy.module)
        return real(policy, *rest, **named)

    monkeypatch.setattr(scoring, "score_states", counted)
    roll = engine.rollout(prompts(8))
    assert runs
    assert not any(runs)
    scored_again(engine, roll)
    assert any(runs)


def test_without_it_nothing_is_recorded() -> None:
    given = decode(family("llama"), [[BOS]], [0], Sampling(max_new_tokens=3), eos_ids=[])
    assert given.scored is None


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt2", "runs aten::.*native_layer_norm.*leave rollout.exact off"),
        ("gemma2", "it caps its attention scores"),
        ("gemma3", "runs aten::.*gelu"),
    ],
)
def test_a_family_that_is_not_all_ours_is_refused(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        exact_engine(family(name))


def test_a_model_that_lies_is_found_out() -> None:
    """Its ops are all served, and yet its rows depend on each other."""
    model = family("llama")
    set_attention(model, "varlen")
    check_exact(model)
    model.model.layers[0].register_forward_hook(lambda module, args, out: out + out[:, -1:] * 0.01)
    with pytest.raises(ValueError, match="depend on what else is in a forward"):
        check_exact(model)


@pytest.mark.parametrize(
    "knobs",
    [
        {"model__train": "lora"},
        {"model__dtype": "bfloat16"},
        {"model__attention": "sdpa"},
        {"impl": "ref"},
        {"rollout__top_k": 4},
        {"rollout__top_p": 0.9},
        {"rollout__sampler": "vllm"},
        {"sharding__zero_stage": 3},
    ],
    ids=str,
)
def test_knobs_that_cannot_go_with_it_are_named(knobs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.exact"):
        small_config(**{"impl": "auto", "rollout__exact": True, **knobs})


def test_a_sampler_that_cannot_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppomax.rollout.packed_weights.MOST_BYTES", 10)
    with pytest.raises(ValueError, match="exact needs a model in float32 on a CPU whose weights are few enough"):
        decode(family("llama"), [[BOS]], [0], Sampling(max_new_tokens=3, exact=True), eos_ids=[])


# ---- rotary embeddings, looked up -----------------------------------------------------------------------------------


def rotary_of(model: Any) -> torch.nn.Module:
    return next(m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding"))


@pytest.mark.parametrize("name", SERVED)
def test_looked_up_angles_are_those_of_the_module(name: str) -> None:
    module = rotary_of(family(name))
    table = rotary_table(module)
    assert table is not None
    x = torch.zeros(1, 3, 8)
    for positions in ([0, 1, 2], [5, 5, 3000], [1024, 1023, 7]):
        ids = torch.tensor([positions])
        for got, want in zip(table(x, ids), module(x, ids), strict=True):
            assert got.shape == want.shape
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    alone = table(x[:, :1], torch.tensor([[3000]]))
    assert torch.equal(alone[0][0, 0], table(x, torch.tensor([[5, 5, 3000]]))[0][0, 2])


def test_the_table_follows_the_frequencies() -> None:
    module = rotary_of(family("llama"))
    table, x, ids = rotary_table(module), torch.zeros(1, 1, 8), torch.tensor([[9]])
    assert table is not None
    table(x, ids)
    module.inv_freq.mul_(0.5)
    torch.testing.assert_close(table(x, ids)[0], module(x, ids)[0], rtol=0, atol=1e-6)


def test_angles_that_depend_on_the_call_are_not_looked_up() -> None:
    module = rotary_of(family("llama"))
    module.rope_type = "dynamic"
    assert rotary_table(module) is None
    assert rotary_table(torch.nn.Linear(2, 2)) is None
    double = rotary_table(rotary_of(family("qwen2")))
    assert double is not None
    assert double(torch.zeros(1, 1, 8, dtype=torch.bfloat16), torch.tensor([[3]]))[0].dtype == torch.bfloat16
