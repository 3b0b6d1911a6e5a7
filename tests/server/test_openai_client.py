"""The `openai` package as its users use it: the answers, and which exception each refusal becomes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from .harness import MODEL, Running

MESSAGES: Any = [{"role": "user", "content": "the sky is blue"}]


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=9, temperature=0, n=2)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 18
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=9, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 9
    turns = [*MESSAGES, whole.choices[0].message, {"role": "user", "content": "we look up"}]
    again = client.chat.completions.create(model=MODEL, messages=turns, max_tokens=2, temperature=0)
    assert again.choices[0].message.content


def test_logprobs_seeds_and_completions(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2, seed=5
    )
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 3
    assert len(content[0].top_logprobs) == 2
    text = client.completions.create(model=MODEL, prompt=["the sky", "we look"], max_tokens=3, logprobs=2, seed=5)
    assert len(text.choices) == 2
    assert text.choices[1].logprobs is not None
    assert [m.id for m in client.models.list()] == [MODEL]


@pytest.mark.parametrize(
    ("fields", "kind", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model_not_found"),
        ({"temperature": 3}, openai.BadRequestError, "decimal_above_max_value"),
        ({"max_tokens": 10_000}, openai.BadRequestError, "context_length_exceeded"),
        ({"messages": []}, openai.BadRequestError, "empty_array"),
        ({"extra_body": {"foo": 1}}, openai.BadRequestError, "unknown_parameter"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_raise_the_right_exception(
    client: openai.OpenAI, fields: Any, kind: type[openai.APIStatusError], code: str, stream: bool
) -> None:
    ask: Any = {"model": MODEL, "messages": MESSAGES, "stream": stream, **fields}
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**ask)
    assert caught.value.code == code


def test_a_stream_that_fails_raises(client: openai.OpenAI, running: Running) -> None:
    stock = running.engine._append

    def planted(sequence: Any, sampled: Any, updates: Any) -> None:
        if sequence.n_generated == 3:
            running.engine._fail([sequence], ValueError("planted"), updates)
        else:
            stock(sequence, sampled, updates)

    running.engine._append = planted  # type: ignore[method-assign]
    try:
        stream = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=9, temperature=0, stream=True
        )
        with pytest.raises(openai.APIError, match="failed to compute"):
            list(stream)
    finally:
        running.engine._append = stock  # type: ignore[method-assign]
