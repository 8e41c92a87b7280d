"""A reward model with a tokenizer of its own gets text, and scores it as it would score that text by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ppomax.cli import main
from ppomax.config import ConfigError, load_config
from ppomax.models import RewardModel
from ppomax.recipe.rewards import ModelReward
from ppomax.recipe.text_reward import TextModelReward
from ppomax.saving.jsonl import read_rows
from ppomax.saving.model_folder import save_model
from transformers import PreTrainedTokenizerFast

from tests.engine.tiny import BOS, EOS, VOCABULARY, prompts, small_config, tiny_assets, tiny_engine, tiny_reward
from tests.engine.tiny import tiny_tokenizer as tokenizer_of_policy
from tests.engine.tiny_text import CHAT_TEMPLATE


def turned_round() -> PreTrainedTokenizerFast:
    """The policy's words under other ids: the last word has the first word's, and so on."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = [*special, *(f"w{VOCABULARY + 3 - i}" for i in range(4, VOCABULARY))]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def same_in_other_ids() -> RewardModel:
    """The tiny reward model, its embedding rows moved to where the other tokenizer has the words."""
    model = tiny_reward()
    weight = model.model.get_input_embeddings().weight
    with torch.no_grad():
        weight[4:] = weight[4:].flip(0).clone()
    return model


def source(own: PreTrainedTokenizerFast, micro_tokens: int = 40) -> TextModelReward:
    return TextModelReward(same_in_other_ids(), "ref", tokenizer_of_policy(), own, micro_tokens)


@pytest.mark.parametrize("micro_tokens", [1, 40, 4096])
def test_scores_are_those_of_the_same_text_in_the_models_own_tokens(micro_tokens: int) -> None:
    engine = tiny_engine(small_config(rollout__max_new_tokens=6))
    roll = engine.rollout(prompts(9))
    # Words alone: special tokens that were sampled inside a response are no text.
    plain = torch.tensor([all(t > 3 or t == EOS for t in r) for _, r in roll.sequences()])
    assert int(plain.sum()) >= 3
    assert 0 < int(roll.finished[plain].sum()) < int(plain.sum())
    got, want = source(turned_round(), micro_tokens)(roll).total, ModelReward(tiny_reward(), "ref")(roll).total
    torch.testing.assert_close(got[plain], want[plain], rtol=1e-4, atol=1e-5)


def test_what_a_response_is_made_of() -> None:
    reader = source(turned_round())
    first, last = reader.own.convert_tokens_to_ids(["w4", "w63"])
    assert reader.encoded("w4", "w63 w4", True) == [BOS, first, last, first, EOS]
    assert reader.encoded("w4", "w63 w4", False) == [BOS, first, last, first]
    assert reader.encoded("w4", "w63 </s> w4", True) == [BOS, first, last, EOS]
    assert reader.encoded("w4", "", True) == [BOS, first, EOS]
    assert reader.encoded("", "", False) == [BOS]


def test_a_chat_template_of_its_own_is_used() -> None:
    own = turned_round()
    own.chat_template = CHAT_TEMPLATE
    reader = source(own)
    turns = [{"role": "user", "content": "w4 w5"}, {"role": "assistant", "content": "w6"}]
    rendered = own.apply_chat_template(turns, tokenize=False)
    ids = own(rendered, add_special_tokens=False)["input_ids"]
    given = reader.encoded("w4 w5", "w6", True)
    assert given == ids[: len(given)]
    assert len(ids) - len(given) <= 1
    assert given != source(turned_round()).encoded("w4 w5", "w6", True)


def test_a_critic_cannot_start_from_it() -> None:
    with pytest.raises(ConfigError, match=r"set model\.critic to policy"):
        load_config(overrides={"reward.tokenizer": "other"})


def test_a_run_trains_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_assets(tmp_path)
    save_model(same_in_other_ids(), turned_round(), tmp_path / "other")
    flags = ["--model.policy", "policy", "--model.reward_model", "other", "--data.prompts", "prompts.jsonl"]
    flags += [
        "--model.critic",
        "policy",
        "--run.steps",
        "2",
        "--batch.rollout_size",
        "8",
        "--batch.minibatch_size",
        "4",
    ]
    flags += ["--rollout.max_new_tokens", "6", "--ptx.coef", "0", "--monitor.tensorboard", "false", "--impl", "ref"]
    assert main(["train", *flags, "--out", "refused"]) == 2
    assert "set reward.tokenizer" in capsys.readouterr().err
    assert main(["train", *flags, "--out", "run", "--reward.tokenizer", "other"]) == 0
    assert [row["step"] for row in read_rows(Path("run/metrics.jsonl")) if row["step"]] == [1, 2]
