"""Where a serving step's time goes, by stage.

    python -m benchmarks.serving_profile [MODEL] [--requests 16] [--threads 2] [--sampled top_p=0.9] [--json FILE]

Runs one workload through the engine and reports, for steps that only decode and for those that also compute prompts,
the time of each stage:

    schedule     choosing the step's tokens, and mapping pages
    prepare      building its numbers
    attention    the attention kernel, all layers
    linears      the matrix products with weights
    model        the rest of the forward pass: norms, rotations, activations, Python
    sample       logits to tokens
    answers      tokens to text, and what ends an answer
    engine       the rest of a step

Stages are timed by standing in for the functions that do them, which costs about 2 % of a decode step. CPU time of the
process is given beside wall time: on a shared machine only the first can be compared from run to run.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.records import describe_run, write_json
from benchmarks.serving_workload import Workload, at_once
from vmem_kv.engine.engine import Engine
from vmem_kv.engine.llm import make_config
from vmem_kv.engine.request import Request
from vmem_kv.engine.sampling_params import SamplingParams
from vmem_kv.models import load

STAGES = ("schedule", "prepare", "attention", "linears", "model", "sample", "answers", "engine")
FORWARD = ("attention", "linears", "model")
KINDS = {"decode": "decode", "prompts": "prompts"}


class Stopwatch:
    """Sums wall and CPU seconds by name."""

    def __init__(self) -> None:
        self.wall_s: dict[str, float] = defaultdict(float)
        self.cpu_s: dict[str, float] = defaultdict(float)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed."""

        def run(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.wall_s[name] += time.perf_counter() - wall
                self.cpu_s[name] += time.process_time() - cpu

        return run

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return what was summed since the last call."""
        taken = dict(self.wall_s), dict(self.cpu_s)
        self.wall_s.clear()
        self.cpu_s.clear()
        return taken


def instrument(engine: Engine, model: torch.nn.Module, watch: Stopwatch) -> None:
    """Stand in for the functions of each stage, for good: the engine is not to be used for anything else."""
    route: Any = engine.route
    scheduler: Any = engine._scheduler
    memory: Any = engine.memory
    sampler: Any = engine._sampler
    scheduler.schedule = watch.timed("schedule", scheduler.schedule)
    memory.grow = watch.timed("schedule", memory.grow)
    route.prepare = watch.timed("prepare", route.prepare)
    route.run = watch.timed("run", route.run)
    sampler.sample = watch.timed("sample", sampler.sample)
    for kernel in {id(k): k for k in getattr(route, "_kernels", ())}.values():  # the rows route has none of ours
        kernel._attend = watch.timed("attention", kernel._attend)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.forward = watch.timed("linears", module.forward)  # type: ignore[method-assign]
    answers: Any = engine._answers.values()
    for answer in answers:
        answer.add = watch.timed("answers", answer.add)


def profile(
    engine: Engine, model: torch.nn.Module, workload: Workload, sampling: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Serve requests; return seconds by kind of step and stage. They are greedy unless parameters are given."""
    for seed, ask in enumerate(workload.asks):
        chosen = {"temperature": 0.0} if sampling is None else {"seed": seed, **sampling}
        engine.add(Request(ask.prompt, SamplingParams(max_tokens=ask.n_output, ignore_eos=True, **chosen)))
    watch = Stopwatch()
    instrument(engine, model, watch)
    step = watch.timed("step", engine.step)
    sums = {kind: (defaultdict[str, float](float), defaultdict[str, float](float)) for kind in KINDS}
    n_steps = dict.fromkeys(KINDS, 0)
    while engine.has_work:
        before = engine.snapshot()
        step()
        kind = "prompts" if engine.snapshot().n_prompt_tokens > before.n_prompt_tokens else "decode"
        n_steps[kind] += 1
        for totals, taken in zip(sums[kind], watch.take(), strict=True):
            for name, seconds in _stages(taken).items():
                totals[name] += seconds
    return {
        kind: {
            "n_steps": n_steps[kind],
            "wall_s": dict(wall),
            "cpu_s": dict(cpu),
            "overhead_share": _overhead_share(wall),
            "cpu_overhead_share": _overhead_share(cpu),
        }
        for kind, (wall, cpu) in sums.items()
        if n_steps[kind]
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Profile; print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving_profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompts", type=int, nargs=2, default=[64, 768], metavar="N")
    parser.add_argument("--outputs", type=int, nargs=2, default=[32, 256], metavar="N")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--route", default="auto")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--max-batch-tokens", type=int, default=512)
    parser.add_argument(
        "--sampled",
        type=_parameter,
        nargs="*",
        metavar="NAME=VALUE",
        help="draw tokens instead of taking the likeliest; parameters such as temperature=0.8 top_p=0.9",
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    run = describe_run()
    model, tokenizer = load(options.model, dtype=options.dtype)
    config = make_config(
        max_num_seqs=options.max_num_seqs,
        max_batch_tokens=options.max_batch_tokens,
        prefix_caching=False,  # no prompts have anything in common
        route=options.route,
        kernel=options.kernel,
    )
    engine = Engine(model, tokenizer, config)
    workload = at_once(options.requests, options.prompts, options.outputs, engine.vocabulary, seed=0)
    wall, cpu = time.perf_counter(), time.process_time()
    stages = profile(engine, model, workload, None if options.sampled is None else dict(options.sampled))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    n_tokens = engine.snapshot().n_generated_tokens
    engine.close()
    run["load_average_at_end"] = os.getloadavg()[0]
    record = {
        "run": run,
        "settings": {name: value for name, value in vars(options).items() if name != "json"},
        "n_generated_tokens": n_tokens,
        "tokens_per_s": n_tokens / wall,
        "tokens_per_cpu_s": n_tokens / cpu,
        "stages": stages,
    }
    _print(Console(), record)
    if options.json:
        write_json(options.json, "serving_profile", record)
    return record


def _parameter(text: str) -> tuple[str, int | float]:
    name, _, value = text.partition("=")
    return name, float(value) if "." in value else int(value)


def _stages(seconds: dict[str, float]) -> dict[str, float]:
    """Turn what was timed into parts that do not overlap."""
    found = {name: seconds.get(name, 0.0) for name in STAGES}
    found["model"] = seconds.get("run", 0.0) - found["attention"] - found["linears"]
    found["engine"] = seconds["step"] - sum(found[name] for name in STAGES if name != "engine")
    return found


def _overhead_share(seconds: dict[str, float]) -> float:
    """Return the share of a step that is not the model's forward pass."""
    return 1 - sum(seconds[name] for name in FORWARD) / sum(seconds.values())


def _print(console: Console, record: dict[str, Any]) -> None:
    table = Table(title=f"{record['tokens_per_s']:.1f} tokens/s, {record['tokens_per_cpu_s']:.1f} per CPU second")
    table.add_column("stage")
    for kind in record["stages"]:
        for column in ("ms", "%", "CPU %"):
            table.add_column(f"{KINDS[kind]}\n{column}", justify="right")
    for stage in STAGES:
        cells = []
        for of_kind in record["stages"].values():
            wall, cpu = of_kind["wall_s"], of_kind["cpu_s"]
            cells.append(f"{wall[stage] * 1e3 / of_kind['n_steps']:.2f}")
            cells += [f"{100 * part[stage] / sum(part.values()):.1f}" for part in (wall, cpu)]
        table.add_row(stage, *cells)
    console.print(table)
    for kind, of_kind in record["stages"].items():
        shares = f"{of_kind['overhead_share']:.1%} of the time, {of_kind['cpu_overhead_share']:.1%} of CPU time"
        console.print(f"{KINDS[kind]}: {of_kind['n_steps']} steps; outside the forward pass {shares}", highlight=False)


if __name__ == "__main__":
    main()
