"""Sampling: one KV cache, slots that are refilled, packed weights on CPUs, CUDA graphs on GPUs. Knows nothing of
scores; recipe/rollout.py is where sampled responses meet policy, reference and critic."""

from ppomax.rollout.decode import decode
from ppomax.rollout.responses import Responses
from ppomax.rollout.sampling import Sampling
from ppomax.rollout.sizes import RolloutSizes

__all__ = ["Responses", "RolloutSizes", "Sampling", "decode"]
