"""The soak's smallest form, and its judge, which is seen to find what it is for."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak import MIB, Log, Look, judge, main, slope_per_hour
from benchmarks.soak_traffic import WEIGHTS, Tally

from .harness import TEMPLATE

IDLE = Look(500 * MIB, 12, 20, 0, 0)
QUIET = Tally(n_of_status=Counter({200: 90, 400: 10, 429: 3, 0: 5}))


def broken(**changes: Any) -> list[str]:
    """What the judge objects to, where these things differ from a perfect soak."""
    given: dict[str, Any] = {"tally": QUIET, "before": IDLE, "after": IDLE, "exit_code": 0, "n_error_lines": 0}
    return [check.what for check in judge(**{**given, **changes}) if not check.holds]


def test_a_perfect_soak_passes() -> None:
    assert broken() == []
    assert broken(after=replace(IDLE, resident_bytes=515 * MIB, n_threads=11, n_files=19)) == []


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"tally": Tally(n_of_status=Counter({200: 1_000, 500: 1}))}, "5xx"),
        ({"tally": Tally(n_of_status=Counter({200: 1_000, 504: 1}))}, "5xx"),
        ({"tally": Tally(n_findings=1)}, "another text"),
        ({"after": replace(IDLE, resident_bytes=517 * MIB)}, "resident memory"),
        ({"after": replace(IDLE, n_threads=13)}, "threads"),
        ({"after": replace(IDLE, n_files=21)}, "descriptors"),
        ({"after": replace(IDLE, n_live_pages=1)}, "still live"),
        ({"after": replace(IDLE, n_quarantined_pages=1)}, "quarantine"),
        ({"exit_code": -9}, "exit status"),
        ({"exit_code": 1}, "exit status"),
        ({"n_error_lines": 1}, "error lines"),
    ],
)
def test_whatever_is_wrong_is_found(changes: dict[str, Any], word: str) -> None:
    [what] = broken(**changes)
    assert word in what


def test_the_slope_is_that_of_most_pairs() -> None:
    line = [(float(t), 1_000.0 + 2 * t) for t in range(0, 600, 5)]
    assert slope_per_hour(line) == pytest.approx(7_200)
    assert slope_per_hour([*line[:50], (250.0, 1e9), *line[51:]]) == pytest.approx(7_200, rel=0.05)
    assert slope_per_hour([]) == 0


def test_the_log_is_read_for_errors_and_tracebacks() -> None:
    log = Log()
    log.read(
        iter(
            [
                "Loading\n",
                "m is served at http://127.0.0.1:5/v1; its memory\n",
                '{"level": "info", "message": "error"}\n',
                '{"level": "error"}\n',
                "Traceback (most recent call last):\n",
            ]
        )
    )
    assert log.url == "http://127.0.0.1:5"
    assert log.error_lines[1:] == ['{"level": "error"}\n', "Traceback (most recent call last):\n"]


@pytest.mark.timeout(600)  # half a minute on two idle cores; clients that wait to be cut off take their time
def test_the_smallest_soak(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Ten seconds of everything. Whether memory grows cannot be said after so short a time; all else must hold."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    record = tmp_path / "soak.json"
    words = [str(folder), "--minutes", "0.15", "--max-len", "128", "--max-memory", "120k", "--max-tokens", "20"]
    main([*words, "--pause", "0.02", "--threads", "1", "--json", str(record)])
    data = json.loads(record.read_text())
    objections = [check["what"] for check in data["checks"] if not check["holds"]]
    assert [what for what in objections if "resident" not in what] == [], data["traffic"]["findings"]
    assert len(data["checks"]) == 9
    assert data["traffic"]["n_compared"] > 0
    assert set(data["traffic"]["n_of_kind"]) <= set(WEIGHTS)
    assert {"200", "400"} <= set(data["traffic"]["n_of_status"])
