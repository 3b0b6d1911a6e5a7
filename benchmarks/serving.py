"""This engine against others on the same requests: speed, latencies, memory of K and V.

    python -m benchmarks.serving [--quick] [--trace azure2023_conv.csv.gz] [--vllm-python VENV/bin/python]
                                 [--json FILE] [--plot FILE.png]
    python -m benchmarks.serving --redraw FILE.json --plot FILE.png

Engines (`serving_systems.py`): this one; transformers' generate in static batches; transformers' continuous batching;
vLLM's CPU build, where --vllm-python names an interpreter that has it (or this one has). Each serves in a process of
its own, one after another, with the same dtype, the same number of threads and answers of the same lengths.

Workloads (`serving_workload.py`): all requests at once; the same arriving at random; a trace, scaled. In each round
this engine serves before the first peer, between any two of them and behind the last one, and a peer is held against
the mean of its two neighbours: the machine's own changes cancel out. Medians over the rounds.

The default takes some 11 minutes on two quiet cores. At the end the table for the README is printed. The program fails
(exit 1, when all is written) where more than one in ten greedy answers in float32 is not this engine's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.records import ROOT, describe_run, print_targets, warn_if_busy, write_json
from benchmarks.serving_report import (
    OURS,
    SYSTEMS,
    draw,
    equal_share,
    evaluate,
    print_tables,
    readme_table,
    workloads_of,
)
from benchmarks.serving_systems import PAGE_TOKENS, Setting, n_blocks_of
from benchmarks.serving_visit import to_job
from benchmarks.serving_workload import Workload, at_once, poisson, replay

LEAST_EQUAL = 90.0
"""% of the answers."""
QUICK = {"requests": 8, "arrivals": 0, "rounds": 1}
FULL = {"requests": 32, "arrivals": 10, "rounds": 1}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the program; return its record."""
    options = parse(arguments)
    console = Console()
    if options.redraw:
        record: dict[str, Any] = json.loads(options.redraw.read_text())
    else:
        warn_if_busy(console)
        record = run(options, console)
    targets = evaluate(record["visits"])
    print_tables(console, record["visits"])
    print_targets(console, targets)
    record["targets"] = [target.to_json() for target in targets]
    if options.json:
        fields = {name: record[name] for name in ("run", "settings", "targets", "visits")}
        write_json(options.json, "serving", fields)
    if options.plot:
        draw(record["visits"], options.plot)
    print(readme_table(record["visits"]))
    wrong = broken_systems(record["visits"]) if record["settings"]["dtype"] == "float32" else []
    if wrong:
        raise SystemExit(f"FAILED, the numbers above mean nothing: too few answers are {OURS}'s: {'; '.join(wrong)}")
    return record


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="folder, GGUF file or hub name; default SmolLM2-135M-Instruct")
    add("--quick", action="store_true", help=f"smaller defaults: {QUICK}")
    add("--systems", nargs="+", choices=SYSTEMS, help="default: all that there are")
    add("--workloads", nargs="+", choices=("at_once", "poisson", "trace"), help="default: all that there are")
    add("--requests", type=int, metavar="N", help=f"that arrive at once; {FULL['requests']}")
    add("--arrivals", type=int, metavar="N", help=f"that arrive one by one; {FULL['arrivals']}; 0: none")
    add("--arrival-systems", nargs="+", choices=SYSTEMS, default=[OURS, "continuous", "vllm"], metavar="SYSTEM",
        help="who serves those; static batches are left out by default, as they take long")  # fmt: skip
    add("--rate", type=float, default=1.0, metavar="R", help="requests that arrive a second, on average; 1")
    add("--trace", type=Path, metavar="FILE", help="replay the first requests of a trace with arrivals, scaled")
    add("--prompts", type=int, nargs=2, default=[64, 768], metavar="N", help="tokens of a prompt, least and most")
    add("--outputs", type=int, nargs=2, default=[32, 256], metavar="N", help="tokens of an answer, least and most")
    add("--rounds", type=int, metavar="N", help=f"{FULL['rounds']}")
    add("--seed", type=int, default=0)
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--threads", type=int, default=2, metavar="N")
    add("--vllm-python", type=Path, metavar="FILE", help="an interpreter that has vLLM's CPU build")
    add("--vllm-option", type=_named_value, action="append", default=[], metavar="NAME=VALUE",
        help="of vLLM's EngineArgs, value in JSON; it runs eagerly but for enforce_eager=false")  # fmt: skip
    add("--timeout", type=float, default=1800.0, metavar="S", help="of one engine's visit")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    add("--plot", type=Path, metavar="FILE", help="draw tokens and memory over time (PNG, SVG, PDF)")
    add("--redraw", type=Path, metavar="FILE", help="measure nothing: read what --json wrote")
    options = parser.parse_args(arguments)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if min(options.requests, options.rounds, options.threads, *options.prompts, *options.outputs) < 1:
        parser.error("--requests, --rounds, --threads, --prompts and --outputs must be at least 1")
    if options.trace is not None and options.arrivals == 1:
        parser.error("one request of a trace has no rate: --arrivals must be 0 or at least 2")
    return options


def _named_value(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE with a value in JSON") from None


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Visit every engine with every workload; return the record."""
    from transformers import AutoConfig

    from vmem_kv import models

    described = describe_run() | {"threads": options.threads}
    folder = models.resolve(options.model)
    config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config(decoder=True)
    systems = options.systems or available_systems(options.vllm_python)
    groups = workloads(options, config.vocab_size)
    token_bytes = _token_bytes(config, options.dtype)
    n_blocks = max(n_blocks_of(workload) for _, group in groups for workload in group)
    kv_bytes = n_blocks * PAGE_TOKENS * token_bytes
    setting = Setting(folder, options.dtype, options.threads, token_bytes, kv_bytes, tuple(options.vllm_option))
    warm_up = at_once(2, (16, 32), (4, 4), config.vocab_size, options.seed + 1)
    visits: list[dict[str, Any]] = []
    for round_index in range(options.rounds):
        for names, group in groups:
            chosen = [name for name in systems if name in names]
            for order, name in enumerate(turns(chosen, round_index)):
                what = " and ".join(f"{len(w.asks)} requests {w.name}" for w in group)
                console.print(f"round {round_index + 1} of {options.rounds}: {name}, {what}", highlight=False)
                python = options.vllm_python if name == "vllm" and options.vllm_python else Path(sys.executable)
                results = visit(python, to_job(name, setting, warm_up, group), options)
                visits += [{"round": round_index, "order": order, **result} for result in results]
    described["load_average_at_end"] = os.getloadavg()[0]
    not_settings = ("json", "plot", "redraw")
    settings = {n: str(v) if isinstance(v, Path) else v for n, v in vars(options).items() if n not in not_settings}
    settings |= {
        "workloads": [
            {
                "name": w.name,
                "n_requests": len(w.asks),
                "n_prompt_tokens": w.n_prompt_tokens,
                "n_output_tokens": w.n_output_tokens,
            }
            for _, group in groups
            for w in group
        ]
    }
    return {"run": described, "settings": settings, "visits": visits}


def workloads(options: argparse.Namespace, vocabulary: int) -> list[tuple[Sequence[str], list[Workload]]]:
    """Return groups of workloads that one visit serves, each with the engines that it is for."""
    wanted = options.workloads or ("at_once", "poisson", "trace")
    lengths = (options.prompts, options.outputs)
    groups: list[tuple[Sequence[str], list[Workload]]] = []
    if "at_once" in wanted:
        groups.append((SYSTEMS, [at_once(options.requests, *lengths, vocabulary, options.seed)]))
    arriving = []
    if "poisson" in wanted and options.arrivals:
        arriving.append(poisson(options.arrivals, *lengths, options.rate, vocabulary, options.seed))
    if "trace" in wanted and options.trace and options.arrivals:
        from vmem_kv.traces import read_trace

        requests = read_trace(options.trace, options.arrivals)
        rows = [(r.arrival_s or 0.0, r.prompt_tokens, r.output_tokens) for r in requests]
        name = options.trace.name.split(".")[0]
        arriving.append(replay(name, rows, *lengths, options.rate, vocabulary, options.seed))
    return [*groups, (options.arrival_systems, arriving)] if arriving else groups


def turns(systems: Sequence[str], round_index: int) -> Iterator[str]:
    """Yield the engines in a round's order: the peers in turn, and this one around each of them."""
    peers = [name for name in systems if name != OURS]
    first = round_index % max(1, len(peers))
    if OURS in systems:
        yield OURS
    for name in [*peers[first:], *peers[:first]]:
        yield name
        if OURS in systems:
            yield OURS


def available_systems(vllm_python: Path | None) -> list[str]:
    """Return all engines that can be visited."""
    has_vllm = vllm_python is not None or importlib.util.find_spec("vllm") is not None
    return [name for name in SYSTEMS if name != "vllm" or has_vllm]


def visit(python: Path, job: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Start a process for one visit, and wait for it.

    Raises:
        SystemExit: It failed; what it wrote is shown.
    """
    with tempfile.TemporaryDirectory() as folder:
        job_path, result_path = Path(folder, "job.json"), Path(folder, "result.json")
        job_path.write_text(job)
        done = subprocess.run(
            [str(python), "-m", "benchmarks.serving_visit", str(job_path), str(result_path)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=options.timeout,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{done.stdout[-4000:]}\nthe visit ended with status {done.returncode}")
        results: list[dict[str, Any]] = json.loads(result_path.read_text())
        return results


def broken_systems(visits: Sequence[dict[str, Any]]) -> list[str]:
    """Name the engines whose answers are not this one's: a few may differ where two tokens are as likely."""
    return [
        f"{system}, {share:.0f} % of {workload}"
        for workload in workloads_of(visits)
        for system in SYSTEMS
        if (share := equal_share(visits, workload, system)) is not None and share < LEAST_EQUAL
    ]


def _token_bytes(config: Any, dtype: str) -> int:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    element_bytes = {"float32": 4, "bfloat16": 2}[dtype]
    return 2 * int(config.num_hidden_layers) * int(config.num_key_value_heads) * int(head_dim) * element_bytes


if __name__ == "__main__":
    main()
