"""Part 2: whether kernels compute the right thing over demand-mapped memory, and touch nothing else.

Every sequence is followed by an unmapped page, and mapped rows that are nobody's hold NaN.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.cases import FAULT, NEEDS_GPU, OK, WRONG, Case, Reporter, Row
from benchmarks.gpu.plan import KERNELS, CorrectnessScale, Plan, Shape
from benchmarks.gpu.sequences import DTYPES, Store, bind, mapped, plain, reference, relative_error, spec_of
from benchmarks.gpu.tags import TagChurn
from vmem_kv.attention.base import BoundKernel
from vmem_kv.config import CacheConfig
from vmem_kv.driver.base import Handle
from vmem_kv.layout import LayerSpec, Layout
from vmem_kv.storage import open_storage
from vmem_kv.tensors import SlotKV
from vmem_kv.testing.conformance import ContractBreach, check_driver
from vmem_kv.units import ceil_div

WITH_SLACK = ("fa3",)
"""Those that declare slack, without which they are expected to fault."""
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}
"""Greatest relative error to float64: what rounding to the type gives, with room; anything wrong is far above it."""
NUMERICS = "kernels against float64"
OVERREAD = "kernels with nothing mapped behind the last token"
MEMORY = "memory under kernels"
CONTRACT = "the driver's contract"
_SPAN_PAGES = 4


class Mix(NamedTuple):
    """A batch: lengths, and how many new tokens each sequence brings."""

    name: str
    lengths: list[int]
    n_queries: list[int]


def cases(plan: Plan) -> Sequence[Case]:
    """All cases, by worth."""
    scale, costs = plan.correctness, plan.costs
    # A faulting kernel costs a process and no more, so none of these needs one of its own.
    numerics = [
        Case(
            f"{kernel}, {shape.name}, {dtype}, {layout}",
            partial(_check_kernel, kernel, shape, dtype, layout),
            cost_s=costs.numerics,
            table=NUMERICS,
        )
        for shape in scale.shapes
        for dtype in scale.dtypes
        for layout in scale.layouts
        for kernel in scale.kernels
    ]
    n_first = len(scale.layouts) * len(scale.kernels)
    shape, dtype = scale.shapes[0], scale.dtypes[0]
    memory = [
        Case("aliased prefix", partial(_check_aliases, shape, dtype), costs.memory, table=MEMORY),
        Case("remap under a replayed graph", partial(_check_graph, shape, dtype), costs.memory, table=MEMORY),
        Case("contents of pages", _check_contents, costs.memory, table=MEMORY),
        Case("tags under churn", partial(_check_tags, scale), costs.tags, 90, table=MEMORY),
    ]
    apart = [
        Case(
            f"{kernel} without its slack",
            partial(_check_overread, kernel, shape, dtype),
            cost_s=costs.dangerous,
            is_dangerous=True,
            table=OVERREAD,
            context={"expected": FAULT if kernel in WITH_SLACK else "no fault"},
        )
        for kernel in scale.kernels
    ]
    apart.append(Case("driver contract", _check_driver, cost_s=costs.contract, is_dangerous=True, table=CONTRACT))
    listed = Case("kernels", partial(_list_kernels, scale))
    return [listed, *numerics[:n_first], *memory, *apart, *numerics[n_first:]]


def _check_driver(bench: Bench, report: Reporter) -> None:
    """Hold vmem_kv's driver against every rule of its contract, on this device."""
    device, config = bench.device, CacheConfig()
    try:
        held = check_driver(lambda: bench.opener(device, config))
    except ContractBreach as breach:
        report.row(CONTRACT, {"case": "driver contract", "outcome": f"{WRONG}: {breach}"})
        return
    row: Row = {"case": "driver contract", "driver": held.driver, "rules": len(held.rules), "checks": held.n_checks}
    report.row(CONTRACT, {**row, "outcome": OK})


def _list_kernels(scale: CorrectnessScale, bench: Bench, report: Reporter) -> None:
    spec = spec_of(scale.shapes[0], DTYPES[scale.dtypes[0]])
    for kernel in bench.kernels:
        is_available, why = (lambda found: (found.is_available, found.why))(kernel.availability(bench.device))
        row = {"kernel": kernel.name, "available": is_available, "why": why, "slack_tokens": kernel.slack_tokens(spec)}
        report.row("kernels", row)


def mixes(scale: CorrectnessScale, tokens_per_page: int, slack_tokens: int) -> list[Mix]:
    """The batches to try, by where a layout's pages end."""
    edges = [max(1, tokens_per_page + d) for d in (-1, 0, 1)] + [2 * tokens_per_page]
    # With its slack, the last token that is mapped is the last one of a page.
    full = [n for n in (tokens_per_page - slack_tokens, 2 * tokens_per_page - slack_tokens) if n > 0 and slack_tokens]
    lengths = [*edges, *full, *scale.lengths]
    prefill = [n for n in lengths if n <= scale.prefill_tokens] or [min(lengths)]
    ragged = [1 if i % 3 else min(n, scale.prefill_tokens) for i, n in enumerate(lengths)]
    return [
        Mix("decode", lengths, [1] * len(lengths)),
        Mix("decode, equal lengths", [2 * tokens_per_page] * 4, [1] * 4),
        Mix("prefill", prefill, list(prefill)),
        Mix("chunked prefill and decode, ragged", lengths, ragged),
        # Whole prompts that end around the end of a page, where pages are short enough for a reference in float64.
        *(
            [Mix("prefill up to the ends of pages", edges, list(edges))]
            if edges[-1] <= scale.edge_prefill_tokens
            else []
        ),
    ]


def _tokens_per_page(shape: Shape, kind: str, dtype: torch.dtype, page_bytes: int) -> int:
    layer = LayerSpec.uniform(shape.n_kv_heads, shape.head_dim, dtype.itemsize)
    layout = Layout.build(kind, [layer] * shape.n_layers, n_slots=1, max_tokens=1, page_bytes=page_bytes)
    return page_bytes // layout.planes[0].token_bytes


def _check_kernel(name: str, shape: Shape, dtype_name: str, kind: str, bench: Bench, report: Reporter) -> None:
    dtype = DTYPES[dtype_name]
    where: Row = {"case": name, "shape": shape.name, "dtype": dtype_name, "layout": kind}
    kernel = bind(bench, name, spec_of(shape, dtype))
    if isinstance(kernel, str):
        report.row(NUMERICS, {**where, "outcome": f"not here: {kernel}"})
        return
    page_bytes = bench.granularity_bytes
    tokens_per_page = _tokens_per_page(shape, kind, dtype, page_bytes)
    for mix in mixes(bench.plan.correctness, tokens_per_page, kernel.slack_tokens):
        error, n_behind = _run_mix(kernel, shape, dtype, kind, mix, tokens_per_page, page_bytes, bench)
        tolerance = TOLERANCE[dtype_name]
        row = {**where, "batch": mix.name, "n_sequences": len(mix.lengths), "relative_error": error}
        row |= {"allowed": tolerance, "mapped rows of nobody": n_behind}
        report.row(NUMERICS, {**row, "outcome": OK if error < tolerance else WRONG})


def _run_mix(
    kernel: BoundKernel,
    shape: Shape,
    dtype: torch.dtype,
    kind: str,
    mix: Mix,
    tokens_per_page: int,
    page_bytes: int,
    bench: Bench,
) -> tuple[float, int]:
    """Return the error of one batch, and how many rows that are nobody's were mapped behind the sequences."""
    layer = shape.n_layers - 1
    span_tokens = max(max(mix.lengths) + kernel.slack_tokens, tokens_per_page) + _SPAN_PAGES * tokens_per_page
    with mapped(
        bench,
        shape,
        kind,
        mix.lengths,
        dtype=dtype,
        page_bytes=page_bytes,
        span_tokens=span_tokens,
        slack_tokens=kernel.slack_tokens,
    ) as sequences:
        sequences.fill(layer)
        capacities = sequences.tokens_mapped()
        if not all(capacity < span_tokens for capacity in capacities):
            raise AssertionError("a sequence is not followed by unmapped memory")
        query = torch.randn(sum(mix.n_queries), shape.n_q_heads, shape.head_dim, device=bench.device).to(dtype)
        store = sequences.store(layer)
        output = kernel(query, store.kv, store.batch(mix.n_queries))
        error = relative_error(output, reference(query, store, mix.n_queries))
        n_behind = sum(capacities) - sum(mix.lengths) - kernel.slack_tokens * len(mix.lengths)
        del store
    return error, n_behind


def _check_overread(name: str, shape: Shape, dtype_name: str, bench: Bench, report: Reporter) -> None:
    """Map exactly the tokens, which end at a page's edge, and no slack: a kernel that declares slack should fault."""
    dtype, page_bytes = DTYPES[dtype_name], bench.granularity_bytes
    kernel = bind(bench, name, spec_of(shape, dtype))
    if isinstance(kernel, str):
        report.row(OVERREAD, {"case": f"{name} without its slack", "outcome": f"not here: {kernel}"})
        return
    per_page = _tokens_per_page(shape, "per_layer", dtype, page_bytes)
    # The first is shorter than the last: what bounds loads by the batch's longest sequence must not hide it.
    lengths = [per_page, 2 * per_page, 3 * per_page]
    with mapped(
        bench, shape, "per_layer", lengths, dtype=dtype, page_bytes=page_bytes, span_tokens=8 * per_page
    ) as sequences:
        sequences.fill(0)
        if sequences.tokens_mapped() != lengths:
            raise AssertionError("more is mapped than the tokens")
        expected = FAULT if kernel.slack_tokens else "no fault"
        store = sequences.store(0)
        for n_queries in ([1, 1, 1], [40, 1, 17]):
            query = torch.randn(sum(n_queries), shape.n_q_heads, shape.head_dim, device=bench.device).to(dtype)
            output = kernel(query, store.kv, store.batch(n_queries))
            error = relative_error(output, reference(query, store, n_queries))
            row = {"case": f"{name} without its slack", "new tokens": n_queries, "declared slack": kernel.slack_tokens}
            outcome = "no fault" if error < TOLERANCE[dtype_name] else WRONG
            report.row(OVERREAD, {**row, "expected": expected, "outcome": outcome, "relative_error": error})
        del store


def _check_aliases(shape: Shape, dtype_name: str, bench: Bench, report: Reporter) -> None:
    """Two slots whose first pages are the same pages: both read the prefix that was written through one of them."""
    dtype, page_bytes, driver = DTYPES[dtype_name], bench.granularity_bytes, bench.driver
    n_prefix_pages = 2
    layer = LayerSpec.uniform(shape.n_kv_heads, shape.head_dim, dtype.itemsize)
    per_page = page_bytes // layer.key.token_bytes
    layout = Layout.build("per_layer", [layer], n_slots=2, max_tokens=6 * per_page, page_bytes=page_bytes)
    span_tokens = layout.keys[0].slot_bytes // layout.keys[0].token_bytes
    reservation = driver.reserve(layout.virtual_bytes)
    handles: list[Handle] = []
    driver.create(page_bytes, [0] * (len(layout.planes) * (n_prefix_pages + 2)), handles)
    taken = iter(handles)
    runs = []
    for plane in layout.planes:
        prefix = [next(taken) for _ in range(n_prefix_pages)]
        for slot in range(2):
            base = reservation.base + plane.base_bytes + slot * plane.span_bytes
            pages = [*prefix, next(taken)]
            driver.map(page_bytes, [base + i * page_bytes for i in range(len(pages))], pages)
            runs.append((base, len(pages) * page_bytes))
    driver.set_access(runs)

    storage = open_storage(reservation.base, reservation.n_bytes, bench.device)
    everything = torch.empty(0, dtype=dtype, device=bench.device).set_(storage)
    keys, values = (
        everything.as_strided(
            (2 * span_tokens, shape.n_kv_heads, shape.head_dim),
            (shape.n_kv_heads * shape.head_dim, shape.head_dim, 1),
            strides.offset_bytes // dtype.itemsize,
        )
        for strides in (layout.keys[0], layout.values[0])
    )
    n_prefix, tails = n_prefix_pages * per_page, (37, per_page)
    lengths = tuple(n_prefix + tail for tail in tails)
    own = plain(bench, shape, lengths, dtype)  # what each sequence should hold, in memory of its own
    for rows, right in ((keys, own.kv.keys), (values, own.kv.values)):
        right[own.kv.span_tokens : own.kv.span_tokens + n_prefix] = right[:n_prefix]
        rows[:n_prefix] = right[:n_prefix]  # through the first slot only
        for slot, length in enumerate(lengths):
            first, target = slot * own.kv.span_tokens, slot * span_tokens
            rows[target + n_prefix : target + length] = right[first + n_prefix : first + length]
    store = Store(SlotKV(keys, values, span_tokens), (0, span_tokens), lengths)
    for name in KERNELS:
        kernel = bind(bench, name, spec_of(shape, dtype))
        if isinstance(kernel, str) or kernel.slack_tokens > per_page - tails[0]:
            continue
        if kernel.slack_tokens:
            continue  # the second sequence ends with its page
        for n_queries in ([1, 1], [33, 1]):
            query = torch.randn(sum(n_queries), shape.n_q_heads, shape.head_dim, device=bench.device).to(dtype)
            error = relative_error(kernel(query, store.kv, store.batch(n_queries)), reference(query, own, n_queries))
            row: Row = {"case": f"aliased prefix, {name}, new tokens {n_queries}", "relative_error": error}
            report.row(MEMORY, {**row, "outcome": OK if error < TOLERANCE[dtype_name] else WRONG})
    bench.clock.synchronize()
    driver.unmap(runs)
    driver.release(page_bytes, handles)
    driver.free_reservation(reservation)


def _check_graph(shape: Shape, dtype_name: str, bench: Bench, report: Reporter) -> None:
    """Capture a kernel, exchange the pages under it, replay: it must read the new ones."""
    name = "remap under a replayed graph"
    capture = bench.capture
    if capture is None:
        report.row(MEMORY, {"case": name, "outcome": NEEDS_GPU})
        return
    dtype, page_bytes, driver = DTYPES[dtype_name], bench.granularity_bytes, bench.driver
    kernel = next(
        (k for n in KERNELS if not isinstance(k := bind(bench, n, spec_of(shape, dtype)), str) and not k.slack_tokens),
        None,
    )
    if kernel is None:
        report.row(MEMORY, {"case": name, "outcome": "no kernel without slack here"})
        return
    per_page = _tokens_per_page(shape, "per_layer", dtype, page_bytes)
    length = 2 * per_page - 5
    with mapped(
        bench, shape, "per_layer", [length], dtype=dtype, page_bytes=page_bytes, span_tokens=8 * per_page
    ) as sequences:
        sequences.fill(0)
        store = sequences.store(0)
        batch = store.batch([1])
        query = torch.randn(1, shape.n_q_heads, shape.head_dim, device=bench.device).to(dtype)
        output, replay = capture(partial(kernel, query, store.kv, batch))
        replay()
        first = output.clone()
        error_before = relative_error(first, reference(query, store, [1]))
        bench.clock.synchronize()

        region, layout = sequences.cache.region, sequences.cache.layout
        old: list[tuple[int, list[Handle]]] = []
        for plane, handles in zip(layout.planes, region.table.handles[sequences.slots[0]], strict=True):
            old.append((region.reservation.base + plane.base_bytes + sequences.slots[0] * plane.span_bytes, handles))
        spans = [(base, len(handles) * page_bytes) for base, handles in old]
        new: list[Handle] = []
        driver.create(page_bytes, [0] * sum(len(handles) for _, handles in old), new)

        def exchange(pages: list[Handle]) -> None:
            driver.unmap(spans)
            left = list(pages)
            for base, handles in old:
                driver.map(page_bytes, [base + i * page_bytes for i in range(len(handles))], left[: len(handles)])
                del left[: len(handles)]
            driver.set_access(spans)

        exchange(new)
        sequences.fill(0)
        replay()
        error_after = relative_error(output, reference(query, store, [1]))
        is_new = not torch.equal(first, output)
        bench.clock.synchronize()
        exchange([handle for _, handles in old for handle in handles])
        replay()
        bench.clock.synchronize()
        is_back = torch.equal(first, output)
        driver.release(page_bytes, new)
        tolerance = TOLERANCE[dtype_name]
        is_right = error_before < tolerance and error_after < tolerance and is_new and is_back
        row: Row = {"case": f"{name}, {kernel.name}", "relative_error": max(error_before, error_after)}
        report.row(MEMORY, {**row, "outcome": OK if is_right else WRONG})
        del store, output, replay


def _check_contents(bench: Bench, report: Reporter) -> None:
    """See what new sequences find in their pages: never what somebody else left there."""
    dtype, page_bytes = torch.float16, bench.granularity_bytes
    shape = Shape("one layer", 1, 8, 8, 64)
    per_page = _tokens_per_page(shape, "per_layer", dtype, page_bytes)
    pool = bench.pool(page_bytes)
    with mapped(
        bench, shape, "per_layer", [4 * per_page], dtype=dtype, page_bytes=page_bytes, span_tokens=8 * per_page
    ) as sequences:
        cache = sequences.cache

        def look(what: str) -> None:
            """Report whether the whole slot is zero, then dirty it."""
            kv = sequences.store(0).kv
            slot, n_pages = sequences.slots[0], ceil_div(4 * per_page, per_page)
            rows = [r.narrow(0, slot * kv.span_tokens, n_pages * per_page) for r in (kv.keys, kv.values)]
            n_dirty = sum(int(torch.count_nonzero(r)) for r in rows)
            report.row(MEMORY, {"case": what, "n": n_dirty, "outcome": OK if not n_dirty else WRONG})
            for r in rows:
                r.fill_(1.0)

        def begin(domain: str) -> None:
            bench.clock.synchronize()
            cache.retire(cache.active_slots())
            cache.settle()
            sequences.slots = [cache.acquire(domain=domain)]
            cache.ensure({sequences.slots[0]: 4 * per_page})

        look("values that are not zero in pages never used before")
        begin("another tenant")
        look("values left in a warm slot of another tenant")
        cache.retire(cache.active_slots())
        cache.settle()
        cache.reclaim(pool.max_pages)
        sequences.slots = [cache.acquire(domain="a third")]
        cache.ensure({sequences.slots[0]: 4 * per_page})
        look("values left in pages that were unmapped and reused")


def _check_tags(scale: CorrectnessScale, bench: Bench, report: Reporter) -> None:
    churn = TagChurn(bench, n_slots=scale.tag_slots, max_tokens=scale.tag_tokens, choices=random.Random(0))
    n_wrong = churn.run(scale.n_tag_checks)
    row: Row = {"case": "tags under churn", "n": n_wrong, "of": churn.n_checked, "sequences": churn.n_sequences}
    row |= {"pages mapped": churn.n_pages_mapped(), "outcome": OK if not n_wrong else WRONG}
    report.row(MEMORY, row)
    n_seen = churn.plant()
    report.row(MEMORY, {"case": "a planted wrong tag is seen", "n": n_seen, "outcome": OK if n_seen == 1 else WRONG})
    churn.close()
