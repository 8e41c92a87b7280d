"""How the shipped judge is trained: two logistic regressions by nothing but torch, on rows that the reward model never
sees. It is read by ppomax.assets.classifier."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from ppomax.assets.classifier import SentimentClassifier, Written, shares_of, terms_of


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


def with_written(judge: SentimentClassifier, texts: Sequence[str], *, seed: int = 0) -> SentimentClassifier:
    """`judge`, also told people's `texts` from the same ones spoiled, each cut to 8 to 50 words; loss = mean of log
    losses + 1e-4 * |weights|^2."""
    rows, labels = written_rows(texts, seed)
    shares = torch.tensor([shares_of(row, judge.terms) for row in rows], dtype=torch.float64)
    plain = Written(shares.mean(0).tolist(), shares.std(0).tolist(), [])
    x = torch.tensor([plain.inputs(row) for row in shares.tolist()], dtype=torch.float64)
    y = torch.tensor(labels, dtype=torch.float64)
    weights = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(torch.mv(x, weights), y)
        value = value + 1e-4 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return replace(judge, written=replace(plain, weights=weights.tolist()))


def written_rows(texts: Sequence[str], seed: int) -> tuple[list[str], list[int]]:
    """Each text cut short (1), and another cut of it spoiled (0): a piece said over and over, words replaced by glued
    pieces of words, or words of other texts in its place."""
    generator = random.Random(seed)
    words = [word for text in texts for word in text.split()]
    rows, labels = [], []
    for text in texts:
        rows += [" ".join(_cut(text, generator)), " ".join(_spoiled(_cut(text, generator), words, generator))]
        labels += [1, 0]
    return rows, labels


def _cut(text: str, generator: random.Random) -> list[str]:
    return text.split()[: generator.randint(8, 50)]


def _spoiled(text: list[str], words: Sequence[str], generator: random.Random) -> list[str]:
    how = generator.choice(("loop", "loop", "pieces", "others"))
    if how == "loop":
        start, size = generator.randrange(len(text)), generator.randint(1, 4)
        return text[:start] + text[start : start + size] * generator.randint(3, 12)
    if how == "others":
        return [generator.choice(words) for _ in text]
    share = generator.choice((0.3, 0.5, 0.8))
    return [_glued(words, generator) if generator.random() < share else word for word in text]


def _glued(words: Sequence[str], generator: random.Random) -> str:
    """The beginning of a word and the end of another."""
    one, two = generator.choice(words), generator.choice(words)
    return one[: generator.randint(1, 4)] + two[-generator.randint(1, 4) :]


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
