"""A sampler for tests: our own decoder behind the face of another engine's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ppomax.rollout import Responses, Sampling, decode
from ppomax.sharding import Lazy
from ppomax.sharding.weights import LazyTensors, overwrite

from tests.engine.tiny import tiny_policy


class Copy:
    """Draws by our decoder from a model of its own, into which the weights are copied."""

    def __init__(self, change: Callable[[Responses], Responses] = lambda given: given) -> None:
        self.model, self.change, self.taken = tiny_policy(seed=3).eval(), change, 0

    def take(self, weights: Mapping[str, Lazy]) -> None:
        overwrite(self.model, LazyTensors(weights))
        self.taken += 1

    def sample(
        self, prompts: Sequence[Sequence[int]], uids: Sequence[int], sampling: Sampling, *, eos_ids: Sequence[int]
    ) -> Responses:
        return self.change(decode(self.model, prompts, uids, sampling, eos_ids=eos_ids))

    def close(self) -> None:
        pass
