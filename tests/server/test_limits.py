"""Where a server says no, and what its own failures look like to those outside."""

from __future__ import annotations

import ast
import concurrent.futures
import logging
import resource
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import vmem_kv
from tests.core.backends import open_backend
from vmem_kv.config import CacheConfig
from vmem_kv.driver.base import Driver
from vmem_kv.driver.ledger import Ledger
from vmem_kv.errors import DriverError
from vmem_kv.server.limits import Limits
from vmem_kv.server.log import log_config
from vmem_kv.server.run import affordable_connections
from vmem_kv.testing.faults import FaultyDriver, fail_from

from .harness import WAIT_S, Running, events, serving, text_of, until
from .test_faults import connected, head, read_all, send_long, slowed

BOTH = ("completions", "chat")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", BOTH)
def test_what_is_longer_than_the_memory_is_400_at_once(tiny_model_folder: Path, endpoint: str, stream: bool) -> None:
    options: dict[str, Any] = {"layout": "token_major", "page_bytes": 4096}
    with serving(tiny_model_folder, **options) as running:
        max_bytes = running.engine.memory.n_pages(20) * 4096
    with serving(tiny_model_folder, max_bytes=max_bytes, **options) as running:
        fits = running.client.get("/v1/models").json()["data"][0]["max_model_len"]
        assert 20 <= fits < 128
        refused = running.post(endpoint, max_tokens=fits, stream=stream)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "max_tokens")
        assert f"at most {fits} tokens" in error["message"]
        longer = {"prompt": "sky " * fits} if endpoint == "completions" else {
            "messages": [{"role": "user", "content": "sky " * fits}]
        }  # fmt: skip
        refused = running.post(endpoint, stream=stream, **longer)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert running.post(endpoint, stream=stream).status_code == 200
        running.check_idle()


def test_a_full_queue_is_seen_before_anything_is_encoded(tiny_model_folder: Path) -> None:
    with serving(tiny_model_folder, limits=Limits(grace_s=WAIT_S), max_num_seqs=1, max_queued=1) as running:
        n_encoded = 0
        encode = running.service.codec._tokenizer

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal n_encoded
            n_encoded += 1
            return encode(*args, **kwargs)

        with slowed(running), connected(running) as first, connected(running) as second:
            send_long(first, "chat")
            until(lambda: running.engine.has_work)
            send_long(second, "chat")
            until(lambda: running.service.engine.health().n_open == 2)
            running.service.codec._encode = counted  # type: ignore[method-assign]
            for endpoint in BOTH:
                assert running.post(endpoint).status_code == 429
            running.end()  # and so is a server that is about to end
            until(lambda: running.service.engine.health().is_draining)
            for endpoint in BOTH:
                assert running.post(endpoint).status_code == 503
            assert n_encoded == 0


def test_more_answers_than_there_can_ever_be_is_400_and_not_429(tiny_model_folder: Path) -> None:
    with serving(tiny_model_folder, max_num_seqs=2, max_queued=3) as running:
        response = running.post("completions", prompt=["sky"] * 3, n=2)
        assert response.status_code == 400
        assert response.json()["error"]["message"].startswith("6 answers were asked for at once; at most 5")
        assert running.post("chat", n=6).json()["error"]["param"] == "n"
        assert running.post("completions", prompt=["sky"] * 5).status_code == 200


def test_a_connection_too_many_is_503_in_the_same_form(tiny_model_folder: Path) -> None:
    with serving(tiny_model_folder, limits=Limits(max_connections=3, grace_s=5.0)) as running:
        assert running.client.get("/health").status_code == 200  # one, which stays open
        with connected(running), connected(running), connected(running) as last:
            last.sendall(head("chat", b"{}") + b"{}")
            answer = read_all(last).decode()
            assert answer.startswith("HTTP/1.1 503")
            assert "retry-after: 1" in answer.lower()
            assert '{"error":{"message":"Too many connections' in answer
            assert running.client.get("/health").status_code == 200
        assert running.post("chat").status_code == 200


def test_no_more_connections_than_there_are_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert affordable_connections(5) == 5
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(400, hard), hard))
        assert 1 <= affordable_connections(1_000) < 400
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_load_balancers_may_ask_without_a_body(running: Running) -> None:
    for path in ("/health", "/ready"):
        response = running.client.head(path)
        assert response.status_code == 200
        assert response.content == b""


def test_a_tokenizer_that_raises_refuses_that_request_only(running: Running) -> None:
    stock = running.service.codec._encode

    def picky(text: str, *args: Any, **kwargs: Any) -> tuple[int, ...]:
        if "scatters" in text:
            raise OverflowError("a secret")
        return stock(text, *args, **kwargs)

    running.service.codec._encode = picky  # type: ignore[method-assign]
    try:
        for endpoint, wrong in (
            ("completions", {"prompt": "scatters"}),
            ("chat", {"messages": [{"role": "user", "content": "scatters"}]}),
        ):
            for stream in (False, True):
                refused = running.post(endpoint, stream=stream, **wrong)
                assert refused.status_code == 400
                assert "secret" not in refused.text
                assert running.post(endpoint, stream=stream).status_code == 200
    finally:
        running.service.codec._encode = stock  # type: ignore[method-assign]


def test_a_bug_in_the_middle_of_a_stream_is_its_last_event(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    stock = running.service.codec.token_text
    n_calls = 0

    def broken(token_id: int) -> str:
        nonlocal n_calls
        n_calls += 1
        if n_calls > 2:
            raise LookupError("nobody foresaw this")
        return stock(token_id)

    running.service.codec.token_text = broken  # type: ignore[method-assign]
    try:
        found = events(running.post("completions", stream=True, logprobs=0).text)
    finally:
        running.service.codec.token_text = stock  # type: ignore[method-assign]
    assert isinstance(found[0], dict)
    assert found[0]["choices"]
    assert isinstance(found[-1], dict)
    assert found[-1]["error"]["type"] == "server_error"
    assert "foresaw" not in json_of(found)
    until(lambda: "nobody foresaw this" in caplog.text)
    running.check_idle()


def json_of(found: Any) -> str:
    return str(found)


def test_a_step_that_hangs_keeps_no_server_from_ending(tiny_model_folder: Path) -> None:
    release = threading.Event()
    with serving(tiny_model_folder, limits=Limits(grace_s=0.3)) as running:
        stock = running.engine.step

        def hanging() -> Any:
            release.wait(WAIT_S)
            return stock()

        running.engine.step = hanging  # type: ignore[method-assign]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(running.post, "chat", stream=stream) for stream in (False, True)]
            until(lambda: running.service.engine.health().n_open == 2)
            running.end()
            running.end()
            whole, streamed = (future.result(WAIT_S) for future in asked)
        assert whole.status_code == 503
        last = events(streamed.text)[-1]
        assert isinstance(last, dict)
        assert "shutting down" in last["error"]["message"]
        running.thread.join(WAIT_S)
        assert running.exit_codes == [0]
        release.set()


def test_a_lost_device_ends_the_server_which_asks_no_more_of_it(tiny_model_folder: Path) -> None:
    drivers: list[FaultyDriver] = []

    def opened(device: torch.device, config: CacheConfig) -> Driver:
        drivers.append(FaultyDriver(open_backend("native", Ledger())))
        return drivers[0]

    asked_for: list[str] = []

    def lost(point: Any) -> DriverError:
        asked_for.append(point.operation)
        error = DriverError(point.operation, 719, "CUDA_ERROR_LAUNCH_FAILED")
        error.is_fatal = True
        return error

    with serving(tiny_model_folder, driver=opened, premap_tokens=0) as running:
        assert running.post("chat").status_code == 200
        with slowed(running) as steps, concurrent.futures.ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(running.post, e, max_tokens=90, stream=s) for e in BOTH for s in (False, True)]
            until(lambda: running.service.engine.health().n_open == 4)
            drivers[0].begin_count()
            with drivers[0].failing(fail_from(1, lost)):
                steps.release(1_000)
                for future in asked:
                    response = future.result(WAIT_S)
                    if response.headers["content-type"].startswith("text/event-stream"):
                        last = events(response.text)[-1]
                        assert isinstance(last, dict)
                        assert last["error"]["type"] == "server_error"
                    else:
                        assert response.status_code == 503
                assert not running.service.engine.health().is_alive
                running.thread.join(WAIT_S)
        assert running.exit_codes == [1]
        # What closing gives back a driver answers by itself (a CUDA driver that lost its device does); nobody steps on.
        assert set(asked_for[1:]) <= {"fence", "unmap", "release", "free_reservation"}, asked_for


def test_many_in_flight_all_end_when_a_server_drains(tiny_model_folder: Path) -> None:
    with serving(tiny_model_folder, limits=Limits(grace_s=WAIT_S), max_num_seqs=8) as running:
        whole = {e: text_of(e, running.post(e).json()) for e in BOTH}
        with slowed(running) as steps, concurrent.futures.ThreadPoolExecutor(32) as pool:
            asked = [
                (e, s, pool.submit(running.post, e, stream=s)) for e in BOTH for s in (False, True) for _ in range(8)
            ]
            until(lambda: running.service.engine.health().n_open == 32)
            running.end()
            steps.release(1_000)
            for endpoint, stream, future in asked:
                response = future.result(WAIT_S)
                assert response.status_code == 200
                if stream:
                    assert events(response.text)[-1] == "[DONE]"
                else:
                    assert text_of(endpoint, response.json()) == whole[endpoint]
        running.thread.join(WAIT_S)
        assert running.exit_codes == [0]


def test_two_servers_in_one_process_know_nothing_of_each_other(tiny_model_folder: Path) -> None:
    with serving(tiny_model_folder) as one, serving(tiny_model_folder, max_num_seqs=2) as two:
        expected = text_of("chat", one.post("chat").json())
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(running.post, "chat") for running in (one, two) for _ in range(6)]
            assert {text_of("chat", future.result(WAIT_S).json()) for future in asked} == {expected}
        one.end()
        one.thread.join(WAIT_S)
        assert text_of("chat", two.post("chat").json()) == expected
        with pytest.raises(httpx.ConnectError):
            one.post("chat")
        assert two.engine.snapshot().n_requests == 7


def test_everything_that_is_logged_is_json() -> None:
    config = log_config()
    assert config["root"]["handlers"] == ["stderr"]  # asyncio's, when no descriptor is left for a connection
    assert config["loggers"]["vmem_kv"]["propagate"] is False
    assert logging.getLogger("asyncio").propagate


def wall_clock_uses(source: str) -> list[str]:
    """The lines on which a module reads the time of day, which may jump."""
    names = {"time", "gmtime", "localtime", "now", "utcnow", "today", "time_ns"}
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and (
            (isinstance(node.func, ast.Name) and node.func.id in names)
            or (isinstance(node.func, ast.Attribute) and node.func.attr in names)
        )
    ]


def test_the_search_for_the_time_of_day_finds_it() -> None:
    assert wall_clock_uses("import time\nend = time.time() + 3") == ["time.time()"]
    assert wall_clock_uses("from time import time\nprint(time())") == ["time()"]
    assert wall_clock_uses("import time\ntime.monotonic()") == []


def test_no_duration_depends_on_the_time_of_day() -> None:
    """A clock that jumps a day ends no request: the time of day is only shown."""
    package = Path(vmem_kv.__file__).parent
    found = {
        f"{path.parent.name}/{path.name}": uses
        for folder in ("engine", "server")
        for path in sorted((package / folder).glob("*.py"))
        if (uses := wall_clock_uses(path.read_text()))
    }
    assert found == {
        "server/chat.py": ["time()"],  # created
        "server/completions.py": ["time()"],
        "server/log.py": ["time.gmtime(record.created)"],
        "server/service.py": ["time()"],
        "server/session_folder.py": ["time.time()"],  # how old a file is, by the clock that dated it
    }


def test_where_a_slow_reader_is_cut_off_the_others_get_everything(tiny_model_folder: Path) -> None:
    limits = Limits(send_timeout_s=0.3, grace_s=5.0)
    with serving(tiny_model_folder, limits=limits, max_num_seqs=16) as running:
        expected = text_of("completions", running.post("completions").json())
        slow: list[socket.socket] = []
        try:
            for _ in range(8):
                link = socket.socket()
                slow.append(link)
                link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
                link.settimeout(WAIT_S)
                link.connect(("127.0.0.1", running.port))
                send_long(link, "chat", n=8, stream=True, logprobs=True, top_logprobs=20)
            for _ in range(10):
                assert text_of("completions", running.post("completions").json()) == expected
            until(lambda: running.service.metrics.n_open == 0)
        finally:
            for link in slow:
                link.close()
        running.check_idle()
