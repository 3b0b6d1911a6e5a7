"""What a run found out, as one JSON file and one Markdown file, both complete and valid at any moment of the run.

Files are replaced, never written in place, so that a run that is killed leaves the results of a moment before.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import Part, Row

SCHEMA = 1
"""Raised when a field of the JSON changes its meaning."""
NOT_A_TIMING = "emulated, not a timing"
_SAVE_EVERY_S = 2.0
_MAX_LOG_CHARS = 200_000


@dataclass(slots=True)
class Table:
    """Rows of one kind."""

    rows: list[Row] = field(default_factory=list)
    timed: list[str] = field(default_factory=list)

    def columns(self) -> list[str]:
        """Every column that a row has, in the order of first appearance."""
        return list(dict.fromkeys(column for row in self.rows for column in row))


@dataclass(slots=True)
class PartResults:
    """What one part found out."""

    title: str
    seconds: float | None = None  # None while it runs
    tables: dict[str, Table] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)


class Results:
    """Collects rows and writes them.

    Args:
        folder: Where to write; it is made if it is not there.
        stem: File names without their endings.
        run: What describes the run: device, command, versions.
        is_emulated: Whether times mean nothing.
    """

    def __init__(self, folder: Path, stem: str, run: dict[str, Any], *, is_emulated: bool) -> None:
        self.run = run
        self.parts: dict[str, PartResults] = {}
        self.is_emulated = is_emulated
        self._base = folder / stem
        self._log = ""
        self._has_news = True
        self._saved_at = -math.inf
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def json_path(self) -> Path:
        """The record."""
        return self._base.with_name(self._base.name + ".json")

    @property
    def markdown_path(self) -> Path:
        """The tables."""
        return self._base.with_name(self._base.name + ".md")

    @property
    def log_path(self) -> Path:
        """What the workers wrote to their standard error."""
        return self._base.with_name(self._base.name + ".log")

    def begin(self, part: Part) -> None:
        """Open a part."""
        self.parts[part.name] = PartResults(part.title)
        self._has_news = True

    def end(self, part: Part, seconds: float) -> None:
        """Close a part that ran so long, this time."""
        kept = self.parts[part.name]
        kept.seconds = round((kept.seconds or 0.0) + seconds, 1)
        self._has_news = True

    def add_row(self, part: Part, table: str, row: Row, timed: Sequence[str]) -> None:
        """Keep a row."""
        kept = self.parts[part.name].tables.setdefault(table, Table())
        kept.rows.append(row)
        kept.timed += [column for column in timed if column not in kept.timed]
        self._has_news = True

    def add_skipped(self, part: Part, case: str, reason: str) -> None:
        """Keep that a case did not run."""
        self.parts[part.name].skipped.append({"case": case, "reason": reason})
        self._has_news = True

    def take_skipped(self, part: Part, beginning: str) -> list[str]:
        """Take out the cases that were skipped for a reason that begins so, and return their names."""
        skipped = self.parts[part.name].skipped
        taken = [entry for entry in skipped if entry["reason"].startswith(beginning)]
        skipped[:] = [entry for entry in skipped if entry not in taken]
        self._has_news = True
        return [entry["case"] for entry in taken]

    def add_log(self, text: str) -> None:
        """Keep what a worker wrote to its standard error."""
        self._log = (self._log + text)[-_MAX_LOG_CHARS:]
        self._has_news = True

    def save(self, *, now: bool = False) -> None:
        """Write everything, if there is news and the last time was not just now."""
        if not now and (not self._has_news or time.monotonic() - self._saved_at < _SAVE_EVERY_S):
            return
        _replace(self.json_path, json.dumps(self.to_json(), indent=1) + "\n")
        _replace(self.markdown_path, self.to_markdown())
        _replace(self.log_path, self._log)
        self._has_news, self._saved_at = False, time.monotonic()

    def to_json(self) -> dict[str, Any]:
        """The whole record."""
        return {
            "schema": SCHEMA,
            "program": "gpu",
            "emulated": self.is_emulated,
            "times": NOT_A_TIMING if self.is_emulated else "device events or the wall clock, as each column says",
            "run": self.run,
            "parts": {
                name: {
                    "title": part.title,
                    "seconds": part.seconds,
                    "tables": {
                        title: {"timed_columns": table.timed, "rows": table.rows}
                        for title, table in part.tables.items()
                    },
                    "skipped": part.skipped,
                }
                for name, part in self.parts.items()
            },
        }

    def to_markdown(self) -> str:
        """All tables, for readers."""
        lines = ["# GPU suite" + (f" ({NOT_A_TIMING})" if self.is_emulated else ""), ""]
        lines += [f"* {name}: {_show(value)}" for name, value in self.run.items()]
        for part in self.parts.values():
            took = "running or cut off" if part.seconds is None else f"{part.seconds:.0f} s"
            lines += ["", f"## {part.title} ({took})"]
            for title, table in part.tables.items():
                lines += ["", f"### {title}", "", *self._markdown_table(table)]
            if part.skipped:
                lines += ["", "### Skipped", ""]
                lines += [f"* {reason}: {', '.join(names)}" for reason, names in _by_reason(part.skipped)]
        return "\n".join(lines) + "\n"

    def _markdown_table(self, table: Table) -> Iterable[str]:
        columns = table.columns()
        heads = [f"{c} ({NOT_A_TIMING})" if self.is_emulated and c in table.timed else c for c in columns]
        yield _line(heads)
        yield _line(["---"] * len(columns))
        for row in table.rows:
            yield _line([_show(row.get(column)) for column in columns])


def _by_reason(skipped: Sequence[dict[str, str]]) -> Iterable[tuple[str, list[str]]]:
    reasons: dict[str, list[str]] = {}
    for entry in skipped:
        reasons.setdefault(entry["reason"], []).append(entry["case"])
    return reasons.items()


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _show(value: Any) -> str:
    """A value for a table's cell."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_show(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_show(item)}" for key, item in value.items())
    return str(value).replace("|", "\\|").replace("\n", "<br>")


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
