"""Hypothesis draws cases: shapes, strides, dtypes, masks, segment lengths, peaked logits. Small, so that the
interpreter keeps up."""

from hypothesis import strategies as st

from .cases import Logits, Packed, Spread, Tokens

DTYPES = st.sampled_from(("float32", "bfloat16", "float16"))
SEEDS = st.integers(0, 2**20)
MASKS = st.sampled_from(("none", "some", "all", "nothing", "one"))


@st.composite
def logits(draw: st.DrawFn) -> Logits:
    rows = draw(st.one_of(st.tuples(st.integers(1, 5)), st.tuples(st.integers(1, 3), st.integers(1, 3))))
    layouts = ("contiguous", "wide", "odd") if len(rows) == 1 else ("contiguous", "sliced", "wide", "odd")
    dtype = draw(DTYPES)
    return Logits(
        rows,
        draw(st.one_of(st.integers(1, 70), st.integers(120, 140), st.integers(1000, 1100), st.integers(2040, 2060))),
        draw(st.sampled_from(("peaked", "flat", "low", "inf", "dead", *(("high",) if dtype == "float32" else ())))),
        dtype,
        draw(st.sampled_from((0.25, 0.7, 1.0, 2.0))),
        draw(st.sampled_from((None, None, 15.0, 50.0))),
        draw(st.sampled_from((0.0, 0.5))),
        draw(st.sampled_from(layouts)),
        draw(st.sampled_from(("dense", "expanded", "transposed", "logprobs", "entropy"))),
        draw(SEEDS),
    )


@st.composite
def packed(draw: st.DrawFn) -> Packed:
    return Packed(
        tuple(draw(st.lists(st.integers(1, 90), min_size=1, max_size=6))),
        draw(st.booleans()),
        draw(st.sampled_from(("none", "ends", "left", "holes", "nothing", "first"))),
        draw(st.sampled_from((0.0, 0.9, 0.99, 1.0))),
        draw(st.sampled_from((0.0, 0.5, 0.95, 1.0))),
        draw(st.booleans()),
        draw(st.booleans()),
        (draw(DTYPES), draw(DTYPES)),
        draw(st.sampled_from(("contiguous", "sliced", "odd"))),
        draw(st.sampled_from((0.0, 10.0))),
        draw(SEEDS),
    )


@st.composite
def tokens(draw: st.DrawFn) -> Tokens:
    shape = draw(st.one_of(st.tuples(st.integers(0, 300)), st.tuples(st.integers(1, 9), st.integers(1, 40))))
    return Tokens(
        shape,
        draw(st.sampled_from(("same", "tiny", "near", "far", "overflow"))),
        draw(MASKS),
        draw(DTYPES),
        draw(DTYPES),
        draw(st.sampled_from(("none", "number", "tensor", "zero"))),
        draw(st.sampled_from((0.0, 0.2, 0.9))),
        draw(st.sampled_from((0.0, 0.28, 5.0))),
        draw(st.sampled_from((None, 1.5, 4.0))),
        draw(st.booleans()),
        draw(st.sampled_from((0.0, 0.3))),
        draw(st.sampled_from(("k1", "k2", "k3", "abs"))),
        draw(st.sampled_from((0.0, 0.05))),
        draw(st.sampled_from((None, 0.0, 0.2, 3.0))),
        draw(st.sampled_from(("dense", "expanded"))),
        draw(SEEDS),
    )


@st.composite
def spreads(draw: st.DrawFn) -> Spread:
    shape = draw(st.one_of(st.tuples(st.integers(0, 600)), st.tuples(st.integers(1, 9), st.integers(1, 40))))
    mean, std = draw(st.sampled_from(((0.0, 1.0), (3.0, 2.0), (-50.0, 0.5))))
    return Spread(
        shape,
        draw(MASKS),
        mean,
        std,
        draw(DTYPES),
        draw(st.booleans()),
        draw(st.sampled_from((1e-8, 1e-2))),
        draw(SEEDS),
    )
