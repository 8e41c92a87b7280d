"""From prompts to scored, packed sequences: `rollout(...) -> Rollout`."""

from ppomax.rollout.decode import Responses, decode
from ppomax.rollout.loop import rollout, score
from ppomax.rollout.plan import RolloutPlan

__all__ = ["Responses", "RolloutPlan", "decode", "rollout", "score"]
