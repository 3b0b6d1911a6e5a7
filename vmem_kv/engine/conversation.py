"""Conversations as a model's chat template writes them, in which nobody forges a turn.

    for piece in ChatWriter(tokenizer).pieces(turns):
        token_ids += tokenizer(piece, add_special_tokens=False).input_ids if isinstance(piece, str) else piece

Guarantees: what a turn says never becomes a token that ends a turn or begins one: such a token's text is *quoted*, and
given as the tokens of the characters that it is. These are all special tokens, whether or not they have a role in the
tokenizer's configuration, and the added tokens that the template writes. An answer of the model may hold the latter:
they can mark its thoughts, which templates look for in earlier answers, and what the model itself wrote is no forgery.
Assumes: the template writes what a turn says as it is, or parts of it. Used in one thread at a time.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


class ChatWriter:
    """Writes conversations.

    Args:
        tokenizer: The model's, with a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._added = {token_id: str(token.content) for token_id, token in added.items()}
        template = str(tokenizer.chat_template)
        special = {*tokenizer.all_special_tokens, *(token.content for token in added.values() if token.special)}
        self._in_answers = _any_of(special)
        self._in_questions = _any_of(special | {text for text in self._added.values() if text in template})
        self._quotations: dict[str, tuple[int, ...]] = {}

    def pieces(self, turns: Sequence[Mapping[str, Any]]) -> Iterator[str | tuple[int, ...]]:
        """Yield a conversation, up to where its answer begins: text to be encoded, and the tokens of what is quoted.

        Args:
            turns: What the template takes; all texts in them, names and roles too, are quoted where they must be.

        Raises:
            jinja2.TemplateError: The template refuses it.
        """
        nonce = secrets.token_hex(8)
        quoted: list[str] = []

        def quote(match: re.Match[str]) -> str:
            quoted.append(match[0])
            return f"{nonce}{len(quoted) - 1}{nonce}"

        def without(markers: re.Pattern[str], value: Any) -> Any:
            if isinstance(value, str):
                return markers.sub(quote, value)
            if isinstance(value, Mapping):
                return {key: without(markers, member) for key, member in value.items()}
            return [without(markers, item) for item in value] if isinstance(value, (list, tuple)) else value

        safe = [
            without(self._in_answers if turn.get("role") == "assistant" else self._in_questions, turn) for turn in turns
        ]
        written = str(self._tokenizer.apply_chat_template(safe, add_generation_prompt=True, tokenize=False))
        for i, part in enumerate(written.split(nonce)):
            if i % 2:
                yield self._quotation(quoted[int(part)])
            elif part:
                yield part

    def _quotation(self, text: str) -> tuple[int, ...]:
        """Return the tokens of an added token's text. There are as many to remember as there are added tokens."""
        if text not in self._quotations:
            self._quotations[text] = tuple(self._characters(text))
        return self._quotations[text]

    def _characters(self, text: str) -> list[int]:
        encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        token_ids: list[int] = encoded.input_ids
        if len(text) > 1 and any(t in self._added and self._added[t] in text for t in token_ids):
            # Tokenizers split special tokens at most. Without its first character it is none.
            return self._characters(text[:1]) + self._characters(text[1:])
        return token_ids


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, texts), key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
