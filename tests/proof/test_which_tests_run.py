"""Long forms run by `-m slow` alone: no other run has one, and each of them is a proof."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ..core.subprocesses import ROOT, TIMEOUT_S

HERE = "tests/proof/test_long_forms.py"


def collected(folder: Path, *arguments: str) -> list[str]:
    """The tests that a run with this repository's conftest would make in a folder of one quick and one long test."""
    (folder / "conftest.py").write_text(
        "from tests.conftest import pytest_addoption, pytest_collection_modifyitems, pytest_configure  # noqa: F401\n"
    )
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n    other\n")
    (folder / "test_both.py").write_text(
        "import pytest\n\n\n@pytest.mark.other\ndef test_quick(): ...\n\n\n@pytest.mark.slow\ndef test_long(): ...\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q", str(folder)]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode in (0, 5), done.stdout + done.stderr
    return [line.rpartition("::")[2] for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["test_quick"]),
        (["-m", "other"], ["test_quick"]),
        (["-m", "not other"], []),
        (["-m", "slow"], ["test_long"]),
        (["-m", "other or slow"], ["test_quick", "test_long"]),
    ],
)
def test_a_long_form_runs_where_the_expression_names_it(
    arguments: list[str], expected: list[str], tmp_path: Path
) -> None:
    assert collected(tmp_path, *arguments) == expected


def test_this_run_has_no_long_form_or_was_asked_for_one(request: pytest.FixtureRequest) -> None:
    slow = {item.nodeid for item in request.session.items if item.get_closest_marker("slow")}
    assert all(name.startswith(HERE) for name in slow)
    asked_for = request.config.getoption("markexpr").replace("not slow", "")
    assert not slow or "slow" in asked_for


def test_every_long_form_stands_in_one_file() -> None:
    sources = (path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__))
    marked = [str(path.relative_to(ROOT)) for path in sources if "mark.slow" in path.read_text("utf-8")]
    assert marked == [HERE]
