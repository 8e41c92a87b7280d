"""The embedded default: its files, its held-out figures on labelled rows that it never saw, and how it is built."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ppomax.assets import FOLDER
from ppomax.assets.classifier import SentimentClassifier
from ppomax.data import check_same_vocabulary, check_tokenizer, load_pairs, load_prompts
from ppomax.default import texts as files
from ppomax.default.build import LIMIT_BYTES, BuildDefaultConfig, build_default, written_accuracy
from ppomax.default.classifier import train_classifier, with_written
from ppomax.models import load_policy, load_reward_model, load_tokenizer
from ppomax.stages.reward_model import evaluate_pairs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from .tiny_text import tiny_tokenizer

REVIEWS = Path(__file__).parents[3] / "shared" / "data" / "reviews"
SEED = BuildDefaultConfig(data="", out="").seed
BF16 = 2.0**-8
needs_reviews = pytest.mark.skipif(not REVIEWS.is_dir(), reason=f"no labelled reviews in {REVIEWS}")


@pytest.fixture(scope="module")
def assets():
    return FOLDER


@pytest.fixture(scope="module")
def parts():
    return files.read_parts(REVIEWS, SEED)


# ---- what ships -----------------------------------------------------------------------------------------------------


def test_assets_are_small_whole_and_plain(assets):
    found = [file for file in assets.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in found) <= LIMIT_BYTES
    assert {file.suffix for file in found} <= {".safetensors", ".json", ".jsonl", ".md", ".jinja"}
    for name in ("policy", "reward_model"):
        assert {x.dtype for x in load_file(assets / name / "model.safetensors").values()} == {torch.bfloat16}
    assert "CC BY 4.0" in (assets / "MODEL_CARD.md").read_text()


def test_assets_load_by_the_auto_classes_and_share_a_vocabulary(assets):
    policy = AutoModelForCausalLM.from_pretrained(assets / "policy")
    reward_model = AutoModelForSequenceClassification.from_pretrained(assets / "reward_model")
    tokenizer = load_tokenizer(assets / "policy")
    assert reward_model.config.num_labels == 1
    assert policy.config.vocab_size == reward_model.config.vocab_size == len(tokenizer)
    check_tokenizer(tokenizer)
    check_same_vocabulary(tokenizer, load_tokenizer(assets / "reward_model"))
    assert (policy.config.bos_token_id, policy.config.eos_token_id, policy.config.pad_token_id) == (
        tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)  # fmt: skip


def test_prompts_are_short_and_differ(assets):
    both = []
    for name in ("prompts", "held_out_prompts"):
        prompts, counts = load_prompts(assets / f"{name}.jsonl", load_tokenizer(assets / "policy"), 16)
        assert counts.kept == counts.read >= 256
        both += prompts
    assert len({tuple(prompt) for prompt in both}) == len(both)


def test_raw_and_tidy_text_give_the_same_tokens(assets):
    tokenizer = load_tokenizer(assets / "policy")
    raw = 'the " film " is ( almost ) good , not great .'
    tidy = "The film is (almost) good, not great."
    assert tokenizer(raw)["input_ids"] == tokenizer(tidy)["input_ids"]
    assert tokenizer.decode(tokenizer(raw)["input_ids"], skip_special_tokens=True).strip() == tidy.lower()


@needs_reviews
def test_no_row_of_the_data_ships(assets, parts):
    lines = [line for path in assets.glob("*prompts.jsonl") for line in path.read_text().splitlines()]
    shipped = {json.loads(line)["prompt"] for line in lines}
    rows = {row.text for part in parts.values() for row in [*part.snippets, *part.reviews]}
    assert not shipped & rows


@needs_reviews
def test_reward_model_ranks_labelled_rows_that_it_never_saw(assets, parts):
    tokenizer = load_tokenizer(assets / "policy")
    reward_model = load_reward_model(assets / "reward_model").eval()
    figures = json.loads((assets / "figures.json").read_text())["pairs"]
    sets = files.eval_pair_sets(parts["held_out"], SEED)
    pairs, _ = load_pairs(sets["snippets"][:479], tokenizer, 1024, bad_rows="drop")  # each snippet once
    accuracy = evaluate_pairs(reward_model, pairs)["accuracy"]
    assert accuracy >= 0.75
    assert accuracy == pytest.approx(figures["snippets"]["accuracy"], abs=0.05)


@needs_reviews
def test_judge_calls_held_out_snippets_right(assets, parts):
    judge = SentimentClassifier.load(assets / "classifier.json")
    rows = parts["held_out"].snippets
    right = sum((judge.logit(row.text) > 0) == bool(row.label) for row in rows) / len(rows)
    assert right >= 0.72
    assert right == pytest.approx(
        json.loads((assets / "figures.json").read_text())["judge_accuracy"]["snippets"], abs=1e-6
    )


# ---- how it is built ------------------------------------------------------------------------------------------------


@needs_reviews
def test_the_three_parts_share_no_row(parts):
    for kind in ("snippets", "reviews"):
        texts = [[row.text for row in getattr(part, kind)] for part in parts.values()]
        assert len({text for part in texts for text in part}) == sum(map(len, texts))
    again = files.read_parts(REVIEWS, SEED)
    assert again == parts


def fake_reviews(folder):
    """Labelled text with a sentiment that even a tiny model sees."""
    good, bad = ["warm", "funny", "moving", "bright", "clever"], ["dull", "slow", "bad", "long", "empty"]
    nouns = ["film", "cast", "plot", "script", "story", "music", "ending", "drama"]
    sentences = [
        (f"the {noun} is {a} and {b} , number {i} .", label)
        for label, words in ((1, good), (0, bad))
        for i, a in enumerate(words) for b in words for noun in nouns if a != b
    ]  # fmt: skip
    files.write_rows(folder / "snippets.jsonl.gz", [{"text": text, "label": label} for text, label in sentences])
    reviews = []
    for label in (1, 0):
        own = [text for text, kind in sentences if kind == label]
        reviews += [
            {"text": " ".join(own[i : i + 6]) + f" review {i} .", "label": label} for i in range(0, len(own), 6)
        ]
    files.write_rows(folder / "reviews.jsonl.gz", reviews)


def test_build_default_goes_through_all_stages_and_skips_what_is_done(tmp_path):
    fake_reviews(tmp_path)
    config = BuildDefaultConfig(
        data=str(tmp_path),
        out=str(tmp_path / "out"),
        threads=1,
        vocab_size=330,
        hidden_size=32,
        layers=2,
        reward_layers=1,
        lm_steps=6,
        sft_steps=4,
        reward_steps=30,
        samples=24,
        impl="ref",
    )
    out = build_default(config)
    figures = json.loads((out / "figures.json").read_text())
    assert figures["pairs"]["snippets"]["accuracy"] > 0.9
    assert abs(figures["samples"]["score_mean"]) < 10 * BF16
    assert figures["samples"]["score_std"] == pytest.approx(1, abs=10 * BF16)
    assert math.isfinite(figures["policy_nll"])
    card = (out / "MODEL_CARD.md").read_text()
    assert f"{figures['pairs']['snippets']['accuracy']:.3f}" in card
    assert "{" not in card
    load_policy(out / "policy")
    weights = (out / "policy" / "model.safetensors").read_bytes()
    metrics = tmp_path / "out" / "work" / "lm" / "metrics.jsonl"
    before = metrics.read_text()
    again = build_default(config)
    assert (again / "policy" / "model.safetensors").read_bytes() == weights
    assert metrics.read_text() == before


def test_pairs_put_the_positive_text_first_and_cut_both_sides_alike():
    part = files.Part([files.Labelled(f"good {i} a b c d e f g h", 1) for i in range(9)]
                      + [files.Labelled(f"bad {i} a b c d e f g h", 0) for i in range(9)], [], [])  # fmt: skip
    rows = files.pair_rows(part, 0)
    assert len(rows) == 4 * 9
    assert all(row["chosen"].startswith("good") and row["rejected"].startswith("bad") for row in rows)
    cut = [row for row in rows if not row.get("complete", True)]
    assert 0 < len(cut) < len(rows)
    assert all(len(row["chosen"].split()) == len(row["rejected"].split()) for row in cut)


def test_review_pieces_end_with_sentences_and_lose_no_word_but_long_ones():
    import random

    text = "one two three four five six seven eight nine ten . " * 9 + "word " * 60 + ". tail"
    pieces = files.cut_review(files.Labelled(text, 1), random.Random(0))
    assert all(piece.text.endswith(".") and len(piece.text.split()) <= files.PIECE_LIMIT for piece in pieces)
    assert text.startswith(" ".join(piece.text for piece in pieces))


# ---- the judge ------------------------------------------------------------------------------------------------------


def test_classifier_is_the_formula_of_its_head_note(tmp_path):
    texts = ["good film", "good good cast", "bad film", "a bad bad plot", "good !", "bad ?"]
    labels = [1, 1, 0, 0, 1, 0]
    judge = train_classifier(texts, labels, min_documents=1, strength=10.0)
    judge.save(tmp_path / "c.json")
    loaded = SentimentClassifier.load(tmp_path / "c.json")
    counts = {"good": 2, "cast": 1, "good good": 1, "good cast": 1}
    documents = {"good": 3, "cast": 1, "good good": 1, "good cast": 1}
    x = {t: (1 + math.log(n)) * (math.log(7 / (1 + documents[t])) + 1) for t, n in counts.items()}
    norm = math.sqrt(sum(v * v for v in x.values()))
    want = judge.bias + sum(v / norm * judge.terms[t][1] for t, v in x.items())
    assert judge.logit(texts[1]) == pytest.approx(want)
    assert loaded.logit(texts[1]) == pytest.approx(want, abs=1e-2)
    assert [judge.logit(text) > 0 for text in texts] == [bool(label) for label in labels]
    assert loaded.positive_share(texts) == 0.5
    assert judge.logit("unknown words") == judge.bias


WRECKED = [
    "the film is good good good good good good good good good good",
    "the story is lilyberg , otic ideas andness andations andness andness,ness andness andness",
    "a a a a a a a a a a a a",
]


def test_a_text_that_no_person_writes_loses_whatever_it_says(assets):
    judge = SentimentClassifier.load(assets / "classifier.json")
    assert all(judge.logit(text) > -1 for text in WRECKED)  # by its words alone the first is praise
    plain = ["the film is slow and far too long .", "a dull story with a weak ending and no heart at all ."]
    assert max(judge.score(text) for text in WRECKED) < min(judge.score(text) for text in plain)


def test_the_score_is_the_formula_of_its_head_note(tmp_path):
    texts = ["a good film", "a bad film", "the good cast", "the bad plot of the film"] * 10
    judge = with_written(train_classifier(texts, [1, 0, 1, 0] * 10, min_documents=1), texts)
    judge.save(tmp_path / "c.json")
    text = "good good film"
    shares = [1.0, 1 / 2, 2 / 3, 1.0, math.log(3)]
    pairs = {"good good": False, "good film": True}
    assert {p: p in judge.terms for p in pairs} == pairs
    z = [(x - m) / s for x, m, s in zip(shares, judge.written.means, judge.written.stds)]
    want = sum(w * x for w, x in zip(judge.written.weights, [*z, *(x * z[4] for x in z[:4]), 1.0]))
    assert judge.written_logit(text) == pytest.approx(want)
    score = sum(-math.log1p(math.exp(-x)) for x in (judge.logit(text), want))
    assert judge.score(text) == pytest.approx(score)
    assert SentimentClassifier.load(tmp_path / "c.json").score(text) == pytest.approx(score, abs=1e-2)
    assert replace(judge, written=None).score(text) == pytest.approx(-math.log1p(math.exp(-judge.logit(text))))


@needs_reviews
def test_the_judge_tells_people_s_texts_from_spoiled_ones(assets, parts):
    judge = SentimentClassifier.load(assets / "classifier.json")
    accuracy = written_accuracy(judge, [row.text for row in parts["held_out"].snippets])
    assert accuracy >= 0.8
    assert accuracy == pytest.approx(json.loads((assets / "figures.json").read_text())["judge_written"], abs=1e-6)


def test_classifier_is_at_the_minimum_of_its_loss():
    texts, labels = ["good film", "bad film", "good plot", "bad end", "fine film", "poor film"], [1, 0, 1, 0, 1, 0]
    judge = train_classifier(texts, labels, min_documents=1, strength=2.0)
    residual = [label - 1 / (1 + math.exp(-judge.logit(text))) for text, label in zip(texts, labels)]
    assert sum(residual) == pytest.approx(0, abs=1e-4)  # derivative by the bias


def test_default_tokenizer_has_three_special_tokens_apart():
    tokenizer = tiny_tokenizer()
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
