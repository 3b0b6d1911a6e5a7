"""Host memory that the CUDA driver pins, on the emulated device."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator

import pytest

from vmem_kv.driver.base import Handle
from vmem_kv.driver.checked import CheckedDriver
from vmem_kv.driver.cuda import CudaDriver, NoRuntime
from vmem_kv.driver.ledger import Ledger
from vmem_kv.errors import DriverError, OutOfHostMemory, UsageError
from vmem_kv.testing import FaultyDriver, PoisonDriver, StatisticsDriver, fail_kind
from vmem_kv.testing.emulator import NOTHING, Emulator
from vmem_kv.testing.explorer import CallHook
from vmem_kv.testing.late import LateDriver
from vmem_kv.tiers.memory import FramePool, PinnedMemory

from ..core.backends import emulated_device

PAGE = mmap.PAGESIZE
OUT_OF_MEMORY, NOT_PERMITTED, ILLEGAL_ADDRESS = 2, 800, 700


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    emulator = emulated_device()
    yield emulator
    violations = emulator.violations()
    emulator.reset(force=True)
    assert violations == []


@pytest.fixture
def driver(emulator: Emulator) -> Iterator[CudaDriver]:
    driver = CudaDriver(0, NoRuntime(), ledger=Ledger())
    yield driver
    driver.close()


@pytest.fixture
def place() -> Iterator[int]:
    """Four OS pages of the host."""
    memory = mmap.mmap(-1, 4 * PAGE)
    view = ctypes.c_char.from_buffer(memory)
    yield ctypes.addressof(view)
    del view
    memory.close()


def test_what_is_pinned_is_registered_until_it_is_unpinned(emulator: Emulator, driver: CudaDriver, place: int) -> None:
    driver.pin(place, 2 * PAGE)
    driver.pin(place + 2 * PAGE, PAGE)
    assert emulator.live().pinned == 2
    driver.unpin(place)
    driver.pin(place, PAGE)
    for address in (place, place + 2 * PAGE):
        driver.unpin(address)
    assert emulator.live().pinned == 0
    assert (driver.calls["pin"], driver.calls["unpin"]) == (3, 3)


def test_what_is_not_pinned_never_reaches_cuda(emulator: Emulator, driver: CudaDriver, place: int) -> None:
    for address in (place, place + PAGE):
        with pytest.raises(UsageError, match="no range that this driver pinned"):
            driver.unpin(address)
        driver.pin(place, 2 * PAGE)
        with pytest.raises(UsageError, match="no range that this driver pinned"):
            driver.unpin(place + PAGE)
        driver.unpin(place)
    assert emulator.calls()["cuMemHostUnregister"] == 2


def test_a_system_that_keeps_no_more_in_place_is_full(emulator: Emulator, driver: CudaDriver, place: int) -> None:
    emulator.cap_pinned(2 * PAGE)
    driver.pin(place, PAGE)
    with pytest.raises(OutOfHostMemory, match="smaller host tier"):
        driver.pin(place + PAGE, 2 * PAGE)
    driver.pin(place + PAGE, PAGE)
    driver.unpin(place)
    driver.unpin(place + PAGE)


@pytest.mark.parametrize("call", ["cuMemHostRegister", "cuMemHostUnregister"])
def test_a_failed_call_changes_nothing(emulator: Emulator, driver: CudaDriver, place: int, call: str) -> None:
    emulator.fail(call, NOT_PERMITTED)
    if call == "cuMemHostRegister":
        with pytest.raises(DriverError, match="NOT_PERMITTED"):
            driver.pin(place, PAGE)
        assert emulator.live().pinned == 0
        driver.pin(place, PAGE)
    else:
        driver.pin(place, PAGE)
        with pytest.raises(DriverError, match="NOT_PERMITTED"):
            driver.unpin(place)
        assert emulator.live().pinned == 1
    driver.unpin(place)
    assert emulator.live().pinned == 0


class Interrupting:
    """cuda-python, with a Ctrl-C between the call of one function and its answer."""

    def __init__(self, cuda: object, name: str, *, takes_effect: bool) -> None:
        self._cuda = cuda
        self._name = name
        self._takes_effect = takes_effect

    def __getattr__(self, name: str) -> object:
        function = getattr(self._cuda, name)
        if name != self._name:
            return function

        def call(*arguments: object) -> object:
            self._name = ""
            if self._takes_effect:
                function(*arguments)
            raise KeyboardInterrupt

        return call


@pytest.mark.parametrize("takes_effect", [True, False])
@pytest.mark.parametrize("call", ["cuMemHostRegister", "cuMemHostUnregister"])
def test_ctrl_c_leaves_the_books_as_the_device_has_it(
    emulator: Emulator, driver: CudaDriver, place: int, call: str, takes_effect: bool
) -> None:
    plain = driver._cuda
    if call == "cuMemHostUnregister":
        driver.pin(place, PAGE)
    driver._cuda = Interrupting(plain, call, takes_effect=takes_effect)
    with pytest.raises(KeyboardInterrupt):
        (driver.pin(place, PAGE) if call == "cuMemHostRegister" else driver.unpin(place))
    driver._cuda = plain
    is_pinned = emulator.live().pinned == 1
    assert is_pinned == (takes_effect == (call == "cuMemHostRegister"))
    if is_pinned:
        driver.unpin(place)
    else:
        with pytest.raises(UsageError):
            driver.unpin(place)
    assert emulator.live().pinned == 0


def test_close_refuses_while_host_memory_is_pinned(emulator: Emulator, place: int) -> None:
    driver = CudaDriver(0, NoRuntime(), ledger=Ledger())
    driver.pin(place, PAGE)
    with pytest.raises(UsageError, match="close their tiers first"):
        driver.close()
    driver.unpin(place)
    driver.close()
    assert emulator.live() == NOTHING


def test_a_lost_device_is_not_asked_to_let_go(emulator: Emulator) -> None:
    driver = CudaDriver(0, NoRuntime(), ledger=Ledger())
    ledger = Ledger()
    frames = FramePool(8 * PAGE, PinnedMemory(driver), frame_bytes=PAGE, buffer_bytes=4 * PAGE, ledger=ledger)
    frames.give(frames.take(8))
    assert emulator.live().pinned == 2
    emulator.make_sticky(ILLEGAL_ADDRESS)
    frames.close()
    assert frames.n_bytes == ledger.n_bytes == 0
    driver.close()
    emulator.make_sticky(0)
    emulator.reset(force=True)


def test_adaptors_hand_it_on_and_see_it(emulator: Emulator, driver: CudaDriver, place: int) -> None:
    statistics = StatisticsDriver(LateDriver(driver))
    hook = CallHook(statistics)
    faulty = FaultyDriver(hook)
    checked = CheckedDriver(PoisonDriver(faulty))
    moments: list[int] = []
    hook.arm(2, lambda: moments.append(emulator.live().pinned))
    checked.pin(place, 2 * PAGE)
    assert moments == [1]
    with faulty.failing(fail_kind("pin")), pytest.raises(OutOfHostMemory, match="injected"):
        checked.pin(place + 2 * PAGE, PAGE)
    with faulty.failing(fail_kind("unpin")), pytest.raises(DriverError, match="injected"):
        checked.unpin(place)
    assert (checked.n_pinned, emulator.live().pinned) == (1, 1)
    checked.unpin(place)
    counted = {name: one.n_items for name, one in statistics.operations().items()}
    assert counted == {"pin": 1, "unpin": 1}
    assert (faulty.calls["pin"], faulty.calls["unpin"]) == (2, 2)


def test_a_late_copy_keeps_its_memory_pinned(driver: CudaDriver, place: int) -> None:
    late = LateDriver(driver)
    reservation = late.reserve(PAGE)
    handles: list[Handle] = []
    late.create(PAGE, [reservation.base], handles)
    late.map(PAGE, [reservation.base], handles)
    late.set_access([(reservation.base, PAGE)])
    late.pin(place, PAGE)
    host = (ctypes.c_char * PAGE).from_address(place)
    fence = late.copy_to_host(reservation.base, memoryview(host).cast("B")[100:200])
    with pytest.raises(UsageError, match="unpin at"):
        late.unpin(place)
    fence.wait()
    late.unpin(place)
    late.unmap([(reservation.base, PAGE)])
    late.release(PAGE, handles)
    late.free_reservation(reservation)
