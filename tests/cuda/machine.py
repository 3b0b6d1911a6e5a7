"""An emulated machine to make raw driver calls on, through the real cuda-python."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vmem_kv.testing.emulator import Emulator, find_emulator, load_emulator

PAGE = mmap.PAGESIZE  # the granularity that tests set: the smallest that the host can map
DEVICE_MEMORY = 1  # CU_MEM_LOCATION_TYPE_DEVICE
NONE, READ, READ_WRITE = 0, 1, 3


class Machine:
    """The emulator, the binding, and short ways to make the calls that most tests begin with.

    Attributes:
        emulator: Its controls.
        d: The module `cuda.bindings.driver`.
    """

    def __init__(self, emulator: Emulator) -> None:
        from cuda.bindings import driver

        self.emulator = emulator
        self.d: Any = driver

    def code(self, answer: tuple[Any, ...]) -> int:
        """The result of a call."""
        return int(answer[0])

    def ok(self, answer: tuple[Any, ...]) -> Any:
        """What a call that must succeed returned."""
        assert answer[0] == self.d.CUresult.CUDA_SUCCESS, answer[0]
        return answer[1] if len(answer) == 2 else answer[1:]

    def raw(self, name: str, *arguments: int) -> int:
        """The result of a call past the binding, which passes no NULL where a result goes. Missing arguments are 0."""
        function, status = ctypes.c_void_p(), ctypes.c_int()
        look_up = ctypes.CDLL(str(find_emulator())).cuGetProcAddress_v2
        found = look_up(name.encode(), ctypes.byref(function), 12090, ctypes.c_uint64(0), ctypes.byref(status))
        assert (found, status.value) == (0, 0), name
        prototype = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_uint64] * 6)
        return prototype(function.value or 0)(*arguments, *[0] * (6 - len(arguments)))

    def start(self, device: int = 0) -> None:
        """Initialise, and make a device's primary context current in this thread."""
        self.ok(self.d.cuInit(0))
        self.ok(self.d.cuCtxSetCurrent(self.ok(self.d.cuDevicePrimaryCtxRetain(device))))

    def prop(self, device: int = 0) -> Any:
        """Properties of a device's memory."""
        prop = self.d.CUmemAllocationProp()
        prop.type = self.d.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        prop.location.type = self.d.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        prop.location.id = device
        return prop

    def desc(self, device: int = 0, access: int = READ_WRITE) -> Any:
        """The description of a device's access."""
        desc = self.d.CUmemAccessDesc()
        desc.location.type = self.d.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        desc.location.id = device
        desc.flags = self.d.CUmemAccess_flags(access)
        return desc

    def reserve(self, n_pages: int = 16) -> int:
        """Reserve addresses."""
        return int(self.ok(self.d.cuMemAddressReserve(n_pages * PAGE, 0, 0, 0)))

    def create(self, n_pages: int = 1, device: int = 0) -> int:
        """Create memory."""
        return int(self.ok(self.d.cuMemCreate(n_pages * PAGE, self.prop(device), 0)))

    def map(self, address: int, handle: int, n_pages: int = 1, device: int = 0, access: int = READ_WRITE) -> None:
        """Map memory and make it accessible."""
        self.ok(self.d.cuMemMap(address, n_pages * PAGE, 0, handle, 0))
        if access != NONE:
            self.ok(self.d.cuMemSetAccess(address, n_pages * PAGE, [self.desc(device, access)], 1))

    def mapped(self, n_pages: int = 1, device: int = 0) -> int:
        """Reserve 16 pages and map `n_pages` of one page each at their beginning."""
        base = self.reserve()
        for i in range(n_pages):
            self.map(base + i * PAGE, self.create(device=device), device=device)
        return base

    def read(self, address: int, n_bytes: int = 4) -> bytes:
        """What the memory holds, as a kernel would see it now."""
        return ctypes.string_at(address, n_bytes)


@contextmanager
def emulated_machine(n_devices: int = 1) -> Iterator[Machine]:
    """A machine in its first state, but for small pages; whatever a test leaves behind is freed."""
    emulator = load_emulator()
    emulator.reset(force=True)
    emulator.set_granularity(PAGE)
    emulator.set_n_devices(n_devices)
    try:
        yield Machine(emulator)
    finally:
        emulator.reset(force=True)
