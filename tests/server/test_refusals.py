"""Requests that are refused for how they are sent, whatever they ask."""

from __future__ import annotations

import dataclasses
import json

import httpx
import pytest

from vmem_kv.stats import SlotStats

from .harness import PATHS, Running, good, until
from .test_faults import connected, read_all, send_long, slowed


@pytest.mark.parametrize("order", [1, -1])
def test_two_ways_to_tell_a_bodys_length_are_one_too_many(running: Running, order: int) -> None:
    """A proxy may go by the one, and see another request behind it than we do."""
    body = json.dumps(good("completions")).encode()
    lengths = [f"Content-Length: {len(body)}", "Transfer-Encoding: chunked"][::order]
    head = ["POST /v1/completions HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", *lengths]
    chunks = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    with connected(running) as connection:
        connection.sendall("\r\n".join(head).encode() + b"\r\n\r\n" + chunks)
        answer = read_all(connection)  # which ends: the connection is closed
    start, _, rest = answer.partition(b"\r\n\r\n")
    assert start.startswith(b"HTTP/1.1 400")
    assert b"connection: close" in start.lower()
    assert json.loads(rest)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", [*PATHS.values(), "/tokenize", "/detokenize"])
def test_a_web_page_cannot_send_a_body_of_no_type(running: Running, path: str) -> None:
    """Browsers send one to any server without asking it; of JSON they ask first, and get no permission."""
    request = httpx.Request("POST", running.url + path, content=json.dumps(good("chat")))
    request.headers.pop("content-type", None)
    assert running.client.send(request).status_code == 415
    asked = running.client.options(
        path, headers={"Origin": "http://evil.test", "Access-Control-Request-Method": "POST"}
    )
    assert asked.status_code == 405
    assert "access-control-allow-origin" not in asked.headers


def test_live_bytes_are_those_of_sequences_that_run(running: Running) -> None:
    def told() -> tuple[int, int]:
        text = running.client.get("/metrics").text
        line = next(line for line in text.splitlines() if line.startswith("vmem_kv_live_bytes "))
        return int(float(line.split()[1])), running.client.get("/dashboard/data").json()["live_bytes"]

    assert running.post("completions", prompt="sky " * 30).status_code == 200
    running.check_idle()
    token_bytes = running.engine.snapshot().token_bytes
    assert running.engine.snapshot().cache.live_bytes >= 30 * token_bytes  # a cached prefix
    assert told() == (0, 0)
    with slowed(running) as steps, connected(running) as connection:
        send_long(connection, "completions", prompt="we look up")
        steps.release(1)
        until(lambda: running.engine.snapshot().live_bytes > 0)
        assert all(0 < n_bytes <= 4 * token_bytes for n_bytes in told())


def test_what_sequences_share_is_live_once(running: Running) -> None:
    stats = running.engine.snapshot()
    slots = [SlotStats("active", 4, 40), SlotStats("active", 4, 40), SlotStats("active", 4, 100)]
    n_bytes = 80 * stats.token_bytes
    cache = dataclasses.replace(stats.cache, live_bytes=180 * stats.token_bytes, n_live_pages=10**6)
    made = dataclasses.replace(stats, slots=slots, cached_slots=frozenset({2}), prefixes=None, cache=cache)
    assert made.live_bytes == n_bytes
    few = dataclasses.replace(made, cache=dataclasses.replace(cache, n_live_pages=1))
    assert few.live_bytes == min(n_bytes, stats.page_bytes)
    gone = dataclasses.replace(made, cache=dataclasses.replace(cache, live_bytes=0))
    assert gone.live_bytes == 0  # counted one after the other


SAME: dict[str, object] = {
    "parallel_tool_calls": True,
    "prompt_cache_key": "mine",
    "reasoning_effort": "none",
    "safety_identifier": "somebody",
    "service_tier": "auto",
    "store": False,
}


def test_what_changes_nothing_is_accepted(running: Running) -> None:
    assert running.post("chat", **SAME).json()["choices"] == running.post("chat").json()["choices"]


@pytest.mark.parametrize(("name", "value"), [("reasoning_effort", "high"), ("service_tier", "flex"), ("store", True)])
def test_what_would_change_something_is_not(running: Running, name: str, value: object) -> None:
    refused = running.post("chat", **{name: value})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)
