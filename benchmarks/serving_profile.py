"""Where a serving step's time goes: the model's forward pass, and what is ours around it.

    python -m benchmarks.serving_profile [MODEL] [--requests 16] [--threads 2]

Runs one workload through the engine and reports, for steps that only decode and for those that also compute prompts,
the time of schedule, prepare, run and commit. CPU time of the process is given beside wall time: on a shared machine
only the first can be compared from run to run.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from vmem_kv.engine.engine import Engine
from vmem_kv.engine.llm import make_config
from vmem_kv.engine.request import Request
from vmem_kv.engine.sampling_params import SamplingParams
from vmem_kv.models import load


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


def requests_of(n: int, vocabulary: int, seed: int = 0) -> list[Request]:
    """Random prompts of 64 to 768 tokens with answers of 32 to 256."""
    rng = random.Random(seed)
    return [
        Request(
            tuple(rng.randrange(100, vocabulary) for _ in range(rng.randint(64, 768))),
            SamplingParams(temperature=0.0, max_tokens=rng.randint(32, 256), ignore_eos=True),
        )
        for _ in range(n)
    ]


def profile(engine: Engine, requests: list[Request]) -> dict[str, Any]:
    """Serve requests; return seconds by kind of step and stage."""
    watches = {"decode": Stopwatch(), "prompts": Stopwatch()}
    stages = {"prepare": engine.route.prepare, "run": engine.route.run}
    for request in requests:
        engine.add(request)
    n_steps = dict.fromkeys(watches, 0)
    while engine.has_work:
        before = engine.snapshot()
        watch = Stopwatch()
        for name, function in stages.items():
            setattr(engine.route, name, watch.timed(name, function))
        watch.timed("step", engine.step)()
        kind = "prompts" if engine.snapshot().n_prompt_tokens > before.n_prompt_tokens else "decode"
        n_steps[kind] += 1
        for name in watch.wall_s:
            watches[kind].wall_s[name] += watch.wall_s[name]
            watches[kind].cpu_s[name] += watch.cpu_s[name]
    for name, function in stages.items():
        setattr(engine.route, name, function)
    return {
        kind: {
            "n_steps": n_steps[kind],
            "wall_s": dict(watch.wall_s),
            "cpu_s": dict(watch.cpu_s),
            "overhead_share": 1 - watch.wall_s["run"] / watch.wall_s["step"],
            "cpu_overhead_share": 1 - watch.cpu_s["run"] / watch.cpu_s["step"],
        }
        for kind, watch in watches.items()
        if n_steps[kind]
    }


def main() -> None:
    """Profile and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--route", default="auto")
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--max-batch-tokens", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = load(options.model, dtype=options.dtype)
    config = make_config(
        max_num_seqs=options.max_num_seqs, max_batch_tokens=options.max_batch_tokens, route=options.route
    )
    engine = Engine(model, tokenizer, config)
    requests = requests_of(options.requests, min(engine.vocabulary, 40_000))
    wall, cpu = time.perf_counter(), time.process_time()
    stages = profile(engine, requests)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    stats = engine.snapshot()
    n_live_pages = max(1, stats.cache.n_peak_owned_pages)
    result = {
        "n_generated_tokens": stats.n_generated_tokens,
        "tokens_per_s": stats.n_generated_tokens / wall,
        "tokens_per_cpu_s": stats.n_generated_tokens / cpu,
        "n_preempted": stats.n_preempted,
        "peak_kv_bytes": n_live_pages * stats.page_bytes,
        "layout": engine.memory.choice.why,
        "stages": stages,
    }
    engine.close()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
