"""The process that runs cases: `python -m benchmarks.gpu.worker JOB`, started by `runner`, never by hand.

It runs the part's cases from a given one on, up to the next dangerous one; a dangerous one runs alone. It says what it
begins before it begins it, so that `runner` knows what ended it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench import Bench, open_bench
from benchmarks.gpu.cases import LOST, Case, Reporter
from benchmarks.gpu.plan import choose_plan

_PR_SET_PDEATHSIG = 1
REPORTED = 75
"""Exit status of a worker that has reported everything, and in which nothing more should run."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker is told to do."""

    module: str
    emulate: bool
    quick: bool
    first: int  # index of the case to begin with
    budget_s: float
    events: str  # where to write
    parent: int  # process id of the runner
    only: list[str] | None = None  # names of the cases to run; all of them


def main(job: Job) -> int:
    """Run the job's cases; return the exit status."""
    _end_with(job.parent)
    faulthandler.enable()
    ends = time.monotonic() + job.budget_s
    reporter = Reporter(Path(job.events))
    plan = choose_plan(emulate=job.emulate, quick=job.quick)
    cases: Sequence[Case] = importlib.import_module(job.module).cases(plan)
    reporter.event("cases", cases=[_describe(case) for case in cases])
    bench = open_bench(plan)
    reporter.event("ready")
    try:
        return _run_cases(bench, cases, job, ends, reporter)
    finally:
        bench.close()
        reporter.close()


def _run_cases(bench: Bench, cases: Sequence[Case], job: Job, ends: float, reporter: Reporter) -> int:
    is_fresh = True
    for index in range(job.first, len(cases)):
        case = cases[index]
        if job.only is not None and case.name not in job.only:
            reporter.event("passed over", index=index)
            continue
        if case.is_dangerous and not is_fresh:
            return 0  # it gets a process of its own
        if case.cost_s > ends - time.monotonic():
            reporter.event("skipped", index=index, reason="time budget: it would not have fitted any more")
            continue
        is_fresh = False
        reporter.event("begin", index=index)
        began = time.monotonic()
        try:
            case.run(bench, reporter)
        except Exception as error:  # the boundary: whatever a case raises is its result
            traceback.print_exc()
            is_lost = not bench.is_healthy()
            words = f"{type(error).__name__}: {error}"[:500] + (f" ({LOST})" if is_lost else "")
            reporter.event("failed", index=index, error=words)
            # The traceback's frames hold tensors and mappings, and on a lost device closing would hang or raise: the
            # next case gets a fresh process.
            os._exit(REPORTED)
        reporter.event("end", index=index, seconds=round(time.monotonic() - began, 3))
        if not bench.is_healthy():
            reporter.row("workers", {"case": case.name, **case.context, "outcome": LOST})
            os._exit(REPORTED)
        bench.settle()
        if case.is_dangerous:
            return 0
    return 0


def _describe(case: Case) -> dict[str, Any]:
    return {
        "name": case.name,
        "timeout_s": case.timeout_s,
        "table": case.table,
        "danger": case.is_dangerous,
        "context": case.context,
    }


def _end_with(parent: int) -> None:
    """Have the kernel end this process when the runner ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def command(job: Job) -> list[str]:
    """The command line of a worker."""
    return [sys.executable, "-m", "benchmarks.gpu.worker", json.dumps(asdict(job))]


if __name__ == "__main__":
    sys.exit(main(Job(**json.loads(sys.argv[1]))))
