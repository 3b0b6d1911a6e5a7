"""What is concluded from the visits of `serving.py`: ratios between neighbours in time, targets, tables, the plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.records import Spread, Target
from vmem_kv.units import format_bytes

SYSTEMS = ("vmem_kv", "static", "continuous", "vllm")
OURS = SYSTEMS[0]
LABELS = {
    "vmem_kv": "vmem_kv",
    "static": "transformers `generate`, static batches of 8",
    "continuous": "transformers continuous batching",
    "vllm": "vLLM, CPU build",
}
BOUNDS = {"static": (3.0,), "continuous": (2.5,), "vllm": (1.0, 1.29)}
"""How much faster than each peer this engine should be, all requests at once."""
MAIN = "at_once"

Visit = dict[str, Any]


def of(visits: Sequence[Visit], workload: str, system: str) -> list[Visit]:
    """Return one engine's visits with one workload, in the order in which they were made."""
    return [v for v in visits if (v["workload"], v["system"]) == (workload, system)]


def workloads_of(visits: Sequence[Visit]) -> list[str]:
    """Return the workloads, in order."""
    return list(dict.fromkeys(v["workload"] for v in visits))


def speed_ratios(visits: Sequence[Visit], workload: str, peer: str, figure: str = "tokens_per_s") -> list[float]:
    """Return this engine's speed over a peer's, for each of the peer's visits: the mean of its neighbours in time."""
    ratios = []
    for visit in of(visits, workload, peer):
        same_round = [v for v in of(visits, workload, OURS) if v["round"] == visit["round"]]
        around = [v for v in same_round if abs(v["order"] - visit["order"]) == 1]
        if around:
            ratios.append(sum(v[figure] for v in around) / len(around) / visit[figure])
    return ratios


def evaluate(visits: Sequence[Visit]) -> list[Target]:
    """Hold the results against the targets of this project."""
    targets = []
    for peer, bounds in BOUNDS.items():
        ratios = speed_ratios(visits, MAIN, peer)
        points = ((f"{len(ratios)} visits", Spread.of(ratios)),) if ratios else ()
        targets += [Target(f"tokens/s, all at once, / {LABELS[peer]}", bound, True, points) for bound in bounds]

    def over_workloads(what: str, bound: float, value: Callable[[Visit], float]) -> Target:
        points = [(w, Spread.of(map(value, of(visits, w, OURS)))) for w in workloads_of(visits) if of(visits, w, OURS)]
        return Target(what, bound, False, tuple(points))

    targets.append(
        over_workloads(
            "peak K/V memory / what live tokens need in whole pages",
            1.05,
            lambda v: float(v["peak_kv_bytes"] / v["peak_needed_kv_bytes"]),
        )
    )
    targets.append(
        over_workloads("step time outside the model's forward, %", 10.0, lambda v: 100 * float(v["overhead_share"]))
    )
    equal = tuple(
        (f"{LABELS[peer]}, {w}", Spread.of([share]))
        for w in workloads_of(visits)
        for peer in SYSTEMS[1:]
        if (share := equal_share(visits, w, peer)) is not None
    )
    targets.append(Target("answers equal to this engine's, %", 100.0, True, equal))
    return targets


def equal_share(visits: Sequence[Visit], workload: str, system: str) -> float | None:
    """Return how many % of an engine's answers are this one's, token by token; None where one of them has none."""
    ours, others = of(visits, workload, OURS), of(visits, workload, system)
    if not ours or not others:
        return None
    pairs = [pair for other in others for pair in zip(ours[0]["answers"], other["answers"], strict=True)]
    n_equal = sum(1 for a, b in pairs if a == b)
    return 100.0 * n_equal / len(pairs)


def print_tables(console: Console, visits: Sequence[Visit]) -> None:
    """Print one table for each workload."""
    for workload in workloads_of(visits):
        first = next(v for v in visits if v["workload"] == workload)
        table = Table(title=f"{workload}: {len(first['answers'])} requests, {first['n_tokens']:,} tokens generated")
        for column in ("engine", "visits", "tokens/s", "tokens/CPU s", "ours / it", "first token s\np50, p99"):
            table.add_column(column)
        for column in ("between tokens ms\np50, p99", "peak K/V", "of it live", "peak RSS"):
            table.add_column(column)
        for system in SYSTEMS:
            found = of(visits, workload, system)
            if not found:
                continue
            ratios = speed_ratios(visits, workload, system)
            resident = _median(found, lambda v: v["peak_resident_bytes"] or 0)
            table.add_row(
                LABELS[system],
                str(len(found)),
                _spread(found, "tokens_per_s").show(1),
                _spread(found, "tokens_per_cpu_s").show(1),
                Spread.of(ratios).show() if ratios else "",
                _latency(found, "first_token_s", 1, 2),
                _latency(found, "between_tokens_s", 1000, 0),
                format_bytes(round(_median(found, lambda v: v["peak_kv_bytes"]))),
                f"{_median(found, lambda v: 100 * v['peak_live_kv_bytes'] / v['peak_kv_bytes']):.0f} %",
                format_bytes(round(resident)) if resident else "",
            )
        console.print(table)
    for visit in of(visits, MAIN, OURS)[:1]:
        calls = ", ".join(f"{name} {n}" for name, n in visit["driver_calls"].items())
        console.print(f"{visit['layout']} Driver calls: {calls}, in {visit['n_steps']} steps.", highlight=False)


def readme_table(visits: Sequence[Visit]) -> str:
    """Return the README's table, in Markdown."""
    lines = [
        "| | tokens/s | vmem_kv / it | first token, p50 / p99 | between tokens, p50 / p99 | peak K/V memory (live) |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for workload in workloads_of(visits):
        for system in SYSTEMS:
            found = of(visits, workload, system)
            if not found:
                continue
            ratios = speed_ratios(visits, workload, system)
            live = format_bytes(round(_median(found, lambda v: v["peak_live_kv_bytes"])))
            peak = format_bytes(round(_median(found, lambda v: v["peak_kv_bytes"])))
            cells = [
                f"{workload.replace('_', ' ')}: {LABELS[system]}",
                f"{_spread(found, 'tokens_per_s').median:.1f}",
                Spread.of(ratios).show() if len(ratios) > 1 else "".join(f"{r:.2f}" for r in ratios),
                f"{_latency(found, 'first_token_s', 1, 2)} s",
                f"{_latency(found, 'between_tokens_s', 1000, 0)} ms",
                f"{peak} ({live})",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(visits: Sequence[Visit], path: Path) -> None:
    """Draw tokens and memory over time of each engine's first visit, all requests at once."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    workload = MAIN if MAIN in workloads_of(visits) else workloads_of(visits)[0]
    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(10, 4.2))
    colours = {system: f"C{i}" for i, system in enumerate(SYSTEMS)}
    for system in SYSTEMS:
        found = of(visits, workload, system)
        if not found:
            continue
        points = found[0]["timeline"]
        times = [p["at_s"] for p in points]
        label = LABELS[system].replace("`", "")
        speed.plot(times, [p["n_tokens"] for p in points], color=colours[system], label=label)
        mib = 1 << 20
        memory.plot(times, [p["kv_bytes"] / mib for p in points], color=colours[system])
        memory.fill_between(times, [p["live_kv_bytes"] / mib for p in points], color=colours[system], alpha=0.25)
    speed.set_ylabel("tokens generated")
    memory.set_ylabel("K and V, MiB (line: set aside, area: live)")
    for axis in (speed, memory):
        axis.set_xlabel("seconds")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    n = len(of(visits, workload, next(v["system"] for v in visits))[0]["answers"])
    figure.suptitle(f"{n} requests, {workload.replace('_', ' ')}", fontsize=10)
    figure.legend(loc="lower center", ncols=2, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _spread(visits: Sequence[Visit], name: str) -> Spread:
    return Spread.of(v[name] for v in visits)


def _median(visits: Sequence[Visit], value: Callable[[Visit], float]) -> float:
    return Spread.of(map(value, visits)).median


def _latency(visits: Sequence[Visit], name: str, scale: float, digits: int) -> str:
    p50, p99 = (Spread.of(v[name][q] * scale for v in visits).median for q in ("p50", "p99"))
    return f"{p50:.{digits}f} / {p99:.{digits}f}"
