"""How the shipped sentiment classifier is trained: logistic regression by nothing but torch, on rows that the reward
model never sees. It is read by ppomax.assets.classifier."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

from ppomax.assets.classifier import SentimentClassifier, terms_of


def train_classifier(
    texts: Sequence[str], labels: Sequence[int], *, min_documents: int = 3, strength: float = 3.0
) -> SentimentClassifier:
    """Logistic regression, loss = strength * sum of log losses + |coef|^2 / 2, by L-BFGS from zero (no randomness)."""
    counts = [terms_of(text) for text in texts]
    documents = Counter(term for count in counts for term in count)
    terms = sorted(term for term, n in documents.items() if n >= min_documents)
    index = {term: i for i, term in enumerate(terms)}
    idf = torch.tensor([math.log((1 + len(texts)) / (1 + documents[term])) + 1 for term in terms], dtype=torch.float64)
    x = _tfidf(counts, index, idf)
    y = torch.tensor(labels, dtype=torch.float64)
    weight = torch.zeros(len(terms), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = torch.mv(x, weight) + bias
        value = (
            strength * torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum")
            + weight.square().sum() / 2
        )
        value.backward()
        return value

    optimizer.step(loss)
    return SentimentClassifier(bias.item(), {term: (idf[i].item(), weight[i].item()) for term, i in index.items()})


def _tfidf(counts: Sequence[Counter[str]], index: dict[str, int], idf: torch.Tensor) -> torch.Tensor:
    rows, columns, values = [], [], []
    for row, count in enumerate(counts):
        known = [(index[term], 1 + math.log(n)) for term, n in count.items() if term in index]
        weights = [tf * idf[column].item() for column, tf in known]
        norm = math.sqrt(sum(w * w for w in weights)) or 1.0
        rows += [row] * len(known)
        columns += [column for column, _ in known]
        values += [w / norm for w in weights]
    return torch.sparse_coo_tensor(
        torch.tensor([rows, columns]),
        torch.tensor(values, dtype=torch.float64),
        (len(counts), len(index)),
        check_invariants=True,
    ).coalesce()
