"""Figures of a run: added up over tests and workers, printed always, and written where the file wants them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..core.subprocesses import ROOT, TIMEOUT_S
from ..figures import BEGIN, END, put_in
from . import mistakes, test_sharing_mistakes, tier_mistakes
from .mistakes import IN_A_SWEEP, IN_ANY_RUN

CONFTEST = """
import pytest
from tests.figures import pytest_addoption, pytest_configure, pytest_terminal_summary, recorder

@pytest.fixture
def record(record_property):
    return recorder(record_property)
"""

TESTS = """
import pytest

@pytest.mark.parametrize("n", [1000, 234])
def test_shows(record, n):
    record("a thing", "host", pages=n, findings=0)

def test_shows_it_elsewhere(record):
    record("a thing", "cuda", pages=1, findings=0)

def test_fails(record):
    record("a thing", "host", pages=5_000_000)
    assert False

@pytest.mark.parametrize("n", [1, 2])
def test_cannot(n):
    pytest.skip("no such tool here")
"""


def run(folder: Path, *arguments: str) -> str:
    """A run of its own, without this repository's configuration; return what it printed."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    proofs = folder / "tests" / "proof"
    proofs.mkdir(parents=True, exist_ok=True)
    (folder / "conftest.py").write_text(CONFTEST)
    (proofs / "test_shown.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments]
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr  # one of them fails
    return done.stdout


@pytest.mark.parametrize("workers", [["-p", "no:xdist"], ["-n", "2"]], ids=["alone", "two workers"])
def test_what_was_shown_and_what_was_not_is_printed(tmp_path: Path, workers: list[str]) -> None:
    lines = run(tmp_path, *workers).splitlines()
    assert "a thing, host: 1,234 pages, 0 findings (2 tests)" in lines
    assert "a thing, cuda: 1 pages, 0 findings" in lines
    assert "not shown: no such tool here (2 tests)" in lines


def test_figures_are_written_between_their_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nbehind\n")
    run(tmp_path, "-p", "no:xdist", "--figures", str(page))
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"\n{END}\nbehind\n")
    assert "old" not in text
    assert "| a thing | host | 1,234 pages, 0 findings | 2 | `test_shown.py` |" in text
    assert "3 passed, 1 failed, 0 error, 2 skipped" in text
    assert "Not shown on that machine: no such tool here (2 tests)." in text


def test_a_file_without_markers_is_the_figures_alone() -> None:
    assert put_in("", "figures\n") == put_in("other text", "figures\n") == "figures\n"


RELIABILITY = ROOT / "docs" / "reliability.md"


def test_the_page_about_reliability_has_a_place_for_them() -> None:
    text = RELIABILITY.read_text("utf-8")
    assert put_in(text, "figures\n") != "figures\n"


def test_the_page_about_reliability_names_every_planted_mistake_and_who_finds_it() -> None:
    def words(found: set[str]) -> set[str]:
        return {name.replace("_", " ") for name in found}

    rows = [line.split("|") for line in RELIABILITY.read_text("utf-8").splitlines() if line.startswith("| random op")]
    in_runs, in_both = ({name.strip() for name in row[2].split(";")} for row in rows if "`stress`" in row[1])
    assert in_both == words({mistake.__name__ for mistake in IN_A_SWEEP})
    assert in_runs | in_both == words({mistake.__name__ for mistake in IN_ANY_RUN})
    planted = {
        name
        for module in (mistakes, test_sharing_mistakes, tier_mistakes)
        for name, function in vars(module).items()
        if getattr(function, "__annotations__", {}).get("patch") == "pytest.MonkeyPatch"
    }
    text = " ".join(RELIABILITY.read_text("utf-8").split())
    assert len(planted) > 45
    assert [name for name in words(planted) if name not in text] == []
