"""What the commands that read traces have in common: options, a trace's summary, a progress bar, a JSON file.

The options are annotations, so that both commands say the same of them in their help.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vmem_kv.errors import ConfigError
from vmem_kv.replay.schedule import LOOK_AHEAD, StepTime
from vmem_kv.replay.study import Setting, Traffic
from vmem_kv.traces.formats import TraceSummary, scan_trace
from vmem_kv.traces.shapes import SHAPES
from vmem_kv.units import format_bytes, parse_bytes

DEFAULT_BUDGET = "40GiB"
TRAFFIC, MEMORY, RESULTS = "Which requests, and when they come", "What they run on", "What comes out"
"""Headings of the help."""


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


ModelOption = Annotated[
    str,
    typer.Option(
        metavar="SHAPE",
        rich_help_panel=MEMORY,
        help=f"Whose K and V are held: {', '.join(SHAPES)}; or LAYERSxHEADSxDIM:FORMAT, such as 32x8x128:bf16.",
    ),
]
PolicyOption = Annotated[
    PolicyName,
    typer.Option(
        rich_help_panel=TRAFFIC,
        help=f"Who of the waiting is admitted next: the first; the first of {LOOK_AHEAD} that fits; or the shortest "
        f"prompt of {LOOK_AHEAD}.",
    ),
]
LoadOption = Annotated[
    Load,
    typer.Option(
        rich_help_panel=TRAFFIC,
        help="Requests come at their recorded arrivals, or all of them wait from the start (full). auto: recorded "
        "where the trace has arrivals in order.",
    ),
]
PatienceOption = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        metavar="SECONDS",
        rich_help_panel=TRAFFIC,
        help="With recorded arrivals: reject who has waited for longer since it came.",
        show_default="never",
    ),
]
MaxRequestsOption = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", rich_help_panel=TRAFFIC, help="Take the first N requests only.", show_default="all"
    ),
]
MaxBatchOption = Annotated[
    int, typer.Option(min=1, max=65536, metavar="N", rich_help_panel=MEMORY, help="The most sequences at once.")
]
SpeedOption = Annotated[
    float,
    typer.Option(
        metavar="FACTOR",
        rich_help_panel=MEMORY,
        help="How fast the simulated device is: 1 for an 8B model on one large GPU (a step takes 6 ms, 40 us for each "
        "prompt token and 0.04 us for each token in the cache), 2 for one twice as fast.",
    ),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE.json", rich_help_panel=RESULTS, help="Write all results.")
]
DebugOption = Annotated[bool, typer.Option("--debug", rich_help_panel=RESULTS, help="Show the traceback of an error.")]


def read_size(option: str, text: str) -> int:
    """Read a number of bytes.

    Raises:
        ConfigError: It is no size, or none at all.
    """
    try:
        n_bytes = parse_bytes(text)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from error
    if n_bytes < 1:
        raise ConfigError(f"{option} is {text}; give some memory, for example {DEFAULT_BUDGET}")
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
        reason = "arrivals that go back in time" if summary.has_arrivals else _missing_arrivals(summary)
        raise ConfigError(f"{path} has {reason}; replay it with --load full")
    usual = StepTime()
    step_time = StepTime(
        usual.fixed_s / speed, usual.prefill_s / speed, usual.context_s / speed, usual.restore_s / speed
    )
    is_timed = has_clock if load is Load.AUTO else load is Load.RECORDED
    if patience_s is not None and not is_timed:
        remedy = "play it with --load recorded, or leave --patience out" if has_clock else "leave --patience out"
        raise ConfigError(f"--patience does nothing where all wait from the start, as {path} is played here; {remedy}")
    if patience_s is not None and not patience_s >= 0:  # NaN as well
        raise ConfigError(f"--patience is {patience_s}; it must be a number of seconds, 0 or more")
    return Traffic(summary, is_timed, policy.value, max_requests, patience_s, step_time)


def describe_traffic(traffic: Traffic) -> str:
    """One line about a trace and how it is played."""
    summary: TraceSummary = traffic.summary
    load = "at their recorded arrivals" if traffic.is_timed else "all waiting from the start"
    if traffic.is_timed and summary.arrival_note:
        load += f" (of which the file says: {summary.arrival_note})"
    elif not traffic.is_timed and summary.has_arrivals and not summary.is_ascending:
        load += " (the trace's arrivals go back in time)"
    elif summary.n_arrivals and not summary.has_arrivals:
        load += f" (the trace has {_missing_arrivals(summary)}: no arrival is used)"
    note = f"; {summary.note}" if summary.note else ""
    return (
        f"{summary.path.name}: {summary.form} form, {count(summary.n_requests, 'request')}, "
        f"{summary.prompt_tokens:,} prompt and {summary.output_tokens:,} output tokens, {load}, {traffic.policy}{note}"
    )


def _missing_arrivals(summary: TraceSummary) -> str:
    without = count(summary.n_requests - summary.n_arrivals, "request")
    return f"{without} without an arrival, of {summary.n_requests:,}"


def check_room(setting: Setting, traffic: Traffic) -> None:
    """Refuse a budget under which nothing could run.

    Raises:
        ConfigError: It holds no request of the trace.
    """
    shortest = traffic.summary.shortest_tokens
    if setting.max_tokens < shortest:
        raise no_room(setting, traffic)


def no_room(setting: Setting, traffic: Traffic) -> ConfigError:
    """What to raise where no request could run."""
    shortest = traffic.summary.shortest_tokens
    return ConfigError(
        f"--budget is {format_bytes(setting.budget_bytes)}, which holds no request of {traffic.summary.path}: the "
        f"shortest comes to {count(shortest, 'token')}, {format_bytes(shortest * setting.shape.token_bytes)} and what "
        "its last pages leave empty; raise it"
    )


def remarks(setting: Setting, traffic: Traffic) -> list[str]:
    """What somebody must know who reads the results of a trace in a setting."""
    longest_tokens = traffic.summary.longest_tokens
    if setting.max_tokens >= longest_tokens:
        return []
    remark = (
        f"The budget holds one sequence of {setting.max_tokens:,} tokens at most, and the trace's longest is of "
        f"{longest_tokens:,}: longer ones are rejected. Raise --budget."
    )
    return [remark]


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


def write(out: Console, text: str, style: str | None = None) -> None:
    """Write a line as it is: rich's own ideas about markup, colours and line ends left out."""
    out.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def count(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def show_reasons(counts: Mapping[str, int]) -> str:
    """What there was too little of, and how often."""
    return ", ".join(f"{_REASONS.get(name, name)} {n:,}" for name, n in sorted(counts.items()))


_REASONS = {
    "OutOfPages": "too few pages",
    "OutOfMappings": "too few mappings",
    "OutOfAddressSpace": "longer than the budget could hold",
    "OutOfSlots": "batch full",
    "patience": "waited too long",
}


def show_share(share: float | None) -> str:
    """A share for a table."""
    return "-" if share is None else f"{share:.1%}"


def show_number(number: float | None, digits: int = 1) -> str:
    """A number for a table."""
    return "-" if number is None else f"{number:,.{digits}f}"
