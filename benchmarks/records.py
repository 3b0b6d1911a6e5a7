"""What the programs have in common: medians with their range, targets with their verdicts, and the JSON record."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
SCHEMA = 1
"""Raised when a field of the JSON changes its meaning."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Values of several rounds: their median, and the least and the greatest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Summarise at least one value."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[0], ordered[-1])

    @classmethod
    def of_ratios(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
        """Summarise the ratios of two systems, round by round."""
        return cls.of(a / b for a, b in zip(numerators, denominators, strict=True))

    def show(self, digits: int = 2) -> str:
        """The median with its range, for a table."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}–{self.high:.{digits}f})"


@dataclass(frozen=True, slots=True)
class Target:
    """A bound that every one of some measured points should keep; the medians decide."""

    what: str
    bound: float
    is_minimum: bool
    points: tuple[tuple[str, Spread], ...]

    @property
    def verdict(self) -> str:
        """`pass`, `miss`, or `not measured` where this run had no such point."""
        if not self.points:
            return "not measured"
        return "pass" if self.n_kept == len(self.points) else "miss"

    @property
    def n_kept(self) -> int:
        """At how many points the bound is kept."""
        return sum(self._keeps(spread) for _, spread in self.points)

    @property
    def worst(self) -> tuple[str, Spread]:
        """The point that is the farthest on the wrong side, or the nearest to it."""
        choose = min if self.is_minimum else max
        return choose(self.points, key=lambda point: point[1].median)

    def to_json(self) -> dict[str, Any]:
        """Everything, with the verdict."""
        points = [{"where": where, **asdict(spread)} for where, spread in self.points]
        return {
            "what": self.what,
            "bound": self.bound,
            "is_minimum": self.is_minimum,
            "verdict": self.verdict,
            "n_kept": self.n_kept,
            "points": points,
        }

    def _keeps(self, spread: Spread) -> bool:
        return spread.median >= self.bound if self.is_minimum else spread.median <= self.bound


def print_targets(console: Console, targets: Sequence[Target]) -> None:
    """Say plainly which targets were met and which were missed, and by how much."""
    table = Table(title="Targets (the worst point of each: median and range over the rounds)")
    for column in ("target", "bound", "worst point", "measured", "points kept", "verdict"):
        table.add_column(column)
    for target in targets:
        sign = "≥" if target.is_minimum else "≤"
        where, measured, kept = "", "", ""
        if target.points:
            where, spread = target.worst
            measured, kept = spread.show(3), f"{target.n_kept} of {len(target.points)}"
        colour = {"pass": "green", "miss": "red"}.get(target.verdict, "yellow")
        verdict = f"[{colour}]{target.verdict}[/]"
        table.add_row(target.what, f"{sign} {target.bound:g}", where, measured, kept, verdict)
    console.print(table)


def warn_if_busy(console: Console) -> None:
    """Say so if other processes are at work: ratios survive that better than times, but not unharmed."""
    load = os.getloadavg()[0]
    if load > 0.5:
        console.print(f"[yellow]load average {load:.1f}: other processes are running, expect noise[/]")


def describe_run() -> dict[str, Any]:
    """Return what somebody needs who wants to run the same again, or to judge how quiet the machine was."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "commit": _git("rev-parse", "HEAD"),
        # What earlier runs wrote does not change what this one finds.
        "has_uncommitted_changes": bool(
            _git("status", "--porcelain", "--", "vmem_kv", "native", "benchmarks", ":!benchmarks/results")
        ),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "kernel": platform.release(),
        "cpu": _cpu_model(),
        "n_cpus": len(os.sched_getaffinity(0)),
        "load_average_at_start": os.getloadavg()[0],
    }


def write_json(path: Path, program: str, record: dict[str, Any]) -> None:
    """Write a run's record."""
    path.write_text(json.dumps({"schema": SCHEMA, "program": program, **record}, indent=1) + "\n")


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
