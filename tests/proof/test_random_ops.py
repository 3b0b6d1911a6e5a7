"""Random operations against the reference model, with shadow tags on every row, on every driver."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmem_kv.driver.base import Driver
from vmem_kv.testing.operations import MAX_TOKENS, ROWS, Found, Operation, Run, random_run
from vmem_kv.testing.shrink import Symptom, repeat, shrink, shrink_run
from vmem_kv.testing.targets import open_driver as open_by_name

from .conftest import Record
from .drivers import OPENERS, open_driver
from .mistakes import IN_ANY_RUN, Mistake, does_not_scrub, scrubs_as_the_first_neighbour_needs

SHARDS = {("native", seed): 100_000 for seed in range(1, 9)} | {("cuda", seed): 50_000 for seed in range(1, 5)}
"""(driver, seed) -> operations."""


def agree_with_the_model(name: str, seed: int, n_ops: int, record: Record) -> None:
    """Do so many random operations of this seed."""
    driver = open_driver(name)
    totals = random_run(seed, n_ops, driver, opener=OPENERS[name])
    driver.close()
    assert totals.n_ops == n_ops
    assert totals.n_checks > 50 * n_ops
    record(
        "random operations against the model",
        name,
        seeds=1,
        operations=totals.n_ops,
        faults=totals.n_faults,
        differences=0,
        tags_verified=totals.n_checks,
        pages_read_as_zeros=totals.n_pages,
    )


@pytest.mark.timeout(900)  # of a busy machine
@pytest.mark.parametrize(("name", "seed"), SHARDS)
def test_random_operations_agree_with_the_model(name: str, seed: int, record: Record) -> None:
    agree_with_the_model(name, seed, SHARDS[name, seed], record)


@pytest.mark.parametrize("mistake", IN_ANY_RUN)
def test_random_operations_find_a_planted_mistake(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake(monkeypatch)
    with pytest.raises(Found):
        random_run(1, 100_000, open_driver("native"))


def adopt_two_neighbours(driver: Driver, domains: str, *, rows: str) -> None:
    """Slots 0 and 1 had sequences of these domains; domain "a" adopts both. What was not its own must be zero."""
    run = Run(driver, "per_layer", rows=rows, n_slots=2, max_pages=60)
    for slot, domain in enumerate(domains):
        assert run.acquire(0, domain) == slot
    run.ensure({0: MAX_TOKENS, 1: MAX_TOKENS})
    for slot in (0, 1):
        run.retire(slot, None)
    n_read = run.n_mapped
    assert run.acquire_adjacent(2, MAX_TOKENS, "a") == [0, 1]
    n_pages = len(run.model.pages) // 2
    assert run.n_mapped - n_read == domains.count("b") * n_pages  # each of them was read and is zero
    plane = run.layout.planes[0]
    first_bytes = [
        run.memory.read(run.cache.region.reservation.base + plane.base_bytes + slot * plane.span_bytes, 16)
        for slot in (0, 1)
    ]
    assert [any(data) for data in first_bytes] == [domain == "a" for domain in domains]
    run.finish()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("domains", ["aa", "ab", "ba", "bb"])
def test_neighbours_are_scrubbed_each_by_its_own_past(driver: Driver, domains: str, rows: str) -> None:
    adopt_two_neighbours(driver, domains, rows=rows)


@pytest.mark.parametrize("domains", ["ab", "ba"])
def test_a_scrub_decided_by_the_first_neighbour_is_seen(domains: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scrubs_as_the_first_neighbour_needs(monkeypatch)
    with pytest.raises(AssertionError):
        adopt_two_neighbours(open_driver("native"), domains, rows="odd")


def test_a_finding_is_a_program_that_repeats_it_and_can_be_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    does_not_scrub(monkeypatch)
    with pytest.raises(Found) as caught:
        random_run(1, 20_000, open_driver("native"))
    run = caught.value.run
    with pytest.raises(AssertionError, match="old bytes"):
        exec(caught.value.program, {})
    n_whole = len(run.history)
    run.history = shrink_run(lambda: open_driver("native"), run.settings, run.history)
    # a sequence with a page, its end, and another domain's or one that grows into a page kept by the pool
    assert len(run.history) <= 6 < n_whole
    with pytest.raises(AssertionError, match="old bytes"):
        exec(run.program(), {})
    monkeypatch.undo()
    exec(run.program(), {})


def test_shrinking_does_not_run_after_another_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind what goes wrong stands a call that is always refused: alone it would be shorter."""
    does_not_scrub(monkeypatch)
    with pytest.raises(Found) as caught:
        random_run(1, 20_000, open_driver("native"))
    run = caught.value.run
    refused = Operation("trim", (-1,), None)
    shortened = shrink_run(lambda: open_driver("native"), run.settings, [*run.history, refused])
    assert refused not in shortened
    with pytest.raises(AssertionError, match="old bytes"):
        repeat(open_driver("native"), run.settings, shortened)


def test_what_does_not_go_wrong_again_is_not_shortened() -> None:
    operations = [Operation("acquire", (3, "a"), None), Operation("ensure", ({0: 3},), None)]
    assert shrink_run(lambda: open_driver("native"), {"n_slots": 2}, operations) == operations


def test_two_failures_are_the_same_by_type_and_place() -> None:
    def fail(kind: type[Exception], text: str) -> None:
        raise kind(text)

    def symptom(call: Callable[[], None]) -> Symptom:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - of any kind
            call()
        return Symptom.of(caught.value)

    def here() -> None:
        fail(AssertionError, "1 page")

    def there() -> None:
        fail(AssertionError, "1 page")

    assert symptom(here) == symptom(here)
    assert symptom(lambda: fail(AssertionError, "1")).kind is AssertionError
    assert symptom(here) != symptom(there)
    first, second = (symptom(lambda kind=kind: fail(kind, "")) for kind in (AssertionError, ValueError))  # type: ignore[misc]
    assert first.places == second.places
    assert first != second


def test_shrinking_keeps_what_fails_and_leaves_out_the_rest() -> None:
    assert sorted(shrink(range(100), lambda some: {17, 58, 59} <= set(some))) == [17, 58, 59]
    assert shrink([], lambda some: True) == []
    assert shrink(range(8), lambda some: len(some) >= 3, max_attempts=0) == list(range(8))


SLOTS = st.integers(0, 2)
FAULTS = st.none() | st.tuples(st.booleans(), st.integers(1, 6))
LENGTHS = st.dictionaries(SLOTS, st.integers(0, MAX_TOKENS), min_size=1)
FENCES = st.integers(0, 5)


def operations() -> st.SearchStrategy[Operation]:
    """Any operation, whether it makes sense or not."""
    arguments: dict[str, st.SearchStrategy[tuple[object, ...]]] = {
        "acquire": st.tuples(st.integers(0, MAX_TOKENS), st.sampled_from("ab")),
        "acquire_adjacent": st.tuples(st.integers(1, 3), st.integers(0, MAX_TOKENS), st.sampled_from("ab")),
        "ensure": st.tuples(LENGTHS),
        "premap": st.tuples(LENGTHS),
        "fork": st.tuples(SLOTS, st.integers(0, MAX_TOKENS)),
        "truncate": st.tuples(SLOTS, st.integers(0, MAX_TOKENS)),
        "share": st.tuples(SLOTS, SLOTS),
        "vacate": st.tuples(SLOTS),
        "slide": st.tuples(SLOTS, st.integers(1, MAX_TOKENS), st.none() | FENCES),
        "retire": st.tuples(SLOTS, st.none() | FENCES),
        "pass_fence": st.tuples(FENCES),
        "reclaim": st.tuples(st.integers(1, 20)),
        "trim": st.tuples(st.integers(1, 20)),
        "resize": st.tuples(st.integers(8, 40)),
    }
    weighted = ["acquire"] * 3 + ["ensure"] * 5 + ["retire"] * 2 + list(arguments)
    return st.sampled_from(weighted).flatmap(lambda name: st.builds(Operation, st.just(name), arguments[name], FAULTS))


def makes_sense(run: Run, operation: Operation) -> bool:
    takes_a_fence = operation.name in ("slide", "retire") and operation.arguments[-1] in run.fences
    return run.is_possible(operation) and not takes_a_fence and run.n_broken() < 2


def try_lists(driver: Driver, n_lists: int, record: Record) -> None:
    """Let hypothesis make so many lists of operations, always the same ones."""
    n_done = 0

    @settings(
        max_examples=n_lists,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(operations(), min_size=5, max_size=60), st.sampled_from(sorted(ROWS)), st.booleans())
    def try_list(wanted: list[Operation], rows: str, keep_freed: bool) -> None:
        nonlocal n_done
        run = Run(driver, "group:2", rows=rows, n_slots=3, max_pages=24, keep_freed=keep_freed)
        for operation in wanted:
            if makes_sense(run, operation):
                run.do(operation)
        run.finish()
        n_done += run.n_ops

    try_list()
    assert n_done > 1000
    record("lists of operations by hypothesis", driver.info.name, lists=n_lists, operations=n_done)


def test_hypothesis_finds_no_list_of_operations_that_goes_wrong(driver: Driver, record: Record) -> None:
    try_lists(driver, 300, record)


def test_operations_that_make_no_sense_are_left_out_of_a_repetition() -> None:
    driver = open_by_name("host:native")
    wanted = [
        Operation("ensure", ({0: 3},), None),
        Operation("acquire", (3, "a"), None),
        Operation("ensure", ({0: 3},), None),
        Operation("slide", (0, 9, None), None),
        Operation("pass_fence", (1,), None),
        Operation("retire", (2, None), None),
    ]
    run = repeat(driver, {"n_slots": 2}, wanted)
    assert run.history == wanted[1:3]
    driver.close()
