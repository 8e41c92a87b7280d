"""Packed batches through variable-length attention, with a plain stand-in for torch's kernel: states and gradients are
those of the padded batch, recomputed blocks included; calls that are not packed are as they were; who cannot attend so
is named."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from ppomax.models import base_of, set_attention, varlen
from ppomax.models.branch import Branch, bottom_states
from ppomax.models.packed import any_pads, packed_hidden
from ppomax.models.recompute import recompute_blocks
from torch import Tensor
from transformers import PreTrainedModel

from tests.engine.families import family
from tests.engine.tiny import prompts, small_config, tiny_engine

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma3", "gpt2"]
CU = torch.tensor([0, 3, 4, 20, 31]).int()
TOKENS = torch.randint(3, 60, (31,), generator=torch.Generator().manual_seed(0))


def plain_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """By torch's documented signature: packed rows, a window of (left, right) keys, -1 for no bound."""
    lengths = cu_seq_q.diff().tolist()
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert max(lengths) == max_q == max_k
    assert window_size[1] == 0
    assert enable_gqa or query.shape[1] == key.shape[1]
    out = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        at = torch.arange(len(q))
        seen = at <= at[:, None]
        if window_size[0] >= 0:
            seen &= at >= at[:, None] - window_size[0]
        scores = scale * torch.einsum("qhd,khd->hqk", q, k).masked_fill(~seen, -torch.inf)
        out.append(torch.einsum("hqk,khd->qhd", torch.softmax(scores, -1), v))
    return torch.cat(out)


@pytest.fixture(params=[True, False], ids=["groups", "repeated"], autouse=True)
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's kernel as of 2.13 and as of 2.11, and every model fit for it."""
    monkeypatch.setattr(varlen, "torch_varlen", lambda: (plain_varlen, request.param))
    monkeypatch.setattr(varlen, "why_not_varlen", lambda model: "")
    monkeypatch.setattr(varlen, "by_ours", lambda device: False)


def states_and_gradients(model: PreTrainedModel) -> list[Tensor]:
    model.zero_grad()
    hidden = packed_hidden(model, TOKENS, CU)
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return [hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_states_and_gradients_are_those_of_the_padded_batch(name: str, recompute: bool) -> None:
    model = family(name)
    assert any_pads(model)
    want = states_and_gradients(model)
    assert set_attention(model) == "varlen"
    assert not any_pads(model)
    if recompute:
        recompute_blocks(model)
    got = states_and_gradients(model)
    assert len(got) == len(want) > 10
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_a_branch_is_packed_too(name: str) -> None:
    model = family(name)
    want = packed_hidden(model, TOKENS, CU)
    set_attention(model)
    trunk = bottom_states(model, TOKENS, CU, 1)
    torch.testing.assert_close(Branch(model, 1)(trunk, CU), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_call_that_is_not_packed_is_what_it_was(name: str) -> None:
    """With padding on the left, and step by step with a cache."""
    model = family(name)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    how = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        want, said = base_of(model)(ids, attention_mask=mask).last_hidden_state, model.generate(ids, **how)
        set_attention(model)
        got = base_of(model)(ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-5, atol=1e-5)
        assert torch.equal(model.generate(ids, **how), said)


def test_positions_in_one_row_are_told_apart() -> None:
    """Each sequence alone gives its own part."""
    model = family("llama")
    set_attention(model)
    whole = packed_hidden(model, TOKENS, CU)
    for start, end in zip(CU.tolist(), CU.tolist()[1:], strict=False):
        alone = packed_hidden(model, TOKENS[start:end], torch.tensor([0, end - start]).int())
        torch.testing.assert_close(whole[start:end], alone, rtol=1e-4, atol=1e-5)


def test_dropout_and_models_that_hand_nothing_on_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("llama")
    set_attention(model)
    real = varlen._attend

    def forgetful(*args: Any, cu_seq_lens_q: Any = None, **named: Any) -> Any:
        return real(*args, **named)

    varlen.AttentionInterface.register(varlen.PACKED, forgetful)
    try:
        with pytest.raises(ValueError, match=r"does not hand on where packed sequences end; set model.attention: sdpa"):
            packed_hidden(model, TOKENS, CU)
    finally:
        varlen.AttentionInterface.register(varlen.PACKED, real)
    for layer in base_of(model).layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attends with dropout, a mask, a cap or sinks"):
        packed_hidden(model.train(), TOKENS, CU)


@pytest.mark.parametrize("mode", ["full", "hydra", "lora"])
def test_an_engine_learns_as_on_padded_batches(
    mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    figures = []
    for attention in ("sdpa", "auto"):
        config = small_config(model__train=mode, model__trained_layers=1, model__attention=attention)
        with caplog.at_level(logging.INFO, logger="ppomax"):
            engine = tiny_engine(config)
        rows = [engine.step(prompts(8, seed=i)).metrics for i in range(2)]
        assert all(row["val/first_ratio_gap"] == 0.0 for row in rows[:1])
        figures.append([{k: v for k, v in r.items() if k.startswith(("loss/", "policy/"))} for r in rows])
    assert "attention of scoring and update: varlen" in caplog.text
    for a, b in zip(*figures, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
