"""Sampling: one KV cache, slots that are refilled, packed weights on CPUs, CUDA graphs on GPUs. Knows nothing of
scores; recipe/rollout.py is where sampled responses meet policy, reference and critic."""

from ppomax.rollout.decode import Responses, decode
from ppomax.rollout.sizes import RolloutPlan

__all__ = ["Responses", "RolloutPlan", "decode"]
