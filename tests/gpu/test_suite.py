"""Every part of the GPU suite on the device of this machine, in its smallest setting. No time is judged.

The full measurement is `python benchmarks/gpu/run.py`; this holds what it finds out against what has to be so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from benchmarks.gpu import correctness, facts, generation, interference, speed
from benchmarks.gpu.cases import Row
from benchmarks.gpu.results import PartResults, Results
from benchmarks.gpu.runner import run_part
from benchmarks.gpu.suite import PARTS
from benchmarks.gpu.summary import is_bad
from tests.gpu.device import NEEDS_A_GPU

pytestmark = [*NEEDS_A_GPU, pytest.mark.timeout(300)]

BUDGET_S = 120.0
MAX_SKIPPED = 3  # cases of a part
Run = Callable[[str], PartResults]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a part once, by name. Nearly all of it has to fit its time."""
    folder: Path = tmp_path_factory.mktemp("gpu")

    @cache
    def run_once(name: str) -> PartResults:
        part = next(part for part in PARTS if part.name == name)
        results = Results(folder, name, {}, is_emulated=False)
        results.begin(part)
        run_part(part, results, emulate=False, quick=True, budget_s=BUDGET_S)
        found = results.parts[name]
        assert len(found.skipped) <= MAX_SKIPPED, found.skipped
        return found

    return run_once


def rows(part: PartResults, table: str) -> list[Row]:
    assert table in part.tables, f"tables: {list(part.tables)}, skipped: {part.skipped}"
    return part.tables[table].rows


def bad_outcomes(part: PartResults) -> list[Row]:
    """Rows that say that something is wrong or did not end, but for faults that are expected."""
    return [row for table in part.tables.values() for row in table.rows if is_bad(row)]


def test_the_device_has_what_the_driver_is_built_on(run: Run) -> None:
    facts_found = {row["fact"]: row["value"] for row in rows(run("facts"), "device")}
    assert facts_found["attribute 102: virtual memory management"] == 1
    assert facts_found["minimum granularity, bytes"] % 4096 == 0
    (ceiling,) = rows(run("facts"), "mapping ceiling")
    assert ceiling["ended by"] == "the bound of this test"


def test_the_emulator_answers_as_the_device_does_but_where_it_is_stricter_on_purpose(run: Run) -> None:
    found = run("facts").tables.get(facts.DIFFERENCES)
    assert [row for row in (found.rows if found else []) if not row["stricter on purpose"]] == []


def test_pages_keep_their_bytes_and_aliases_agree(run: Run) -> None:
    contents = {row["what"]: row for row in rows(run("facts"), facts.CONTENTS)}
    assert contents["a page mapped elsewhere kept its bytes"]["n"] == 1
    assert contents["written through one alias, read through another"]["outcome"] == "ok"


def test_kernels_are_right_over_mapped_memory_and_touch_nothing_else(run: Run) -> None:
    part = run("correctness")
    assert bad_outcomes(part) == []
    assert {row["case"] for row in rows(part, correctness.NUMERICS) if row["outcome"] == "ok"} >= {"torch_flash"}


def test_kernels_without_slack_need_none(run: Run) -> None:
    outcomes = {(row["case"], row["outcome"]) for row in rows(run("correctness"), correctness.OVERREAD)}
    assert ("torch_flash without its slack", "no fault") in outcomes


def test_the_driver_keeps_its_contract(run: Run) -> None:
    (row,) = rows(run("correctness"), correctness.CONTRACT)
    assert row["outcome"] == "ok"


def test_a_replayed_graph_reads_remapped_memory(run: Run) -> None:
    found = [row for row in rows(run("correctness"), correctness.MEMORY) if "graph" in row["case"]]
    assert [row["outcome"] for row in found] == ["ok"]


def test_kernels_run_over_every_layout(run: Run) -> None:
    assert bad_outcomes(run("speed")) == []
    assert {row["memory"] for row in rows(run("speed"), speed.RATIOS)} >= {"plain", "per_layer", "token_major"}


def test_mapping_beside_running_kernels_changes_no_result(run: Run) -> None:
    part = run("interference")
    assert bad_outcomes(part) == []
    assert [row["error"] for row in rows(part, interference.KERNEL_TIMES) if row["error"]] == []
    assert [row["error"] for row in rows(part, interference.STEPS) if row["error"]] == []


def test_generate_runs_on_every_cache(run: Run) -> None:
    part = run("generate")
    assert bad_outcomes(part) == []
    assert {row["case"] for row in rows(part, generation.SPEED)} == {"vmem", "dynamic", "static"}


def test_generate_says_the_same_over_mapped_memory(run: Run) -> None:
    (row,) = rows(run("generate"), generation.TOKENS)
    assert row["n"] == row["of"]
