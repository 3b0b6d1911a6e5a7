"""Tables are what results say, and the documents have those of the results that lie beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("rich")

from benchmarks import frag_tables
from vmem_kv.errors import ConfigError

ROOT = Path(frag_tables.__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "docs" / "replay.md", ROOT / "README.md")


def test_the_documents_tables_are_those_of_the_results(tmp_path: Path) -> None:
    for path in RESULTS.glob("frag-*.json"):
        shutil.copy(path, tmp_path)
    tables = frag_tables.make_tables(RESULTS)
    for document in DOCUMENTS:
        text = document.read_text()
        assert frag_tables.fill_present(text, tables) == text
    record = json.loads((RESULTS / "frag-main.json").read_text())
    record["rows"][0]["n_fitting"] += 1
    (tmp_path / "frag-main.json").write_text(json.dumps(record))
    changed = frag_tables.make_tables(tmp_path)
    for document in DOCUMENTS:
        text = document.read_text()
        assert frag_tables.fill_present(text, changed) != text, "so this test can fail"
    names = [name for name in tables if any(f"<!-- {name} -->" in document.read_text() for document in DOCUMENTS)]
    assert names == list(tables)


def test_verdicts_in_words_are_those_of_the_results() -> None:
    targets = {t["what"]: t for t in json.loads((RESULTS / "frag-main.json").read_text())["targets"]}
    verdicts = {
        "live / active of the best layout": "pass",
        "live / owned of the best layout, host pages included": "pass",
        "live / owned of the best layout, pages of 2 MiB": "miss",
    }
    assert {what: targets[what]["verdict"] for what in verdicts} == verdicts
    for document in DOCUMENTS:
        (row,) = (
            line for line in document.read_text().splitlines() if "| the same of all memory that is owned" in line
        )
        assert "**met** with host pages of 64 KiB" in row
        assert "**missed** by every layout of 2 MiB" in row


def test_a_document_is_filled_where_it_has_marker_lines() -> None:
    document = "a\n<!-- x -->\nold\n<!-- end of x -->\nb\n"
    assert frag_tables.fill_present(document, {"x": "new", "y": "other"}) == document.replace("old", "new")
    for broken in ("nothing", "<!-- x -->\n", "<!-- end of x -->\n"):
        with pytest.raises(ConfigError, match="put them"):
            frag_tables.fill_present(broken, {"x": "new"})


def test_the_program_prints_and_fills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frag_tables.main([str(RESULTS)])
    printed = capsys.readouterr().out
    document = tmp_path / "x.md"
    document.write_text("<!-- frag whole -->\n<!-- end of frag whole -->\n")
    frag_tables.main([str(RESULTS), "--into", str(document)])
    lines = [line for line in document.read_text().splitlines() if line.startswith("|")]
    assert len(lines) == 8
    assert "\n".join(lines) in printed
