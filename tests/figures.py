"""Figures: what the proofs showed and how often, printed at the end of a run and written where they are published.

A test records a figure as the name of what it showed, on which driver, and counts. Figures of one name and driver are
added up over tests, and over the workers of pytest-xdist. At the end of a run they are printed, and what was skipped
beside them, with the reason: it was not shown. `--figures FILE` writes the same as Markdown, between two marker lines
where the file has them. A run that shows nothing leaves the file alone: one command may be several runs.

Guarantees: only tests that passed count. Their number, and that of those that did not, stands in the first line.
Assumptions: `tests/conftest.py` imports the hooks from here. A controlling process of pytest-xdist collects nothing and
would not see a conftest further down.
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest

ROOT = Path(__file__).parents[1]
PROPERTY = "figure"
PROOFS = "tests/proof/"
BEGIN = "<!-- figures: pytest tests/proof -n 2 --figures docs/reliability.md -->"
END = "<!-- end of figures -->"


class Record(Protocol):
    """Report a figure. Counts are added up over all tests that report the same `what` on the same `on`."""

    def __call__(self, what: str, on: str = "", **counts: int) -> None: ...


@dataclass
class Figure:
    """What several tests counted together."""

    what: str
    on: str
    module: str
    counts: Counter[str] = field(default_factory=Counter)
    n_tests: int = 0

    @property
    def shown(self) -> str:
        """The counts, for people."""
        return ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in self.counts.items())


@dataclass(frozen=True)
class Began:
    """When a run began, and beside what."""

    at: datetime.datetime
    clock_s: float
    load: float


BEGAN = pytest.StashKey[Began]()


def recorder(add_property: Any) -> Record:
    """What a `record` fixture returns, given pytest's `record_property`."""

    def record(what: str, on: str = "", **counts: int) -> None:
        add_property(PROPERTY, {"what": what, "on": on, "counts": counts})

    return record


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", type=Path, metavar="FILE", help="write the figures that the proofs recorded there")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BEGAN] = Began(datetime.datetime.now(), time.monotonic(), os.getloadavg()[0])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was shown and how often, and what was not."""
    figures = added_up(terminalreporter.getreports("passed"))
    for figure in figures:
        name = f"{figure.what}, {figure.on}" if figure.on else figure.what
        terminalreporter.write_line(f"{name}: {figure.shown}{_in_tests(figure.n_tests)}")
    skipped = reasons(terminalreporter.getreports("skipped"))
    for reason, n_tests in skipped.items():
        terminalreporter.write_line(f"not shown: {reason}{_in_tests(n_tests)}")
    path = config.getoption("figures")
    if path is not None and figures:
        n_tests = {outcome: len(reports) for outcome, reports in terminalreporter.stats.items()}
        head = headline(config.stash[BEGAN], n_tests, config)
        old = path.read_text("utf-8") if path.exists() else ""
        path.write_text(put_in(old, markdown(head, figures, skipped)), "utf-8")
        terminalreporter.write_line(f"written to {path}")


def added_up(reports: Iterable[Any]) -> list[Figure]:
    """The figures of these tests, sorted by where they come from."""
    found: dict[tuple[str, str, str], Figure] = {}
    for report in reports:
        module = report.nodeid.partition("::")[0].rpartition("/")[2]
        for name, value in report.user_properties:
            if name == PROPERTY:
                key = (module, value["what"], value["on"])
                figure = found.setdefault(key, Figure(value["what"], value["on"], module))
                figure.counts.update(value["counts"])
                figure.n_tests += 1
    return [found[key] for key in sorted(found)]


def reasons(reports: Iterable[Any]) -> Counter[str]:
    """Why proofs were skipped, and how many tests for each reason."""
    found: Counter[str] = Counter()
    for report in reports:
        if report.nodeid.startswith(PROOFS):
            _, _, reason = report.longrepr
            found[reason.removeprefix("Skipped: ")] += 1
    return found


def headline(began: Began, n_tests: dict[str, int], config: pytest.Config) -> str:
    """Say when, where, on what and beside what the figures were made."""
    seconds = time.monotonic() - began.clock_s
    n_workers = getattr(config.option, "numprocesses", None) or 1
    outcomes = ", ".join(f"{n_tests.get(kind, 0)} {kind}" for kind in ("passed", "failed", "error", "skipped"))
    return (
        f"Measured on {began.at:%Y-%m-%d} at {_commit()} by `pytest {' '.join(config.invocation_params.args)}`: "
        f"{outcomes}, in {seconds:,.0f} s with {n_workers} workers. Python {platform.python_version()}, Linux "
        f"{platform.release()}, {os.cpu_count()} cores, load {began.load:.1f} before it and "
        f"{os.getloadavg()[0]:.1f} at its end."
    )


def markdown(head: str, figures: Iterable[Figure], skipped: Counter[str]) -> str:
    """The figures as a table, with what was not shown behind it."""
    lines = [head, "", "| what | on | shown | tests | by |", "|---|---|---|---|---|"]
    lines += [f"| {f.what} | {f.on} | {f.shown} | {f.n_tests} | `{f.module}` |" for f in figures]
    lines += ["", *(f"Not shown on that machine: {why}{_in_tests(n)}." for why, n in skipped.items())]
    return "\n".join(lines).rstrip() + "\n"


def put_in(old: str, text: str) -> str:
    """A file's content with `text` between its marker lines; `text` alone where there are none."""
    before, begin, rest = old.partition(BEGIN + "\n")
    _, end, behind = rest.partition(END)
    return f"{before}{begin}\n{text}\n{end}{behind}" if end else text


def _in_tests(n_tests: int) -> str:
    return f" ({n_tests} tests)" if n_tests > 1 else ""


def _commit() -> str:
    """The commit, and whether the tree differs from it."""
    try:
        name = _git("rev-parse", "--short", "HEAD").strip()
        has_changes = _git("status", "--porcelain", "--untracked-files=no").strip()
    except (OSError, subprocess.CalledProcessError):
        return "an unknown commit"
    return f"commit {name}" + (" with changes" if has_changes else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout
