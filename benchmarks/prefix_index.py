"""What the prefix index costs, without memory or a model: matching, growing and evicting among many entries.

    python -m benchmarks.prefix_index [--entries N] [--tokens N] [--rounds N] [--json FILE]

The entries share a system prompt of 2,000 tokens and differ behind it. One of them is a conversation as long as
`--tokens`, from which another branches off in every turn, so that its path has as many nodes as turns. Its prompt comes
as a list and as an array of 32-bit integers. Times are held against the least work there is in the same round: packing
the list into an array, and comparing that array with an equal one.
"""

from __future__ import annotations

import argparse
import random
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.records import Spread, Target, describe_run, print_targets, warn_if_busy, write_json
from vmem_kv.prefix import EvictionPolicy, PrefixIndex, cost_aware, lru
from vmem_kv.testing.clock import ManualClock

SYSTEM_TOKENS = 2_000
OWN_TOKENS = 1_000
TURN_TOKENS = 1_000
VOCABULARY = 128_000
POLICIES: dict[str, Callable[[], EvictionPolicy[int]]] = {"lru": lru, "cost_aware": cost_aware}


@dataclass(frozen=True, slots=True)
class Cost:
    """One operation: microseconds a call, and its ratio to the least work."""

    operation: str
    policy: str
    n_tokens: int
    us: Spread
    least_work: str
    ratio: Spread


def build(
    n_entries: int, n_tokens: int, policy: EvictionPolicy[int], rng: random.Random
) -> tuple[PrefixIndex[int], list[int]]:
    """Return an index of so many entries, and the tokens of its longest one."""
    clock = ManualClock()
    index = PrefixIndex[int](n_entries, clock, policy)
    system = rng.choices(range(VOCABULARY), k=SYSTEM_TOKENS)
    long = system + rng.choices(range(VOCABULARY), k=max(n_tokens - SYSTEM_TOKENS, TURN_TOKENS))
    index.insert("", long[:-1], 0, 1)
    branches = range(SYSTEM_TOKENS, len(long), TURN_TOKENS)
    for key in range(1, n_entries):
        clock.advance(0.1)
        stem = long[: branches[key]] if key < len(branches) else system
        index.insert("", stem + rng.choices(range(VOCABULARY), k=OWN_TOKENS), key, 1)
    return index, long


def timed_us(work: Callable[[], object], n_calls: int) -> float:
    """Return the mean microseconds of a call."""
    begin = time.perf_counter_ns()
    for _ in range(n_calls):
        work()
    return (time.perf_counter_ns() - begin) / n_calls / 1e3


def measure(policy: str, n_entries: int, n_tokens: int, n_rounds: int) -> list[Cost]:
    """Time every operation, in turns with its least work."""
    index, long = build(n_entries, n_tokens, POLICIES[policy](), random.Random(n_entries))
    packed = array("I", long)
    same = array("I", long).tobytes()
    as_bytes = packed.tobytes()
    short = [*long[:SYSTEM_TOKENS], *[VOCABULARY] * OWN_TOKENS]
    n_keys = n_entries

    def insert_and_evict() -> None:
        nonlocal n_keys
        n_keys += 1
        short[SYSTEM_TOKENS] = VOCABULARY + n_keys
        index.insert("", short, n_keys, 1)
        index.fit(lambda key: 1)

    def extend_and_cut() -> None:
        index.extend(0, short[SYSTEM_TOKENS:], 1)
        index.truncate(0, len(long) - 1, 1)

    index.pin(0)
    operations: list[tuple[str, int, Callable[[], object], str, Callable[[], object]]] = [
        ("match a list", len(long), lambda: index.match("", long), "pack", lambda: array("I", long)),
        ("match an array", len(long), lambda: index.match("", packed), "compare", lambda: as_bytes == same),
        ("match a short list", len(short), lambda: index.match("", short), "pack", lambda: array("I", short)),
        ("insert and evict", len(short), insert_and_evict, "pack", lambda: array("I", short)),
        ("extend and cut", OWN_TOKENS, extend_and_cut, "pack", lambda: array("I", short[:OWN_TOKENS])),
    ]
    costs = []
    for name, size, work, least_work, least in operations:
        n_calls = max(3, 300_000 // size)
        pairs = [(timed_us(work, n_calls), timed_us(least, n_calls)) for _ in range(n_rounds)]
        times, least_times = zip(*pairs, strict=True)
        costs.append(Cost(name, policy, size, Spread.of(times), least_work, Spread.of_ratios(times, least_times)))
    index.check()
    return costs


def targets(costs: Sequence[Cost]) -> list[Target]:
    """A match takes far less than the millisecond for each thousand tokens that one would notice."""
    matches = [cost for cost in costs if cost.operation.startswith("match")]
    points = []
    for cost in matches:
        per_thousand = [value * 1000 / cost.n_tokens for value in (cost.us.median, cost.us.low, cost.us.high)]
        points.append((f"{cost.operation}, {cost.policy}", Spread(*per_thousand)))
    return [Target("microseconds of a match for each 1,000 tokens", 100, False, tuple(points))]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=100_000, help="length of the longest prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the record to this file")
    options = parser.parse_args(arguments)
    console = Console()
    warn_if_busy(console)
    run = describe_run()

    costs = [cost for policy in POLICIES for cost in measure(policy, options.entries, options.tokens, options.rounds)]
    table = Table(title=f"The prefix index with {options.entries} entries (median and range over the rounds)")
    for column in ("operation", "policy", "tokens", "us a call", "against", "ratio"):
        table.add_column(column)
    for cost in costs:
        table.add_row(
            cost.operation, cost.policy, str(cost.n_tokens), cost.us.show(), cost.least_work, cost.ratio.show()
        )
    console.print(table)
    met = targets(costs)
    print_targets(console, met)
    if options.json is not None:
        record = {
            "run": run,
            "n_entries": options.entries,
            "costs": [asdict(cost) for cost in costs],
            "targets": [target.to_json() for target in met],
        }
        write_json(options.json, "prefix_index", record)


if __name__ == "__main__":
    main()
