"""Tools to test vmem_kv with, and drivers of your own.

    check_driver    holds any driver against the contract
    FaultyDriver    fails any call of any driver on demand
    ReferenceModel  predicts what a cache must have mapped, from nothing but the calls made
    ManualFence     passes when the test says so
    attention_ops   CPU stand-ins for the operators of CUDA attention kernels (a module of its own: it imports torch)

None of it is imported by the rest of the package, and none of it needs a test framework.
"""

from vmem_kv.testing.conformance import ContractBreach, Report, check_driver
from vmem_kv.testing.faults import (
    FaultyDriver,
    Plan,
    Point,
    driver_error,
    fail_any,
    fail_from,
    fail_kind,
    fail_once,
    interruption,
    natural_error,
    no_faults,
)
from vmem_kv.testing.memory import DriverMemory, HostMemory, ManualFence, Memory
from vmem_kv.testing.model import ModelMismatch, ReferenceModel

__all__ = [
    "ContractBreach",
    "DriverMemory",
    "FaultyDriver",
    "HostMemory",
    "ManualFence",
    "Memory",
    "ModelMismatch",
    "Plan",
    "Point",
    "ReferenceModel",
    "Report",
    "check_driver",
    "driver_error",
    "fail_any",
    "fail_from",
    "fail_kind",
    "fail_once",
    "interruption",
    "natural_error",
    "no_faults",
]
