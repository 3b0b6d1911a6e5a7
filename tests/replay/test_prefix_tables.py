"""Tables are what results say, and the document has those of the results that lie beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")

from benchmarks import prefix_tables, prefix_traces
from vmem_kv.errors import ConfigError

RESULTS = Path(prefix_tables.__file__).parent / "results"
DOCUMENT = Path(prefix_tables.__file__).parents[1] / "docs" / "replay.md"
NAMES = ("recorded", "claude", "sessions")


def row(share: float | None, policy: str, of_bound: float, **others: Any) -> dict[str, Any]:
    counts = {"spared_share": of_bound / 2, "n_adopted": 1234, "n_forked": 5, "n_fresh": 6, "n_peak_pages": 7000}
    return {
        "trace": "t",
        "bound": 0.25,
        "share": share,
        "policy": policy,
        "has_host": False,
        "of_bound": of_bound,
        "layout": prefix_traces.LAYOUTS[0],
        "budget_bytes": None if share is None else int(share * (200 << 30)),
        "n_running": 1.5,
        "counts": counts,
        "driver_calls_per_1000_tokens": 10.04,
        "copies_per_1000_tokens": 0.5,
        "copied_bytes_per_token": 1000.4,
        "n_peak_mappings": 8000,
        **others,
    }


def test_tables_say_what_rows_say() -> None:
    other = prefix_traces.LAYOUTS[1]
    rows = [row(0.1, "lru", 0.5), row(0.1, "cost", 0.6), row(0.1, "lru", 0.9, has_host=True)]
    rows += [row(0.6, "lru", 0.8), row(0.6, "cost", 0.75), row(None, "lru", 1.0), row(0.6, "lru", 0.7, layout=other)]
    tables = prefix_tables.make_tables(rows, [row(0.1, "lru", 0.5), row(0.1, "cost", 0.4)])
    hits, policies, costs = (table.splitlines()[2:] for table in tables.values())
    assert hits == [
        "| t, bound 25.0 % | 20.0 (10 %) | 1.5 | 50.0 % | 60.0 % | 90.0 % | - |",
        "|  | 120 (60 %) | 1.5 | 80.0 % | 75.0 % | - | - |",
        "|  | no bound | 1.5 | 100.0 % | - | - | - |",
    ]
    assert policies == ["| t | +2.5 | +1.2 | -10.0 | -5.0 |"]
    assert costs == [
        f"| t | {layout} | 120 | {hit} % | 1,234, 5, 6 | 10.0 | 0.500 | 1,000 | 7,000 | 8,000 |"
        for layout, hit in ((prefix_traces.LAYOUTS[0], "80.0"), (other, "70.0"))
    ]
    assert prefix_tables.make_tables(rows, [])["prefix policies"].endswith("| +2.5 | +1.2 | - | - |")


def test_a_document_is_filled_between_its_marker_lines() -> None:
    document = "before\n<!-- x -->\nold\n<!-- end of x -->\nafter\n"
    filled = prefix_tables.fill(document, {"x": "new"})
    assert filled == document.replace("old", "new")
    assert prefix_tables.fill(filled, {"x": "new"}) == filled
    for broken in ("nothing", "<!-- x -->\n", document.replace("<!-- x", "<!-- y")):
        with pytest.raises(ConfigError, match="put them where the table goes"):
            prefix_tables.fill(broken, {"x": "new"})


def test_the_document_s_tables_are_those_of_the_results() -> None:
    rows = prefix_tables.read([RESULTS / f"prefix-{name}.json" for name in NAMES])
    held = prefix_tables.read([RESULTS / f"prefix-held-{name}.json" for name in NAMES])
    text = DOCUMENT.read_text()
    assert prefix_tables.fill(text, prefix_tables.make_tables(rows, held)) == text
    changed = [{**rows[0], "of_bound": 0.123}, *rows[1:]]
    assert prefix_tables.fill(text, prefix_tables.make_tables(changed, held)) != text, "so this test can fail"


def test_the_program_prints_and_fills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(RESULTS / "prefix-sessions.json")]
    prefix_tables.main(files)
    printed = capsys.readouterr().out
    assert printed.startswith("| trace | budget")
    document = tmp_path / "x.md"
    names = ("prefix hits", "prefix policies", "prefix costs")
    document.write_text("".join(f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in names))
    prefix_tables.main([*files, "--into", str(document)])
    lines = [line for line in document.read_text().splitlines() if line.startswith("|")]
    assert lines == [line for line in printed.splitlines() if line]
