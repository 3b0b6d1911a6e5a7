"""Part 3: what it costs a kernel that K and V lie in demand-mapped memory, as ratios to plain tensors in one loop.

A ratio is taken within a round, where both saw the same clocks; the table shows its median and its 10th and 90th
percentile. `plain, again` is the same call once more: what it differs from 1 by is noise.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.cases import Case, Reporter, Row
from benchmarks.gpu.paged import into_blocks, paged_calls
from benchmarks.gpu.plan import KERNELS, Plan, Point, Shape, SpeedScale
from benchmarks.gpu.sequences import Store, bind, mapped, plain, relative_error, spec_of
from vmem_kv.attention.base import BoundKernel
from vmem_kv.units import GIB, ceil_div, format_bytes

RATIOS = "kernels over mapped memory against plain tensors"
LEFT_OUT = "left out"
PLAIN, AGAIN = "plain", "plain, again"
TARGET = 0.01
"""How far from 1 the ratio of the layout made for speed may be."""
_DTYPE = torch.bfloat16
_TIMED = ("median_ms", "ratio", "ratio_p10", "ratio_p90", "GB_per_s", "within 1 %")
_SECONDS_PER_GIB = 0.08  # to create, map, unmap and release pages of 2 MiB


def cases(plan: Plan) -> Sequence[Case]:
    """All cases, by worth."""
    scale = plan.speed
    return [
        Case(
            _name(shape, point),
            partial(_compare, shape, point, scale),
            cost_s=1.5 + _SECONDS_PER_GIB * _mapped_gib(shape, point, scale),
            timeout_s=60,
            table=RATIOS,
        )
        for point in scale.points
        for shape in scale.shapes
    ]


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
    fitting, others = fit_layouts(shape, point, scale)
    for kind in others:
        why = f"{format_bytes(_bytes(shape, kind, point, scale))} beside the others pass the plan's memory"
        report.row(LEFT_OUT, {"case": _name(shape, point), "memory": kind, "why": why})
    with ExitStack() as stack:
        stores: dict[str, Store] = {PLAIN: plain(bench, shape, lengths, _DTYPE)}
        for kind in fitting:
            reduced = Shape(shape.name, n_layers(shape, kind), shape.n_q_heads, shape.n_kv_heads, shape.head_dim)
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
            sequences.fill(0, poison=False)
            stores[kind] = sequences.store(0)
        flush = stack.enter_context(bench.flusher(scale.flush_bytes))
        for kernel in kernels:
            _compare_kernel(kernel, shape, point, stores, scale.n_rounds, flush, bench, report)
        stores.clear()


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
    batches = {name: store.batch(n_queries) for name, store in stores.items()}
    calls: dict[str, Callable[[], torch.Tensor]] = {
        name: partial(kernel, query, store.kv, batches[name]) for name, store in stores.items()
    }
    where: Row = {"shape": shape.name, "batch": point.batch, "context": point.context}
    where |= {"new tokens": point.query_tokens, "kernel": kernel.name}
    expected = calls[PLAIN]().double()
    try:
        over_blocks = paged_calls(kernel, into_blocks(stores[PLAIN]), batches[PLAIN], query)
    except torch.OutOfMemoryError as error_of_copy:
        over_blocks = {}
        report.row(LEFT_OUT, {"case": _name(shape, point), "memory": "blocks", "why": str(error_of_copy)[:300]})
    for name, call in over_blocks.items():
        try:
            error = relative_error(call(), expected)
        except Exception as error_of_call:  # a comparison that does not work here is left out, and said
            report.row(LEFT_OUT, {"case": _name(shape, point), "memory": name, "why": str(error_of_call)[:300]})
            continue
        if error < 1e-2:
            calls[name] = call
        else:
            report.row(LEFT_OUT, {"case": _name(shape, point), "memory": name, "why": f"relative error {error:.3g}"})
    calls[AGAIN] = calls[PLAIN]
    times = bench.clock.measure(calls, n_rounds, flush)
    n_bytes = shape.token_bytes * point.n_tokens
    for name, taken in times.items():
        ratios = sorted(a / b for a, b in zip(taken, times[PLAIN], strict=True))
        median_ms, ratio = statistics.median(taken), statistics.median(ratios)
        row = {**where, "memory": name, "median_ms": median_ms, "ratio": ratio}
        row |= {"ratio_p10": ratios[len(ratios) // 10], "ratio_p90": ratios[-1 - len(ratios) // 10]}
        row["GB_per_s"] = n_bytes / median_ms / 1e6
        if name == "per_layer":
            row["within 1 %"] = "yes" if abs(ratio - 1) <= TARGET else "no"
        report.row(RATIOS, row, timed=_TIMED)
