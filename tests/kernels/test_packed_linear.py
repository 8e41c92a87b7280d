"""packed_linear on every instruction set and in both dtypes against a float64 product, over heights and widths that
fill no block."""

from __future__ import annotations

import pytest
import torch
from ppomax_kernels.internal.linear import linear
from ppomax_kernels.internal.packed_linear import PANEL, pack, packed_linear, product

TOLERANCE = 1e-6  # of the sum of absolute products


@pytest.mark.parametrize("outputs", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("inputs", [1, 7, 192])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_product(outputs: int, inputs: int, bias: bool, isa: int) -> None:
    generator = torch.Generator().manual_seed(outputs)
    weight, offset = torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)
    panels = pack(weight)
    for rows in (1, 2, 3, 4, 11, 12, 13, 25, 64):
        x = torch.randn(rows, inputs, generator=generator)
        got = packed_linear(x, panels, offset if bias else None, outputs)
        want = x.double() @ weight.double().T + (offset.double() if bias else 0.0)
        size = x.double().abs() @ weight.double().abs().T + 1.0
        assert ((got - want).abs() / size).max() <= TOLERANCE, rows
    lead = packed_linear(torch.zeros(2, 3, inputs), panels, None, outputs)
    assert lead.shape == (2, 3, outputs)
    assert packed_linear(torch.zeros(0, inputs), panels, None, outputs).shape == (0, outputs)


@pytest.mark.parametrize("outputs", [1, 31, 33, 100])
@pytest.mark.parametrize("inputs", [2, 6, 192])
@pytest.mark.parametrize("bias", [False, True])
def test_bfloat16_equals_the_product_rounded(outputs: int, inputs: int, bias: bool, isa: int) -> None:
    generator = torch.Generator().manual_seed(outputs)
    weight, offset = torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)
    weight, offset = weight.bfloat16(), offset.bfloat16()
    panels = pack(weight)
    for rows in (1, 2, 3, 11, 12, 13, 64):
        x = torch.randn(rows, inputs, generator=generator).bfloat16()
        got = packed_linear(x, panels, offset if bias else None, outputs)
        assert got.dtype == torch.bfloat16
        want = x.double() @ weight.double().T + (offset.double() if bias else 0.0)
        size = x.double().abs() @ weight.double().abs().T + 1.0
        assert ((got - want).abs() <= 2**-8 * want.abs() + TOLERANCE * size).all(), rows
    assert torch.equal(got[:1], packed_linear(x[:1], panels, offset if bias else None, outputs))


def test_a_row_does_not_depend_on_the_others_nor_on_threads() -> None:
    x, weight, before = torch.randn(65, 48), torch.randn(4000, 48), torch.get_num_threads()
    panels = pack(weight)
    whole = packed_linear(x, panels, None, 4000)
    assert torch.equal(whole[17:18], packed_linear(x[17:18], panels, None, 4000))
    try:
        torch.set_num_threads(2)
        assert torch.equal(whole, packed_linear(x, panels, None, 4000))
    finally:
        torch.set_num_threads(before)


# ---- products of what is not packed yet -----------------------------------------------------------------------------

SHAPES = [(1, 1, 1), (5, 33, 7), (200, 40, 100), (13, 1030, 65), (1100, 12, 1100), (2500, 70, 33)]
"""Rows, inputs, outputs; some beyond the inputs that are done at a time, some whose columns lie pages apart."""


def operands(rows: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("turned", ["", "x", "weight", "both"])
@pytest.mark.parametrize("add", [False, True])
def test_product_of_any_layout(shape: tuple[int, int, int], turned: str, add: bool, isa: int) -> None:
    x, weight = operands(*shape)
    want, bias = x.double() @ weight.double().T, torch.randn(shape[2])
    size = x.double().abs() @ weight.double().abs().T + 10.0
    if turned in ("x", "both"):
        x = x.T.contiguous().T
    if turned in ("weight", "both"):
        weight = weight.T.contiguous().T
    out = torch.full((shape[0], shape[2]), 3.0 if add else float("nan"))
    got = product(x, weight, bias, out=out, add=add)
    assert got.data_ptr() == out.data_ptr()
    assert ((got - want - bias.double() - 3.0 * add).abs() / size).max() <= TOLERANCE


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_of_a_product_does_not_depend_on_layout_threads_or_others(shape: tuple[int, int, int]) -> None:
    """What recorded logprobs that equal the scored ones to the bit stand on."""
    (x, weight), before = operands(*shape), torch.get_num_threads()
    whole = product(x, weight)
    for other in (product(x.T.contiguous().T, weight), product(x, weight.T.contiguous().T)):
        assert torch.equal(whole, other)
    for row in {0, shape[0] // 2, shape[0] - 1}:
        assert torch.equal(whole[row : row + 1], product(x[row : row + 1].clone(), weight))
    some = weight[shape[2] // 3 :]
    assert torch.equal(whole[:, shape[2] // 3 :], product(x, some))
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(whole, product(x, weight))
    finally:
        torch.set_num_threads(before)


def test_products_of_nothing() -> None:
    bias = torch.randn(3)
    assert product(torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0, 3)
    assert product(torch.zeros(2, 4), torch.zeros(0, 4)).shape == (2, 0)
    assert torch.equal(product(torch.zeros(2, 0), torch.zeros(3, 0), bias), bias.expand(2, 3))
    kept = torch.ones(2, 3)
    assert torch.equal(product(torch.zeros(2, 0), torch.zeros(3, 0), out=kept, add=True), torch.ones(2, 3))


@pytest.mark.parametrize("frozen", ["", "x", "weights", "biases"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_linear_and_its_gradients(count: int, biased: bool, frozen: str) -> None:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(3, 17, 40, generator=generator)
    weights = [torch.randn(n, 40, generator=generator) for n in (65, 7, 32)[:count]]
    biases = [torch.randn(len(w), generator=generator) for w in weights] if biased else []
    leaves = {"x": [x], "weights": weights, "biases": biases}
    upstream = torch.randn(3, 17, sum(map(len, weights)), generator=generator)
    found = []
    for exact in (False, True):
        own = {
            name: [p.detach().to(torch.float64 if exact else torch.float32).requires_grad_(name != frozen) for p in ps]
            for name, ps in leaves.items()
        }
        if exact:
            joined = torch.cat(own["biases"]) if biased else None
            y = torch.nn.functional.linear(own["x"][0], torch.cat(own["weights"]), joined)
        else:
            y = linear(own["x"][0], own["weights"], own["biases"])
        y.backward(upstream.to(y.dtype))
        found.append([y.detach(), *(p.grad for ps in own.values() for p in ps)])
    for got, want in zip(*found, strict=True):
        if want is None:
            assert got is None
        else:
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


def test_gradients_of_no_rows() -> None:
    x, weight = torch.zeros(0, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    linear(x, [weight]).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_panels_hold_the_weight() -> None:
    weight = torch.randn(PANEL + 3, 5)
    panels = pack(weight)
    assert panels.shape == (2, 5, PANEL)
    assert torch.equal(panels[1, :, 2], weight[PANEL + 2])
    assert not panels[1, :, 3:].any()
    wide = torch.randn(70, 37)
    assert torch.equal(pack(wide).transpose(1, 2).reshape(-1, 37)[:70], wide)
    assert torch.equal(pack(wide.T.contiguous().T), pack(wide))


def test_bad_arguments_are_named() -> None:
    for bad in (torch.zeros(4), torch.zeros(0, 4), torch.zeros(4, 4).double()):
        with pytest.raises(ValueError, match=r"weight must be \(out, in\) in float32 or bfloat16"):
            pack(bad)
    with pytest.raises(ValueError, match="an even number of inputs, got 3"):
        pack(torch.zeros(4, 3).bfloat16())
    panels = pack(torch.randn(40, 8))
    with pytest.raises(ValueError, match="do not fit panels"):
        packed_linear(torch.zeros(2, 9), panels, None, 40)
    with pytest.raises(ValueError, match="do not fit panels"):
        packed_linear(torch.zeros(2, 8), panels, None, 65)
    with pytest.raises(ValueError, match="must be of one dtype, float32 or bfloat16"):
        packed_linear(torch.zeros(2, 8).double(), panels, None, 40)
    with pytest.raises(ValueError, match=r"bias must be torch\.float32 of shape"):
        packed_linear(torch.zeros(2, 8), panels, torch.zeros(41), 40)
