"""The drivers that the proofs run on, by name. The one place to add another."""

from __future__ import annotations

from vmem_kv.driver.base import Driver
from vmem_kv.driver.ledger import Ledger

from ..core.backends import open_backend, physical_bytes

DRIVERS = ("native", "cuda")
"""The host driver's native way, and the CUDA driver on the emulated device. (The host's Python way: tests/core.)"""

OPENERS = {"native": "open_driver('host:native')", "cuda": "open_backend('cuda')  # tests.core.backends"}
"""How a program that repeats a run opens the driver."""

__all__ = ["DRIVERS", "OPENERS", "open_driver", "physical_bytes"]


def open_driver(name: str) -> Driver:
    """Open a driver that is alone in the process: it has a ledger of its own."""
    return open_backend(name, Ledger())
