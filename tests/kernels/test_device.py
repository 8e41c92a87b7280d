"""What only a GPU can show: CUDA graphs, streams, a current device that is not the tensors', peak memory."""

import ppomax_kernels as K
import pytest
import torch
from ppomax_kernels.registry import OPS, table_of

from .backends import Backend
from .calls import Call, arguments, flat
from .contract import same_bits


@pytest.fixture
def call(impl: Backend, op: str) -> Call:
    if impl.device != "cuda":
        pytest.skip(f"{impl.name}: no CUDA device here")
    if impl.name not in table_of(op) or not impl.fused:
        pytest.skip(f"{impl.name}: not a fused back-end of {op}")
    return Call(op, impl)


@pytest.mark.parametrize("op", OPS)
def test_graph_capture(call: Call, op: str) -> None:
    """A host sync inside a capture fails; the replay gives the same bits."""
    given = arguments("cuda")[op]
    if op.startswith("linear"):
        given["labels"] = given["labels"].clamp(min=0)
        given["kept"] = int(given["mask"].sum()) if op == "linear_ppo_loss" else len(given["labels"])
    run = getattr(K, op)
    eager = flat(run(**given, impl=call.impl.name))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(**given, impl=call.impl.name)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flat(run(**given, impl=call.impl.name))
    graph.replay()
    for a, b in zip(captured, eager, strict=True):
        same_bits(f"{op}: replay", a, b)


@pytest.mark.parametrize("op", OPS)
def test_side_stream(call: Call, op: str) -> None:
    """Work goes to the current stream: after a long wait in it the inputs change, and the op must see the change."""
    expected = call.forward()
    given = arguments("cuda")[op]
    late = {
        k: torch.zeros_like(v) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in given.items()
    }
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for name, x in late.items():
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                x.copy_(given[name])
        out = flat(getattr(K, op)(**late, impl=call.impl.name))
    stream.synchronize()
    for a, b in zip(out, expected, strict=True):
        same_bits(f"{op}: in a side stream", a, b)


@pytest.mark.parametrize("op", OPS)
def test_current_device_is_another(call: Call, op: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{call.impl.name}: one GPU only")
    expected = call.both()
    given = {k: v.to("cuda:1") if isinstance(v, torch.Tensor) else v for k, v in arguments("cuda")[op].items()}
    with torch.cuda.device(0):
        out = flat(getattr(K, op)(**given, impl=call.impl.name))
    for a, b in zip(out, expected, strict=False):
        same_bits(f"{op}: on cuda:1", a.to("cuda:0"), b)
