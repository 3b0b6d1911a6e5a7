"""How the checks of this package read and write device memory, and a fence that passes when the test says so."""

from __future__ import annotations

import ctypes
from typing import Protocol


class Memory(Protocol):
    """Byte access to mapped addresses of one device. Touching an unmapped one may end the process."""

    def read(self, address: int, n_bytes: int) -> bytes:
        """Return the bytes of `[address, address + n_bytes)`."""

    def write(self, address: int, data: bytes) -> None:
        """Store `data` from `address` on."""


class HostMemory:
    """Memory that this process can touch itself."""

    def read(self, address: int, n_bytes: int) -> bytes:
        """Return the bytes of `[address, address + n_bytes)`."""
        return ctypes.string_at(address, n_bytes)

    def write(self, address: int, data: bytes) -> None:
        """Store `data` from `address` on."""
        ctypes.memmove(address, data, len(data))


class ManualFence:
    """A fence that passes when `pass_` is called: stands for a kernel that is still running."""

    def __init__(self) -> None:
        self.n_asked = 0
        """How often somebody asked."""
        self._passed = False

    def passed(self) -> bool:
        """Whether `pass_` was called."""
        self.n_asked += 1
        return self._passed

    def pass_(self) -> None:
        """Let the fence pass. It stays so."""
        self._passed = True
