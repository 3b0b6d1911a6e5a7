"""Parking, restoring, saving, loading and expiring under random operations, and mistakes found."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from vmem_kv.driver.base import Driver
from vmem_kv.testing.late import LateDriver
from vmem_kv.testing.operations import MAX_TOKENS, Found, random_run
from vmem_kv.testing.session_operations import SessionRun
from vmem_kv.testing.shrink import shrink_run
from vmem_kv.testing.tier_operations import TieredRun

from .conftest import Record
from .drivers import OPENERS, open_driver
from .tier_mistakes import MISTAKES, UNDER_FAULTS, Mistake, restores_a_stale_copy, writes_over_what_is_to_go

N_OPS = 30_000


def agree_with_the_models(driver: Driver, driver_name: str, seed: int, n_ops: int, record: Record) -> None:
    """Do so many random operations of this seed."""
    totals = random_run(seed, n_ops, driver, run_type=SessionRun, opener=OPENERS[driver_name])
    assert n_ops <= totals.n_ops <= n_ops + 1  # who restores may begin a sequence first
    record(
        "random operations on tiers against the models",
        driver_name,
        operations=totals.n_ops,
        faults=totals.n_faults,
        differences=0,
        tags_verified=totals.n_checks,
    )


def test_random_operations_on_tiers_agree_with_the_models(driver: Driver, driver_name: str, record: Record) -> None:
    agree_with_the_models(driver, driver_name, 7, N_OPS, record)


def test_copies_that_run_late_change_nothing(driver: Driver) -> None:
    """Without sessions, whose model says when they move: that depends on when copies have run."""
    totals = random_run(8, 5000, LateDriver(driver), run_type=TieredRun)
    assert 5000 <= totals.n_ops <= 5001


@pytest.mark.parametrize("mistake", MISTAKES)
def test_random_operations_find_a_mistake_of_the_tiers(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake(monkeypatch)
    with pytest.raises(Found):
        random_run(1, 30_000, open_driver("native"), run_type=SessionRun)


@pytest.mark.parametrize("mistake", UNDER_FAULTS)
def test_these_mistakes_show_under_faults_only(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake(monkeypatch)
    random_run(1, 2000, open_driver("native"), run_type=SessionRun, fault_share=0.0)


@pytest.mark.parametrize("is_planted", [False, True])
def test_a_park_that_fails_is_held_to_every_byte_of_the_copy(is_planted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_planted:
        writes_over_what_is_to_go(monkeypatch)
    run = TieredRun(open_driver("native"), "per_layer")
    slot = run.acquire(MAX_TOKENS, "a")
    assert slot is not None
    for n_kept, n_tokens in ((0, 20), (20, 32)):
        run.truncate(slot, n_kept)
        run.ensure({slot: n_tokens})
        run.copy_out(slot, 0)
    run.retire(slot, None)
    fork = run.acquire(MAX_TOKENS, "a")  # goes another way behind 20 tokens
    assert fork is not None
    run.restore(0, fork, 0, 20)
    run.ensure({fork: 34})
    with pytest.raises(AssertionError, match="has changed copy 0") if is_planted else nullcontext():
        run.copy_out(fork, 0, (False, 5))  # behind a pin, a fence and two copies
    if not is_planted:
        run.finish()


def test_a_finding_in_the_tiers_is_a_program_and_can_be_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    restores_a_stale_copy(monkeypatch)
    with pytest.raises(Found) as caught:
        random_run(1, 30_000, open_driver("native"), run_type=SessionRun)
    run = caught.value.run
    with pytest.raises(AssertionError):
        exec(caught.value.program, {})
    n_whole = len(run.history)
    run.history = shrink_run(lambda: open_driver("native"), run.settings, run.history, SessionRun)
    assert len(run.history) < n_whole
    with pytest.raises(AssertionError):
        exec(run.program(), {})
    monkeypatch.undo()
    exec(run.program(), {})
