"""The tables of what each scheme puts to use, as Markdown, from what `benchmarks.frag` wrote.

    python -m benchmarks.frag_tables FOLDER [--into FILE.md]

FOLDER has the results by their names: frag-main.json, frag-others.json, frag-long.json, frag-recorded.json,
frag-mooncake-whole.json, frag-mooncake-first-fit.json, frag-steps.json. With --into, those tables whose marker lines a
document has replace what stands there. Nothing is measured here: the same results give the same tables.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.prefix_tables import END, by_trace, fill
from vmem_kv.errors import ConfigError

Row: TypeAlias = Mapping[str, Any]

SHORT_NAMES = {
    "maximum length": "maximum length",
    "power of two": "power of two",
    "PagedAttention, blocks of 16": "blocks of 16",
    "vmem_kv per layer, 2 MiB": "per layer",
    "vmem_kv token-major, 2 MiB": "token-major",
    "vmem_kv token-major, 2 MiB, warm": "token-major, warm",
    "vmem_kv per layer, 64 KiB host pages": "host 64 KiB",
}
"""The schemes of tables with a line for each trace, and what they are called there."""

SUMMARY = {
    "maximum length": "reserve the longest request of the trace",
    "power of two": "double when full",
    "PagedAttention, blocks of 16": "PagedAttention, blocks of 16",
    "vmem_kv per layer, 2 MiB": "vmem_kv, `per_layer`, pages of 2 MiB",
    "vmem_kv token-major, 2 MiB": "vmem_kv, `token_major`, pages of 2 MiB",
    "vmem_kv token-major, 2 MiB, warm": "the same, ended slots kept warm",
}
"""The schemes of the shortest table, and what they are called there."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program.

    Raises:
        ConfigError: The document has none of the marker lines, or one of a pair; it stays as it was.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--into", type=Path, metavar="FILE.md", help="a document with marker lines")
    options = parser.parse_args(arguments)
    tables = make_tables(options.folder)
    if options.into:
        options.into.write_text(fill_present(options.into.read_text(), tables))
    else:
        print("\n\n".join(tables.values()))


def make_tables(folder: Path) -> dict[str, str]:
    """Return the tables by the names that stand in their marker lines."""

    def read(name: str, what: str = "rows") -> list[Row]:
        found: list[Row] = json.loads((folder / f"frag-{name}.json").read_text())[what]
        return found

    rows = read("main")
    return {
        "frag main": "\n".join(main_tables(rows)),
        "frag summary": "\n".join(summary_table(rows)),
        "frag whole": "\n".join(policy_table(read("mooncake-whole") + read("mooncake-first-fit"))),
        "frag others": "\n".join(traces_table(read("others"))),
        "frag long": "\n".join(traces_table(read("long"))),
        "frag recorded": "\n".join(recorded_table(read("recorded"))),
        "frag steps": "\n".join(steps_table(read("steps", "steps"))),
    }


def fill_present(document: str, tables: Mapping[str, str]) -> str:
    """Return a document with those tables for which it has marker lines.

    Raises:
        ConfigError: It has none, or a line that begins one and none that ends it.
    """
    present = {
        name: table
        for name, table in tables.items()
        if f"<!-- {name} -->" in document or END.format(name=name) in document
    }
    if not present:
        raise ConfigError(f"the document has no marker lines such as <!-- {next(iter(tables))} -->; put them in")
    return fill(document, present)


def main_tables(rows: Sequence[Row]) -> Iterator[str]:
    """A table for each trace, with a line for each scheme."""
    for trace, ours in by_trace(rows):
        n, longest = ours[0]["n_requests"], ours[0]["max_tokens"]
        yield f"**{trace}**, the first {n:,} requests, the longest {longest:,} tokens"
        yield ""
        yield (
            "| scheme | live / active | live / owned | batch, mean (most) | fit | preempted | batches | driver calls "
            "| mappings, most |"
        )
        yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
        for row in ours:
            cells = (*shares(row), batch(row), fit(row), f"{row['counts']['n_preemptions']:,}", *calls(row))
            yield f"| {row['scheme']} | {' | '.join(cells)} |"
        yield ""


def summary_table(rows: Sequence[Row]) -> Iterator[str]:
    """Live / active, mean batch and what fits by trace, and driver calls: a line for each of a few schemes."""
    yield "| live / active, mean batch, fit | ShareGPT | Azure 2023, chat | Mooncake | driver calls per 1,000 tokens |"
    yield "|---|---:|---:|---:|---:|"
    traces = list(by_trace(rows))
    for scheme, name in SUMMARY.items():
        found = [next(row for row in ours if row["scheme"] == scheme) for _, ours in traces]
        cells = (f"{shares(row)[0]}, {averages(row)['n_running']:,.0f}, {fit(row)}" for row in found)
        per_trace = " / ".join(calls(row)[1] for row in found)
        yield f"| {name} | {' | '.join(cells)} | {per_trace if scheme.startswith('vmem_kv') else 'none'} |"


def policy_table(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each scheme and policy."""
    yield "| scheme, policy | live / active | live / owned | batch, mean (most) |"
    yield "|---|---:|---:|---:|"
    for row in rows:
        yield f"| {row['scheme']}, {row['policy']} | {' | '.join((*shares(row), batch(row)))} |"


def traces_table(rows: Sequence[Row]) -> Iterator[str]:
    """Live / active, mean batch and what fits: a line for each trace, a column for each scheme that ran."""
    names = {scheme: name for scheme, name in SHORT_NAMES.items() if any(row["scheme"] == scheme for row in rows)}
    yield f"| trace | requests | {' | '.join(names.values())} |"
    yield f"|---|---:|{'---:|' * len(names)}"
    for trace, ours in by_trace(rows):
        found = {row["scheme"]: row for row in ours}
        cells = (
            f"{shares(found[scheme])[0]}, {averages(found[scheme])['n_running']:,.0f}, {fit(found[scheme])}"
            for scheme in names
        )
        yield f"| {trace} | {ours[0]['n_requests']:,} | {' | '.join(cells)} |"


def recorded_table(rows: Sequence[Row]) -> Iterator[str]:
    """Requests at their arrivals: a line for each scheme."""
    yield (
        "| scheme | live / active | live / owned | batch, mean (most) | rejected | preempted | batches | driver calls "
        "| mappings, most |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for row in rows:
        counts = (f"{row['counts'][name]:,}" for name in ("n_rejected", "n_preemptions"))
        yield f"| {row['scheme']} | {' | '.join((*shares(row), batch(row), *counts, *calls(row)))} |"


def steps_table(steps: Sequence[Row]) -> Iterator[str]:
    """What decode steps cost: a line for each trace and layout."""
    yield (
        "| trace | layout, 2 MiB | nobody grows | somebody grows | such steps | pages in one "
        "| driver calls of the batch |"
    )
    yield "|---|---|---:|---:|---:|---:|---:|"
    for step in steps:
        decode = step["decode"]
        quiet, growing = decode["quiet"], decode["growing"]
        cells = (
            step["trace"],
            step["layout"],
            f"{quiet['p50_us']:.1f} / {quiet['p99_us']:.1f}",
            f"{growing['p50_us']:,.0f} / {growing['p99_us']:,.0f}" if growing else "-",
            f"{growing['n_steps'] if growing else 0} of {decode['n_steps']}",
            f"{decode['n_pages_per_growing_step']:.0f}",
            ", ".join(f"{n:,}" for n in step["steady_calls"]),
        )
        yield f"| {' | '.join(cells)} |"


def averages(row: Row) -> Row:
    """Those of the window of its table."""
    found: Row = row[row["averaged"]]
    return found


def shares(row: Row) -> tuple[str, str]:
    """Live over active, and over owned."""
    live_of_active, live_of_owned = averages(row)["live_of_active"], averages(row)["live_of_owned"]
    return f"{100 * live_of_active:.1f} %", f"{100 * live_of_owned:.1f} %"


def batch(row: Row) -> str:
    """How many ran."""
    return f"{averages(row)['n_running']:,.1f} ({row['n_peak_running']:,})"


def fit(row: Row) -> str:
    """How many the budget holds side by side at the lengths at which they end."""
    return f"{row['n_fitting']:,}{'' if row['is_full'] else '+'}"


def calls(row: Row) -> tuple[str, str, str]:
    """Batches and driver calls per 1,000 output tokens, and the most mappings."""
    mappings = "-" if row["max_mappings"] is None else f"{row['n_peak_mappings']:,}"
    return f"{row['batches_per_1000_tokens']:.1f}", f"{row['driver_calls_per_1000_tokens']:,.0f}", mappings


if __name__ == "__main__":
    main()
