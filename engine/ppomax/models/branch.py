"""The top of a causal LM run on stored hidden states, so that a frozen trunk is computed once for all who stand on it.

    trunk  = bottom_states(model, tokens, cu_seqlens, b)          (P, D), what enters block b
    hidden = Branch(model, b)(trunk, cu_seqlens)                  = packed_hidden(model, tokens, cu_seqlens)
With the blocks below b frozen, policy, reference and value branch differ above b alone: the rollout records what enters
block b while it decodes, and scoring and every epoch of the update run the top L-b blocks from there.

No family is named here. A branch is a shallow copy of the base model: a config of fewer layers, the upper blocks (the
very modules, or copies), and in the first one's place a stand-in that hands it the stored states, whatever the model
did to the embeddings before (scaling, learned positions). Masks, rotary tables and windows are the model's own code.
`check_branch` holds the result against the whole model. Left out on purpose: models that feed embeddings to upper
layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppomax.models.head import Head, head_of
from ppomax.models.packed import packed_forward, packed_hidden
from ppomax.models.score_head import Scale, draw_score_head
from ppomax.models.trunk import base_of, blocks_name, blocks_of, with_blocks

TOLERANCE = {torch.float32: 1e-4}
"""Of `check_branch`, relative to the largest hidden state; 5e-2 for 16-bit types, as in models.check_head."""


class Branch(nn.Module):
    """Blocks `layers`.. and final norm of a causal LM, run on the hidden states that enter block `layers`.

    Shares the model's modules; `Branch(...).copied()` owns copies. Embeddings are neither held nor run. `head` is the
    model's own (frozen in hydra mode, so policy and reference share it); None for a value branch."""

    def __init__(self, model: PreTrainedModel, layers: int):
        super().__init__()
        depth = len(blocks_of(model))
        if not 0 < layers < depth:
            raise ValueError(f"Branch: layers must be in 1..{depth - 1} (the model has {depth} blocks), got {layers}")
        self.layers = layers
        self.head: Head | None = head_of(model)
        self.base = _view(base_of(model), slice(layers, None))
        self.name = blocks_name(self.base)
        blocks = getattr(self.base, self.name)
        blocks[0] = _Entry(blocks[0])

    def forward(self, trunk: Tensor, cu_seqlens: Tensor, *, layout: str = "auto") -> Tensor:
        """trunk (N, D) and cu_seqlens (S+1,) as in packed_hidden -> hidden (N, D), what the head sees."""
        return packed_forward(self._run, trunk, cu_seqlens, self.base.config, layout=layout)

    def _run(self, states: Tensor, **positions: Any) -> Tensor:
        entry = getattr(self.base, self.name)[0]
        entry.states = states
        try:
            out = self.base(inputs_embeds=states, use_cache=False, **positions)
        finally:
            entry.states = None
        return out.last_hidden_state  # type: ignore[no-any-return]

    def copied(self) -> Branch:
        """A branch with weights of its own, and the same head."""
        head, self.head = self.head, None
        try:
            twin = copy.deepcopy(self)
        finally:
            self.head = head
        twin.head = head
        return twin

    @property
    def blocks(self) -> list[nn.Module]:
        """The upper blocks, without the stand-in."""
        first, *rest = getattr(self.base, self.name)
        return [first.block, *rest]


@torch.no_grad()
def bottom_states(model: PreTrainedModel, tokens: Tensor, cu_seqlens: Tensor, layers: int) -> Tensor:
    """The hidden state that enters block `layers` at every token (N, D): the blocks below it run, no other."""
    base = _view(base_of(model), slice(0, layers + 1))
    blocks = getattr(base, blocks_name(base))
    tap = blocks[-1] = _Tap(blocks[-1])

    def run(ids: Tensor, **positions: Any) -> Tensor:
        base(input_ids=ids, use_cache=False, **positions)
        return tap.states  # type: ignore[return-value]

    return packed_forward(run, tokens, cu_seqlens, base.config)


def train_top(model: PreTrainedModel, layers: int) -> None:
    """Freeze all but blocks `layers`.. and what the base model applies after them (the final norm).

    That is told from what it applies before them (an embedding's norm) by asking what a branch depends on."""
    base = base_of(model)
    name = blocks_name(base)
    tokens, cu_seqlens = _probe(model)
    trunk = bottom_states(model, tokens, cu_seqlens, layers)
    rest = [p for child, m in base.named_children() if child != name for p in m.parameters()]
    with torch.enable_grad():
        hidden = Branch(model.requires_grad_(True), layers)(trunk, cu_seqlens)
        gradients = torch.autograd.grad(hidden.sum(), rest, allow_unused=True)
    model.requires_grad_(False)
    getattr(base, name)[layers:].requires_grad_(True)
    for p, gradient in zip(rest, gradients, strict=True):
        p.requires_grad_(gradient is not None)


def _probe(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Six tokens in two sequences."""
    tokens = torch.arange(6, device=model.device) % head_of(model).weight.shape[0]
    return tokens, torch.tensor([0, 2, 6], dtype=torch.int32, device=model.device)


@torch.no_grad()
def check_branch(model: PreTrainedModel, layers: int) -> None:
    """ValueError if a branch of `model` on its own trunk states does not give the model's hidden states."""
    tokens, cu_seqlens = _probe(model)
    want = packed_hidden(model, tokens, cu_seqlens).float()
    got = Branch(model, layers)(bottom_states(model, tokens, cu_seqlens, layers), cu_seqlens).float()
    tolerance = TOLERANCE.get(model.dtype, 5e-2) * max(1.0, want.abs().max().item())
    if not (got - want).abs().max().item() <= tolerance:
        raise ValueError(
            f"{type(model).__name__}: its top blocks, run on what enters block {layers}, do not give its hidden "
            "states (its upper layers read more than the layer below); use model.train: full or lora"
        )


def with_top_of(model: PreTrainedModel, branch: Branch) -> PreTrainedModel:
    """A whole causal LM that shares `model`'s trunk and head and has `branch`'s blocks and norm on top."""
    whole = _shallow(model)
    base = base_of(model)
    top = _shallow(base)
    name = blocks_name(base)
    top._modules.update({n: m for n, m in branch.base._modules.items() if not isinstance(m, _NoEmbedding)})
    top._modules[name] = nn.ModuleList([*getattr(base, name)[: branch.layers], *branch.blocks])
    outer = model.base_model
    if outer is not base:  # it hands all to a decoder
        shell = _shallow(outer)  # type: ignore[arg-type]
        shell._modules.update({n: top for n, m in outer.named_children() if m is base})
        top = shell
    whole._modules[model.base_model_prefix] = top
    return whole


# ---- value branch ---------------------------------------------------------------------------------------------------


class TrunkCritic(nn.Module):
    """A scalar at every trunk state: values = gain * (score head in fp32)(branch(trunk)) + shift, as in Critic.

    Starts as a copy of the policy's top blocks with a new head (score_head.py)."""

    raw = False

    def __init__(self, policy: PreTrainedModel, layers: int, *, seed: int = 0):
        super().__init__()
        self.branch = Branch(policy, layers).copied()
        self.branch.head = None
        width = head_of(policy).weight.shape[1]
        self.score = nn.Linear(width, 1, bias=False, device=policy.device, dtype=policy.dtype)
        draw_score_head(self.score.weight, seed)
        self.scale = Scale()

    def values_of(self, hidden: Tensor) -> Tensor:
        """hidden (N, D) -> values (N,) fp32."""
        return self.scale.of(nn.functional.linear(hidden.float(), self.score.weight.float())[:, 0])


# ---- parts of a base model ------------------------------------------------------------------------------------------


def _shallow(module: PreTrainedModel) -> PreTrainedModel:
    """The same model under a second name: children and parameters are shared, and can be replaced in the copy alone."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _view(base: PreTrainedModel, part: slice) -> PreTrainedModel:
    """`base` with the blocks `part` alone. From block 0 on the embeddings are shared, else they are left out."""
    view, name = _shallow(base), blocks_name(base)
    view.config = with_blocks(base.config, part)
    view._modules[name] = nn.ModuleList(getattr(base, name)[part])
    if part.start:
        for child, module in base.named_children():
            if isinstance(module, nn.Embedding):
                view._modules[child] = _NoEmbedding(module.embedding_dim)
    return view


class _StandIn(nn.Module):
    """In a block's place; what it lacks itself (attention_type, layer_idx ...) it answers from that block."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        self.states: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


class _Entry(_StandIn):
    """Runs its block on `states` instead of what it is given, as an argument, so that a block that recomputes itself in
    the backward sees the same ones."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.block(self.states, *args, **kwargs)


class _Tap(_StandIn):
    """Keeps what would enter its block, which does not run."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.states = hidden
        return hidden


class _NoEmbedding(nn.Module):
    """Zeros in an embedding's place: models with learned positions look them up even when states are given."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, ids: Tensor, *args: Any, **named: Any) -> Tensor:
        return torch.zeros(*ids.shape, self.width, device=ids.device)
