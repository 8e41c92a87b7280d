"""models.py: packed equals padded equals one by one; the head equals the model's logits; critics and reward models."""

import json

import pytest
import torch
import transformers
from ppomax.models import (
    Critic,
    RewardModel,
    check_head,
    freeze,
    head_of,
    load_policy,
    load_reward_model,
    load_tokenizer,
    make_critic,
    make_reward_model,
    packed_hidden,
)
from ppomax.recipe.batch import pack
from ppomax.saving.model_folder import save_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from .tiny_text import tiny_llama, tiny_tokenizer

CLOSE = 1e-5
SEQUENCES = [[5, 6, 7, 8, 9], [3], [4, 4, 9, 1, 0, 2, 11, 30, 31, 32, 7, 8], [2, 1]]
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": 4},
    "Gemma2": {"sliding_window": 4, "final_logit_softcapping": 2.0},
    "Gemma3Text": {"sliding_window": 4, "final_logit_softcapping": 3.0},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 3.0},
    "Phi": {},
    "GPT2": {},
    "GPTNeoX": {},
}


def family(name):
    """A tiny random model of the family, its weights far enough from the initial ones to matter."""
    config_class = getattr(transformers, f"{name}Config")
    special = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name == "GPT2":
        config = config_class(n_embd=32, n_layer=2, n_head=4, n_positions=64, **special)
    else:
        config = config_class(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            head_dim=8,
            **special,
            **FAMILIES[name],
        )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def error(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_padded_and_single_forwards_agree_and_the_head_gives_the_logits(name):
    model = load_policy(family(name))
    tokens, cu_seqlens = pack(SEQUENCES)
    outputs = [model(torch.tensor([s]), output_hidden_states=True) for s in SEQUENCES]
    alone = torch.cat([o.hidden_states[-1][0] for o in outputs])
    packed, padded = (packed_hidden(model, tokens, cu_seqlens, layout=layout) for layout in ("packed", "padded"))
    assert error(packed, padded) < CLOSE
    assert error(packed, alone) < CLOSE
    assert error(head_of(model).logits(packed), torch.cat([o.logits[0] for o in outputs])) < CLOSE


def test_gradients_agree_between_layouts():
    tokens, cu_seqlens = pack(SEQUENCES)
    gradients = []
    for layout in ("packed", "padded"):
        model = tiny_llama(50)
        head_of(model).logits(packed_hidden(model, tokens, cu_seqlens, layout=layout)).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[0].abs().max() > 0
    assert error(*gradients) < CLOSE


def test_a_head_that_is_not_linear_is_refused():
    model = tiny_llama(50)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output + output.square())
    with pytest.raises(ValueError, match="head_of does not know"):
        check_head(model)


@pytest.mark.parametrize(
    ("tokens", "cu_seqlens", "kind", "message"),
    [
        (torch.zeros(3), torch.tensor([0, 3], dtype=torch.int32), TypeError, "tokens must be int64"),
        (torch.zeros(3, dtype=torch.int64), torch.tensor([0, 3]), TypeError, "cu_seqlens must be int32"),
        (
            torch.zeros(1, 3, dtype=torch.int64),
            torch.tensor([0, 3], dtype=torch.int32),
            ValueError,
            "pack the sequences into one row",
        ),
        (
            torch.zeros(3, dtype=torch.int64),
            torch.tensor([0, 2], dtype=torch.int32),
            ValueError,
            "rise from 0 to N = 3",
        ),
        (torch.zeros(3, dtype=torch.int64), torch.tensor([0, 0, 3], dtype=torch.int32), ValueError, "shortest 0"),
        (
            torch.zeros(129, dtype=torch.int64),
            torch.tensor([0, 129], dtype=torch.int32),
            ValueError,
            "over the model's window of 128 tokens",
        ),
    ],
)
def test_malformed_batches_are_named(tokens, cu_seqlens, kind, message):
    with pytest.raises(kind, match=message):
        packed_hidden(tiny_llama(50), tokens, cu_seqlens)


def test_unknown_layout_is_refused():
    tokens, cu_seqlens = pack(SEQUENCES)
    with pytest.raises(ValueError, match="layout must be"):
        packed_hidden(tiny_llama(50), tokens, cu_seqlens, layout="ragged")


def test_dropout_is_off_after_loading():
    model = family("GPT2")
    assert any(m.p > 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    model = load_policy(model).train()
    tokens, cu_seqlens = pack(SEQUENCES)
    assert torch.equal(packed_hidden(model, tokens, cu_seqlens), packed_hidden(model, tokens, cu_seqlens))


def test_what_is_saved_has_the_dropout_that_came(tmp_path):
    policy = load_policy(family("GPT2"))
    assert policy.config.attn_pdrop == 0
    save_model(policy, None, tmp_path / "policy")
    save_model(make_reward_model(policy), None, tmp_path / "reward")
    for name in ("policy", "reward"):
        saved = json.loads((tmp_path / name / "config.json").read_text())
        assert (saved["attn_pdrop"], saved["resid_pdrop"]) == (0.1, 0.1)
    assert policy.config.attn_pdrop == 0


def test_the_pad_token_s_row_is_trained_too():
    """A tokenizer whose pad is its EOS would otherwise keep EOS from being learned as an input."""
    policy = tiny_llama(50, tied=False)
    assert policy.model.embed_tokens.padding_idx == 0
    policy = load_policy(policy)
    tokens, cu_seqlens = torch.tensor([1, 0, 3]), torch.tensor([0, 3], dtype=torch.int32)
    packed_hidden(policy, tokens, cu_seqlens).square().sum().backward()
    assert policy.model.embed_tokens.weight.grad[0].abs().sum() > 0


ROPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 16},
    "longrope": {"long_factor": [4.0, 3.0, 2.5, 8.0], "short_factor": [1.0, 1.1, 1.0, 1.2],
                 "original_max_position_embeddings": 16},
    "llama3": {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "proportional": {"factor": 2.0, "partial_rotary_factor": 0.5},
}  # fmt: skip


def rope_model(kind):
    torch.manual_seed(0)
    special = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(**special, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         max_position_embeddings=32,
                         rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]})  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.ndim == 2):
            weight.mul_(0.25 / weight.std())
    return model


def test_every_rope_of_transformers_is_probed():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(ROPE_INIT_FUNCTIONS) <= set(ROPES)


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("lengths", [(3, 9), (3, 15, 16), (4, 17), (20, 25), (5, 31, 40)])
def test_a_sequence_does_not_depend_on_its_neighbours_or_is_refused(kind, lengths):
    """Short, long and crossing ones, against each sequence alone in a fresh model."""
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(3, 50, (n,), generator=generator).tolist() for n in lengths]
    tokens, cu_seqlens = pack(sequences)
    window = 16 if kind == "longrope" else 32
    if max(lengths) > window:
        with pytest.raises(ValueError, match="over the model's window"):
            packed_hidden(rope_model(kind), tokens, cu_seqlens)
        return
    got = packed_hidden(rope_model(kind), tokens, cu_seqlens)
    for sequence, part in zip(sequences, got.split(list(lengths)), strict=True):
        alone = rope_model(kind).model(input_ids=torch.tensor([sequence]), use_cache=False).last_hidden_state[0]
        assert error(part, alone) < CLOSE


def test_reward_model_reads_the_last_token_and_critic_every_token():
    reward_model = make_reward_model(tiny_llama(50), seed=3)
    reward_model.model.config.score_offset = 0.25
    critic = make_critic(reward_model)
    tokens, cu_seqlens = pack(SEQUENCES)
    values, scores = critic(tokens, cu_seqlens), reward_model.scores(tokens, cu_seqlens)
    assert values.shape == tokens.shape
    assert values.dtype == torch.float32
    assert error(values[cu_seqlens[1:].long() - 1], scores) < CLOSE
    for i, sequence in enumerate(SEQUENCES):
        by_hf = reward_model.model(torch.tensor([sequence])).logits[0, 0] + 0.25
        assert error(scores[i], by_hf) < CLOSE


def test_critic_is_a_copy_of_the_reward_model():
    reward_model = freeze(make_reward_model(tiny_llama(50)))
    critic = make_critic(reward_model)
    assert all(p.requires_grad for p in critic.parameters())
    assert not any(p.requires_grad for p in reward_model.parameters())
    with torch.no_grad():
        critic.score.weight.add_(1)
    assert error(critic.score.weight, reward_model.score.weight) > CLOSE


def test_new_value_head_has_the_small_normal_start():
    policy = tiny_llama(50)
    critic = make_critic(policy, seed=1)
    width = policy.config.hidden_size
    assert torch.equal(make_critic(policy, seed=1).score.weight, critic.score.weight)
    assert not torch.equal(make_critic(policy, seed=2).score.weight, critic.score.weight)
    draws = torch.cat([make_critic(policy, seed=s).score.weight for s in range(20)]) * (width + 1)
    assert 0.9 < draws.std().item() < 1.1
    assert torch.equal(critic.model.base_model.embed_tokens.weight, policy.model.embed_tokens.weight)


def test_first_layers_of_the_policy_make_a_reward_model():
    policy = tiny_llama(50, layers=3)
    small = make_reward_model(policy, layers=1)
    assert small.model.config.num_hidden_layers == 1
    assert len(small.model.base_model.layers) == 1
    with pytest.raises(ValueError, match=r"layers must be in 1\.\.3"):
        make_reward_model(policy, layers=4)


def test_models_survive_saving_and_load_by_the_auto_classes(tmp_path):
    tokenizer = tiny_tokenizer()
    policy = tiny_llama()
    reward_model = make_reward_model(policy)
    reward_model.model.config.score_offset = -0.5
    tokens, cu_seqlens = pack(SEQUENCES)
    save_model(policy, tokenizer, tmp_path / "policy")
    save_model(reward_model, tokenizer, tmp_path / "reward")
    save_model(reward_model, tokenizer, tmp_path / "reward")  # replaces
    assert not list(tmp_path.glob("*.part"))
    assert torch.equal(
        packed_hidden(load_policy(tmp_path / "policy"), tokens, cu_seqlens), packed_hidden(policy, tokens, cu_seqlens)
    )
    assert torch.equal(
        load_reward_model(tmp_path / "reward").scores(tokens, cu_seqlens), reward_model.scores(tokens, cu_seqlens)
    )
    assert torch.equal(make_critic(tmp_path / "reward")(tokens, cu_seqlens), reward_model(tokens, cu_seqlens))
    assert isinstance(make_critic(tmp_path / "policy"), Critic)
    assert load_tokenizer(tmp_path / "reward").get_vocab() == tokenizer.get_vocab()
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert (
        error(plain(torch.tensor([SEQUENCES[0]])).logits[0, 0] - 0.5, reward_model.scores(tokens, cu_seqlens)[0])
        < CLOSE
    )


def test_wrong_models_and_paths_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model folder"):
        load_policy(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"neither config\.json"):
        load_policy(tmp_path / "empty")
    with pytest.raises(ValueError, match="no `score` head"):
        RewardModel(tiny_llama(50))
    config = tiny_llama().config
    config.num_labels = 2
    two = AutoModelForSequenceClassification.from_config(config)
    save_model(two, tiny_tokenizer(), tmp_path / "two")
    with pytest.raises(ValueError, match="num_labels = 2"):
        load_reward_model(tmp_path / "two")
