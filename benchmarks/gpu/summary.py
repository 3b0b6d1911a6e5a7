"""The end of the command's output: what went well and what did not, and the figures that matter, in at most 40 lines.

Assumes that an outcome says in its first word, or in capitals, what became of a case.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from benchmarks.gpu.cases import ANYTHING, FAULT, LOST, OK, Row
from benchmarks.gpu.results import NOT_A_TIMING, PartResults, Results

MAX_LINES = 40
_MAX_BAD = 18
_MAX_CHARS = 160
_GOOD = "ok"
_BAD = ("WRONG", "CHANGED", "raised", "crashed", "lost")
_KINDS = (_GOOD, "WRONG", "raised", "crashed")


def verdict(row: Row) -> str | None:
    """Return which of `_BAD` a row's outcome is, `ok` for a good one, and None where it says neither."""
    outcome = str(row.get("outcome", ""))
    is_expected = row.get("expected") in (ANYTHING, FAULT)
    if outcome.startswith("crashed") or outcome == LOST:
        return _GOOD if is_expected else "crashed" if outcome != LOST else "lost"
    if outcome.startswith("raised"):
        # So a fault on a device looks from the host.
        return _GOOD if is_expected and LOST in outcome else "raised"
    for word in ("WRONG", "CHANGED"):
        if word in outcome:
            return word
    return _GOOD if outcome in (OK, "results unchanged", "no fault") else None


def is_bad(row: Row) -> bool:
    """Return whether a row says that something went wrong that should not have."""
    return verdict(row) in _BAD


def bad_rows(results: Results) -> list[tuple[str, str, Row]]:
    """Return part, table and row of everything that went wrong."""
    return [
        (name, title, row)
        for name, part in results.parts.items()
        for title, table in part.tables.items()
        for row in table.rows
        if is_bad(row)
    ]


def summarise(results: Results) -> list[str]:
    """Return the lines."""
    bad = bad_rows(results)
    lines = [_count(name, part) for name, part in results.parts.items()]
    lines += [_cut(f"BAD {name}, {title}: {_describe(row)}") for name, title, row in bad[:_MAX_BAD]]
    if len(bad) > _MAX_BAD:
        lines.append(f"BAD and {len(bad) - _MAX_BAD} rows more, in {results.markdown_path.name}")
    figures = list(_figures(results.parts))
    if figures and results.is_emulated:
        lines.append(f"({NOT_A_TIMING}:)")
    return [*lines, *map(_cut, figures)]


def _count(name: str, part: PartResults) -> str:
    found = Counter(verdict(row) for table in part.tables.values() for row in table.rows)
    found["WRONG"] += found.pop("CHANGED", 0)
    found["crashed"] += found.pop("lost", 0)
    n_rows = sum(len(table.rows) for table in part.tables.values())
    words = f"{n_rows} rows, " + ", ".join(f"{found[kind]} {kind}" for kind in _KINDS)
    reasons = "; ".join(sorted({entry["reason"] for entry in part.skipped}))
    return _cut(f"{name}: {words}, {len(part.skipped)} skipped" + (f" ({reasons})" if reasons else ""))


def _describe(row: Row) -> str:
    """A row on one line, what became of it first."""
    others = ", ".join(f"{k} {v}" for k, v in row.items() if k not in ("outcome", "case") and v is not None)
    return f"{row.get('case', '')}: {row['outcome']} ({others})".replace("\n", " / ")


def _figures(parts: dict[str, PartResults]) -> Iterable[str]:
    yield from _speed(_rows(parts, "speed", "kernels over mapped memory"))
    steps = {row["case"]: row for row in _rows(parts, "interference", "decode steps")}
    if "premapped" in steps:
        again = steps.get("none, again", {}).get("median turn / none")
        ratio = steps["premapped"]["median turn / none"]
        yield f"decode step, premapped / none: {_number(ratio)} (none, again: {_number(again)})"
    for row in _rows(parts, "generate", "generate"):
        if row["case"] in ("dynamic", "static"):
            ratio = _number(row.get("vmem speed / this"))
            yield f"generate, context {row['context']}, vmem / {row['case']}: {ratio} of the tokens per second"
    for call in ("cuMemSetAccess", "cuMemUnmap"):
        found = [r for r in _rows(parts, "facts", "latency of driver calls") if r["call"] == call]
        if found:
            smallest = min(found, key=lambda row: int(row["page_bytes"]))
            yield f"{call}, one page of {smallest['page_bytes'] >> 20} MiB: p50 {_number(smallest['p50_us'])} us"


def _speed(rows: Sequence[Row]) -> Iterable[str]:
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        own = [row for row in rows if row["kernel"] == kernel and "ratio" in row]
        ratios = [row["ratio"] for row in own if row["memory"] == "per_layer"]
        again = [row["ratio"] for row in own if row["memory"] == "plain, again"]
        if ratios and again:
            worst = max(ratios, key=lambda ratio: abs(ratio - 1))
            n_open = sum(row.get("within 1 %") in ("unclear", "host-bound") for row in own)
            yield (
                f"{kernel}, per_layer / plain over {len(ratios)} points ({n_open} of them unclear or host-bound): "
                f"median {_number(statistics.median(ratios))}, worst {_number(worst)} "
                f"(plain, again: {_number(min(again))} to {_number(max(again))})"
            )


def _rows(parts: dict[str, PartResults], part: str, title: str) -> list[Row]:
    tables = parts[part].tables if part in parts else {}
    return [row for name, table in tables.items() if name.startswith(title) for row in table.rows if _is_whole(row)]


def _is_whole(row: Row) -> bool:
    """A case that did not end has a row of its own, without the table's columns."""
    return not is_bad(row)


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "unknown"


def _cut(line: str) -> str:
    return line if len(line) <= _MAX_CHARS else line[: _MAX_CHARS - 3] + "..."
