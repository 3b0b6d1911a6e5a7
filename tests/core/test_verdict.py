"""How the conformance suite judges what it cannot count alone, and what it admits that it did not see."""

from __future__ import annotations

import mmap
from dataclasses import replace

import pytest

from vmem_kv.driver.accounting import AccountingDriver
from vmem_kv.driver.base import Driver, Handle, Reservation
from vmem_kv.driver.cuda import CudaDriver, NoRuntime
from vmem_kv.driver.host import HostDriver
from vmem_kv.errors import DriverError, OutOfAddressSpace
from vmem_kv.testing import Adaptor, ContractBreach, DriverMemory, HostMemory, check_driver
from vmem_kv.testing.contract_returns import Round, Verdict, judge
from vmem_kv.testing.probe import can_read, find_probe
from vmem_kv.units import GIB, KIB, MIB

from .backends import emulated_device, open_backend

PAGE = mmap.PAGESIZE
GOOD, LEAK, UNSHOWN = Round(100, 60, 100), Round(100, 60, 60), Round(100, 100, 100)
OTHERS_TOOK, OTHERS_GAVE = Round(100, 60, 70), Round(100, 110, 130)


@pytest.mark.parametrize(
    ("rounds", "verdict"),
    [
        ([], Verdict.OPEN),
        ([GOOD] * 2, Verdict.OPEN),
        ([GOOD] * 3, Verdict.BACK),
        ([LEAK] * 11, Verdict.OPEN),
        ([LEAK] * 12, Verdict.LOST),
        ([OTHERS_TOOK] * 11 + [GOOD] * 14, Verdict.BACK),  # a bad moment
        ([LEAK, LEAK, GOOD] * 11 + [LEAK], Verdict.LOST),  # others gave some back now and then
        ([OTHERS_GAVE] * 3, Verdict.OPEN),
        ([UNSHOWN] * 4, Verdict.BLIND),
        ([UNSHOWN, GOOD, UNSHOWN, UNSHOWN, UNSHOWN], Verdict.OPEN),
        ([LEAK, GOOD] * 32, Verdict.BLIND),
    ],
)
def test_memory_is_missed_only_where_it_is_missing_for_long(rounds: list[Round], verdict: Verdict) -> None:
    assert judge(rounds, 40) is verdict


def pages_of(driver: Driver, n_pages: int) -> tuple[Reservation, list[Handle]]:
    reservation, handles = driver.reserve(n_pages * PAGE), list[Handle]()
    driver.create(PAGE, [reservation.base], handles)
    driver.map(PAGE, [reservation.base], handles)
    driver.set_access([(reservation.base, PAGE)])
    return reservation, handles


def give_back(driver: Driver, reservation: Reservation, handles: list[Handle]) -> None:
    driver.release(PAGE, handles)
    driver.free_reservation(reservation)
    driver.close()


def test_a_probe_tells_what_is_mapped_and_ends_nothing(backend: str) -> None:
    driver = open_backend(backend)
    memories = (HostMemory(), DriverMemory(driver))  # the emulated device is memory of this process
    reservation, handles = pages_of(driver, 2)
    for memory in memories:
        assert memory.is_mapped(reservation.base)
        assert memory.is_mapped(reservation.base + PAGE - 1)
        assert not memory.is_mapped(reservation.base + PAGE)
        assert not memory.is_mapped(PAGE)
    driver.unmap([(reservation.base, PAGE)])
    assert not any(memory.is_mapped(reservation.base) for memory in memories)
    give_back(driver, reservation, handles)


def test_a_cuda_device_is_asked_what_is_mapped() -> None:
    emulator = emulated_device()
    driver = CudaDriver(0, NoRuntime())
    memory = DriverMemory(driver)
    reservation, handles = pages_of(driver, 2)
    n_asked = emulator.calls()["cuPointerGetAttribute"]
    assert memory.is_mapped(reservation.base)
    assert memory.is_mapped(reservation.base + PAGE) is False
    assert memory.is_mapped(PAGE) is False  # not even reserved
    assert emulator.calls()["cuPointerGetAttribute"] == n_asked + 3
    emulator.fail("cuPointerGetAttribute", 201)
    with pytest.raises(DriverError, match="INVALID_CONTEXT"):
        memory.is_mapped(reservation.base)
    driver.unmap([(reservation.base, PAGE)])
    assert memory.is_mapped(reservation.base) is False
    give_back(driver, reservation, handles)
    assert emulator.live().contexts == 0
    assert emulator.violations() == []


def test_of_other_devices_nobody_can_say() -> None:
    assert find_probe("meta") is None
    assert find_probe("cpu") is can_read
    assert DriverMemory(AccountingDriver(GIB, PAGE)).is_mapped(PAGE) is None


def test_a_device_called_cuda_without_cuda_is_not_asked() -> None:
    emulator = emulated_device()
    emulator.set_n_devices(0)
    try:
        assert find_probe("cuda:0") is None
    finally:
        emulator.set_n_devices(1)


def test_what_was_not_seen_of_the_host_is_full_memory_only() -> None:
    (unseen,) = check_driver(lambda: HostDriver("python")).unseen
    assert "memory is full" in unseen


def test_without_a_count_of_its_own_the_hosts_memory_proves_nothing() -> None:
    unseen = check_driver(lambda: Adaptor(HostDriver("python"))).unseen
    assert [what for what in unseen if "physical_bytes" in what]


class SaysNothing(AccountingDriver):
    def available_bytes(self) -> int:
        return self.info.memory_bytes


def test_what_was_not_seen_of_a_device_is_listed() -> None:
    unseen = check_driver(lambda: SaysNothing(GIB, PAGE)).unseen
    for what in ("touched after unmap", "reserved addresses", "available_bytes() does not show pages"):
        assert any(what in line for line in unseen)
    assert len(unseen) == 3


class SmallReservations(HostDriver):
    """A device that is honest about its few addresses."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.info = replace(self.info, max_reservation_bytes=GIB)


class FewAddresses(HostDriver):
    """What it can do shows only where it is tried."""

    def reserve(self, n_bytes: int) -> Reservation:
        if sum(r.n_bytes for r in self._reservations) + n_bytes > GIB:
            raise OutOfAddressSpace("there is no more")
        return super().reserve(n_bytes)


class FewAddressesForGood(FewAddresses):
    """They run out."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._n_reserved = 0

    def reserve(self, n_bytes: int) -> Reservation:
        if self._n_reserved + n_bytes > 4 * GIB:
            raise OutOfAddressSpace("there is no more")
        reservation = super().reserve(n_bytes)
        self._n_reserved += n_bytes
        return reservation


def test_of_a_device_with_few_addresses_it_is_tried_with_those() -> None:
    assert any("addresses come back" in what for what in check_driver(lambda: SmallReservations("python")).unseen)
    assert not any("addresses come back" in what for what in check_driver(lambda: FewAddresses("python")).unseen)
    with pytest.raises(ContractBreach, match="free_reservation: addresses come back"):
        check_driver(lambda: FewAddressesForGood("python"))


def test_batches_are_as_large_as_memory_allows() -> None:
    sizes = [(GIB, PAGE, 300), (128 * MIB, 64 * KIB, 128), (8 * MIB, 64 * KIB, 16)]
    for memory_bytes, granularity_bytes, n_items in sizes:
        report = check_driver(lambda m=memory_bytes, g=granularity_bytes: AccountingDriver(m, g))  # type: ignore[misc]
        assert report.n_batch_items == n_items
