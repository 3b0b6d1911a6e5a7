"""Log probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vmem_kv.engine.request import FinishReason, SequenceUpdate, TokenLogprob, TokenLogprobs
from vmem_kv.server.text import TextCodec

LEAST = -9_999.0
"""Stands for a probability of zero, whose logarithm JSON cannot write."""


def of_text(update: SequenceUpdate) -> Sequence[TokenLogprobs]:
    """Return the entries of an update's text: a token that ended the answer is no part of it."""
    is_ended_by_token = update.finish_reason is FinishReason.STOP and isinstance(update.stop_reason, int)
    return update.logprobs[:-1] if is_ended_by_token else update.logprobs


class TextOffsets:
    """Where the tokens of an answer begin in its text: all of a character's tokens where the character does.

    Args:
        codec: The model's text.
        prompt_token_ids: What stands before the answer.
        skip_special_tokens: Whether they are left out of the text.
    """

    def __init__(self, codec: TextCodec, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._detokenizer = codec.detokenizer(prompt_token_ids, skip_special_tokens)
        self._n_characters = 0

    def take(self, token_id: int) -> int:
        """Return where the answer's next token begins."""
        offset = self._n_characters
        self._n_characters += len(self._detokenizer.add(token_id))
        return offset


def for_completion(codec: TextCodec, entries: Sequence[TokenLogprobs], offsets: TextOffsets) -> dict[str, Any]:
    """Return the object of the completions endpoint.

    Args:
        codec: The model's text.
        entries: One a token.
        offsets: Of the answer, whose next tokens these are.
    """
    return {
        "tokens": [codec.token_text(entry.chosen.token_id) for entry in entries],
        "token_logprobs": [_finite(entry.chosen.logprob) for entry in entries],
        "top_logprobs": [{codec.token_text(t.token_id): _finite(t.logprob) for t in e.top} for e in entries],
        "text_offset": [offsets.take(entry.chosen.token_id) for entry in entries],
    }


def for_chat(codec: TextCodec, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Return the object of the chat endpoint."""
    content = [
        {**_chat_token(codec, e.chosen), "top_logprobs": [_chat_token(codec, t) for t in e.top]} for e in entries
    ]
    return {"content": content, "refusal": None}


def _chat_token(codec: TextCodec, token: TokenLogprob) -> dict[str, Any]:
    told = codec.token_bytes(token.token_id)
    return {
        "token": codec.token_text(token.token_id),
        "logprob": _finite(token.logprob),
        "bytes": None if told is None else list(told),
    }


def _finite(logprob: float) -> float:
    return max(LEAST, logprob)
