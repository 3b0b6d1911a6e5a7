"""The suite's own checks against planted faults, on the emulated driver: each must see what it is there to see.

A part of its own, because the emulated driver is loaded into a process once and for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import torch

from benchmarks.gpu import correctness, facts, interference, misuse, speed
from benchmarks.gpu.bench import Bench, Capture, EmulatedBench
from benchmarks.gpu.cases import Case, Reporter
from benchmarks.gpu.plan import EMULATED, SMALL, Plan, Point
from benchmarks.gpu.sequences import mapped
from vmem_kv.attention.base import Attend, AttentionSpec, Kernel
from vmem_kv.attention.sdpa import Sdpa
from vmem_kv.driver.base import Driver, Handle, Span
from vmem_kv.driver.cuda import CudaDriver, NoRuntime
from vmem_kv.errors import OutOfPages

SCALE = replace(EMULATED.interference, n_kernels=20)


class Unscrubbing(CudaDriver):
    """Hands pages on as they are."""

    def scrub(self, spans: Sequence[Span]) -> None:
        pass


class Unaliasing(CudaDriver):
    """Maps another page where one is mapped already."""

    def map(self, page_bytes: int, addresses: Sequence[int], handles: Sequence[Handle]) -> None:
        seen = self.__dict__.setdefault("seen", set())
        own: list[Handle] = []
        for handle in handles:
            if handle in seen:
                self.create(page_bytes, [0], own)
            else:
                seen.add(handle)
                own.append(handle)
        super().map(page_bytes, addresses, own)


class Stingy(CudaDriver):
    """Has six pages."""

    def create(self, page_bytes: int, places: Sequence[int], created: list[Handle]) -> None:
        if len(self._pages) + len(places) > 6:
            raise OutOfPages("planted")
        super().create(page_bytes, places, created)


class Greedy(Sdpa):
    """Attends to one token too many."""

    name = "torch_flash"

    def build(self, spec: AttentionSpec) -> Attend:
        inner = super().build(replace(spec, is_causal=False))

        def attend(query, kv, batch, sinks):  # type: ignore[no-untyped-def]
            longer = tuple(s._replace(length=s.length + 1) for s in batch.sequences)
            return inner(query, kv, replace(batch, sequences=longer), sinks)

        return attend


class Biased(Sdpa):
    """Scales scores wrongly."""

    name = "torch_flash"

    def build(self, spec: AttentionSpec) -> Attend:
        return super().build(replace(spec, scale=1.1 * spec.scale))


class FaultyBench(EmulatedBench):
    """An emulated bench with one thing exchanged."""

    def __init__(
        self,
        plan: Plan,
        driver_type: type[CudaDriver] = CudaDriver,
        kernel: Kernel | None = None,
        replays: bool = True,
    ) -> None:
        super().__init__(plan)
        self._driver_type = driver_type
        self._kernel = kernel
        self._replays = replays

    @cached_property
    def driver(self) -> Driver:
        _ = self.cuda
        return self._driver_type(0, NoRuntime(), tensor_device="cpu")

    @property
    def kernels(self) -> Sequence[Kernel]:
        return super().kernels if self._kernel is None else (self._kernel,)

    @property
    def capture(self) -> Capture:
        def capture(call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
            output = call().clone()

            def replay() -> None:
                if self._replays:
                    output.copy_(call())

            return output, replay

        return capture


def _graph(replays: bool) -> Callable[[Bench, Reporter], None]:
    def run(bench: Bench, report: Reporter) -> None:
        correctness._check_graph(SMALL, "bfloat16", FaultyBench(bench.plan, replays=replays), report)

    return run


def _greedy_numerics(bench: Bench, report: Reporter) -> None:
    faulty = FaultyBench(bench.plan, kernel=Greedy())
    correctness._check_kernel("torch_flash", SMALL, "float32", "per_layer", faulty, report)


def _biased_numerics(bench: Bench, report: Reporter) -> None:
    faulty = FaultyBench(bench.plan, kernel=Biased())
    correctness._check_kernel("torch_flash", SMALL, "bfloat16", "per_layer", faulty, report)


def _greedy_overread(bench: Bench, report: Reporter) -> None:
    correctness._check_overread("torch_flash", SMALL, "float32", FaultyBench(bench.plan, kernel=Greedy()), report)


def _biased_overread(bench: Bench, report: Reporter) -> None:
    correctness._check_overread("torch_flash", SMALL, "bfloat16", FaultyBench(bench.plan, kernel=Biased()), report)


def _contents(bench: Bench, report: Reporter) -> None:
    correctness._check_contents(FaultyBench(bench.plan, Unscrubbing), report)


def _aliases(bench: Bench, report: Reporter) -> None:
    correctness._check_aliases(SMALL, "bfloat16", FaultyBench(bench.plan, Unaliasing), report)


def _misuse(bench: Bench, report: Reporter) -> None:
    facts._probe(misuse.Probe("free twice", lambda raw: ["SUCCESS", "SUCCESS"]), bench, report)


def _late_write(bench: Bench, report: Reporter) -> None:
    """A disturbance that writes where kernels read."""

    @contextmanager
    def prepare(bench, cache, scale):  # type: ignore[no-untyped-def]
        base, n_bytes = cache.region.reservation.base, bench.granularity_bytes
        yield lambda calls: calls.call(calls.raw.cuda.cuMemsetD8, base, 0, n_bytes)

    interference._disturb("late write", prepare, SCALE, bench, report)


def _refused_call(bench: Bench, report: Reporter) -> None:
    """A disturbance whose calls the driver refuses."""

    @contextmanager
    def prepare(bench, cache, scale):  # type: ignore[no-untyped-def]
        yield lambda calls: calls.call(calls.raw.unmap, cache.region.reservation.base + (1 << 40), 1 << 21)

    interference._disturb("refused", prepare, SCALE, bench, report)


def _layout_without_room(bench: Bench, report: Reporter) -> None:
    """Of two layouts one needs eight pages and the other four."""
    scale = replace(EMULATED.speed, layouts=("per_layer", "token_major"), n_rounds=1)
    speed._compare(SMALL, Point(4, 256), scale, FaultyBench(bench.plan, Stingy), report)


def _lose_the_device(bench: Bench, report: Reporter) -> None:
    """A fault that the case itself does not notice: only what runs after it would."""
    _ = bench.cuda
    bench._emulator.make_sticky(700)  # type: ignore[attr-defined]


def _sees_views(bench: Bench, report: Reporter) -> None:
    """Whether closing sequences under a live tensor is refused."""
    try:
        with mapped(
            bench, SMALL, "per_layer", [8], dtype=torch.float16, page_bytes=bench.granularity_bytes, span_tokens=64
        ) as sequences:
            kept = sequences.store(0)
    except RuntimeError as error:
        report.row("views", {"case": "views", "outcome": str(error), "kept": len(kept.lengths)})


def cases(plan: Plan) -> Sequence[Case]:
    return [
        Case("graph that replays", _graph(True), table="graph"),
        Case("graph that does not", _graph(False), table="graph"),
        Case("contents", _contents),
        Case("misuse", _misuse),
        Case("late write", _late_write),
        Case("refused", _refused_call),
        Case("layout without room", _layout_without_room),
        Case("biased numerics", _biased_numerics),
        Case("greedy numerics", _greedy_numerics, table="greedy"),
        Case("aliases", _aliases, is_dangerous=True),
        Case("greedy overread", _greedy_overread, is_dangerous=True, table="overread"),
        Case("biased overread", _biased_overread, is_dangerous=True),
        Case("lost", _lose_the_device),
        Case("misuse", _misuse),
        Case("views", _sees_views, is_dangerous=True),
    ]
