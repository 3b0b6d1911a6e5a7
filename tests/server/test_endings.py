"""How a server's process ends while an answer is on its way that would never be complete."""

from __future__ import annotations

import signal
from pathlib import Path

import httpx
import pytest

from .harness import WAIT_S, events
from .test_commands import process

STUCK = """
import atexit, sys, time
from vmem_kv.engine.engine import Engine

stock, n_steps = Engine.step, 0


def step(engine):
    global n_steps
    n_steps += 1
    if n_steps > 3:
        time.sleep(0.01)
        return []
    return stock(engine)


Engine.step = step
atexit.register(lambda: print("torn down", file=sys.stderr))
"""


@pytest.mark.parametrize(
    ("signals", "grace", "is_torn_down"),
    [
        ((signal.SIGTERM,), "0.5", True),
        ((signal.SIGINT, signal.SIGTERM), "3000", False),  # which no test would outlive
    ],
)
def test_everyone_is_answered_and_the_process_ends(
    tiny_model_folder: Path, signals: tuple[signal.Signals, ...], grace: str, is_torn_down: bool
) -> None:
    """A second signal does not wait for the answer, nor for the interpreter to take itself apart."""
    ask = {"model": "model", "prompt": "the sky", "max_tokens": 100, "ignore_eos": True, "stream": True}
    with process(tiny_model_folder, "--grace", grace, before=STUCK) as (server, url, lines):
        with (
            httpx.Client(base_url=url, timeout=WAIT_S, trust_env=False) as client,
            client.stream("POST", "/v1/completions", json=ask) as response,
        ):
            told = response.iter_lines()
            assert next(told).startswith("data: ")
            server.send_signal(signal.SIGSTOP)  # it sees all of them at once
            for number in signals:
                server.send_signal(number)
            server.send_signal(signal.SIGCONT)
            last = events("\n".join(told))[-1]
        assert isinstance(last, dict)
        assert "shutting down" in last["error"]["message"]
        assert server.wait(WAIT_S) == 0
    assert ("torn down\n" in lines) == is_torn_down
