"""Work that is done for a request before the engine has it: little for a wrong one, and none for a client that left."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from vmem_kv.server.errors import ApiError, from_pydantic
from vmem_kv.server.limits import Limits
from vmem_kv.server.schemas import ChatAsk, CompletionAsk, DetokenizeAsk

from .harness import PATHS, WAIT_S, Data, Running, serving, until
from .test_faults import connected, hang_up, send_long

BOTH = ("completions", "chat")
MANY = {f"k{i}": 1 for i in range(5_000)}
USER = {"role": "user", "content": "a"}
WRONG: dict[str, tuple[type[BaseModel], Data, str]] = {
    "texts": (CompletionAsk, {"prompt": ["a", *[1] * 5_000]}, "prompt[1]"),
    "tokens": (CompletionAsk, {"prompt": [1, *[1.5] * 5_000]}, "prompt[1]"),
    "token arrays": (CompletionAsk, {"prompt": [["a"] * 5_000] * 30}, "prompt[0][0]"),
    "too many texts": (CompletionAsk, {"prompt": ["a"] * 32 + [""] * 5_000}, "prompt"),
    "too many token arrays": (CompletionAsk, {"prompt": [[1]] * 32 + [[]] * 5_000}, "prompt"),
    "stop texts": (CompletionAsk, {"prompt": "a", "stop": [1] * 5_000}, "stop[0]"),
    "stop tokens": (CompletionAsk, {"prompt": "a", "stop_token_ids": ["a"] * 5_000}, "stop_token_ids[0]"),
    "unknown names": (CompletionAsk, {"prompt": "a", **MANY}, "k0"),
    "metadata": (CompletionAsk, {"prompt": "a", "metadata": MANY}, "metadata"),
    "messages": (ChatAsk, {"messages": [5] * 2_048}, "messages[0]"),
    "too many messages": (ChatAsk, {"messages": [USER] * 2_048 + [5] * 5_000}, "messages"),
    "names in a message": (ChatAsk, {"messages": [{**USER, **MANY}]}, "messages[0].k0"),
    "parts": (ChatAsk, {"messages": [{"role": "user", "content": [5] * 2_048}]}, "messages[0].content[0]"),
    "detokenize": (DetokenizeAsk, {"tokens": ["a"] * 5_000}, "tokens[0]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_of_many_faults_the_first_one_is_enough(name: str) -> None:
    kind, fields, param = WRONG[name]
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": "tiny", **fields})
    assert caught.value.error_count() == 1
    assert from_pydantic(caught.value).param == param


def test_faults_in_several_fields_are_all_found() -> None:
    """What explains most is told, not what comes first."""
    with pytest.raises(ValidationError) as caught:
        ChatAsk.model_validate({"model": "tiny", "messages": [USER], "top_p": 5, "seed": "x", "foo": 1, "bar": 2})
    assert caught.value.error_count() == 3
    error = from_pydantic(caught.value)
    assert isinstance(error, ApiError)
    assert (error.code, error.param) == ("unknown_parameter", "foo")


def test_an_unknown_name_is_found_behind_what_messages_may_hold() -> None:
    with pytest.raises(ValidationError) as caught:
        ChatAsk.model_validate({"model": "tiny", "messages": [{**USER, "tool_calls": None, "audio": None, "foo": 1}]})
    assert from_pydantic(caught.value).param == "messages[0].foo"


@contextlib.contextmanager
def held(running: Running) -> Iterator[tuple[threading.Event, list[str]]]:
    """Keep the thread that encodes inside its next piece of work; and note all that it begins."""
    codec, release, begun = running.service.codec, threading.Event(), []
    encode = codec._encode

    def holding(text: str, *args: Any) -> tuple[int, ...]:
        begun.append(text)
        assert release.wait(WAIT_S)
        return encode(text, *args)

    codec._encode = holding  # type: ignore[method-assign]
    try:
        yield release, begun
    finally:
        release.set()
        codec._encode = encode  # type: ignore[method-assign]


def test_those_that_are_encoded_count_as_waiting(tiny_model_folder: Path) -> None:
    with serving(tiny_model_folder, max_num_seqs=1, max_queued=4) as running:
        coming = running.service.coming
        with held(running) as (release, _), concurrent.futures.ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(running.post, endpoint) for endpoint in BOTH]
            until(lambda: coming.n_answers == 2)
            asked.append(pool.submit(running.post, "chat", n=2))
            asked.append(pool.submit(running.client.post, "/tokenize", json={"prompt": "the sky"}))
            until(lambda: coming.n_answers == 5)
            for endpoint in BOTH:
                assert running.post(endpoint).status_code == 429
            for path, body in (("/tokenize", {"prompt": "the sky"}), ("/detokenize", {"tokens": [3]})):
                refused = running.client.post(path, json=body)
                assert refused.status_code == 429
                assert refused.headers["retry-after"] == "1"
            release.set()
            assert [future.result(WAIT_S).status_code for future in asked] == [200] * 4
        assert coming.n_answers == 0
        assert running.post("chat", n=5).status_code == 200
        running.check_idle()


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("path", [*PATHS.values(), "/tokenize"])
def test_nothing_is_encoded_for_a_client_that_left(tiny_model_folder: Path, path: str, hard: bool) -> None:
    with serving(tiny_model_folder) as running, contextlib.ExitStack() as stack:
        release, begun = stack.enter_context(held(running))
        first = stack.enter_context(connected(running))
        send_long(first, "chat")
        until(lambda: len(begun) == 1)
        gone = stack.enter_context(connected(running))
        body = b'{"model": "tiny", "prompt": "we look", "messages": [{"role": "user", "content": "we look"}]}'
        if path == PATHS["chat"]:
            body = body.replace(b'"prompt": "we look", ', b"")
        else:
            body = body.partition(b', "messages"')[0] + b"}"
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        gone.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: running.service.coming.n_answers == 2)
        hang_up(gone, hard)
        until(lambda: running.service.metrics.n_open == 1)  # while the thread is busy all the same
        assert running.service.coming.n_answers == 1
        release.set()
        assert first.recv(12) == b"HTTP/1.1 200"
        assert not any("we look" in text for text in begun)
        running.check_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_that_encoding_takes_counts(tiny_model_folder: Path, stream: bool) -> None:
    with serving(tiny_model_folder, limits=Limits(request_timeout_s=0.2)) as running, held(running):
        for response in (
            *(running.post(endpoint, stream=stream) for endpoint in BOTH),
            running.client.post("/tokenize", json={"prompt": "the sky"}),
        ):
            assert response.status_code == 504
            assert response.json()["error"]["code"] == "timeout"
        assert running.service.coming.n_answers == 0
        assert running.service.engine.health().n_open == 0
