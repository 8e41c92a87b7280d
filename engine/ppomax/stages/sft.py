"""Supervised fine-tuning and plain language modelling.

loss = mean over the batch's counted tokens of -log p(token | what is before it in its own sequence).
Rows: `text`, `prompt` + `response` or `messages` (see data.py); with mask_prompt the response's tokens alone count.
Batches are packed; the loss is one token mean over the batch, whatever the lengths.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import ppomax_kernels as K
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ppomax.assets import named_model
from ppomax.config.mapping import to_dict
from ppomax.config.stages import SftConfig
from ppomax.data import Text, load_texts
from ppomax.models import Head, head_of, load_policy, load_tokenizer, packed_hidden
from ppomax.models.checks import eos_ids_of
from ppomax.recipe.batch import pack
from ppomax.saving.lock import claimed
from ppomax.saving.model_folder import save_model
from ppomax.stages.supervised_loop import BatchOrder, chunks, run_loop

log = logging.getLogger(__name__)


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
    """Token mean of the NLL over all texts, in nats."""
    total = 0.0
    for rows in chunks([len(text.tokens) for text in texts], batch_tokens):
        total += batch_nll(model, [texts[row] for row in rows], normalizer=1.0, impl=impl).item()
    return total / sum(len(text.tokens) - text.loss_from for text in texts)


def train_sft(config: SftConfig) -> Path:
    """Train, write metrics.jsonl and the model as a HF directory; returns that directory (`run.out`/policy)."""
    out = Path(config.run.out or "runs/sft")
    with claimed(out, config):
        return _train(config, out)


def _train(config: SftConfig, out: Path) -> Path:
    start = named_model(config.model)
    identity = to_dict(config) | {"run": {"seed": config.run.seed}}
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
    model = load_policy(start, attn_implementation=config.attention)
    model.train()
    order = BatchOrder([len(text.tokens) for text in texts], config.batch_tokens, config.run.seed)
    log.info("%d texts, %d tokens, %d steps an epoch", len(texts), sum(len(text.tokens) for text in texts), len(order))

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        batch = [texts[row] for row in order.batch(step)]
        with autocast(config.autocast, model.device):
            loss = batch_nll(model, batch, impl=config.impl)
        return loss, {"tokens": sum(len(text.tokens) - text.loss_from for text in batch)}

    def evaluate() -> dict[str, float]:
        if not held_out:
            return {}
        with autocast(config.autocast, model.device):
            nll = mean_nll(model, held_out, config.batch_tokens, impl=config.impl)
        return {"eval_nll": nll, "eval_perplexity": math.exp(nll)}

    run_loop(model, loss_of, config.optim, config.run, out, identity, evaluate, eval_every=config.eval_every)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = eos_ids_of(model, tokenizer)  # what was taught, so that it is stopped at
    return save_model(model, tokenizer, out / "policy")
