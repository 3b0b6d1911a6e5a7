"""What the parts measure on: a CUDA device, or the emulated driver with CPU tensors. Both under one set of names.

Everything is opened at its first use, so that a case which needs the bare driver only does not pay for torch.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.gpu.plan import Plan
from vmem_kv.driver.base import Driver
from vmem_kv.errors import VmemError

if TYPE_CHECKING:
    import torch

    from vmem_kv.attention.base import Kernel
    from vmem_kv.devices import OpenDriver
    from vmem_kv.pages import PagePool

N_WARM_ROUNDS = 3
N_IN_FLIGHT = 20
"""Launches that may wait on the device at one time: enough that it never waits for the host."""
BUDGET_SHARE = 0.55
"""Share of the device's memory that our pool may own; the rest is for plain tensors to compare with."""

Calls = Mapping[str, Callable[[], object]]
Capture = Callable[[Callable[[], "torch.Tensor"]], tuple["torch.Tensor", Callable[[], None]]]
"""Captures the launches of a call; returns its output, and what launches them again into that same output."""


class Series(NamedTuple):
    """Calls that followed one another without a gap that the host made."""

    began_s: float  # on the host's `time.perf_counter`
    times_ms: list[float]  # from the end of each call to the end of the next: what it takes, and any gap before it


class Clock(ABC):
    """Tells how long calls take on the device."""

    name: str

    @abstractmethod
    def _round(self, calls: Sequence[tuple[str, Callable[[], object]]], before: Callable[[], object]) -> list[float]:
        """Run each call once, `before` in front of each; return milliseconds in the same order."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has done everything."""

    @abstractmethod
    def back_to_back(self, call: Callable[[], object], n_calls: int) -> Series:
        """Launch a call again and again without waiting for it."""

    @abstractmethod
    def host_ms(self, call: Callable[[], object], n_calls: int = 7) -> float | None:
        """Milliseconds until a call returns to the host, the median; None where it is done then."""

    def measure(
        self, calls: Calls, n_rounds: int, before: Callable[[], object] = lambda: None
    ) -> dict[str, list[float]]:
        """Run all calls in turn, `n_rounds` times, after a few rounds that do not count.

        Who is first changes from round to round, so that what drifts (clocks, heat) hits all alike.

        Returns:
            Milliseconds of every round, per call; lists of equal length, so that ratios within a round can be taken.
        """
        order = list(calls.items())
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for index in range(N_WARM_ROUNDS + n_rounds):
            turn = index % len(order)
            rotated = order[turn:] + order[:turn]
            times = self._round(rotated, before)
            if index >= N_WARM_ROUNDS:
                for (name, _), milliseconds in zip(rotated, times, strict=True):
                    taken[name].append(milliseconds)
        return taken


class HostClock(Clock):
    """The wall clock of a device where a call that returned is done."""

    name = "perf_counter"

    def synchronize(self) -> None:
        """Return at once."""

    def back_to_back(self, call: Callable[[], object], n_calls: int) -> Series:
        marks = [time.perf_counter()]
        for _ in range(n_calls):
            call()
            marks.append(time.perf_counter())
        return Series(marks[0], [(b - a) * 1e3 for a, b in pairwise(marks)])

    def host_ms(self, call: Callable[[], object], n_calls: int = 7) -> float | None:
        """Return None."""
        return None

    def _round(self, calls: Sequence[tuple[str, Callable[[], object]]], before: Callable[[], object]) -> list[float]:
        times = []
        for _, call in calls:
            before()
            began = time.perf_counter()
            call()
            times.append((time.perf_counter() - began) * 1e3)
        return times


class EventClock(Clock):
    """CUDA events around each call.

    Args:
        cuda: What to use as `torch.cuda`.
    """

    name = "CUDA events"

    def __init__(self, cuda: Any = None) -> None:
        import torch

        self._cuda: Any = torch.cuda if cuda is None else cuda

    def synchronize(self) -> None:
        """Wait for all streams."""
        self._cuda.synchronize()

    def back_to_back(self, call: Callable[[], object], n_calls: int) -> Series:
        events = [self._cuda.Event(enable_timing=True) for _ in range(n_calls + 1)]
        self.synchronize()  # so that the first event is reached when it is recorded, and ties both clocks
        events[0].record()
        began_s = time.perf_counter()
        for index in range(n_calls):
            call()
            events[index + 1].record()
            if index >= N_IN_FLIGHT:
                events[index + 1 - N_IN_FLIGHT].synchronize()
        self.synchronize()
        return Series(began_s, [a.elapsed_time(b) for a, b in pairwise(events)])

    def host_ms(self, call: Callable[[], object], n_calls: int = 7) -> float | None:
        times = []
        for _ in range(n_calls):
            self.synchronize()
            began = time.perf_counter()
            call()
            times.append((time.perf_counter() - began) * 1e3)
        self.synchronize()
        return statistics.median(times)

    def _round(self, calls: Sequence[tuple[str, Callable[[], object]]], before: Callable[[], object]) -> list[float]:
        events = []
        for _, call in calls:
            start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
            before()
            start.record()
            call()
            end.record()
            events.append((start, end))
        self.synchronize()
        return [start.elapsed_time(end) for start, end in events]


class Bench(ABC):
    """The device and what is open on it. One per worker process."""

    clock_type: type[Clock]

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._pools: dict[int, PagePool] = {}

    @cached_property
    @abstractmethod
    def cuda(self) -> Any:
        """`cuda.bindings.driver`, initialised, with the device's primary context current in this thread."""

    @cached_property
    @abstractmethod
    def device(self) -> torch.device:
        """Where tensors live."""

    @cached_property
    @abstractmethod
    def driver(self) -> Driver:
        """The CUDA driver of vmem_kv."""

    @property
    @abstractmethod
    def opener(self) -> OpenDriver:
        """What a `VmemCache` opens its driver with."""

    @property
    @abstractmethod
    def kernels(self) -> Sequence[Kernel]:
        """Every attention kernel that there is; not all of them need be available."""

    @property
    @abstractmethod
    def capture(self) -> Capture | None:
        """How launches are captured and replayed; None where they cannot be."""

    @abstractmethod
    def torch_bytes(self) -> tuple[int, int] | None:
        """Bytes of torch's tensors on the device: now, and the peak since `reset_peak`. None where nobody counts."""

    @abstractmethod
    def reset_peak(self) -> None:
        """Let the peak start anew."""

    @cached_property
    def clock(self) -> Clock:
        """How times are taken."""
        return self.clock_type()

    def pool(self, page_bytes: int) -> PagePool:
        """The pool of pages of that size, shared by all cases that run in this process."""
        from vmem_kv.pages import PagePool

        if page_bytes not in self._pools:
            for other in self._pools.values():
                other.trim()
            budget = int(self.driver.available_bytes() * BUDGET_SHARE) // page_bytes
            self._pools[page_bytes] = PagePool(self.driver, page_bytes, budget)
        return self._pools[page_bytes]

    @property
    def granularity_bytes(self) -> int:
        """The smallest page."""
        return self.driver.info.granularity_bytes

    @contextmanager
    def flusher(self, n_bytes: int) -> Iterator[Callable[[], object]]:
        """A call that overwrites `n_bytes`: it empties the L2 cache, and keeps the device busy meanwhile."""
        import torch

        buffer = torch.empty(n_bytes, dtype=torch.uint8, device=self.device)
        yield buffer.zero_

    def settle(self) -> None:
        """Give back what died, between cases."""
        gc.collect()
        for pool in self._pools.values():
            pool.trim()

    def is_healthy(self) -> bool:
        """Whether the device still answers; after a fault in a kernel it does not."""
        if "cuda" not in self.__dict__:
            return True
        return int(self.cuda.cuCtxSynchronize()[0]) == 0

    def close(self) -> None:
        """Close the driver, if it was opened."""
        if "driver" in self.__dict__:
            with contextlib.suppress(VmemError):  # regions that a failed case left: they go with the process
                self.settle()
                self.driver.close()


class DeviceBench(Bench):
    """A CUDA device."""

    clock_type = EventClock

    @cached_property
    def cuda(self) -> Any:
        return _bare_driver()

    @cached_property
    def device(self) -> torch.device:
        import torch

        torch.cuda.init()  # type: ignore[no-untyped-call]
        return torch.device("cuda", 0)

    @cached_property
    def driver(self) -> Driver:
        from vmem_kv.config import CacheConfig
        from vmem_kv.devices import open_driver

        driver = open_driver(self.device, CacheConfig())
        _ = self.cuda
        return driver

    @property
    def opener(self) -> OpenDriver:
        from vmem_kv.devices import open_driver

        return open_driver

    @property
    def kernels(self) -> Sequence[Kernel]:
        from vmem_kv.attention.choose import all_kernels

        return all_kernels()

    @property
    def capture(self) -> Capture | None:
        return _capture_graph

    def torch_bytes(self) -> tuple[int, int] | None:
        import torch

        return torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)

    def reset_peak(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats(self.device)

    def is_healthy(self) -> bool:
        if "device" in self.__dict__:
            import torch

            try:
                torch.cuda.synchronize()
            except RuntimeError:
                return False
        return super().is_healthy()

    def settle(self) -> None:
        super().settle()
        if "device" in self.__dict__:
            import torch

            torch.cuda.empty_cache()


class EmulatedBench(Bench):
    """The emulated driver: its memory is the host's, and so are the tensors."""

    clock_type = HostClock

    @cached_property
    def cuda(self) -> Any:
        from benchmarks.gpu.emulator import emulator_path
        from vmem_kv.testing.emulator import load_emulator

        self._emulator = load_emulator(emulator_path())
        return _bare_driver()

    @cached_property
    def device(self) -> torch.device:
        import torch

        return torch.device("cpu")

    @cached_property
    def driver(self) -> Driver:
        from vmem_kv.driver.cuda import CudaDriver, NoRuntime

        _ = self.cuda
        return CudaDriver(0, NoRuntime(), tensor_device="cpu")

    @property
    def opener(self) -> OpenDriver:
        from vmem_kv.config import CacheConfig
        from vmem_kv.driver.cuda import CudaDriver, NoRuntime

        def open_emulated(device: torch.device, config: CacheConfig) -> Driver:
            _ = self.cuda
            return CudaDriver(0, NoRuntime(), tensor_device="cpu")

        return open_emulated

    @property
    def kernels(self) -> Sequence[Kernel]:
        from benchmarks.gpu.reference_kernels import kernels_on_the_cpu

        return kernels_on_the_cpu()

    @property
    def capture(self) -> Capture | None:
        return None

    def torch_bytes(self) -> tuple[int, int] | None:
        return None

    def reset_peak(self) -> None:
        """Do nothing: nobody counts."""


def open_bench(plan: Plan) -> Bench:
    """Return the bench that a plan is meant for."""
    return EmulatedBench(plan) if plan.is_emulated else DeviceBench(plan)


def _capture_graph(call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
    import torch

    cuda: Any = torch.cuda
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):  # what a kernel sets up at its first calls must not be captured
        for _ in range(3):
            call()
    cuda.current_stream().wait_stream(side)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        output = call()
    return output, graph.replay


def _bare_driver() -> Any:
    from cuda.bindings import driver as cuda

    def must(result: Any) -> Any:
        if int(result[0]):
            raise OSError(int(result[0]), f"CUDA does not start: {result[0].name}")
        return result[1] if len(result) > 1 else None

    must(cuda.cuInit(0))
    device = must(cuda.cuDeviceGet(0))
    must(cuda.cuCtxSetCurrent(must(cuda.cuDevicePrimaryCtxRetain(device))))
    return cuda
