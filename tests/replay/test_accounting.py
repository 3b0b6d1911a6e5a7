"""The driver of books alone: it conforms, enforces what the contract assumes, and takes no memory."""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence

import pytest

from vmem_kv.cache import KVCache
from vmem_kv.driver.accounting import AccountingDriver
from vmem_kv.driver.base import Copy, Driver, Handle, Reservation, Span
from vmem_kv.driver.checked import CheckedDriver
from vmem_kv.errors import ConfigError, OutOfAddressSpace, OutOfMappings, OutOfPages, UsageError
from vmem_kv.layout import LayerSpec, Layout
from vmem_kv.pages import PagePool
from vmem_kv.testing import ContractBreach, FaultyDriver, check_driver
from vmem_kv.units import GIB, KIB, MIB

PAGE = 4 * KIB


@pytest.mark.parametrize("granularity", [4 * KIB, 64 * KIB, 2 * MIB])
@pytest.mark.parametrize("wrap", [lambda d: d, CheckedDriver, FaultyDriver, lambda d: CheckedDriver(FaultyDriver(d))])
def test_it_conforms(granularity: int, wrap: Callable[[Driver], Driver]) -> None:
    report = check_driver(lambda: wrap(AccountingDriver(GIB, granularity)))
    assert report.n_checks >= 140
    assert "books" in report.driver


@pytest.mark.parametrize("options", [{"neighbours_merge": True, "keeps_pay": False}, {"zeroes_new_pages": False}])
def test_it_conforms_as_host_and_as_device(options: dict[str, bool]) -> None:
    assert check_driver(lambda: AccountingDriver(GIB, PAGE, **options)).n_checks >= 140  # type: ignore[arg-type]


class LosesAnUnmap(AccountingDriver):
    def unmap(self, spans: Sequence[Span]) -> None:
        super().unmap(spans[:1])


class ForgetsWhatWasWritten(AccountingDriver):
    def unmap(self, spans: Sequence[Span]) -> None:
        super().unmap(spans)
        self._pieces.clear()


class HandsOutOneHandleTwice(AccountingDriver):
    def create(self, page_bytes: int, places: Sequence[int], created: list[Handle]) -> None:
        super().create(page_bytes, places, created)
        self._next_handle -= 1


@pytest.mark.parametrize("broken", [LosesAnUnmap, ForgetsWhatWasWritten, HandsOutOneHandleTwice])
def test_the_suite_would_notice_wrong_books(broken: type[AccountingDriver]) -> None:
    with pytest.raises((ContractBreach, KeyError)):
        check_driver(lambda: broken(GIB, PAGE))


class Bench:
    """A driver with two reservations and three pages, two of which are mapped."""

    def __init__(self) -> None:
        self.driver = AccountingDriver(GIB, PAGE)
        self.one, self.other = self.driver.reserve(8 * PAGE), self.driver.reserve(8 * PAGE)
        self.handles: list[Handle] = []
        self.at = [self.one.base, self.one.base + PAGE]
        self.driver.create(PAGE, [0, 0, 0], self.handles)
        self.driver.map(PAGE, self.at, self.handles[:2])

    def state(self) -> tuple[int, int, int, int]:
        d = self.driver
        return d.n_live_handles, d.n_live_mappings, d.n_live_reservations, d.n_created_bytes


BREACHES: dict[str, Callable[[Bench], object]] = {
    "map where something is mapped": lambda b: b.driver.map(PAGE, [b.at[0]], [b.handles[2]]),
    "map twice to one address": lambda b: b.driver.map(PAGE, [b.other.base] * 2, b.handles[:2]),
    "map outside": lambda b: b.driver.map(PAGE, [b.one.end], [b.handles[2]]),
    "map over an end": lambda b: b.driver.map(PAGE, [b.one.end - PAGE // 2], [b.handles[2]]),
    "map askew": lambda b: b.driver.map(PAGE, [b.other.base + 1], [b.handles[2]]),
    "map a handle that never was": lambda b: b.driver.map(PAGE, [b.other.base], [Handle(99)]),
    "map as another size": lambda b: b.driver.map(2 * PAGE, [b.other.base], [b.handles[2]]),
    "map fewer handles": lambda b: b.driver.map(PAGE, [b.other.base], []),
    "unmap what is not mapped": lambda b: b.driver.unmap([(b.other.base, PAGE)]),
    "unmap half a page": lambda b: b.driver.unmap([(b.at[0], PAGE // 2)]),
    "unmap nothing": lambda b: b.driver.unmap([(b.at[0], 0)]),
    "unmap over a hole": lambda b: b.driver.unmap([(b.at[0], 3 * PAGE)]),
    "unmap twice in one call": lambda b: b.driver.unmap([(b.at[0], PAGE), (b.at[0], PAGE)]),
    "unmap, one good and one bad": lambda b: b.driver.unmap([(b.at[0], PAGE), (b.other.base, PAGE)]),
    "grant access to nothing": lambda b: b.driver.set_access([(b.other.base, PAGE)]),
    "scrub before access": lambda b: b.driver.scrub([(b.at[0], PAGE)]),
    "read before access": lambda b: b.driver.copy_to_host(b.at[0], memoryview(bytearray(4))),
    "read into what is read-only": lambda b: b.driver.copy_to_host(b.at[0], memoryview(b"1234")),
    "write beside a mapping": lambda b: b.driver.copy_from_host(memoryview(b"1234"), b.other.base),
    "release what is mapped": lambda b: b.driver.release(PAGE, [b.handles[2], b.handles[0]]),
    "release twice in one call": lambda b: b.driver.release(PAGE, [b.handles[2]] * 2),
    "release as another size": lambda b: b.driver.release(2 * PAGE, [b.handles[2]]),
    "free what is in use": lambda b: b.driver.free_reservation(b.one),
    "free a part": lambda b: b.driver.free_reservation(Reservation(b.other.base, PAGE)),
    "reserve a part of a page": lambda b: b.driver.reserve(PAGE + 1),
    "create a part of a page": lambda b: b.driver.create(PAGE + 1, [0], []),
    "close with ranges open": lambda b: b.driver.close(),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_is_refused_and_changes_nothing(breach: str) -> None:
    bench = Bench()
    before = bench.state()
    with pytest.raises(UsageError):
        BREACHES[breach](bench)
    assert bench.state() == before
    bench.driver.unmap([(bench.at[0], 2 * PAGE)])
    bench.driver.release(PAGE, bench.handles)
    bench.driver.free_reservation(bench.one)
    bench.driver.free_reservation(bench.other)
    assert bench.state() == (0, 0, 0, 0)
    bench.driver.close()


def test_pages_of_other_sizes_are_seen_to_overlap() -> None:
    bench = Bench()
    large: list[Handle] = []
    bench.driver.create(3 * PAGE, [0], large)
    for place in (bench.at[0], bench.at[1], bench.one.base + PAGE):
        with pytest.raises(UsageError):
            bench.driver.map(3 * PAGE, [place], large)
    bench.driver.map(3 * PAGE, [bench.one.base + 4 * PAGE], large)
    with pytest.raises(UsageError):
        bench.driver.map(PAGE, [bench.one.base + 5 * PAGE], [bench.handles[2]])
    bench.driver.map(PAGE, [bench.one.base + 3 * PAGE], [bench.handles[2]])
    bench.driver.set_access([(bench.one.base + 3 * PAGE, 4 * PAGE)])
    with pytest.raises(UsageError):
        bench.driver.unmap([(bench.one.base + 3 * PAGE, 2 * PAGE)])
    bench.driver.unmap([(bench.one.base + 3 * PAGE, 4 * PAGE)])
    assert bench.driver.n_live_mappings == 2


def test_one_call_may_map_into_two_reservations() -> None:
    bench = Bench()
    bench.driver.unmap([(bench.at[0], 2 * PAGE)])
    bench.driver.map(PAGE, [bench.other.base, bench.one.base], bench.handles[:2])
    bench.driver.set_access([(bench.other.base, PAGE), (bench.one.base, PAGE)])
    bench.driver.copy_from_host(memoryview(b"here"), bench.other.base)
    buffer = bytearray(4)
    bench.driver.copy_to_host(bench.one.base, memoryview(buffer))
    assert buffer == b"\0\0\0\0"


def test_memory_ends_where_a_device_of_that_size_would() -> None:
    driver = AccountingDriver(10 * MIB, 2 * MIB)
    created: list[Handle] = []
    with pytest.raises(OutOfPages) as caught:
        driver.create(2 * MIB, [0] * 7, created)
    assert len(created) == caught.value.n_done == 5
    assert driver.available_bytes() == 0
    driver.release(2 * MIB, created[:2])
    assert driver.available_bytes() == 4 * MIB


def test_limits_on_mappings_and_addresses_are_typed() -> None:
    driver = AccountingDriver(GIB, PAGE, max_mappings=2)
    created: list[Handle] = []
    reservation = driver.reserve(4 * PAGE)
    driver.create(PAGE, [0] * 3, created)
    with pytest.raises(OutOfMappings):
        driver.map(PAGE, [reservation.base + i * PAGE for i in range(3)], created)
    assert driver.n_live_mappings == 0
    with pytest.raises(OutOfAddressSpace):
        driver.reserve(1 << 53)


@pytest.mark.parametrize("arguments", [(GIB, 3000), (1024, 4096), (-1, 4096), (GIB, 0)])
def test_senseless_numbers_are_refused(arguments: tuple[int, int]) -> None:
    with pytest.raises(ConfigError):
        AccountingDriver(*arguments)
    with pytest.raises(ConfigError):
        AccountingDriver(GIB, PAGE, max_mappings=0)


def test_each_driver_has_a_ledger_of_its_own() -> None:
    assert AccountingDriver().ledger is not AccountingDriver().ledger


def test_an_80_layer_model_on_141_gb_costs_next_to_nothing() -> None:
    driver = AccountingDriver(160 * GIB, 2 * MIB)
    layers = [LayerSpec.uniform(8, 128, 2)] * 80
    layout = Layout.build("token_major", layers, n_slots=64, max_tokens=131_072, page_bytes=2 * MIB)
    cache = KVCache(PagePool(driver, 2 * MIB, 141 * GIB // (2 * MIB)), layout)
    slots = cache.acquire_adjacent(4)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cache.ensure(dict.fromkeys(slots, 100_000))
    assert cache.stats().live_bytes == 4 * 100_000 * 327_680
    assert cache.stats().owned_bytes > 121 * GIB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 200 * KIB  # in KiB: 200 MiB
    cache.check()
    cache.retire(slots)
    cache.close()
    cache.pool.trim()
    driver.close()


def test_an_alias_keeps_its_page_from_being_released() -> None:
    bench = Bench()
    aliases = [bench.other.base, bench.other.base + PAGE]
    bench.driver.map(PAGE, aliases, [bench.handles[0]] * 2)
    bench.driver.unmap([(bench.at[0], 2 * PAGE)])
    assert bench.driver.n_live_mappings == 2
    bench.driver.release(PAGE, [bench.handles[1]])
    for alias in aliases:
        with pytest.raises(UsageError, match="mapped"):
            bench.driver.release(PAGE, [bench.handles[0]])
        bench.driver.unmap([(alias, PAGE)])
    bench.driver.release(PAGE, [bench.handles[0]])
    assert bench.driver.n_live_handles == 1


def test_copies_that_overlap_are_refused_and_an_empty_batch_is_none() -> None:
    bench = Bench()
    bench.driver.set_access([(bench.at[0], 2 * PAGE)])
    with pytest.raises(UsageError, match="overlap"):
        bench.driver.copy([Copy(bench.at[0], bench.at[0] + 10, 20)])
    bench.driver.map(PAGE, [], [])
    assert bench.driver.n_live_mappings == 2


def test_items_are_counted_by_page_and_by_span_and_batches_beside_them() -> None:
    driver = AccountingDriver(GIB, PAGE)
    handles: list[Handle] = []
    reservation = driver.reserve(16 * PAGE)
    at = reservation.base
    places = [at, at + PAGE, at + 2 * PAGE, at + 8 * PAGE, at + 9 * PAGE]
    spans = [(at, 3 * PAGE), (at + 8 * PAGE, 2 * PAGE)]
    driver.create(PAGE, places, handles)
    driver.map(PAGE, places, handles)
    driver.set_access(spans)
    driver.scrub(spans)
    driver.copy([Copy(at, at + PAGE, 8), Copy(at, at + 2 * PAGE, 8)])
    driver.unmap(spans)
    driver.release(PAGE, handles)
    driver.free_reservation(reservation)
    batches = {"reserve", "create", "map", "set_access", "scrub", "copy", "unmap", "release", "free_reservation"}
    assert driver.calls == dict.fromkeys(batches, 1)
    expected = {"create": 5, "map": 5, "release": 5, "set_access": 2, "scrub": 2, "unmap": 2, "copy": 2}
    assert driver.items == {**expected, "reserve": 1, "free_reservation": 1}


def test_what_took_no_effect_is_no_item() -> None:
    driver = AccountingDriver(3 * PAGE, PAGE)
    with pytest.raises(OutOfPages):
        driver.create(PAGE, [0] * 5, [])
    with pytest.raises(UsageError):
        driver.unmap([(4 * PAGE, PAGE)])
    assert driver.calls == {"create": 1, "unmap": 1}
    assert driver.items == {"create": 3}


def test_where_neighbours_merge_pages_are_named_by_their_places() -> None:
    driver = AccountingDriver(GIB, PAGE, neighbours_merge=True)
    at = driver.reserve(8 * PAGE).base
    handles: list[Handle] = []
    driver.create(PAGE, [at, at + PAGE], handles)
    assert handles == [at, at + PAGE]
    driver.create(PAGE, [at, at + 2 * PAGE, at + 2 * PAGE], handles)
    assert handles[3] == at + 2 * PAGE
    assert len(set(handles)) == 5


def test_a_row_of_pages_costs_one_mapping_where_neighbours_merge() -> None:
    layout = Layout.build("per_layer", [LayerSpec.uniform(1, 32, 2)] * 2, n_slots=4, max_tokens=1024, page_bytes=PAGE)
    counts = {}
    for merges in (False, True):
        driver = AccountingDriver(GIB, PAGE, neighbours_merge=merges, keeps_pay=not merges)
        cache = KVCache(PagePool(driver, PAGE, 1000), layout)
        slot = cache.acquire()
        for n_tokens in (100, 300, 1000):
            cache.ensure({slot: n_tokens})
        counts[merges] = cache.pool.n_mappings
        cache.check()
        cache.retire([slot])
        cache.close()
        cache.pool.trim()
        driver.close()
    assert counts == {False: layout.n_pages(1000), True: len(layout.planes)}
    assert counts[False] > 5 * counts[True]
