"""Conversations by name, as clients and operators see them: wherever a session was, a turn computes what is new."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from vmem_kv.engine.config import EngineConfig
from vmem_kv.errors import UnknownSession
from vmem_kv.server.schemas import Asking
from vmem_kv.tiers.sessions import Level

from .harness import PATHS, Running, events, good, serving, text_of, until
from .test_commands import run
from .test_prefix_cache import TURNS_TEMPLATE, WORDS_ONLY, n_cached

KEY, OTHER = "sk-0123456789abcdef", "sk-fedcba9876543210"
MIB = 1 << 20
OPTIONS: dict[str, Any] = {"prefix_min_tokens": 1, "page_bytes": 4096, "host_bytes": 16 * MIB}
N_TURNS = 10
LONG = "the sky is blue " * 10
N_LONG = 40


@pytest.fixture(scope="module")
def sessions(tiny_model_folder: Path) -> Iterator[Running]:
    with serving(tiny_model_folder, **OPTIONS) as server:
        yield server


def numbers(running: Running, headers: dict[str, str] | None = None) -> dict[str, float]:
    """Every metric without labels by its name, and those of tiers as name{tier}."""
    text = running.client.get("/metrics", headers=headers).text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    found = {s.name: s.value for s in samples if not s.labels}
    return found | {f"{s.name}{{{s.labels['tier']}}}": s.value for s in samples if "tier" in s.labels}


def converse(
    running: Running, endpoint: str, between: Callable[[int], None], **fields: Any
) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Hold a conversation; return what was answered, and of each turn the tokens of its prompt, those that were
    cached, and those that the engine computed."""
    running.service.codec._tokenizer.chat_template = TURNS_TEMPLATE
    messages: list[dict[str, str]] = []
    prompt = ""
    answers: list[str] = []
    counts: list[tuple[int, int, int]] = []
    for turn in range(N_TURNS):
        question = ("the sky", "is blue")[turn % 2]
        messages.append({"role": "user", "content": question})
        prompt += f"{question} "
        asked = {"messages": messages} if endpoint == "chat" else {"prompt": prompt}
        before = numbers(running)["vmem_kv_prompt_tokens_total"]
        ask = {**asked, "max_tokens": 4, "logit_bias": WORDS_ONLY, "ignore_eos": True, **fields}
        data = running.post(endpoint, **ask).json()
        answers.append(text_of(endpoint, data))
        messages.append({"role": "assistant", "content": answers[-1]})
        prompt += f"{answers[-1]} "
        n_computed = int(numbers(running)["vmem_kv_prompt_tokens_total"] - before)
        counts.append((data["usage"]["prompt_tokens"], n_cached(data), n_computed))
        if turn < N_TURNS - 1:
            between(turn)
    return answers, counts


def check_only_new(counts: list[tuple[int, int, int]]) -> None:
    """Each turn's prompt computes the last answer's last token, and what came after it."""
    assert counts[0][1] == 0
    for (n_before, _, _), (n_prompt, n_found, n_computed) in itertools.pairwise(counts):
        assert n_found == n_before + 4 - 1
        assert n_computed == n_prompt - n_found
    assert {n_computed for _, _, n_computed in counts[1:]} == {counts[1][2]}


PARKS: dict[str, Callable[[int], list[Level]]] = {
    "never": lambda turn: [],
    "host": lambda turn: [Level.HOST],
    "disk": lambda turn: [Level.HOST, Level.DISK],
    "mixed": lambda turn: [Level.HOST, Level.DISK][: turn % 3],
}


@pytest.fixture(scope="module")
def without_caching(tiny_model_folder: Path) -> dict[str, list[str]]:
    """What is answered where nothing is kept."""
    with serving(tiny_model_folder, prefix_caching=False, page_bytes=4096) as running:
        found = {}
        for endpoint in PATHS:
            found[endpoint], counts = converse(running, endpoint, lambda turn: None, session_id="unheard of")
            assert all(n_computed == n_prompt for n_prompt, _, n_computed in counts)
        return found


@pytest.mark.parametrize("endpoint", list(PATHS))
@pytest.mark.parametrize("parks", list(PARKS))
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_ten_turns_compute_only_what_is_new_and_say_the_same_as_without_caching(
    tiny_model_folder: Path,
    tmp_path: Path,
    without_caching: dict[str, list[str]],
    endpoint: str,
    parks: str,
    prefix_caching: bool,
) -> None:
    tiers = {**OPTIONS, "disk_folder": str(tmp_path), "disk_bytes": 16 * MIB, "prefix_caching": prefix_caching}
    with serving(tiny_model_folder, **tiers) as running:
        running.check_idle()

        def park(turn: int) -> None:
            for level in PARKS[parks](turn):
                assert running.service.engine.park_session("tea") is level
            where = {level.value: float(level.value == "device") for level in Level if level is not Level.IN_USE}
            for level in PARKS[parks](turn)[-1:]:
                where = {**dict.fromkeys(where, 0.0), level.value: 1.0}
            after = numbers(running)
            assert {name: after[f"vmem_kv_sessions{{{name}}}"] for name in where} == where
            assert (running.engine.snapshot().cache.n_live_pages == 0) == (where["device"] == 0)

        answers, counts = converse(running, endpoint, park, session_id="tea")
        assert answers == without_caching[endpoint]
        check_only_new(counts)
        after = numbers(running)
        assert after["vmem_kv_session_tokens_total"] == sum(n for _, n, _ in counts)
        assert after["vmem_kv_sessions_resumed_total"] == N_TURNS - 1
        assert (after["vmem_kv_tier_in_bytes_total"] > 0) == (parks != "never")
        assert running.service.engine.park_session("tea") is Level.HOST
        running.check_idle()
        assert running.engine.snapshot().cache.n_live_pages == 0


def test_a_conversation_that_is_edited_says_the_same_as_without_caching(tiny_model_folder: Path) -> None:
    prompts = [LONG, LONG + "up to see", "the sky " * 4, LONG + "up to it", LONG[:40]]
    said = []
    for options in (OPTIONS, {"prefix_caching": False}):
        with serving(tiny_model_folder, **options) as running:
            texts = []
            for i, prompt in enumerate(prompts):
                data = running.post("completions", prompt=prompt, session_id="tea").json()
                texts.append(text_of("completions", data))
                if options is OPTIONS and i % 2:
                    running.service.engine.park_session("tea")
            said.append(texts)
    assert said[0] == said[1]


def check_strangers(running: Running) -> None:
    """A name means nothing under another salt, and nothing without it."""
    salts = [None, "a", "b", "a\0", "\0a", "key-0"]
    for n_expected in (0, N_LONG + 1):
        for i, salt in enumerate(salts):
            fields = {} if salt is None else {"cache_salt": salt}
            ask = {"prompt": LONG + "the the", "max_tokens": 2, "session_id": "tea", **fields}
            assert n_cached(running.post("completions", **ask).json()) == n_expected, salt
            until(running.is_idle)
            sessions = running.engine.snapshot().tiers
            assert sessions is not None
            n_kept = sum(sessions.n_sessions_by_tier.values())
            assert n_kept == (i + 1 if n_expected == 0 else len(salts))


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_salt_separates_sessions(tiny_model_folder: Path, prefix_caching: bool) -> None:
    with serving(tiny_model_folder, **OPTIONS, prefix_caching=prefix_caching) as running:
        check_strangers(running)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_salt_that_sessions_ignore_is_found(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, prefix_caching: bool
) -> None:
    monkeypatch.setattr(Asking, "sharing_domain", lambda self, domain: domain)
    options = {**OPTIONS, "prefix_caching": prefix_caching}
    with serving(tiny_model_folder, **options) as running, pytest.raises(AssertionError):
        check_strangers(running)


def test_clients_of_different_keys_reach_no_session_of_each_other(tiny_model_folder: Path) -> None:
    with serving(tiny_model_folder, keys=(KEY, OTHER), **OPTIONS) as running:
        found = []
        for i, key in enumerate((KEY, OTHER, KEY, OTHER)):
            headers = {"Authorization": f"Bearer {key}"}
            ask = good("completions", prompt=LONG, session_id="tea")
            found.append(n_cached(running.client.post(PATHS["completions"], json=ask, headers=headers).json()))
            until(running.is_idle)
            assert running.service.engine.park_session("tea", f"key-{i % 2}") is Level.HOST
            with pytest.raises(UnknownSession):
                running.service.engine.park_session("tea")
        assert found == [0, 0, N_LONG - 1, N_LONG - 1]


@pytest.mark.parametrize("endpoint", list(PATHS))
def test_usage_of_a_stream_says_what_the_session_had(sessions: Running, endpoint: str) -> None:
    prompt: dict[str, Any] = {"prompt": LONG} if endpoint == "completions" else {}
    prompt = prompt or {"messages": [{"role": "user", "content": LONG}]}
    ask = {**prompt, "session_id": f"stream of {endpoint}", "cache_salt": endpoint}
    sessions.post(endpoint, **ask)
    *_, last, _ = events(sessions.post(endpoint, **ask, stream=True, stream_options={"include_usage": True}).text)
    assert isinstance(last, dict)
    assert n_cached(last) == last["usage"]["prompt_tokens"] - 1


@pytest.mark.parametrize("endpoint", list(PATHS))
@pytest.mark.parametrize("name", ["", 5, "x" * 257, ["a"], {"a": "b"}])
def test_names_that_are_none_are_refused(sessions: Running, endpoint: str, name: object) -> None:
    response = sessions.post(endpoint, session_id=name)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "session_id"


def test_any_name_of_bounded_length_will_do_and_null_is_none(sessions: Running) -> None:
    for name in ("x" * 256, "\0", "../../etc/passwd", "\u2028é", None):
        assert sessions.post("completions", session_id=name).status_code == 200


def test_a_session_goes_on_with_one_prompt_only(sessions: Running) -> None:
    response = sessions.post("completions", prompt=["the sky", "is blue"], session_id="tea")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "session_id"


def test_a_client_that_leaves_leaves_its_session_what_was_computed(sessions: Running) -> None:
    ask = good("completions", prompt=LONG, session_id="leaver", max_tokens=60, ignore_eos=True, stream=True)
    ask["cache_salt"] = "leaver"
    with sessions.client.stream("POST", PATHS["completions"], json=ask) as response:
        next(response.iter_lines())
    until(sessions.is_idle)
    data = sessions.post("completions", prompt=LONG, session_id="leaver", cache_salt="leaver").json()
    assert n_cached(data) == N_LONG - 1


def test_the_dashboard_shows_where_sessions_are(sessions: Running) -> None:
    sessions.post("completions", prompt=LONG, session_id="dashboard", cache_salt="dashboard")
    until(sessions.is_idle)
    data = sessions.client.get("/dashboard/data").json()
    assert data["tiers"]["n_sessions"]["device"] > 0
    n_on_host = data["tiers"]["n_sessions"]["host"]
    assert sessions.service.engine.park_session("dashboard", "\0dashboard") is Level.HOST
    data = sessions.client.get("/dashboard/data").json()
    assert data["tiers"]["n_sessions"]["host"] == n_on_host + 1
    assert 0 < data["tiers"]["host_bytes"] <= data["tiers"]["max_host_bytes"] == 16 * MIB


def test_where_pages_run_short_parked_requests_say_the_same(tiny_model_folder: Path) -> None:
    prompts = ["the sky is blue " * 2 + word for word in ("because", "light", "of", "short", "waves", "scatters")]

    def answers(**options: Any) -> tuple[list[str], dict[str, float]]:
        with serving(tiny_model_folder, page_bytes=4096, max_num_seqs=6, prefix_caching=False, **options) as running:
            ask = {"prompt": prompts, "max_tokens": 80, "ignore_eos": True, "seed": 1, "temperature": 1.0}
            data = running.post("completions", **ask).json()
            return [text_of("completions", data, i) for i in range(len(prompts))], numbers(running)

    plenty, _ = answers()
    short, after = answers(host_bytes=16 * MIB, max_bytes=9 * 4 * 4096, layout="per_layer")
    assert short == plenty
    assert after["vmem_kv_parked_sequences_total"] > 0
    assert after["vmem_kv_restored_sequences_total"] > 0
    assert after["vmem_kv_tier_bytes{host}"] == 0


def test_the_command_hands_its_options_on(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[EngineConfig] = []

    def look(model: Any, tokenizer: Any, config: EngineConfig, **others: Any) -> int:
        seen.append(config)
        return 0

    monkeypatch.setattr("vmem_kv.server.serving.serve_model", look)
    tiers = ["--host-memory", "4m", "--disk-memory", "8m", "--disk-folder", str(tmp_path), "--session-ttl", "1.5"]
    for options in (tiers, []):
        assert run("serve", str(tiny_model_folder), "--port", "0", *options).exit_code == 0
    found = [(c.host_bytes, c.disk_bytes, c.disk_folder, c.session_ttl_s) for c in seen]
    assert found == [(4 * MIB, 8 * MIB, str(tmp_path), 1.5), (0, 0, None, 60.0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host-memory", "1m"], "--host-memory is 1048576; a tier needs at least a frame"),
        (["--host-memory", "900000g"], "lower --host-memory"),
        (["--host-memory", "4m", "--disk-memory", "1m"], "--disk-memory is set without --disk-folder"),
        (["--disk-memory", "1m", "--disk-folder", "."], "--disk-memory is set without --host-memory"),
        (["--host-memory", "4m", "--disk-memory", "1m", "--disk-folder", "/nowhere"], "choose a directory"),
    ],
)
def test_tiers_that_cannot_be_are_one_line_that_names_the_remedy(
    tiny_model_folder: Path, arguments: list[str], message: str
) -> None:
    result = run("serve", str(tiny_model_folder), "--port", "0", *arguments)
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_top_and_help_speak_of_sessions(sessions: Running) -> None:
    shown = run("top", "--url", sessions.url, "--once")
    assert shown.exit_code == 0, shown.output
    assert "sessions on device" in shown.stdout
    text = run("serve", "--help").stdout
    for word in ("--host-memory", "--disk-memory", "--disk-folder", "--session-ttl", "session_id", "Sessions"):
        assert word in text
