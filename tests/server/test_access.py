"""Keys, names and the addresses to listen on."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmem_kv.errors import ConfigError
from vmem_kv.server import auth
from vmem_kv.server.auth import Hosts, Keys, is_loopback
from vmem_kv.server.errors import ApiError
from vmem_kv.server.run import bind, check_exposure

from .harness import PATHS, Running, good, serving

KEY = "sk-0123456789abcdef"
OTHER = "sk-fedcba9876543210"
ROUTES = [
    *(("POST", path) for path in (*PATHS.values(), "/tokenize", "/detokenize")),
    *(("GET", path) for path in ("/v1/models", "/v1/models/x", "/metrics", "/openapi.json", "/dashboard")),
    *(("GET", path) for path in ("/dashboard/data", "/nowhere", "/docs", "/")),
    ("DELETE", "/v1/sessions/x"),
    *(("GET", path) for path in ("/v1/saved_sessions",)),
    *(("POST", path) for path in ("/v1/saved_sessions", "/v1/saved_sessions/load")),
    ("DELETE", "/v1/saved_sessions/x"),
]


@pytest.fixture(scope="module")
def locked(tiny_model_folder: Path) -> Iterator[Running]:
    with serving(tiny_model_folder, keys=(KEY, OTHER)) as server:
        yield server


def test_these_are_all_routes(locked: Running) -> None:
    document = locked.client.get("/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()
    known = {path for _, path in ROUTES} | {"/health", "/ready"}
    found = {path.replace("{name}", "x").replace("{session_id}", "x") for path in document["paths"]}
    assert found <= known


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_needs_a_key(locked: Running, method: str, path: str) -> None:
    wrong = ["", KEY, "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", "Bearer \xff\xfe",
             f"bearer: {KEY}", "Bearer " + "x" * 9_000]  # fmt: skip
    for value in wrong:
        response = locked.client.request(method, path, headers={"Authorization": value.encode("latin-1")})
        assert response.status_code == 401, value
        assert response.json()["error"]["type"] == "invalid_request_error"
        assert KEY not in response.text
        assert "WWW-Authenticate" in response.headers
    missing = locked.client.request(method, path)
    assert missing.status_code == 401
    assert missing.json()["error"]["code"] is None
    given = locked.client.request(method, path, headers={"Authorization": f"Bearer {OTHER[:-1]}1"})
    assert given.json()["error"]["code"] == "invalid_api_key"
    allowed = locked.client.request(method, path, headers={"Authorization": f"Bearer {KEY}"})
    assert allowed.status_code != 401


def test_two_keys_in_one_request_are_none(locked: Running) -> None:
    headers = [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {OTHER}")]
    assert locked.client.get("/v1/models", headers=headers).status_code == 401


def test_health_and_readiness_need_none(locked: Running) -> None:
    assert locked.client.get("/health").status_code == 200
    assert locked.client.get("/ready").status_code == 200


def test_a_browser_may_give_the_key_as_a_password_for_the_dashboard_only(locked: Running) -> None:
    basic = {"Authorization": "Basic " + base64.b64encode(f"anybody:{KEY}".encode()).decode()}
    assert locked.client.get("/dashboard", headers=basic).status_code == 200
    assert locked.client.get("/dashboard/data", headers=basic).status_code == 200
    assert locked.client.get("/v1/models", headers=basic).status_code == 401
    assert locked.client.get("/dashboard").headers["WWW-Authenticate"].startswith("Basic")


def test_clients_of_different_keys_are_different_domains(locked: Running) -> None:
    seen: list[str] = []
    submit = locked.service.engine.submit

    def noted(request: object) -> object:
        seen.append(request.domain)  # type: ignore[attr-defined]
        return submit(request)  # type: ignore[arg-type]

    locked.service.engine.submit = noted  # type: ignore[method-assign,assignment]
    try:
        for key in (KEY, OTHER, KEY):
            body, headers = good("chat"), {"Authorization": f"Bearer {key}"}
            assert locked.client.post(PATHS["chat"], json=body, headers=headers).status_code == 200
    finally:
        locked.service.engine.submit = submit  # type: ignore[method-assign]
    assert seen[0] == seen[2] != seen[1]
    assert KEY not in "".join(seen)


def test_every_key_is_compared_whole_whatever_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    stock = auth.hmac.compare_digest

    def noted(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return stock(a, b)

    monkeypatch.setattr(auth.hmac, "compare_digest", noted)
    keys = Keys([KEY, OTHER])
    for given in (KEY, KEY[:5], "x" * 4_000):
        compared.clear()
        with contextlib.suppress(ApiError):
            keys.domain("/v1/models", [f"Bearer {given}"])
        assert compared == [(32, 32), (32, 32)]


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer  ", "Basic ", "Basic !", "Basic /w==", " ", f"Digest {KEY}"])
def test_headers_without_a_key(header: str) -> None:
    for path in ("/v1/models", "/dashboard"):
        with pytest.raises(ApiError) as caught:
            Keys([KEY]).domain(path, [header])
        assert caught.value.status == 401


@pytest.mark.parametrize("key", ["", "short", "with spaces inside", "schlüssel-lang", "line\nbreak-long"])
def test_keys_that_cannot_protect_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="API key"):
        Keys([key])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_who_listens_to_others_needs_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="API key"):
        check_exposure(host, has_keys=False)
    check_exposure(host, has_keys=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert is_loopback(host)
    check_exposure(host, has_keys=False)


def test_names_by_which_a_server_is_called() -> None:
    hosts = Hosts("127.0.0.1", ["box.local"])
    for name in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "box.local:8000"):
        hosts.check(name)
    for name in ("", "evil.test", "box.local.evil.test", "127.0.0.1.nip.io", "localhost.evil.test"):
        with pytest.raises(ApiError):
            hosts.check(name)
    Hosts("0.0.0.0").check("anything")


def test_a_port_in_use_is_refused_with_the_remedy() -> None:
    listener = bind("127.0.0.1", 0)
    try:
        with pytest.raises(ConfigError, match="--port"):
            bind("127.0.0.1", listener.getsockname()[1])
    finally:
        listener.close()
    with pytest.raises(ConfigError, match="--host"):
        bind("no such host", 1)
