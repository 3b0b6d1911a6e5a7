"""What cached prefixes are worth: time to first token, hit against miss, and throughput on prompts that begin alike.

    python -m benchmarks.prefix [--quick] [--peers continuous] [--vllm-python FILE] [--json FILE]

Time to first token, of this engine, one request at a time, in rounds. Each round has a new shared prompt:

    miss     nobody has computed any of it
    fork     another request began with it: pages are shared, less than one in each plane is copied
    adopt    the conversation goes on: its slot is taken over, nothing is mapped or copied

Throughput: requests that begin alike and end differently, all at once, answered by this engine, by the same engine
without prefix caching and, with --peers, by transformers' continuous batching (benchmarks/serving_systems.py), one
after another in turns; and by vLLM's CPU build with its prefix caching, in a process of its own, the rounds one after
another when the others are done. All give equally many tokens; answers must be equal with and without sharing.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.records import Spread, Target, describe_run, print_targets, warn_if_busy, write_json
from benchmarks.serving import visit
from benchmarks.serving_log import Log
from benchmarks.serving_systems import PAGE_TOKENS, Setting, open_system
from benchmarks.serving_visit import to_job
from benchmarks.serving_workload import Ask, Workload
from benchmarks.systems import TINY, load_model
from vmem_kv import models
from vmem_kv.engine.engine import Engine
from vmem_kv.engine.llm import make_config
from vmem_kv.engine.request import Request
from vmem_kv.engine.sampling_params import SamplingParams

LEAST_SPEEDUP = 10.0
SHARED, ALONE = "vmem_kv", "vmem_kv, nothing shared"
FIRST_TOKEN_ID = 3
QUICK = {"tokens": 200, "rounds": 2, "requests": 4}
FULL = {"tokens": 2000, "rounds": 5, "requests": 16}


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Seconds to the first token, over the rounds."""

    n_shared_tokens: int
    n_own_tokens: int
    miss_s: Spread
    fork_s: Spread
    adopt_s: Spread
    fork_speedup: Spread  # of a hit over the miss of its round
    adopt_speedup: Spread
    n_cached_tokens: tuple[int, int]  # of the fork and of the adoption, in the last round


@dataclass(frozen=True, slots=True)
class Served:
    """One system on the workload of prompts that begin alike."""

    system: str
    seconds: Spread
    tokens_per_s: Spread  # generated
    speedup: Spread  # over the engine that shares nothing, turn by turn
    n_prompt_tokens_computed: int | None  # None where the system does not say
    equal_answers: bool


class Server(Protocol):
    """Who answers a workload."""

    def __call__(self, workload: Workload) -> list[tuple[int, ...]]:
        """Answer everything; return the answers."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the program; return its record."""
    options = parse(arguments)
    console = Console()
    warn_if_busy(console)
    described = describe_run()
    if options.threads is None:
        options.threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    first = measure_first_token(options)
    served = measure_throughput(options)
    targets = [
        Target(
            f"time to first token of a {options.tokens:,}-token shared prompt, miss over hit",
            LEAST_SPEEDUP,
            True,
            (("fork", first.fork_speedup), ("adopt", first.adopt_speedup)),
        )
    ]
    print_tables(console, first, served)
    print_targets(console, targets)
    record = {
        "run": described,
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()},
        "targets": [target.to_json() for target in targets],
        "first_token": asdict(first),
        "served": [asdict(s) for s in served],
    }
    if options.json:
        write_json(options.json, "prefix", record)
    return record


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prefix", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", help='a folder, a GGUF file, a name on the hub, or "tiny"; default SmolLM2-135M-Instruct')
    add("--quick", action="store_true", help=f"smaller defaults: {QUICK}")
    add("--tokens", type=int, metavar="N", help=f"of the shared prompt; {FULL['tokens']}")
    add("--own", type=int, default=20, metavar="N", help="tokens that each prompt has for itself; 20")
    add("--rounds", type=int, metavar="N", help=f"{FULL['rounds']}")
    add("--requests", type=int, metavar="N", help=f"of the throughput's workload; {FULL['requests']}")
    add("--outputs", type=int, default=16, metavar="N", help="tokens of each of its answers; 16")
    add("--peers", nargs="*", default=[], choices=("continuous",), help="who else serves it")
    add("--vllm-python", type=Path, metavar="FILE", help="an interpreter that has vLLM's CPU build: it serves, too")
    add("--timeout", type=float, default=1800.0, metavar="S", help="of vLLM's visit")
    add("--threads", type=int, metavar="N")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    options = parser.parse_args(arguments)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if min(options.tokens, options.own, options.rounds, options.requests, options.outputs) < 1:
        parser.error("--tokens, --own, --rounds, --requests and --outputs must be at least 1")
    if (options.peers or options.vllm_python) and options.model == TINY:
        parser.error("peers load a model from a folder; the tiny one is in none")
    return options


def measure_first_token(options: argparse.Namespace) -> FirstToken:
    """Ask three times in each round: for what is new, for what begins alike, and for what goes on."""
    rng = random.Random(options.seed)
    seconds: dict[str, list[float]] = {"miss": [], "fork": [], "adopt": []}
    n_cached = {"fork": 0, "adopt": 0}
    engine = Engine(load_model(options.model, "float32"), None, make_config())
    with closing(engine):
        tokens = partial(_tokens, rng, engine.vocabulary)
        ask(engine, tokens(64))
        for _ in range(options.rounds):
            shared = tokens(options.tokens)
            conversation = (*shared, *tokens(options.own))
            seconds["miss"].append(ask(engine, conversation)[0])
            for kind, prompt in (
                ("fork", (*shared, *tokens(options.own))),
                ("adopt", (*conversation, *tokens(options.own))),
            ):
                taken_s, n_cached[kind] = ask(engine, prompt)
                seconds[kind].append(taken_s)
    return FirstToken(
        n_shared_tokens=options.tokens,
        n_own_tokens=options.own,
        miss_s=Spread.of(seconds["miss"]),
        fork_s=Spread.of(seconds["fork"]),
        adopt_s=Spread.of(seconds["adopt"]),
        fork_speedup=Spread.of_ratios(seconds["miss"], seconds["fork"]),
        adopt_speedup=Spread.of_ratios(seconds["miss"], seconds["adopt"]),
        n_cached_tokens=(n_cached["fork"], n_cached["adopt"]),
    )


def ask(engine: Engine, prompt: tuple[int, ...]) -> tuple[float, int]:
    """Ask for one token; return how long that took, and how many tokens of the prompt were cached."""
    engine.add(Request(prompt, SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)))
    n_cached = 0
    began = time.perf_counter()
    while engine.has_work:
        for update in engine.step():
            if update.error is not None:
                raise update.error
            n_cached = update.n_cached_tokens
    return time.perf_counter() - began, n_cached


def measure_throughput(options: argparse.Namespace) -> list[Served]:
    """Let the systems serve in turns, a workload of its own in each round."""
    rng = random.Random(options.seed + 1)
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(
                closing(Engine(load_model(options.model, "float32"), None, make_config(prefix_caching=is_shared)))
            )
            for name, is_shared in ((SHARED, True), (ALONE, False))
        }
        servers: dict[str, Server] = {name: partial(serve, engine) for name, engine in engines.items()}
        setting = _setting(options, engines[SHARED].snapshot().token_bytes)
        for peer in options.peers:
            system, _ = stack.enter_context(open_system(peer, setting))
            servers[peer] = partial(serve_by_peer, system)
        vocabulary = engines[SHARED].vocabulary
        warm_up = workload_of(rng, vocabulary, 2, 32, options.own, 2)
        for server in servers.values():
            server(warm_up)
        n_before = {name: engine.snapshot().n_prompt_tokens for name, engine in engines.items()}
        seconds: dict[str, list[float]] = {name: [] for name in servers}
        answers: dict[str, list[list[tuple[int, ...]]]] = {name: [] for name in servers}
        workloads = [
            workload_of(rng, vocabulary, options.requests, options.tokens, options.own, options.outputs)
            for _ in range(options.rounds)
        ]
        for workload in workloads:
            for name, server in servers.items():
                began = time.perf_counter()
                answers[name].append(server(workload))
                seconds[name].append(time.perf_counter() - began)
        n_computed = {name: engine.snapshot().n_prompt_tokens - n_before[name] for name, engine in engines.items()}
    if options.vllm_python:
        job = to_job("vllm", setting, warm_up, workloads)
        visits = visit(options.vllm_python, job, options)
        seconds["vllm"], answers["vllm"] = [v["wall_s"] for v in visits], []
    n_generated = options.requests * options.outputs
    return [
        Served(
            name,
            Spread.of(seconds[name]),
            Spread.of(n_generated / s for s in seconds[name]),
            Spread.of_ratios(seconds[ALONE], seconds[name]),
            n_computed.get(name),
            answers[name] == answers[ALONE],
        )
        for name in seconds
    ]


def _setting(options: argparse.Namespace, token_bytes: int) -> Setting:
    """What peers are opened with: the model as a folder, and memory for all requests as if nothing were shared."""
    n_tokens = options.tokens + options.own + options.outputs + PAGE_TOKENS
    folder = TINY if options.model == TINY else models.resolve(options.model)
    return Setting(
        folder,
        "float32",
        options.threads,
        token_bytes=token_bytes,
        kv_bytes=options.requests * n_tokens * token_bytes,
        vllm_options=(("enable_prefix_caching", True),),
    )


def workload_of(rng: random.Random, vocabulary: int, n: int, n_shared: int, n_own: int, n_output: int) -> Workload:
    """Requests that begin with the same tokens and go on with their own."""
    shared = _tokens(rng, vocabulary, n_shared)
    asks = (Ask(0.0, (*shared, *_tokens(rng, vocabulary, n_own)), n_output) for _ in range(n))
    return Workload("shared prefix", tuple(asks))


def serve(engine: Engine, workload: Workload) -> list[tuple[int, ...]]:
    """Answer a workload with this engine."""
    params = [SamplingParams(temperature=0.0, max_tokens=ask.n_output, ignore_eos=True) for ask in workload.asks]
    requests = [Request(ask.prompt, p) for ask, p in zip(workload.asks, params, strict=True)]
    answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for update in engine.step():
            if update.error is not None:
                raise update.error
            answers[update.request_id] += update.token_ids
    return [tuple(answers[request.request_id]) for request in requests]


def serve_by_peer(system: Any, workload: Workload) -> list[tuple[int, ...]]:
    """Answer a workload with another system. Its answers are not kept: nobody holds them against ours here."""
    system.serve(workload, Log(workload, 1))
    return []


def print_tables(console: Console, first: FirstToken, served: Sequence[Served]) -> None:
    """Print what was measured."""
    title = f"Time to first token: {first.n_shared_tokens:,} shared tokens, {first.n_own_tokens} own ones"
    table = Table(title=title)
    for column in ("", "ms", "times faster", "tokens cached"):
        table.add_column(column, justify="right")
    ms = [
        Spread(s.median * 1e3, s.low * 1e3, s.high * 1e3).show(0) for s in (first.miss_s, first.fork_s, first.adopt_s)
    ]
    table.add_row("miss", ms[0], "", "0")
    table.add_row("fork", ms[1], first.fork_speedup.show(1), f"{first.n_cached_tokens[0]:,}")
    table.add_row("adopt", ms[2], first.adopt_speedup.show(1), f"{first.n_cached_tokens[1]:,}")
    console.print(table)
    table = Table(title="Requests that begin alike, all at once")
    for column in ("system", "seconds", "tokens/s", "times faster", "prompt tokens computed", "equal answers"):
        table.add_column(column, justify="right")
    for s in served:
        computed = "" if s.n_prompt_tokens_computed is None else f"{s.n_prompt_tokens_computed:,}"
        equal = ("yes" if s.equal_answers else "NO") if s.system in (SHARED, ALONE) else ""
        table.add_row(s.system, s.seconds.show(), s.tokens_per_s.show(1), s.speedup.show(2), computed, equal)
    console.print(table)


def _tokens(rng: random.Random, vocabulary: int, n: int) -> tuple[int, ...]:
    return tuple(rng.randrange(FIRST_TOKEN_ID, vocabulary) for _ in range(n))


if __name__ == "__main__":
    main()
