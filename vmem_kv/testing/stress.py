"""Random operations for as long as wanted, with faults and threads, and what was found: the engine of a command.

With one thread every operation is held against the reference model (`operations.py`); one round in four has a host
tier, files and sessions as well (`session_operations.py`). With more, every other round, beginning with the first, lets
threads work on one pool at a time, where no model can say who comes first (`thread_round.py`).

Guarantees: ends early when asked, with everything given back and the verdict so far. A finding of a single thread comes
with a program that repeats it, shortened; of several threads only the round can be named: what they choose repeats, the
order in which they come does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vmem_kv.driver.base import Driver
from vmem_kv.testing.clock import Clock
from vmem_kv.testing.operations import Found, Run, Totals, random_run
from vmem_kv.testing.session_operations import SessionRun
from vmem_kv.testing.shrink import shrink_run
from vmem_kv.testing.thread_round import ThreadRound

OPS_OF_ROUND = 300
"""Operations between two looks at the clock."""

TIERED_ROUNDS = 4
"""Of so many rounds, the last one parks sequences and brings them back as well."""


@dataclass(frozen=True, slots=True)
class StressOptions:
    """What to do; see `run_stress`."""

    driver_name: str = "host"
    seed: int = 1
    n_ops: int | None = 100_000
    seconds: float | None = None
    fault_share: float = 0.15
    n_threads: int = 1
    first_round: int = 0
    """Where to begin; a round depends on its number and the seed alone, and on the operations left for it."""


@dataclass(slots=True)
class Finding:
    """Something is wrong.

    Attributes:
        what: In one line.
        seed: Of the round in which it showed.
        program: Python that repeats it; empty where threads found it.
        round: The number of that round.
        n_ops: Operations that were left for it.
    """

    what: str
    seed: int
    program: str = ""
    round: int = 0
    n_ops: int = 0


@dataclass(slots=True)
class Progress:
    """What was done so far, and what was found.

    Attributes:
        n_ops: Operations that were done, in all rounds, with the one in which something was found.
        n_threaded_ops: Those of them in rounds of several threads.
    """

    n_ops: int = 0
    n_threaded_ops: int = 0
    n_faults: int = 0
    n_pages: int = 0
    n_checks: int = 0
    n_rounds: int = 0
    seconds: float = 0.0
    was_stopped: bool = False
    findings: list[Finding] = field(default_factory=list)


def run_stress(
    options: StressOptions,
    open_driver: Callable[[], Driver],
    *,
    on_progress: Callable[[Progress], bool] = lambda progress: True,
    clock: Clock = time.monotonic,
) -> Progress:
    """Work until the operations or the time are used up, something is found, or `on_progress` says False.

    Args:
        options: What to do.
        open_driver: Opens the driver to work on; closed in the end, unless something was found.
        on_progress: Called after each round.
        clock: Measures the time.
    """
    progress, begin = Progress(), clock()
    driver = open_driver()
    opener = f"open_driver({options.driver_name!r})"
    while not progress.findings:
        left = OPS_OF_ROUND if options.n_ops is None else min(OPS_OF_ROUND, options.n_ops - progress.n_ops)
        is_over = options.seconds is not None and progress.seconds >= options.seconds
        if left <= 0 or is_over:
            break
        number = options.first_round + progress.n_rounds
        seed = options.seed * 1_000_003 + number
        is_threaded = options.n_threads > 1 and number % 2 == 0
        totals = Totals()
        try:
            if is_threaded:
                ThreadRound(driver, seed, left, options.n_threads, options.fault_share).run(totals)
            else:
                run_type = SessionRun if number % TIERED_ROUNDS == TIERED_ROUNDS - 1 else Run
                random_run(
                    seed,
                    left,
                    driver,
                    fault_share=options.fault_share,
                    run_type=run_type,
                    opener=opener,
                    totals=totals,
                )
        except Found as found:
            progress.findings.append(_shortened(found, seed, number, left, open_driver, opener))
        except Exception as error:
            progress.findings.append(Finding(f"{type(error).__name__}: {error}", seed, round=number, n_ops=left))
        progress.n_ops += totals.n_ops
        progress.n_threaded_ops += totals.n_ops if is_threaded else 0
        progress.n_faults += totals.n_faults
        progress.n_pages += totals.n_pages
        progress.n_checks += totals.n_checks
        progress.n_rounds += 1
        progress.seconds = clock() - begin
        if not on_progress(progress):
            progress.was_stopped = True
            break
    if not progress.findings:
        driver.close()
    return progress


def _shortened(
    found: Found, seed: int, number: int, n_ops: int, open_driver: Callable[[], Driver], opener: str
) -> Finding:
    run = found.run
    run.history = shrink_run(open_driver, run.settings, run.history, type(run))
    return Finding(found.what, seed, run.program(opener), number, n_ops)
