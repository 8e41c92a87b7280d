"""A reward model that does not share the policy's tokenizer: text in between."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from ppomax.data import check_tokenizer, encode_prompt, end_ids
from ppomax.data.encode import encode_chat
from ppomax.models import RewardModel, any_pads
from ppomax.models.fused_trunk import fused_trunk
from ppomax.models.transfers import sent
from ppomax.recipe.batch import Rollout, pack, split_minibatches
from ppomax.recipe.rewards import ModelReward, Scores, finite_scores, texts_of
from ppomax.sharding import call, ranks

if TYPE_CHECKING:
    from ppomax.sharding.zero import ZeroFrozen


class TextModelReward(ModelReward):
    """The frozen reward model on texts: each prompt and response is decoded by the policy's tokenizer and encoded by
    the model's `own`, as a user's and an assistant's turn where that has a chat template. A response that was cut gets
    no end token; what follows an end token that a response spells out is not read. Each rank scores its share, at most
    `micro_tokens` at once."""

    def __init__(
        self,
        model: RewardModel | ZeroFrozen[RewardModel],
        impl: str,
        tokenizer: PreTrainedTokenizerBase,
        own: PreTrainedTokenizerBase,
        micro_tokens: int,
    ):
        super().__init__(model, impl)
        self.tokenizer, self.own, self.micro_tokens = tokenizer, own, micro_tokens
        check_tokenizer(own)
        self.ends = end_ids(own) | {own.eos_token_id}
        self.closing = own.eos_token_id
        if own.chat_template:
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            self.closing = encode_chat(turns, own, end_ids(own))[1][-1]

    def encoded(self, prompt: str, response: str, finished: bool) -> list[int]:
        """Both as the model's tokens; one at least."""
        chat = self.own.chat_template and prompt.strip()
        before = encode_prompt([{"role": "user", "content": prompt}] if chat else prompt, self.own)
        ids = self.own(response, add_special_tokens=False)["input_ids"]
        ids = ids[: next((i for i, token in enumerate(ids) if token in self.ends), None)]
        return [*before, *ids, *([self.closing] if finished else [])] or [self.closing]

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> Scores:
        device, mine = rollout.tokens.device, ranks.part_of(len(rollout.finished))
        prompts, responses = texts_of(rollout.sequences()[mine.start : mine.stop], self.tokenizer)
        ended = rollout.finished.tolist()[mine.start : mine.stop]
        rows = [self.encoded(*row) for row in zip(prompts, responses, ended, strict=True)]
        scores = torch.zeros(len(rows), device=device)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        padded = any_pads(self.model)
        micros = split_minibatches(lengths, max(1, len(rows)), self.micro_tokens, None, padded=padded)
        mine_cut = micros[0] if micros else []
        count = int(ranks.max(torch.tensor(float(len(mine_cut)), device=device)))
        with fused_trunk(self.model, impl=self.impl):
            for i in range(count):  # as many on each rank, since the model may lie in parts
                which = mine_cut[i].tolist() if i < len(mine_cut) else []
                tokens, cu = pack([rows[j] for j in which] or [[0]])
                found = call(self.model, RewardModel.scores, sent(tokens, device), cu)
                scores[which] = found[: len(which)]
        return Scores(finite_scores(ranks.gather(scores), "the reward model"))
