"""The fused linear ops: cases, truth and yardstick. The truth is the oracle of the row ops on hidden @ weight.T +
bias in float64 of the rounded inputs, and the chain rule by hand; the yardstick is torch.nn.functional.linear in the
inputs' dtype, then the yardstick of the row ops."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import oracle, plain
from .cases import IGNORE, dtype_of
from .contract import all_zero, f64, hold
from .verify import Run, gradients, hold_loss, leaf


@dataclass(frozen=True)
class Linear:
    rows: int = 13
    vocab: int = 131
    width: int = 16
    dtype: str = "float32"
    bias: bool = True
    temperature: float = 1.0
    softcap: float | None = None
    ignored: float = 0.0  # share of rows, NaN in their hidden states
    masked: float = 0.0  # share of rows (PPO), NaN in their advantages
    chunk: int | None = 4
    kept: bool = False  # the count of rows is passed
    invariant: bool = False
    frozen: str = ""  # hidden, weight
    normalizer: float | None = None
    dual_clip: float | None = None
    weighted: bool = False
    kl_coef: float = 0.0
    estimator: str = "k3"
    ent_coef: float = 0.0
    layout: str = "contiguous"  # sliced: hidden[:, :-1] of a batch, a weight with padded columns
    seed: int = 0

    def draw(self, device: str = "cpu") -> dict[str, Tensor]:
        """Logits of these have a standard deviation of 3: peaked rows. Ratios keep away from the edges of the clip,
        where a rounding decides."""
        g = torch.Generator().manual_seed(self.seed)
        dt = dtype_of(self.dtype)
        hidden = torch.randn(self.rows, self.width, generator=g).to(dt)
        weight = (3.0 / self.width**0.5 * torch.randn(self.vocab, self.width, generator=g)).to(dt)
        bias = torch.randn(self.vocab, generator=g).to(dt)
        labels = (hidden.float() @ weight.float().T).argmax(-1)
        labels = torch.where(
            torch.rand(self.rows, generator=g) < 0.5, labels, torch.randint(self.vocab, (self.rows,), generator=g)
        )
        labels[:1] = self.vocab - 1
        labels[torch.rand(self.rows, generator=g) < self.ignored] = IGNORE
        mask = torch.rand(self.rows, generator=g) >= self.masked
        z = f64(hidden) @ f64(weight).T + (f64(bias) if self.bias else 0.0)
        logp = torch.from_numpy(
            oracle.token_logprobs_truth(z, labels.numpy(), self.temperature, self.softcap, IGNORE)[0]
        ).float()
        moves = torch.tensor([-1.0, -0.6, -0.05, 0.0, 0.05, 0.6, 1.0])
        out = {
            "hidden": hidden.masked_fill((labels == IGNORE)[:, None], torch.nan),
            "weight": weight,
            "bias": bias,
            "labels": labels,
            "mask": mask,
            "old": logp + moves[torch.randint(len(moves), (self.rows,), generator=g)],
            "advantages": (2.0 * torch.randn(self.rows, generator=g)).masked_fill(~mask, torch.nan),
            "weights": 2.0 * torch.rand(self.rows, generator=g),
            "reference": logp + torch.randn(self.rows, generator=g),
            "dlogprobs": 4.0 * torch.randn(self.rows, generator=g),
            "dentropy": 4.0 * torch.randn(self.rows, generator=g),
        }
        if self.layout == "sliced":
            for name in ("hidden", "weight"):
                wide = out[name].new_full((len(out[name]), self.width + 3), 77.0)
                wide[:, : self.width] = out[name]
                out[name] = wide[:, : self.width] if device == "cpu" else wide.to(device)[:, : self.width]
        return {k: x if x.device.type == device else x.to(device) for k, x in out.items()}


def _options(case: Linear, x: dict[str, Tensor], counted: Tensor) -> dict[str, Any]:
    return dict(
        bias=x["bias"] if case.bias else None,
        temperature=case.temperature,
        softcap=case.softcap,
        ignore_index=IGNORE,
        chunk_tokens=case.chunk,
        kept=int(counted.sum()) if case.kept else None,
        batch_invariant=case.invariant,
    )


def _leaves(case: Linear, x: dict[str, Tensor]) -> dict[str, Tensor]:
    names = [n for n in ("hidden", "weight", "bias") if n != case.frozen and (n != "bias" or case.bias)]
    return {n: leaf(x[n]) for n in names}


def _logits(case: Linear, x: dict[str, Tensor], leaves: dict[str, Tensor]) -> Tensor:
    y = {**x, **leaves}
    dead = (x["labels"] == IGNORE)[:, None]
    return torch.nn.functional.linear(y["hidden"].masked_fill(dead, 0.0), y["weight"], y["bias"] if case.bias else None)


def _truth_logits(case: Linear, x: dict[str, Tensor]) -> np.ndarray:
    hidden = np.where((x["labels"] == IGNORE).cpu().numpy()[:, None], 0.0, f64(x["hidden"]))
    return hidden @ f64(x["weight"]).T + (f64(x["bias"]) if case.bias else 0.0)


def _hold_gradients(
    case: Linear,
    x: dict[str, Tensor],
    leaves: dict[str, Tensor],
    got: list[Tensor],
    yard: list[Any],
    up: list[np.ndarray],
) -> None:
    z, labels = _truth_logits(case, x), x["labels"].cpu().numpy()
    dz = oracle.token_logprobs_gradient(z, labels, case.temperature, case.softcap, IGNORE, *up)
    hidden = np.where((labels == IGNORE)[:, None], 0.0, f64(x["hidden"]))
    truth = {"hidden": dz @ f64(x["weight"]), "weight": dz.T @ hidden, "bias": dz.sum(0)}
    for name, mine, theirs in zip(leaves, got, yard, strict=True):
        hold(f"{case}: d{name}", mine, truth[name], *theirs, dtype=dtype_of(case.dtype))
        if name == "hidden":
            all_zero(f"{case}: dhidden of skipped rows", mine[x["labels"] == IGNORE])


WAYS = (plain.token_logprobs_by_lse, plain.token_logprobs)


def _by_all_ways(
    case: Linear, x: dict[str, Tensor], outputs: Callable[[Tensor, Tensor], list[Tensor]], up: list[Tensor]
) -> list[Any]:
    """For each gradient, what every plain way makes of it."""
    every = []
    for way in WAYS:
        leaves = _leaves(case, x)
        logprobs, entropy = way(_logits(case, x, leaves), x["labels"], **_head(case))
        every.append(gradients(outputs(logprobs, entropy), up, list(leaves.values())))
    return list(zip(*every, strict=True))


def _head(case: Linear) -> dict[str, Any]:
    return dict(temperature=case.temperature, softcap=case.softcap, ignore_index=IGNORE)


def _row_truth(case: Linear, x: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    labels = x["labels"].cpu().numpy()
    return oracle.token_logprobs_truth(_truth_logits(case, x), labels, case.temperature, case.softcap, IGNORE)


def linear_token_logprobs(run: Run, case: Linear, device: str = "cpu") -> None:
    x = case.draw(device)
    mine = _leaves(case, x)
    y, options = {**x, **mine}, _options(case, x, x["labels"] != IGNORE)
    bias = {"bias": y["bias"] if case.bias else None}
    got = run(y["hidden"], y["weight"], x["labels"], return_entropy=True, **{**options, **bias})
    yard = plain.token_logprobs(_logits(case, x, {}), x["labels"], **_head(case))
    truth = _row_truth(case, x)
    for what, *three in zip(("logprobs", "entropy"), got, truth, yard, strict=True):
        hold(f"{case}: {what}", *three)
    hold(f"{case}: logprobs alone", run(x["hidden"], x["weight"], x["labels"], **options), truth[0], yard[0])
    up = [x["dlogprobs"], x["dentropy"]]
    d_yard = _by_all_ways(case, x, lambda logprobs, entropy: [logprobs, entropy], up)
    _hold_gradients(case, x, mine, gradients(list(got), up, list(mine.values())), d_yard, [f64(u) for u in up])


def linear_ppo_loss(run: Run, case: Linear, device: str = "cpu") -> None:
    x = case.draw(device)
    counted = x["mask"] & (x["labels"] != IGNORE)
    terms = dict(
        clip_low=0.2, clip_high=0.28, dual_clip=case.dual_clip, kl_coef=case.kl_coef, estimator=case.estimator,
        ent_coef=case.ent_coef, normalizer=case.normalizer,
    )  # fmt: skip
    extra = {
        "is_weights": x["weights"] if case.weighted else None,
        "ref_logprobs": x["reference"] if case.kl_coef else None,
    }
    mine = _leaves(case, x)
    y = {**x, **mine}
    options = {**_options(case, x, counted), "bias": y["bias"] if case.bias else None}
    mask = x["mask"] if case.masked else None
    loss, metrics = run(
        y["hidden"], y["weight"], x["labels"], x["old"], x["advantages"], mask, **options, **terms, **extra
    )

    def yardstick(logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return plain.ppo_loss(logprobs, x["old"], x["advantages"], counted, **terms, **extra, entropy=entropy)

    yard = yardstick(*plain.token_logprobs(_logits(case, x, {}), x["labels"], **_head(case)))
    logp, ent = _row_truth(case, x)
    arrays = {k: None if t is None else f64(t) for k, t in extra.items()}
    keep = counted.cpu().numpy()
    truth, figures, *up = oracle.ppo_loss_truth(
        logp, f64(x["old"]), f64(x["advantages"]), keep, **terms, **arrays, entropy=ent
    )
    hold_loss(str(case), loss, metrics, truth, figures, *yard)
    _hold_loss_gradients(case, x, mine, loss, lambda *rows: [yardstick(*rows)[0]], up)


def linear_nll(run: Run, case: Linear, device: str = "cpu") -> None:
    x = case.draw(device)
    counted = x["labels"] != IGNORE
    mine = _leaves(case, x)
    y = {**x, **mine}
    options = {**_options(case, x, counted), "bias": y["bias"] if case.bias else None}
    loss, metrics = run(y["hidden"], y["weight"], x["labels"], **options, normalizer=case.normalizer)
    total = float(counted.sum()) if case.normalizer is None else case.normalizer
    share = 1.0 / total if total > 0 else 0.0
    tokens = counted.sum().float()
    logp, ent = plain.token_logprobs(_logits(case, x, {}), x["labels"], **_head(case))
    yard = {"nll": -logp.sum() * share, "entropy": ent.sum() * share, "tokens": tokens}
    lp, h = _row_truth(case, x)
    truth = {"nll": -lp.sum() * share, "entropy": h.sum() * share, "tokens": float(tokens)}
    hold_loss(str(case), loss, metrics, truth["nll"], truth, yard["nll"], yard)
    keep = counted.cpu().numpy()
    up = [np.where(keep, -share, 0.0), np.zeros(keep.shape)]
    _hold_loss_gradients(case, x, mine, loss, lambda logprobs, _: [-logprobs.sum() * share], up)


def _hold_loss_gradients(
    case: Linear, x: dict[str, Tensor], mine: dict[str, Tensor], loss: Tensor, plain_loss: Any, up: list[np.ndarray]
) -> None:
    """With an upstream gradient of 1.5: one that is not 1."""
    upstream = [torch.full_like(loss, 1.5)]
    d_yard = _by_all_ways(case, x, plain_loss, upstream)
    _hold_gradients(case, x, mine, gradients([loss], upstream, list(mine.values())), d_yard, [1.5 * u for u in up])


HEADS = (
    *(
        Linear(rows, vocab, chunk=chunk)
        for rows, vocab, chunk in ((13, 131, 4), (1, 1, None), (5, 2, 2), (7, 1025, 3), (8, 257, None))
    ),
    *(Linear(9, 200, 24, dt, bias, 0.7, chunk=4) for dt in ("bfloat16", "float16") for bias in (True, False)),
    *(Linear(9, 131, temperature=t, softcap=cap) for t in (0.4, 1.6) for cap in (None, 8.0)),
    *(
        Linear(13, 131, ignored=0.4, kept=kept, invariant=invariant)
        for kept in (False, True)
        for invariant in (False, True)
    ),
    *(Linear(6, 70, frozen=name, bias=bias) for name in ("hidden", "weight") for bias in (True, False)),
    Linear(9, 131, layout="sliced"),
    Linear(6, 70, ignored=1.0),
    Linear(0, 70),
)
LINEAR_LOGPROBS = HEADS
LINEAR_NLL = (*HEADS, Linear(11, 131, ignored=0.3, normalizer=23.0))
LINEAR_PPO = (
    *HEADS,
    *(
        Linear(13, 131, masked=0.4, ignored=i, ent_coef=0.3, kept=k, seed=s)
        for s, (i, k) in enumerate(((0.0, False), (0.3, True), (0.3, False)))
    ),
    *(Linear(13, 131, masked=0.3, kl_coef=0.4, estimator=e, normalizer=5.0, seed=4) for e in ("k1", "k2", "k3", "abs")),
    Linear(
        17,
        131,
        masked=0.2,
        dual_clip=1.7,
        weighted=True,
        ent_coef=-0.2,
        kl_coef=0.1,
        temperature=0.7,
        softcap=20.0,
        seed=5,
    ),
    Linear(12, 131, dtype="bfloat16", masked=0.3, ent_coef=0.3, kl_coef=0.2, estimator="k2", seed=6),
    Linear(6, 70, masked=1.0, ent_coef=0.1),
)
