"""The tables of what sharing prefixes spares, as Markdown, from what `prefix_traces` wrote.

    python -m benchmarks.prefix_tables [--held FILES.json...] [--into FILE.md] FILES.json...

Three tables: hits by budget and policy; by how much the cost-aware policy is ahead, also on the requests that were held
back when its constants were chosen (--held); and what each layout costs. With --into they replace what stands between
the marker lines of a document. Nothing is measured here: the same results give the same tables.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.prefix_traces import LAYOUTS, gains, hit_percent, spared_percent
from vmem_kv.errors import ConfigError
from vmem_kv.units import GIB

Row: TypeAlias = Mapping[str, Any]

COLUMNS = (("lru", False), ("cost", False), ("lru", True), ("cost", True))
"""Policy, and whether there is a host tier."""

END = "<!-- end of {name} -->"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program.

    Raises:
        ConfigError: A marker line is missing in the document; it stays as it was.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILES.json")
    parser.add_argument("--held", type=Path, nargs="+", default=[], metavar="FILES.json")
    parser.add_argument("--into", type=Path, metavar="FILE.md", help="a document with marker lines")
    options = parser.parse_args(arguments)
    tables = make_tables(read(options.files), read(options.held))
    if options.into:
        options.into.write_text(fill(options.into.read_text(), tables))
    else:
        print("\n\n".join(tables.values()))


def read(paths: Sequence[Path]) -> list[Row]:
    """Return the rows of all files, in order."""
    return [row for path in paths for row in json.loads(path.read_text())["rows"]]


def make_tables(rows: Sequence[Row], held: Sequence[Row]) -> dict[str, str]:
    """Return the tables by the names that stand in their marker lines."""
    return {
        "prefix hits": "\n".join(hits_table(rows)),
        "prefix policies": "\n".join(policies_table(rows, held)),
        "prefix costs": "\n".join(costs_table(rows)),
    }


def fill(document: str, tables: Mapping[str, str]) -> str:
    """Return a document with each table between its marker lines.

    Raises:
        ConfigError: A marker line is missing.
    """
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", END.format(name=name)
        before, found, rest = document.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found and found_end):
            raise ConfigError(f"the document has no lines {begin} and {end}; put them where the table goes")
        document = f"{before}{begin}\n{table}\n{end}{after}"
    return document


def hits_table(rows: Sequence[Row]) -> Iterator[str]:
    """Hits as a share of the bound: a line for each trace and budget."""
    yield "| trace | budget, GiB (share) | running | LRU | cost-aware | LRU, host | cost-aware, host |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for trace, ours in by_trace(rows):
        name = f"{trace}, bound {100 * ours[0]['bound']:.1f} %"
        first = [row for row in ours if row["layout"] == LAYOUTS[0]]
        for share in dict.fromkeys(row["share"] for row in first):
            found = {(row["policy"], row["has_host"]): row for row in first if row["share"] == share}
            hits = (f"{hit_percent(found[each]):.1f} %" if each in found else "-" for each in COLUMNS)
            row = next(iter(found.values()))
            yield f"| {name} | {budget(row)} | {row['n_running']:.1f} | {' | '.join(hits)} |"
            name = ""


def policies_table(rows: Sequence[Row], held: Sequence[Row]) -> Iterator[str]:
    """By how much the cost-aware policy is ahead of LRU: a line for each trace."""
    yield "| trace | hits | work spared | hits, held back | work spared, held back |"
    yield "|---|---:|---:|---:|---:|"
    found = [gains(each, figure) for each in (rows, held) for figure in (hit_percent, spared_percent)]
    for trace in found[0]:
        points = (f"{each[trace]:+.1f}" if trace in each else "-" for each in found)
        yield f"| {trace} | {' | '.join(points)} |"


def costs_table(rows: Sequence[Row]) -> Iterator[str]:
    """What layouts cost under LRU, without a host tier: a line for each trace, layout and budget."""
    yield (
        "| trace | layout | budget, GiB | hits | adopted, forked, fresh "
        "| driver calls | copies | copied, bytes a token | pages, most | mappings, most |"
    )
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for trace, ours in by_trace(rows):
        plain = [row for row in ours if row["policy"] == "lru" and not row["has_host"]]
        shares = {row["share"] for row in plain if row["layout"] != LAYOUTS[0]}
        for row in (row for row in plain if row["share"] in shares):
            counts = row["counts"]
            cells = (
                trace,
                row["layout"],
                budget(row).partition(" (")[0],
                f"{hit_percent(row):.1f} %",
                ", ".join(f"{counts[name]:,}" for name in ("n_adopted", "n_forked", "n_fresh")),
                f"{row['driver_calls_per_1000_tokens']:,.1f}",
                f"{row['copies_per_1000_tokens']:,.3f}",
                f"{row['copied_bytes_per_token']:,.0f}",
                f"{counts['n_peak_pages']:,}",
                f"{row['n_peak_mappings']:,}",
            )
            yield f"| {' | '.join(cells)} |"


def by_trace(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Yield each trace with its rows, in the order in which they come."""
    for trace in dict.fromkeys(row["trace"] for row in rows):
        yield trace, [row for row in rows if row["trace"] == trace]


def budget(row: Row) -> str:
    """The device's memory, and its share of what all distinct tokens take."""
    if row["share"] is None:
        return "no bound"
    gib = row["budget_bytes"] / GIB
    return f"{gib:,.{1 if gib < 100 else 0}f} ({100 * row['share']:.0f} %)"


if __name__ == "__main__":
    main()
