"""What a rollout gives, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class RolloutStats:
    """What a rollout cost. Seconds of a forward that carries both prompts and next tokens are split by tokens."""

    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: int = 0
    occupied: int = 0
    """Living sequences, summed over steps."""
    slots: int = 0
    pages: int = 0
    most_pages: int = 0
    planned_bytes: int = 0
    put_back: int = 0
    """Sequences that gave up their pages to older ones and were drawn anew."""

    def note(self, living: int, decoding: int, prefill: int, seconds: float) -> None:
        """One step more: of so many living sequences, `decoding` of them by a token of their own, and of so many tokens
        of prompts."""
        self.steps += 1
        self.occupied += living
        self.prefill_tokens += prefill
        self.decode_tokens += decoding
        part = prefill / (decoding + prefill) if decoding + prefill else 0.0
        self.prefill_seconds += seconds * part
        self.decode_seconds += seconds * (1.0 - part)

    def metrics(self) -> dict[str, float]:
        """Rates and shares, by the names that the engine logs."""
        out = {
            "rollout/prefill_tokens": float(self.prefill_tokens),
            "rollout/slot_occupancy": self.occupied / max(1, self.steps * self.slots),
            "rollout/cache_use": self.most_pages / max(1, self.pages),
            "rollout/put_back": float(self.put_back),
            "rollout/planned_mib": self.planned_bytes / 2**20,
        }
        if self.prefill_seconds:
            out["perf/prefill_tokens_per_second"] = self.prefill_tokens / self.prefill_seconds
        if self.decode_seconds:
            out["perf/decode_tokens_per_second"] = self.decode_tokens / self.decode_seconds
        return out


@dataclass(frozen=True)
class Responses:
    """What was sampled, in the prompts' order, on the host."""

    tokens: list[list[int]]
    """Response ids, EOS included where it came; one that met a stop string ends with the token that completed it."""
    logprobs: list[list[float]]
    """Of each token under the distribution sampled from."""
    finished: list[bool]
    """Ended by EOS or a stop string, not by the length limit."""
    trunk: list[Tensor] | None = None
    """For `trunk_layers=b`: what enters block b at each token but the last, (len(prompt) + len(response) - 1, D)."""
    kept: list[Tensor] | None = None
    """For `record_kept`: what each token was drawn from, (len(response), W) as kept.py has it."""
    scored: list[Tensor] | None = None
    """For `exact`: what scoring gives of each token, (len(response), 2 or 3) float32: logprob and entropy at
    the sampling temperature, and the logprob at temperature 1 if that is another."""
    stats: RolloutStats = field(default_factory=RolloutStats)
