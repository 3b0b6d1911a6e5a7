"""What no route sees: clients that speak no HTTP, an old one or another protocol, and connections too many."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vmem_kv.server.limits import Limits

from .harness import Running, serving, until
from .test_faults import connected, read_all

BODY = b"\r\n\r\n"


def test_an_old_client_without_a_host_is_answered(running: Running) -> None:
    """A load balancer's HTTP/1.0 has no Host header; a browser, which DNS could deceive, always has one."""
    for path, status in (("/health", b"200"), ("/ready", b"200"), ("/v1/models", b"200")):
        with connected(running) as connection:
            connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            assert read_all(connection).startswith(b"HTTP/1.1 " + status)
    for host in ("", "evil.test"):
        with connected(running) as connection:
            connection.sendall(f"GET /health HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
            assert read_all(connection).startswith(b"HTTP/1.1 421")


def n_counted(running: Running, status: int) -> float:
    told = running.client.get("/metrics").text
    found = re.search(rf'^vmem_kv_http_responses_total{{route="other",status="{status}"}} (.*)$', told, re.MULTILINE)
    return float(found[1]) if found else 0.0


def check_told(answer: bytes, caplog: pytest.LogCaptureFixture, status: int) -> None:
    """It has an error's form and an id; under this id it is in the log."""
    head, _, body = answer.partition(BODY)
    assert head.startswith(f"HTTP/1.1 {status}".encode())
    assert sorted(json.loads(body)["error"]) == ["code", "message", "param", "type"]
    request_id = re.search(rb"(?im)^x-request-id: (req_[0-9a-f]{32})\r$", head + b"\r\n")
    assert request_id
    [line] = [
        fields
        for record in caplog.records
        if (fields := getattr(record, "fields", {})).get("request_id") == request_id[1].decode()
    ]
    assert (line["status"], line["route"]) == (status, "other")


def test_what_is_no_http_is_logged_and_counted(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "vmem_kv.server")
    n_before = n_counted(running, 400)
    with connected(running) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        check_told(read_all(connection), caplog, 400)
    assert n_counted(running, 400) == n_before + 1


def test_a_connection_too_many_is_logged_and_counted(tiny_model_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "vmem_kv.server")
    with serving(tiny_model_folder, limits=Limits(max_connections=2, grace_s=5.0)) as running:
        assert running.client.get("/health").status_code == 200
        with connected(running), connected(running) as last:
            last.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            check_told(read_all(last), caplog, 503)
        assert n_counted(running, 503) == 1


def test_another_protocol_is_not_advertised_in_the_log(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    head = "GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n"
    caplog.set_level("INFO")
    caplog.set_level("INFO", "vmem_kv.server")
    with connected(running) as connection:
        connection.sendall(f"{head}Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n\r\n".encode())
        assert connection.recv(12) == b"HTTP/1.1 200"
    until(lambda: any(getattr(r, "fields", {}).get("route") == "/health" for r in caplog.records))
    assert "uvicorn" not in {record.name.partition(".")[0] for record in caplog.records}


def test_the_document_is_made_once_and_counted_as_itself(running: Running) -> None:
    first, second = (running.client.get("/openapi.json") for _ in range(2))
    assert first.content == second.content
    assert "ChatAsk" in first.json()["components"]["schemas"]
    assert 'vmem_kv_http_responses_total{route="/openapi.json",status="200"}' in running.client.get("/metrics").text
