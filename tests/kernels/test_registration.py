"""The ops as torch sees them: opcheck of each registered op, torch.compile(fullgraph=True) forward and backward, fake
tensors, autocast, and what backward may be asked for."""

from typing import Any

import ppomax_kernels as K
import pytest
import torch
from ppomax_kernels.registry import OPS, table_of
from torch._subclasses.fake_tensor import FakeTensorMode

from .backends import Backend
from .calls import DIFFERENTIABLE, WANTS, Call, arguments, flat
from .contract import same_bits
from .verify import leaf


@pytest.fixture
def call(impl: Backend, op: str) -> Call:
    if impl.name not in table_of(op):
        pytest.skip(f"{impl.name}: {op} has no such back-end")
    return Call(op, impl)


def registered() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted({name.removeprefix("ppomax::") for name in names if name.startswith("ppomax::")})


def samples(name: str, impl: str) -> tuple[Any, ...]:
    """Arguments of a registered op, in its schema's order."""
    a = arguments()
    lp, kl, tr, ga, wh, pp, vl, sa = (
        a[k]
        for k in ("token_logprobs", "kl_penalty", "token_rewards", "gae", "whiten", "ppo_loss", "value_loss", "sample")
    )
    lin, lpp = a["linear_token_logprobs"], a["linear_ppo_loss"]
    logits, labels = lp["logits"], lp["labels"]
    n = len(labels)
    rows = (logits, labels, 0.8, 0.0, True, -100, impl)
    stats = torch.ops.ppomax.moments(wh["x"], wh["mask"], impl)
    lse, entropy = torch.zeros(n) + 5, torch.ones(n)
    head = (lin["hidden"], lin["weight"], labels, lin["bias"])
    walk = (-100, -1, 5, False)
    policy = (lpp["mask"], None, lpp["ref_logprobs"], None, 0.0, 0.2, 0.3, 3.0, 0.1, "k3", 0.01)
    if name == "ppo_loss_fwd":
        inputs = (pp[k] for k in ("logprobs", "old_logprobs", "advantages", "mask"))
        return (*inputs, None, pp["ref_logprobs"], pp["entropy"], None, 7.0, 0.2, 0.2, 3.0, 0.1, "k3", 0.01, True, impl)
    return {
        "token_logprobs": rows,
        "token_logprobs_fwd": rows,
        "token_logprobs_bwd": (entropy, None, logits, labels, lse, entropy, 0.8, 0.0, -100, impl),
        "kl_penalty": (kl["logprobs"], kl["ref_logprobs"], "k3", impl),
        "kl_penalty_fwd": (kl["logprobs"], kl["ref_logprobs"], "k2", impl),
        "kl_penalty_bwd": (torch.ones(n), kl["logprobs"], kl["ref_logprobs"], "k3", impl),
        "token_rewards": (tr["scores"], tr["logprobs"], tr["ref_logprobs"], tr["cu_seqlens"], 0.1, "k3", impl),
        "gae": (ga["rewards"], ga["values"], ga["cu_seqlens"], ga["mask"], 0.99, 0.9, None, ga["bootstrap"], impl),
        "moments": (wh["x"], wh["mask"], impl),
        "whiten": (wh["x"], wh["mask"], stats, True, 1e-8, impl),
        "value_loss_fwd": (vl["values"], vl["old_values"], vl["returns"], vl["mask"], None, 0.0, 0.2, True, impl),
        "linear_token_logprobs": (*head, 0.8, 0.0, *walk, True, impl),
        "linear_token_logprobs_fwd": (*head, 0.8, 0.0, *walk, True, impl),
        "linear_token_logprobs_bwd": (
            entropy, None, *head, lse, entropy, 0.8, 0.0, *walk, True, True, True, impl,
        ),
        "linear_ppo_loss": (*head, lpp["old_logprobs"], lpp["advantages"], *policy, 0.8, 0.0, *walk, impl),
        "linear_ppo_loss_fwd": (
            *head, lpp["old_logprobs"], lpp["advantages"], *policy, 0.8, 0.0, *walk, True, True, True, impl,
        ),
        "linear_nll": (*head, None, 0.0, 0.8, 0.0, *walk, impl),
        "linear_nll_fwd": (*head, None, 0.0, 0.8, 0.0, *walk, True, True, True, impl),
        "sample": (sa["logits"], sa["seeds"], sa["positions"], 0.8, 20, 0.9, impl),
    }[name]  # fmt: skip


def wanting(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The floating inputs of a differentiable op require gradients (those of a primitive never do)."""
    counts = {"token_logprobs": 1, "kl_penalty": 2, "linear_token_logprobs": 4, "linear_ppo_loss": 4, "linear_nll": 4}
    many = counts.get(name, 0)
    return tuple(
        leaf(x) if i < many and isinstance(x, torch.Tensor) and x.is_floating_point() else x for i, x in enumerate(args)
    )


@pytest.mark.parametrize("name", registered())
def test_opcheck(name: str) -> None:
    """Schema, fake tensors, autograd registration, tracing with static and dynamic shapes."""
    op = getattr(torch.ops.ppomax, name).default
    torch.library.opcheck(op, wanting(name, samples(name, "cpu")))


@pytest.mark.parametrize("op", OPS)
def test_compile(call: Call, op: str) -> None:
    """No graph break, forward and backward, and the same bits as without."""
    if call.impl.name == "ref" or call.impl.interpreted:
        pytest.skip(f"{call.impl.name}: tracing is the same for every fused back-end; tried with cpu")
    torch._dynamo.reset()
    compiled = torch.compile(getattr(K, op), fullgraph=True, backend="aot_eager")
    for i, (a, b) in enumerate(zip(call.both(compiled), call.both(), strict=True)):
        same_bits(f"{op}: result {i}", a, b)


@pytest.mark.parametrize("op", ["token_logprobs", "gae", "ppo_loss"])
def test_compile_once_for_all_lengths(impl: Backend, op: str) -> None:
    """Dynamic shapes: a new number of tokens, or a new temperature, is no new graph."""
    if impl.name != "cpu":
        pytest.skip(f"{impl.name}: tried with cpu")
    torch._dynamo.reset()
    seen = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    compiled = torch.compile(getattr(K, op), fullgraph=True, backend=count, dynamic=True)
    for n in (12, 15, 21, 30, 47):
        Call(op, impl, n).forward(compiled)
    assert len(seen) == 1, f"{len(seen)} graphs for 5 lengths"


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_inductor(op: str) -> None:
    torch._dynamo.reset()
    call = Call(op, Backend("cpu", "cpu"))
    compiled = torch.compile(getattr(K, op), fullgraph=True)
    for i, (a, b) in enumerate(zip(call.both(compiled), call.both(), strict=True)):
        same_bits(f"{op}: result {i}", a, b)


def pretended(x: torch.Tensor, device: str) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("op", OPS)
def test_fake_tensors(op: str, device: str) -> None:
    """On tensors without values, also pretended CUDA ones: whatever reads a value back (a host sync) fails here."""
    with FakeTensorMode():
        given = {k: pretended(v, device) if isinstance(v, torch.Tensor) else v for k, v in arguments()[op].items()}
        out = flat(getattr(K, op)(**given))
    for fake, real in zip(out, Call(op, Backend("cpu", "cpu")).forward(), strict=True):
        assert (fake.shape, fake.dtype, fake.stride(), fake.device.type) == (
            real.shape,
            real.dtype,
            real.stride(),
            device,
        )


@pytest.mark.parametrize("op", OPS)
def test_autocast(call: Call, op: str) -> None:
    """Row ops compute as they are: what comes in decides. The linear ones cast as torch.nn.Linear does."""
    dtype = torch.bfloat16
    got = call.both(within=torch.autocast(call.impl.device, dtype))
    if op.startswith("linear"):
        cast = {k: arguments(call.impl.device)[op][k].to(dtype) for k in ("hidden", "weight", "bias")}
        wanted = [x.float() for x in call.both(**cast)]
        got = [x.float() for x in got]
    else:
        wanted = call.both()
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        same_bits(f"{op}: result {i}", a, b)


def loss_of(call: Call) -> tuple[torch.Tensor, list[torch.Tensor]]:
    given = arguments(call.impl.device)[call.op]
    wanted = {n: leaf(given[n]) for n in WANTS[call.op] if given.get(n) is not None}
    out = flat(getattr(K, call.op)(**{**given, **wanted}, impl=call.impl.name))
    return sum(x.sum() for x in out if x.requires_grad), list(wanted.values())  # type: ignore[return-value]


MADE_IN_FORWARD = ("linear_ppo_loss", "linear_nll")


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_second_backward_is_right_or_raises(call: Call, op: str) -> None:
    loss, wanted = loss_of(call)
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    if op in MADE_IN_FORWARD and call.impl.fused:
        with pytest.raises(RuntimeError, match=f"{op}: a second backward"):
            torch.autograd.grad(loss, wanted)
        return
    kept = [x.clone() for x in first]
    for a, b, c in zip(torch.autograd.grad(loss, wanted), kept, first, strict=True):
        same_bits(f"{op}: second backward", a, b)
        same_bits(f"{op}: what the first one gave", c, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_double_backward_raises(call: Call, op: str) -> None:
    """A clear error, not a silent zero."""
    if not call.impl.fused:
        pytest.skip("ref: plain torch, differentiable twice")
    loss, wanted = loss_of(call)
    d = torch.autograd.grad(loss, wanted, create_graph=True)
    with pytest.raises(RuntimeError, match=r"first derivatives alone|not have been used"):
        torch.autograd.grad(sum(x.sum() for x in d), wanted)


@pytest.mark.parametrize("op", ["token_logprobs", "kl_penalty", "linear_token_logprobs"])
def test_changed_in_place_before_backward(call: Call, op: str) -> None:
    """What backward reads again is version-checked."""
    if not call.impl.fused:
        pytest.skip("ref: torch's autograd keeps other tensors, and checks those")
    loss, wanted = loss_of(call)
    with torch.no_grad():
        wanted[0].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize("op", OPS)
def test_no_graph_without_gradients(call: Call, op: str) -> None:
    for x in call.forward():
        assert not x.requires_grad
    given = arguments(call.impl.device)[op]
    wanted = {n: leaf(given[n]) for n in WANTS.get(op, ()) if given.get(n) is not None}
    with torch.no_grad():
        for x in flat(getattr(K, op)(**{**given, **wanted}, impl=call.impl.name)):
            assert not x.requires_grad


@pytest.mark.parametrize("op", OPS)
def test_inference_mode(call: Call, op: str) -> None:
    with torch.inference_mode():
        inside = call.forward()
    for a, b in zip(inside, call.forward(), strict=True):
        same_bits(op, a, b)


def test_another_thread_runs_backward(impl: Backend) -> None:
    """As autograd does on a GPU."""
    import threading

    call = Call("token_logprobs", impl)
    loss, wanted = loss_of(call)
    result: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: result.extend(torch.autograd.grad(loss, wanted)))
    thread.start()
    thread.join()
    loss, wanted = loss_of(call)
    same_bits("dlogits", result[0], torch.autograd.grad(loss, wanted)[0])
