"""Requests that make no sense: OpenAI's 4xx, never a 5xx, and afterwards everything is as before.

After each of them a pinned greedy request gives the same tokens and no page is in use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from .harness import PATHS, Running, good, text_of

BOTH = ("completions", "chat")
HUGE = 2**63
Row = tuple[str, tuple[str, ...], dict[str, Any], int, str | None, str | None]


def message(**fields: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in ({"role": "user", "content": "the sky"} | fields).items() if v is not ...}]


def image(url: str) -> list[dict[str, Any]]:
    return message(content=[{"type": "image_url", "image_url": {"url": url}}])


# (name, endpoints, fields, status, code, param); param "P" stands for the endpoint's prompt.
ROWS: list[Row] = [
    ("no model", BOTH, {"model": ...}, 400, None, None),
    ("unknown model", BOTH, {"model": "x"}, 404, "model_not_found", None),
    ("forged log line", BOTH, {"model": "x\r\nINFO forged \x1b[31m"}, 404, "model_not_found", None),
    ("long model", BOTH, {"model": "m" * 2**19}, 400, "string_above_max_length", "model"),
    ("no prompt", ("completions",), {"prompt": ...}, 400, "missing_required_parameter", "prompt"),
    ("no messages", ("chat",), {"messages": ...}, 400, "missing_required_parameter", "messages"),
    ("empty prompt", ("completions",), {"prompt": ""}, 400, "invalid_value", "prompt"),
    ("no prompts", ("completions",), {"prompt": []}, 400, "empty_array", "prompt"),
    ("no tokens", ("completions",), {"prompt": [[]]}, 400, "empty_array", "prompt[0]"),
    ("an empty text", ("completions",), {"prompt": [""]}, 400, "invalid_value", "prompt[0]"),
    ("token -1", ("completions",), {"prompt": [-1]}, 400, "invalid_value", "prompt"),
    ("token beyond", ("completions",), {"prompt": [3, 1000]}, 400, "invalid_value", "prompt"),
    ("token 2^31", ("completions",), {"prompt": [2**31]}, 400, "invalid_value", "prompt"),
    ("token 2^63", ("completions",), {"prompt": [HUGE]}, 400, "invalid_value", "prompt"),
    ("token 1.5", ("completions",), {"prompt": [1.5]}, 400, "invalid_type", "prompt[0]"),
    ("token true", ("completions",), {"prompt": [True]}, 400, "invalid_type", "prompt[0]"),
    ("mixed prompt", ("completions",), {"prompt": ["a", 1]}, 400, "invalid_type", "prompt[1]"),
    ("nested prompt", ("completions",), {"prompt": [[[1]]]}, 400, "invalid_type", "prompt[0][0]"),
    ("prompt object", ("completions",), {"prompt": {}}, 400, "invalid_type", "prompt"),
    ("prompt null", ("completions",), {"prompt": None}, 400, "invalid_type", "prompt"),
    ("33 prompts", ("completions",), {"prompt": ["a"] * 33}, 400, "array_above_max_length", "prompt"),
    ("messages empty", ("chat",), {"messages": []}, 400, "empty_array", "messages"),
    ("messages text", ("chat",), {"messages": "hi"}, 400, "invalid_type", "messages"),
    ("messages object", ("chat",), {"messages": {}}, 400, "invalid_type", "messages"),
    ("message text", ("chat",), {"messages": ["hi"]}, 400, "invalid_type", "messages[0]"),
    ("no role", ("chat",), {"messages": message(role=...)}, 400, "missing_required_parameter", "messages[0].role"),
    ("role root", ("chat",), {"messages": message(role="root")}, 400, "invalid_value", "messages[0].role"),
    ("role tool", ("chat",), {"messages": message(role="tool")}, 400, "invalid_value", "messages[0].role"),
    ("content null", ("chat",), {"messages": message(content=None)}, 400, "invalid_type", "messages[0].content"),
    ("content 5", ("chat",), {"messages": message(content=5)}, 400, "invalid_type", "messages[0].content"),
    ("content empty", ("chat",), {"messages": message(content=[])}, 400, "empty_array", "messages[0].content"),
    ("no content", ("chat",), {"messages": message(content=...)}, 400, "missing_required_parameter",
     "messages[0].content"),
    ("tool calls", ("chat",), {"messages": message(tool_calls=[1])}, 400, "unknown_parameter",
     "messages[0].tool_calls"),
    ("n over", BOTH, {"n": 9}, 400, "integer_above_max_value", "n"),
    ("n far over", BOTH, {"n": 130}, 400, "integer_above_max_value", "n"),
    ("n 10^9", BOTH, {"n": 10**9}, 400, "integer_above_max_value", "n"),
    ("n 0", BOTH, {"n": 0}, 400, "integer_below_min_value", "n"),
    ("n -1", BOTH, {"n": -1}, 400, "integer_below_min_value", "n"),
    *((f"n {json.dumps(n)}", BOTH, {"n": n}, 400, "invalid_type", "n") for n in ("2", 2.5, True, [], {})),
    ("best_of", ("completions",), {"best_of": 5}, 400, "invalid_value", "best_of"),
    ("best_of below n", ("completions",), {"n": 2, "best_of": 1}, 400, "invalid_value", "best_of"),
    ("best_of in chat", ("chat",), {"best_of": 1}, 400, "unsupported_parameter", "best_of"),
    ("max_tokens 0", BOTH, {"max_tokens": 0}, 400, "integer_below_min_value", "max_tokens"),
    ("max_tokens text", BOTH, {"max_tokens": "10"}, 400, "invalid_type", "max_tokens"),
    ("max_tokens 2^63", BOTH, {"max_tokens": HUGE}, 400, "integer_above_max_value", "max_tokens"),
    ("too many tokens", BOTH, {"max_tokens": 125}, 400, "context_length_exceeded", "max_tokens"),
    ("min above max", BOTH, {"min_tokens": 9}, 400, "invalid_value", "min_tokens"),
    ("min without max", BOTH, {"min_tokens": 9, "max_tokens": None}, 400, "invalid_value", "min_tokens"),
    ("two maxima", ("chat",), {"max_completion_tokens": 5}, 400, "invalid_value", "max_completion_tokens"),
    ("long prompt", ("completions",), {"prompt": "the sky " * 100}, 400, "context_length_exceeded", "prompt"),
    ("long message", ("chat",), {"messages": message(content="the sky " * 100)}, 400, "context_length_exceeded",
     "messages"),
    ("900 kB prompt", ("completions",), {"prompt": "a" * 900_000}, 400, "context_length_exceeded", "prompt"),
    ("900 kB message", ("chat",), {"messages": message(content="a" * 900_000)}, 400, "context_length_exceeded",
     "messages"),
    ("temperature 200", BOTH, {"temperature": 200}, 400, "decimal_above_max_value", "temperature"),
    ("temperature below", BOTH, {"temperature": -0.1}, 400, "decimal_below_min_value", "temperature"),
    ("temperature text", BOTH, {"temperature": "1"}, 400, "invalid_type", "temperature"),
    ("top_p -1", BOTH, {"top_p": -1}, 400, "decimal_below_min_value", "top_p"),
    ("top_p 0", BOTH, {"top_p": 0}, 400, "decimal_below_min_value", "top_p"),
    ("top_p over", BOTH, {"top_p": 1.01}, 400, "decimal_above_max_value", "top_p"),
    ("presence", BOTH, {"presence_penalty": 2.1}, 400, "decimal_above_max_value", "presence_penalty"),
    ("frequency", BOTH, {"frequency_penalty": -2.1}, 400, "decimal_below_min_value", "frequency_penalty"),
    ("repetition 0", BOTH, {"repetition_penalty": 0}, 400, "decimal_below_min_value", "repetition_penalty"),
    ("min_p over", BOTH, {"min_p": 2}, 400, "decimal_above_max_value", "min_p"),
    ("top_k text", BOTH, {"top_k": "x"}, 400, "invalid_type", "top_k"),
    ("bias key", BOTH, {"logit_bias": {"x": 1}}, 400, "invalid_value", "logit_bias"),
    ("bias digit", BOTH, {"logit_bias": {"²": 1}}, 400, "invalid_value", "logit_bias"),
    ("bias token", BOTH, {"logit_bias": {"1000": 1}}, 400, "invalid_value", "logit_bias"),
    ("bias 101", BOTH, {"logit_bias": {"3": 101}}, 400, "invalid_value", "logit_bias"),
    ("bias text", BOTH, {"logit_bias": {"3": "1"}}, 400, "invalid_value", "logit_bias"),
    ("bias list", BOTH, {"logit_bias": [1]}, 400, "invalid_type", "logit_bias"),
    ("10,000 biases", BOTH, {"logit_bias": {str(i): 1 for i in range(10_000)}}, 400, "invalid_value", "logit_bias"),
    ("logprobs 6", ("completions",), {"logprobs": 6}, 400, "integer_above_max_value", "logprobs"),
    ("logprobs true", ("completions",), {"logprobs": True}, 400, "invalid_type", "logprobs"),
    ("top_logprobs 21", ("chat",), {"logprobs": True, "top_logprobs": 21}, 400, "integer_above_max_value",
     "top_logprobs"),
    ("top_logprobs alone", ("chat",), {"top_logprobs": 2}, 400, "invalid_value", "top_logprobs"),
    ("logprobs 1", ("chat",), {"logprobs": 1}, 400, "invalid_type", "logprobs"),
    ("bad_words", BOTH, {"bad_words": ["x"]}, 400, "unknown_parameter", "bad_words"),
    ("stop token", BOTH, {"stop_token_ids": [10**6]}, 400, "invalid_value", "stop_token_ids"),
    ("stop token -1", BOTH, {"stop_token_ids": [-1]}, 400, "invalid_value", "stop_token_ids"),
    ("5 stops", BOTH, {"stop": list("abcde")}, 400, "array_above_max_length", "stop"),
    ("stop empty", BOTH, {"stop": ""}, 400, "invalid_value", "stop"),
    ("stop of empty", BOTH, {"stop": [""]}, 400, "invalid_value", "stop[0]"),
    ("stop long", BOTH, {"stop": "x" * 900_000}, 400, "string_above_max_length", "stop"),
    ("stop number", BOTH, {"stop": [1]}, 400, "invalid_type", "stop[0]"),
    ("stop object", BOTH, {"stop": {}}, 400, "invalid_type", "stop"),
    ("seed 2^63", BOTH, {"seed": HUGE}, 400, "integer_above_max_value", "seed"),
    ("seed text", BOTH, {"seed": "x"}, 400, "invalid_type", "seed"),
    ("stream yes", BOTH, {"stream": "yes"}, 400, "invalid_type", "stream"),
    ("options alone", BOTH, {"stream": None, "stream_options": {}}, 400, "invalid_value", "stream_options"),
    ("options unknown", BOTH, {"stream": True, "stream_options": {"x": 1}}, 400, "unknown_parameter",
     "stream_options.x"),
    ("echo in chat", ("chat",), {"echo": True}, 400, "unsupported_parameter", "echo"),
    ("echo of logprobs", ("completions",), {"echo": True, "logprobs": 1}, 400, "unsupported_value", "echo"),
    ("echo of no token", ("completions",), {"echo": True, "prompt": [3, 1000]}, 400, "invalid_value", "prompt"),
    ("suffix", BOTH, {"suffix": "x"}, 400, "unsupported_parameter", "suffix"),
    *((name, BOTH, {name: 1}, 400, "unsupported_parameter", name)
      for name in ("prompt_logprobs", "use_beam_search", "priority")),
    ("unknown", BOTH, {"foo": 1}, 400, "unknown_parameter", "foo"),
    ("unknown null", BOTH, {"foo": None}, 400, "unknown_parameter", "foo"),
    ("a branch's name", BOTH, {"<odd>": 1}, 400, "unknown_parameter", "<odd>"),
    ("long name", BOTH, {"f" * 10_000: 1}, 400, "unknown_parameter", "f" * 64),
    ("user long", BOTH, {"user": "x" * 900_000}, 400, "string_above_max_length", "user"),
    ("metadata long", BOTH, {"metadata": {"a": "x" * 900_000}}, 400, "string_above_max_length", "metadata.a"),
    *((f"image {u}", ("chat",), {"messages": image(u)}, 400, "invalid_value", "messages[0].content[0].type")
      for u in ("http://127.0.0.1:1/", "file:///etc/passwd", "http://a\\@169.254.169.254/", "data:image/png;base64,")),
    ("chat_template", BOTH, {"chat_template": "{{ 1 }}"}, 400, "unsupported_parameter", "chat_template"),
    ("template arguments", BOTH, {"chat_template_kwargs": {"tokenize": True}}, 400, "unsupported_parameter",
     "chat_template_kwargs"),
    ("tools empty", ("chat",), {"tools": []}, 400, "empty_array", "tools"),
    ("tools", ("chat",), {"tools": [{"pattern": "("}]}, 400, "unsupported_parameter", "tools"),
    ("tools for text", ("completions",), {"tools": []}, 400, "unsupported_parameter", "tools"),
    ("tool_choice", ("chat",), {"tool_choice": "auto"}, 400, None, "tool_choice"),
    ("response_format", ("chat",), {"response_format": {"type": "json_schema", "json_schema": 5}}, 400,
     "unsupported_parameter", "response_format"),
    ("response_format odd", ("chat",), {"response_format": [[]]}, 400, "unsupported_parameter", "response_format"),
    *((g, BOTH, {g: "(a+)+$"}, 400, "unsupported_parameter", g)
      for g in ("guided_regex", "guided_grammar", "guided_json")),
    ("surrogate model", BOTH, {"model": "\ud800"}, 400, "invalid_value", None),
    ("surrogate prompt", ("completions",), {"prompt": "the \ud800"}, 400, "invalid_value", None),
    ("surrogate message", ("chat",), {"messages": message(content="\ud800")}, 400, "invalid_value", None),
    ("surrogate stop", BOTH, {"stop": "\udfff"}, 400, "invalid_value", None),
    ("surrogate key", BOTH, {"\ud800": 1}, 400, "invalid_value", None),
    ("surrogate bias", BOTH, {"logit_bias": {"\ud800": 1}}, 400, "invalid_value", None),
]  # fmt: skip

RAW: list[tuple[str, bytes]] = [
    ("cut", b'{"model":'),
    ("empty", b""),
    ("array", b"[]"),
    ("text", b'"x"'),
    ("number", b"1"),
    ("null", b"null"),
    ("not UTF-8", b'{"model": "\xff\xfe"}'),
    ("byte order mark", b'\xef\xbb\xbf{"model": "tiny"}'),
    ("deep", b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
    ("deep array", b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    ("5,000 digits", b'{"n":' + b"9" * 5_000 + b"}"),
    ("NaN", b'{"temperature": NaN}'),
    ("Infinity", b'{"temperature": Infinity}'),
    ("-Infinity", b'{"temperature": -Infinity}'),
    ("1e999", b'{"temperature": 1e999}'),
]


@pytest.fixture(scope="module")
def pinned(running: Running) -> dict[str, str]:
    return {endpoint: text_of(endpoint, running.post(endpoint).json()) for endpoint in BOTH}


@pytest.fixture(autouse=True)
def nothing_changed(running: Running, pinned: dict[str, str], request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    running.check_idle()
    endpoint = BOTH[len(request.node.name) % 2]  # one of the two, to save time
    assert text_of(endpoint, running.post(endpoint).json()) == pinned[endpoint]


def check_error(response: httpx.Response, status: int, code: str | None = None, param: str | None = None) -> str:
    assert response.status_code == status, response.text[:500]
    assert response.headers["content-type"] == "application/json"
    data = response.json()
    assert list(data) == ["error"]
    error = data["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert error["type"] == "invalid_request_error"
    assert (error["code"], error["param"]) == (code, param)
    assert error["message"]
    assert len(response.content) < 1_000
    assert not re.search(r"0x[0-9a-f]{6,}|Traceback|/[a-z]+/[a-z]+\.py|pydantic", response.text)
    return str(error["message"])


def _cases() -> list[Any]:
    return [
        pytest.param(row, endpoint, stream, id=f"{row[0]}-{endpoint}-{'stream' if stream else 'whole'}")
        for row in ROWS
        for endpoint in row[1]
        for stream in (False, True)
    ]


@pytest.mark.parametrize(("row", "endpoint", "stream"), _cases())
def test_wrong_fields(running: Running, row: Row, endpoint: str, stream: bool) -> None:
    _, _, fields, status, code, param = row
    body = good(endpoint, **{"stream": stream, **fields})
    response = running.client.post(
        PATHS[endpoint], content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    check_error(response, status, code, param)


@pytest.mark.parametrize("path", [*PATHS.values(), "/tokenize", "/detokenize"])
@pytest.mark.parametrize("body", [pytest.param(body, id=name) for name, body in RAW])
def test_bodies_that_are_no_strict_json(running: Running, path: str, body: bytes) -> None:
    response = running.client.post(path, content=body, headers={"Content-Type": "application/json"})
    check_error(response, 400)


def test_messages_are_openais(running: Running) -> None:
    def said(endpoint: str, **fields: Any) -> str:
        return str(running.post(endpoint, **fields).json()["error"]["message"])

    assert said("chat", messages=[]) == (
        "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array instead."
    )
    assert said("chat", n=130) == (
        "Invalid 'n': integer above maximum value. Expected a value <= 8, but got 130 instead."
    )
    assert said("chat", max_tokens=0) == (
        "Invalid 'max_tokens': integer below minimum value. Expected a value >= 1, but got 0 instead."
    )
    assert said("chat", max_tokens="10") == (
        "Invalid type for 'max_tokens': expected an integer, but got a string instead."
    )
    assert said("chat", temperature=200) == (
        "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 200 instead."
    )
    assert said("chat", stop=list("abcde")) == (
        "Invalid 'stop': array too long. Expected an array with maximum length 4, but got an array with length 5 "
        "instead."
    )
    assert said("chat", messages=...) == "Missing required parameter: 'messages'."
    assert said("chat", model=...) == "you must provide a model parameter"
    assert said("chat", model="x") == "The model `x` does not exist or you do not have access to it."
    assert said("chat", max_tokens=125) == (
        "This model's maximum context length is 128 tokens; the prompt has 5 tokens, and max_tokens asks for 125 more"
    )
    assert said("completions", prompt="sky", max_tokens=128).endswith("has 1 token, and max_tokens asks for 128 more")
    assert said("completions", echo=True, logprobs=1).endswith(
        "log probabilities are given of answers, not of prompts."
    )
    assert said("chat", prompt_logprobs=1) == "Unsupported parameter: 'prompt_logprobs' is not supported here."
    assert said("chat", foo=1) == "Unrecognized request argument supplied: foo"
    assert said("chat", tool_choice="auto") == "'tool_choice' is only allowed when 'tools' are specified."


def test_of_a_repeated_key_the_last_one_counts_and_is_validated(running: Running) -> None:
    body = json.dumps(good("chat"))[:-1]
    headers = {"Content-Type": "application/json"}
    fine = running.client.post(PATHS["chat"], content=body + ', "n": 1000000000, "n": 1}', headers=headers)
    assert fine.status_code == 200
    wrong = running.client.post(PATHS["chat"], content=body + ', "n": 1, "n": 1000000000}', headers=headers)
    check_error(wrong, 400, "integer_above_max_value", "n")


def test_odd_texts_are_answered(running: Running) -> None:
    for text in ("\x00", "\u202e abc", "a" + "\u0301" * 1_000, "\U0010ffff", "<|im_end|>", "<|image_pad|> the"):
        for endpoint in BOTH:
            prompt = {"prompt": text} if endpoint == "completions" else {"messages": message(content=text)}
            for stream in (False, True):
                response = running.post(endpoint, **prompt, stream=stream)
                assert response.status_code in (200, 400), response.text
                response.content.decode()


def test_nulls_of_what_is_not_offered_are_no_parameters(running: Running, pinned: dict[str, str]) -> None:
    nulls = dict.fromkeys(("suffix", "tools", "n", "stop", "logit_bias", "user", "top_p", "store", "seed", "echo"))
    for endpoint, text in pinned.items():
        assert text_of(endpoint, running.post(endpoint, **nulls).json()) == text
    plain = running.post("chat", response_format={"type": "text"}, best_of=None)
    assert text_of("chat", plain.json()) == pinned["chat"]


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("/tokenize", {}, "missing_required_parameter"),
        ("/tokenize", {"prompt": "a", "messages": message()}, "missing_required_parameter"),
        ("/tokenize", {"prompt": 5}, "invalid_type"),
        ("/tokenize", {"prompt": "a" * 100_000}, "context_length_exceeded"),
        ("/detokenize", {"tokens": [10**9]}, "invalid_value"),
        ("/detokenize", {"tokens": [-1]}, "invalid_value"),
        ("/detokenize", {"tokens": [True]}, "invalid_type"),
        ("/detokenize", {"tokens": "x"}, "invalid_type"),
    ],
)
def test_the_tokenizers_routes_refuse_in_the_same_form(
    running: Running, path: str, body: dict[str, Any], code: str
) -> None:
    response = running.client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == code
    assert running.client.post(path, json={**body, "model": "other"}).status_code in (400, 404)


def test_urls_methods_and_types(running: Running) -> None:
    client = running.client
    error = client.post("/v1/nope", json={}).json()["error"]
    assert error["message"] == "Invalid URL (POST /v1/nope)"
    for path in ("/v1/..%2f", "/%00", "/V1/models", "//v1/models", "/" + "a" * 8_000, "/v1/%1b[31m", "/%ff"):
        check_error(client.get(path), 404)
    wrong = client.get(PATHS["chat"])
    check_error(wrong, 405, "method_not_supported")
    assert wrong.headers["allow"] == "POST"
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        plain = client.post(PATHS["chat"], content=b"{}", headers={"Content-Type": content_type})
        check_error(plain, 415)
    zipped = client.post(PATHS["chat"], content=b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
    check_error(zipped, 415)
    without = httpx.Request("POST", running.url + PATHS["chat"], content=json.dumps(good("chat")).encode())
    without.headers.pop("content-type", None)
    check_error(client.send(without), 415)
    for method in ("HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"):
        assert client.request(method, PATHS["chat"]).status_code == 405


def test_a_request_id_is_always_ours(running: Running) -> None:
    send: Callable[..., httpx.Response] = running.client.get
    for headers in ([("X-Request-Id", "a" * 8_000)], [("X-Request-Id", "a"), ("X-Request-Id", "b")]):
        response = send("/v1/models", headers=headers)
        assert response.status_code == 200
        assert re.fullmatch(r"req_[0-9a-f]{32}", response.headers["x-request-id"])


def test_a_length_is_checked_before_anything_is_read(running: Running) -> None:
    large = json.dumps(good("completions", prompt="a" * (2 << 20))).encode()
    check_error(running.client.post(PATHS["completions"], content=large), 413)

    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * (1 << 16)

    chunked = running.client.post(PATHS["completions"], content=chunks(), headers={"Content-Type": "application/json"})
    check_error(chunked, 413)
