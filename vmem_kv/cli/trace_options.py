"""What the commands that read traces have in common: options, a trace's summary, a progress bar, a JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vmem_kv.errors import ConfigError
from vmem_kv.replay.schedule import StepTime
from vmem_kv.replay.study import Traffic
from vmem_kv.traces.formats import TraceSummary, scan_trace
from vmem_kv.units import parse_bytes

DEFAULT_BUDGET = "40GiB"


class Load(StrEnum):
    """When requests come."""

    AUTO = "auto"
    RECORDED = "recorded"
    FULL = "full"


class PolicyName(StrEnum):
    """Who is admitted next."""

    FCFS = "fcfs"
    FIRST_FIT = "first_fit"
    SHORTEST = "shortest"


def read_budget(text: str) -> int:
    """Read --budget.

    Raises:
        ConfigError: It is no size, or none at all.
    """
    n_bytes = parse_bytes(text)
    if n_bytes < 1:
        raise ConfigError(f"--budget is {text}; give some memory, for example {DEFAULT_BUDGET}")
    return n_bytes


def make_traffic(
    path: Path, load: Load, policy: PolicyName, *, max_requests: int | None, patience_s: float | None, speed: float
) -> Traffic:
    """Check a whole trace, and decide how it is played.

    Raises:
        ConfigError: The trace is malformed, has no arrivals though they are asked for, or a number makes no sense.
    """
    if not 0 < speed < math.inf:
        raise ConfigError(f"--speed is {speed}; it must be a positive number, 2 for a device twice as fast")
    summary = scan_trace(path, max_requests)
    has_clock = summary.has_arrivals and summary.is_ascending
    if load is Load.RECORDED and not has_clock:
        reason = "arrivals that go back in time" if summary.has_arrivals else "requests without an arrival"
        raise ConfigError(f"{path} has {reason}; replay it with --load full")
    usual = StepTime()
    step_time = StepTime(usual.fixed_s / speed, usual.prefill_s / speed, usual.context_s / speed)
    is_timed = has_clock if load is Load.AUTO else load is Load.RECORDED
    if patience_s is not None and not is_timed:
        remedy = "play it with --load recorded, or leave --patience out" if has_clock else "leave --patience out"
        raise ConfigError(f"--patience does nothing where requests always wait, as {path} is played here; {remedy}")
    if patience_s is not None and not patience_s >= 0:  # NaN as well
        raise ConfigError(f"--patience is {patience_s}; it must be a number of seconds, 0 or more")
    return Traffic(summary, is_timed, policy.value, max_requests, patience_s, step_time)


def describe_traffic(traffic: Traffic) -> str:
    """One line about a trace and how it is played."""
    summary: TraceSummary = traffic.summary
    load = "at their recorded arrivals" if traffic.is_timed else "always some waiting"
    if not traffic.is_timed and summary.has_arrivals and not summary.is_ascending:
        load += " (the trace's arrivals go back in time)"
    note = f"; {summary.note}" if summary.note else ""
    return (
        f"{summary.path.name}: {summary.form} form, {summary.n_requests:,} requests, "
        f"{summary.prompt_tokens:,} prompt and {summary.output_tokens:,} output tokens, {load}, {traffic.policy}{note}"
    )


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Show a bar while a terminal looks on; yields what starts a task and returns its `watch`."""
    what = (SpinnerColumn(), TextColumn("{task.description}"))
    columns = (*what, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        def start(what: str, n_requests: int) -> Callable[[int], None]:
            task = progress.add_task(escape(what), total=n_requests)
            return lambda n_through: progress.update(task, completed=n_through)

        yield start


def check_writable(option: str, path: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse a file that cannot be written before the work is done that goes into it.

    Raises:
        ConfigError: Its name or its folder is wrong.
    """
    if path.suffix.lower() not in suffixes:
        raise ConfigError(f"{option} is {path}; its name must end with {' or '.join(suffixes)}")
    is_new = not path.exists()
    try:
        path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"{option} is {path}; it cannot be written: {error.strerror}") from error


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a file of results, with one line for each field and for each row of a list of objects."""
    fields = []
    for name, value in data.items():
        text = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]"
        fields.append(f" {json.dumps(name)}: {text}")
    path.write_text("{\n" + ",\n".join(fields) + "\n}\n")


def show_share(share: float | None) -> str:
    """A share for a table."""
    return "-" if share is None else f"{share:.1%}"


def show_number(number: float | None, digits: int = 1) -> str:
    """A number for a table."""
    return "-" if number is None else f"{number:,.{digits}f}"
