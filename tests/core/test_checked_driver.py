"""The checked driver rejects every breach of the contract before the driver inside sees it."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence

import pytest

from vmem_kv.driver.base import Handle, Reservation
from vmem_kv.driver.checked import CheckedDriver
from vmem_kv.driver.host import HostDriver
from vmem_kv.errors import DriverError, UsageError
from vmem_kv.testing import FaultyDriver, fail_kind

PAGE = mmap.PAGESIZE
PINNED = 1 << 30
"""An address of the host. Nothing is there, and the host driver does not look."""


class Setting:
    """A reservation of 16 pages; three pages at 0, 1, 2; a large one at 4; one handle that is mapped nowhere."""

    def __init__(self) -> None:
        self.host = HostDriver("python")
        self.faulty = FaultyDriver(self.host)
        self.driver = CheckedDriver(self.faulty)
        self.reservation = self.driver.reserve(16 * PAGE)
        self.base = self.reservation.base
        self.handles: list[Handle] = []
        self.driver.create(PAGE, [self.at(0), self.at(1), self.at(2), self.at(9)], self.handles)
        self.driver.map(PAGE, [self.at(0), self.at(1), self.at(2)], self.handles[:3])
        self.driver.set_access([(self.at(0), 3 * PAGE)])
        self.large: list[Handle] = []
        self.driver.create(2 * PAGE, [self.at(4)], self.large)
        self.driver.map(2 * PAGE, [self.at(4)], self.large)
        self.spare = self.handles[3]
        self.driver.pin(PINNED, 2 * PAGE)

    def at(self, page_index: int) -> int:
        return self.base + page_index * PAGE

    def close(self) -> None:
        self.driver.unmap([(self.at(0), 3 * PAGE), (self.at(4), 2 * PAGE)])
        self.driver.release(PAGE, self.handles)
        self.driver.release(2 * PAGE, self.large)
        self.driver.free_reservation(self.reservation)
        assert self.driver.n_pinned == 1
        with pytest.raises(UsageError, match="1 pinned"):
            self.driver.close()
        self.driver.unpin(PINNED)
        assert self.host.physical_bytes() == 0
        self.driver.close()


@pytest.fixture
def setting() -> Iterator[Setting]:
    setting = Setting()
    yield setting
    setting.close()  # every breach below must have changed nothing


BREACHES: dict[str, tuple[str, Callable[[Setting], object]]] = {
    "reserve a part of a page": ("multiple", lambda s: s.driver.reserve(PAGE + 1)),
    "reserve nothing": ("multiple", lambda s: s.driver.reserve(0)),
    "free what is not reserved": ("not reserved", lambda s: s.driver.free_reservation(Reservation(s.base, PAGE))),
    "free what is in use": ("pages mapped", lambda s: s.driver.free_reservation(s.reservation)),
    "create a part of a page": ("multiple", lambda s: s.driver.create(PAGE // 2, [s.at(8)], [])),
    "create at an odd place": ("multiple", lambda s: s.driver.create(PAGE, [s.at(8) + 8], [])),
    "map fewer handles than addresses": ("handles at", lambda s: s.driver.map(PAGE, [s.at(8), s.at(9)], [s.spare])),
    "map to one address twice": ("twice", lambda s: s.driver.map(PAGE, [s.at(8), s.at(8)], [s.spare, s.spare])),
    "map to an odd address": ("multiple", lambda s: s.driver.map(PAGE, [s.at(8) + 1], [s.spare])),
    "map an unknown handle": ("no live page", lambda s: s.driver.map(PAGE, [s.at(8)], [Handle(7)])),
    "map with another size": ("no live page", lambda s: s.driver.map(2 * PAGE, [s.at(8)], [s.spare])),
    "map outside of the reservation": ("not reserved", lambda s: s.driver.map(PAGE, [s.at(16)], [s.spare])),
    "map over the end": ("not reserved", lambda s: s.driver.map(2 * PAGE, [s.at(15)], s.large)),
    "map over a page": ("something is mapped", lambda s: s.driver.map(PAGE, [s.at(2)], [s.spare])),
    "map into a large page": ("something is mapped", lambda s: s.driver.map(PAGE, [s.at(5)], [s.spare])),
    "map a large page over a small one": ("something is mapped", lambda s: s.driver.map(2 * PAGE, [s.at(2)], s.large)),
    "access what is not mapped": ("no mapping begins", lambda s: s.driver.set_access([(s.at(2), 2 * PAGE)])),
    "access half of a page": ("cuts", lambda s: s.driver.set_access([(s.at(4), PAGE)])),
    "unmap a hole": ("no mapping begins", lambda s: s.driver.unmap([(s.at(0), 4 * PAGE)])),
    "unmap from the middle of a page": ("no mapping begins", lambda s: s.driver.unmap([(s.at(5), PAGE)])),
    "unmap half of a page": ("cuts", lambda s: s.driver.unmap([(s.at(4), PAGE)])),
    "unmap nothing": ("empty", lambda s: s.driver.unmap([(s.at(0), 0)])),
    "unmap a page twice": ("twice", lambda s: s.driver.unmap([(s.at(0), PAGE), (s.at(0), 2 * PAGE)])),
    "release a mapped page": ("is mapped", lambda s: s.driver.release(PAGE, s.handles[:1])),
    "release a page twice": ("twice", lambda s: s.driver.release(PAGE, [s.spare, s.spare])),
    "release with another size": ("no live page", lambda s: s.driver.release(2 * PAGE, [s.spare])),
    "release an unknown handle": ("no live page", lambda s: s.driver.release(PAGE, [Handle(7)])),
    "scrub before access": ("before set_access", lambda s: s.driver.scrub([(s.at(4), 2 * PAGE)])),
    "scrub a hole": ("no mapping begins", lambda s: s.driver.scrub([(s.at(8), PAGE)])),
    "pin a part of an OS page": ("no whole OS pages", lambda s: s.driver.pin(PAGE, PAGE // 2)),
    "pin from the middle of an OS page": ("no whole OS pages", lambda s: s.driver.pin(PAGE + 8, PAGE)),
    "pin nothing": ("no whole OS pages", lambda s: s.driver.pin(PAGE, 0)),
    "pin what is pinned": ("some are pinned", lambda s: s.driver.pin(PINNED - PAGE, 2 * PAGE)),
    "pin what is pinned, from its end on": ("some are pinned", lambda s: s.driver.pin(PINNED + PAGE, 2 * PAGE)),
    "unpin what is not pinned": ("no pinned range", lambda s: s.driver.unpin(PINNED - PAGE)),
    "unpin from the middle of what is pinned": ("no pinned range", lambda s: s.driver.unpin(PINNED + PAGE)),
    "close with pages left": ("left", lambda s: s.driver.close()),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_is_refused_before_the_driver_sees_it(setting: Setting, breach: str) -> None:
    what, call = BREACHES[breach]
    calls = dict(setting.host.calls)
    counts = (setting.driver.n_live_handles, setting.driver.n_live_mappings, setting.driver.n_live_reservations)
    with pytest.raises(UsageError, match=what):
        call(setting)
    assert dict(setting.host.calls) == calls
    assert counts == (5, 4, 1)
    assert counts == (
        setting.driver.n_live_handles,
        setting.driver.n_live_mappings,
        setting.driver.n_live_reservations,
    )


def test_after_a_failure_the_shadow_is_as_far_as_the_driver_came(setting: Setting) -> None:
    driver, faulty = setting.driver, setting.faulty
    with faulty.failing(fail_kind("unmap", 2)), pytest.raises(DriverError) as caught:
        driver.unmap([(setting.at(0), PAGE), (setting.at(1), 2 * PAGE)])
    assert caught.value.n_done == 1
    assert driver.n_live_mappings == 3
    with faulty.failing(fail_kind("map", 2)), pytest.raises(Exception, match="injected"):
        driver.map(PAGE, [setting.at(0), setting.at(9)], [setting.handles[0], setting.spare])
    assert driver.n_live_mappings == 4
    driver.set_access([(setting.at(0), PAGE)])
    extra: list[Handle] = []
    with faulty.failing(fail_kind("create", 3)), pytest.raises(Exception, match="injected"):
        driver.create(PAGE, [setting.at(10), setting.at(11), setting.at(12)], extra)
    assert len(extra) == 2
    with faulty.failing(fail_kind("release", 2)), pytest.raises(DriverError):
        driver.release(PAGE, extra)
    assert driver.n_live_handles == 6
    driver.release(PAGE, extra[1:])
    with faulty.failing(fail_kind("free_reservation")), pytest.raises(UsageError, match="pages mapped"):
        driver.free_reservation(setting.reservation)
    empty = driver.reserve(PAGE)
    with faulty.failing(fail_kind("free_reservation")), pytest.raises(DriverError):
        driver.free_reservation(empty)
    assert driver.n_live_reservations == 2
    driver.free_reservation(empty)


class Liar(HostDriver):
    """Breaks its own postconditions."""

    def create(self, page_bytes: int, places: Sequence[int], created: list[Handle]) -> None:
        super().create(page_bytes, places[:1], created)
        created += created[-1:] * (len(places) - 1)

    def reserve(self, n_bytes: int) -> Reservation:
        return Reservation(super().reserve(n_bytes).base, n_bytes + PAGE)


def test_a_driver_that_lies_is_found_out() -> None:
    driver = CheckedDriver(Liar("python"))
    with pytest.raises(UsageError, match="returned"):
        driver.reserve(PAGE)
    with pytest.raises(UsageError, match="twice"):
        driver.create(PAGE, [PAGE, 2 * PAGE], [])
