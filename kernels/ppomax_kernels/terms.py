"""The arguments that ops share, in groups: from the public functions down to each back-end's launcher. torch's schemas
are made from these fields (library.py), so a field's name, type and place are written here alone."""

from typing import NamedTuple

from torch import Tensor


class LinearInputs(NamedTuple):
    """What the linear ops make logits of."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None


class PolicyTokens(NamedTuple):
    """What a policy loss knows of each token besides its log-probability; all of one shape."""

    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor | None
    is_weights: Tensor | None
    ref_logprobs: Tensor | None


class Divisor(NamedTuple):
    """What sums over tokens are divided by: the tensor if there is one, else the number, else (0) the tokens."""

    normalizer: Tensor | None
    norm_value: float


class PpoTerms(NamedTuple):
    """The numbers of a PPO loss; `normalizer` and `norm_value` as in Divisor, dual_clip 0 for none."""

    normalizer: Tensor | None
    norm_value: float
    clip_low: float
    clip_high: float
    dual_clip: float
    kl_coef: float
    estimator: str
    ent_coef: float


class Head(NamedTuple):
    """How logits are read: z = softcap * tanh(logits / softcap) / temperature, softcap 0 for none."""

    temperature: float
    softcap: float
    ignore_index: int


class Walk(NamedTuple):
    """How a linear op passes over its tokens."""

    kept: int
    """Rows that count; below 0: not known."""
    chunk: int
    """Tokens per GEMM; 0: the default."""
    invariant: bool
    """Every GEMM has one shape."""


class Need(NamedTuple):
    """Which gradients are made."""

    need_hidden: bool
    need_weight: bool
    need_bias: bool


class Upstream(NamedTuple):
    """Gradients of a row's log-probability and entropy; None: zero."""

    dlogprobs: Tensor | None
    dentropy: Tensor | None


class SavedRows(NamedTuple):
    """What a row's forward leaves for its backward."""

    lse: Tensor
    entropy: Tensor
