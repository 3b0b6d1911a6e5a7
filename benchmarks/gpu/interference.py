"""Part 4: what kernels feel of driver calls on other ranges, and what growth costs a decode step.

Kernels run back to back on one set of slots while a thread makes bare driver calls on memory that no kernel uses: no
fence, no copy and no fill is among them, so nothing waits but what the driver itself makes wait. Filling pages as well
is a case of its own. Kernel times are from the end of one kernel to the end of the next, so that a launch which the
driver's lock holds up shows as well; they are split by whether a driver call was under way meanwhile. Between bursts of
calls the thread rests for as long as a burst took, so that there are kernels of both kinds.

Decode steps write K and V of the new tokens and attend, in every layer. They have no projections and no MLP: of a real
step the growth is a smaller share.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.bench import Bench, Series
from benchmarks.gpu.cases import Case, Reporter, Row
from benchmarks.gpu.plan import DISTURBANCES, KERNELS, InterferenceScale, Plan, Shape
from benchmarks.gpu.raw import Raw
from benchmarks.gpu.sequences import Store, bind, mapped, spec_of
from vmem_kv.attention.base import BoundKernel
from vmem_kv.cache import KVCache
from vmem_kv.layout import LayerSpec, Layout
from vmem_kv.premap import Premapper
from vmem_kv.tensors import RegionTensors, SlotKV

KERNEL_TIMES = "kernel times beside driver calls"
STEPS = "decode steps by how sequences grow (attention only, no MLP)"
QUIET, AGAIN, PREMAPPED, SYNCHRONOUS, NEW_PAGES = (
    "none",
    "none, again",
    "premapped",
    "synchronous",
    "synchronous, new pages",
)
MODES = (QUIET, PREMAPPED, SYNCHRONOUS, NEW_PAGES, AGAIN)
TARGET = 0.01
"""How much slower than steps without growth those with premapped growth may be."""
_DTYPE = torch.bfloat16
_EDGES = (1.01, 1.05, 1.1, 1.5, 2.0, 10.0)
_TIMED = (
    *("p50_ms", "p90_ms", "p99_ms", "max_ms", "mean_ms", "p50 / quiet", "histogram"),
    *("driver calls/s", "pages/s", "share of time in driver calls"),
    *("n beside calls", "p50_ms beside calls", "p99_ms beside calls"),
    *("n beside none", "p50_ms beside none", "p99_ms beside none", "beside calls / beside none"),
)
_TIMED_STEPS = (
    *("p50_ms", "p90_ms", "p99_ms", "max_ms", "mean_ms", "median turn / none", "turns / none", "within 1 %"),
)


class DriverCalls:
    """The bare driver calls of one thread: makes them, and notes when each began and ended.

    Args:
        raw: The binding.
    """

    def __init__(self, raw: Raw) -> None:
        self.raw = raw
        self.spans: list[tuple[float, float]] = []
        """Begin and end of each, in seconds of `time.perf_counter`, in order."""
        self.n_pages = 0
        """Pages that were mapped, or created where nothing is mapped."""

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Make one call; return its value.

        Raises:
            CallFailed: It failed.
        """
        began = time.perf_counter()
        result = function(*arguments)
        self.spans.append((began, time.perf_counter()))
        return self.raw.must(result)


Work = Callable[[DriverCalls], None]
"""One burst of driver calls, which leaves everything as it was."""
Prepare = Callable[[Bench, KVCache, InterferenceScale], AbstractContextManager[Work]]


def cases(plan: Plan) -> Sequence[Case]:
    """All cases, by worth. What edits mappings beside running kernels may lose the device."""
    scale = plan.interference
    makers: dict[str, Prepare] = dict(
        zip(DISTURBANCES, (_edit_here, _edit_elsewhere, _create_and_release, _edit_and_fill), strict=True)
    )
    found = [
        Case(
            f"kernels beside: {name}",
            partial(_disturb, name, makers[name], scale),
            cost_s=plan.costs.disturbance,
            timeout_s=60,
            is_dangerous=True,
            table=KERNEL_TIMES,
        )
        for name in scale.disturbances
    ]
    steps = Case("decode steps", partial(_decode, scale), cost_s=plan.costs.steps, timeout_s=120, table=STEPS)
    return [found[0], steps, *found[1:]]


def _kernel(bench: Bench, shape: Shape) -> BoundKernel:
    """The first kernel that is here."""
    return next(k for name in KERNELS if not isinstance(k := bind(bench, name, spec_of(shape, _DTYPE)), str))


def _disturb(name: str, prepare: Prepare, scale: InterferenceScale, bench: Bench, report: Reporter) -> None:
    shape = Shape(scale.shape.name, 1, scale.shape.n_q_heads, scale.shape.n_kv_heads, scale.shape.head_dim)
    kernel = _kernel(bench, shape)
    lengths = [scale.kernel_context] * scale.kernel_batch
    with mapped(
        bench,
        shape,
        "per_layer",
        lengths,
        dtype=_DTYPE,
        page_bytes=bench.granularity_bytes,
        span_tokens=max(scale.kernel_context, scale.churn_tokens) + kernel.slack_tokens,
        slack_tokens=kernel.slack_tokens,
        n_slots=scale.kernel_batch + 1,
    ) as sequences:
        sequences.fill(0, poison=False)
        store = sequences.store(0)
        batch = store.batch([1] * scale.kernel_batch)
        query = torch.randn(scale.kernel_batch, shape.n_q_heads, shape.head_dim, device=bench.device).to(_DTYPE)
        call = partial(kernel, query, store.kv, batch)
        expected = call().clone()
        bench.clock.back_to_back(call, 20)
        raw = Raw(bench.cuda)
        quiet_ms: float | None = None
        with prepare(bench, sequences.cache, scale) as work:
            for mode in (QUIET, name, QUIET, name):
                disturber = Disturber(work, DriverCalls(raw))
                with disturber if mode != QUIET else nullcontext():
                    series = bench.clock.back_to_back(call, scale.n_kernels)
                times = series.times_ms
                quiet_ms = statistics.median(times) if quiet_ms is None else quiet_ms
                row: Row = {"case": mode, "kernel": kernel.name, "n": len(times), **summary(times)}
                row |= {"p50 / quiet": statistics.median(times) / quiet_ms, "histogram": histogram(times, quiet_ms)}
                row |= describe_calls(series, disturber.calls) if mode != QUIET else {}
                outcome = "results unchanged" if torch.equal(call(), expected) else "RESULTS CHANGED"
                row["error"] = disturber.error
                row["outcome"] = f"raised {disturber.error}" if disturber.error else outcome
                report.row(KERNEL_TIMES, row, timed=_TIMED)
        del store, call


def describe_calls(series: Series, calls: DriverCalls) -> Row:
    """How much went on beside a series of kernels, and the kernels' times by whether it went on beside them."""
    ends = list(accumulate(series.times_ms, initial=0.0))
    began, ended = series.began_s, series.began_s + ends[-1] / 1e3
    beside = [(max(a, began), min(b, ended)) for a, b in calls.spans if b > began and a < ended]
    seconds = ended - began
    row: Row = {
        "driver calls": len(calls.spans),
        "driver calls/s": len(beside) / seconds,
        "pages/s": calls.n_pages * len(beside) / max(1, len(calls.spans)) / seconds,
        "share of time in driver calls": sum(b - a for a, b in beside) / seconds,
    }
    with_calls, without = split_times(series, beside)
    for words, times in (("calls", with_calls), ("none", without)):
        spread = summary(times) if times else {}
        row |= {f"n beside {words}": len(times)}
        row |= {f"{p} beside {words}": spread.get(p) for p in ("p50_ms", "p99_ms")}
    if with_calls and without:
        row["beside calls / beside none"] = statistics.median(with_calls) / statistics.median(without)
    return row


def split_times(series: Series, spans: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Split times into those during which one of the spans was under way, and the others.

    Args:
        series: Kernels.
        spans: Begin and end of driver calls, in order, none inside another.
    """
    overlapped: list[float] = []
    alone: list[float] = []
    marks = [series.began_s + ms / 1e3 for ms in accumulate(series.times_ms, initial=0.0)]
    first = 0
    for (begin, end), milliseconds in zip(pairwise(marks), series.times_ms, strict=True):
        while first < len(spans) and spans[first][1] <= begin:
            first += 1
        is_beside = first < len(spans) and spans[first][0] < end
        (overlapped if is_beside else alone).append(milliseconds)
    return overlapped, alone


class Disturber:
    """A thread that makes bursts of driver calls as long as the context lasts, and rests as long between them.

    The context begins behind the first burst, so that there is none without.

    Args:
        work: One burst. It is called in the thread.
        calls: What it makes its calls with.
    """

    def __init__(self, work: Work, calls: DriverCalls) -> None:
        self.calls = calls
        self.n_done = 0
        """Bursts that ended well."""
        self.error: str | None = None
        """What ended the thread early."""
        self._work = work
        self._stop, self._is_through = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="disturber", daemon=True)
        self._context = calls.raw.must(calls.raw.cuda.cuCtxGetCurrent())

    def __enter__(self) -> Disturber:
        self._thread.start()
        self._is_through.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self.calls.raw.must(self.calls.raw.cuda.cuCtxSetCurrent(self._context))
            while not self._stop.is_set():
                began = time.perf_counter()
                self._work(self.calls)
                self.n_done += 1
                self._is_through.set()
                self._stop.wait(time.perf_counter() - began)
        except Exception as error:  # nobody else would hear of it
            self.error = f"{type(error).__name__}: {error}"[:300]
            self._is_through.set()


class _Range(NamedTuple):
    """Addresses that nobody uses, and as many pages for them."""

    base: int
    page_bytes: int
    handles: list[int]


def _edit(where: _Range, calls: DriverCalls, during: Callable[[], None] = lambda: None) -> None:
    """Map all pages of a range one by one, give access in one call, and unmap them in one."""
    raw, n_bytes = calls.raw, len(where.handles) * where.page_bytes
    for index, handle in enumerate(where.handles):
        calls.call(raw.map, where.base + index * where.page_bytes, where.page_bytes, handle)
    calls.call(raw.set_access, where.base, n_bytes)
    calls.n_pages += len(where.handles)
    during()
    calls.call(raw.unmap, where.base, n_bytes)


@contextmanager
def _pages(raw: Raw, n_pages: int) -> Iterator[list[int]]:
    handles = [int(raw.must(raw.create(raw.granularity_bytes))) for _ in range(n_pages)]
    yield handles
    for handle in handles:
        raw.must(raw.release(handle))


def _n_pages(cache: KVCache, scale: InterferenceScale) -> int:
    return -(-scale.churn_tokens * cache.layout.planes[0].token_bytes // cache.layout.page_bytes)


@contextmanager
def _idle_slot(bench: Bench, cache: KVCache, scale: InterferenceScale) -> Iterator[_Range]:
    """The first plane of a slot that no sequence has, between the slots that kernels read."""
    plane, active = cache.layout.planes[0], set(cache.active_slots())
    slot = next(index for index in range(cache.layout.n_slots) if index not in active)
    base = cache.region.reservation.base + plane.base_bytes + slot * plane.span_bytes
    with _pages(raw := Raw(bench.cuda), _n_pages(cache, scale)) as handles:
        yield _Range(base, raw.granularity_bytes, handles)


@contextmanager
def _edit_here(bench: Bench, cache: KVCache, scale: InterferenceScale) -> Iterator[Work]:
    with _idle_slot(bench, cache, scale) as where:
        yield partial(_edit, where)


@contextmanager
def _edit_elsewhere(bench: Bench, cache: KVCache, scale: InterferenceScale) -> Iterator[Work]:
    raw = Raw(bench.cuda)
    with _pages(raw, _n_pages(cache, scale)) as handles:
        n_bytes = len(handles) * raw.granularity_bytes
        base = int(raw.must(raw.reserve(n_bytes)))
        yield partial(_edit, _Range(base, raw.granularity_bytes, handles))
        raw.must(raw.free(base, n_bytes))


@contextmanager
def _create_and_release(bench: Bench, cache: KVCache, scale: InterferenceScale) -> Iterator[Work]:
    n_pages = _n_pages(cache, scale)

    def work(calls: DriverCalls) -> None:
        raw = calls.raw
        handles = [int(calls.call(raw.create, raw.granularity_bytes)) for _ in range(n_pages)]
        calls.n_pages += n_pages
        for handle in handles:
            calls.call(raw.release, handle)

    yield work


@contextmanager
def _edit_and_fill(bench: Bench, cache: KVCache, scale: InterferenceScale) -> Iterator[Work]:
    """As in an idle slot, and what was mapped is filled on a stream of its own before it is unmapped."""
    raw = Raw(bench.cuda)
    stream = raw.must(raw.cuda.cuStreamCreate(raw.cuda.CUstream_flags.CU_STREAM_NON_BLOCKING))
    with _idle_slot(bench, cache, scale) as where:

        def work(calls: DriverCalls) -> None:
            def fill() -> None:
                n_bytes = len(where.handles) * where.page_bytes
                calls.call(raw.cuda.cuMemsetD8Async, where.base, 0, n_bytes, stream)
                raw.must(raw.cuda.cuStreamSynchronize(stream))  # it waits for the device: no call of the driver's lock

            _edit(where, calls, fill)

        yield work
    raw.must(raw.cuda.cuStreamDestroy(stream))


class _Turn(NamedTuple):
    """The steps of one mode, once."""

    times_ms: list[float]
    n_pages: int  # mapped meanwhile, those ahead of the first step included
    n_pages_in_steps: int  # of them, mapped by the steps themselves
    n_skipped: int  # requests of the premapper without room
    error: str | None  # of the premapper


def _decode(scale: InterferenceScale, bench: Bench, report: Reporter) -> None:
    """Time whole steps (grow, write K and V of the new token, attend, in every layer), in turns of each way to grow."""
    shape = scale.shape
    kernel = _kernel(bench, shape)
    layer = LayerSpec.uniform(shape.n_kv_heads, shape.head_dim, _DTYPE.itemsize)
    page_bytes = bench.granularity_bytes
    per_page = page_bytes // layer.key.token_bytes
    # Sequences outgrow their pages one after another, evenly spread over the steps.
    first_lengths = [scale.decode_context + i * per_page // scale.decode_batch for i in range(scale.decode_batch)]
    longest = max(first_lengths) + scale.n_steps + scale.premap_tokens + kernel.slack_tokens + per_page
    layout = Layout.build(
        "per_layer",
        [layer] * scale.decode_layers,
        n_slots=scale.decode_batch,
        max_tokens=longest,
        page_bytes=page_bytes,
    )
    cache = KVCache(bench.pool(page_bytes), layout)
    tensors = RegionTensors(cache, lambda: None)
    decoder = _Decoder(bench, shape, kernel, cache, [tensors.layer(i, _DTYPE) for i in range(scale.decode_layers)])
    turns: dict[str, list[_Turn]] = {mode: [] for mode in MODES}
    for turn in range(-1, scale.n_turns):  # the first turn does not count
        shift = turn % len(MODES)
        for mode in MODES[shift:] + MODES[:shift]:
            taken = _take_turn(mode, decoder, cache, first_lengths, scale, kernel.slack_tokens, bench)
            if turn >= 0:
                turns[mode].append(taken)
    noise = abs(statistics.median(ratios_of_turns(turns[AGAIN], turns[QUIET])) - 1)
    for mode, taken_turns in turns.items():
        times = [ms for taken in taken_turns for ms in taken.times_ms]
        ratios = ratios_of_turns(taken_turns, turns[QUIET])
        last = taken_turns[-1]
        row: Row = {"case": mode, "kernel": kernel.name, "n": len(times), **summary(times)}
        row |= {"median turn / none": statistics.median(ratios), "turns / none": ratios}
        row["within 1 %"] = judge(statistics.median(ratios), noise)
        row |= {"pages per turn": last.n_pages, "pages mapped in the step": last.n_pages_in_steps}
        row |= {"n_skipped": sum(taken.n_skipped for taken in taken_turns)}
        row["error"] = next((taken.error for taken in taken_turns if taken.error), None)
        row["outcome"] = f"raised {row['error']}" if row["error"] else "ok"
        report.row(STEPS, row, timed=_TIMED_STEPS)
    decoder.stores.clear()
    if not tensors.let_go():
        raise RuntimeError("tensors look into the cache still")
    cache.close()


def ratios_of_turns(turns: Sequence[_Turn], quiet: Sequence[_Turn]) -> list[float]:
    """The mean step of each turn, in mean steps without growth of the same turn."""
    return [statistics.mean(a.times_ms) / statistics.mean(b.times_ms) for a, b in zip(turns, quiet, strict=True)]


def judge(ratio: float, noise: float) -> str:
    """Say whether a ratio is within the target; where the same thing, measured again, is not, nobody can tell."""
    if noise > TARGET:
        return "unclear"
    return "yes" if ratio <= 1 + TARGET else "no"


def _take_turn(
    mode: str,
    decoder: _Decoder,
    cache: KVCache,
    first_lengths: Sequence[int],
    scale: InterferenceScale,
    slack_tokens: int,
    bench: Bench,
) -> _Turn:
    n_ahead = scale.n_steps if mode in (QUIET, AGAIN) else 0
    with _started(cache, first_lengths, n_ahead, slack_tokens):
        if mode == NEW_PAGES:
            cache.pool.trim()  # what the steps map has to be created first
        n_before = cache.stats().n_live_pages
        premapper = Premapper(cache, scale.premap_tokens)
        is_ahead = mode == PREMAPPED
        with premapper if is_ahead else nullcontext():
            if is_ahead:
                premapper.request(dict(zip(cache.active_slots(), first_lengths, strict=True)))
                premapper.wait_idle()
            times = decoder.run(first_lengths, scale.n_steps, premapper if is_ahead else None)
            premapper.wait_idle()
        n_pages = cache.stats().n_live_pages - n_before
        bench.clock.synchronize()
    error = repr(premapper.error) if premapper.error else None
    return _Turn(times, n_pages, n_pages - premapper.n_pages, premapper.n_skipped, error)


@contextmanager
def _started(cache: KVCache, lengths: Sequence[int], n_ahead: int, slack_tokens: int) -> Iterator[None]:
    """Sequences of these lengths with room for `n_ahead` tokens more; afterwards nothing is mapped."""
    slots = cache.acquire_adjacent(len(lengths))
    extra = n_ahead + slack_tokens
    cache.ensure({slot: n + extra for slot, n in zip(slots, lengths, strict=True)})
    cache.ensure(dict(zip(slots, lengths, strict=True)))
    yield
    cache.retire(slots)
    cache.settle()
    cache.reclaim(1 << 30)


class _Decoder:
    """Runs decode steps without a model: K and V of the new token, then attention, layer by layer."""

    def __init__(
        self, bench: Bench, shape: Shape, kernel: BoundKernel, cache: KVCache, layers: Sequence[SlotKV]
    ) -> None:
        self.stores = list(layers)
        self._bench = bench
        self._kernel = kernel
        self._cache = cache
        self._shape = shape

    def run(self, first_lengths: Sequence[int], n_steps: int, premapper: Premapper | None) -> list[float]:
        """Return milliseconds of each step, with a wait for the device at its end as for reading the tokens."""
        shape, device, cache = self._shape, self._bench.device, self._cache
        slots, lengths, n = cache.active_slots(), list(first_lengths), len(first_lengths)
        query = torch.randn(n, shape.n_q_heads, shape.head_dim, device=device).to(_DTYPE)
        states = torch.randn(n, shape.n_kv_heads, shape.head_dim, device=device).to(_DTYPE)
        slack_tokens = self._kernel.slack_tokens
        times = []
        for _ in range(n_steps):
            began = time.perf_counter()
            lengths = [length + 1 for length in lengths]
            cache.ensure({slot: length + slack_tokens for slot, length in zip(slots, lengths, strict=True)})
            if premapper is not None:
                premapper.request(dict(zip(slots, lengths, strict=True)))
            kv = self.stores[0]
            starts = tuple(slot * kv.span_tokens for slot in slots)
            batch = Store(kv, starts, tuple(lengths)).batch([1] * n)
            rows = batch.slot_starts[:n].long() + batch.lengths - 1
            for kv in self.stores:
                kv.keys.index_copy_(0, rows, states)
                kv.values.index_copy_(0, rows, states)
                self._kernel(query, kv, batch)
            self._bench.clock.synchronize()
            times.append((time.perf_counter() - began) * 1e3)
        return times


def summary(times_ms: Sequence[float]) -> Row:
    """Percentiles."""
    ordered = sorted(times_ms)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return {
        "p50_ms": at(0.5),
        "p90_ms": at(0.9),
        "p99_ms": at(0.99),
        "max_ms": ordered[-1],
        "mean_ms": statistics.mean(ordered),
    }


def histogram(times_ms: Sequence[float], unit_ms: float) -> dict[str, int]:
    """Count times by how many times `unit_ms` they took."""
    counts = dict.fromkeys([*(f"< {edge:g}" for edge in _EDGES), f">= {_EDGES[-1]:g}"], 0)
    for milliseconds in times_ms:
        edge = next((e for e in _EDGES if milliseconds < e * unit_ms), None)
        counts[f">= {_EDGES[-1]:g}" if edge is None else f"< {edge:g}"] += 1
    return counts
