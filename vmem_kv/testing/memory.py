"""How the checks of this package read and write device memory, and a fence that passes when the test says so."""

from __future__ import annotations

import ctypes
import errno
import threading
from typing import Protocol

from vmem_kv.driver.base import Driver
from vmem_kv.errors import DriverError

STALL_TIMEOUT_S = 10.0
"""How long a manual fence is waited for."""


class Memory(Protocol):
    """Byte access to mapped addresses of one device. Touching an unmapped one may end the process."""

    def read(self, address: int, n_bytes: int) -> bytes:
        """Return the bytes of `[address, address + n_bytes)`."""

    def write(self, address: int, data: bytes) -> None:
        """Store `data` from `address` on."""


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


class DriverMemory:
    """Memory reached through a driver's own copies, wherever it is."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def read(self, address: int, n_bytes: int) -> bytes:
        """Return the bytes of `[address, address + n_bytes)`."""
        buffer = bytearray(n_bytes)
        self._driver.copy_to_host(address, memoryview(buffer)).wait()
        return bytes(buffer)

    def write(self, address: int, data: bytes) -> None:
        """Store `data` from `address` on."""
        self._driver.copy_from_host(memoryview(data), address).wait()


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
