"""Part 3: what it costs a kernel that K and V lie in demand-mapped memory, as ratios to plain tensors in one loop.

A ratio is taken within a round, where both saw the same clocks; the table shows its median and its 10th and 90th
percentile. `plain, again` is the same call once more: what it differs from 1 by is noise.

A layout differs from plain tensors in two things: where a token's neighbour lies, and that the memory is mapped page by
page. `plain, strides of ...` are plain tensors with the first and without the second, slot behind slot without room to
grow: `ratio to equal strides` is what mapping alone costs.

A sample is taken behind a write that keeps the device busy while the host launches. Where the host takes longer than
that, the figure is the host's, and says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.cases import Case, Reporter, Row
from benchmarks.gpu.paged import BY_TABLE, into_blocks, paged_calls
from benchmarks.gpu.plan import KERNELS, Plan, Point, Shape, SpeedScale
from benchmarks.gpu.sequences import Store, bind, mapped, plain, relative_error, spec_of
from vmem_kv.attention.base import BoundKernel
from vmem_kv.errors import VmemError
from vmem_kv.layout import Layout
from vmem_kv.tensors import SlotKV
from vmem_kv.units import GIB, ceil_div, format_bytes

RATIOS = "kernels over mapped memory against plain tensors"
LEFT_OUT = "left out"
CEILING = "the memory's own speed"
PLAIN, AGAIN, EQUAL = "plain", "plain, again", "plain, strides of {}"
TARGET = 0.01
"""How far from 1 the ratio of the layout made for speed may be."""
_DTYPE = torch.bfloat16
_TIMED = (
    *("median_ms", "ratio", "ratio_p10", "ratio_p90", "ratio to equal strides", "GB_per_s"),
    *("host_ms", "flush_ms", "within 1 %"),
)


def cases(plan: Plan) -> Sequence[Case]:
    """All cases, by worth."""
    scale = plan.speed
    points = [
        Case(
            _name(shape, point),
            partial(_compare, shape, point, scale),
            cost_s=plan.costs.speed + plan.costs.speed_per_gib * _mapped_gib(shape, point, scale),
            timeout_s=60,
            table=RATIOS,
        )
        for point in scale.points
        for shape in scale.shapes
    ]
    return [Case("copy", partial(_copy_bandwidth, scale), cost_s=plan.costs.speed, table=CEILING), *points]


def _copy_bandwidth(scale: SpeedScale, bench: Bench, report: Reporter) -> None:
    """Copy one tensor into another: what it reads and writes in a second is the most that a kernel can read."""
    source = torch.empty(scale.flush_bytes, dtype=torch.uint8, device=bench.device).zero_()
    target = torch.empty_like(source)
    taken = bench.clock.measure({"copy": partial(target.copy_, source)}, scale.n_rounds)["copy"]
    median_ms = statistics.median(taken)
    row: Row = {"case": "copy", "bytes": scale.flush_bytes, "median_ms": median_ms}
    report.row(CEILING, {**row, "GB_per_s": 2 * scale.flush_bytes / median_ms / 1e6}, timed=_TIMED)


def _mapped_gib(shape: Shape, point: Point, scale: SpeedScale) -> float:
    fitting, _ = fit_layouts(shape, point, scale)
    return sum(_bytes(shape, kind, point, scale) for kind in fitting) / GIB


def n_layers(shape: Shape, kind: str) -> int:
    """How many layers have to be mapped so that one of them lies as it does among all of the model's."""
    if kind == "token_major":
        return shape.n_layers
    group = int(kind.partition(":")[2] or 1)
    return min(group, shape.n_layers)


def fit_layouts(shape: Shape, point: Point, scale: SpeedScale) -> tuple[list[str], list[str]]:
    """Split the layouts into those whose memory fits at one time, the first ones first, and the others."""
    left = scale.max_bytes
    fitting, others = [], []
    for kind in scale.layouts:
        n_bytes = _bytes(shape, kind, point, scale)
        if n_bytes <= left:
            left -= n_bytes
            fitting.append(kind)
        else:
            others.append(kind)
    return fitting, others


def _bytes(shape: Shape, kind: str, point: Point, scale: SpeedScale) -> int:
    n_planes = 1 if kind == "token_major" else 2
    n_bytes = n_layers(shape, kind) * shape.token_bytes * point.context
    return point.batch * (ceil_div(n_bytes, scale.page_bytes) + n_planes) * scale.page_bytes


def _name(shape: Shape, point: Point) -> str:
    return f"{shape.name}, batch {point.batch}, context {point.context}, new tokens {point.query_tokens}"


def _compare(shape: Shape, point: Point, scale: SpeedScale, bench: Bench, report: Reporter) -> None:
    spec = spec_of(shape, _DTYPE)
    kernels = [k for name in KERNELS if not isinstance(k := bind(bench, name, spec), str)]
    slack_tokens = max(kernel.slack_tokens for kernel in kernels)
    lengths = [point.context] * point.batch
    scale = replace(scale, max_bytes=min(scale.max_bytes, bench.pool(scale.page_bytes).max_pages * scale.page_bytes))
    leave_out = partial(_leave_out, report, _name(shape, point))
    fitting, others = fit_layouts(shape, point, scale)
    for kind in others:
        leave_out(kind, f"{format_bytes(_bytes(shape, kind, point, scale))} beside the others pass the plan's memory")
    with ExitStack() as stack:
        flush = stack.enter_context(bench.flusher(scale.flush_bytes))
        stores: dict[str, Store] = {PLAIN: plain(bench, shape, lengths, _DTYPE)}
        layouts: dict[str, Layout] = {}
        for kind in fitting:
            reduced = Shape(shape.name, n_layers(shape, kind), shape.n_q_heads, shape.n_kv_heads, shape.head_dim)
            try:
                sequences = stack.enter_context(
                    mapped(
                        bench,
                        reduced,
                        kind,
                        lengths,
                        dtype=_DTYPE,
                        page_bytes=scale.page_bytes,
                        span_tokens=scale.span_tokens,
                        slack_tokens=slack_tokens,
                    )
                )
            except VmemError as error:  # the other layouts are none the worse for it
                leave_out(kind, f"{type(error).__name__}: {error}")
                continue
            sequences.fill(0, poison=False)
            stores[kind], layouts[kind] = sequences.store(0), sequences.cache.layout
        try:
            # Half of what is left: the other half is for blocks.
            stores |= strided(layouts, stores[PLAIN], min(scale.max_bytes, bench.driver.available_bytes() // 2))
        except (torch.OutOfMemoryError, MemoryError) as error:
            leave_out(EQUAL.format("all layouts"), str(error))
        for kernel in kernels:
            _compare_kernel(kernel, shape, point, stores, scale.n_rounds, flush, bench, report)
        stores.clear()


def _leave_out(report: Reporter, case: str, memory: str, why: str) -> None:
    report.row(LEFT_OUT, {"case": case, "memory": memory, "why": why[:300]})


def strided(layouts: Mapping[str, Layout], dense: Store, max_bytes: int) -> dict[str, Store]:
    """Return plain tensors with the strides of layouts whose rows do not follow each other, by name.

    They share one piece of memory: kernels only read it, and what they read does not matter.

    Args:
        layouts: By kind, with the layer that is attended to as their first.
        dense: The same sequences, without gaps.
        max_bytes: What needs more is left out.
    """
    rows = dense.kv.keys
    item, n_rows = rows.element_size(), rows.shape[0]
    sizes = {kind: sum(plane.token_bytes for plane in layout.planes[:2]) * n_rows for kind, layout in layouts.items()}
    apart = [
        kind
        for kind, layout in layouts.items()
        if layout.keys[0].token_bytes != rows.stride(0) * item and sizes[kind] <= max_bytes
    ]
    if not apart:
        return {}
    memory = torch.empty(max(sizes[kind] for kind in apart) // item, dtype=rows.dtype, device=rows.device).normal_()
    found = {}
    for kind in apart:
        keys, values = layouts[kind].keys[0], layouts[kind].values[0]
        values_at = values.offset_bytes if len(layouts[kind].planes) == 1 else n_rows * keys.token_bytes
        key_rows, value_rows = (
            memory.as_strided(rows.shape, (s.token_bytes // item, s.head_bytes // item, 1), at // item)
            for s, at in ((keys, keys.offset_bytes), (values, values_at))
        )
        found[EQUAL.format(kind)] = replace(dense, kv=SlotKV(key_rows, value_rows, dense.kv.span_tokens))
    return found


def _compare_kernel(
    kernel: BoundKernel,
    shape: Shape,
    point: Point,
    stores: dict[str, Store],
    n_rounds: int,
    flush: Callable[[], object],
    bench: Bench,
    report: Reporter,
) -> None:
    n_queries = [point.query_tokens] * point.batch
    query = torch.randn(sum(n_queries), shape.n_q_heads, shape.head_dim, device=bench.device).to(_DTYPE)
    leave_out = partial(_leave_out, report, f"{_name(shape, point)}, {kernel.name}")
    batch = stores[PLAIN].batch(n_queries)
    calls: dict[str, Callable[[], torch.Tensor]] = {PLAIN: partial(kernel, query, stores[PLAIN].kv, batch)}
    expected = calls[PLAIN]().double()
    for name, store in stores.items():
        try:
            call = partial(kernel, query, store.kv, store.batch(n_queries))
            call()
        except VmemError as error:
            leave_out(name, f"{type(error).__name__}: {error}")
        else:
            calls[name] = call
    try:
        over_blocks, why_no_table = paged_calls(kernel, into_blocks(stores[PLAIN]), batch, query)
    except torch.OutOfMemoryError as error:
        over_blocks, why_no_table = {}, str(error)
    if why_no_table:
        leave_out(BY_TABLE, why_no_table)
    for name, call_blocks in over_blocks.items():
        try:
            wrong_by = relative_error(call_blocks(), expected)
        except Exception as error:  # a comparison that does not work here is left out, and said
            leave_out(name, str(error))
            continue
        if wrong_by < 1e-2:
            calls[name] = call_blocks
        else:
            leave_out(name, f"relative error {wrong_by:.3g}")
    calls[AGAIN] = calls[PLAIN]
    times = bench.clock.measure(calls, n_rounds, flush)
    flush_ms = statistics.median(bench.clock.measure({"flush": flush}, 5)["flush"])
    noise = abs(statistics.median(_ratios(times[AGAIN], times[PLAIN])) - 1)
    n_bytes = shape.token_bytes * point.n_tokens
    for name, taken in times.items():
        ratios = sorted(_ratios(taken, times[PLAIN]))
        median_ms, ratio = statistics.median(taken), statistics.median(ratios)
        row: Row = {"shape": shape.name, "batch": point.batch, "context": point.context}
        row |= {"new tokens": point.query_tokens, "kernel": kernel.name}
        row |= {"memory": name, "median_ms": median_ms, "ratio": ratio}
        row |= {"ratio_p10": ratios[len(ratios) // 10], "ratio_p90": ratios[-1 - len(ratios) // 10]}
        row["ratio to equal strides"] = _ratio_to_equal_strides(name, stores, times)
        row["GB_per_s"] = n_bytes / median_ms / 1e6
        row |= {"host_ms": bench.clock.host_ms(calls[name]), "flush_ms": flush_ms}
        if name == "per_layer":
            row["within 1 %"] = judge(ratio, noise, row["host_ms"], flush_ms)
        report.row(RATIOS, row, timed=_TIMED)


def _ratios(taken: Sequence[float], others: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(taken, others, strict=True)]


def _ratio_to_equal_strides(name: str, stores: Mapping[str, Store], times: Mapping[str, list[float]]) -> float | None:
    if name not in stores or name.startswith(PLAIN):
        return None
    is_dense = stores[name].kv.keys.stride() == stores[PLAIN].kv.keys.stride()
    other = times.get(PLAIN if is_dense else EQUAL.format(name))
    return None if other is None else statistics.median(_ratios(times[name], other))


def judge(ratio: float, noise: float, host_ms: float | None, flush_ms: float) -> str:
    """Say whether a ratio is within the target, or why nobody can tell.

    Args:
        ratio: Of the layout made for speed to plain tensors.
        noise: How far from 1 the ratio of plain tensors to themselves is.
        host_ms: What the host takes to launch a call; None where it is not apart from the call.
        flush_ms: For how long the device is busy meanwhile.
    """
    if host_ms is not None and host_ms > flush_ms:
        return "host-bound"
    if noise > TARGET:
        return "unclear"
    return "yes" if abs(ratio - 1) <= TARGET else "no"
