"""Decode speed, time to first token and memory of VmemCache, DynamicCache and StaticCache on a real model.

    python -m benchmarks.generate [--quick] [--json FILE] [--plot FILE]

Systems take turns at every point, in another order in every round (A B C, B C A, ...), ratios are formed within a
round, and the median of the rounds with its range is reported. `systems.py` says what one turn does,
`generate_report.py` which ratios and targets are drawn from it. The default takes a quarter of an hour on two cores
and 8 GB, `--quick` two or three minutes.

Time to first token is cut short, as it costs a real prefill: batch 1, contexts 512 and 2,048, one attention function
(the last of --attentions). The program fails (exit 1, when all is written) if a cache changes what the model computes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.generate_report import draw, evaluate_equality, evaluate_targets, print_tables, summarise
from benchmarks.records import describe_run, warn_if_busy, write_json
from benchmarks.systems import (
    ATTENTIONS,
    CACHES,
    N_WARM_STEPS,
    TINY,
    Bench,
    Point,
    Prefill,
    Visit,
    load_model,
    measure_prefill,
)
from vmem_kv.models import DTYPES

QUICK = {"contexts": [512, 4096], "batches": [1], "rounds": 2, "prefill_contexts": [512], "budget": 0.6}
FULL = {
    "contexts": [512, 2048, 4096, 8192],
    "batches": [1, 4, 8],
    "rounds": 3,
    "prefill_contexts": [512, 2048],
    "budget": 1.0,
}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the program; return its record."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console()
    warn_if_busy(console)
    run = describe_run() | {"threads": torch.get_num_threads()}
    visits: list[Visit] = []
    prefills: list[Prefill] = []
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with torch.inference_mode(), Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=count_measurements(options))
        for measured in measure(options, lambda what: progress.update(task, description=what)):
            progress.advance(task)
            if isinstance(measured, Visit):
                visits.append(measured)
            else:
                prefills.append(measured)
    run["load_average_at_end"] = os.getloadavg()[0]
    equality = evaluate_equality(visits)
    targets = [*evaluate_targets(visits), *equality]
    record = {
        "run": run,
        "settings": {name: value for name, value in vars(options).items() if name not in ("json", "plot")},
        "targets": [target.to_json() for target in targets],
        "summary": summarise(visits, prefills),
        "visits": [asdict(v) | {"bookkeeping_share": v.bookkeeping_share} for v in visits],
        "prefills": [asdict(prefill) for prefill in prefills],
    }
    print_tables(console, visits, prefills, targets)
    if options.json:
        write_json(options.json, "generate", record)
    if options.plot:
        draw(visits, options.plot)
    broken = [target.what for target in equality if target.verdict == "miss"]
    if broken:
        raise SystemExit(f"FAILED, the numbers above mean nothing: {'; '.join(broken)}")
    return record


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", help=f"folder, GGUF file or hub name; {TINY!r}: two random layers; default SmolLM2-135M")
    add("--quick", action="store_true", help=f"smaller defaults: {QUICK}")
    add("--contexts", type=int, nargs="+", metavar="N", help=f"tokens at the end of a visit; {FULL['contexts']}")
    add("--batches", type=int, nargs="+", metavar="N", help=f"default {FULL['batches']}")
    add("--dtypes", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    add("--attentions", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS))
    add("--rounds", type=int, metavar="N", help=f"turns of every system at every point; {FULL['rounds']}")
    add("--steps", type=int, default=16, metavar="N", help="decode steps per visit, at most; 16")
    add("--budget", type=float, metavar="S", help=f"seconds after which a visit stops early; {FULL['budget']}")
    add("--prefill-contexts", type=int, nargs="*", metavar="N", help=f"{FULL['prefill_contexts']}; none: no prefill")
    add("--threads", type=int, metavar="N", help="torch's threads; default: torch's choice")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    add("--plot", type=Path, metavar="FILE", help="draw decode speed over the context (PNG, SVG, PDF)")
    options = parser.parse_args(arguments)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in ("contexts", "batches", "prefill_contexts"):
        setattr(options, name, sorted(set(getattr(options, name))))
    if options.rounds < 1 or options.steps < 1:
        parser.error("--rounds and --steps must be at least 1")
    if options.contexts[0] <= N_WARM_STEPS + options.steps:
        parser.error(f"a context of {options.contexts[0]} is too short for {N_WARM_STEPS} + {options.steps} steps")
    return options


def measure(options: argparse.Namespace, report: Any) -> Iterator[Visit | Prefill]:
    """Yield every measurement, telling `report` what comes next."""
    for dtype in options.dtypes:
        report(f"loading the model in {dtype}")
        model = load_model(options.model, dtype)
        for context in options.prefill_contexts:
            for round_index in range(options.rounds):
                for cache in rotated(CACHES, round_index):
                    report(f"prefill {dtype} {context} {cache}")
                    yield measure_prefill(model, dtype, context, round_index, cache, options.attentions[-1])
        for batch in options.batches:
            for context in options.contexts:
                point = Point(dtype, batch, context)
                bench = Bench(model, point, options.steps, options.budget)
                for round_index, cache, attention in turns(options, batch):
                    report(f"{point} {cache}")
                    yield bench.visit(round_index, cache, attention)


def turns(options: argparse.Namespace, batch: int) -> Iterator[tuple[int, str, str]]:
    """Yield (round, cache, attention), in the order in which the systems at one point take turns."""
    for round_index in range(options.rounds):
        for attention in rotated(options.attentions, round_index):
            for cache in rotated(CACHES, round_index):
                yield round_index, cache, attention
    if batch == min(options.batches):  # for its memory; it reads all of its length, so it is slow as well
        yield 0, "static_max", options.attentions[0]


def rotated(systems: Sequence[str], round_index: int) -> list[str]:
    """The systems in a round's order: who comes first, and who comes behind whom's garbage, takes turns as well."""
    first = round_index % len(systems)
    return [*systems[first:], *systems[:first]]


def count_measurements(options: argparse.Namespace) -> int:
    """How many measurements `measure` yields."""
    n_dtypes: int = len(options.dtypes)
    n_turns = sum(len(list(turns(options, batch))) for batch in options.batches) * len(options.contexts)
    n_prefills: int = len(options.prefill_contexts) * options.rounds * len(CACHES)
    return n_dtypes * (n_turns + n_prefills)


if __name__ == "__main__":
    main()
