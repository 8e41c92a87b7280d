"""A causal LM with a scalar head on its own hidden states, as TRL's older PPO has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppomax.integrations.trl.batch import plain
from ppomax.models import head_of, load_policy
from ppomax.models.files import model_folder, tensor_files
from ppomax.models.frozen_bits import nothing_fetched
from ppomax.saving.model_folder import save_model

VALUE_HEAD = "value_head.safetensors"


class ValueHead(nn.Module):
    """A linear layer named `summary`, in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.summary = nn.Linear(width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (...) float32."""
        return nn.functional.linear(hidden.float(), self.summary.weight.float(), self.summary.bias.float())[..., 0]


class AutoModelForCausalLMWithValueHead(nn.Module):
    """A causal LM, `pretrained_model`, and a scalar head on its last hidden states, `v_head`."""

    def __init__(self, pretrained_model: PreTrainedModel):
        super().__init__()
        self.pretrained_model = pretrained_model
        lm = plain(pretrained_model)
        weight = head_of(lm).weight
        self.v_head: ValueHead = ValueHead(weight.shape[1]).to(weight.device)
        self.config = lm.config

    @classmethod
    def from_pretrained(cls, source: Any, dtype: torch.dtype = torch.float32, peft_config: Any = None) -> Any:
        """From a path, a hub name or a model; the value head from value_head.safetensors, or from `v_head.` among the
        weights, where there is one. peft_config: trained are its adapters and the head alone."""
        lm: Any = load_policy(source, dtype)
        if peft_config is not None:
            with nothing_fetched():
                from peft import get_peft_model

            lm = get_peft_model(lm, peft_config)
        model = cls(lm)
        if isinstance(source, (str, Path)):
            model.v_head.load_state_dict(_saved_head(model_folder(source)) or model.v_head.state_dict())
        return model

    def save_pretrained(self, folder: str | Path, tokenizer: Any = None) -> None:
        """A HF folder, which AutoModelForCausalLM loads too, with value_head.safetensors in it; of a PEFT model the
        adapters."""
        if plain(self.pretrained_model) is self.pretrained_model:
            save_model(self.pretrained_model, tokenizer, Path(folder))
        else:
            self.pretrained_model.save_pretrained(folder)
        head = {f"v_head.{n}": x.detach().cpu().contiguous() for n, x in self.v_head.state_dict().items()}
        save_file(head, Path(folder) / VALUE_HEAD)

    def forward(self, input_ids: Any = None, attention_mask: Any = None, learn: Any = None, **named: Any) -> Any:
        """(logits, loss, values) as TRL's. learn: a function of this model whose result is given instead: inside a
        forward, so that DDP sees it."""
        if learn is not None:
            return learn(self)
        out = self.pretrained_model(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, **named
        )
        return out.logits, getattr(out, "loss", None), self.v_head(out.hidden_states[-1])

    def generate(self, *args: Any, **named: Any) -> Any:
        """Of the language model: transformers' own."""
        lm: Any = self.pretrained_model
        return lm.generate(*args, **named)


def _saved_head(folder: Path) -> dict[str, Tensor]:
    """Weights of a value head that lies in `folder`, by their names in it; {}: there is none."""
    found: dict[str, tuple[Path, str]] = {}
    if (folder / VALUE_HEAD).is_file():
        with safe_open(folder / VALUE_HEAD, "pt") as file:  # type: ignore[no-untyped-call]
            found = {name: (folder / VALUE_HEAD, name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    else:
        found = {n: (place.file, place.name) for n, place in tensor_files(folder).items() if n.startswith("v_head.")}
    weights = {}
    for name, (path, key) in found.items():
        with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
            weights[name.removeprefix("v_head.")] = file.get_tensor(key).float()
    return weights
