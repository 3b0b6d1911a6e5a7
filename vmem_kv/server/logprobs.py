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


def for_completion(codec: TextCodec, entries: Sequence[TokenLogprobs], offset: int) -> tuple[dict[str, Any], int]:
    """Return the object of the completions endpoint, and the offset behind its last token.

    Args:
        codec: The model's text.
        entries: One a token.
        offset: Where the first token's text begins.
    """
    tokens, offsets = [], []
    for entry in entries:
        tokens.append(codec.token_text(entry.chosen.token_id))
        offsets.append(offset)
        offset += len(tokens[-1])
    data = {
        "tokens": tokens,
        "token_logprobs": [_finite(entry.chosen.logprob) for entry in entries],
        "top_logprobs": [{codec.token_text(t.token_id): _finite(t.logprob) for t in e.top} for e in entries],
        "text_offset": offsets,
    }
    return data, offset


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
