"""Part 1: what this driver and device are, what each call costs, and what they answer to every misuse.

Everything goes through the bare binding, without vmem_kv's own driver and without torch.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.gpu import misuse
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.cases import ANYTHING, OK, WRONG, Case, Reporter, Row
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.raw import CallFailed, Raw

CALLS = "latency of driver calls, Python's binding included"
RUNS = "latency of one call over a run of mappings, Python's binding included"
MISUSE = "answers to misuse"
DIFFERENCES = "bugs of the emulator: answers that differ from its own"
CONTENTS = "contents of pages"
_TIMED = ("p50_us", "p99_us", "p50_us_per_mapping")
_ATTRIBUTES = {
    102: "virtual memory management",
    103: "export as a file descriptor",
    134: "host NUMA node",
    141: "memory on a host NUMA node",
    145: "memory on the host",
    16: "multiprocessors",
    38: "L2 cache, bytes",
    75: "compute capability, major",
    76: "compute capability, minor",
}


def cases(plan: Plan) -> Sequence[Case]:
    """All cases, by worth."""
    scale, costs = plan.facts, plan.costs
    found = [Case("device", _describe_device, timeout_s=30)]
    found += [
        Case(f"calls, pages of {multiple} x granularity", partial(_time_calls, multiple, scale.n_samples), costs.calls)
        for multiple in scale.page_multiples
    ]
    found += [Case("runs", partial(_time_runs, scale.run_lengths, scale.n_run_samples), costs.calls)]
    found += [Case("contents", partial(_look_at_pages, scale.n_fresh_pages), costs.calls, table=CONTENTS)]
    found += [Case("aliases", _look_through_aliases, costs.calls, table=CONTENTS)]
    found += [Case(probe.name, partial(_probe, probe), costs.probe, 20, table=MISUSE) for probe in misuse.PROBES]
    found += [Case("mapping ceiling", partial(_seek_ceiling, scale.n_ceiling), costs.ceiling, timeout_s=40)]
    found += [
        Case(
            probe.name,
            partial(_probe, probe),
            costs.dangerous,
            20,
            is_dangerous=True,
            table=MISUSE,
            context={"expected": ANYTHING},
        )
        for probe in misuse.DANGEROUS_PROBES
    ]
    return found


def _describe_device(bench: Bench, report: Reporter) -> None:
    raw = Raw(bench.cuda)
    cuda = raw.cuda

    def say(what: str, value: object) -> None:
        report.row("device", {"fact": what, "value": value})

    say("name", raw.must(cuda.cuDeviceGetName(96, raw.device)).split(b"\0")[0].decode())
    say("memory, bytes", int(raw.must(cuda.cuDeviceTotalMem(raw.device))))
    say("CUDA driver version", int(raw.must(cuda.cuDriverGetVersion())))
    say("minimum granularity, bytes", raw.granularity_bytes)
    say("recommended granularity, bytes", raw.recommended_bytes)
    for number, what in sorted(_ATTRIBUTES.items()):
        code, value = cuda.cuDeviceGetAttribute(cuda.CUdevice_attribute(number), raw.device)
        say(f"attribute {number}: {what}", int(value) if not int(code) else code.name)
    # By name: to import torch for the first time can take longer than this case may.
    for package in ("torch", "cuda-bindings", "nvidia-cuda-runtime", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12"):
        with contextlib.suppress(PackageNotFoundError):
            say(package, version(package))
    say("python", sys.version.split()[0])


def _time_calls(multiple: int, n_samples: int, bench: Bench, report: Reporter) -> None:
    """Time the life of one page, call by call, with what Python's binding adds to each."""
    raw = Raw(bench.cuda)
    page_bytes = multiple * raw.granularity_bytes
    taken: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = call()
        taken.setdefault(name, []).append((time.perf_counter() - began) * 1e6)
        return raw.must(result)

    for _ in range(n_samples + 3):
        base = int(timed("cuMemAddressReserve", partial(raw.reserve, 4 * page_bytes)))
        handle = int(timed("cuMemCreate", partial(raw.create, page_bytes)))
        timed("cuMemMap", partial(raw.map, base, page_bytes, handle))
        timed("cuMemSetAccess", partial(raw.set_access, base, page_bytes))
        timed("cuMemUnmap", partial(raw.unmap, base, page_bytes))
        timed("cuMemRelease", partial(raw.release, handle))
        timed("cuMemAddressFree", partial(raw.free, base, 4 * page_bytes))
    for name, times in taken.items():
        report.row(CALLS, {"page_bytes": page_bytes, "call": name, **_summary(times[3:])}, timed=_TIMED)


def _time_runs(run_lengths: Sequence[int], n_samples: int, bench: Bench, report: Reporter) -> None:
    """Time one `cuMemSetAccess` and one `cuMemUnmap` over so many neighbouring mappings."""
    raw = Raw(bench.cuda)
    page_bytes = raw.granularity_bytes
    for n_mappings in run_lengths:
        n_bytes = n_mappings * page_bytes
        access_us, unmap_us = [], []
        with _reserved(raw, n_bytes) as base, _created(raw, n_mappings) as handles:
            for _ in range(n_samples + 1):
                for index, handle in enumerate(handles):
                    raw.must(raw.map(base + index * page_bytes, page_bytes, handle))
                began = time.perf_counter()
                raw.must(raw.set_access(base, n_bytes))
                access_us.append((time.perf_counter() - began) * 1e6)
                began = time.perf_counter()
                raw.must(raw.unmap(base, n_bytes))
                unmap_us.append((time.perf_counter() - began) * 1e6)
        for name, times in (("cuMemSetAccess", access_us), ("cuMemUnmap", unmap_us)):
            summary = _summary(times[1:])
            row = {"call": name, "n_mappings": n_mappings, "page_bytes": page_bytes, **summary}
            row["p50_us_per_mapping"] = summary["p50_us"] / n_mappings
            report.row(RUNS, row, timed=_TIMED)


def _look_at_pages(n_pages: int, bench: Bench, report: Reporter) -> None:
    """Dirty pages and release them, then see what new ones hold; remap a page and see whether it kept its bytes."""
    raw = Raw(bench.cuda)
    page_bytes = raw.granularity_bytes
    zeros = bytes(page_bytes)
    with _reserved(raw, n_pages * page_bytes) as base:
        n_zero = 0
        for is_second in (False, True):
            with _created(raw, n_pages) as handles, _mapped(raw, base, handles):
                if is_second:
                    n_zero = sum(raw.read(base + i * page_bytes, page_bytes) == zeros for i in range(n_pages))
                raw.must(raw.cuda.cuMemsetD8(base, 0xA5, n_pages * page_bytes))
                raw.must(raw.cuda.cuCtxSynchronize())
        report.row(
            CONTENTS,
            {"what": "new pages that are all zero, after others were written and released", "n": n_zero, "of": n_pages},
        )
    with _reserved(raw, 2 * page_bytes) as base, _created(raw, 1) as handles:
        with _mapped(raw, base, handles):
            raw.must(raw.cuda.cuMemsetD8(base, 0x5A, page_bytes))
        with _mapped(raw, base + page_bytes, handles):
            kept = raw.read(base + page_bytes, page_bytes) == bytes([0x5A]) * page_bytes
    report.row(CONTENTS, {"what": "a page mapped elsewhere kept its bytes", "n": int(kept), "of": 1})


def _look_through_aliases(bench: Bench, report: Reporter) -> None:
    """Write through one alias, then read through the other."""
    raw = Raw(bench.cuda)
    page_bytes = raw.granularity_bytes
    with _reserved(raw, 2 * page_bytes) as base, _created(raw, 1) as handles, _mapped(raw, base, handles * 2):
        n_equal = 0
        for value in range(1, 9):
            raw.must(raw.cuda.cuMemsetD8(base, value, page_bytes))
            n_equal += raw.read(base + page_bytes, page_bytes) == bytes([value]) * page_bytes
    outcome = OK if n_equal == 8 else WRONG
    row = {"what": "written through one alias, read through another", "n": n_equal, "of": 8, "outcome": outcome}
    report.row(CONTENTS, row)


def _probe(probe: misuse.Probe, bench: Bench, report: Reporter) -> None:
    """Misuse the driver in one way; hold its answer against what the emulator answers."""
    expected = misuse.expected_answers()[probe.name]
    got = probe.run(Raw(bench.cuda))
    is_same = got == expected
    row: Row = {"case": probe.name, "answer": got, "emulator": expected, "outcome": OK if is_same else "differs"}
    report.row(MISUSE, row)
    if not is_same:
        row = {"case": probe.name, "this driver": got, "emulator": expected, "stricter on purpose": probe.is_stricter}
        report.row(DIFFERENCES, row)


def _seek_ceiling(n_ceiling: int, bench: Bench, report: Reporter, deadline_s: float = 8.0) -> None:
    """Map one handle again and again, up to a bound; say how far it went, not where the limit is."""
    raw = Raw(bench.cuda)
    page_bytes, batch = raw.granularity_bytes, 500
    ends = time.perf_counter() + deadline_s
    n_mapped, n_accessible, reason = 0, 0, "the bound of this test"
    with _reserved(raw, n_ceiling * page_bytes) as base, _created(raw, 1) as (handle,):
        while n_accessible < n_ceiling and reason == "the bound of this test":
            if time.perf_counter() > ends:
                reason = f"{deadline_s:g} s were over"
                break
            first = n_mapped
            for index in range(first, min(first + batch, n_ceiling)):
                (code,) = raw.map(base + index * page_bytes, page_bytes, handle)
                if int(code):
                    reason = f"cuMemMap answered {code.name}"
                    break
                n_mapped += 1
            if n_mapped > first:
                (code,) = raw.set_access(base + first * page_bytes, (n_mapped - first) * page_bytes)
                if int(code):
                    reason = f"cuMemSetAccess answered {code.name}"
                    break
                n_accessible = n_mapped
        # Before the teardown, which may take longer than everything above.
        row = {"aliases of one handle, live at once": n_accessible, "tried": n_ceiling, "ended by": reason}
        report.row("mapping ceiling", row)
        for first in range(0, n_mapped, batch):
            n_bytes = (min(first + batch, n_mapped) - first) * page_bytes
            raw.must(raw.unmap(base + first * page_bytes, n_bytes))


@contextmanager
def _reserved(raw: Raw, n_bytes: int) -> Iterator[int]:
    base = int(raw.must(raw.reserve(n_bytes)))
    yield base
    raw.must(raw.free(base, n_bytes))


@contextmanager
def _created(raw: Raw, n_pages: int) -> Iterator[list[int]]:
    handles = [int(raw.must(raw.create(raw.granularity_bytes))) for _ in range(n_pages)]
    yield handles
    for handle in handles:
        raw.must(raw.release(handle))


@contextmanager
def _mapped(raw: Raw, base: int, handles: Sequence[int]) -> Iterator[None]:
    page_bytes = raw.granularity_bytes
    for index, handle in enumerate(handles):
        raw.must(raw.map(base + index * page_bytes, page_bytes, handle))
    raw.must(raw.set_access(base, len(handles) * page_bytes))
    yield
    with contextlib.suppress(CallFailed):
        raw.must(raw.cuda.cuCtxSynchronize())
    raw.must(raw.unmap(base, len(handles) * page_bytes))


def _summary(times_us: Sequence[float]) -> dict[str, float | int]:
    ordered = sorted(times_us)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"p50_us": statistics.median(ordered), "p99_us": p99, "n": len(ordered)}
