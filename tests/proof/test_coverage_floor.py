"""What `scripts/coverage` demands: every branch of every module of the core, and no module is forgotten."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ..core.subprocesses import ROOT, TIMEOUT_S

NOT_CORE = {"__init__.py", "devices.py", "errors.py", "machine.py", "models.py"}
"""Modules beside the core: names, errors, what a machine has, what a model is."""

HALF = """
def larger(a, b):
    if a > b:
        b = a
    return b

"""


def test_every_module_beside_the_core_is_known() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["coverage"]
    core = set(settings["report"]["include"])
    assert all((ROOT / name).is_file() for name in core)
    modules = {path.name for path in (ROOT / "vmem_kv").glob("*.py")}
    assert modules - NOT_CORE == {Path(name).name for name in core if Path(name).parent.name == "vmem_kv"}
    assert settings["report"]["fail_under"] == 100


@pytest.mark.parametrize(("calls", "status"), [("larger(1, 2); larger(2, 1)", 0), ("larger(2, 1)", 2)])
def test_one_branch_that_is_not_taken_is_too_few(calls: str, status: int, tmp_path: Path) -> None:
    (tmp_path / "half.py").write_text(HALF + calls + "\n")
    settings = f"--rcfile={ROOT / 'pyproject.toml'}"

    def coverage(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "coverage", *arguments],
            cwd=tmp_path,
            env=os.environ | {"COVERAGE_FILE": str(tmp_path / "data")},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    assert coverage("run", settings, "--source=.", "half.py").returncode == 0
    assert coverage("combine", settings).returncode == 0
    done = coverage("report", settings, "--include=*/half.py")
    assert (done.returncode, "half.py" in done.stdout) == (status, True), done.stdout + done.stderr
