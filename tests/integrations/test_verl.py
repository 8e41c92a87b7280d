"""verl's own functions against ours. They are loaded from an installed verl, alone: its trainer wants Ray and GPUs, its
losses want torch. `pip install --no-deps verl` is enough."""

import importlib.util
import inspect
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from ppomax.integrations import IntegrationError, check_signature
from ppomax.integrations.padded import MODES, Aggregation, Clip, clipped_policy_loss, whitened_gae

from .shared import CLOSE, MASKS, batch, stub


@pytest.fixture(scope="module")
def verl():
    """verl.trainer.ppo.core_algos by file, with what it imports and does not need here left empty."""
    found = importlib.util.find_spec("verl")
    if found is None or not found.submodule_search_locations:
        pytest.skip("verl: not installed; pip install --no-deps verl")
    root = Path(found.submodule_search_locations[0])
    loaded: dict[str, types.ModuleType] = {}

    def load(name: str, path: Path) -> types.ModuleType:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        loaded[name] = module
        return module

    before = {k: v for k, v in sys.modules.items() if k == "verl" or k.startswith("verl.") or k == "omegaconf"}
    empty = {"verl": {}, "verl.trainer": {}, "verl.trainer.ppo": {}, "verl.workers": {},
             "verl.trainer.config": {"AlgoConfig": type("AlgoConfig", (), {})},
             "verl.workers.config": {"ActorConfig": type("ActorConfig", (), {})},
             "verl.utils": {"as_torch_index": None, "group_mean_std": None},
             "verl.utils.import_utils": {"deprecated": lambda *words: lambda function: function},
             "verl.utils.device": {"get_device_name": lambda: "cpu", "get_torch_device": lambda: None}}  # fmt: skip
    for name, members in empty.items():
        sys.modules[name] = stub(name, **members)
        sys.modules[name].__path__ = []
    if importlib.util.find_spec("omegaconf") is None:
        sys.modules["omegaconf"] = stub("omegaconf", DictConfig=dict)
    sys.modules["verl.utils.torch_functional"] = functional(root / "utils" / "torch_functional.py")
    sys.modules["verl.utils"].torch_functional = sys.modules["verl.utils.torch_functional"]
    sys.modules["verl.utils.experimental"] = stub("verl.utils.experimental")
    fused = load("verl.utils.experimental.torch_functional", root / "utils" / "experimental" / "torch_functional.py")
    sys.modules["verl.utils.experimental"].torch_functional = fused
    algorithms = load("verl.trainer.ppo.core_algos", root / "trainer" / "ppo" / "core_algos.py")
    sys.modules["verl.trainer.ppo"].core_algos = algorithms
    plain = types.SimpleNamespace(
        policy_loss=algorithms.compute_policy_loss_vanilla,
        gae=algorithms.compute_gae_advantage_return,
        fused_linear=fused.FusedLinearForPPO.forward,
    )
    yield types.SimpleNamespace(algorithms=algorithms, plain=plain, fused=fused)
    for name in [k for k in sys.modules if k == "verl" or k.startswith("verl.") or k == "ppomax.integrations.verl"]:
        del sys.modules[name]
    sys.modules.update(before)


def functional(path: Path) -> types.ModuleType:
    """The masked sums of verl's torch_functional, whose head imports much else."""
    source = path.read_text(encoding="utf-8")
    wanted = ("masked_sum", "masked_mean", "masked_var", "masked_whiten", "clip_by_value")
    parts = [f"def {name}" + source.split(f"def {name}", 1)[1].split("\n\n\n", 1)[0] for name in wanted]
    module = stub("verl.utils.torch_functional", torch=torch)
    exec("from __future__ import annotations\n" + "\n\n\n".join(parts), module.__dict__)
    return module


class Config(dict):
    """As verl's ActorConfig: knobs as attributes and by `get`."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_the_policy_loss_is_verl_s(verl, mask: str, mode: str, weighted: bool, shared: bool) -> None:
    """Loss, gradient and figures, for every way of aggregation, with and without a global batch of several ranks."""
    import ppomax.integrations.verl as ours

    if f'"{mode}"' not in inspect.getsource(verl.algorithms.agg_loss):
        pytest.skip(f"{mode}: this verl has no such mode")
    given = batch(1, mask)
    whole = {"dp_size": 2, "batch_num_tokens": 131, "global_batch_size": 9, "loss_scale_factor": 40} if shared else {}
    config = Config(clip_ratio=0.2, clip_ratio_low=0.1, clip_ratio_high=0.28, clip_ratio_c=1.4, global_batch_info=whole)
    results = []
    for function in (verl.plain.policy_loss, ours.policy_loss):
        leaf = given["log_prob"].clone().requires_grad_()
        loss, metrics = function(
            given["old_log_prob"], leaf, given["advantages"], given["response_mask"], mode, config,
            given["weights"] if weighted else None,
        )  # fmt: skip
        loss.backward()
        results.append((loss.detach(), leaf.grad, metrics))
    (loss, grad, figures), (our_loss, our_grad, our_figures) = results
    torch.testing.assert_close(our_loss, loss, **CLOSE)
    torch.testing.assert_close(our_grad, grad, **CLOSE)
    assert our_figures.keys() == figures.keys()
    for name, value in figures.items():
        assert our_figures[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert figures["actor/pg_clipfrac"] > 0.1
    assert figures["actor/pg_clipfrac_lower"] > 0


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_are_verl_s(verl, mask: str, gamma: float, lam: float) -> None:
    import ppomax.integrations.verl as ours

    given = batch(2, mask)
    words = {name: given[name] for name in ("values", "response_mask")} | {"token_level_rewards": given["rewards"]}
    advantages, returns = verl.plain.gae(**words, gamma=gamma, lam=lam)
    our_advantages, our_returns = ours.gae(**words, gamma=gamma, lam=lam)
    on = given["response_mask"].bool()
    torch.testing.assert_close(our_advantages[on], advantages[on], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_returns[on], returns[on], **CLOSE)
    assert not our_advantages[~on].any()


def test_both_are_found_by_their_name(verl) -> None:
    import ppomax.integrations.verl as ours

    assert verl.algorithms.get_policy_loss_fn("ppomax") is ours.policy_loss
    assert verl.algorithms.get_adv_estimator_fn("ppomax") is ours.gae
    assert verl.algorithms.compute_gae_advantage_return is ours.gae
    ours.register(verl.algorithms)  # again, as a second import in another way would


@pytest.mark.parametrize("shape", [(23,), (3, 11)], ids=["packed", "padded"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_fused_linear_logprob_is_verl_s(verl, shape: tuple[int, ...], temperature: float) -> None:
    """Log-probabilities, entropies, and the gradients of hidden states and head through both."""
    import ppomax.integrations.verl as ours

    assert verl.fused.FusedLinearForPPO.forward is ours.fused_linear
    g = torch.Generator().manual_seed(5)
    hidden, head = torch.randn(*shape, 16, generator=g), torch.randn(50, 16, generator=g)
    labels = torch.randint(0, 50, shape, generator=g)
    results = []
    for forward in (verl.plain.fused_linear, ours.fused_linear):
        leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        logprobs, entropy = forward(verl.fused.FusedLinearForPPO(), *leaves, labels, temperature)
        torch.autograd.backward([logprobs.sum() + (0.3 * entropy).sum()])
        results.append((logprobs, entropy, *(x.grad for x in leaves)))
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_an_unknown_signature_is_refused() -> None:
    def newer(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_log_probs):
        pass

    known = ("old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config", "rollout_is_weights")
    changed = "newer of verl 9.9 is without rollout_is_weights and with rollout_log_probs"
    with pytest.raises(IntegrationError, match=changed):
        check_signature(newer, known, "verl 9.9")


# ---- without verl ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_its_formula(mode: str) -> None:
    """Against the plain formula of padded's head note, at a ratio of one, where a token's loss is its -advantage."""
    given = batch(3, "multi-turn")
    on, a = given["response_mask"], given["advantages"]
    loss, _ = clipped_policy_loss(given["log_prob"], given["log_prob"], a, on, Clip(), Aggregation(mode))
    per_row, lengths = -(a * on).sum(-1), on.sum(-1)
    want = {
        "token-mean": per_row.sum() / on.sum(),
        "token-sum": per_row.sum(),
        "seq-mean-token-sum": per_row.mean(),
        "seq-mean-token-sum-norm": per_row.mean() / on.shape[-1],
        "seq-mean-token-mean": (per_row / lengths).mean(),
    }
    torch.testing.assert_close(loss, want[mode], **CLOSE)


def test_what_cannot_be_known_is_asked_for() -> None:
    given = batch(4, "ragged")
    words = (given["old_log_prob"], given["log_prob"], given["advantages"], given["response_mask"])
    with pytest.raises(ValueError, match="loss_agg_mode must be one of token-mean"):
        clipped_policy_loss(*words, Clip(), Aggregation("mean"))
    with pytest.raises(ValueError, match="batch_num_tokens is needed when dp_size > 1"):
        clipped_policy_loss(*words, Clip(), Aggregation(dp_size=2))
    with pytest.raises(ValueError, match="global_batch_size is needed"):
        clipped_policy_loss(*words, Clip(), Aggregation("seq-mean-token-sum", dp_size=2))


def test_advantages_without_a_token_are_zero() -> None:
    nothing = torch.zeros(2, 3)
    advantages, returns = whitened_gae(nothing, nothing, nothing, 1.0, 0.95)
    assert not advantages.any()
    assert not returns.any()
