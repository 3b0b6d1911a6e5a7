"""Tools to test vmem_kv with, and drivers of your own.

    check_driver    holds any driver against the contract
    FaultyDriver    fails any call of any driver on demand
    ReferenceModel  predicts what a cache must have mapped, from nothing but the calls made
    ManualFence     passes when the test says so
    ManualClock     stands still until it is turned

Adaptors, which wrap any driver and stack in any order:

    LimitingDriver     has less memory than the device
    StatisticsDriver   counts calls, items, failures and time
    TrackingDriver     knows who took what, with the stack of the call
    LoggingDriver      writes a trace of all calls, for `replay` to make again on another driver
    PoisonDriver       fills whatever goes out of use with NaN

docs/testing-a-driver.md shows each of them at work.

Whole proofs, in modules of their own (they need numpy):

    operations         random operations held against the model and shadow tags, as replayable programs
    tier_operations    the same with a host tier and files, against a model of these (tier_model)
    session_operations the same with sessions, which go down the tiers and come back
    late               a device whose copies to and from the host run as late as the contract lets them
    shadow             tags that say whose every K and V row is
    shrink             shortens a list of operations that goes wrong
    explorer           every order of moves, and moves in the middle of others
    stress             the engine of `vmem-kv stress`
    thread_round       several threads on one cache, which share pages and end in each other's middle
    attention_ops   CPU stand-ins for the operators of CUDA attention kernels (a module of its own: it imports torch)

None of it is imported by the rest of the package, and none of it needs a test framework.
"""

from vmem_kv.testing.adaptor import Adaptor
from vmem_kv.testing.clock import Clock, ManualClock
from vmem_kv.testing.conformance import ContractBreach, Report, check_driver
from vmem_kv.testing.faults import (
    FaultyDriver,
    Plan,
    Point,
    driver_error,
    fail_any,
    fail_from,
    fail_kind,
    fail_next,
    fail_once,
    interruption,
    natural_error,
    no_faults,
    slow,
)
from vmem_kv.testing.limiting import LimitingDriver
from vmem_kv.testing.memory import DriverMemory, HostMemory, ManualFence, Memory
from vmem_kv.testing.model import ModelMismatch, ReferenceModel
from vmem_kv.testing.poison import PoisonDriver
from vmem_kv.testing.statistics import StatisticsDriver
from vmem_kv.testing.trace import Call, LoggingDriver, replay
from vmem_kv.testing.tracking import Taken, TrackingDriver

__all__ = [
    "Adaptor",
    "Call",
    "Clock",
    "ContractBreach",
    "DriverMemory",
    "FaultyDriver",
    "HostMemory",
    "LimitingDriver",
    "LoggingDriver",
    "ManualClock",
    "ManualFence",
    "Memory",
    "ModelMismatch",
    "Plan",
    "Point",
    "PoisonDriver",
    "ReferenceModel",
    "Report",
    "StatisticsDriver",
    "Taken",
    "TrackingDriver",
    "check_driver",
    "driver_error",
    "fail_any",
    "fail_from",
    "fail_kind",
    "fail_next",
    "fail_once",
    "interruption",
    "natural_error",
    "no_faults",
    "replay",
    "slow",
]
