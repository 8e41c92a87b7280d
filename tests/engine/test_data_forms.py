"""A dialogue is the same ids in whatever form a data set writes it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from ppomax.data import DataError, load_pairs, load_prompts, load_texts
from ppomax.data.rows import read_rows

from .tiny_text import CHAT_TEMPLATE, tiny_tokenizer

CHAT = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "is good"}]
OTHER = [CHAT[0], {"role": "assistant", "content": "is bad"}]
SHARE = [{"from": "human", "value": "the film"}, {"from": "gpt", "value": "is good"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "film"}]}, CHAT[1]]
HH = "\n\nHuman: the film\n\nAssistant: is good"


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer(CHAT_TEMPLATE)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"conversations": SHARE},
        {"messages": PARTS},
        {"chosen": CHAT, "rejected": OTHER},
        {"chosen": CHAT[1:], "rejected": OTHER[1:], "prompt": CHAT[:1]},
        {"chosen": "is good", "rejected": "is bad", "prompt": CHAT[:1]},
        {"prompt": CHAT[:1], "response": "is good"},
    ],
)
def test_texts_and_prompts_of_each_form_are_one(row: dict[str, Any], tokenizer: Any) -> None:
    want, _ = load_texts([{"messages": CHAT}], tokenizer, 64)
    assert load_texts([row], tokenizer, 64)[0] == want
    prompts, _ = load_prompts([{"prompt": CHAT[:1]}], tokenizer, 64)
    assert load_prompts([row], tokenizer, 64)[0] == prompts


def test_hh_strings_are_cut_at_the_last_turn_of_the_assistant(tokenizer: Any) -> None:
    row = {"chosen": HH, "rejected": HH.replace("good", "bad")}
    (text,), _ = load_texts([row], tokenizer, 64)
    (prompt,), _ = load_prompts([row], tokenizer, 64)
    (pair,), _ = load_pairs([row], tokenizer, 64)
    assert text.tokens == pair.prompt + pair.chosen
    assert text.loss_from == len(pair.prompt)
    assert prompt == pair.prompt
    plain, _ = load_texts([{"text": "is good"}], tokenizer, 64)
    assert load_texts([{"chosen": "is good", "rejected": "is bad"}], tokenizer, 64)[0] == plain


def test_a_dialogue_that_ends_with_the_user_is_a_prompt_whole(tokenizer: Any) -> None:
    three = [*CHAT, {"role": "user", "content": "so"}]
    want, _ = load_prompts([{"prompt": three}], tokenizer, 64)
    assert load_prompts([{"messages": three}], tokenizer, 64)[0] == want


def test_pairs_of_content_parts(tokenizer: Any) -> None:
    want, _ = load_pairs([{"chosen": CHAT, "rejected": OTHER}], tokenizer, 64)
    assert load_pairs([{"chosen": PARTS, "rejected": OTHER}], tokenizer, 64)[0] == want


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "a turn is from 'narrator'; known are human"),
        ({"conversations": [{"role": "user", "content": "x"}]}, "`from` and `value`, both strings"),
        ({"conversations": "x"}, "`conversations` is a list of turns"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of a message is 'image_url'"),
        ({"chosen": 3}, "`response` is int|a text row needs|`chosen`"),
        ({"n": 1}, "column 'prompt' is missing|a text row needs"),
    ],
)
def test_what_is_no_dialogue_is_named(row: dict[str, Any], words: str, tokenizer: Any) -> None:
    for load in (load_texts, load_prompts):
        with pytest.raises(DataError, match=words if load is load_texts or "chosen" not in row else "missing"):
            load([row], tokenizer, 64)


def test_csv_and_a_mark_before_the_first_line(tmp_path: Path) -> None:
    rows = [{"prompt": 'the "film", twice\nover', "answer": "4"}, {"prompt": "a café", "answer": "5"}]
    for encoding in ("utf-8", "utf-8-sig"):
        with open(tmp_path / "a.csv", "w", encoding=encoding, newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "answer"])
            writer.writeheader()
            writer.writerows(rows)
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding=encoding)
        for name in ("a.csv", "a.jsonl"):
            assert [dict(row) for _, row in read_rows(tmp_path / name)] == rows
    (tmp_path / "a.csv").write_text("prompt,answer\nx,1\ny\n")
    with pytest.raises(DataError, match=r"a\.csv:3: the row has other columns than the first line \(\['prompt', 'ans"):
        list(read_rows(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_bytes(b"prompt\n\xff\n")
    with pytest.raises(DataError, match="not UTF-8"):
        list(read_rows(tmp_path / "a.csv"))


def test_a_data_sets_name_may_give_split_and_subset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, subset: str | None, split: str) -> list[dict[str, str]]:
        asked.append((name, subset, split))
        return [{"prompt": "x"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("a/b", "a/b:test", "a/b:main:test"):
        list(read_rows(name))
    assert asked == [("a/b", None, "train"), ("a/b", None, "test"), ("a/b", "main", "test")]
    for name in ("a/b:", "a/b:x:y:z", "nothing:test"):
        with pytest.raises(DataError, match=r"name:subset:split"):
            list(read_rows(name))
    saved = datasets.DatasetDict({"held": datasets.Dataset.from_list([{"prompt": "y"}])})
    saved.save_to_disk(str(tmp_path / "saved"))
    assert [dict(r) for _, r in read_rows(f"{tmp_path / 'saved'}:held")] == [{"prompt": "y"}]


def test_a_mixture_takes_each_row_as_often_as_its_weight_says(tmp_path: Path) -> None:
    for name, count in (("a", 2), ("b", 6)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{name}{i}"}) + "\n" for i in range(count))
        )
    found = [row["text"] for _, row in read_rows(f"2*{tmp_path}/a.jsonl + 0.5*{tmp_path}/b.jsonl")]
    assert found == ["a0", "a0", "a1", "a1", "b1", "b3", "b5"]
    assert [row["text"] for _, row in read_rows(f"{tmp_path}/a.jsonl + {tmp_path}/a.jsonl")] == ["a0", "a1"] * 2
    assert sum(1 for _ in read_rows(f"1.5*{tmp_path}/b.jsonl")) == 9


def test_columns_go_by_their_names_there(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text(json.dumps({"question": "the film", "answer": "is good"}) + "\n")
    (text,), _ = load_texts(f"{path}?prompt=question&response=answer", tokenizer, 64)
    (want,), _ = load_texts([{"prompt": "the film", "response": "is good"}], tokenizer, 64)
    assert text == want
    (mixed, _), _ = load_prompts(f"2*{path}?prompt=question", tokenizer, 64)
    assert mixed == text.tokens[: text.loss_from]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("0*{a}", "weight of '0.{a}' must be a number above 0"),
        ("1.2.3*{a}", "must be a number above 0"),
        ("{a} + {a}x", "x: no such file"),
        ("{a}?prompt", "as in .prompt=question"),
        ("{a}?prompt=query", "column 'query' is missing; the row has .'text'"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(source: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n')
    with pytest.raises(DataError, match=words.format(a=path)):
        list(read_rows(source.format(a=path)))
