"""Gradient checkpointing: the same update to the bit in every mode and family, one block's activations held, and
nothing of it where no gradient is asked for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ppomax.data import Text
from ppomax.engine import Engine
from ppomax.models import blocks_of, packed_hidden
from ppomax.models.recompute import recompute_blocks
from ppomax.planning.live_bytes import live_bytes
from torch import nn

from tests.engine.families import FAMILIES, family
from tests.engine.tiny import prompts, small_config, tiny_policy, tiny_reward

MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"model__train": "lora", "model__lora_rank": 4},
    "hydra": {"model__train": "hydra", "model__trained_layers": 2, "model__critic": "policy"},
    "hydra, value branch": {"model__train": "hydra", "model__trained_layers": 2, "model__critic": "trunk"},
}


def engine_of(name: str, **knobs: Any) -> Engine:
    config = small_config(**{"ptx__coef": 0.1, "ptx__batch_size": 2, "batch__micro_tokens": 40, **knobs})
    return Engine(family(name), None, None, tiny_reward(), config, texts=lambda n: [Text(p, 1) for p in prompts(n)])


def calls_of(blocks: nn.Module) -> list[bool]:
    """Whether gradients were on, at each forward of a block's attention, which runs anew with its block."""
    seen: list[bool] = []
    for block in blocks.children():
        block.self_attn.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    return seen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_steps_are_the_same_to_the_bit(name: str, mode: str) -> None:
    """Losses, norms and trained weights, ptx and all; the rollout's cache is not touched."""
    plain, saving = (engine_of(name, **MODES[mode], model__gradient_checkpointing=on) for on in (False, True))
    for seed in range(2):
        a, b = plain.step(prompts(8, seed=seed)).metrics, saving.step(prompts(8, seed=seed)).metrics
        timed = ("time/", "perf/")
        assert {k: v for k, v in a.items() if not k.startswith(timed)} == {
            k: v for k, v in b.items() if not k.startswith(timed)
        }
    for role in ("policy", "critic"):
        want, got = (getattr(engine, role).tensors()[0] for engine in (plain, saving))
        assert want.keys() == got.keys()
        assert all(torch.equal(x, got[n]) for n, x in want.items())


def test_blocks_run_again_in_the_backward_and_nowhere_else() -> None:
    engine = engine_of("llama", model__gradient_checkpointing=True, batch__minibatch_size=8, batch__micro_tokens=4096)
    seen = {
        "policy": calls_of(blocks_of(engine.policy.module)),
        "critic": calls_of(blocks_of(engine.critic.module.model)),
        "reference": calls_of(blocks_of(engine.reference)),
    }
    experience = engine.experience(engine.rollout(prompts(8)))
    assert not any(x for found in seen.values() for x in found)
    for found in seen.values():
        found.clear()
    engine.update(experience)
    depth = len(blocks_of(engine.policy.module))
    assert len(seen["policy"]) == 2 * 2 * depth  # PPO and ptx, each a forward and what the backward runs again
    assert len(seen["critic"]) == 2 * len(blocks_of(engine.critic.module.model))
    assert not seen["reference"]


def test_copies_run_their_own_weights() -> None:
    model = tiny_policy()
    recompute_blocks(model)
    recompute_blocks(model)  # once more changes nothing
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in blocks_of(twin).parameters():
            p.zero_()
    tokens, cu = torch.tensor([1, 5, 6, 7]), torch.tensor([0, 4], dtype=torch.int32)
    gap = packed_hidden(model, tokens, cu) - packed_hidden(twin, tokens, cu)
    assert float(gap.detach().abs().max()) > 1e-3
    packed_hidden(twin, tokens, cu).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in blocks_of(twin).parameters())


def test_a_forward_holds_block_inputs_alone() -> None:
    model = family("llama")
    tokens, cu = torch.zeros(512, dtype=torch.int64), torch.arange(0, 513, 64, dtype=torch.int32)
    saved = []
    for _ in range(2):
        with live_bytes() as live:
            hidden = packed_hidden(model, tokens, cu)
            saved.append(live.now)
        del hidden
        recompute_blocks(model)
    depth, states = len(blocks_of(model)), 512 * 32 * 4
    assert saved[1] < saved[0] - 8 * depth * states
    assert saved[1] < (depth + 9) * states  # and the final norm's, positions, what the result itself is
