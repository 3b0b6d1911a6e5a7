"""A client deletes a session that it left, and reaches no other client's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from vmem_kv.server.schemas import SessionAsk

from ..engine.harness import held_after
from .harness import PATHS, Running, good, serving, until
from .test_prefix_cache import n_cached
from .test_sessions import KEY, LONG, N_LONG, OPTIONS, OTHER


@pytest.fixture(scope="module")
def sessions(tiny_model_folder: Path) -> Iterator[Running]:
    with serving(tiny_model_folder, **{**OPTIONS, "prefix_caching": False}) as server:
        yield server


def delete(
    running: Running, name: str, headers: Mapping[str, str] | None = None, query: Mapping[str, str] | None = None
) -> httpx.Response:
    return running.client.delete(f"/v1/sessions/{quote(name, safe='')}", params=query, headers=headers)


def code_of(response: httpx.Response) -> tuple[int, str | None]:
    return response.status_code, response.json().get("error", {}).get("code")


@pytest.mark.parametrize(
    "name", ["tea", "x" * 256, "\0", "a/b/../c", "../../etc/passwd", "\u2028é ?#%2F", "\n", "a\nb\n\n"]
)
def test_a_client_deletes_what_it_left(sessions: Running, name: str) -> None:
    for _ in range(2):  # and the second time it begins with nothing
        data = sessions.post("completions", prompt=LONG, session_id=name).json()
        assert n_cached(data) == 0
        until(sessions.is_idle)
        response = delete(sessions, name)
        assert (response.status_code, response.json()["deleted"]) == (200, True)
        assert response.json()["id"] == name
        assert code_of(delete(sessions, name)) == (404, "session_not_found")


@pytest.mark.parametrize("names", [("tea", "tea\n"), ("tea\n", "tea")])
def test_a_name_is_compared_to_its_last_character(sessions: Running, names: tuple[str, str]) -> None:
    for name in names:
        sessions.post("completions", prompt=LONG, session_id=name)
        until(sessions.is_idle)
    first, second = names
    assert delete(sessions, first).json()["id"] == first
    assert code_of(delete(sessions, first)) == (404, "session_not_found")
    assert delete(sessions, second).json()["id"] == second


def test_no_other_name_is_taken_for_the_model(sessions: Running) -> None:
    assert sessions.client.get("/v1/models/tiny").status_code == 200
    assert code_of(sessions.client.get("/v1/models/tiny%0A")) == (404, "model_not_found")


def check_strangers(running: Running) -> None:
    ask = good("completions", prompt=LONG, session_id="tea", cache_salt="a")
    mine, other = ({"Authorization": f"Bearer {key}"} for key in (KEY, OTHER))
    running.client.post(PATHS["completions"], json=ask, headers=mine)
    until(running.is_idle)
    for headers, query in ((other, {"cache_salt": "a"}), (mine, {}), (mine, {"cache_salt": "b"}), (other, {})):
        assert code_of(delete(running, "tea", headers, query)) == (404, "session_not_found")
    assert delete(running, "tea").status_code == 401
    assert n_cached(running.client.post(PATHS["completions"], json=ask, headers=mine).json()) == N_LONG - 1
    until(running.is_idle)
    assert delete(running, "tea", mine, {"cache_salt": "a"}).status_code == 200


def test_nobody_deletes_a_session_of_another_key_or_salt(tiny_model_folder: Path) -> None:
    with serving(tiny_model_folder, keys=(KEY, OTHER), **OPTIONS) as running:
        check_strangers(running)


@pytest.mark.parametrize("domain", ["key-0\0a", "key-0"])
def test_a_route_that_takes_all_clients_for_one_is_found(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, domain: str
) -> None:
    monkeypatch.setattr(SessionAsk, "sharing_domain", lambda self, of_client: domain, raising=False)
    with serving(tiny_model_folder, keys=(KEY, OTHER), **OPTIONS) as running, pytest.raises(AssertionError):
        check_strangers(running)


def test_what_is_in_use_stays(sessions: Running) -> None:
    ask = good("completions", prompt=LONG, session_id="busy", max_tokens=60, ignore_eos=True)
    sessions.client.post(PATHS["completions"], json=ask)
    until(sessions.is_idle)
    with (
        held_after(3, sessions.engine),
        sessions.client.stream("POST", PATHS["completions"], json={**ask, "stream": True}),
    ):
        until(lambda: sessions.engine.snapshot().n_running == 1)
        assert code_of(delete(sessions, "busy")) == (409, "session_in_use")
    until(sessions.is_idle)
    assert delete(sessions, "busy").status_code == 200


@pytest.mark.parametrize(
    ("name", "query", "param"),
    [
        ("", {}, "session_id"),
        ("x" * 257, {}, "session_id"),
        ("tea", {"cache_salt": ""}, "cache_salt"),
        ("tea", {"cache_salt": "x" * 257}, "cache_salt"),
        ("tea", {"other": "x"}, "other"),
    ],
)
def test_what_is_wrong_is_said(sessions: Running, name: str, query: dict[str, str], param: str) -> None:
    response = delete(sessions, name, query=query)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_without_sessions_there_is_none_to_delete(tiny_model_folder: Path) -> None:
    with serving(tiny_model_folder) as running:
        assert code_of(delete(running, "tea")) == (404, "session_not_found")
