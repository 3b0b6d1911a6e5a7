"""`vmem-kv stress`: let the allocator prove itself on this machine and this driver."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax
from rich.table import Column

from vmem_kv.errors import ConfigError
from vmem_kv.testing.stress import Finding, StressOptions, run_stress
from vmem_kv.testing.stress import Progress as Done
from vmem_kv.testing.targets import open_driver

DEFAULT_OPS = 100_000

_BAR_CELLS = 8


def stress(
    driver: Annotated[
        str, typer.Option(help="host, host:native, host:python, host:huge (hugetlbfs) or cuda:0.")
    ] = "host",
    seed: Annotated[int, typer.Option(min=0, help="All that is chosen depends on it.")] = 1,
    ops: Annotated[
        int | None,
        typer.Option("--ops", min=1, help="Stop after so many operations.", show_default=f"{DEFAULT_OPS:,}"),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Stop after so long, more than 0; with --ops, at what comes first.")
    ] = None,
    faults: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Share of operations for which a failing driver call is planned; most make too few calls to meet it.",
        ),
    ] = 0.15,
    threads: Annotated[
        int, typer.Option(min=1, max=64, help="With more than one, every other round is theirs, the first one too.")
    ] = 1,
    first_round: Annotated[
        int, typer.Option("--round", min=0, help="Begin with this round, as the report of a finding says.")
    ] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Let the allocator prove itself on this machine: random operations, with driver calls that fail.

    After every operation the books must add up, the driver's mappings must be those that a simple model predicts, every
    K and V row of every sequence must carry its owner's tag, and pages given to somebody must be zero. Ctrl-C ends it
    with the verdict so far; a finding ends it with a short program that repeats it.

    Exits with 0 where nothing was found, with 1 on a finding, with 2 where it could not begin or nothing was tried,
    with 130 where it was interrupted twice.

    Try one of these:

    - `vmem-kv stress`

    - `vmem-kv stress --minutes 10 --faults 0.3 --seed 7`

    - `vmem-kv stress --driver cuda:0 --threads 4`
    """
    out, err = Console(), Console(file=sys.stderr)
    if minutes is not None and not minutes > 0:
        raise typer.BadParameter("it must be more than 0", param_hint="--minutes")
    n_ops = DEFAULT_OPS if ops is None and minutes is None else ops
    options = StressOptions(
        driver, seed, n_ops, None if minutes is None else minutes * 60, faults, threads, first_round
    )
    with _interruptible() as is_interrupted:
        try:
            open_driver(driver).close()
        except ConfigError as error:
            advice = "; without a GPU, run it with --driver host" if driver.startswith("cuda:") else ""
            err.print(f"[bold red]error:[/] {escape(str(error) + advice)}", highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None
        with _bar(err) as bar:
            task = bar.add_task("", total=_total(options), counters="")

            def show(done: Done) -> bool:
                bar.update(task, completed=_share(options, done), counters=_counters(done))
                return not is_interrupted

            done = run_stress(options, lambda: open_driver(driver), on_progress=show)
    _print_verdict(out, options, done)
    if done.findings:
        raise typer.Exit(1)
    if not done.n_ops:
        raise typer.Exit(2)


def _bar(console: Console) -> Progress:
    """A progress bar. Where the line is narrow the counters take several: what was found must not be cut off."""
    counters = TextColumn("{task.fields[counters]}", table_column=Column(no_wrap=False))
    columns = (BarColumn(_BAR_CELLS), TaskProgressColumn(), TimeElapsedColumn(), counters)
    return Progress(*columns, console=console, transient=True)


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """A list that is no longer empty once the user has interrupted. A second interruption is the usual one.

    What it says goes past rich: it may come in the middle of anything.
    """
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, before)
        os.write(2, b"interrupted: this round is finished first; interrupt once more to end at once\n")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def _total(options: StressOptions) -> float | None:
    return 1.0 if options.n_ops is not None or options.seconds is not None else None


def _share(options: StressOptions, done: Done) -> float:
    shares = [0.0]
    if options.n_ops:
        shares.append(done.n_ops / options.n_ops)
    if options.seconds:
        shares.append(done.seconds / options.seconds)
    return max(shares)


def _counters(done: Done) -> str:
    threaded = f" ({done.n_threaded_ops:,} of them by threads)" if done.n_threaded_ops else ""
    return (
        f"{done.n_ops:,} operations{threaded}, {done.n_faults:,} faults, {done.n_pages:,} pages, "
        f"{done.n_checks:,} tags, {len(done.findings)} findings"
    )


def _print_verdict(out: Console, options: StressOptions, done: Done) -> None:
    how = f"driver {options.driver_name}, seed {options.seed}, faults {options.fault_share:g}"
    if options.n_threads > 1:
        how += f", {options.n_threads} threads"
    stopped = ", stopped by the user" if done.was_stopped else ""
    out.print(f"{_counters(done)}, in {done.seconds:.1f} s ({how}){stopped}", highlight=False, soft_wrap=True)
    if not done.findings and not done.n_ops:
        out.print("[bold yellow]nothing was tried[/]: this says nothing about the allocator", highlight=False)
        return
    if not done.findings:
        out.print("[bold green]clean[/]: nothing was found", highlight=False)
        return
    for finding in done.findings:
        out.print(
            f"[bold red]finding[/] with seed {finding.seed}: {escape(finding.what)}", highlight=False, soft_wrap=True
        )
        if finding.program:
            out.print("To repeat it:", highlight=False)
            out.print(Syntax(finding.program, "python", background_color="default", word_wrap=True))
        else:
            out.print("To repeat it, a few times if need be:", highlight=False)
            out.print(f"    {_command(options, finding)}", highlight=False, soft_wrap=True, markup=False)
            if options.n_threads > 1:
                out.print("It repeats what threads chose, not who came first.", highlight=False)


def _command(options: StressOptions, finding: Finding) -> str:
    """The command that makes the round of a finding once more, alone."""
    words = ["vmem-kv", "stress", "--driver", options.driver_name, "--seed", str(options.seed)]
    words += ["--faults", repr(options.fault_share), "--threads", str(options.n_threads)]
    return shlex.join([*words, "--round", str(finding.round), "--ops", str(finding.n_ops)])
