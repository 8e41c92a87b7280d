"""data.py and rows.py: every way in gives the same rows; bad rows are named or counted, never lost."""

import gzip
import json
import logging

import pytest
from ppomax.data import (
    DataError,
    check_same_vocabulary,
    check_tokenizer,
    end_ids,
    load_pairs,
    load_prompts,
    load_texts,
)
from ppomax.data.rows import read_rows
from ppomax.default.texts import train_tokenizer
from ppomax.models.checks import eos_ids_of
from transformers import PreTrainedTokenizerFast

from .tiny_text import CHAT_TEMPLATE, TEXTS, tiny_llama, tiny_tokenizer

BOS, EOS = 1, 2


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- formats --------------------------------------------------------------------------------------------------------


def test_all_formats_give_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    rows = [{"prompt": "the film", "n": 1}, {"prompt": "a café", "n": 2}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    sources = [tmp_path / name for name in ("a.jsonl", "a.json", "a.jsonl.gz", "a.parquet", "saved")] + [
        Dataset.from_list(rows),
        rows,
    ]
    for source in sources:
        assert [dict(row) for _, row in read_rows(source)] == rows, source


def test_rows_are_named_by_file_and_line(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    assert [where for where, _ in read_rows(path)] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r"bad\.jsonl:2: not JSON"),
        ("list.jsonl", b"3\n", r"list\.jsonl:1: a row must be an object"),
        ("deep.jsonl", b"[" * 50_000, r"deep\.jsonl:1: not JSON"),
        ("cut.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 999, mtime=0)[:-12], "cut short or damaged"),
        ("not.jsonl.gz", b"plain", "cut short or damaged"),
        ("latin.jsonl", '{"prompt": "é"}'.encode("latin-1"), "not UTF-8"),
        ("bad.parquet", b"PAR?", "not a readable Parquet file"),
        ("a.tsv", b"prompt\na\n", "cannot tell the format"),
    ],
)
def test_unreadable_files_are_named(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_prompts(tmp_path / name, tokenizer, 8)


def test_missing_file_is_named(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        load_prompts(tmp_path / "nowhere.jsonl", tokenizer, 8)


def test_folder_that_is_no_data_set_is_named(tmp_path, tokenizer):
    with pytest.raises(DataError, match="`datasets` cannot load"):
        load_prompts(tmp_path, tokenizer, 8)


# ---- prompts --------------------------------------------------------------------------------------------------------


def test_prompt_has_one_bos_and_no_eos(tokenizer):
    (ids,), counts = load_prompts([{"prompt": "the film is"}], tokenizer, 16)
    assert ids[0] == BOS
    assert ids.count(BOS) == 1
    assert EOS not in ids
    assert tokenizer.decode(ids[1:]) == " the film is"
    assert (counts.read, counts.kept) == (1, 1)


def test_chat_prompt_ends_where_the_assistant_begins():
    tokenizer = tiny_tokenizer(CHAT_TEMPLATE)
    (ids,), _ = load_prompts([{"prompt": [{"role": "user", "content": "the film"}]}], tokenizer, 64)
    assert tokenizer.decode(ids).strip() == "<user>the film</s> <assistant>"


def test_chat_without_template_is_refused(tokenizer):
    with pytest.raises(DataError, match="chats need a chat template"):
        load_prompts([{"prompt": [{"role": "user", "content": "a"}]}], tokenizer, 64)


@pytest.mark.parametrize("empty", ["", "  \n", []])
def test_empty_prompt_is_an_error_or_is_counted(tokenizer, empty, caplog):
    with pytest.raises(DataError, match="list:2: empty prompt"):
        load_prompts([{"prompt": "a"}, {"prompt": empty}], tokenizer, 8)
    with caplog.at_level(logging.WARNING):
        prompts, counts = load_prompts([{"prompt": "a"}, {"prompt": empty}], tokenizer, 8, bad_rows="drop")
    assert len(prompts) == 1
    assert counts.reasons == {"empty prompt": 1}
    assert "read 2 rows, kept 1 (empty prompt 1)" in caplog.text


def test_overlong_prompt_error_truncate_drop(tokenizer):
    rows = [{"prompt": "a"}, {"prompt": "the film is a warm and funny story"}]
    with pytest.raises(DataError, match=r"list:2: prompt over the limit; it has \d+ tokens, the limit is 4"):
        load_prompts(rows, tokenizer, 4, bad_rows="drop")
    whole = tokenizer(rows[1]["prompt"])["input_ids"]
    prompts, counts = load_prompts(rows, tokenizer, 4, overlong="truncate")
    assert prompts[1] == [BOS, *whole[-3:]]
    assert counts.reasons == {"truncated prompt": 1}
    prompts, counts = load_prompts(rows, tokenizer, 4, overlong="drop")
    assert len(prompts) == 1
    assert counts.reasons == {"prompt over the limit": 1}


def test_missing_column_and_no_rows_are_errors(tokenizer):
    with pytest.raises(DataError, match=r"list:1: column 'prompt' is missing; the row has \['question'\]"):
        load_prompts([{"question": "a"}], tokenizer, 8, bad_rows="drop")
    with pytest.raises(DataError, match="no usable row among 0"):
        load_prompts([], tokenizer, 8)


# ---- pairs ----------------------------------------------------------------------------------------------------------


def test_pair_layouts_agree():
    """The same preference as strings with a prompt, as chats, as chats without their prompt, and mixed."""
    tokenizer = tiny_tokenizer(CHAT_TEMPLATE)
    user = [{"role": "user", "content": "the film"}]
    good, bad = ([{"role": "assistant", "content": text}] for text in ("is good", "is bad"))
    rows = [
        {"chosen": user + good, "rejected": user + bad},
        {"prompt": user, "chosen": good, "rejected": bad},
        {"prompt": user, "chosen": "is good", "rejected": "is bad"},
        {"prompt": "<user>the film</s>\n<assistant>", "chosen": "is good", "rejected": "is bad"},
    ]
    pairs, _ = load_pairs(rows, tokenizer, 64)
    assert pairs[0] == pairs[1] == pairs[2]
    assert pairs[3].chosen == pairs[0].chosen
    assert pairs[3].prompt == [
        BOS,
        *pairs[0].prompt,
    ]  # a template says itself whether there is a BOS; a string gets the tokenizer's
    assert tokenizer.decode(pairs[0].chosen).strip() == "is good</s>"


def test_hh_rlhf_dialogues_are_cut_at_the_last_assistant_turn(tokenizer):
    start = "\n\nHuman: the film\n\nAssistant: is good\n\nHuman: why\n\nAssistant:"
    row = {"chosen": start + " a warm story", "rejected": start + " a bad script"}
    (pair,), _ = load_pairs([row], tokenizer, 256)
    assert pair.prompt == tokenizer(start)["input_ids"]
    assert tokenizer.decode(pair.chosen) == " a warm story</s>"
    assert tokenizer.decode(pair.rejected) == " a bad script</s>"


def test_whole_texts_compare_after_bos_alone_and_cut_ones_have_no_eos(tokenizer):
    rows = [
        {"chosen": "a good cast", "rejected": "a bad cast", "margin": 0.5},
        {"chosen": "a good cast", "rejected": "a bad cast", "complete": False},
    ]
    (whole, cut), _ = load_pairs(rows, tokenizer, 32)
    assert whole.prompt == [BOS]
    assert whole.margin == 0.5
    assert whole.chosen == [*cut.chosen, EOS]
    assert whole.rejected == [*cut.rejected, EOS]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "a", "rejected": "a"}, "equal sides"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty prompt"),
        ({"chosen": "a", "rejected": ""}, "empty rejected"),
        ({"chosen": "a", "rejected": None}, "column 'rejected' is null"),
        ({"chosen": "a", "rejected": 3}, "`rejected` is int"),
        ({"chosen": "the film " * 20, "rejected": "a"}, "pair over the limit"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}, "prompts differ"),
        ({"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: d"}, "empty response"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "rejected": "\n\nHuman: a\n\nAssistant: d"},
            "dialogue does not end with the assistant",
        ),
    ],
)
def test_bad_pairs_are_errors_or_counted(tokenizer, row, reason):
    good = {"chosen": "a good cast", "rejected": "a bad cast"}
    with pytest.raises(DataError, match=f"list:2: {reason}"):
        load_pairs([good, row], tokenizer, 24)
    pairs, counts = load_pairs([good, row], tokenizer, 24, bad_rows="drop")
    assert len(pairs) == 1
    assert counts.reasons == {reason: 1}


def test_sides_that_tokenise_alike_are_equal(tokenizer):
    with pytest.raises(DataError, match="equal sides"):
        load_pairs([{"chosen": "a Film .", "rejected": "a film."}], tokenizer, 24)


@pytest.mark.parametrize(
    ("side", "reason"),
    [
        ([{"role": "user", "content": "a"}], "chat does not end with the assistant"),
        ([{"role": "assistant", "text": "a"}], "malformed chat"),
    ],
)
def test_bad_chats_are_named(side, reason):
    good = [{"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match=reason):
        load_pairs([{"chosen": side, "rejected": good}], tiny_tokenizer(CHAT_TEMPLATE), 64)


# ---- texts ----------------------------------------------------------------------------------------------------------


def test_text_and_prompt_response_share_one_format(tokenizer):
    rows = [{"text": "the film is good"}, {"prompt": "the film", "response": " is good"}]
    (plain, masked), _ = load_texts(rows, tokenizer, 32)
    assert plain.tokens == masked.tokens
    assert plain.loss_from == 1
    assert masked.loss_from == len(tokenizer("the film")["input_ids"])
    assert plain.tokens[0] == BOS
    assert plain.tokens[-1] == EOS
    (_, unmasked), _ = load_texts(rows, tokenizer, 32, mask_prompt=False)
    assert unmasked.loss_from == 1


def test_chat_text_trains_on_the_last_turn():
    tokenizer = tiny_tokenizer(CHAT_TEMPLATE)
    messages = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "is good"}]
    (text,), _ = load_texts([{"messages": messages}], tokenizer, 64)
    assert tokenizer.decode(text.tokens[text.loss_from :]).strip() == "is good</s>"


def test_overlong_text_error_split_truncate_drop(tokenizer):
    rows = [{"text": "the film is a warm and funny story"}, {"text": "a"}]
    whole = load_texts(rows, tokenizer, 99)[0][0].tokens
    with pytest.raises(DataError, match="list:1: text over the limit"):
        load_texts(rows, tokenizer, 5)
    pieces, counts = load_texts(rows, tokenizer, 5, overlong="split")
    assert [whole[0], *(token for piece in pieces[:-1] for token in piece.tokens[piece.loss_from :])] == whole
    assert all(len(piece.tokens) <= 5 for piece in pieces)
    assert counts.reasons == {"split text": 1}
    cut, counts = load_texts(rows, tokenizer, 5, overlong="truncate")
    assert cut[0].tokens == whole[:5]
    assert counts.reasons == {"truncated text": 1}
    kept, counts = load_texts(rows, tokenizer, 5, overlong="drop")
    assert len(kept) == 1
    assert counts.reasons == {"text over the limit": 1}


def test_row_without_text_columns_is_an_error(tokenizer):
    with pytest.raises(DataError, match="needs `text`, `prompt`"):
        load_texts([{"review": "a"}], tokenizer, 8, bad_rows="drop")


# ---- tokenizers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "special",
    [
        {"eos_token": "</s>"},
        {"eos_token": "</s>", "pad_token": "</s>"},
    ],
)
def test_a_pad_token_is_not_needed_since_nothing_pads(special):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer, **special)
    assert load_prompts([{"prompt": "a"}], tokenizer, 8)[0] == load_prompts([{"prompt": "a"}], tiny_tokenizer(), 8)[0]


def test_a_tokenizer_without_an_end_is_refused_with_the_mend():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer, pad_token="<pad>")
    with pytest.raises(DataError, match="no EOS token"):
        check_tokenizer(tokenizer)
    with pytest.raises(DataError, match="no EOS token"):
        load_prompts([{"prompt": "a"}], tokenizer, 8)


def test_different_vocabularies_are_refused(tokenizer):
    check_same_vocabulary(tokenizer, tiny_tokenizer())
    with pytest.raises(DataError, match="different vocabularies"):
        check_same_vocabulary(tokenizer, train_tokenizer(TEXTS, 300))


# ---- data means what its author meant -------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER = {"role": "user", "content": "the film"}


def said(text):
    return {"role": "assistant", "content": text}


def byte_level(special, template=None, bos=None, **names):
    """Every string has its tokens, without loss; `bos` is added to plain strings."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    if bos:
        pairs = [(bos, made.token_to_id(bos))]
        made.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=pairs)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, **names)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def chatml():
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return byte_level(special, CHATML, eos_token="<|endoftext|>")


def test_a_rendered_prompt_gets_no_second_bos():
    template = "{{bos_token}}{% for m in messages %}<|h|>{{m['role']}}{{m['content']}}<|eot|>{% endfor %}"
    tokenizer = byte_level(["<|bos|>", "<|h|>", "<|eot|>"], template, bos="<|bos|>", eos_token="<|eot|>")
    rendered = tokenizer.apply_chat_template([USER], tokenize=False)
    (ids,), _ = load_prompts([{"prompt": rendered}], tokenizer, 64)
    assert ids.count(tokenizer.bos_token_id) == 1
    (chat,), _ = load_prompts([{"prompt": [USER]}], tokenizer, 64)
    assert ids == chat[: len(ids)]


def test_a_shared_turn_comes_once(chatml):
    (want,), _ = load_pairs([{"chosen": [USER, said("good")], "rejected": [USER, said("bad")]}], chatml, 99)
    whole = {"prompt": [USER], "chosen": [USER, said("good")], "rejected": [USER, said("bad")]}
    rest = {"prompt": [USER], "chosen": [said("good")], "rejected": [said("bad")]}
    for row in (whole, rest):
        assert load_pairs([row], chatml, 99)[0] == [want]
    other = {"role": "user", "content": "another"}
    with pytest.raises(DataError, match="list:1: prompt and dialogue do not join"):
        load_pairs([{**whole, "prompt": [other]}], chatml, 99)


def test_a_turn_ends_with_the_token_that_the_template_closes_it_with(chatml):
    """So that reward data, SFT data and the policy see the same end; here EOS is another token."""
    close = chatml.convert_tokens_to_ids("<|im_end|>")
    assert end_ids(chatml) == {chatml.eos_token_id, close}
    (text,), _ = load_texts([{"messages": [USER, said("good")]}], chatml, 99)
    assert text.tokens[-1] == close
    assert chatml.eos_token_id not in text.tokens
    assert end_ids(byte_level(["<pad>", "</s>"], eos_token="</s>")) == {1}
    plain = byte_level(["</s>"], "{% for m in messages %}{{m['content']}}\n{% endfor %}", eos_token="</s>")
    (text,), _ = load_texts([{"messages": [USER, said("good")]}], plain, 99)
    assert text.tokens[-1] == plain.eos_token_id == 0


def test_responses_stop_at_the_union_of_what_model_and_data_end_with(chatml, caplog):
    model = tiny_llama(320)
    model.generation_config.eos_token_id = [5, 6]
    with caplog.at_level(logging.INFO):
        assert eos_ids_of(model, chatml) == sorted({5, 6} | end_ids(chatml))
    assert "does not name" in caplog.text
    model.generation_config.eos_token_id = sorted(end_ids(chatml))
    caplog.clear()
    assert eos_ids_of(model, chatml) == sorted(end_ids(chatml))
    assert not caplog.text


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"prompt": "a", "response": "the <s>old</s> film sat"}], "text after the end token"),
        ([{"text": "a</s>b"}], "text after the end token"),
        ([{"prompt": "a", "response": "x\ud800"}], "cannot be tokenised"),
        ([{"messages": []}], "empty chat"),
        ([{"messages": "hello"}], "malformed chat"),
        ([{"messages": [USER, "x"]}], "malformed chat"),
        ([{"messages": [said("x")]}], "chat without a prompt"),
        ([{"messages": [USER, said(" ")]}], "empty response"),
        ([{"messages": [USER, USER]}], "chat does not end with the assistant"),
        ([{"messages": [{"role": "judge", "content": "x"}, said("y")]}], "the chat template refuses it"),
        ([{"text": "a", "complete": "no"}], "`complete` is no truth value"),
    ],
)
def test_rows_that_cannot_mean_what_they_say_are_named_and_counted(rows, reason):
    template = "{% if messages[0].role == 'judge' %}{{ raise_exception('who?') }}{% endif %}" + CHAT_TEMPLATE
    tokenizer = byte_level(["<pad>", "<s>", "</s>"], template, eos_token="</s>")
    with pytest.raises(DataError, match=f"list:1: {reason}"):
        load_texts(rows, tokenizer, 99)
    good = {"text": "the film"}
    texts, counts = load_texts([*rows, good], tokenizer, 99, bad_rows="drop")
    assert len(texts) == 1
    assert counts.reasons == {reason: 1}


@pytest.mark.parametrize("margin", ["NaN", "Infinity", '"much"', "true", "[1]"])
def test_a_margin_is_a_finite_number(tmp_path, tokenizer, margin):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "good", "rejected": "bad", "margin": ' + margin + "}\n")
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: `margin` is no finite number"):
        load_pairs(path, tokenizer, 99)


def test_a_null_column_is_absent(tokenizer):
    row = {"prompt": "a", "chosen": "good", "rejected": "bad"}
    nulls = dict.fromkeys(("margin", "complete", "note"))
    assert load_pairs([{**row, **nulls}], tokenizer, 99)[0] == load_pairs([row], tokenizer, 99)[0]
    assert (
        load_texts([{"text": "good", "messages": None}], tokenizer, 99)[0]
        == load_texts([{"text": "good"}], tokenizer, 99)[0]
    )
    with pytest.raises(DataError, match="list:1: column 'prompt' is null"):
        load_prompts([{"prompt": None}], tokenizer, 9)
