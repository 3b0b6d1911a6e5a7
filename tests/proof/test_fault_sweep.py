"""Every driver call of every scenario fails: once, from then on, and again while the first failure is undone."""

from __future__ import annotations

from collections.abc import Callable, Collection

import pytest

from vmem_kv.driver.base import Driver
from vmem_kv.errors import DriverError, VmemError
from vmem_kv.testing import natural_error

from .conftest import Record
from .drivers import open_driver
from .mistakes import (
    IN_A_SWEEP,
    Mistake,
    does_not_scrub,
    hands_out_lost_pages,
    maps_a_page_too_many,
    shows_stale_pages,
)
from .sweeping import (
    COMPOUND_PLANS,
    OTHER_PLANS,
    PLANS,
    Story,
    adopts_neighbours,
    grows_several_across_planes,
    reclaims_under_pressure,
    sweep,
)

pytestmark = pytest.mark.timeout(900)  # of a busy machine

OPERATIONS = {"reserve", "create", "map", "set_access", "scrub", "unmap", "release", "free_reservation", "fence"} | {
    "copy",
    "copy_to_host",
    "copy_from_host",
}


KEEP = [False, True]
LAYOUTS = [("per_layer", "odd"), ("group:2", "odd"), ("token_major", "odd"), ("per_layer", "exact")]
FLOOR_POINTS = 5000
"""Injection points on each driver, over all layouts with freed pages kept and released."""


def fail_once_and_from_then_on(
    driver: Driver, driver_name: str, kind: str, rows: str, keep_freed: bool, record: Record
) -> int:
    """Sweep every scenario; return how many injection points that had."""
    counts = sweep(driver, kind, rows=rows, keep_freed=keep_freed, plans=PLANS)
    assert counts["once"] == counts["from then on"] == counts["points"]
    record(
        "every driver call of every scenario fails, once and from then on",
        driver_name,
        injection_points=counts["points"],
        lives=counts["once"] + counts["from then on"],
        faults=counts["faults"],
    )
    return counts["points"]


@pytest.mark.parametrize("keep_freed", KEEP, ids=["freed pages go", "freed pages stay"])
@pytest.mark.parametrize(("kind", "rows"), LAYOUTS)
def test_any_call_may_fail_once_or_from_then_on(
    driver: Driver, driver_name: str, kind: str, rows: str, keep_freed: bool, record: Record
) -> None:
    n_points = fail_once_and_from_then_on(driver, driver_name, kind, rows, keep_freed, record)
    # Each test makes its share, so that together they make all, whichever process runs which.
    assert n_points >= FLOOR_POINTS / (len(KEEP) * len(LAYOUTS))


def fail_in_other_ways(
    driver: Driver, driver_name: str, kind: str, rows: str, keep_freed: bool, record: Record
) -> None:
    """Interrupted (Ctrl-C), and by a driver error where running out of something is more natural."""

    def differs(story: Story, plan: str, n: int) -> bool:
        natural = natural_error(story.faulty.points[n - 1])
        return plan == "interrupted" or not isinstance(natural, DriverError)

    counts = sweep(driver, kind, rows=rows, keep_freed=keep_freed, plans=OTHER_PLANS, only=differs)
    assert counts["interrupted"] == counts["points"]
    assert counts["once with a driver error"] > 0
    record(
        "every driver call is interrupted, or fails by a driver error instead",
        driver_name,
        injection_points=counts["points"],
        interrupted=counts["interrupted"],
        driver_errors=counts["once with a driver error"],
    )


def test_any_call_may_fail_in_other_ways(driver: Driver, driver_name: str, record: Record) -> None:
    fail_in_other_ways(driver, driver_name, "group:2", "odd", True, record)


def test_any_call_of_the_hosts_python_way_may_fail(record: Record) -> None:
    driver = open_driver("python")
    fail_once_and_from_then_on(driver, "python", "group:2", "odd", False, record)
    driver.close()


def test_a_cache_whose_close_was_interrupted_is_whole_and_closes_again() -> None:
    """Found by the sweep: slots behind the interruption were called cold, with their pages mapped."""
    sweep(
        open_driver("native"),
        "per_layer",
        keep_freed=False,
        plans=["interrupted, and the next unmap"],
        scenarios=[grows_several_across_planes],
        only=lambda story, plan, n: n > story.faulty.n_points - 40,
    )


def fail_again_while_it_is_undone(
    driver: Driver, driver_name: str, kind: str, rows: str, keep_freed: bool, record: Record, *, every: int = 1
) -> int:
    """Only points behind which there is something to undo: creating, mapping, accessing, scrubbing and giving back.

    Args:
        every: Of these, every so many-th one, another one under each plan.

    Returns:
        How many lives had two failures or more.
    """
    plans = list(COMPOUND_PLANS)

    def undoes(story: Story, plan: str, n: int) -> bool:
        operation = story.faulty.points[n - 1].operation
        is_chosen = (n + plans.index(plan)) % every == 0
        return is_chosen and operation in ("create", "map", "set_access", "scrub", "unmap")

    counts = sweep(driver, kind, rows=rows, keep_freed=keep_freed, plans=plans, only=undoes)
    assert counts["compound"] > 0
    assert counts["quarantined"] > 0
    record(
        "a second failure while the first is undone",
        driver_name,
        lives_with_two_failures_or_more=counts["compound"],
        pages_quarantined=counts["quarantined"],
        of_them_reused=counts["reused"],
    )
    return counts["compound"]


@pytest.mark.parametrize(
    ("kind", "keep_freed"), [("per_layer", False), ("group:2", True)], ids=["per_layer", "group:2"]
)
def test_a_second_failure_may_hit_while_the_first_is_undone(
    driver: Driver, driver_name: str, kind: str, keep_freed: bool, record: Record
) -> None:
    assert fail_again_while_it_is_undone(driver, driver_name, kind, "odd", keep_freed, record, every=2) >= 1000


def test_a_pool_that_hands_out_lost_pages_is_caught_whatever_its_books_say(monkeypatch: pytest.MonkeyPatch) -> None:
    hands_out_lost_pages(monkeypatch)
    with pytest.raises(AssertionError, match="of the quarantine were handed out"):
        sweep(open_driver("native"), "per_layer", keep_freed=False, plans=["and the next release"])


def test_the_scenarios_reach_every_operation(driver: Driver) -> None:
    seen: set[str] = set()

    def note(story: Story, plan: str, n: int) -> bool:
        seen.add(story.faulty.points[n - 1].operation)
        return False

    sweep(driver, "group:2", keep_freed=True, plans=["once"], only=note)
    assert seen == OPERATIONS


# The sweep is seen to fail.


KEEP_FREED = (does_not_scrub, shows_stale_pages)
EXACT_ROWS = (maps_a_page_too_many,)


@pytest.mark.parametrize("mistake", IN_A_SWEEP)
def test_the_sweep_finds_a_planted_mistake(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmem_kv.claims.STALL_TIMEOUT_S", 0.01)
    mistake(monkeypatch)
    scenarios: Collection[Callable[[Story], None]] = [
        grows_several_across_planes,
        reclaims_under_pressure,
        adopts_neighbours,
    ]
    with pytest.raises((AssertionError, VmemError)):
        sweep(
            open_driver("native"),
            "group:2",
            rows="exact" if mistake in EXACT_ROWS else "odd",
            keep_freed=mistake in KEEP_FREED,
            plans=PLANS,
            scenarios=scenarios,
        )
