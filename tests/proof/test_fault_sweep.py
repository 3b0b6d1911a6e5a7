"""Every driver call of every scenario fails: once, from then on, and again while the first failure is undone."""

from __future__ import annotations

from collections.abc import Callable, Collection

import pytest

from vmem_kv.driver.base import Driver
from vmem_kv.errors import VmemError

from .conftest import Record
from .drivers import open_driver
from .mistakes import IN_A_SWEEP, Mistake, does_not_scrub, maps_a_page_too_many, shows_stale_pages
from .sweeping import (
    COMPOUND_PLANS,
    PLANS,
    Story,
    adopts_neighbours,
    grows_several_across_planes,
    reclaims_under_pressure,
    sweep,
)

pytestmark = pytest.mark.timeout(900)  # of a busy machine

OPERATIONS = {"reserve", "create", "map", "set_access", "scrub", "unmap", "release", "free_reservation", "fence"}


@pytest.mark.parametrize("keep_freed", [False, True], ids=["freed pages go", "freed pages stay"])
@pytest.mark.parametrize(
    ("kind", "rows"), [("per_layer", "odd"), ("group:2", "odd"), ("token_major", "odd"), ("per_layer", "exact")]
)
def test_any_call_may_fail_once_or_from_then_on(
    driver: Driver, driver_name: str, kind: str, rows: str, keep_freed: bool, record: Record
) -> None:
    counts = sweep(driver, kind, rows=rows, keep_freed=keep_freed, plans=PLANS)
    assert counts["once"] == counts["from then on"] == counts["points"]
    record(
        f"fault sweep, {driver_name}, {kind}, {rows} rows, keep_freed={keep_freed}: "
        f"{counts['points']} injection points, "
        f"{counts['once'] + counts['from then on']} lives, {counts['faults']} faults"
    )


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


@pytest.mark.parametrize("kind", ["per_layer"])
def test_a_second_failure_may_hit_while_the_first_is_undone(
    driver: Driver, driver_name: str, kind: str, record: Record
) -> None:
    """Only points behind which there is something to undo: creating, mapping, accessing, scrubbing and giving back."""

    def undoes(story: Story, plan: str, n: int) -> bool:
        return story.faulty.points[n - 1].operation in ("create", "map", "set_access", "scrub", "unmap")

    counts = sweep(driver, kind, keep_freed=False, plans=COMPOUND_PLANS, only=undoes)
    assert counts["compound"] >= 1000
    assert counts["quarantined"] > 0
    record(
        f"compound faults, {driver_name}, {kind}: {counts['compound']} lives with two failures or more, "
        f"{counts['quarantined']} pages quarantined, none reused"
    )


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
    monkeypatch.setattr("vmem_kv.cache.STALL_TIMEOUT_S", 0.01)
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
