"""Exact numbers, edges and words of layout, growth, slots and pages: what mutants survived that change them.

Expected numbers are counted here, token by token, not computed as the code does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace

import pytest

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import PASSED, Driver, DriverInfo, Handle
from vmem_kv.errors import ConfigError, DriverError, InvariantError, OutOfPages, UsageError
from vmem_kv.growth import GrowthPlan, PageRange, Run, SlotId, plan_growth
from vmem_kv.layout import WASTE_TARGET, LayerSpec, Layout, TensorSpec, choose_layout
from vmem_kv.pages import PagePool
from vmem_kv.slots import SlotState, SlotTable
from vmem_kv.testing import Adaptor, FaultyDriver, LimitingDriver, Point, driver_error, natural_error
from vmem_kv.units import format_bytes

from .drivers import open_driver, physical_bytes

PAGE = 4096
LAYERS = [LayerSpec(TensorSpec(2, 64, 2), TensorSpec(1, 64, 2))] * 4  # rows of 256 and 128 bytes

INFO = DriverInfo(
    name="paper",
    device="cpu",
    granularity_bytes=PAGE,
    max_mappings=1_000_000,
    neighbours_merge=True,
    mappings_per_run=2,
    keeps_pay=False,
    memory_bytes=1 << 40,
    max_reservation_bytes=1 << 46,
    path="none",
    reads_best="per_layer",
)


def pages_of(n_tokens: int, row_bytes: int, page_bytes: int) -> int:
    """Pages that hold any byte of the first tokens of a plane."""
    return len(
        {byte // page_bytes for token in range(n_tokens) for byte in (token * row_bytes, (token + 1) * row_bytes - 1)}
    )


@pytest.mark.parametrize(
    "value",
    [
        Layout.build("per_layer", LAYERS, n_slots=1, max_tokens=8, page_bytes=PAGE),
        Layout.build("per_layer", LAYERS, n_slots=1, max_tokens=8, page_bytes=PAGE).planes[0],
        Layout.build("per_layer", LAYERS, n_slots=1, max_tokens=8, page_bytes=PAGE).keys[0],
        GrowthPlan((Run(SlotId(0), 0, PAGE, 1),), [PAGE], 1, PAGE),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_are_frozen_and_carry_nothing_else(value: object) -> None:
    name = next(iter(type(value).__annotations__))
    with pytest.raises(FrozenInstanceError):
        setattr(value, name, None)
    assert not hasattr(value, "__dict__")


def test_a_plan_needs_the_mapped_pages_of_every_plane() -> None:
    layout = Layout.build("per_layer", LAYERS, n_slots=1, max_tokens=8, page_bytes=PAGE)
    with pytest.raises(ValueError, match="zip"):
        plan_growth(layout, 0, {SlotId(0): [PageRange(0, 0)]}, {SlotId(0): 3})


@pytest.mark.parametrize("page_bytes", [0, PAGE - 1, PAGE + 1, PAGE // 2])
def test_a_page_that_is_no_multiple_of_the_granularity_is_refused(page_bytes: int) -> None:
    with pytest.raises(ConfigError, match="multiple of 4096"):
        choose_layout(INFO, LAYERS, n_slots=1, expected_tokens=8, page_bytes=page_bytes)


@pytest.mark.parametrize("page_bytes", [PAGE, 3 * PAGE])
def test_a_page_of_the_granularity_or_a_multiple_is_taken(page_bytes: int) -> None:
    assert choose_layout(INFO, LAYERS, n_slots=1, expected_tokens=8, page_bytes=page_bytes).page_bytes == page_bytes


@pytest.mark.parametrize(("n_slots", "expected_tokens"), [(0, 1), (1, 0)])
def test_counts_below_one_are_refused(n_slots: int, expected_tokens: int) -> None:
    choose_layout(INFO, LAYERS, n_slots=1, expected_tokens=1)
    with pytest.raises(ConfigError, match="at least 1"):
        choose_layout(INFO, LAYERS, n_slots=n_slots, expected_tokens=expected_tokens)


@pytest.mark.parametrize("kind", ["per_head", "per_layer", "group:2", "token_major"])
@pytest.mark.parametrize("merges", [True, False], ids=["neighbours merge", "a mapping a page"])
def test_the_reason_counts_planes_mappings_and_waste(kind: str, merges: bool) -> None:
    n_slots, n_tokens = 3, 1000
    layout = Layout.build(kind, LAYERS, n_slots=n_slots, max_tokens=n_tokens, page_bytes=PAGE)
    rows = [plane.token_bytes for plane in layout.planes]
    runs = len(rows) if merges else sum(pages_of(n_tokens, row, PAGE) for row in rows)
    n_mappings = n_slots * runs * 2
    info = replace(INFO, neighbours_merge=merges)
    choice = choose_layout(info, LAYERS, n_slots=n_slots, expected_tokens=n_tokens, kind=kind, page_bytes=PAGE)
    assert f"{len(rows)} planes need {n_mappings:,} of 1,000,000 mappings for 3 sequences of 1,000 tokens" in choice.why
    waste = len(rows) * PAGE / 2 / (n_tokens * sum(rows))
    assert f"waste {waste:.1%} on average" in choice.why


@pytest.mark.parametrize("merges", [True, False])
def test_a_layout_is_taken_whose_mappings_just_fit(merges: bool) -> None:
    """per_layer has 8 planes, group:2 half as many."""
    n_tokens = 1000
    rows = [256, 128] * 4
    runs = len(rows) if merges else sum(pages_of(n_tokens, row, PAGE) for row in rows)
    info = replace(INFO, neighbours_merge=merges, max_mappings=3 * runs * 2)
    fitting = choose_layout(info, LAYERS, n_slots=3, expected_tokens=n_tokens, page_bytes=PAGE)
    assert fitting.kind == "per_layer"
    info = replace(info, max_mappings=3 * runs * 2 - 1)
    assert choose_layout(info, LAYERS, n_slots=3, expected_tokens=n_tokens, page_bytes=PAGE).kind != "per_layer"


def test_groups_as_large_as_the_model_are_not_offered() -> None:
    """They would be two planes, for K and for V; token_major, which follows them, is one."""
    two_layers = LAYERS[:2]
    info = replace(INFO, max_mappings=2 * 2)
    assert choose_layout(info, two_layers, n_slots=1, expected_tokens=8).kind == "token_major"
    info = replace(INFO, max_mappings=4 * 2)
    assert choose_layout(info, LAYERS, n_slots=1, expected_tokens=8).kind == "group:2"


def test_where_no_layout_fits_the_last_one_is_taken() -> None:
    assert choose_layout(replace(INFO, max_mappings=1), LAYERS, n_slots=1, expected_tokens=8).kind == "token_major"


def test_the_page_is_the_largest_that_wastes_less_than_the_target() -> None:
    """A plane wastes half a page: the page may be as large as 6 % of what a plane holds on average."""
    for n_tokens in (100, 1_000, 10_000, 100_000):
        choice = choose_layout(INFO, LAYERS, n_slots=1, expected_tokens=n_tokens)
        held = n_tokens * (256 + 128) * 4 / 8  # a plane, on average
        assert choice.page_bytes == PAGE or choice.page_bytes / 2 / held <= WASTE_TARGET
        assert choice.page_bytes == 2 << 20 or choice.page_bytes * 2 / 2 / held > WASTE_TARGET
    assert choose_layout(INFO, LAYERS, n_slots=1, expected_tokens=10**9).page_bytes == 2 << 20


ADVICE = "No smaller page exists here"


def test_that_no_smaller_page_exists_is_said_where_it_matters() -> None:
    def why(n_tokens: int, **keywords: object) -> str:
        return choose_layout(INFO, LAYERS, n_slots=1, expected_tokens=n_tokens, **keywords).why  # type: ignore[arg-type]

    assert ADVICE in why(100)
    assert ADVICE not in why(100, kind="per_layer")  # somebody wanted it so
    assert ADVICE not in why(100, page_bytes=2 * PAGE)  # there is a smaller one
    assert ADVICE not in why(10_000, page_bytes=PAGE)  # nothing is wasted
    few = replace(INFO, max_mappings=1)
    assert ADVICE not in choose_layout(few, LAYERS, n_slots=1, expected_tokens=8).why  # one plane: none has fewer


@pytest.mark.parametrize("name", ["n_slots", "max_tokens", "page_bytes"])
def test_a_layout_of_nothing_is_refused(name: str) -> None:
    numbers = {"n_slots": 1, "max_tokens": 1, "page_bytes": 1}
    Layout.build("per_layer", LAYERS, **numbers)
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        Layout.build("per_layer", LAYERS, **{**numbers, name: 0})


@pytest.mark.parametrize(
    ("slot_id", "what"), [(-1, "does not exist"), (0, "is cold"), (1, "is cold"), (2, "does not exist")]
)
def test_a_slot_that_is_not_active_is_called_what_it_is(slot_id: int, what: str) -> None:
    with pytest.raises(UsageError, match=f"slot {slot_id} {what}"):
        SlotTable(2).require_active([SlotId(slot_id)])


def a_table(*capacities: int) -> SlotTable:
    """Warm slots of these capacities; 0 for a cold one."""
    table = SlotTable(len(capacities))
    for index, capacity in enumerate(capacities):
        if capacity:
            slot_id = SlotId(index)
            table.activate(slot_id, capacity, "")
            table.retire([slot_id], PASSED)
            table.settle(slot_id, capacity)
    return table


@pytest.mark.parametrize(
    ("capacities", "wanted", "chosen"),
    [
        ((10, 20), 15, 1),  # equally far off: the one that reuses more
        ((20, 10), 15, 0),
        ((20, 20), 15, 0),  # equal in all: the first
        ((0, 40), 20, 1),  # a cold slot lacks what the warm one has too much
        ((0, 41), 20, 0),
        ((0, 0), 20, 0),
        ((7, 8), 8, 1),
    ],
)
def test_ties_in_best_fit(capacities: tuple[int, ...], wanted: int, chosen: int) -> None:
    assert list(a_table(*capacities).choose(1, wanted)) == [chosen]


def test_a_slot_settles_cold_if_nothing_is_mapped_and_warm_with_nothing_at_its_front() -> None:
    for capacity, state in ((-1, SlotState.COLD), (0, SlotState.WARM)):
        table = SlotTable(1)
        table.activate(SlotId(0), 5, "")
        table.retire([SlotId(0)], PASSED)
        table.settle(SlotId(0), capacity)
        assert table.state[0] is state
        assert (SlotId(0) in table.warm) == (state is SlotState.WARM)
        assert (SlotId(0) in table.domain) == (state is SlotState.WARM)  # whose bytes lie in it
        assert table.retired == {}


class ScriptedReleases(Adaptor):
    """Each call of `release` does what the script says next: works, or fails before or behind its effect."""

    def __init__(self, inner: Driver, script: Sequence[tuple[str, BaseException] | None]) -> None:
        super().__init__(inner)
        self.script = list(script)
        self.sizes: list[int] = []
        """How many pages each call was for."""

    def release(self, page_bytes: int, handles: Sequence[Handle]) -> None:
        self.sizes.append(len(handles))
        planned = self.script.pop(0) if self.script else None
        if planned is None or planned[0] == "behind":
            self.inner.release(page_bytes, handles)
        if planned is not None:
            raise planned[1]


def trim_four(driver: Driver, script: Sequence[tuple[str, BaseException] | None]) -> tuple[list[int], int, int]:
    """Trim four free pages; return the sizes of the calls, pages in quarantine, pages that the driver has still."""
    scripted = ScriptedReleases(driver, script)
    pool = PagePool(scripted, PAGE, 10, keep_freed=True)
    reservation = driver.reserve(4 * PAGE)
    handles, _ = pool.take(range(reservation.base, reservation.end, PAGE))
    pool.give(handles)
    if script:
        with pytest.raises(type(script[0][1])):  # type: ignore[index] # the first failure is the one to report
            pool.trim()
    else:
        assert pool.trim() == 4
    pool.check()
    assert pool.n_in_flight == 0
    found = (scripted.sizes, pool.n_quarantined, physical_bytes(driver) // PAGE)
    lost, left = pool._quarantined, physical_bytes(driver) // PAGE
    driver.release(PAGE, lost[len(lost) - left :])
    driver.ledger.refund_bytes(len(lost) * PAGE)
    driver.free_reservation(reservation)
    return found


EIO = DriverError("release", 5, "EIO")
UNKNOWN_PAGE = UsageError("no such page")


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ([], ([4], 0, 0)),
        ([("before", EIO)], ([4, 3], 1, 1)),  # the first page is lost, the others go
        ([("before", UNKNOWN_PAGE)], ([4, 3], 1, 1)),  # without an interruption nobody believes that it is gone
        ([("before", KeyboardInterrupt())], ([4, 1, 1, 1, 1], 0, 0)),
        ([("behind", KeyboardInterrupt())], ([4, 1, 1, 1, 1], 0, 0)),  # gone, as the driver says to each
        ([("before", KeyboardInterrupt()), ("before", EIO)], ([4, 1, 1, 1, 1], 1, 1)),
        ([("before", KeyboardInterrupt()), ("before", KeyboardInterrupt())], ([4, 1], 4, 4)),
    ],
    ids=[
        "works",
        "fails",
        "unknown",
        "interrupted before",
        "interrupted behind",
        "and then fails",
        "interrupted twice",
    ],
)
def test_pages_that_may_or_may_not_be_released(
    script: Sequence[tuple[str, BaseException] | None], found: tuple[list[int], int, int]
) -> None:
    driver = open_driver("native")
    assert trim_four(driver, script) == found
    assert physical_bytes(driver) == 0
    driver.close()


def test_the_books_are_checked_loosely_while_a_trim_runs_and_strictly_behind_it() -> None:
    driver = open_driver("native")
    seen: list[int] = []

    class Looking(Adaptor):
        def release(self, page_bytes: int, handles: Sequence[Handle]) -> None:
            pool.check()
            seen.append(pool.n_in_flight)
            self.inner.release(page_bytes, handles)

    pool = PagePool(Looking(driver), PAGE, 10, keep_freed=True)
    handles, _ = pool.take([PAGE, 2 * PAGE])
    pool.give(handles)
    assert pool.trim() == 2
    assert seen == [2]
    pool.n_owned += 1
    pool.n_in_flight += 1  # a page that nobody holds
    with pytest.raises(InvariantError, match="in flight"):
        pool.check()
    driver.close()


@pytest.mark.parametrize("n_available", [100, 101, 109])
def test_a_pool_may_promise_nine_tenths_of_what_is_available(n_available: int) -> None:
    n_most = n_available * 9 // 10
    host = open_driver("native")
    driver = LimitingDriver(host, n_available * PAGE)
    assert PagePool(driver, PAGE).max_pages == n_most
    assert PagePool(driver, PAGE, n_most).max_pages == n_most
    too_many, most = format_bytes((n_most + 1) * PAGE), format_bytes(n_most * PAGE)
    with pytest.raises(ConfigError, match=f"a pool of {too_many} does not fit.*lower max_bytes to {most} or less"):
        PagePool(driver, PAGE, n_most + 1)
    with pytest.raises(ConfigError, match="at least one page"):
        PagePool(driver, PAGE, 0)
    assert PagePool(driver, PAGE, 1).max_pages == 1
    assert PagePool(driver, 2 * PAGE).max_pages == n_most // 2
    host.close()


def test_two_pools_may_own_nine_tenths_of_what_the_second_one_found() -> None:
    """It found 40 pages beside the 60 that the first one owned: both may own 90 together."""
    host = open_driver("native")
    driver = LimitingDriver(host, 100 * PAGE)
    first, places = PagePool(driver, PAGE, 90), range(PAGE, 101 * PAGE, PAGE)
    held, _ = first.take(places[:60])
    second = PagePool(driver, PAGE, 36)
    assert second.max_pages == 36
    held_too, _ = second.take(places[60:90])
    with pytest.raises(OutOfPages, match="90% of the memory"):
        second.take(places[90:91])
    first.give(held)
    second.give(held_too)
    first.trim()
    second.trim()
    assert (host.ledger.n_bytes, physical_bytes(host)) == (0, 0)
    host.close()


def test_a_pool_forgets_caches_that_were_closed() -> None:
    driver = open_driver("native")
    pool = PagePool(driver, PAGE, 10)
    layout = Layout.build("per_layer", LAYERS, n_slots=1, max_tokens=8, page_bytes=PAGE)
    for _ in range(2):
        KVCache(pool, layout).close()
    assert (len(pool._regions), len(pool._members)) == (0, 0)
    driver.close()


def test_a_trim_of_no_pages_is_none_and_of_fewer_is_refused() -> None:
    driver = open_driver("native")
    pool = PagePool(driver, PAGE, 10)
    assert pool.trim(0) == 0
    with pytest.raises(UsageError, match="trim of -1 pages"):
        pool.trim(-1)
    driver.close()


def test_a_page_that_cannot_go_back_does_not_hide_why_the_next_one_was_not_made() -> None:
    def second_page_and_releases(point: Point) -> BaseException | None:
        if point.operation == "create" and point.n_of_kind == 2:
            return natural_error(point)
        return driver_error()(point) if point.operation == "release" else None

    driver = open_driver("native")
    pool = PagePool(FaultyDriver(driver, second_page_and_releases), PAGE, 10)
    with pytest.raises(OutOfPages):
        pool.take([PAGE, 2 * PAGE])
    pool.check()
    assert (pool.n_owned, pool.n_quarantined) == (1, 1)
    driver.release(PAGE, pool._quarantined)
    driver.close()
