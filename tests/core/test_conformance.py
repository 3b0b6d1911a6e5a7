"""Every driver passes the conformance suite, and drivers that break one rule are caught by that rule."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import pytest

from vmem_kv.driver.base import Copy, Driver, Fence, Handle, Reservation, Span
from vmem_kv.driver.checked import CheckedDriver
from vmem_kv.driver.cuda import CudaDriver, NoRuntime
from vmem_kv.driver.host import HostDriver
from vmem_kv.errors import OutOfAddressSpace, UsageError
from vmem_kv.testing import ContractBreach, DriverMemory, FaultyDriver, HostMemory, ManualFence, Memory, check_driver
from vmem_kv.testing.emulator import NOTHING

from .backends import emulated_device
from .wrong_drivers import UNSEEN, WRONG, Wrong

PAGE = mmap.PAGESIZE

WRAPPERS: dict[str, Callable[[Driver], Driver]] = {
    "bare": lambda driver: driver,
    "checked": CheckedDriver,
    "itemwise": FaultyDriver,
    "checked over itemwise": lambda driver: CheckedDriver(FaultyDriver(driver)),
    "itemwise over checked": lambda driver: FaultyDriver(CheckedDriver(driver)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_host_driver_conforms_on_both_paths_and_in_every_wrapper(path: str, wrapper: str) -> None:
    report = check_driver(lambda: WRAPPERS[wrapper](HostDriver(path)), HostMemory)
    assert report.n_checks >= 1000
    assert report.n_batch_items == 300
    assert path in report.driver
    assert len(report.rules) == len(set(report.rules)) >= 30


@pytest.mark.parametrize("granularity_bytes", [PAGE, 2 << 20], ids=["small pages", "pages of 2 MiB"])
@pytest.mark.parametrize("open_memory", [HostMemory, DriverMemory])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_cuda_driver_conforms_in_every_wrapper(
    wrapper: str, open_memory: Callable[[Driver], Memory], granularity_bytes: int
) -> None:
    emulator = emulated_device()
    emulator.set_granularity(granularity_bytes)
    try:
        report = check_driver(lambda: WRAPPERS[wrapper](CudaDriver(0, NoRuntime())), open_memory)
    finally:
        emulator.set_granularity(PAGE)
    assert report.n_checks >= 1000
    assert report.n_batch_items == min(300, (2 << 30) // 16 // granularity_bytes)
    assert report.unseen == ()
    assert emulator.live() == NOTHING
    assert emulator.violations() == []


class ShortReservation(HostDriver):
    def reserve(self, n_bytes: int) -> Reservation:
        reservation = super().reserve(n_bytes)
        return Reservation(reservation.base, n_bytes - 1)


class SameReservationTwice(HostDriver):
    first: Reservation | None = None

    def reserve(self, n_bytes: int) -> Reservation:
        self.first = self.first or super().reserve(64 * PAGE)
        return Reservation(self.first.base, n_bytes)


class UnalignedReservation(HostDriver):
    def reserve(self, n_bytes: int) -> Reservation:
        return Reservation(super().reserve(n_bytes).base + 64, n_bytes)


class WrongErrorWhenAddressesRunOut(HostDriver):
    def reserve(self, n_bytes: int) -> Reservation:
        try:
            return super().reserve(n_bytes)
        except OutOfAddressSpace:
            raise UsageError("no") from None


class FreesAnything(HostDriver):
    def free_reservation(self, reservation: Reservation) -> None:
        if reservation in self._reservations:
            super().free_reservation(reservation)


class ForgetsAHandle(HostDriver):
    def create(self, page_bytes: int, places: Sequence[int], created: list[Handle]) -> None:
        super().create(page_bytes, places, created)
        if len(places) > 4:
            created.pop()


class ReplacesTheList(HostDriver):
    def create(self, page_bytes: int, places: Sequence[int], created: list[Handle]) -> None:
        super().create(page_bytes, places, created)
        created.reverse()


class KeepsOldBytes(HostDriver):
    """Releases nothing, so that pages come back as they were."""

    def release(self, page_bytes: int, handles: Sequence[Handle]) -> None:
        self._enter("release")
        for handle in handles:
            del self._pages[handle]


class NamesPagesByPlaceOnly(HostDriver):
    def create(self, page_bytes: int, places: Sequence[int], created: list[Handle]) -> None:
        for place in places:
            self._pages.pop(Handle(place), None)
        super().create(page_bytes, places, created)


class MapsInReverse(HostDriver):
    def map(self, page_bytes: int, addresses: Sequence[int], handles: Sequence[Handle]) -> None:
        super().map(page_bytes, addresses, handles if len(handles) < 5 else handles[::-1])


class MapsTheFirstPartOnly(HostDriver):
    def map(self, page_bytes: int, addresses: Sequence[int], handles: Sequence[Handle]) -> None:
        halves = handles if page_bytes == PAGE else [Handle(h) for h in handles[:1] * len(handles)]
        super().map(page_bytes, addresses, halves)


class MapsAnAliasToNewMemory(HostDriver):
    def map(self, page_bytes: int, addresses: Sequence[int], handles: Sequence[Handle]) -> None:
        moved = [Handle(h + (1 << 46)) if h != a else h for a, h in zip(addresses, handles, strict=True)]
        super().map(page_bytes, addresses, moved)


class LosesBytesOnUnmap(HostDriver):
    def unmap(self, spans: Sequence[Span]) -> None:
        super().scrub([(address, n_bytes) for address, n_bytes in spans if n_bytes == 4 * PAGE])
        super().unmap(spans)


class UnmapsTooMuch(HostDriver):
    def unmap(self, spans: Sequence[Span]) -> None:
        if len(spans) == 2 and spans[0][1] == 2 * PAGE:
            super().scrub([(spans[0][0] - PAGE, PAGE)])
        super().unmap(spans)


class ScrubsNothing(HostDriver):
    def scrub(self, spans: Sequence[Span]) -> None:
        self._enter("scrub")


class ScrubsTooMuch(HostDriver):
    def scrub(self, spans: Sequence[Span]) -> None:
        super().scrub([(address, n_bytes + 8) for address, n_bytes in spans])


class CopiesTooMuch(HostDriver):
    def copy(self, copies: Sequence[Copy]) -> None:
        super().copy([Copy(source, target, n_bytes + 1) for source, target, n_bytes in copies])


class ReadsFromElsewhere(HostDriver):
    def copy_to_host(self, address: int, buffer: memoryview) -> Fence:
        return super().copy_to_host(address + 1, buffer)


class OverstatesWhatItReleased(HostDriver):
    def release(self, page_bytes: int, handles: Sequence[Handle]) -> None:
        try:
            super().release(page_bytes, handles)
        except UsageError as error:
            error.n_done = len(handles)
            raise


class CountsItems(HostDriver):
    def unmap(self, spans: Sequence[Span]) -> None:
        for span in spans:
            super().unmap([span])


class FenceGoesBack(HostDriver):
    def fence(self, streams: Collection[int] = ()) -> Fence:
        class Flaky(ManualFence):
            def passed(self) -> bool:
                self.n_asked += 1
                return self.n_asked == 1

            def wait(self) -> None:
                pass

        return Flaky()


class HasNoMappings(HostDriver):
    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.info = replace(self.info, max_mappings=0)


class SmallPagesOnly(HostDriver):
    def create(self, page_bytes: int, places: Sequence[int], created: list[Handle]) -> None:
        if page_bytes > 2 * PAGE:
            raise UsageError("pages are small here")
        super().create(page_bytes, places, created)


class CopiesNothingToPinnedMemory(HostDriver):
    _pinned = range(0)

    def pin(self, address: int, n_bytes: int) -> None:
        self._pinned = range(address, address + n_bytes)

    def copy_to_host(self, address: int, buffer: memoryview) -> Fence:
        is_pinned = ctypes.addressof(ctypes.c_char.from_buffer(buffer)) in self._pinned
        return self.fence() if is_pinned else super().copy_to_host(address, buffer)


class OneThreadOnly(HostDriver):
    def bind_thread(self) -> None:
        raise UsageError("this driver has one thread")


class ClosesAnyway(HostDriver):
    def close(self) -> None:
        self._close_fd()


class WorksAfterClose(HostDriver):
    def close(self) -> None:
        if self._reservations:
            raise UsageError("reservations are open")


BROKEN: dict[type[HostDriver], str] = {
    HasNoMappings: "info: sizes and limits",
    ShortReservation: "reserve: ranges are aligned",
    SameReservationTwice: "reserve: ranges are aligned",
    UnalignedReservation: "reserve: ranges are aligned",
    WrongErrorWhenAddressesRunOut: "reserve: a range that cannot exist",
    FreesAnything: "free_reservation: takes back exactly",
    ForgetsAHandle: "create: appends one new handle",
    ReplacesTheList: "create: appends one new handle",
    KeepsOldBytes: "create: pages are filled with zeros",
    NamesPagesByPlaceOnly: "create: a page may be mapped anywhere",
    SmallPagesOnly: "map: a page may be any multiple",
    MapsInReverse: "map: one batch may fill several runs",
    MapsTheFirstPartOnly: "create: pages that outlive their reservation",
    MapsAnAliasToNewMemory: "map: a handle mapped at several addresses",
    LosesBytesOnUnmap: "unmap: a page keeps its bytes",
    UnmapsTooMuch: "unmap: spans of whole pages go",
    ScrubsNothing: "scrub: fills its spans",
    ScrubsTooMuch: "scrub: fills its spans",
    CopiesTooMuch: "copy: moves bytes",
    ReadsFromElsewhere: "copy_from_host, copy_to_host: bytes",
    CopiesNothingToPinnedMemory: "pin, unpin: copies",
    OverstatesWhatItReleased: "release: after a failure",
    CountsItems: "calls: every operation counts once",
    FenceGoesBack: "fence: passes on an idle device",
    OneThreadOnly: "threads: another thread",
    ClosesAnyway: "close: refuses",
    WorksAfterClose: "close: may be called twice",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_driver_that_breaks_a_rule_is_caught_by_that_rule(broken: type[HostDriver]) -> None:
    with pytest.raises(ContractBreach) as caught:
        check_driver(lambda: broken("python"), HostMemory)
    assert BROKEN[broken] in str(caught.value)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.kind.__name__)
def test_a_driver_that_does_too_little_is_caught_by_that_rule(wrong: Wrong) -> None:
    with wrong.opening() as open_driver, pytest.raises(ContractBreach) as caught:
        check_driver(open_driver)
    assert f"breaks a rule. {wrong.rule}" in str(caught.value)


@pytest.mark.parametrize("open_driver", UNSEEN)
def test_what_the_documentation_says_is_not_seen_is_not_seen(open_driver: Callable[[], Driver]) -> None:
    assert check_driver(open_driver).n_checks >= 1000


def test_every_rule_is_broken_by_one_of_them() -> None:
    rules = check_driver(HostDriver, HostMemory).rules
    named = (*BROKEN.values(), *(wrong.rule for wrong in WRONG))
    assert [rule for rule in rules if not rule.startswith(named)] == []
    assert [name for name in named if sum(rule.startswith(name) for rule in rules) != 1] == []
