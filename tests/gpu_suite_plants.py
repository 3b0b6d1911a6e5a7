"""Cases that end in every bad way, for tests of the GPU suite's runner. Run in worker processes, by module name."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.cases import Case, Reporter
from benchmarks.gpu.plan import Plan


def _good(bench: Bench, report: Reporter) -> None:
    report.row("rows", {"case": "good", "pid": os.getpid()})


def _crash(bench: Bench, report: Reporter) -> None:
    report.row("rows", {"case": "said before the crash"})
    sys.stderr.write("these were its last words\n")
    os.kill(os.getpid(), signal.SIGKILL)


def _fault(bench: Bench, report: Reporter) -> None:
    import ctypes

    ctypes.string_at(8)


def _hang(bench: Bench, report: Reporter) -> None:
    report.row("rows", {"case": "said before it hung", "pid": os.getpid()})
    time.sleep(600)


def _raise(bench: Bench, report: Reporter) -> None:
    raise ValueError("planted")


def _exit(bench: Bench, report: Reporter) -> None:
    os._exit(3)


def _dangerous_but_good(bench: Bench, report: Reporter) -> None:
    report.row("rows", {"case": "dangerous", "pid": os.getpid()})


def cases(plan: Plan) -> Sequence[Case]:
    return [
        Case("good", _good),
        Case("crash", _crash, table="bad", context={"expected": "a crash"}),
        Case("fault", _fault, table="bad"),
        Case("too dear", _good, cost_s=1e9),
        Case("hang", _hang, timeout_s=5.0, table="bad"),
        Case("raise", _raise, table="bad"),
        Case("good again", _good),
        Case("dangerous", _dangerous_but_good, is_dangerous=True),
        Case("exit", _exit, is_dangerous=True, table="bad"),
        Case("last", _good),
    ]
