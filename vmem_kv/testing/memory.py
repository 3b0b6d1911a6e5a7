"""How the checks of this package read and write device memory, and fences that stand for kernels still running."""

from __future__ import annotations

import ctypes
import errno
import threading
from collections.abc import Callable
from typing import Protocol

from vmem_kv.driver.base import Driver
from vmem_kv.errors import DriverError
from vmem_kv.testing.probe import can_read, find_probe

STALL_TIMEOUT_S = 10.0
"""How long a manual fence is waited for."""


class Memory(Protocol):
    """Byte access to mapped addresses of one device. Touching an unmapped one may end the process."""

    def read(self, address: int, n_bytes: int) -> bytes:
        """Return the bytes of `[address, address + n_bytes)`."""

    def write(self, address: int, data: bytes) -> None:
        """Store `data` from `address` on."""

    def is_mapped(self, address: int) -> bool | None:
        """Whether anything can be touched at an address, found out without touching it; None if nobody can say."""


class HostMemory:
    """Memory that this process can touch itself, whichever driver mapped it."""

    def __init__(self, driver: Driver | None = None) -> None:
        pass

    def read(self, address: int, n_bytes: int) -> bytes:
        """Return the bytes of `[address, address + n_bytes)`."""
        return ctypes.string_at(address, n_bytes)

    def write(self, address: int, data: bytes) -> None:
        """Store `data` from `address` on."""
        ctypes.memmove(address, data, len(data))

    def is_mapped(self, address: int) -> bool:
        """Whether this process can read there, by the kernel's word."""
        return can_read(address)


class DriverMemory:
    """Memory reached through a driver's own copies, wherever it is."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._probe = find_probe(driver.info.device)

    def read(self, address: int, n_bytes: int) -> bytes:
        """Return the bytes of `[address, address + n_bytes)`."""
        buffer = bytearray(n_bytes)
        self._driver.copy_to_host(address, memoryview(buffer)).wait()
        return bytes(buffer)

    def write(self, address: int, data: bytes) -> None:
        """Store `data` from `address` on."""
        self._driver.copy_from_host(memoryview(data), address).wait()

    def is_mapped(self, address: int) -> bool | None:
        """Whether anything is mapped there, by the kernel's or the CUDA driver's word; None for other devices."""
        return self._probe(address) if self._probe else None


class ManualFence:
    """A fence that passes when `pass_` is called: stands for a kernel that is still running."""

    def __init__(self) -> None:
        self.n_asked = 0
        """How often somebody asked."""
        self._passed = threading.Event()

    def passed(self) -> bool:
        """Whether `pass_` was called."""
        self.n_asked += 1
        return self._passed.is_set()

    def wait(self) -> None:
        """Block until another thread calls `pass_`; give up after `STALL_TIMEOUT_S` with a DriverError."""
        if not self._passed.wait(STALL_TIMEOUT_S):
            raise DriverError("wait", errno.ETIMEDOUT, "ETIMEDOUT", 0, "nobody let this fence pass")

    def pass_(self) -> None:
        """Let the fence pass. It stays so."""
        self._passed.set()


class KernelFence:
    """A fence behind a kernel that runs until somebody waits for it, and not a moment longer.

    Args:
        at_its_end: Called at that moment, once: it looks whether all is there still that the kernel reads.
    """

    def __init__(self, at_its_end: Callable[[], object]) -> None:
        self._at_its_end = at_its_end
        self._is_over = False

    def passed(self) -> bool:
        """Whether `wait` was called."""
        return self._is_over

    def wait(self) -> None:
        """Let the kernel end."""
        if not self._is_over:
            self._at_its_end()
            self._is_over = True
