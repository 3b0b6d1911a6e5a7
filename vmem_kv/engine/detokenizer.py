"""From tokens to text, a token at a time, without ever splitting a character.

A token may hold only some bytes of a character, and how a token is written can depend on the one before it. So text is
made from a short window of tokens, `[0, _n_read)` of which were given out already; what ends in an incomplete character
waits for the tokens that complete it. Texts joined are the text of all tokens.

Guarantees: the window is short whatever the tokens are. Those that give no text (special ones that are left out) are
not kept; and what has waited for more tokens than a character has bytes is given out as it is written, but for its
last bytes, which may begin a character.
Assumes: what a token adds to the text depends on the tokens just before it only, as in all tokenizers of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_CONTEXT_TOKENS = 6
"""Tokens of the prompt in the first window: enough for a character of four bytes and what a tokenizer looks back at."""
_MOST_WAITING = 8
"""Tokens that may wait. A character has at most four bytes."""
_MOST_INCOMPLETE = 3
"""Tokens at the end that may hold an incomplete character."""
_INCOMPLETE = "\ufffd"


class Detokenizer:
    """The text of one answer as it grows.

    Args:
        tokenizer: The model's.
        prompt_token_ids: What stands before the answer.
        skip_special_tokens: Leave special tokens out.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt_token_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = list(prompt_token_ids[-_CONTEXT_TOKENS:])
        self._n_read = len(self._window)
        self._seen = self._decode(self._window)

    def add(self, token_id: int) -> str:
        """Return the text that this token completes; empty while a character is incomplete."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if len(text) > len(self._seen) and not text.endswith(_INCOMPLETE):
            return self._give_out(text, len(self._window))
        if not self._decode([token_id, token_id]):  # twice, since a leading space is left out
            self._window.pop()
        if len(self._window) - self._n_read > _MOST_WAITING:
            return self._give_out(*self._settled(text))
        return ""

    def flush(self) -> str:
        """Return what waits, at the answer's end: an incomplete character as the tokenizer writes it."""
        text = self._decode(self._window)
        new, self._seen = text[len(self._seen) :], text
        return new

    def _settled(self, text: str) -> tuple[str, int]:
        """Return what of a window's text no later token changes, and of how many tokens it is."""
        for n_held in range(_MOST_INCOMPLETE, 0, -1):
            n_settled = len(self._window) - n_held
            settled = self._decode(self._window[:n_settled])
            if settled + self._decode(self._window[n_settled:]) == text:  # no character is cut in two there
                return settled, n_settled
        return text, len(self._window)

    def _give_out(self, text: str, n_tokens: int) -> str:
        """Return what is new of the window's first tokens, whose text is given; they become the context of the rest."""
        new = text[len(self._seen) :]
        self._window = self._window[self._n_read :]
        self._n_read = n_tokens - self._n_read
        self._seen = self._decode(self._window[: self._n_read])
        return new

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=self._skip)
        return text


class StopFinder:
    """Finds the first stop text, also where it spans pieces. Holds back what may be its beginning.

    Args:
        stops: The texts.
        include: Whether the stop text itself is given out.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = stops
        self._include = include
        self._held = ""

    def add(self, text: str) -> tuple[str, str | None]:
        """Return what of the text may be given out, and the stop text if one is complete."""
        held = self._held + text
        found = [(position, stop) for stop in self._stops if (position := held.find(stop)) >= 0]
        if found:
            # The one that is complete first, as a reader who takes character by character would see it.
            position, stop = min(found, key=lambda f: (f[0] + len(f[1]), f[0]))
            self._held = ""
            return held[: position + len(stop) if self._include else position], stop
        n_held = max((_n_common(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - n_held :]
        return held[: len(held) - n_held], None

    def flush(self) -> str:
        """Return what was held back, at the answer's end."""
        held, self._held = self._held, ""
        return held


def _n_common(text: str, stop: str) -> int:
    """Return how many of the text's last characters are the stop text's first ones; fewer than all of these."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
