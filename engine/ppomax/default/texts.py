"""From raw labelled reviews to the files that the default's stages read: tokenizer, texts, pairs, prompts.

Rows are dealt into three parts that never mix: `train` (tokenizer, policy, reward model), `held_out` (figures only) and
`classifier` (the independent judge). Whole reviews are cut at sentence ends into pieces as long as a response.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ppomax.data.rows import read_rows

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SHARES = {
    "snippets": {"train": 0.55, "held_out": 0.10, "classifier": 0.35},
    "reviews": {"train": 0.72, "held_out": 0.10, "classifier": 0.18},
}
"""Share of each file's rows that each part gets."""
PIECE_WORDS = (8, 30)
"""A piece of a review ends with the sentence that takes it over a random number of words in this range ..."""
PIECE_LIMIT = 48
"""... and is left out above this one."""


@dataclass(frozen=True)
class Labelled:
    """A text and its label, 1 positive or 0 negative."""

    text: str
    label: int


@dataclass(frozen=True)
class Part:
    """One of the three parts of the data."""

    snippets: list[Labelled]
    """Single sentences with a label of their own."""
    reviews: list[Labelled]
    """Whole reviews."""
    pieces: list[Labelled]
    """The reviews cut into pieces; each carries its review's label, which is often wrong for a single piece."""


def read_parts(data: Path, seed: int) -> dict[str, Part]:
    """Deal snippets.jsonl.gz and reviews.jsonl.gz of `data` into the three parts; a text found twice is kept once."""
    dealt = {}
    for name in ("snippets", "reviews"):
        rows = {str(row["text"]): int(row["label"]) for _, row in read_rows(data / f"{name}.jsonl.gz")}
        texts = sorted(rows)
        random.Random(seed).shuffle(texts)
        dealt[name] = _deal([Labelled(text, rows[text]) for text in texts], SHARES[name])
    generator = random.Random(seed + 1)
    return {
        part: Part(
            dealt["snippets"][part],
            dealt["reviews"][part],
            [piece for review in dealt["reviews"][part] for piece in cut_review(review, generator)],
        )
        for part in ("train", "held_out", "classifier")
    }


def _deal(rows: list[Labelled], shares: dict[str, float]) -> dict[str, list[Labelled]]:
    ends = [round(len(rows) * end) for end in itertools.accumulate(shares.values())]
    return {part: rows[start:end] for part, start, end in zip(shares, [0, *ends], ends)}


def cut_review(review: Labelled, generator: random.Random) -> list[Labelled]:
    """Pieces of whole sentences, PIECE_WORDS long where the sentences allow it."""
    pieces, words, goal = [], [], generator.randint(*PIECE_WORDS)
    for word in review.text.split():
        words.append(word)
        if word in (".", "!", "?") and len(words) >= goal:
            if len(words) <= PIECE_LIMIT:
                pieces.append(Labelled(" ".join(words), review.label))
            words, goal = [], generator.randint(*PIECE_WORDS)
    return pieces


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, lower case; the data's spaces before punctuation are taken out and its stray double quotes
    dropped, so that raw and tidy text give the same ids. A text starts with a space, so that its first word is the same
    token as inside a sentence."""
    tokenizer = Tokenizer(models.BPE())
    closing = [normalizers.Replace(f" {mark}", mark) for mark in ",.;:!?)"]
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Lowercase(),
            normalizers.Replace('"', ""),
            normalizers.Replace(Regex(r"\s+"), " "),
            *closing,
            normalizers.Replace("( ", "("),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write JSONL (gzipped if the name says so)."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def lm_rows(part: Part) -> list[dict[str, str]]:
    """Plain text: every piece and every snippet."""
    return [{"text": row.text} for row in [*part.pieces, *part.snippets]]


def sft_rows(part: Part, seed: int) -> list[dict[str, str]]:
    """Snippets cut after one to five words: the opening is the prompt, the rest the response."""
    generator = random.Random(seed)
    rows = []
    for snippet in part.snippets:
        words = snippet.text.split()
        cut = generator.randint(1, 5)
        if len(words) >= cut + 3:
            rows.append({"prompt": " ".join(words[:cut]), "response": " " + " ".join(words[cut:])})
    return rows


OPENINGS = [
    "the film",
    "this film",
    "the movie",
    "this movie",
    "the story",
    "the plot",
    "the script",
    "the director",
    "the cast",
    "the acting",
    "the dialogue",
    "the ending",
    "the first half",
    "the second half",
    "the opening scene",
    "the camera",
    "the music",
    "the lead actor",
    "the lead actress",
    "the main character",
    "the performance",
    "the picture",
    "the comedy",
    "the drama",
    "the thriller",
    "the documentary",
    "the sequel",
    "the humor",
    "the romance",
    "the pacing",
]
VERBS = [
    "",
    " is",
    " has",
    " seems",
    " feels",
    " was",
    " makes",
    " takes",
    " never",
    " becomes",
    " turns out to be",
    " manages to",
]
OTHERS = [
    "it",
    "it's a",
    "it's an",
    "a film that",
    "a movie that",
    "i",
    "i think",
    "i felt",
    "we",
    "you",
    "you will",
    "as a",
    "as the",
    "for a",
    "for all its",
    "with its",
    "with a",
    "in the end ,",
    "by the end ,",
    "in this",
    "there is",
    "there are",
    "what",
    "if you",
    "if this",
    "when the",
    "while the",
    "although it",
    "despite the",
    "one of the",
    "like a",
    "watching this",
    "from start to finish ,",
    "at its best ,",
    "at times ,",
    "even the",
    "every scene",
    "some of the",
    "most of the",
    "the result is",
    "the result is a",
    "here is a",
    "this is",
    "this is a",
    "this is the",
    "not a",
    "an",
    "a",
    "so",
    "he",
    "she",
    "they",
    "his",
    "her",
    "their",
    "everyone in the",
    "audiences will",
    "fans of the",
    "director and cast",
    "two hours of",
    "ninety minutes of",
    "after an hour ,",
    "the film's",
    "the movie's",
    "the story's",
    "nothing in the",
]


HELD_OUT_OPENINGS = [
    "the screenplay",
    "the soundtrack",
    "the photography",
    "the finale",
    "the villain",
    "the hero",
    "the supporting cast",
    "the premise",
    "the setting",
    "the tone",
    "the editing",
    "the style",
    "the remake",
    "the adaptation",
    "the western",
    "the musical",
    "the satire",
    "the horror film",
    "the love story",
    "the mystery",
    "the narration",
    "the last act",
]


def held_out_prompt_rows() -> list[dict[str, str]]:
    """Openings on other subjects, which no training of the policy by reward sees; written for ppomax likewise."""
    return [{"prompt": opening + verb} for opening in HELD_OUT_OPENINGS for verb in VERBS]


def prompt_rows() -> list[dict[str, str]]:
    """Short openings without a verdict, written for ppomax; none is a row of the data."""
    return [{"prompt": text} for text in OTHERS + [opening + verb for opening in OPENINGS for verb in VERBS]]


def pair_rows(part: Part, seed: int, *, repeats: int = 4) -> list[dict[str, Any]]:
    """(positive, negative) texts to learn sentiment from: snippets, `repeats` times newly paired and a third of them
    cut short as an unfinished response is; half of the pieces; long runs of words of reviews, whose labels are sure."""
    generator = random.Random(seed)
    rows = [
        cut_pair(pair, generator.randint(5, 20)) if generator.random() < 1 / 3 else whole_pair(pair)
        for _ in range(repeats)
        for pair in matched(part.snippets, generator)
    ]
    rows += [whole_pair(pair) for pair in matched(generator.sample(part.pieces, len(part.pieces) // 2), generator)]
    for words, share in ((60, 1), (60, 1), (150, 1), (600, 0.25)):  # long ones are soon learned and cost most
        chosen = generator.sample(part.reviews, round(share * len(part.reviews)))
        windows = [Labelled(_window(review.text, words, generator), review.label) for review in chosen]
        rows += [cut_pair(pair, words) for pair in matched(windows, generator)]
    return rows


def matched(rows: list[Labelled], generator: random.Random) -> list[tuple[str, str]]:
    """(positive, negative) texts, each row once, in random order."""
    sides = [[row.text for row in rows if row.label == label] for label in (1, 0)]
    for side in sides:
        generator.shuffle(side)
    return list(zip(*sides))


def whole_pair(pair: tuple[str, str]) -> dict[str, Any]:
    """A row of load_pairs in which both texts are finished."""
    return {"chosen": pair[0], "rejected": pair[1]}


def cut_pair(pair: tuple[str, str], words: int) -> dict[str, Any]:
    """A row of load_pairs in which both texts stop after so many words, without EOS."""
    chosen, rejected = (" ".join(text.split()[:words]) for text in pair)
    return {"chosen": chosen, "rejected": rejected, "complete": False}


def _window(text: str, length: int, generator: random.Random) -> str:
    words = text.split()
    start = generator.randint(0, max(0, len(words) - length))
    return " ".join(words[start : start + length])


def eval_pair_sets(part: Part, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Held-out pairs by kind: finished snippets, their first 12 words, pieces (weak labels), whole reviews (their first
    600 words)."""
    generator = random.Random(seed)
    snippets = [pair for _ in range(4) for pair in matched(part.snippets, generator)]
    return {
        "snippets": [whole_pair(pair) for pair in snippets],
        "snippets_cut": [cut_pair(pair, 12) for pair in snippets],
        "pieces": [whole_pair(pair) for pair in matched(part.pieces, generator)],
        "reviews": [cut_pair(pair, 600) for pair in matched(part.reviews, generator)],
    }
