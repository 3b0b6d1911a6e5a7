"""What a part of the suite is made of: cases, and the reporter that they write their rows to.

A case is a name and a function that is given the bench and a reporter. Rows are on disk as soon as they are reported:
whatever happens to the process later, they are kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu.bench import Bench

Row = dict[str, Any]

OK = "ok"
WRONG = "WRONG"
NEEDS_GPU = "needs a GPU"
LOST = "the device was lost"
FAULT = "a fault"
ANYTHING = "its process may end"
"""`expected` of cases after which a crash, or a lost device, is no bad news; `FAULT` is another."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the suite, by the module that lists its cases.

    Attributes:
        name: As on the command line.
        title: For readers.
        module: Has `cases(plan) -> Sequence[Case]`.
        weight: Its share of the time budget.
    """

    name: str
    title: str
    module: str
    weight: float


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to find out.

    Attributes:
        name: Unique in its part.
        run: Does it, and reports rows.
        cost_s: A guess of how long it takes; it is skipped where less than that is left of the budget.
        timeout_s: When to give up on it and end its process.
        is_dangerous: It may well end its process or lose the device: it gets a process of its own.
        table: Where the row goes that says that it did not end well.
        context: Columns of that row.
    """

    name: str
    run: Callable[[Bench, Reporter], None]
    cost_s: float = 1.0
    timeout_s: float = 60.0
    is_dangerous: bool = False
    table: str = "cases that did not end"
    context: Row = field(default_factory=dict)


class Reporter:
    """Appends events to a file of JSON lines.

    Args:
        path: The file; who runs the worker reads it while it grows.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def row(self, table: str, row: Row, *, timed: Sequence[str] = ()) -> None:
        """Report one row.

        Args:
            table: Which table it belongs to.
            row: Column -> value.
            timed: The columns that hold times or what follows from times, which mean nothing without a device.
        """
        self.event("row", table=table, row={name: _plain(value) for name, value in row.items()}, timed=list(timed))

    def event(self, kind: str, **fields: Any) -> None:
        """Write one event; it is in the file when this returns."""
        self._file.write(json.dumps({"event": kind, **fields}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
