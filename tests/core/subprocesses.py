"""Run a piece of Python in a process of its own: for limits, signals and forks that this process must not suffer."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 500
"""Of a busy machine with slow disks: only what hangs takes so long."""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` from the repository's root and return what came of it."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def output_of(code: str) -> str:
    """Run `code` and return what it printed; anything but success is a failure."""
    done = run_python(code)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()
