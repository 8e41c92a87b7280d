"""Which attention a model gets, and what is said where the one asked for does not serve."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from ppomax.engine import Engine
from ppomax.models import set_attention, varlen

from tests.engine.families import family
from tests.engine.tiny import small_config, tiny_reward


def test_a_cpu_packs_in_float32_and_capped_scores_are_not_left_out() -> None:
    assert set_attention(family("llama")) == "varlen"
    assert set_attention(family("llama").bfloat16()) == "sdpa"
    model = family("gemma2")
    model.config._attn_implementation = "sdpa"  # as transformers below 5.18 loads it
    assert set_attention(model) == model.config._attn_implementation == "eager"
    assert set_attention(family("llama"), "eager") == "eager"


def test_varlen_by_name_says_why_not() -> None:
    with pytest.raises(
        ValueError, match=r"attention varlen does not serve LlamaForCausalLM: its weights are torch\.bf"
    ):
        set_attention(family("llama").bfloat16(), "varlen")
    with pytest.raises(ValueError, match="attention must be one of auto, varlen, sdpa"):
        set_attention(family("llama"), "flash")
    with pytest.raises(ValueError, match="Linear holds no transformers model"):
        set_attention(torch.nn.Linear(2, 2))


def test_the_log_names_the_critic_s_attention_where_it_is_another(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ppomax"):
        Engine(family("llama"), None, family("gemma2"), tiny_reward(), small_config())
    assert "attention of scoring and update: varlen, the critic's eager" in caplog.text


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("llama", torch.float32, "its weights are torch.float32"),
        ("gemma3", torch.bfloat16, "its heads are 12 wide"),
        ("gemma2", torch.bfloat16, "heads are 12 wide|caps its attention scores"),
        ("llama", torch.bfloat16, ""),
    ],
)
def test_reasons(name: str, dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family(name)
    seen = SimpleNamespace(
        config=model.config, device=torch.device("cuda"), dtype=dtype, _supports_attention_backend=True,
        base_model=model.base_model,
    )  # fmt: skip
    monkeypatch.setattr(varlen, "torch_varlen", lambda: (None, True))
    import re

    assert re.search(reason, varlen.why_not_varlen(seen))
    assert bool(varlen.why_not_varlen(seen)) == bool(reason)
