"""sample: cases, the exact distribution in float64, and an own Philox from its published description (in Python's
integers)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import oracle, plain
from .cases import Logits
from .contract import f64, hold
from .verify import Run

M32 = 0xFFFFFFFF
# A float32 sum of weights ends some roundings from the exact one: a draw that near to the edge of a token's interval
# may fall to either side.
EDGE = 1e-5


def philox(seed: int, position: int) -> int:
    """First word of Philox4x32-10 (Salmon et al. 2011): key = seed, counter = (position, 0)."""
    key, counter = [seed & M32, seed >> 32 & M32], [position & M32, position >> 32 & M32, 0, 0]
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [b >> 32 ^ counter[1] ^ key[0], b & M32, a >> 32 ^ counter[3] ^ key[1], a & M32]
        key = [key[0] + 0x9E3779B9 & M32, key[1] + 0xBB67AE85 & M32]
    return counter[0]


def uniform(seed: int, position: int) -> float:
    return ((philox(seed, position) >> 8) + 0.5) / 2**24


def distribution(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of one row's tokens after the cuts, and which tokens a rounding could keep or drop."""
    p = np.exp(oracle.log_softmax(logits / temperature))
    order = np.sort(p)[::-1]
    least = order[top_k - 1] if 0 < top_k < len(p) else 0.0
    p = np.where((p >= least) & (p > 0), p, 0.0)
    p /= p.sum()
    unsure = np.zeros(p.shape, bool)
    if top_p < 1.0:
        order = np.sort(p)[::-1]
        mass = np.cumsum(order)
        reached = int((mass < top_p).sum())
        threshold = order[min(reached, len(order) - 1)]
        close = order[np.abs(mass - top_p) < EDGE]
        unsure = np.isin(p, [*close, *order[1:][np.abs(mass[:-1] - top_p) < EDGE]])
        p = np.where((p >= threshold) & (p > 0), p, 0.0)
        p /= p.sum()
    return p, unsure


@dataclass(frozen=True)
class Draw:
    logits: Logits
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def draw(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        z = self.logits.draw(device)[0]
        g = torch.Generator().manual_seed(self.logits.seed + 1)
        seeds = torch.randint(-(2**63), 2**63 - 1, (len(z),), generator=g)
        positions = torch.randint(0, 2**40, (len(z),), generator=g)
        return z, seeds.to(device), positions.to(device)


def sample(run: Run, case: Draw, device: str = "cpu") -> None:
    logits, seeds, positions = case.draw(device)
    token, logprob, plain_logprob, entropy = run(
        logits, seeds, positions, temperature=case.temperature, top_k=case.top_k, top_p=case.top_p
    )
    assert token.dtype == torch.int64
    assert tuple(token.shape) == (len(logits),)
    z = f64(logits)
    labels = token.cpu().numpy()
    assert ((labels >= 0) & (labels < z.shape[1])).all(), f"{case}: tokens {labels}"
    yard = plain.token_logprobs(logits, token)
    truth = oracle.token_logprobs_truth(z, labels, 1.0, None, -100)
    hold(f"{case}: plain logprob", plain_logprob, truth[0], yard[0])
    hold(f"{case}: entropy", entropy, truth[1], yard[1])
    if case.temperature == 0.0:
        assert (labels == z.argmax(-1)).all(), f"{case}: the first of the largest is {z.argmax(-1)}, got {labels}"
        assert bool((logprob == 0).all())
        return
    for row, (zs, seed, position) in enumerate(zip(z, seeds.tolist(), positions.tolist(), strict=True)):
        p, unsure = distribution(zs, case.temperature, case.top_k, case.top_p)
        if unsure.any():
            continue  # a rounding decides what is cut: nothing to hold this row to
        cut = (logits[row].float() / case.temperature).cpu().masked_fill(torch.from_numpy(p == 0), -torch.inf)
        of_cut = torch.log_softmax(cut, -1)[labels[row]]
        _hold_row(f"{case}: row {row}", p, uniform(seed, position), labels[row], logprob[row], of_cut)


def _hold_row(what: str, p: np.ndarray, u: float, got: int, logprob: Tensor, yard: Tensor) -> None:
    cumulative = np.cumsum(p)
    wanted = int(np.searchsorted(cumulative, u, side="right"))
    wanted = min(wanted, int(np.flatnonzero(p)[-1]))
    near = np.abs(cumulative - u).min() < EDGE
    assert p[got] > 0, f"{what}: token {got} was cut off"
    assert got == wanted or near, f"{what}: token {got}, wanted {wanted} (u = {u}, edges {cumulative[[got - 1, got]]})"
    hold(f"{what}: logprob", logprob, np.log(p[got]), yard)


CUTS = (
    (1.0, 0, 1.0),
    (0.7, 0, 1.0),
    (1.3, 5, 1.0),
    (1.0, 0, 0.8),
    (0.8, 12, 0.9),
    (1.0, 1, 1.0),
    (0.0, 0, 1.0),
    (2.0, 10**6, 0.3),
    (1.0, 3, 1e-6),
)
DRAWS = (
    *(
        Draw(Logits((7,), vocab, style, seed=s), *cut)
        for s, (vocab, style) in enumerate(((130, "flat"), (1025, "peaked")))
        for cut in CUTS
    ),
    *(Draw(Logits((5,), 257, "flat", dtype, seed=3), *cut) for dtype in ("bfloat16", "float16") for cut in CUTS[:5]),
    *(Draw(Logits((4,), vocab, "peaked", seed=4), 1.0, 0, 0.9) for vocab in (1, 2, 127, 4099)),
    *(Draw(Logits((4,), 300, style, seed=5), *CUTS[4]) for style in ("low", "high", "inf")),
    Draw(Logits((6,), 33, "flat", layout="wide"), 0.9, 4, 0.9),
    Draw(Logits((0,), 33), 0.9, 4, 0.9),
)
