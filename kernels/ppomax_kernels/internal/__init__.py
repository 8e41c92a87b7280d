"""Ops that only the engine's rollout uses: on a CPU, without gradients, and free to change."""
