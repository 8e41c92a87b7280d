"""From prompts to scored, packed sequences: `rollout(...) -> Rollout`."""

from ppomax.rollout.decode import Responses, decode
from ppomax.rollout.loop import rollout, score

__all__ = ["Responses", "decode", "rollout", "score"]
