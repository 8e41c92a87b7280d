"""Inputs that the ops are tried on. A case is plain data; `draw` makes its tensors, the same ones each time.
Hypothesis builds cases too.

Softmax rows are peaked as well as flat (a flat one hides a wrong tail of V), far below 0, far above it, and with -inf
in them. Upstream gradients of flat rows are drawn large, so that the gradients of single logits are of order 1 and an
error in them shows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

VOCABS = (1, 2, 127, 1023, 1025, 32000, 50257, 128256, 151936, 151937)
HALF = ("bfloat16", "float16")
IGNORE = -100


def dtype_of(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


@dataclass(frozen=True)
class Logits:
    rows: tuple[int, ...]
    vocab: int
    style: str = "peaked"  # peaked, flat, low, high, inf, dead
    dtype: str = "float32"
    temperature: float = 1.0
    softcap: float | None = None
    ignored: float = 0.0  # share of rows to skip, NaN in them
    layout: str = "contiguous"  # contiguous, sliced, wide, odd, broadcast
    upstream: str = "dense"  # dense, expanded, transposed, logprobs, entropy
    seed: int = 0

    def draw(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """logits, labels, and the upstream gradients of logprobs and entropy (None: that output is not used)."""
        g = torch.Generator().manual_seed(self.seed)
        z = self._logits(g)
        labels = torch.randint(self.vocab, self.rows, generator=g)
        top = z.argmax(-1)
        labels = torch.where(torch.rand(self.rows, generator=g) < 0.5, top, labels)
        skip = torch.rand(self.rows, generator=g) < self.ignored
        z[skip], labels[skip] = torch.nan, IGNORE
        scale = self.vocab / 4 if self.style in ("flat", "low", "high") else 1.0
        up = [scale * torch.randn(self.rows, generator=g) for _ in range(2)]
        z, labels = self._lay_out(z.to(dtype_of(self.dtype)).to(device), labels.to(device))
        lp, ent = (self._upstream(u.to(device)) for u in up)
        return z, labels, None if self.upstream == "entropy" else lp, None if self.upstream == "logprobs" else ent

    def _logits(self, g: torch.Generator) -> Tensor:
        z = torch.randn((*self.rows, self.vocab), generator=g)
        if self.style in ("low", "high"):
            z += -200.0 if self.style == "low" else 1e4
        if self.style in ("peaked", "inf", "dead"):  # two peaks of like height: one in the last column, one anywhere
            height = 8 + 12 * torch.rand((*self.rows, 1), generator=g)
            z[..., -1:] += height
            at = torch.randint(self.vocab, (*self.rows, 1), generator=g)
            z.scatter_add_(-1, at, height + torch.randn(height.shape, generator=g))
        if self.style in ("inf", "dead"):
            z[torch.rand(z.shape, generator=g) < 0.4] = -torch.inf
            z.view(-1, self.vocab)[0, 0] = -1.0
        if self.style == "dead":
            z.view(-1, self.vocab)[-1] = -torch.inf
        return z

    def _lay_out(self, z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.layout == "sliced":  # logits[:, :-1], labels[:, 1:]
            wide = z.new_full((*self.rows[:-1], self.rows[-1] + 1, self.vocab), 77.0)
            wide[..., :-1, :] = z
            longer = labels.new_full((*self.rows[:-1], self.rows[-1] + 1), 10**6)
            longer[..., 1:] = labels
            return wide[..., :-1, :], longer[..., 1:]
        if self.layout == "wide":  # a padded vocabulary, cut to V; labels with a stride
            wide = z.new_full((*self.rows, self.vocab + 3), 77.0)
            wide[..., :-3] = z
            return wide[..., :-3], torch.stack([labels, labels + 10**6], -1)[..., 0]
        if self.layout == "odd":  # rows at odd addresses
            flat = z.new_full((z.numel() + 1,), 77.0)
            flat[1:] = z.flatten()
            longer = labels.new_full((labels.numel() + 1,), 10**6)
            longer[1:] = labels.flatten()
            return flat[1:].view(z.shape), longer[1:].view(labels.shape)
        if self.layout == "broadcast":  # every row is the first one, by a stride of 0
            return z.reshape(-1, self.vocab)[:1].expand(labels.numel(), -1).view(z.shape) if z.ndim == 2 else z, labels
        return z, labels

    def _upstream(self, u: Tensor) -> Tensor:
        if self.upstream == "expanded":
            return u.flatten()[:1].reshape(()).expand(u.shape)
        if self.upstream == "transposed":
            return u.transpose(0, -1).contiguous().transpose(0, -1)
        return u


LOGITS = (
    *(Logits((3,) if v < 60000 else (2,), v, style) for v in VOCABS for style in ("peaked", "low")),
    *(Logits((5,), v, "peaked", dtype) for v in (2, 127, 1025, 50257) for dtype in HALF),
    *(Logits((4,), v, "flat", dtype) for v in (127, 2049) for dtype in ("float32", *HALF)),
    *(Logits((4,), v, "high", dtype) for v in (1, 1023) for dtype in ("float32", "float16")),
    *(
        Logits((6,), v, style, dtype)
        for v in (2, 129, 1030)
        for style in ("inf", "dead")
        for dtype in ("float32", "bfloat16")
    ),
    *(
        Logits((4,), 1025, style, "float32", t, cap)
        for style in ("peaked", "low")
        for t in (0.3, 1.7)
        for cap in (None, 30.0)
    ),
    Logits((4,), 130, "inf", softcap=20.0, temperature=0.6),
    Logits((4,), 130, "dead", softcap=20.0),
    *(
        Logits((2, 5), 131, "peaked", d, 0.7, None, 0.4, lay)
        for lay in ("sliced", "wide", "odd")
        for d in ("float32", "bfloat16")
    ),
    Logits((6,), 257, layout="broadcast"),
    *(Logits((3, 4), 133, "peaked", upstream=up) for up in ("expanded", "transposed", "logprobs", "entropy")),
    Logits((3,), 64, ignored=1.0),
    *(Logits(rows, 65) for rows in ((), (1,), (0,), (2, 0), (2, 2, 3))),
)


@dataclass(frozen=True)
class Packed:
    """Sequences of the given lengths, packed, or padded to T = max(lengths) with a mask."""

    lengths: tuple[int, ...]
    padded: bool = False
    mask: str = "none"  # none, ends, holes, nothing, first, left
    gamma: float = 1.0
    lam: float = 0.95
    lams: bool = False
    bootstrap: bool = False
    dtypes: tuple[str, str] = ("float32", "float32")
    layout: str = "contiguous"  # contiguous, sliced, odd
    level: float = 0.0
    seed: int = 0

    def draw(self, device: str = "cpu") -> dict[str, Tensor | None]:
        """rewards, values, cu_seqlens, mask (NaN in masked steps), lams, bootstrap."""
        g = torch.Generator().manual_seed(self.seed)
        shape = (len(self.lengths), max(self.lengths, default=0)) if self.padded else (sum(self.lengths),)
        rewards, values = torch.randn(shape, generator=g), self.level + torch.randn(shape, generator=g)
        keep = self._mask(g, shape)
        if keep is not None:
            rewards[~keep], values[~keep] = torch.nan, torch.nan
        r, v = rewards.to(dtype_of(self.dtypes[0])), values.to(dtype_of(self.dtypes[1]))
        count = len(self.lengths)
        ends = torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)
        out = {
            "rewards": self._lay_out(r, 3),
            "values": self._lay_out(v, 1),
            "cu_seqlens": None if self.padded else ends,
            "mask": None if keep is None else self._lay_out(keep if self.seed % 2 else keep.to(torch.uint8), 5),
            "lams": torch.rand(count, generator=g) if self.lams else None,
            "bootstrap": torch.randn(count, generator=g) + self.level if self.bootstrap else None,
        }
        return {k: x if x is None else _keep_strides(x, device) for k, x in out.items()}

    def _mask(self, g: torch.Generator, shape: tuple[int, ...]) -> Tensor | None:
        if self.mask == "none" and not (self.padded and len(set(self.lengths)) > 1):
            return None
        if self.padded:
            steps, ends = torch.arange(shape[1]), torch.tensor(self.lengths).reshape(-1, 1)
            keep = steps >= shape[1] - ends if self.mask == "left" else steps < ends
        else:
            keep = torch.ones(shape, dtype=torch.bool)
        if self.mask == "holes":
            keep = keep & (torch.rand(shape, generator=g) < 0.6)
        if self.mask == "nothing":
            keep = torch.zeros_like(keep)
        if self.mask == "first":
            keep = torch.zeros_like(keep)
            keep[..., :1] = True
        return keep

    def _lay_out(self, x: Tensor, extra: int) -> Tensor:
        if self.layout == "sliced":
            wide = x.new_full((*x.shape[:-1], x.shape[-1] + extra), 1)
            wide[..., : x.shape[-1]] = x
            return wide[..., : x.shape[-1]]
        if self.layout == "odd":
            wide = x.new_full((*x.shape[:-1], x.shape[-1] + 1), 1)
            wide[..., 1:] = x
            return wide[..., 1:]
        return x


def _keep_strides(x: Tensor, device: str) -> Tensor:
    """x.to(device) packs a sliced tensor: move its whole storage instead."""
    if x.device.type == device:
        return x
    base = x.as_strided((x.untyped_storage().size() // x.element_size(),), (1,), 0)
    return base.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


RAGGED = (1, 7, 64, 2, 129, 33)
PACKED = (
    *(
        Packed(RAGGED, padded, gamma=gamma, lam=lam)
        for padded in (False, True)
        for gamma, lam in ((1.0, 0.95), (0.99, 1.0), (0.9, 0.0), (0.0, 0.7))
    ),
    *(
        Packed(RAGGED, padded, mask, 0.99, 0.9, True, True, seed=s)
        for padded in (False, True)
        for s, mask in enumerate(("holes", "first", "nothing"))
    ),
    *(
        Packed((5, 40, 17), True, mask, 1.0, 0.8, bootstrap=True, layout=lay)
        for mask in ("ends", "left", "holes")
        for lay in ("sliced", "odd")
    ),
    *(Packed((5, 40, 17), False, "holes", 1.0, 0.8, bootstrap=True, layout=lay, seed=1) for lay in ("sliced", "odd")),
    *(
        Packed(RAGGED, padded, "holes", dtypes=d)
        for padded in (False, True)
        for d in (("float32", "bfloat16"), ("bfloat16", "float16"))
    ),
    Packed((300, 1), gamma=0.99, lam=0.97, level=100.0, bootstrap=True),
    Packed((1025,), gamma=1.0, lam=1.0),
    Packed((1, 1, 1), bootstrap=True),
    Packed((1,) * 40, lams=True),
    Packed((3,) * 4, True),
    Packed((), False),
    Packed((), True),
)


SPREAD = {"same": 0.0, "tiny": 1e-3, "near": 0.1, "far": 1.0, "overflow": 40.0}


@dataclass(frozen=True)
class Tokens:
    """Elementwise inputs: log-probabilities, values and what goes with them."""

    shape: tuple[int, ...] = (37,)
    style: str = "far"  # same, near, far, overflow
    mask: str = "none"  # none, some, all, nothing, one
    dtype: str = "float32"
    other: str = "float32"
    normalizer: str = "none"  # none, number, tensor, zero
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    weighted: bool = False
    kl_coef: float = 0.0
    estimator: str = "k3"
    ent_coef: float = 0.0
    clip: float | None = 0.2
    upstream: str = "dense"  # dense, expanded
    seed: int = 0

    def draw(self, device: str = "cpu") -> dict[str, Tensor | None]:
        """Tensors by name; NaN in masked tokens."""
        g = torch.Generator().manual_seed(self.seed)

        def normal() -> Tensor:
            return torch.randn(self.shape, generator=g, dtype=torch.float64)

        keep = self._mask(g)
        # Made in float64: a float32 sum would lie on the grid of `old`, where old + (new - old) never rounds.
        old = -3.0 * torch.rand(self.shape, generator=g, dtype=torch.float64)
        first = old + SPREAD[self.style] * normal()
        out = {
            "first": first,
            "old": old,
            "reference": first + SPREAD[self.style] * normal(),
            "advantages": 2.0 * normal(),
            "returns": old + normal(),
            "weights": 2.0 * torch.rand(self.shape, generator=g, dtype=torch.float64),
            "entropy": 3.0 * torch.rand(self.shape, generator=g, dtype=torch.float64),
            "upstream": normal(),
        }
        if keep is not None:
            for name in out.keys() - {"upstream"}:
                out[name] = out[name].masked_fill(~keep, torch.nan)
        cast = {
            k: x.to(dtype_of(self.other if k in ("old", "advantages", "returns", "weights") else self.dtype))
            for k, x in out.items()
        }
        if self.style == "same":
            cast["first"] = cast["old"].to(cast["first"].dtype)
        up = out["upstream"].float()
        cast["upstream"] = up.flatten()[:1].reshape(()).expand(self.shape) if self.upstream == "expanded" else up
        cast = {k: x.to(device) for k, x in cast.items()}
        mask = None if keep is None else keep.to(device)
        return {**cast, "mask": mask if mask is None or self.seed % 2 else mask.to(torch.uint8)}

    def normalizer_for(self, device: str) -> tuple[float | Tensor | None, float | None]:
        """As passed, and its value."""
        value = {"none": None, "number": 11.5, "tensor": 123.0, "zero": 0.0}[self.normalizer]
        if self.normalizer in ("tensor", "zero"):
            return torch.tensor(value, dtype=torch.float32, device=device), value
        return value, value

    def _mask(self, g: torch.Generator) -> Tensor | None:
        if self.mask == "none":
            return None
        keep = torch.rand(self.shape, generator=g) < 0.7
        if self.mask == "one":
            keep = torch.zeros(self.shape, dtype=torch.bool)
            keep.view(-1)[keep.numel() // 2 :][:1] = True
        return {"all": torch.ones_like(keep), "nothing": torch.zeros_like(keep)}.get(self.mask, keep)


SHAPES: Sequence[tuple[int, ...]] = ((), (0,), (1,), (15,), (16, 33), (3, 0), (2, 3, 5), (1029,))
ELEMENTWISE = (
    *(Tokens(shape) for shape in SHAPES),
    *(Tokens((200,), style, "some", seed=1) for style in ("same", "tiny", "near", "far", "overflow")),
    *(
        Tokens((64,), "near", "some", d, o)
        for d, o in (("bfloat16", "float32"), ("float16", "bfloat16"), ("float32", "float16"))
    ),
    *(
        Tokens((50,), "far", mask, normalizer=n)
        for mask in ("nothing", "one", "all")
        for n in ("none", "number", "tensor", "zero")
    ),
    Tokens((64,), "near", upstream="expanded"),
)
POLICY = (
    *ELEMENTWISE,
    *(Tokens((300,), style, "some", dual_clip=3.0, weighted=True, seed=2) for style in ("near", "far", "overflow")),
    *(
        Tokens((90,), "far", "some", kl_coef=0.3, estimator=e, ent_coef=0.02, normalizer="tensor", seed=3)
        for e in ("k1", "k2", "k3", "abs")
    ),
    Tokens((90,), "overflow", "some", kl_coef=0.3, ent_coef=-0.1, dual_clip=1.5, weighted=True),
    Tokens((90,), "near", clip_low=0.0, clip_high=0.0),
    Tokens((90,), "far", clip_low=1.0, clip_high=float("inf")),
    Tokens((64,), "far", "some", "bfloat16", "float32", kl_coef=0.1, ent_coef=0.1, estimator="k2", weighted=True),
    Tokens((6000,), "far", "some", seed=4),
)
VALUE = (
    *ELEMENTWISE,
    *(Tokens((300,), "far", "some", clip=c, seed=5) for c in (None, 0.0, 0.5, 10.0)),
    Tokens((6000,), "far", "some", seed=4),
)
KL = tuple(
    replace(case, estimator=e, mask="none")
    for e in ("k1", "k2", "k3", "abs")
    for case in ELEMENTWISE[:17] + ELEMENTWISE[-1:]
)
REWARDS = tuple(
    (lengths, replace(case, shape=(sum(lengths),), estimator=e, mask="none", kl_coef=c))
    for lengths in (RAGGED, (1,), (1, 1, 1), (1000, 30), ())
    for case, e, c in (
        (Tokens(style="near"), "k1", 0.05),
        (Tokens(style="far"), "k3", 0.1),
        (Tokens(style="overflow"), "k3", 1e-3),
        (Tokens(style="far"), "k2", 0.0),
        (Tokens(style="near", dtype="bfloat16", other="float16"), "abs", 2.0),
    )
)


@dataclass(frozen=True)
class Spread:
    """Inputs of whiten."""

    shape: tuple[int, ...] = (100,)
    mask: str = "none"
    mean: float = 0.0
    std: float = 1.0
    dtype: str = "float32"
    shift_mean: bool = True
    eps: float = 1e-8
    seed: int = 0

    def draw(self, device: str = "cpu") -> tuple[Tensor, Tensor | None]:
        g = torch.Generator().manual_seed(self.seed)
        x = self.mean + self.std * torch.randn(self.shape, generator=g)
        keep = Tokens(self.shape, mask=self.mask)._mask(g)
        if keep is not None:
            x = x.masked_fill(~keep, torch.nan)
            keep = (keep if self.seed % 2 else keep.to(torch.uint8)).to(device)
        return x.to(dtype_of(self.dtype)).to(device), keep


SPREADS = (
    *(Spread(shape, shift_mean=shift) for shape in SHAPES for shift in (True, False)),
    *(
        Spread((17, 31), mask, shift_mean=shift, seed=1)
        for mask in ("some", "all", "one", "nothing")
        for shift in (True, False)
    ),
    *(Spread((500,), "some", 2.5, 3.0, d) for d in HALF),
    Spread((5000,), "some", mean=1e4),
    Spread((5000,), "some", mean=1e4, shift_mean=False),
    Spread((300,), std=0.0, mean=0.1),
    Spread((300,), std=1e-3, eps=1e-2),
)
