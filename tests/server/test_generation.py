"""Good requests on both endpoints: the same tokens as `generate`, whole and streamed, and OpenAI's shapes."""

from __future__ import annotations

import concurrent.futures
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from tests.engine.tokenizers import byte_tokenizer
from vmem_kv.models import load
from vmem_kv.server.text import TextCodec

from .harness import MODEL, PATHS, TEMPLATE, Data, Running, events, good, text_of

ENDPOINTS = pytest.mark.parametrize("endpoint", ["completions", "chat"])


@functools.cache
def expected(folder: Path, prompt: str, n_tokens: int) -> str:
    """What transformers' own generate answers."""
    model, tokenizer = load(str(folder), attention="sdpa")
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=n_tokens)
    answer: str = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return answer


def prompt_of(endpoint: str) -> str:
    return "the sky is blue" if endpoint == "completions" else "user the sky is blue"


def pieces(endpoint: str, found: list[Data | str], index: int = 0) -> str:
    """The text of one choice of a stream."""
    text = ""
    for event in found:
        for choice in event["choices"] if isinstance(event, dict) else ():
            if choice["index"] == index:
                text += choice["text"] if endpoint == "completions" else choice["delta"].get("content", "")
    return text


@ENDPOINTS
def test_an_answer_is_what_generate_answers(running: Running, tiny_model_folder: Path, endpoint: str) -> None:
    response = running.post(endpoint)
    assert response.status_code == 200, response.text
    assert response.headers["x-request-id"].startswith("req_")
    data = response.json()
    assert text_of(endpoint, data).strip() == expected(tiny_model_folder, prompt_of(endpoint), 8).strip()
    n_prompt = 4 if endpoint == "completions" else 5
    assert data["usage"] == {
        "prompt_tokens": n_prompt,
        "completion_tokens": 8,
        "total_tokens": n_prompt + 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert data["choices"][0]["finish_reason"] == "length"
    assert data["model"] == MODEL
    assert data["object"] == ("text_completion" if endpoint == "completions" else "chat.completion")


@ENDPOINTS
def test_a_stream_says_the_same_piece_by_piece(running: Running, endpoint: str) -> None:
    whole = text_of(endpoint, running.post(endpoint).json())
    response = running.post(endpoint, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    found = events(response.text)
    assert found[-1] == "[DONE]"
    assert pieces(endpoint, found) == whole
    *parts, last = [event for event in found if isinstance(event, dict)]
    assert len(parts) > 3
    assert all(part["usage"] is None for part in parts)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8
    reasons = [c["finish_reason"] for part in parts for c in part["choices"]]
    assert reasons[-1] == "length"
    assert set(reasons[:-1]) == {None}
    plain = events(running.post(endpoint, stream=True).text)
    assert all("usage" not in event for event in plain if isinstance(event, dict))


@ENDPOINTS
@pytest.mark.parametrize("stream", [False, True])
def test_n_answers_come_from_seeds_that_repeat(running: Running, endpoint: str, stream: bool) -> None:
    def ask(seed: int) -> list[str]:
        response = running.post(endpoint, n=3, temperature=2.0, seed=seed, stream=stream)
        if stream:
            found = events(response.text)
            return [pieces(endpoint, found, i) for i in range(3)]
        data = response.json()
        assert [choice["index"] for choice in data["choices"]] == [0, 1, 2]
        return [text_of(endpoint, data, i) for i in range(3)]

    first = ask(7)
    assert first == ask(7)
    assert len(set(first)) > 1
    assert first != ask(8)


@ENDPOINTS
def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(running: Running, endpoint: str) -> None:
    whole = text_of(endpoint, running.post(endpoint).json())
    stop = whole.split()[2]
    choice = running.post(endpoint, stop=stop).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    text = choice["text"] if endpoint == "completions" else choice["message"]["content"]
    assert whole.startswith(text)
    assert stop not in text
    kept = running.post(endpoint, stop=[stop], include_stop_str_in_output=True).json()
    assert text_of(endpoint, kept) == text + stop


def test_logprobs_of_completions(running: Running) -> None:
    choice = running.post("completions", logprobs=3).json()["choices"][0]
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["text_offset"]) == 8
    for token, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert logprob <= 0
        assert len(top) == 3
        assert max(top, key=top.__getitem__) == token  # greedy
    streamed = events(running.post("completions", logprobs=3, stream=True).text)
    parts = [e["choices"][0]["logprobs"] for e in streamed if isinstance(e, dict)]
    for name in ("tokens", "text_offset"):
        assert [x for part in parts for x in part[name]] == found[name]


def test_logprobs_of_chat(running: Running) -> None:
    content = running.post("chat", logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 8
    for entry in content:
        assert entry["top_logprobs"][0]["token"] == entry["token"]
        assert len(entry["top_logprobs"]) == 2
        assert bytes(entry["bytes"]).decode() == entry["token"]
    assert running.post("chat", logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_the_bytes_of_tokens_make_the_characters_that_no_token_holds_alone() -> None:
    tokenizer = byte_tokenizer()
    codec = TextCodec(tokenizer, 128)
    text = "naïve 漢字 🌟\n\x00\x7f\xad"
    told = [codec.token_bytes(token_id) for token_id in tokenizer(text).input_ids]
    assert b"".join(part for part in told if part is not None).decode() == text
    codec.close()


@pytest.mark.parametrize(("written", "told"), [("<0xE2>", b"\xe2"), ("?", b"?"), ("漢", None)])
def test_the_bytes_of_a_token_that_says_nothing_alone(written: str, told: bytes | None) -> None:
    class Tokenizer:
        all_special_tokens: tuple[str, ...] = ()
        added_tokens_decoder: ClassVar[dict[int, object]] = {}
        chat_template = None

        def __call__(self, text: str, add_special_tokens: bool) -> Any:
            return SimpleNamespace(input_ids=[])

        def decode(self, token_ids: list[int]) -> str:
            return "\ufffd" * len(token_ids)

        def convert_ids_to_tokens(self, token_id: int) -> str:
            return written

    codec = TextCodec(Tokenizer(), 128)
    assert codec.token_bytes(5) == told
    codec.close()


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_before_the_answer(running: Running, stream: bool) -> None:
    whole = text_of("completions", running.post("completions").json())
    for prompt in ("the sky is blue", [3, 4, 5, 6]):
        response = running.post("completions", prompt=prompt, echo=True, stream=stream)
        text = pieces("completions", events(response.text)) if stream else text_of("completions", response.json())
        assert text == "the sky is blue" + whole


def test_prompts_may_be_many_and_may_be_tokens(running: Running) -> None:
    one = [text_of("completions", running.post("completions", prompt=p).json()) for p in ("the sky", "we look up")]
    many = running.post("completions", prompt=["the sky", "we look up"], n=2).json()
    assert [text_of("completions", many, i) for i in range(4)] == [one[0], one[0], one[1], one[1]]
    tokens = running.client.post("/tokenize", json={"prompt": "the sky"}).json()["tokens"]
    assert text_of("completions", running.post("completions", prompt=[tokens, tokens]).json(), 1) == one[0]
    found = events(running.post("completions", prompt=["the sky", "we look up"], stream=True).text)
    assert [pieces("completions", found, i) for i in range(2)] == one


def test_chat_without_a_maximum_ends_at_the_models_length(running: Running) -> None:
    data = running.post("chat", max_tokens=..., ignore_eos=True).json()
    assert data["usage"]["total_tokens"] == 128
    assert running.post("chat", max_tokens=..., max_completion_tokens=3).json()["usage"]["completion_tokens"] == 3


def test_conversations_have_turns_parts_and_what_clients_send_back(running: Running) -> None:
    answer = running.post("chat").json()["choices"][0]["message"]
    messages: list[Any] = [
        {"role": "developer", "content": "the"},
        {"role": "user", "content": [{"type": "text", "text": "sky is"}, {"type": "text", "text": " blue"}]},
        {**answer, "tool_calls": None, "annotations": []},
        {"role": "user", "content": "we look up", "name": "someone"},
    ]
    assert running.post("chat", messages=messages).status_code == 200
    tokenized = running.client.post("/tokenize", json={"messages": messages}).json()
    plain = f"system the user sky is blue assistant {answer['content']} user we look up "
    assert tokenized["tokens"] == running.client.post("/tokenize", json={"prompt": plain}).json()["tokens"]


def test_a_special_token_in_a_message_is_plain_text(running: Running) -> None:
    def tokens(**ask: Any) -> list[int]:
        found: list[int] = running.client.post("/tokenize", json=ask).json()["tokens"]
        return found

    end = 1  # <eos>
    assert end in tokens(prompt="the <eos> sky")
    assert end not in tokens(messages=[{"role": "user", "content": "the <eos> sky <eos>"}])
    assert "<eos>" not in TEMPLATE
    response = running.post("chat", messages=[{"role": "user", "content": "<eos> <pad> <|im_end|>"}])
    assert response.status_code == 200


def test_what_stands_behind_a_special_tokens_text_stays_there(running: Running) -> None:
    def content(text: str) -> list[int]:
        return tokens_of(running, [{"role": "user", "content": text}])

    plain = content("sky <  eos  >  1 sky <  eos  >  0 sky")
    assert content("sky <eos>1 sky <eos>0 sky") == plain
    assert len(content("<eos>" * 40 + "7")) == len(content("<  eos  > " * 40 + "7"))


def tokens_of(running: Running, messages: list[Data]) -> list[int]:
    found: list[int] = running.client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    return found


def test_tokens_become_text_again(running: Running) -> None:
    tokens = running.client.post("/tokenize", json={"model": MODEL, "prompt": "the sky is blue"}).json()
    assert tokens == {"tokens": [3, 4, 5, 6], "count": 4, "max_model_len": 128}
    text = running.client.post("/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert text == {"prompt": "the sky is blue"}


def test_many_at_once_say_what_each_says_alone(running: Running) -> None:
    asks = [
        (endpoint, {"max_tokens": 4 + i, "temperature": i % 2 * 1.5, "seed": i, "n": 1 + i % 2, "stream": i % 3 == 0})
        for i in range(12)
        for endpoint in PATHS
    ]

    def ask(item: tuple[str, Data]) -> list[str]:
        endpoint, fields = item
        response = running.post(endpoint, **fields)
        assert response.status_code == 200, response.text
        if fields["stream"]:
            return [pieces(endpoint, events(response.text), i) for i in range(fields["n"])]
        return [text_of(endpoint, response.json(), i) for i in range(fields["n"])]

    alone = [ask(item) for item in asks]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, asks)) == alone


def test_the_same_user_and_request_id_mix_nothing_up(running: Running) -> None:
    headers = {"X-Request-Id": "mine"}

    def ask(i: int) -> str:
        body = good("completions", user="me", max_tokens=2 + i % 5)
        response = running.client.post(PATHS["completions"], json=body, headers=headers)
        assert response.headers["x-request-id"] != "mine"
        return text_of("completions", response.json())

    whole = text_of("completions", running.post("completions").json())
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        assert all(whole.startswith(text) and text for text in pool.map(ask, range(30)))


def test_models_are_listed(running: Running) -> None:
    [model] = running.client.get("/v1/models").json()["data"]
    assert model["id"] == MODEL
    assert running.client.get(f"/v1/models/{MODEL}").json() == model
    assert running.client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_the_document_describes_what_may_be_sent(running: Running) -> None:
    document = running.client.get("/openapi.json").json()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    name = body["$ref"].rpartition("/")[2]
    assert "messages" in document["components"]["schemas"][name]["required"]
    assert "Message" in document["components"]["schemas"]
