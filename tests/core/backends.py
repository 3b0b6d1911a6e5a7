"""The drivers that the allocator is tested on, by name: the host's both ways, and CUDA's on the emulated device."""

from __future__ import annotations

import mmap
import shutil

from vmem_kv.driver.base import Driver
from vmem_kv.driver.cuda import CudaDriver, NoRuntime
from vmem_kv.driver.host import HostDriver
from vmem_kv.driver.host_mapper import find_native_library
from vmem_kv.driver.ledger import Ledger
from vmem_kv.errors import ConfigError
from vmem_kv.testing.emulator import NOTHING, Emulator, load_emulator

BACKENDS = ("python", "native", "cuda")


def open_backend(name: str, ledger: Ledger | None = None) -> Driver:
    """Open a driver. With a ledger of its own it is alone in the process."""
    if name == "cuda":
        emulated_device()
        return CudaDriver(0, NoRuntime(), ledger=ledger, tensor_device="cpu")
    require_native(name)
    return HostDriver(name, ledger=ledger) if ledger else HostDriver(name)


def physical_bytes(driver: Driver) -> int:
    """Memory behind a driver now, by the count of whoever is below it."""
    if isinstance(driver, HostDriver):
        return driver.physical_bytes()
    return driver.info.memory_bytes - driver.available_bytes()


def emulated_device() -> Emulator:
    """The emulated device of this process, with pages as small as the host's so that the same tests fit both.

    Other tests of the same process may have left it as they wanted it; while it is in use it stays as it is.
    """
    emulator = load_emulator()
    if emulator.live() == NOTHING:
        emulator.reset(force=True)
        emulator.set_granularity(mmap.PAGESIZE)
    return emulator


def require_native(path: str) -> None:
    """Fail where the native part is missing and could have been built."""
    if path == "native":
        try:
            find_native_library()
        except OSError as error:
            has_compiler = any(shutil.which(name) for name in ("cc", "gcc", "clang"))
            advice = "build it (pip install -e .)" if has_compiler else "install a C compiler, then build it"
            raise ConfigError(f"{error}; {advice}") from error
