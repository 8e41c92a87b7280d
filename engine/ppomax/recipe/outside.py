"""A sampler that is not our decoder, over a run: which weights it has, and the buffer that it draws ahead while the
models train on the one before (`rollout.ahead`)."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from ppomax.config import RolloutConfig
from ppomax.models import embedding_weight
from ppomax.rollout import Responses, Sampling
from ppomax.rollout.sampler import Sampler, checked
from ppomax.rollout.vllm_sampler import VllmSampler
from ppomax.saving.export_policy import weights_to_hand_over
from ppomax.sharding import Trained, ranks
from ppomax.sharding.weights import shape_of


class Wanted(NamedTuple):
    """A buffer to draw, of all ranks."""

    prompts: list[list[int]]
    uids: list[int]
    sampling: Sampling
    eos_ids: list[int]

    def own(self) -> tuple[list[list[int]], list[int]]:
        """This rank's prompts and uids."""
        mine = ranks.part_of(len(self.prompts))
        return [self.prompts[i] for i in mine], [self.uids[i] for i in mine]


class Outside:
    """Draws by `sampler`, which is handed the policy's weights when they have moved."""

    def __init__(self, sampler: Sampler):
        self.sampler = sampler
        self.handed = -1
        """Optimiser steps of the weights that it has; -1: none, or of another run."""
        self._under_way: tuple[list[int], Future[Responses]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ppomax-sampler")

    @classmethod
    def of(cls, sampler: Sampler | None, policy: PreTrainedModel, config: RolloutConfig) -> Outside | None:
        """Of `sampler`, or of what `config` names; None: our decoder draws. ValueError: it cannot do what is asked."""
        if sampler is None and config.sampler == "vllm":
            sampler = VllmSampler(policy, config)
        if sampler is None and config.ahead:
            raise ValueError("Engine: rollout.ahead needs a sampler of its own; pass sampler=, or set rollout.sampler")
        return None if sampler is None else cls(sampler)

    def draw(self, policy: Trained[PreTrainedModel], wanted: Wanted, following: Wanted | None) -> Responses:
        """This rank's responses to `wanted`: those under way, if they are to these uids, or new ones. Starts on
        `following`, with the weights as they are now. RolloutError: they are no responses to these prompts."""
        given = self._finished(wanted.uids)
        if given is None:
            self._hand_over(policy)
            given = self._sample(wanted)
        vocabulary = shape_of(embedding_weight(policy.module))[0]
        found = checked(given, wanted.own()[0], wanted.sampling, eos_ids=wanted.eos_ids, vocabulary=vocabulary)
        if following is not None:
            self._hand_over(policy)
            self._under_way = (following.uids, self._thread.submit(self._sample, following))
        return found

    def saved(self) -> dict[str, Any] | None:
        """What is under way, once it is drawn, of all ranks, as plain data. Every rank calls."""
        if self._under_way is None:
            return None
        uids, future = self._under_way
        own = future.result()
        parts = ranks.gather_objects(own)
        return {
            "uids": uids,
            "tokens": [r for part in parts for r in part.tokens],
            "logprobs": [r for part in parts for r in part.logprobs],
            "finished": [x for part in parts for x in part.finished],
        }

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Take up what `saved` gave; whatever the sampler has of before is forgotten."""
        self.forget()
        if saved is not None:
            mine = ranks.part_of(len(saved["tokens"]))
            tokens, logprobs, finished = ([saved[name][i] for i in mine] for name in ("tokens", "logprobs", "finished"))
            future: Future[Responses] = Future()
            future.set_result(Responses(tokens, logprobs, finished))
            self._under_way = (saved["uids"], future)

    def forget(self) -> None:
        """What is under way, and which weights the sampler has."""
        if self._under_way is not None:
            self._under_way[1].exception()  # until it is done: a sampler does one thing at a time
        self._under_way, self.handed = None, -1

    def _finished(self, uids: list[int]) -> Responses | None:
        if self._under_way is None:
            return None
        known, future = self._under_way
        given = future.result()
        if known != uids:  # a preview between; the sampler is free for it now
            return None
        self._under_way = None
        return given

    def _hand_over(self, policy: Trained[PreTrainedModel]) -> None:
        if self.handed != policy.steps:
            self.sampler.take(weights_to_hand_over(policy))
            self.handed = policy.steps

    def _sample(self, wanted: Wanted) -> Responses:
        prompts, uids = wanted.own()
        return self.sampler.sample(prompts, uids, wanted.sampling, eos_ids=wanted.eos_ids)
