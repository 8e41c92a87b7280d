"""A causal LM with its loss fused against the same one as it comes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from ppomax.integrations import IntegrationError
from ppomax.integrations.transformers import fuse_loss
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    PreTrainedModel,
    Qwen2Config,
    Trainer,
    TrainingArguments,
    set_seed,
)

from tests.engine.tiny import tiny_policy

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
                         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
CONFIGS = {
    "qwen2, tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "gemma2, softcap": Gemma2Config(**SIZES, final_logit_softcapping=5.0),
    "cohere, scaled": CohereConfig(**SIZES, logit_scale=0.25),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
}


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(3)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def rows(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (4, 12), generator=g)
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1, 7:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("count", [None, 17, torch.tensor(17)], ids=["mean", "int", "tensor"])
def test_loss_and_gradients_are_the_model_s_own(name: str, count: Any) -> None:
    plain, fused = model_of(name), fuse_loss(model_of(name))
    found = []
    for model in (plain, fused):
        out = model(**rows(), num_items_in_batch=count)
        out.loss.backward()
        found.append([out.loss, *(p.grad for p in model.parameters())])
    assert out.logits is None
    for got, want in zip(*reversed(found), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_trainer_trains_as_before(tmp_path: Path) -> None:
    """With accumulation, whose loss is divided by the labels of all its parts."""
    data = Dataset.from_list([{k: v[i].tolist() for k, v in rows(s).items()} for s in range(4) for i in range(4)])
    found = []
    for change in (lambda m: m, fuse_loss):
        set_seed(0)
        args = TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, max_steps=4, per_device_train_batch_size=2, logging_steps=1,
            gradient_accumulation_steps=2, learning_rate=1e-3, report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model=change(tiny_policy(1)), args=args, train_dataset=data, eval_dataset=data)
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        found.append((losses, trainer.evaluate()["eval_loss"], list(trainer.model.parameters())))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4)
    for p, q in zip(found[1][2], found[0][2], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_what_needs_logits_gets_them() -> None:
    model, given = fuse_loss(model_of("qwen2, tied")), rows()
    assert model(input_ids=given["input_ids"]).logits.shape == (4, 12, 64)
    cut = {**given, "labels": given["labels"][:, -3:]}
    assert model(**cut, logits_to_keep=3).logits.shape == (4, 3, 64)
    assert model.eval()(**given).logits.shape == (4, 12, 64)
    assert model.generate(given["input_ids"], max_new_tokens=2, do_sample=False).shape[1] == 14
    first, *_ = model.train()(**given, return_dict=False)
    torch.testing.assert_close(first, model(**given).loss)


def test_another_loss_is_refused() -> None:
    model = tiny_policy()
    model.loss_function = lambda logits, labels, **_: logits.sum()
    with pytest.raises(IntegrationError, match="has the loss <lambda>, where ForCausalLMLoss is known"):
        fuse_loss(model)
