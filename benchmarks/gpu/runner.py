"""Runs a part in processes of its own, and turns whatever becomes of them into rows.

Guarantees: `run_part` returns, in about the budget it was given, whatever its cases do. A case that crashed, hung or
raised is a row with the reason; every other case's rows are kept. Nothing that the workers started outlives the call.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks.gpu.cases import Part, Row
from benchmarks.gpu.worker import REPORTED, Job, command

ROOT = Path(__file__).resolve().parents[2]
STARTUP_S = 120.0
"""How long a worker may take to import torch and open the device."""
GRACE_S = 10.0
"""How far a running case may pass the part's budget."""
MAX_CRASHES = 8
"""After so many processes that ended badly, a part is given up."""
MAX_EQUAL_ERRORS = 4
"""After so many cases in a row that raised the same, a part is given up."""
BUDGET = "time budget"
"""How the reason begins of a case that was skipped for want of time."""
ALL = "all"
"""Stands for the cases of a part that was skipped before it could list them."""
_POLL_S = 0.05
_KILL_S = 20.0
_N_ERROR_LINES = 8


class Sink(Protocol):
    """Where rows go."""

    def add_row(self, part: Part, table: str, row: Row, timed: list[str]) -> None:
        """Keep a row."""

    def add_skipped(self, part: Part, case: str, reason: str) -> None:
        """Keep that a case did not run."""

    def add_log(self, text: str) -> None:
        """Keep what a worker wrote to its standard error."""

    def save(self) -> None:
        """Write what there is, if there is news."""


@dataclass(slots=True)
class _Progress:
    """What the workers of a part have said so far."""

    cases: list[dict[str, Any]] | None = None
    next_index: int = 0  # the first case about which nothing is known
    running: int | None = None
    since: float = field(default_factory=time.monotonic)
    is_ready: bool = False
    error: str | None = None  # what the last case raised
    n_equal_errors: int = 0  # cases in a row that raised just that

    def time_allowed(self) -> float:
        """Seconds that what is going on now may take."""
        if self.running is None or self.cases is None:
            return STARTUP_S
        return float(self.cases[self.running]["timeout_s"])

    def is_in_danger(self) -> bool:
        """Whether what is running was expected to end its process."""
        return self.cases is not None and self.running is not None and bool(self.cases[self.running]["danger"])

    def begin_worker(self) -> None:
        """A fresh process starts."""
        self.running, self.is_ready, self.since = None, False, time.monotonic()

    def end_case(self, index: int, error: str | None) -> None:
        """A case came to its end, and raised something or not."""
        self.next_index, self.running, self.since = index + 1, None, time.monotonic()
        self.n_equal_errors = 0 if error is None else self.n_equal_errors + 1 if error == self.error else 1
        self.error = error


def run_part(
    part: Part, sink: Sink, *, emulate: bool, quick: bool, budget_s: float, only: list[str] | None = None
) -> None:
    """Run all cases of a part, or as many as fit the budget.

    Args:
        part: What to run.
        sink: Where its rows go.
        emulate: On the emulated driver.
        quick: With the smallest grid.
        budget_s: Seconds for all of it.
        only: The names of the cases to run; default: all.
    """
    ends = time.monotonic() + budget_s
    progress = _Progress()
    n_crashes = 0
    while progress.cases is None or progress.next_index < len(progress.cases):
        left = ends - time.monotonic()
        if left <= 0:
            _skip_rest(part, sink, progress, f"{BUDGET}: used up", only)
            break
        if n_crashes >= MAX_CRASHES:
            _skip_rest(part, sink, progress, f"{n_crashes} processes of this part had ended badly", only)
            break
        if progress.n_equal_errors >= MAX_EQUAL_ERRORS:
            reason = f"{MAX_EQUAL_ERRORS} cases in a row raised the same: {progress.error}"
            _skip_rest(part, sink, progress, reason, only)
            break
        first = progress.next_index
        ending, errors = _run_worker(part, sink, progress, emulate, quick, left, only)
        if ending is not None:
            n_crashes += not progress.is_in_danger()
            _report_crash(part, sink, progress, ending, errors, only)
        elif progress.cases is None or progress.next_index == first:
            _report_crash(part, sink, progress, "ended without a result", errors, only)
            break
        if progress.cases is None:
            break  # it cannot even list its cases
    sink.save()


def _run_worker(
    part: Part, sink: Sink, progress: _Progress, emulate: bool, quick: bool, left: float, only: list[str] | None
) -> tuple[str | None, str]:
    """Run one worker to its end; return how it ended if not well, and the last lines that it wrote."""
    progress.begin_worker()
    must_end = time.monotonic() + left + GRACE_S
    with tempfile.TemporaryDirectory() as folder:
        events = Path(folder) / "events"
        events.touch()
        job = Job(part.module, emulate, quick, progress.next_index, left, str(events), os.getpid(), only)
        stderr = Path(folder) / "stderr"
        ending: str | None = None
        partial = ""
        with events.open(encoding="utf-8") as stream:
            with stderr.open("wb") as log, _started(job, log) as process:
                while True:
                    status = process.poll()
                    partial = _read_events(stream.read(), partial, part, sink, progress)
                    if status is not None:
                        ending = _describe_exit(status)
                        break
                    ending = _overdue(progress, must_end)
                    if ending is not None:
                        break
                    sink.save()
                    time.sleep(_POLL_S)
            _read_events(stream.read(), partial, part, sink, progress)  # what it said before it was ended
        text = stderr.read_text(errors="replace")
        sink.add_log(f"--- {part.name}, cases from {job.first} on: {ending or 'ended well'}\n{text}")
        return ending, last_lines(text)


def _overdue(progress: _Progress, must_end: float) -> str | None:
    now = time.monotonic()
    if now - progress.since > progress.time_allowed():
        return f"timeout after {progress.time_allowed():g} s"
    return "timeout: the part's budget had ended" if now > must_end else None


def _read_events(text: str, partial: str, part: Part, sink: Sink, progress: _Progress) -> str:
    """Take in what a worker wrote; return the line that is not complete yet."""
    *lines, rest = (partial + text).split("\n")
    for line in lines:
        event = json.loads(line)
        kind = event["event"]
        if kind == "cases":
            progress.cases = event["cases"]
        elif kind == "ready":
            progress.is_ready, progress.since = True, time.monotonic()
        elif kind == "begin":
            progress.running, progress.since = event["index"], time.monotonic()
        elif kind == "row":
            sink.add_row(part, event["table"], event["row"], event["timed"])
        elif kind == "skipped":
            progress.next_index = event["index"] + 1
            sink.add_skipped(part, _case(progress, event["index"])["name"], event["reason"])
        elif kind == "passed over":
            progress.next_index = event["index"] + 1
        else:  # "end" or "failed"
            progress.end_case(event["index"], event.get("error"))
            if kind == "failed":
                case = _case(progress, event["index"])
                sink.add_row(
                    part,
                    case["table"],
                    {"case": case["name"], **case["context"], "outcome": f"raised {event['error']}"},
                    [],
                )
    return rest


def _report_crash(
    part: Part, sink: Sink, progress: _Progress, ending: str, errors: str, only: list[str] | None
) -> None:
    """Report what ended a worker under the case that it was running, and go on behind that case."""
    progress.n_equal_errors = 0
    outcome: Row = {"outcome": f"crashed ({ending})", "last words": errors}
    if progress.running is not None:
        case = _case(progress, progress.running)
        sink.add_row(part, case["table"], {"case": case["name"], **case["context"], **outcome}, [])
        progress.next_index = progress.running + 1
    elif progress.is_ready:
        sink.add_row(part, "workers", {"case": "between cases", **outcome}, [])
    else:
        sink.add_row(part, "workers", {"case": "starting", **outcome}, [])
        if progress.cases is not None:  # the device cannot be opened: no case can run
            _skip_rest(part, sink, progress, "the worker does not start", only)


def _skip_rest(part: Part, sink: Sink, progress: _Progress, reason: str, only: list[str] | None) -> None:
    cases = progress.cases or [{"name": ALL}]
    for case in cases[progress.next_index :]:
        if only is None or case["name"] in only:
            sink.add_skipped(part, case["name"], reason)
    progress.next_index = len(cases)


def _case(progress: _Progress, index: int) -> dict[str, Any]:
    assert progress.cases is not None
    return progress.cases[index]


@contextmanager
def _started(job: Job, log: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A worker in a process group of its own, which is gone at the end, whatever it started."""
    process = subprocess.Popen(
        command(job), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # A process that is stuck in the kernel driver is left to the system: nothing here can end it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_KILL_S)


def _describe_exit(status: int) -> str | None:
    if status in (0, REPORTED):
        return None
    if status > 0:
        return f"exit status {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"


def last_lines(text: str) -> str:
    """The lines of a dead process's standard error that say the most: where it faulted, or else the last ones."""
    lines = [line for line in text.splitlines() if line.strip()]
    for index, line in enumerate(lines):
        if line.startswith("Fatal Python error"):
            before = lines[max(0, index - 2) : index]
            return "\n".join([*before, *lines[index : index + _N_ERROR_LINES]])
    return "\n".join(lines[-_N_ERROR_LINES:])
