"""Part 4: what kernels feel of driver calls on other ranges, and what growth costs a decode step.

Kernels run back to back on one set of slots while a thread works on others. Times are from the end of one kernel to the
end of the next, so that a launch which the driver's lock holds up shows as well.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.cases import Case, Reporter, Row
from benchmarks.gpu.plan import DISTURBANCES, KERNELS, InterferenceScale, Plan, Shape
from benchmarks.gpu.sequences import Store, bind, mapped, spec_of
from vmem_kv.attention.base import BoundKernel
from vmem_kv.cache import KVCache
from vmem_kv.driver.base import Handle
from vmem_kv.layout import LayerSpec, Layout
from vmem_kv.premap import Premapper
from vmem_kv.tensors import RegionTensors, SlotKV

KERNEL_TIMES = "kernel times beside driver calls"
STEPS = "decode steps by how sequences grow"
QUIET = "none"
TARGET = 0.01
"""How much slower than steps without growth those with premapped growth may be."""
_DTYPE = torch.bfloat16
_EDGES = (1.01, 1.05, 1.1, 1.5, 2.0, 10.0)
_TIMED = ("p50_ms", "p90_ms", "p99_ms", "max_ms", "mean_ms", "p50 / quiet", "histogram", "disturbances")
_TIMED_STEPS = ("p50_ms", "p90_ms", "p99_ms", "max_ms", "mean_ms", "mean / none", "within 1 %")

Work = Callable[[], None]


def cases(plan: Plan) -> Sequence[Case]:
    """All cases, by worth. What edits mappings beside running kernels may lose the device."""
    scale = plan.interference
    makers = dict(zip(DISTURBANCES, (_churn_here, _churn_elsewhere, _create_and_release), strict=True))
    found = [
        Case(
            f"kernels beside: {name}",
            partial(_disturb, name, makers[name], scale),
            cost_s=8,
            timeout_s=60,
            is_dangerous=True,
            table=KERNEL_TIMES,
        )
        for name in scale.disturbances
    ]
    found.insert(1, Case("decode steps", partial(_decode, scale), cost_s=16, timeout_s=90, table=STEPS))
    return found


def _kernel(bench: Bench, shape: Shape) -> BoundKernel:
    """The first kernel that is here."""
    return next(k for name in KERNELS if not isinstance(k := bind(bench, name, spec_of(shape, _DTYPE)), str))


def _disturb(
    name: str,
    make: Callable[[Bench, KVCache, InterferenceScale], Work],
    scale: InterferenceScale,
    bench: Bench,
    report: Reporter,
) -> None:
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
        n_slots=scale.kernel_batch + 4,
    ) as sequences:
        sequences.fill(0, poison=False)
        store = sequences.store(0)
        batch = store.batch([1] * scale.kernel_batch)
        query = torch.randn(scale.kernel_batch, shape.n_q_heads, shape.head_dim, device=bench.device).to(_DTYPE)
        call = partial(kernel, query, store.kv, batch)
        expected = call().clone()
        bench.clock.back_to_back(call, 20)
        work = make(bench, sequences.cache, scale)
        quiet_ms: float | None = None
        for mode in (QUIET, name, QUIET, name):
            disturber = Disturber(work)
            with disturber if mode != QUIET else nullcontext():
                times = bench.clock.back_to_back(call, scale.n_kernels)
            quiet_ms = statistics.median(times) if quiet_ms is None else quiet_ms
            row: Row = {"case": mode, "kernel": kernel.name, "n": len(times), **summary(times)}
            row |= {"p50 / quiet": statistics.median(times) / quiet_ms, "histogram": histogram(times, quiet_ms)}
            row |= {"disturbances": disturber.n_done, "error": disturber.error}
            row["outcome"] = "results unchanged" if torch.equal(call(), expected) else "RESULTS CHANGED"
            report.row(KERNEL_TIMES, row, timed=_TIMED)
        del store, call


class Disturber:
    """A thread that does something again and again as long as the context lasts.

    Args:
        work: What to do. It is called in the thread; the first call may take its time to get ready.
    """

    def __init__(self, work: Work) -> None:
        self.n_done = 0
        """Calls that returned."""
        self.error: str | None = None
        """What ended the thread early."""
        self._work = work
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="disturber", daemon=True)

    def __enter__(self) -> Disturber:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._work()
                self.n_done += 1
        except Exception as error:  # nobody else would hear of it
            self.error = f"{type(error).__name__}: {error}"[:300]


def _churn(cache: KVCache, n_tokens: int) -> Work:
    """Give a sequence pages and take them back. Idle slots of the cache are used, one at a time."""

    def work() -> None:
        cache.pool.driver.bind_thread()
        slot = cache.acquire()
        try:
            cache.ensure({slot: n_tokens})
        finally:
            cache.retire(slot)
            cache.settle()
            cache.reclaim(1 << 30)

    return work


def _churn_here(bench: Bench, cache: KVCache, scale: InterferenceScale) -> Work:
    return _churn(cache, scale.churn_tokens)


def _churn_elsewhere(bench: Bench, cache: KVCache, scale: InterferenceScale) -> Work:
    other = KVCache(cache.pool, Layout.build("per_layer", cache.layout.layers, **_size(cache, scale)))
    return _churn(other, scale.churn_tokens)


def _size(cache: KVCache, scale: InterferenceScale) -> dict[str, int]:
    return {"n_slots": 2, "max_tokens": scale.churn_tokens, "page_bytes": cache.layout.page_bytes}


def _create_and_release(bench: Bench, cache: KVCache, scale: InterferenceScale) -> Work:
    driver, page_bytes = bench.driver, cache.layout.page_bytes
    n_pages = cache.layout.n_pages(scale.churn_tokens)

    def work() -> None:
        driver.bind_thread()
        pages: list[Handle] = []
        driver.create(page_bytes, [0] * n_pages, pages)
        driver.release(page_bytes, pages)

    return work


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
    times: dict[str, list[float]] = {QUIET: [], "premapped": [], "synchronous": []}
    n_pages: dict[str, int] = {}
    modes = list(times)
    errors: dict[str, str | None] = {}
    for turn in range(-1, scale.n_turns):  # the first turn does not count
        for mode in modes[turn % 3 :] + modes[: turn % 3]:
            with _started(cache, first_lengths, scale.n_steps if mode == QUIET else 0, kernel.slack_tokens):
                n_before = cache.stats().n_live_pages
                premapper = Premapper(cache, scale.premap_tokens)
                with premapper if mode == "premapped" else nullcontext():
                    if mode == "premapped":
                        premapper.request(dict(zip(cache.active_slots(), first_lengths, strict=True)))
                        premapper.wait_idle()
                    taken = decoder.run(first_lengths, scale.n_steps, premapper if mode == "premapped" else None)
                n_pages[mode] = cache.stats().n_live_pages - n_before
                errors[mode] = repr(premapper.error) if premapper.error else None
                bench.clock.synchronize()
            if turn >= 0:
                times[mode] += taken
    mean_none = statistics.mean(times[QUIET])
    for mode, taken in times.items():
        row: Row = {"case": mode, "kernel": kernel.name, "n": len(taken), "pages per turn": n_pages[mode]}
        ratio = statistics.mean(taken) / mean_none
        row |= {**summary(taken), "mean / none": ratio, "within 1 %": "yes" if ratio <= 1 + TARGET else "no"}
        row["error"] = errors[mode]
        report.row(STEPS, row, timed=_TIMED_STEPS)
    decoder.stores.clear()
    if not tensors.let_go():
        raise RuntimeError("tensors look into the cache still")
    cache.close()


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
