"""The rollout: tokens of every family, logprobs, independence of slots and order, one prefill a prompt, ends of all
kinds, states on the way, memory, refusals."""

from __future__ import annotations

import pytest
import torch
from ppomax.rollout import decode
from ppomax.scoring import policy_logprobs
from transformers import PreTrainedModel

from tests.engine.families import BOS, EOS, FAMILIES, VOCABULARY, family

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
        want, _ = policy_logprobs(model, tokens, cu, states, temperature=0.7)
        torch.testing.assert_close(torch.tensor(logprobs), want.detach(), rtol=0, atol=1e-5)
