"""The independent judge of a run, in plain data: is a text positive, and could a person have written it?

    score = log P(positive) + log P(written)
    positive    TF-IDF on words and word pairs, logistic regression:
                x_t = (1 + log count_t) * idf_t, divided by |x| ;  sum_t coef_t * x_t + bias
                idf_t = log((1 + n) / (1 + documents with t)) + 1
    written     logistic regression on five numbers: shares of words and of word pairs that are known, shares of words
                and of pairs that differ from all before, and the text's length; people's texts against the same ones
                spoiled (loops, pieces of words, words of other texts)
Without the second part a policy that repeats words of praise wins. Both are trained on rows that the reward model never
saw, by nothing but torch, and stored as JSON: {"bias": b, "terms": {term: [idf, coef]}, "written": {...}}."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORD = re.compile(r"[a-z']+|[!?]")


def terms_of(text: str) -> Counter[str]:
    """Words and neighbouring word pairs of the text with their counts."""
    words = WORD.findall(text.lower())
    return Counter(words + [f"{a} {b}" for a, b in itertools.pairwise(words)])


def shares_of(text: str, terms: Container[str]) -> list[float]:
    """Of the text's words: the share that is among `terms`, that of neighbouring pairs, the share of different words,
    that of different pairs, and the log of their number."""
    words = WORD.findall(text.lower())
    pairs = list(itertools.pairwise(words))
    count, between = max(1, len(words)), max(1, len(pairs))
    return [
        sum(word in terms for word in words) / count,
        sum(f"{a} {b}" in terms for a, b in pairs) / between,
        len(set(words)) / count,
        len(set(pairs)) / between,
        math.log(count),
    ]


@dataclass(frozen=True)
class Written:
    """Log-odds that a person wrote a text, from its `shares_of`."""

    means: list[float]
    stds: list[float]
    weights: list[float]
    """Of the five standardised numbers z, of the products of the first four with the fifth, and a constant."""

    def inputs(self, shares: Sequence[float]) -> list[float]:
        """What the weights are for."""
        z = [(x - mean) / std for x, mean, std in zip(shares, self.means, self.stds, strict=True)]
        return [*z, *(x * z[4] for x in z[:4]), 1.0]

    def logit(self, shares: Sequence[float]) -> float:
        return sum(w * x for w, x in zip(self.weights, self.inputs(shares), strict=True))


@dataclass(frozen=True)
class SentimentClassifier:
    """logit(text) > 0 means positive; score(text) is what texts are compared by."""

    bias: float
    terms: dict[str, tuple[float, float]]
    """Term -> (idf, coefficient)."""
    written: Written | None = None
    """None: every text is taken for a person's."""

    @classmethod
    def load(cls, path: str | Path) -> SentimentClassifier:
        """Read the JSON file that `save` wrote."""
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        written = Written(**data["written"]) if data.get("written") else None
        terms = {term: (float(idf), float(coef)) for term, (idf, coef) in data["terms"].items()}
        return cls(float(data["bias"]), terms, written)

    def save(self, path: str | Path) -> None:
        """Write the JSON file; numbers are rounded to four digits."""
        terms = {term: [round(idf, 3), round(coef, 4)] for term, (idf, coef) in sorted(self.terms.items())}
        data: dict[str, Any] = {"bias": round(self.bias, 5), "terms": terms}
        if self.written is not None:
            data["written"] = {name: [round(x, 4) for x in xs] for name, xs in vars(self.written).items()}
        Path(path).write_text(json.dumps(data, separators=(",", ":")), encoding="utf-8")

    def logit(self, text: str) -> float:
        """Log-odds that the text is positive."""
        known = [(count, *self.terms[term]) for term, count in terms_of(text).items() if term in self.terms]
        weights = [((1 + math.log(count)) * idf, coef) for count, idf, coef in known]
        norm = math.sqrt(sum(w * w for w, _ in weights)) or 1.0
        return sum(w * coef for w, coef in weights) / norm + self.bias

    def written_logit(self, text: str) -> float:
        """Log-odds that a person wrote the text."""
        return math.inf if self.written is None else self.written.logit(shares_of(text, self.terms))

    def score(self, text: str) -> float:
        """log P(positive) + log P(written), at most 0."""
        return _log_sigmoid(self.logit(text)) + _log_sigmoid(self.written_logit(text))

    def positive_share(self, texts: Sequence[str]) -> float:
        """Share of the texts that are called positive."""
        return sum(self.logit(text) > 0 for text in texts) / len(texts)


def _log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > -700 else x
