"""decode with the knobs of Sampling as keywords, as tests vary them."""

from typing import Any

from ppomax import rollout

APART = ("eos_ids", "tokenizer", "trunk_layers", "announce", "on_token")


def decode(model: Any, prompts: Any, uids: Any, **options: Any) -> rollout.Responses:
    """`ppomax.rollout.decode` of these prompts."""
    apart = {name: options.pop(name) for name in APART if name in options}
    stop = tuple(options.pop("stop", ()))
    return rollout.decode(model, prompts, uids, rollout.Sampling(**options, stop=stop), **apart)
