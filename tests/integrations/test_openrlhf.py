"""OpenRLHF's own loss.py and advantages against ours, loaded by file: its package wants Ray, vLLM and GPUs.
`pip install --no-deps openrlhf` is enough."""

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from ppomax.integrations import IntegrationError
from ppomax.integrations.openrlhf import (
    PolicyLoss,
    ValueLoss,
    advantages_and_returns,
    compute_entropy,
    log_probs_from_logits,
    replace,
    replace_logprobs,
)

from .shared import CLOSE, MASKS, batch, stub

WHOLE = {"dp_size": 2, "batch_num_tokens": torch.tensor(131.0), "global_batch_size": torch.tensor(9.0)}


@pytest.fixture(scope="module")
def openrlhf():
    """Its losses and the one method, from their files."""
    found = importlib.util.find_spec("openrlhf")
    if found is None or not found.submodule_search_locations:
        pytest.skip("openrlhf: not installed; pip install --no-deps openrlhf")
    root = Path(found.submodule_search_locations[0])
    package = stub("openrlhf_models")
    package.__path__ = []  # type: ignore[attr-defined]
    utils = stub("openrlhf_models.utils", torch=torch)
    utils.__dict__.update(F=torch.nn.functional, Optional=Any)
    for name in ("masked_mean", "_logsumexp_by_chunk", "log_probs_from_logits", "compute_entropy"):
        exec(function(root / "models" / "utils.py", name), utils.__dict__)
    sys.modules.update({"openrlhf_models": package, "openrlhf_models.utils": utils})
    spec = importlib.util.spec_from_file_location("openrlhf_models.loss", root / "models" / "loss.py")
    assert spec is not None
    assert spec.loader is not None
    losses = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(losses)
    experience = root / "trainer" / "ppo_utils" / "experience_maker.py"
    source = function(experience, "get_advantages_and_returns", indent="    ")
    maker: dict[str, Any] = {"torch": torch}
    exec(f"from __future__ import annotations\nclass RemoteExperienceMaker:\n{source}", maker)
    found_utils = types.SimpleNamespace(logprobs=utils.log_probs_from_logits, entropy=utils.compute_entropy)
    yield types.SimpleNamespace(losses=losses, maker=maker["RemoteExperienceMaker"], utils=found_utils)
    for name in ("openrlhf_models", "openrlhf_models.utils"):
        del sys.modules[name]


def function(path: Path, name: str, indent: str = "") -> str:
    """The source of one function of a file."""
    text = f"{indent}def {name}" + path.read_text(encoding="utf-8").split(f"\n{indent}def {name}", 1)[1]
    kept = text.splitlines()[:1]
    for line in text.splitlines()[1:]:
        if line.strip() and not line.startswith((indent + " ", indent + ")")):
            break
        kept.append(line)
    return "from __future__ import annotations\n" * (not indent) + "\n".join(kept) + "\n"


CORRECTIONS = [("off", "mask"), ("token", "mask"), ("token", "clip"), ("seq", "mask")]


@pytest.mark.parametrize("mask", MASKS[:2])
@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("dual", [None, 1.4])
@pytest.mark.parametrize(("level", "mode"), CORRECTIONS)
@pytest.mark.parametrize("whole", [{}, WHOLE], ids=["local", "global"])
def test_the_policy_loss_is_openrlhf_s(openrlhf, mask, by_token, dual, level, mode, whole) -> None:
    given = batch(1, mask)
    sampled = given["old_log_prob"] + 0.4 * (given["weights"] - 1)
    words = dict(clip_eps_low=0.1, clip_eps_high=0.28, dual_clip=dual, token_level_loss=by_token,
                 is_correction_level=level, is_correction_mode=mode, is_correction_threshold=[0.9, 1.1])  # fmt: skip
    results = []
    for kind in (openrlhf.losses.PolicyLoss, PolicyLoss):
        leaf = given["log_prob"].clone().requires_grad_()
        loss, *figures = kind(**words)(
            leaf, given["old_log_prob"], given["advantages"], given["response_mask"], sampled, **whole
        )
        loss.backward()
        results.append((loss.detach(), leaf.grad, *figures))
    for theirs, ours in zip(*results, strict=True):
        assert (theirs is None) == (ours is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("whole", [{}, WHOLE], ids=["local", "global"])
def test_the_value_loss_is_openrlhf_s(openrlhf, mask, clip, whole) -> None:
    given = batch(2, mask)
    others = given["values"] + 0.3 * given["advantages"], given["rewards"], given["response_mask"]
    results = []
    for kind in (openrlhf.losses.ValueLoss, ValueLoss):
        leaf = given["values"].clone().requires_grad_()
        loss = kind(clip)(leaf, *others, **whole)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8)])
def test_advantages_are_openrlhf_s(openrlhf, mask, gamma, lam) -> None:
    given = batch(3, mask)
    words = (given["values"], given["rewards"], given["response_mask"], gamma, lam)
    theirs = openrlhf.maker.get_advantages_and_returns(None, *words)
    for a, b in zip(advantages_and_returns(*words), theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_are_openrlhf_s(openrlhf, dtype, temperature) -> None:
    g = torch.Generator().manual_seed(6)
    logits, labels = (3 * torch.randn(3, 7, 40, generator=g)).to(dtype), torch.randint(0, 40, (3, 7), generator=g)
    results = []
    for source in (openrlhf.utils, types.SimpleNamespace(logprobs=log_probs_from_logits, entropy=compute_entropy)):
        leaf = logits.clone().requires_grad_()
        logprobs = source.logprobs(leaf.clone(), labels, temperature)  # theirs divides in place
        entropy = source.entropy(leaf)
        (logprobs.float().sum() + entropy.float().sum()).backward()
        results.append((logprobs.float(), entropy.float(), leaf.grad.float()))
    close = CLOSE if dtype == torch.float32 else {"rtol": 2e-2, "atol": 3e-2}
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **close)


def test_the_actor_s_functions_are_replaced_or_refused(openrlhf) -> None:
    actor = types.SimpleNamespace(log_probs_from_logits=openrlhf.utils.logprobs, compute_entropy=openrlhf.utils.entropy)
    replace_logprobs(actor, "openrlhf 0.11")
    assert actor.log_probs_from_logits is log_probs_from_logits
    actor.compute_entropy = lambda logits, mask: None
    with pytest.raises(IntegrationError, match="of openrlhf 9 is with mask"):
        replace_logprobs(actor, "openrlhf 9")


def test_they_take_their_places_or_refuse(openrlhf) -> None:
    losses = types.SimpleNamespace(PolicyLoss=openrlhf.losses.PolicyLoss, ValueLoss=openrlhf.losses.ValueLoss)
    maker = type("Maker", (), dict(vars(openrlhf.maker)))
    replace(losses, maker, "openrlhf 0.11")
    assert losses.PolicyLoss is PolicyLoss
    given = batch(4, "ragged")
    words = (given["values"], given["rewards"], given["response_mask"], 1.0, 0.95)
    assert torch.equal(maker().get_advantages_and_returns(*words)[0], advantages_and_returns(*words)[0])

    class Newer(torch.nn.Module):
        def forward(self, log_probs, old_log_probs, advantages, action_mask):
            pass

    losses = types.SimpleNamespace(PolicyLoss=Newer, ValueLoss=openrlhf.losses.ValueLoss)
    with pytest.raises(IntegrationError, match=r"forward of openrlhf 9 is without rollout_log_probs"):
        replace(losses, openrlhf.maker, "openrlhf 9")


@pytest.mark.parametrize(
    "words",
    [
        {"policy_loss_type": "gspo"},
        {"is_correction_gating": "tv"},
        {"is_correction_mode": "clip", "is_correction_level": "seq"},
    ],
)
def test_what_is_not_served_is_refused(words) -> None:
    with pytest.raises(ValueError, match=next(iter(words))):
        PolicyLoss(**words)
    with pytest.raises(ValueError, match="token_level_loss"):
        ValueLoss(token_level_loss=False)
