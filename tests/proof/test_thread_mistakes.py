"""Locks and claims that are missing where sequences share pages are found by rounds of threads.

The window in which another thread must come is widened: at that place every thread lets the others go first. Else it
would be met too seldom. With the locks in their places nothing may be found: who takes one away finds out here.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from vmem_kv.driver.base import Span
from vmem_kv.errors import DriverError
from vmem_kv.exchange import Exchanger
from vmem_kv.pending import Pending
from vmem_kv.shares import Shares
from vmem_kv.sharing import plan_fork, plan_share, plan_truncate
from vmem_kv.testing import FaultyDriver
from vmem_kv.testing.operations import Totals
from vmem_kv.testing.thread_round import ThreadRound
from vmem_kv.unmapping import Unmapper

from ..core.subprocesses import run_python
from .drivers import open_driver
from .mistakes import Mistake, leaves_a_slot_busy, rewritten

pytestmark = pytest.mark.timeout(900)  # of a busy machine

N_THREADS = 4
N_ROUNDS = 300
"""At most. One in five finds what is planted."""
N_OPS = 400


def look(n_rounds: int, fault_share: float = 0.0) -> Exception | None:
    """Let threads work; return the first thing that went wrong."""
    driver = open_driver("native")
    for seed in range(n_rounds):
        try:
            ThreadRound(driver, seed, N_OPS, N_THREADS, fault_share).run(Totals())
        except Exception as error:
            return error
    driver.close()
    return None


def others_first() -> None:
    """Let every other thread go first, if there is one."""
    for _ in range(10):
        time.sleep(0)


def pausing(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with a pause behind it."""

    def paused(*arguments: Any, **keywords: Any) -> Any:
        answer = call(*arguments, **keywords)
        others_first()
        return answer

    return paused


def lets_others_into_drop(patch: pytest.MonkeyPatch) -> None:
    """Between looking at how many hold a page and noting that there is one less."""
    slow = "n = holders.n_elsewhere; __import__('time').sleep(0); holders.n_elsewhere = n - 1"
    patch.setattr(Shares, "drop", rewritten(Shares.drop, "holders.n_elsewhere -= 1", slow))  # type: ignore[arg-type]


def lets_others_into_plans(patch: pytest.MonkeyPatch) -> None:
    """Between the plan of what changes hands and the moment in which it does."""
    patch.setattr("vmem_kv.exchange.plan_fork", pausing(plan_fork))
    patch.setattr("vmem_kv.exchange.plan_truncate", pausing(plan_truncate))
    patch.setattr("vmem_kv.exchange.plan_share", pausing(plan_share))


def drops_without_the_lock(patch: pytest.MonkeyPatch) -> None:
    lets_others_into_drop(patch)
    patch.setattr(Unmapper, "let_go", rewritten(Unmapper.let_go, "with self._pool.lock:", "if True:"))  # type: ignore[arg-type]


def forks_without_a_claim(patch: pytest.MonkeyPatch) -> None:
    """A window that moved on gives up pages that are about to be shared."""
    lets_others_into_plans(patch)
    piece = "with self._claims.exclusive(sources):"
    patch.setattr(Exchanger, "fork", rewritten(Exchanger.fork, piece, "if True:"))  # type: ignore[arg-type]


def unmaps_windows_of_busy_slots(patch: pytest.MonkeyPatch) -> None:
    lets_others_into_plans(patch)
    piece = "or slide.slot_id in self._slots.busy"
    patch.setattr(Pending, "_finish", rewritten(Pending._finish, piece, ""))  # type: ignore[arg-type]


@pytest.mark.parametrize(("widened", "n_rounds"), [(lets_others_into_drop, 10), (lets_others_into_plans, 25)])
def test_with_every_lock_a_wider_window_does_no_harm(
    widened: Mistake, n_rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    widened(monkeypatch)
    error = look(n_rounds, 0.15)
    assert error is None, repr(error)


WITH_A_MISTAKE = """
import pytest
from tests.proof import test_thread_mistakes as planted

planted.{mistake}(pytest.MonkeyPatch())
print("nothing" if planted.look({n_rounds}) is None else "found")
"""


@pytest.mark.parametrize("mistake", [drops_without_the_lock, forks_without_a_claim, unmaps_windows_of_busy_slots])
def test_a_missing_lock_is_found(mistake: Mistake) -> None:
    """In a process of its own: it may well end by touching what another thread has unmapped, which is a finding too."""
    done = run_python(WITH_A_MISTAKE.format(mistake=mistake.__name__, n_rounds=N_ROUNDS))
    assert done.stdout == "found\n" or done.returncode == -signal.SIGSEGV, done


def test_a_round_in_which_every_call_fails_is_no_finding() -> None:
    driver, totals = open_driver("native"), Totals()
    ThreadRound(driver, 1, N_OPS, N_THREADS, 20.0).run(totals)
    assert (totals.n_ops, totals.n_faults) == (0, N_THREADS)  # no thread gets as far as to have a device
    driver.close()


@pytest.mark.parametrize("fault_share", [0.0, 0.5])
def test_who_waits_for_another_thread_in_vain_says_so(fault_share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves_a_slot_busy(monkeypatch)
    assert "stayed busy" in str(look(N_ROUNDS, fault_share))


def test_a_driver_error_that_nobody_made_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(driver: FaultyDriver, *arguments: object) -> None:
        raise DriverError("unmap", 1, "ESOME", 0, "planted")

    monkeypatch.setattr(FaultyDriver, "unmap", refuse)
    assert "planted" in str(look(N_ROUNDS))


def test_old_bytes_are_found_though_other_threads_alone_see_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scrub is missed but those of the main thread."""
    scrub = FaultyDriver.scrub

    def forgetful(driver: FaultyDriver, spans: Sequence[Span]) -> None:
        if threading.current_thread() is threading.main_thread():
            scrub(driver, spans)

    monkeypatch.setattr(FaultyDriver, "scrub", forgetful)
    assert "shows old bytes: sequence" in str(look(N_ROUNDS))
