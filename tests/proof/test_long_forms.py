"""The long forms of the proofs: more of everything, other seeds, deeper schedules. Minutes to hours each.

    pytest -m slow tests/proof -n 2
    pytest -m slow tests/proof -k random_operations_agree -n 2         100,000,000 operations

Nothing else brings them: without the word in `-m` they are left out (`tests/conftest.py`). Their quick forms are in the
files beside this one, and run always.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.soak import main as soak
from vmem_kv.driver.base import Driver

from ..server.harness import TEMPLATE
from .conftest import Record
from .drivers import open_driver
from .test_fault_sweep import (
    KEEP,
    LAYOUTS,
    fail_again_while_it_is_undone,
    fail_in_other_ways,
    fail_once_and_from_then_on,
)
from .test_mapper import decode_with_the_mapper, work_in_threads
from .test_processes import kill_processes, open_and_close
from .test_random_ops import agree_with_the_model, try_lists
from .test_schedules import (
    make_every_call_in_the_middle,
    make_every_call_where_pages_are_shared,
    make_every_sequence_of_moves,
    make_every_sequence_of_sharing_moves,
    paths_that_share,
)
from .test_tags import read_pages_of_others, verify_every_step
from .test_tier_schedules import (
    make_every_sequence_of_halves,
    make_every_sequence_of_parking_moves,
    make_every_sequence_of_session_moves,
)
from .test_tiers import agree_with_the_models

pytestmark = [pytest.mark.slow, pytest.mark.timeout(24 * 3600)]

SHARDS = [("native", seed, 10_000_000) for seed in range(101, 109)] + [
    ("cuda", seed, 5_000_000) for seed in range(101, 105)
]
"""(driver, seed, operations) in the model's random operations: 100,000,000 together."""

N_TIERED_OPS = 500_000
"""Random operations with tiers, for each of four seeds."""

SOAK_MINUTES = 30


@pytest.mark.parametrize(("name", "seed", "n_ops"), SHARDS)
def test_random_operations_agree_with_the_model(name: str, seed: int, n_ops: int, record: Record) -> None:
    agree_with_the_model(name, seed, n_ops, record)


@pytest.mark.parametrize("seed", range(101, 105))
def test_random_operations_on_tiers_agree_with_the_models(
    driver: Driver, driver_name: str, seed: int, record: Record
) -> None:
    agree_with_the_models(driver, driver_name, seed, N_TIERED_OPS, record)


def test_hypothesis_finds_no_list_of_operations_that_goes_wrong(driver: Driver, record: Record) -> None:
    try_lists(driver, 30_000, record)


@pytest.mark.parametrize("keep_freed", KEEP, ids=["freed pages go", "freed pages stay"])
@pytest.mark.parametrize(("kind", "rows"), LAYOUTS)
def test_a_second_failure_may_hit_while_the_first_is_undone(
    driver: Driver, driver_name: str, kind: str, rows: str, keep_freed: bool, record: Record
) -> None:
    fail_again_while_it_is_undone(driver, driver_name, kind, rows, keep_freed, record)


@pytest.mark.parametrize("keep_freed", KEEP, ids=["freed pages go", "freed pages stay"])
@pytest.mark.parametrize(("kind", "rows"), LAYOUTS)
def test_any_call_may_fail_in_other_ways(
    driver: Driver, driver_name: str, kind: str, rows: str, keep_freed: bool, record: Record
) -> None:
    fail_in_other_ways(driver, driver_name, kind, rows, keep_freed, record)


@pytest.mark.parametrize("keep_freed", KEEP, ids=["freed pages go", "freed pages stay"])
@pytest.mark.parametrize(("kind", "rows"), LAYOUTS)
def test_any_call_of_the_hosts_python_way_may_fail(kind: str, rows: str, keep_freed: bool, record: Record) -> None:
    driver = open_driver("python")
    fail_once_and_from_then_on(driver, "python", kind, rows, keep_freed, record)
    driver.close()


@pytest.mark.usefixtures("never_wait")
def test_every_sequence_of_moves_agrees_with_the_model(driver: Driver, driver_name: str, record: Record) -> None:
    make_every_sequence_of_moves(driver, driver_name, 12, record)


@pytest.mark.usefixtures("never_wait")
def test_every_sequence_of_sharing_moves_agrees_with_the_model(
    driver: Driver, driver_name: str, record: Record
) -> None:
    make_every_sequence_of_sharing_moves(driver, driver_name, 9, record)


@pytest.mark.usefixtures("never_wait")
def test_every_call_may_come_in_the_middle_of_every_other(driver: Driver, driver_name: str, record: Record) -> None:
    make_every_call_in_the_middle(driver, driver_name, 6, record)


@pytest.mark.usefixtures("never_wait")
def test_every_call_may_come_in_the_middle_of_what_shares(driver: Driver, driver_name: str, record: Record) -> None:
    make_every_call_where_pages_are_shared(driver, driver_name, paths_that_share(driver, 4), record)


@pytest.mark.usefixtures("never_wait")
def test_every_sequence_of_parking_moves_agrees_with_the_models(
    driver: Driver, driver_name: str, record: Record
) -> None:
    make_every_sequence_of_parking_moves(driver, driver_name, 7, record)


@pytest.mark.usefixtures("never_wait")
def test_every_order_of_half_parks_and_half_restores(driver: Driver, driver_name: str, record: Record) -> None:
    make_every_sequence_of_halves(driver, driver_name, 8, record)


@pytest.mark.usefixtures("never_wait")
def test_every_sequence_of_session_moves_agrees_with_the_models(
    driver: Driver, driver_name: str, record: Record
) -> None:
    make_every_sequence_of_session_moves(driver, driver_name, 8, record)


def test_every_live_row_carries_its_tag_at_every_step(driver: Driver, driver_name: str, record: Record) -> None:
    verify_every_step(driver, driver_name, 1_000_000_000, 101, record)


def test_a_page_that_was_anothers_reads_as_zeros(driver: Driver, driver_name: str, record: Record) -> None:
    read_pages_of_others(driver, driver_name, 10_000_000, 101, record)


def test_a_batch_decodes_with_the_mapper_at_its_heels(driver: Driver, driver_name: str, record: Record) -> None:
    decode_with_the_mapper(driver, driver_name, 150_000, record)


@pytest.mark.parametrize("fault_share", [0.0, 0.3])
def test_threads_on_one_pool_lose_nothing(driver_name: str, fault_share: float, record: Record) -> None:
    work_in_threads(driver_name, fault_share, 101, 2_000_000, 8, record)


def test_memory_of_killed_processes_goes_back(record: Record) -> None:
    kill_processes(2_000, record)


def test_ten_thousand_caches_in_one_process_leave_nothing(driver_name: str, record: Record) -> None:
    open_and_close(driver_name, 10_000, record)


def test_a_server_stands_half_an_hour_of_everything(tiny_model_folder: Path, tmp_path: Path) -> None:
    """The soak of `benchmarks/soak.py`, every check of it; it ends with an exit status where one does not hold."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    words = [str(folder), "--minutes", str(SOAK_MINUTES), "--max-len", "128", "--max-memory", "120k"]
    assert soak([*words, "--max-tokens", "20", "--threads", "1", "--json", str(tmp_path / "soak.json")]) == 0
