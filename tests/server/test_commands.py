"""`vmem-kv serve` as a process, and `chat` and `top` against a server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from tests.core.subprocesses import ROOT
from vmem_kv.cli.app import app

from .harness import WAIT_S, Running

KEY = "sk-0123456789abcdef"
START_S = 400.0
"""For a process that imports torch and loads a model, on however busy a machine."""


def run(*arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=text, env={"COLUMNS": "150"})


@contextmanager
def process(
    folder: Path, *arguments: str, key: str = "", before: str = ""
) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """A server in a process of its own: the process, its address, and what it writes to standard error."""
    code = f"{before}\nfrom vmem_kv.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", str(folder), "--port", "0", "--max-seqs", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "VMEM_KV_API_KEY": key}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    is_up = threading.Event()

    def read() -> None:
        assert server.stderr is not None
        for line in server.stderr:
            lines.append(line)
            if " is served at " in line:
                is_up.set()
        is_up.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert is_up.wait(START_S)
        served = next((line for line in lines if " is served at " in line), None)
        assert served is not None, "".join(lines)
        yield server, served.split(" is served at ")[1].split("/v1")[0], lines
    finally:
        server.kill()
        server.wait()
        reader.join()
        assert server.stderr is not None
        server.stderr.close()


def test_a_server_serves_drains_and_exits_with_0(tiny_model_folder: Path) -> None:
    with process(tiny_model_folder, key=KEY) as (server, url, lines):
        headers = {"Authorization": f"Bearer {KEY}"}
        ask: dict[str, Any] = {"model": "model", "prompt": "the sky", "max_tokens": 100, "ignore_eos": True}
        with httpx.Client(base_url=url, headers=headers, timeout=WAIT_S, trust_env=False) as client:
            assert client.get("/ready").status_code == 200
            assert client.post("/v1/completions", json=ask).json()["usage"]["completion_tokens"] == 100
            with client.stream("POST", "/v1/completions", json={**ask, "stream": True}) as response:
                server.send_signal(signal.SIGTERM)
                assert "[DONE]" in response.read().decode()
        assert server.wait(WAIT_S) == 0
    text = "".join(lines)
    assert KEY not in text
    assert "the sky" not in text
    assert "Traceback" not in text
    logged = [json.loads(line) for line in lines if line.startswith("{")]
    assert logged[0]["message"] == "starting"
    assert logged[0]["has_keys"] is True
    assert logged[-1]["message"] == "drained"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "there is no API key"),
        (["--host", "no such host", "--api-key", KEY], "choose another --host"),
        (["--api-key", "short"], "an API key must have"),
        (["--layout", "diagonal"], "'diagonal'"),
        (["--prefix-policy", "best"], "'best'; choose one of lru, cost"),
        (["--max-memory", "many"], "is not a size in bytes"),
        (["--max-memory", "4k"], "--max-memory is 4096, which holds no sequence of 2 tokens; set it to 32768 or more"),
        (["--max-len", "1000"], "was made for 128 tokens"),
        (["--log-level", "loud"], "choose one of debug"),
    ],
)
def test_what_cannot_be_served_is_one_line_that_names_the_remedy(
    tiny_model_folder: Path, arguments: list[str], message: str
) -> None:
    result = run("serve", str(tiny_model_folder), "--port", "0", *arguments)
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output


def test_a_port_in_use_is_refused_before_the_model_is_loaded(running: Running) -> None:
    result = run("serve", "./nowhere", "--port", str(running.port))
    assert result.exit_code == 1
    assert "choose another --port" in result.stderr


def test_an_empty_key_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n\n")
    result = run("serve", "./nowhere", "--api-key-file", str(tmp_path / "keys"))
    assert result.exit_code == 1
    assert "holds no API key" in result.stderr


def test_the_help_reads_like_a_manual() -> None:
    text = run("serve", "--help").stdout
    for word in (
        "/v1/chat/completions",
        "/ready",
        "/metrics",
        "curl",
        "SIGTERM",
        "--max-memory",
        "--max-silence",
        "--api-key",
        "Memory",
    ):
        assert word in text


def test_chat_answers_one_question_or_talks(running: Running) -> None:
    one = run("chat", "--url", running.url, "-p", "the sky is blue", "-n", "8", "--temperature", "0")
    assert one.exit_code == 0, one.output
    [choice] = running.post("chat").json()["choices"]
    assert one.stdout.strip() == choice["message"]["content"].strip()
    talk = run("chat", "--url", running.url, "-n", "4", text="the sky\n/what\nwe look up\n/clear\nthe sky\n/quit\n")
    assert talk.exit_code == 0, talk.output
    assert talk.stdout.count("you>") == 6
    assert talk.stdout.count("/clear forgets") == 2


def test_a_refused_turn_does_not_end_a_conversation(running: Running) -> None:
    talk = run("chat", "--url", running.url, "-n", "110", text="the sky is " * 9 + "\nthe sky\n/clear\nsky\n/quit\n")
    assert talk.exit_code == 0, talk.output
    assert talk.stdout.count("the server says: This model's maximum context length is 128 tokens") == 1
    assert talk.stdout.count("you>") == 5


def test_chat_says_what_the_server_says(running: Running) -> None:
    refused = run("chat", "--url", running.url, "-p", "the sky", "-n", "5000")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: the server says: ")
    for command in ("chat", "top"):
        nobody = run(command, "--url", "http://127.0.0.1:9")
        assert nobody.exit_code == 1
        assert "start one with `vmem-kv serve`" in nobody.stderr


def test_top_shows_the_slots(running: Running) -> None:
    running.post("chat")
    result = run("top", "--url", running.url, "--once")
    assert result.exit_code == 0, result.output
    assert "ready" in result.stdout
    assert "warm" in result.stdout
    assert "▒" in result.stdout
    assert "addresses" in result.stdout
