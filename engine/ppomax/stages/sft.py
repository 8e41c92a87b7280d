"""Supervised fine-tuning and plain language modelling.

loss = mean over the batch's counted tokens of -log p(token | what is before it in its own sequence).
Rows: `text`, `prompt` + `response` or `messages` (see data.py); with mask_prompt the response's tokens alone count.
Batches are packed; the loss is one token mean over the batch, whatever the lengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import ppomax_kernels as K
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ppomax.assets import named_model
from ppomax.config.stages import SftConfig
from ppomax.data import Text, load_texts
from ppomax.models import Head, head_of, load_policy, load_tokenizer, packed_hidden
from ppomax.models.adapters import add_adapters
from ppomax.models.checks import eos_ids_of
from ppomax.models.fingerprints import fingerprint_rows
from ppomax.models.recompute import recompute_blocks
from ppomax.recipe.batch import pack
from ppomax.saving.export_policy import export_model
from ppomax.sharding import ranks
from ppomax.stages.supervised_loop import Metrics, Task, claimed_run, own_chunks, placed, run_loop, sharded_read


def autocast(enabled: bool, device: torch.device) -> AbstractContextManager[None]:
    """bfloat16 autocast on the device, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def token_nll(
    head: Head, hidden: Tensor, tokens: Tensor, counted: Tensor, *, normalizer: float | None = None, impl: str = "auto"
) -> Tensor:
    """-sum(log p(tokens[counted])) / normalizer (None: their number), each token read from the hidden state before it.

    hidden (N, D) of the packed batch, tokens (N,), counted (C,) positions; no (C, V) logits are held. 0-d fp32.
    """
    # The head's scale comes before its softcap, a kernel's temperature after it; on hidden and bias it is exact.
    bias = head.bias if head.bias is None else head.bias * head.scale
    states = hidden.index_select(0, counted - 1) * head.scale
    labels = tokens.index_select(0, counted)
    loss, _ = K.linear_nll(
        states, head.weight, labels, bias=bias, softcap=head.softcap, normalizer=normalizer, impl=impl
    )
    return loss


def counted_tokens(texts: Sequence[Text], device: torch.device) -> Tensor:
    """Packed positions of the tokens that count in the loss, (C,) int64."""
    positions: list[int] = []
    start = 0
    for text in texts:
        positions += range(start + text.loss_from, start + len(text.tokens))
        start += len(text.tokens)
    return torch.tensor(positions, dtype=torch.int64, device=device)


def counted_in(texts: Sequence[Text]) -> int:
    """How many tokens of these count in the loss."""
    return sum(len(text.tokens) - text.loss_from for text in texts)


def batch_nll(
    model: PreTrainedModel, texts: Sequence[Text], *, normalizer: float | None = None, impl: str = "auto"
) -> Tensor:
    """Token mean (or sum / normalizer) of the NLL of a batch of texts, in one packed forward."""
    tokens, cu_seqlens = pack([text.tokens for text in texts], model.device)
    hidden = packed_hidden(model, tokens, cu_seqlens)
    counted = counted_tokens(texts, model.device)
    return token_nll(head_of(model), hidden, tokens, counted, normalizer=normalizer, impl=impl)


@torch.no_grad()
def mean_nll(model: PreTrainedModel, texts: Sequence[Text], batch_tokens: int, *, impl: str = "auto") -> float:
    """Token mean of the NLL over all texts, in nats. Of several ranks, which all call, each reads its share."""
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for rows in own_chunks([len(text.tokens) for text in texts], batch_tokens):
        total += batch_nll(model, [texts[row] for row in rows], normalizer=1.0, impl=impl).double()
    return ranks.sum(total).item() / counted_in(texts)


def train_sft(config: SftConfig) -> Path:
    """Train, write metrics.jsonl and the model as a HF directory; returns that directory (`run.out`/policy). Every
    rank calls."""
    with claimed_run(config, "runs/sft") as (agreed, out):
        return _train(agreed, out)


def _train(config: SftConfig, out: Path) -> Path:
    start = named_model(config.model)
    tokenizer = load_tokenizer(config.tokenizer or start)

    def load(source: str) -> list[Text]:
        return load_texts(
            source,
            tokenizer,
            config.max_tokens,
            mask_prompt=config.mask_prompt,
            overlong=config.overlong,
            bad_rows=config.bad_rows,
        )[0]

    texts = load(config.data)
    held_out = load(config.eval_data) if config.eval_data else []
    model = placed(load_policy(start, getattr(torch, config.dtype), zero=sharded_read(config)), config)
    if config.train == "lora":
        add_adapters(model, config, seed=config.run.seed)
    if config.gradient_checkpointing:
        recompute_blocks(model)

    def loss_of(model: PreTrainedModel, rows: Sequence[int], batch: Sequence[int]) -> tuple[Tensor, Metrics]:
        own, count = [texts[row] for row in rows], counted_in([texts[row] for row in batch])
        with autocast(config.autocast, model.device):
            loss = batch_nll(model, own, normalizer=count, impl=config.impl)
        return loss, {"tokens": torch.tensor(float(counted_in(own)), device=loss.device)}

    def evaluate(model: PreTrainedModel) -> dict[str, float]:
        if not held_out:
            return {}
        with autocast(config.autocast, model.device):
            nll = mean_nll(model, held_out, config.micro_tokens, impl=config.impl)
        return {"eval_nll": nll, "eval_perplexity": math.exp(nll)}

    read = fingerprint_rows([text.loss_from, *text.tokens] for text in texts)
    task = Task([len(text.tokens) for text in texts], loss_of, evaluate, read)
    trained = run_loop(model, task, config, out)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = eos_ids_of(model, tokenizer)  # what was taught, so that it is stopped at
    return export_model(trained, tokenizer, out / "policy")
