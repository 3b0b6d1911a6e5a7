"""What clients, operators and the engine do to a server: nobody else's tokens change, and no page is left."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from vmem_kv.errors import InvariantError
from vmem_kv.server.limits import Limits

from .harness import PATHS, WAIT_S, Running, events, good, serving, text_of, until

BOTH = ("completions", "chat")


def head(endpoint: str, body: bytes, *extra: str) -> bytes:
    lines = (
        f"POST {PATHS[endpoint]} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *extra,
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


@contextlib.contextmanager
def connected(running: Running) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", running.port), timeout=WAIT_S) as connection:
        yield connection


def send_long(connection: socket.socket, endpoint: str, **fields: Any) -> None:
    body = json.dumps(good(endpoint, max_tokens=100, ignore_eos=True, **fields)).encode()
    connection.sendall(head(endpoint, body) + body)


def read_all(connection: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65_536):
            data += piece
    return data


@contextlib.contextmanager
def slowed(running: Running) -> Iterator[threading.Semaphore]:
    """Let the engine take a step only when the semaphore allows it; afterwards it runs freely."""
    steps, engine, is_over = threading.Semaphore(0), running.engine, threading.Event()
    stock = engine.step

    def step() -> Any:
        while not steps.acquire(timeout=0.01):
            if is_over.is_set():
                break
            if not any(engine._requests):
                return []
        return stock()

    engine.step = step  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        is_over.set()
        engine.step = stock  # type: ignore[method-assign]


def hang_up(connection: socket.socket, hard: bool) -> None:
    if hard:  # a reset instead of an orderly end
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", BOTH)
def test_who_hangs_up_has_no_memory_two_steps_later(running: Running, endpoint: str, stream: bool, hard: bool) -> None:
    whole = text_of(endpoint, running.post(endpoint).json())
    for n_steps in (1, 3, 10):
        with slowed(running) as steps:
            with connected(running) as connection:
                send_long(connection, endpoint, stream=stream)
                until(lambda: running.engine.has_work)
                steps.release(n_steps)
                until(lambda: running.engine.memory.cache.stats().n_live_pages > 0)
                assert not running.is_idle()
                seen = threading.Event()
                abort = running.service.engine.abort

                def noted(request_id: str, abort: Any = abort, seen: threading.Event = seen) -> None:
                    abort(request_id)
                    seen.set()

                running.service.engine.abort = noted  # type: ignore[method-assign]
                hang_up(connection, hard)
                assert seen.wait(WAIT_S)
                running.service.engine.abort = abort  # type: ignore[method-assign]
            n_before = running.engine.snapshot().n_steps
            steps.release(2)
            until(running.is_idle)
            assert running.engine.snapshot().n_steps <= n_before + 2
    assert text_of(endpoint, running.post(endpoint).json()) == whole
    metrics = running.client.get("/metrics").text
    assert 'vmem_kv_requests_ended_early_total{cause="disconnect"}' in metrics


def test_a_storm_of_hang_ups_leaves_nothing(running: Running) -> None:
    def one(i: int) -> None:
        with connected(running) as connection:
            send_long(connection, BOTH[i % 2], stream=bool(i % 3), n=1 + i % 2)
            if i % 4:
                connection.recv(1 + i * 37)
            hang_up(connection, hard=bool(i % 5))

    whole = text_of("chat", running.post("chat").json())
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(60)))
    running.let_it_accept()
    running.check_idle()
    assert text_of("chat", running.post("chat").json()) == whole


def test_a_full_queue_is_429_with_a_time_to_come_back(tiny_model_folder: Path) -> None:
    with serving(tiny_model_folder, max_num_seqs=1, max_queued=1) as running:
        with slowed(running), connected(running) as first, connected(running) as second:
            send_long(first, "chat")
            until(lambda: running.engine.has_work)
            send_long(second, "completions", stream=True)
            until(lambda: running.service.engine.health().n_open == 2)
            for endpoint in BOTH:
                for stream in (False, True):
                    response = running.post(endpoint, stream=stream)
                    assert response.status_code == 429
                    assert response.headers["retry-after"] == "1"
                    error = response.json()["error"]
                    assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
            assert running.service.engine.n_rejected == 4
        running.check_idle()
        assert running.post("chat").status_code == 200


def test_an_answer_that_takes_too_long_is_ended(tiny_model_folder: Path) -> None:
    with serving(tiny_model_folder, limits=Limits(request_timeout_s=2.0, ping_s=0.01)) as running:
        with slowed(running) as steps:
            response = running.post("chat")
            assert response.status_code == 504
            assert response.json()["error"]["code"] == "timeout"
            steps.release(2)
            response = running.post("completions", stream=True)
            assert response.status_code == 200
            assert ": ping" in response.text
            found = events(response.text)
            assert isinstance(found[-1], dict)
            assert found[-1]["error"]["code"] == "timeout"
        running.check_idle()


def test_who_does_not_read_is_cut_off_and_others_are_served(
    tiny_model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "vmem_kv.server")
    with serving(tiny_model_folder, limits=Limits(send_timeout_s=0.3, grace_s=5.0), max_num_seqs=8) as running:
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            slow.settimeout(WAIT_S)
            slow.connect(("127.0.0.1", running.port))
            send_long(slow, "chat", n=8, stream=True, logprobs=True, top_logprobs=20)
            assert running.post("completions").status_code == 200
            until(lambda: any(getattr(r, "fields", {}).get("cause") == "slow_reader" for r in caplog.records))
            assert b"[DONE]" not in read_all(slow)
        running.check_idle()
        assert running.post("completions").status_code == 200


@contextlib.contextmanager
def lazy_clients(running: Running) -> Iterator[list[socket.socket]]:
    """Connections on which the beginning of a head was sent."""
    with contextlib.ExitStack() as stack:
        lazy = [stack.enter_context(connected(running)) for _ in range(20)]
        for connection in lazy:
            with contextlib.suppress(ConnectionError):  # cut off already
                connection.sendall(b"POST /v1/chat")
        yield lazy


def test_who_is_lazy_keeps_nobody_waiting(running: Running) -> None:
    with lazy_clients(running):
        assert running.post("chat").status_code == 200


def test_heads_must_arrive_in_time(tiny_model_folder: Path) -> None:
    with serving(tiny_model_folder, limits=Limits(head_timeout_s=0.3)) as running, lazy_clients(running) as lazy:
        assert all(read_all(connection) == b"" for connection in lazy)


def test_bodies_must_arrive_in_time(tiny_model_folder: Path) -> None:
    with (
        serving(tiny_model_folder, limits=Limits(head_timeout_s=WAIT_S, body_timeout_s=0.3)) as running,
        connected(running) as connection,
    ):
        connection.sendall(head("chat", b"0123456789") + b"01234")
        assert read_all(connection).startswith(b"HTTP/1.1 408")


def test_a_second_head_must_arrive_in_time(tiny_model_folder: Path) -> None:
    """On a connection that served one. Where this process was too slow for the first, it tries again."""
    with serving(tiny_model_folder, limits=Limits(head_timeout_s=0.3)) as running:
        for _ in range(50):
            with connected(running) as connection, contextlib.suppress(ConnectionError):
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                data = b""
                while b'"ok"}' not in data and (piece := connection.recv(4_096)):
                    data += piece
                if b'"ok"}' not in data:
                    continue
                connection.sendall(b"GET /hea")
                assert read_all(connection) == b""
                return
        raise AssertionError("no first head was answered")


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"A: b\r\n" * 1_000 + b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9999999999999999999999\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 2097152\r\n\r\n",
        b"\x00\x01\x02\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_no_proper_request_is_refused_in_the_same_form(running: Running, request_head: bytes) -> None:
    with connected(running) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(request_head)
        data = b""
        with contextlib.suppress(ConnectionError):
            while b'"code"' not in data and (piece := connection.recv(65_536)):
                data += piece
    status = int(data.split()[1])
    assert status in (400, 413, 421, 431)
    assert b'{"error":{"message":' in data
    assert running.post("chat").status_code == 200


def test_a_name_that_points_here_is_not_ours(running: Running) -> None:
    for name, status in (("evil.test", 421), ("127.0.0.1.evil.test", 421), ("localhost:1", 200), ("[::1]:80", 200)):
        assert running.client.get("/v1/models", headers={"Host": name}).status_code == status


def test_one_request_that_fails_is_500_and_harms_no_other(running: Running) -> None:
    whole = text_of("chat", running.post("chat").json())
    stock = running.engine._append

    def planted(sequence: Any, sampled: Any, updates: Any) -> None:
        if sequence.params.max_tokens == 13:
            running.engine._fail([sequence], ValueError("a secret /path 0xdeadbeef"), updates)
        else:
            stock(sequence, sampled, updates)

    running.engine._append = planted  # type: ignore[method-assign]
    try:
        response = running.post("completions", max_tokens=13)
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert "secret" not in response.text
        found = events(running.post("chat", max_tokens=13, stream=True).text)
        assert isinstance(found[-1], dict)
        assert found[-1]["error"]["type"] == "server_error"
        assert text_of("chat", running.post("chat").json()) == whole
    finally:
        running.engine._append = stock  # type: ignore[method-assign]


def test_a_step_that_hangs_is_not_ready(tiny_model_folder: Path) -> None:
    with serving(tiny_model_folder, limits=Limits(silent_s=0.4, grace_s=0.5)) as running:
        until(lambda: running.client.get("/ready").json() == {"status": "ready", "reasons": [], "mapper": "alive"})
        release = threading.Event()
        stock = running.engine.step

        def hanging() -> Any:
            release.wait(WAIT_S)
            return stock()

        running.engine.step = hanging  # type: ignore[method-assign]
        with connected(running) as connection:
            send_long(connection, "chat")
            until(lambda: running.client.get("/ready").status_code == 503)
            assert running.client.get("/health").status_code == 200
            assert "no life" in running.client.get("/ready").json()["reasons"][0]
            release.set()
            until(lambda: running.client.get("/ready").status_code == 200)


def test_a_dead_mapper_is_degraded_and_the_tokens_are_the_same(running: Running) -> None:
    whole = text_of("chat", running.post("chat").json())
    premapper = running.engine.memory.premapper
    assert premapper is not None
    health = type(premapper).is_alive
    try:
        type(premapper).is_alive = property(lambda _: False)  # type: ignore[assignment,method-assign]
        state = running.client.get("/ready")
        assert (state.status_code, state.json()["mapper"]) == (200, "degraded")
        assert text_of("chat", running.post("chat").json()) == whole
    finally:
        type(premapper).is_alive = health  # type: ignore[method-assign]


def test_the_engines_death_answers_everyone_and_ends_the_server_with_1(tiny_model_folder: Path) -> None:
    with serving(tiny_model_folder) as running:
        with slowed(running) as steps, concurrent.futures.ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(running.post, e, max_tokens=50, stream=s) for e in BOTH for s in (False, True)]
            until(lambda: running.service.engine.health().n_open == 4)

            def broken() -> Any:
                raise InvariantError("planted")

            running.engine.step = broken  # type: ignore[method-assign]
            steps.release()
            for future in asked:
                response = future.result(WAIT_S)
                if response.headers["content-type"].startswith("text/event-stream"):
                    last = events(response.text)[-1]
                    assert isinstance(last, dict)
                    assert last["error"]["type"] == "server_error"
                else:
                    assert response.status_code == 503
                    assert response.json()["error"]["type"] == "server_error"
        running.thread.join(WAIT_S)
        assert running.exit_codes == [1]


@pytest.mark.parametrize("n_signals", [1, 2])
def test_a_signal_drains_and_a_second_one_ends_at_once(tiny_model_folder: Path, n_signals: int) -> None:
    with serving(tiny_model_folder, limits=Limits(grace_s=WAIT_S)) as running:
        whole = text_of("chat", running.post("chat").json())
        with slowed(running) as steps, concurrent.futures.ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(running.post, "chat", stream=s) for s in (False, True)]
            until(lambda: running.service.engine.health().n_open == 2)
            running.end()
            until(lambda: running.client.get("/ready").status_code == 503)
            refused = running.post("chat")
            assert refused.status_code == 503
            assert refused.json()["error"]["type"] == "server_error"
            assert refused.headers["retry-after"]
            if n_signals == 1:
                steps.release(1_000)
            else:
                running.end()
            answers = [future.result(WAIT_S) for future in asked]
        if n_signals == 1:
            assert text_of("chat", answers[0].json()) == whole
            assert events(answers[1].text)[-1] == "[DONE]"
        else:
            assert answers[0].status_code == 503
            last = events(answers[1].text)[-1]
            assert isinstance(last, dict)
            assert "shutting down" in last["error"]["message"]
        running.thread.join(WAIT_S)
        assert running.exit_codes == [0]
        with pytest.raises(httpx.ConnectError):
            running.client.get("/health")
