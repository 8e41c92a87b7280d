"""The `*ForSequenceClassification` of any family: transformers' own, or, where it has none, its generic one on the
family's base model, with a `score` head like all others."""

from __future__ import annotations

from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification


def auto_scorer(config: Any) -> Any:
    """AutoModelForSequenceClassification, which knows a class for `config` from here on. ValueError: transformers knows
    no causal language model of this kind either.

    A class that was made here has the name that transformers would give it; a folder saved from one is read by ppomax,
    and by transformers once it has such a class."""
    kind = type(config)
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or getattr(config, "auto_map", None):
        return AutoModelForSequenceClassification
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"transformers has neither a causal language model nor a sequence classifier for {kind.__name__}; give a "
            "critic or reward model of another architecture with the same tokenizer"
        )
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    family = next(c for c in causal.__mro__ if c.__name__.endswith("PreTrainedModel") and c is not PreTrainedModel)
    name = causal.__name__.replace("ForCausalLM", "").replace("LMHeadModel", "") + "ForSequenceClassification"
    own = {"base_model_prefix": causal.base_model_prefix, "config_class": kind, "__module__": family.__module__}
    made = type(name, (GenericForSequenceClassification, family), own)
    AutoModelForSequenceClassification.register(kind, made, exist_ok=True)
    return AutoModelForSequenceClassification
