"""What is concluded from the visits of `generate.py`: ratios within a round, targets, tables and the plot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.records import Spread, Target, print_targets
from benchmarks.systems import CACHES, Point, Prefill, Visit
from vmem_kv.units import format_bytes

LABELS = {"vmem": "VmemCache", "dynamic": "DynamicCache", "static": "StaticCache", "static_max": "StaticCache max"}
STOCK, OURS = "sdpa", "vmem_kv"

System = tuple[str, str]
"""(cache, attention)"""


class Results:
    """Visits by point and system, each system's in the order of the rounds."""

    def __init__(self, visits: Sequence[Visit]) -> None:
        self._visits: dict[Point, dict[System, list[Visit]]] = {}
        for visit in visits:
            point = Point(visit.dtype, visit.batch, visit.context)
            systems = self._visits.setdefault(point, {})
            systems.setdefault((visit.cache, visit.attention), []).append(visit)

    def points(self, **wanted: Any) -> list[Point]:
        """All points, or those whose fields have these values."""
        return [p for p in self._visits if all(getattr(p, name) == value for name, value in wanted.items())]

    def attentions(self) -> list[str]:
        """The attention functions that were used, in order."""
        return list(dict.fromkeys(a for systems in self._visits.values() for _, a in systems))

    def visits(self, point: Point, cache: str, attention: str | None = None) -> list[Visit]:
        """The visits to one system, or to a cache with any attention function."""
        systems = self._visits[point].items()
        return [v for (c, a), visits in systems if c == cache and attention in (None, a) for v in visits]

    def spread(
        self, point: Point, system: System, value: Callable[[Visit], float | None], scale: float = 1
    ) -> Spread | None:
        """A value of one system over the rounds; None where there is none."""
        values = [value(visit) for visit in self.visits(point, *system)]
        known = [v * scale for v in values if v is not None]
        return Spread.of(known) if known else None

    def speed_ratio(self, point: Point, system: System, other: System) -> Spread | None:
        """Tokens per second of one system over those of another, round by round."""
        speeds = [[v.decode_tokens_per_s for v in self.visits(point, *s)] for s in (system, other)]
        return Spread.of_ratios(*speeds) if all(speeds) else None


def evaluate_targets(visits: Sequence[Visit]) -> list[Target]:
    """Hold the results against the targets of this project."""
    results = Results(visits)

    def decode(what: str, bound: float, points: Sequence[Point], systems: Sequence[tuple[System, System]]) -> Target:
        found = (
            (f"{point}, {_pair(*pair)}", results.speed_ratio(point, *pair)) for point in points for pair in systems
        )
        return Target(what, bound, True, tuple((where, spread) for where, spread in found if spread is not None))

    def against(cache: str, attention: str) -> list[tuple[System, System]]:
        return [(("vmem", attention), (cache, attention))]

    targets = []
    for attention in (STOCK, OURS):
        where = f"both with {attention}"
        targets += [
            decode(
                f"decode / DynamicCache at 4,096, float32, {where}",
                1.2,
                results.points(context=4096, dtype="float32"),
                against("dynamic", attention),
            ),
            decode(
                f"decode / DynamicCache at 512, {where}",
                1.0,
                results.points(context=512),
                against("dynamic", attention),
            ),
            decode(
                f"decode / StaticCache of exact length, {where}", 1.0, results.points(), against("static", attention)
            ),
        ]
    targets.append(
        decode(
            f"decode with {OURS} / stock DynamicCache with {STOCK} at 4,096, bfloat16",
            3.0,
            results.points(context=4096, dtype="bfloat16"),
            [(("vmem", OURS), ("dynamic", STOCK))],
        )
    )
    memory = [
        (f"{p}, {when}", spread)
        for p in results.points(context=4096)
        for when, value in (("at 4,096", _waste), ("behind the next page boundary", _waste_after_growth))
        if (spread := _over_attentions(results, p, value)) is not None
    ]
    targets.append(Target("peak physical KV / live bytes at 4,096", 1.05, False, tuple(memory)))
    shares = [
        (f"{p}, {attention}", spread)
        for p in results.points()
        for attention in results.attentions()
        if (spread := results.spread(p, ("vmem", attention), lambda v: v.bookkeeping_share, 100)) is not None
    ]
    targets.append(Target("the cache's bookkeeping, % of a decode step", 3.0, False, tuple(shares)))
    return targets


LOGITS_BOUNDS = {"dynamic": 0.0, "static": 0.05}
"""How far float32 logits may be from ours within one attention function; a wrong token moves them by whole units."""


def evaluate_equality(visits: Sequence[Visit]) -> list[Target]:
    """Hold the logits of every cache against each other: speed means nothing where they differ."""
    results = Results(visits)
    return [
        Target(
            f"greatest difference of the logits to {LABELS[other]}'s, float32, same attention",
            bound,
            False,
            tuple(
                (f"{point}, {attention}", Spread.of([max(v.logits_difference for v in both)]))
                for point in results.points(dtype="float32")
                for attention in results.attentions()
                if (both := [v for c in ("vmem", other) for v in results.visits(point, c, attention)])
            ),
        )
        for other, bound in LOGITS_BOUNDS.items()
    ]


def summarise(visits: Sequence[Visit], prefills: Sequence[Prefill]) -> dict[str, Any]:
    """Return all ratios with their ranges, for the JSON record."""
    results = Results(visits)
    decode = [
        {**asdict(point), "system": list(a), "other": list(b), "decode_ratio": asdict(ratio)}
        for point in results.points()
        for a, b in _pairs(results)
        if (ratio := results.speed_ratio(point, a, b)) is not None
    ]
    first_token = [
        {"dtype": dtype, "context": context, "other": other, "first_token_ratio": asdict(ratio)}
        for dtype, context, other, ratio in _prefill_ratios(prefills)
    ]
    return {"decode_ratios": decode, "first_token_ratios": first_token}


def print_tables(
    console: Console, visits: Sequence[Visit], prefills: Sequence[Prefill], targets: Sequence[Target]
) -> None:
    """Print speeds, ratios, memory, time to first token, and the targets."""
    results = Results(visits)
    _print_speeds(console, results)
    _print_ratios(console, results)
    _print_memory(console, results)
    _print_steps(console, results)
    if prefills:
        _print_prefills(console, prefills)
    print_targets(console, targets)


def draw(visits: Sequence[Visit], path: Path) -> None:
    """Draw decode speed over the context, one panel per dtype and batch."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    results = Results(visits)
    dtypes = list(dict.fromkeys(p.dtype for p in results.points()))
    batches = list(dict.fromkeys(p.batch for p in results.points()))
    size = (max(6.5, 1.5 + 3.2 * len(batches)), 1.2 + 2.7 * len(dtypes))
    figure, axes = pyplot.subplots(len(dtypes), len(batches), figsize=size, squeeze=False, sharex=True)
    colours = dict(zip(CACHES, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    for row, dtype in enumerate(dtypes):
        for column, batch in enumerate(batches):
            axis = axes[row][column]
            points = results.points(dtype=dtype, batch=batch)
            for attention in results.attentions():
                for cache in CACHES:
                    spreads = [results.spread(p, (cache, attention), lambda v: v.decode_tokens_per_s) for p in points]
                    shown = [(p.context, s) for p, s in zip(points, spreads, strict=True) if s is not None]
                    middles = [s.median for _, s in shown]
                    below = [s.median - s.low for _, s in shown]
                    above = [s.high - s.median for _, s in shown]
                    axis.errorbar(
                        [context for context, _ in shown],
                        middles,
                        yerr=[below, above],
                        color=colours[cache],
                        linestyle="-" if attention == OURS else ":",
                        marker="o",
                        markersize=3,
                        capsize=2,
                        label=f"{LABELS[cache]}, {attention}",
                    )
            axis.set_title(f"{dtype}, batch {batch}", fontsize=10)
            axis.set_xscale("log", base=2)
            axis.set_xticks([p.context for p in points], [f"{p.context:,}" for p in points], fontsize=8)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            if row == len(dtypes) - 1:
                axis.set_xlabel("context (tokens)")
            if column == 0:
                axis.set_ylabel("decode tokens/s")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.6 / size[1], 1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _pairs(results: Results) -> list[tuple[System, System]]:
    """The comparisons that are reported: ours against the other caches, and all of ours against all stock."""
    attentions = results.attentions()
    pairs: list[tuple[System, System]] = []
    for other in ("dynamic", "static"):
        pairs += [(("vmem", attention), (other, attention)) for attention in attentions]
        if STOCK in attentions and OURS in attentions:
            pairs.append((("vmem", OURS), (other, STOCK)))
    return pairs


def _pair(system: System, other: System) -> str:
    return system[1] if system[1] == other[1] else f"{system[1]} against {other[1]}"


def _waste(visit: Visit) -> float | None:
    return visit.peak_kv_bytes / visit.live_bytes


def _waste_after_growth(visit: Visit) -> float | None:
    if visit.peak_kv_bytes_after_growth is None or not visit.live_bytes_after_growth:
        return None
    return visit.peak_kv_bytes_after_growth / visit.live_bytes_after_growth


def _over_attentions(results: Results, point: Point, value: Callable[[Visit], float | None]) -> Spread | None:
    """A value that does not depend on the attention function."""
    known = [v for visit in results.visits(point, "vmem") if (v := value(visit)) is not None]
    return Spread.of(known) if known else None


def _prefill_ratios(prefills: Sequence[Prefill]) -> Iterator[tuple[str, int, str, Spread]]:
    times: dict[tuple[str, int], dict[str, list[float]]] = {}
    for p in prefills:
        times.setdefault((p.dtype, p.context), {}).setdefault(p.cache, []).append(p.first_token_ms)
    for (dtype, context), by_cache in times.items():
        for other in CACHES[1:]:
            yield dtype, context, other, Spread.of_ratios(by_cache["vmem"], by_cache[other])


def _print_speeds(console: Console, results: Results) -> None:
    table = Table(title="Decode, tokens/s (median over the rounds)")
    systems = [(cache, attention) for attention in results.attentions() for cache in CACHES]
    for column in ("dtype", "batch", "context", *(f"{LABELS[c]}\n{a}" for c, a in systems)):
        table.add_column(column, justify="right")
    for point in results.points():
        spreads = (results.spread(point, system, lambda v: v.decode_tokens_per_s) for system in systems)
        table.add_row(*_where(point), *(f"{s.median:.1f}" if s else "" for s in spreads))
    console.print(table)


def _print_ratios(console: Console, results: Results) -> None:
    table = Table(title="Decode speed of VmemCache over that of another cache (median and range of the rounds)")
    pairs = _pairs(results)
    columns = (f"/ {LABELS[b[0]]}\n{_pair(a, b)}" for a, b in pairs)
    for column in ("dtype", "batch", "context", *columns):
        table.add_column(column, justify="right")
    for point in results.points():
        ratios = (results.speed_ratio(point, a, b) for a, b in pairs)
        table.add_row(*_where(point), *(r.show() if r else "" for r in ratios))
    console.print(table)


def _print_memory(console: Console, results: Results) -> None:
    table = Table(
        title="Memory: what the tokens need; the peak of K and V; and RSS, the greatest growth of resident\n"
        f"memory with {results.attentions()[-1]} attention, temporaries included"
    )
    caches = (*CACHES, "static_max")
    columns = (f"{LABELS[c]}\n{what}" for what, of in (("peak KV", caches), ("RSS", CACHES)) for c in of)
    for column in ("dtype", "batch", "context", "live", *columns):
        table.add_column(column, justify="right")
    for point in results.points():
        row = [*_where(point), format_bytes(results.visits(point, "vmem")[0].live_bytes)]
        for cache in caches:
            visits = results.visits(point, cache)
            row.append(format_bytes(max(v.peak_kv_bytes for v in visits)) if visits else "")
        for cache in CACHES:
            system = (cache, results.attentions()[-1])
            peak = results.spread(point, system, lambda v: v.peak_resident_bytes)
            row.append(format_bytes(round(peak.median)) if peak else "")
        table.add_row(*row)
    console.print(table)


def _print_steps(console: Console, results: Results) -> None:
    table = Table(
        title="Inside a decode step: page faults; time in cache.update (copies included); VmemCache's own\n"
        "bookkeeping (update without the copies, growth spread out); update in a step that maps pages"
    )
    columns = [f"{LABELS[c]}\n{what}" for what in ("faults", "update ms") for c in CACHES]
    for column in ("dtype", "batch", "context", "attention", *columns, "bookkeeping\n% of step", "growth\nms"):
        table.add_column(column, justify="right")
    for point in results.points():
        for attention in results.attentions():
            faults = [results.spread(point, (c, attention), lambda v: v.faults_per_step) for c in CACHES]
            updates = [results.spread(point, (c, attention), lambda v: v.update_ms) for c in CACHES]
            share = results.spread(point, ("vmem", attention), lambda v: v.bookkeeping_share, 100)
            growth = results.spread(point, ("vmem", attention), lambda v: v.growth_update_ms)
            table.add_row(
                *_where(point),
                attention,
                *(f"{s.median:,.0f}" if s else "" for s in faults),
                *(f"{s.median:.2f}" if s else "" for s in updates),
                f"{share.median:.2f}" if share else "",
                f"{growth.median:.1f}" if growth else "",
            )
    console.print(table)


def _print_prefills(console: Console, prefills: Sequence[Prefill]) -> None:
    contexts = ", ".join(f"{n:,}" for n in sorted({p.context for p in prefills}))
    table = Table(
        title="Time to first token (real prefill; making the cache is inside); measured only at batch 1 and\n"
        f"contexts {contexts}, with {prefills[0].attention} attention"
    )
    for column in ("dtype", "context", *(f"{LABELS[c]}\nms" for c in CACHES), "/ DynamicCache", "/ StaticCache"):
        table.add_column(column, justify="right")
    ratios: dict[tuple[str, int], list[str]] = {}
    for dtype, context, _, ratio in _prefill_ratios(prefills):
        ratios.setdefault((dtype, context), []).append(ratio.show())
    for (dtype, context), shown in ratios.items():
        times = [[p for p in prefills if (p.dtype, p.context, p.cache) == (dtype, context, c)] for c in CACHES]
        medians = (f"{Spread.of(p.first_token_ms for p in of_cache).median:,.0f}" for of_cache in times)
        table.add_row(dtype, f"{context:,}", *medians, *shown)
    console.print(table)


def _where(point: Point) -> tuple[str, str, str]:
    return point.dtype, str(point.batch), f"{point.context:,}"
