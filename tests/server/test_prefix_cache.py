"""Cached prefixes as clients and operators see them: in `usage`, metrics and dashboard, and never those of others."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from vmem_kv.server.schemas import Asking

from .harness import PATHS, Running, events, good, serving, text_of

KEY, OTHER = "sk-0123456789abcdef", "sk-fedcba9876543210"
TURNS_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
OPTIONS: dict[str, Any] = {"prefix_min_tokens": 1, "page_bytes": 4096}
WORDS_ONLY = {str(token_id): -100 for token_id in range(3)}
"""A bias against special tokens, which no text brings back."""
LONG = "the sky is blue " * 10
N_LONG = 40


@pytest.fixture(scope="module")
def caching(tiny_model_folder: Path) -> Iterator[Running]:
    with serving(tiny_model_folder, **OPTIONS) as server:
        yield server


def numbers(running: Running, headers: dict[str, str] | None = None) -> dict[str, float]:
    text = running.client.get("/metrics", headers=headers).text
    return {s.name: s.value for f in text_string_to_metric_families(text) for s in f.samples if not s.labels}


def n_cached(data: dict[str, Any]) -> int:
    value: int = data["usage"]["prompt_tokens_details"]["cached_tokens"]
    return value


def ten_turns(running: Running) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Hold a conversation; return what was answered, and of each turn the tokens of its prompt, those that were
    cached, and those that the engine computed."""
    running.service.codec._tokenizer.chat_template = TURNS_TEMPLATE
    messages: list[dict[str, str]] = []
    answers, counts = [], []
    for turn in range(10):
        messages.append({"role": "user", "content": ("the sky", "is blue")[turn % 2]})
        before = numbers(running)["vmem_kv_prompt_tokens_total"]
        data = running.post("chat", messages=messages, max_tokens=4, logit_bias=WORDS_ONLY, ignore_eos=True).json()
        answers.append(text_of("chat", data))
        messages.append({"role": "assistant", "content": answers[-1]})
        n_computed = int(numbers(running)["vmem_kv_prompt_tokens_total"] - before)
        counts.append((data["usage"]["prompt_tokens"], n_cached(data), n_computed))
    return answers, counts


def test_a_turn_computes_only_what_is_new_and_says_the_same_as_without_a_cache(tiny_model_folder: Path) -> None:
    with serving(tiny_model_folder, **OPTIONS) as running:
        answers, counts = ten_turns(running)
        after = numbers(running)
    for (n_before, _, _), (n_prompt, n_found, n_computed) in itertools.pairwise(counts):
        assert n_prompt == n_before + 4 + 4  # an answer, and a question between two roles
        assert n_found == n_before + 4 - 1  # all but the token that was sampled last
        assert n_computed == 1 + 4
    assert after["vmem_kv_prefix_hit_tokens_total"] == sum(n for _, n, _ in counts)
    assert after["vmem_kv_prefix_looked_up_tokens_total"] == sum(n - 1 for n, _, _ in counts)
    assert after["vmem_kv_prefix_adoptions_total"] == 9
    with serving(tiny_model_folder, prefix_caching=False) as running:
        same_answers, counts = ten_turns(running)
        assert "vmem_kv_prefix_hits_total" not in numbers(running)
    assert same_answers == answers
    assert [(n, c) for _, n, c in counts] == [(0, n) for n, _, _ in counts]


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_usage_says_what_was_cached(caching: Running, endpoint: str) -> None:
    prompt: dict[str, Any] = {"prompt": LONG} if endpoint == "completions" else {}
    prompt = prompt or {"messages": [{"role": "user", "content": LONG}]}
    ask = {**prompt, "cache_salt": f"usage of {endpoint}", "stream_options": {"include_usage": True}, "stream": True}
    seen = []
    for _ in range(2):
        *_, last, _ = events(caching.post(endpoint, **ask).text)
        assert isinstance(last, dict)
        seen.append((last["usage"]["prompt_tokens"], n_cached(last)))
    n_prompt = N_LONG + (endpoint == "chat")
    assert seen == [(n_prompt, 0), (n_prompt, n_prompt - 1)]
    ask.pop("stream_options")
    assert n_cached(caching.post(endpoint, **{**ask, "stream": False, "n": 3}).json()) == n_prompt - 1


def test_usage_adds_up_over_prompts(caching: Running) -> None:
    ask = {"cache_salt": "many prompts", "max_tokens": 1}
    caching.post("completions", prompt=LONG, **ask)
    data = caching.post("completions", prompt=[LONG + "sky", "blue " * 5, LONG], **ask).json()
    assert n_cached(data) == N_LONG + N_LONG - 1


def check_salts(running: Running) -> None:
    """Only requests of the same salt find each other."""
    salts = [None, "a", "b", "a\0", "\0a", "key-0"]
    for n_expected in (0, N_LONG + 1):
        for salt in salts:
            fields = {} if salt is None else {"cache_salt": salt}
            data = running.post("completions", prompt=LONG + "the the", max_tokens=2, **fields).json()
            assert n_cached(data) == n_expected, salt


def test_a_salt_separates(tiny_model_folder: Path) -> None:
    with serving(tiny_model_folder, **OPTIONS) as running:
        check_salts(running)


def test_a_salt_that_is_ignored_is_found(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Asking, "sharing_domain", lambda self, domain: domain)
    with serving(tiny_model_folder, **OPTIONS) as running, pytest.raises(AssertionError):
        check_salts(running)


def test_clients_of_different_keys_share_nothing(tiny_model_folder: Path) -> None:
    with serving(tiny_model_folder, keys=(KEY, OTHER), **OPTIONS) as running:
        found = []
        for key in (KEY, OTHER, KEY, OTHER):
            headers = {"Authorization": f"Bearer {key}"}
            ask = good("completions", prompt=LONG)
            found.append(n_cached(running.client.post(PATHS["completions"], json=ask, headers=headers).json()))
        assert found == [0, 0, N_LONG - 1, N_LONG - 1]


@pytest.mark.parametrize("salt", ["", 5, "x" * 257, ["a"]])
def test_salts_that_are_none_are_refused(caching: Running, salt: object) -> None:
    response = caching.post("chat", cache_salt=salt)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "cache_salt"


def test_the_dashboard_tells_cached_from_live(caching: Running) -> None:
    caching.post("completions", prompt=LONG, cache_salt="dashboard")
    caching.post("completions", prompt=LONG, cache_salt="dashboard")
    caching.check_idle()
    data = caching.client.get("/dashboard/data").json()
    states = [slot["state"] for slot in data["slots"]]
    assert states.count("cached") == numbers(caching)["vmem_kv_prefix_entries"] > 0
    assert "active" not in states
    assert data["pages"]["live"] == 0
    assert data["pages"]["cached"] == numbers(caching)["vmem_kv_prefix_pages"] > 0
    assert 0 < data["hit_share"] < 1
