"""A sentiment classifier in plain data, the independent judge of a run: TF-IDF on words and word pairs, logistic
regression.

    x_t = (1 + log count_t) * idf_t, divided by |x| ;  positive if  sum_t coef_t * x_t + bias > 0
idf_t = log((1 + n) / (1 + documents with t)) + 1. It is trained on rows that the reward model never saw, by nothing but
torch, and stored as JSON: {"bias": b, "terms": {term: [idf, coef]}}.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WORD = re.compile(r"[a-z']+|[!?]")


def terms_of(text: str) -> Counter[str]:
    """Words and neighbouring word pairs of the text with their counts."""
    words = WORD.findall(text.lower())
    return Counter(words + [f"{a} {b}" for a, b in itertools.pairwise(words)])


@dataclass(frozen=True)
class SentimentClassifier:
    """logit(text) > 0 means positive."""

    bias: float
    terms: dict[str, tuple[float, float]]
    """Term -> (idf, coefficient)."""

    @classmethod
    def load(cls, path: str | Path) -> SentimentClassifier:
        """Read the JSON file that `save` wrote."""
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(
            float(data["bias"]), {term: (float(idf), float(coef)) for term, (idf, coef) in data["terms"].items()}
        )

    def save(self, path: str | Path) -> None:
        """Write the JSON file; numbers are rounded to four digits."""
        terms = {term: [round(idf, 3), round(coef, 4)] for term, (idf, coef) in sorted(self.terms.items())}
        Path(path).write_text(
            json.dumps({"bias": round(self.bias, 5), "terms": terms}, separators=(",", ":")), encoding="utf-8"
        )

    def logit(self, text: str) -> float:
        """Log-odds that the text is positive."""
        known = [(count, *self.terms[term]) for term, count in terms_of(text).items() if term in self.terms]
        weights = [((1 + math.log(count)) * idf, coef) for count, idf, coef in known]
        norm = math.sqrt(sum(w * w for w, _ in weights)) or 1.0
        return sum(w * coef for w, coef in weights) / norm + self.bias

    def positive_share(self, texts: Sequence[str]) -> float:
        """Share of the texts that are called positive."""
        return sum(self.logit(text) > 0 for text in texts) / len(texts)
