"""Text of a growing token list, piece by piece: for stop strings and for showing a response as it comes."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "�"
"""What a tokenizer gives for bytes that are not yet a whole character."""


class TextStream:
    """`tokenizer.decode(ids)` in pieces: `push` returns what a token adds, once it makes whole characters.

    Each piece is decoded with the piece before it, since tokenizers join words and bytes across tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.text = ""
        self._ids: list[int] = []
        self._before, self._shown = 0, 0  # ids from _before on are decoded anew; those up to _shown are in `text`

    def push(self, token: int) -> str:
        """Take one token; returns the new text, which may be empty."""
        self._ids.append(token)
        known = self._decode(self._ids[self._before : self._shown])
        whole = self._decode(self._ids[self._before :])
        if len(whole) <= len(known) or whole.endswith(UNFINISHED):
            return ""
        self._before, self._shown = self._shown, len(self._ids)
        piece = whole[len(known) :]
        self.text += piece
        return piece

    def ends_with_stop(self, stops: Sequence[str], piece: str) -> bool:
        """Whether one of the `stops` stands in the text and reaches into its last `piece`."""
        return any(self.text.find(s, max(0, len(self.text) - len(piece) - len(s) + 1)) >= 0 for s in stops)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
