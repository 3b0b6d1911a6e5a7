"""Beam search over a long prompt: memory of K and V and time per step, VmemCache against DynamicCache.

    python -m benchmarks.beams [--prompt 2000] [--beams 4] [--steps 32] [--json FILE]

Two ways to begin: `plain`, where `generate` runs the prompt once per beam, and `once`, where the prompt is run once and
the cache's row repeated. The program fails (exit 1) if a cache changes which tokens come out. For orientation.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, PreTrainedModel

from benchmarks.process import settle
from benchmarks.records import describe_run, warn_if_busy, write_json
from benchmarks.systems import TINY, load_model
from vmem_kv import VmemCache

CACHES = ("vmem", "dynamic")
BEGINNINGS = ("plain", "once")


@dataclass(frozen=True, slots=True)
class Visit:
    """One beam search. Bytes of K and V; milliseconds, medians over the steps."""

    cache: str
    beginning: str
    round: int
    peak_bytes: int
    """For `dynamic`: what it held, with the one tensor that exists twice while it is reordered."""
    end_bytes: int
    step_ms: float
    reorder_ms: float
    worst_reorder_ms: float


class Timed:
    """Times what stands in `with`, often."""

    def __init__(self) -> None:
        self.milliseconds: list[float] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.milliseconds.append((time.perf_counter() - start) * 1000)


class TimedVmem(VmemCache):
    """Ours, with its reorders timed."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        with self.timed():
            super().reorder_cache(beam_idx)

    def kv_bytes(self) -> tuple[int, int]:
        """The most that was owned, and what is owned now."""
        stats = self.stats()
        return stats.peak_bytes, stats.owned_bytes


class TimedDynamic(DynamicCache):
    """The stock cache, with its reorders timed and its tensors added up."""

    peak_bytes = 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.peak_bytes = max(self.peak_bytes, self.kv_bytes()[0])
        with self.timed():
            super().reorder_cache(beam_idx)

    def kv_bytes(self) -> tuple[int, int]:
        """The most that there was at once, and what there is now."""
        tensors = [t.untyped_storage().nbytes() for layer in self.layers for t in (layer.keys, layer.values)]
        return max(self.peak_bytes, sum(tensors) + max(tensors)), sum(tensors)

    def close(self) -> None:
        """Nothing: the tensors go with the cache."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the program; return its record."""
    options = parse(arguments)
    console = Console()
    warn_if_busy(console)
    run = describe_run() | {"threads": torch.get_num_threads()}
    model = load_model(options.model, options.dtype)
    prompt = torch.randint(model.config.vocab_size, (1, options.prompt), generator=torch.Generator().manual_seed(0))
    visits: list[Visit] = []
    outputs: list[torch.Tensor] = []
    for round_index in range(options.rounds):
        for cache in CACHES if round_index % 2 == 0 else CACHES[::-1]:
            for beginning in BEGINNINGS:
                visit, tokens = measure(model, prompt, options, cache, beginning, round_index)
                visits.append(visit)
                outputs.append(tokens)
    n_live_bytes = live_bytes(model, options)
    record: dict[str, Any] = {
        "run": run,
        "settings": {name: value for name, value in vars(options).items() if name != "json"},
        "live_bytes": n_live_bytes,
        "tokens_are_equal": all(torch.equal(tokens, outputs[0]) for tokens in outputs),
        "visits": [asdict(visit) for visit in visits],
    }
    print_table(console, visits, n_live_bytes)
    if options.json:
        write_json(options.json, "beams", record)
    if not record["tokens_are_equal"]:
        raise SystemExit("FAILED, the numbers above mean nothing: the caches give different tokens")
    return record


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.beams", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", help=f"folder, GGUF file or hub name; {TINY!r}: two random layers; default SmolLM2-135M")
    add("--prompt", type=int, default=2000, metavar="N", help="tokens of the prompt; 2,000")
    add("--beams", type=int, default=4, metavar="N", help="4")
    add("--steps", type=int, default=32, metavar="N", help="new tokens; 32")
    add("--rounds", type=int, default=1, metavar="N", help="turns of every system; 1")
    add("--dtype", default="float32")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    options = parser.parse_args(arguments)
    if options.beams < 2 or options.steps < 2 or options.prompt < 2 or options.rounds < 1:
        parser.error("--beams, --steps and --prompt must be at least 2, --rounds at least 1")
    return options


def measure(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    options: argparse.Namespace,
    kind: str,
    beginning: str,
    round_index: int,
) -> tuple[Visit, torch.Tensor]:
    """Run one beam search; return what it took, and its tokens."""
    settle()
    cache: Any = TimedVmem(model.config) if kind == "vmem" else TimedDynamic(config=model.config)
    cache.timed = Timed()
    ends: list[float] = []

    def note_the_time(input_ids: torch.Tensor, scores: torch.Tensor, **rest: Any) -> torch.Tensor:
        ends.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    with torch.inference_mode():
        if beginning == "once":
            model(prompt[:, :-1], past_key_values=cache)
            cache.batch_repeat_interleave(options.beams)
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            num_beams=options.beams,
            do_sample=False,
            min_new_tokens=options.steps,
            max_new_tokens=options.steps,
            stopping_criteria=[note_the_time],
        )
    peak_bytes, end_bytes = cache.kv_bytes()
    cache.close()
    steps = [(b - a) * 1000 for a, b in pairwise(ends)]
    reorders = cache.timed.milliseconds
    visit = Visit(
        kind,
        beginning,
        round_index,
        peak_bytes,
        end_bytes,
        statistics.median(steps),
        statistics.median(reorders),
        max(reorders),
    )
    return visit, tokens.clone()


def live_bytes(model: PreTrainedModel, options: argparse.Namespace) -> int:
    """What the prompt takes once, and the new tokens once per beam."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize
    return int(token_bytes * (options.prompt + options.beams * options.steps))


def print_table(console: Console, visits: Sequence[Visit], n_live_bytes: int) -> None:
    """Show every visit."""
    table = Table(title=f"Prompt once and new tokens of every beam: {n_live_bytes / 2**20:.0f} MiB")
    for column in ("cache", "beginning", "peak MiB", "end MiB", "step ms", "reorder ms", "worst reorder ms"):
        table.add_column(column, justify="right")
    for v in visits:
        sizes = (f"{n_bytes / 2**20:.0f}" for n_bytes in (v.peak_bytes, v.end_bytes))
        times = (f"{ms:.1f}" for ms in (v.step_ms, v.reorder_ms, v.worst_reorder_ms))
        table.add_row(v.cache, v.beginning, *sizes, *times)
    console.print(table)


if __name__ == "__main__":
    main()
