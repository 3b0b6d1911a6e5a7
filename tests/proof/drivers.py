"""The drivers that the proofs run on, by name. The one place to add another."""

from __future__ import annotations

import mmap
from contextlib import suppress

from vmem_kv.driver.base import Driver
from vmem_kv.driver.ledger import Ledger
from vmem_kv.errors import ConfigError
from vmem_kv.testing.emulator import NOTHING, load_emulator

from ..core.backends import open_backend, physical_bytes

DRIVERS = ("native", "cuda")
"""The host driver's native way, and the CUDA driver on the emulated device. "python" is the host driver's other way."""

OPENERS = {"native": "open_driver('host:native')", "cuda": "open_backend('cuda')  # tests.core.backends"}
"""How a program that repeats a run opens the driver."""

__all__ = ["DRIVERS", "OPENERS", "empty_device", "open_driver", "physical_bytes"]


def open_driver(name: str) -> Driver:
    """Open a driver that is alone in the process: it has a ledger of its own."""
    return open_backend(name, Ledger())


def empty_device() -> list[str]:
    """Free whatever is live on the emulated device, if there is one in this process; return the rules broken on it."""
    violations: list[str] = []
    with suppress(ConfigError):
        emulator = load_emulator()
        violations = emulator.violations()
        if emulator.live() != NOTHING:
            emulator.reset(force=True)
            emulator.set_granularity(mmap.PAGESIZE)
        emulator.forget_violations()
    return violations
