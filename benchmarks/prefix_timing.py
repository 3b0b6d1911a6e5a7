"""Can one client tell by time what another has asked? An audit of cached prefixes.

    python -m benchmarks.prefix_timing [--model NAME] [--samples 250] [--runs 3] [--json FILE]

Somebody asks a prompt. Then the auditor asks a prompt, and times its first token: half of the times the very same
prompt, half of the times another one. In each run there are as many samples of either kind, in random order, of two
auditors: one of *another* sharing domain, who must not see a difference, and one of the *same* domain, who must see
one: if he does not, the audit is blind, and the other's result means nothing. The two distributions are compared by
Kolmogorov and Smirnov's test.

The times are the engine's own, without HTTP: what a client measures has all of this in it, and noise besides.

The program fails (exit 1, when all is written) where the other domain's auditor sees a difference in any run
(p <= 0.01; by chance alone about one audit of three runs in 33), or the same domain's does not.
"""

from __future__ import annotations

import argparse
import bisect
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.records import describe_run, warn_if_busy, write_json
from benchmarks.systems import load_model
from vmem_kv.engine.engine import Engine
from vmem_kv.engine.llm import make_config
from vmem_kv.engine.request import Request
from vmem_kv.engine.sampling_params import SamplingParams

LEAST_P = 0.01
OWNER = "owner"
AUDITORS = {"another": "auditor", "same": OWNER}
"""By what they share with the owner, their domains."""
N_WARM_UP = 4
RANDOM = "random"


@dataclass(frozen=True, slots=True)
class Seen:
    """What one auditor saw in one run. Times to first token in milliseconds."""

    run: int
    auditor: str
    n_samples: int  # of either kind
    asked_before_ms: float  # median
    not_asked_ms: float
    distance: float  # Kolmogorov and Smirnov's
    p: float

    @property
    def sees_a_difference(self) -> bool:
        """Whether chance does not explain it."""
        return self.p <= LEAST_P

    @property
    def is_as_it_should_be(self) -> bool:
        """Whether he sees one if, and only if, he is of the same domain."""
        return self.sees_a_difference == (self.auditor == "same")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the program; return its record."""
    options = parse(arguments)
    console = Console()
    warn_if_busy(console)
    described = describe_run()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = random_model() if options.model == RANDOM else load_model(options.model, "float32")
    engine = Engine(model, None, make_config(max_num_seqs=2))
    try:
        rng = random.Random(options.seed)
        audit(engine, "warm up", N_WARM_UP, options.tokens, rng)
        seen = [
            compare(run, auditor, *audit(engine, domain, options.samples, options.tokens, rng))
            for run in range(options.runs)
            for auditor, domain in AUDITORS.items()
        ]
    finally:
        engine.close()
    record = {
        "run": described,
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()},
        "seen": [{**asdict(s), "sees_a_difference": s.sees_a_difference} for s in seen],
        "verdict": verdict(seen),
    }
    print_table(console, seen)
    console.print(record["verdict"])
    if options.json:
        write_json(options.json, "prefix_timing", record)
    if not all(s.is_as_it_should_be for s in seen):
        raise SystemExit(1)
    return record


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prefix_timing",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=RANDOM, help='a folder, a GGUF file, a name on the hub, "tiny", or "random"; random')
    add("--samples", type=int, default=250, metavar="N", help="of either kind, in each run; 250")
    add("--runs", type=int, default=3, metavar="N", help="3")
    add("--tokens", type=int, default=250, metavar="N", help="of a prompt; 250")
    add("--threads", type=int, metavar="N")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    options = parser.parse_args(arguments)
    if min(options.samples, options.runs, options.tokens) < 1:
        parser.error("--samples, --runs and --tokens must be at least 1")
    return options


def random_model() -> PreTrainedModel:
    """A random model of which a prompt takes long enough to be told from noise, and short enough to be asked often."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1_000,
        hidden_size=384,
        intermediate_size=1_024,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1_024,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model


def audit(
    engine: Engine, domain: str, n_samples: int, n_tokens: int, rng: random.Random
) -> tuple[list[float], list[float]]:
    """Let an auditor ask; return his times to first token for prompts that the owner asked before, and for others."""
    asked: list[float] = []
    not_asked: list[float] = []
    kinds = [asked, not_asked] * n_samples
    rng.shuffle(kinds)
    for kind in kinds:
        owners = _prompt(engine, n_tokens, rng)
        first_token_ms(engine, owners, OWNER)
        auditors = owners if kind is asked else _prompt(engine, n_tokens, rng)
        kind.append(first_token_ms(engine, auditors, domain))
    return asked, not_asked


def first_token_ms(engine: Engine, prompt: tuple[int, ...], domain: str) -> float:
    """Ask for one token; return how long that took."""
    request = Request(prompt, SamplingParams(temperature=0.0, max_tokens=1), domain=domain)
    began = time.perf_counter()
    engine.add(request)
    while engine.has_work:
        for update in engine.step():
            if update.error is not None:
                raise update.error
    return (time.perf_counter() - began) * 1e3


def compare(run: int, auditor: str, asked: Sequence[float], not_asked: Sequence[float]) -> Seen:
    """Hold two samples of equal size against each other."""
    distance = ks_distance(asked, not_asked)
    p = ks_p(distance, len(asked), len(not_asked))
    return Seen(run, auditor, len(asked), statistics.median(asked), statistics.median(not_asked), distance, p)


def ks_distance(left: Sequence[float], right: Sequence[float]) -> float:
    """The largest distance between the two samples' distribution functions."""
    a, b = sorted(left), sorted(right)
    return max(abs(bisect.bisect_right(a, x) / len(a) - bisect.bisect_right(b, x) / len(b)) for x in (*a, *b))


def ks_p(distance: float, n_left: int, n_right: int) -> float:
    """The chance of such a distance or a larger one between samples of one distribution (Kolmogorov's limit)."""
    root = math.sqrt(n_left * n_right / (n_left + n_right))
    x = (root + 0.12 + 0.11 / root) * distance  # Stephens' correction for small samples
    if x < 0.2:
        return 1.0  # to twelve digits; the series below converges slowly there
    series: float = sum((-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 101))
    return min(1.0, max(0.0, 2 * series))


def verdict(seen: Sequence[Seen]) -> str:
    """Say what came out."""
    if any(s.auditor == "same" and not s.sees_a_difference for s in seen):
        return "BLIND: who shares the domain sees no difference, so that the other's result means nothing"
    n_seen = sum(s.auditor == "another" and s.sees_a_difference for s in seen)
    if n_seen:
        return f"LEAK: who does not share the domain sees a difference in {n_seen} runs"
    return "pass: who shares the domain sees what was asked before, and nobody else does"


def print_table(console: Console, seen: Sequence[Seen]) -> None:
    """Print what was seen."""
    table = Table(title="Time to first token, ms (median)")
    for column in ("run", "auditor's domain", "asked before", "not asked", "distance", "p"):
        table.add_column(column, justify="right")
    for s in seen:
        times = (f"{s.asked_before_ms:.2f}", f"{s.not_asked_ms:.2f}")
        table.add_row(str(s.run + 1), s.auditor, *times, f"{s.distance:.3f}", f"{s.p:.2g}")
    console.print(table)


def _prompt(engine: Engine, n_tokens: int, rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randrange(3, engine.vocabulary) for _ in range(n_tokens))


if __name__ == "__main__":
    main()
