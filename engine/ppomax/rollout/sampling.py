"""How responses are sampled: made once from the configuration, and carried as it is down to the last step."""

from __future__ import annotations

from dataclasses import dataclass

from ppomax.config import RolloutConfig
from ppomax.rollout.kept import Cut


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, when a response ends, and in how much room."""

    max_new_tokens: int
    """Response limit in tokens, EOS included."""
    min_new_tokens: int = 0
    """EOS is forbidden before this many tokens are out."""
    temperature: float = 1.0
    """0: greedy."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sample from the smallest set with this mass; 1: all."""
    repetition_penalty: float = 1.0
    """Logits of tokens that the response holds already are divided by it where above 0, multiplied where below; 1:
    off."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, found in its text; they need a tokenizer."""
    seed: int = 0
    """With a sequence's uid it names the sequence's random stream."""
    slots: int = 128
    """Sequences decoded at once."""
    cache_tokens: int | None = None
    """Most tokens that the KV arena holds; None: what the slots need."""
    cuda_graphs: bool | None = None
    """Replay steps without prompts, with their rows rounded up; the model must be on a CUDA device. None: where it is
    on one and attention is ours."""
    record_kept: bool = False
    """Give back what top_k, top_p and min_new_tokens left each draw to choose from (`Responses.kept`)."""
    exact: bool = False
    """Give back what scoring would of each token, to the bit (`Responses.scored`)."""
    impl: str = "auto"
    """Back-end of the kernels."""

    @property
    def cut(self) -> Cut | None:
        """The cut whose sets are recorded; None: none are, or every token may be drawn."""
        cuts = self.top_k > 0 or self.top_p < 1 or self.min_new_tokens > 0
        return Cut(self.top_k, self.top_p, self.temperature) if self.record_kept and cuts else None

    @classmethod
    def of(cls, config: RolloutConfig, *, seed: int, impl: str, exact: bool = False) -> Sampling:
        """As a run's configuration says; whether it is exact depends on the policy, too."""
        return cls(
            max_new_tokens=config.max_new_tokens,
            min_new_tokens=config.min_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            repetition_penalty=config.repetition_penalty,
            seed=seed,
            slots=config.slots,
            cache_tokens=config.cache_tokens,
            cuda_graphs=config.cuda_graphs,
            record_kept=not config.allow_biased_sampling,
            exact=exact,
            impl=impl,
        )
