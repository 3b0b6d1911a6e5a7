"""What is done to the server's process: killed, out of descriptors, its log full or gone, a child forked beside it."""

from __future__ import annotations

import json
import mmap
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx

from tests.core.subprocesses import ROOT

from .harness import WAIT_S
from .test_commands import START_S, process

ASK = {"model": "model", "prompt": "the sky is", "max_tokens": 8, "temperature": 0}


def ask(url: str, **fields: object) -> str:
    with httpx.Client(base_url=url, timeout=WAIT_S, trust_env=False) as client:
        response = client.post("/v1/completions", json={**ASK, **fields})
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["text"]
        return text


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def is_listening(port: int) -> bool:
    with socket.socket() as link:
        return link.connect_ex(("127.0.0.1", port)) == 0


def named_shared_memory(process_id: int) -> set[Path]:
    """What a process has open or mapped of the shared memory that has names, and would outlive it."""
    opened: list[str] = []
    for entry in os.listdir(f"/proc/{process_id}/fd"):
        with suppress(FileNotFoundError):  # closed between the two looks
            opened.append(os.readlink(f"/proc/{process_id}/fd/{entry}"))
    mapped = [line.split(maxsplit=5)[-1] for line in Path(f"/proc/{process_id}/maps").read_text().splitlines()]
    return {Path(name) for name in (*opened, *mapped) if name.startswith("/dev/shm/")}


def test_named_shared_memory_is_seen(tmp_path: Path) -> None:
    path = Path(f"/dev/shm/vmem-kv-{os.getpid()}-{tmp_path.name}")
    assert path not in named_shared_memory(os.getpid())
    try:
        with path.open("wb+") as file:
            file.truncate(4096)
            assert path in named_shared_memory(os.getpid())
            mapped = mmap.mmap(file.fileno(), 4096)
        assert path in named_shared_memory(os.getpid())
        mapped.close()
    finally:
        path.unlink()


def test_a_killed_server_leaves_no_memory_and_its_port(tiny_model_folder: Path) -> None:
    with process(tiny_model_folder) as (server, url, _):
        with (
            httpx.Client(base_url=url, timeout=WAIT_S, trust_env=False) as client,
            client.stream("POST", "/v1/completions", json={**ASK, "max_tokens": 100, "stream": True}) as response,
        ):
            next(response.iter_lines())
            named = named_shared_memory(server.pid)
            server.kill()
            server.wait(WAIT_S)
        assert not Path(f"/proc/{server.pid}/fd").exists()  # and with it all of its memory files
        assert not is_listening(port_of(url))
    assert not [path for path in named if path.exists()]
    with process(tiny_model_folder, "--port", str(port_of(url))) as (_, again, _):
        assert port_of(again) == port_of(url)
        ask(again)


def test_a_server_out_of_descriptors_recovers_when_clients_leave(tiny_model_folder: Path) -> None:
    with process(tiny_model_folder) as (server, url, lines):
        whole = ask(url)
        n_open = len(os.listdir(f"/proc/{server.pid}/fd"))
        with ExitStack() as stack:
            # However long this takes, the connection is kept: another one would get no descriptor.
            limits = httpx.Limits(keepalive_expiry=None)
            held = stack.enter_context(httpx.Client(base_url=url, timeout=WAIT_S, trust_env=False, limits=limits))
            assert held.get("/health").status_code == 200  # this one has its descriptor
            resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (n_open + 12, n_open + 12))
            for _ in range(60):
                stack.enter_context(socket.create_connection(("127.0.0.1", port_of(url)), WAIT_S))
            wait_for(lambda: any("out of system resource" in line for line in lines))
            assert held.post("/v1/completions", json=ASK).json()["choices"][0]["text"] == whole
        assert ask(url) == whole
        assert server.poll() is None
        server.terminate()
        assert server.wait(WAIT_S) == 0
    start = next(i for i, line in enumerate(lines) if " is served at " in line)
    for line in lines[start + 1 :]:
        assert json.loads(line)["level"]


def wait_for(condition: object) -> None:
    end_s = time.monotonic() + WAIT_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end_s, "it never came true"
        time.sleep(0.05)


def test_a_log_that_nobody_reads_any_more_is_no_reason_to_end(tiny_model_folder: Path) -> None:
    """The reader of standard error has gone: every line fails with EPIPE."""
    with server_writing_to("pipe", tiny_model_folder) as (server, url):
        whole = ask(url)
        assert ask(url) == whole
        server.terminate()
        assert server.wait(WAIT_S) == 0


def test_a_full_disk_for_the_log_is_no_reason_to_end(tiny_model_folder: Path) -> None:
    """Every line fails with ENOSPC, from the first one on."""
    with server_writing_to("/dev/full", tiny_model_folder) as (server, url):
        whole = ask(url)
        assert ask(url) == whole
        server.terminate()
        assert server.wait(WAIT_S) == 0


@contextmanager
def server_writing_to(target: str, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server whose standard output and error go to a file, or to a pipe whose reader goes away at once."""
    with socket.socket() as link:
        link.bind(("127.0.0.1", 0))
        port = link.getsockname()[1]
    command = [sys.executable, "-c", "from vmem_kv.cli import main; main()", "serve", str(folder), "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if target == "pipe":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open(target, os.O_WRONLY)
    try:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=writing, stderr=writing)
    finally:
        os.close(writing)
    try:
        end_s = time.monotonic() + START_S
        while not is_listening(port):
            assert server.poll() is None, "the server has ended"
            assert time.monotonic() < end_s
            time.sleep(0.1)
        wait_for(lambda: is_ready(port))
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False  # it listens, and does not accept yet
