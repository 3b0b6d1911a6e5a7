"""`vmem-kv stress`: its verdicts, its exit codes, and what it says of a finding."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from vmem_kv.cli.app import app
from vmem_kv.cli.stress import _bar, _counters
from vmem_kv.driver.base import Driver
from vmem_kv.errors import DriverError
from vmem_kv.testing import FaultyDriver
from vmem_kv.testing.clock import ManualClock
from vmem_kv.testing.operations import Totals
from vmem_kv.testing.stress import OPS_OF_ROUND, Finding, Progress, StressOptions, run_stress
from vmem_kv.testing.thread_round import ThreadRound

from ..core.subprocesses import run_python
from .drivers import open_driver
from .mistakes import IN_ANY_RUN, Mistake, does_not_refund_memory, does_not_scrub, leaks_one_page, maps_one_page_twice

pytestmark = pytest.mark.timeout(900)  # of a busy machine


def stress(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["stress", *arguments])


def test_a_clean_run_says_so() -> None:
    result = stress("--ops", "2000", "--seed", "3")
    assert result.exit_code == 0, result.output
    assert "2,000 operations" in result.output
    assert "0 findings" in result.output
    assert "clean" in result.output


@pytest.mark.parametrize("mistake", [does_not_scrub, leaks_one_page])
def test_a_finding_comes_with_a_short_program(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake(monkeypatch)
    result = stress("--ops", "50000", "--seed", "2")
    assert result.exit_code == 1, result.output
    assert "finding with seed" in result.output
    assert "1 findings" in result.output
    assert not result.output.startswith("0 operations")  # those of the round in which it shows count too
    program = result.output.partition("To repeat it:")[2]
    assert "run = Run(" in program
    assert 1 <= program.count("run.") <= 15


@pytest.mark.parametrize("mistake", IN_ANY_RUN)
def test_the_engine_finds_a_planted_mistake(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake(monkeypatch)
    progress = run_stress(StressOptions(n_ops=30_000), lambda: open_driver("native"))
    assert len(progress.findings) == 1
    assert (progress.n_rounds - 1) * OPS_OF_ROUND < progress.n_ops  # the round of the finding is counted as well
    if mistake is maps_one_page_twice:
        return  # which pages it takes depends on the offsets that earlier rounds left to the driver
    with pytest.raises(Exception) as caught:  # noqa: PT011 - of whatever type was found
        exec(progress.findings[0].program, {})
    assert f"{type(caught.value).__name__}(" in progress.findings[0].what


def no_single_rounds(patch: pytest.MonkeyPatch) -> None:
    def run(seed: int, n_ops: int, driver: Driver, *, totals: Totals, **keywords: object) -> None:
        totals.n_ops += n_ops

    patch.setattr("vmem_kv.testing.stress.random_run", run)


def test_threads_that_find_something_say_how_to_repeat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted is what one round's choices alone bring about: the command must make that very round."""
    no_single_rounds(monkeypatch)
    begin = ThreadRound.__init__

    def fails_in_the_third(around: ThreadRound, driver: Driver, seed: int, *arguments: Any) -> None:
        assert seed != 4 * 1_000_003 + 2, "planted"
        begin(around, driver, seed, *arguments)

    monkeypatch.setattr(ThreadRound, "__init__", fails_in_the_third)
    result = stress("--ops", "5000", "--threads", "3", "--seed", "4", "--faults", "0.2")
    assert result.exit_code == 1
    assert "It repeats what threads chose, not who came first." in result.output
    (command,) = [line.strip() for line in result.output.splitlines() if line.strip().startswith("vmem-kv stress")]
    words = command.split()
    assert words[2:10] == ["--driver", "host", "--seed", "4", "--faults", "0.2", "--threads", "3"]
    assert words[10:] == ["--round", "2", "--ops", "300"]
    again = stress(*words[2:])
    assert again.exit_code == 1, again.output
    assert command in again.output


def test_a_ledger_that_keeps_a_charge_is_found_by_threads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    no_single_rounds(monkeypatch)
    does_not_refund_memory(monkeypatch)
    progress = run_stress(StressOptions(n_ops=3000, n_threads=2), lambda: open_driver("native"))
    assert len(progress.findings) == 1
    assert "the ledger counts" in progress.findings[0].what


def test_rounds_of_threads_come_first_and_are_counted_by_themselves() -> None:
    result = stress("--ops", "300", "--threads", "3", "--faults", "0")
    assert result.exit_code == 0, result.output
    assert "300 operations (300 of them by threads)" in result.output


def test_operations_of_threads_that_find_something_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    leaks_one_page(monkeypatch)
    result = stress("--ops", "3000", "--threads", "3", "--faults", "0")
    assert result.exit_code == 1, result.output
    n_ops = int(result.output.partition(" operations")[0].replace(",", ""))
    assert n_ops > 0
    assert ", 0 tags" not in result.output


def test_a_narrow_line_tells_what_was_found_all_the_same() -> None:
    console = Console(width=40, file=io.StringIO(), force_terminal=True, color_system=None)
    done = Progress(1_200_300, 60_000, 12_345, 123_456, 12_345_678, findings=[Finding("planted", 1)])
    bar = _bar(console)
    bar.update(bar.add_task("", total=1.0, counters=_counters(done)), completed=0.5)
    console.print(bar.get_renderable())
    assert isinstance(console.file, io.StringIO)
    text = " ".join(console.file.getvalue().split())
    assert "50%" in text
    assert "1,200,300 operations (60,000 of them by threads), 12,345 faults, 123,456 pages" in text
    assert text.endswith("12,345,678 tags, 1 findings")


def test_threads_that_cannot_begin_have_done_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(driver: FaultyDriver) -> None:
        raise DriverError("bind_thread", 1, "ESOME", 0, "planted")

    monkeypatch.setattr(FaultyDriver, "bind_thread", refuse)
    stopped = run_stress(
        StressOptions(n_ops=600, n_threads=2), lambda: open_driver("native"), on_progress=lambda progress: False
    )
    assert (stopped.n_ops, stopped.n_rounds) == (0, 1)


def test_a_verdict_about_nothing_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmem_kv.cli.stress.run_stress", lambda *arguments, **keywords: Progress(was_stopped=True))
    result = stress("--ops", "10")
    assert result.exit_code == 2
    assert "nothing was tried" in result.output
    assert "clean" not in result.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--driver", "tpu"], "there is no driver 'tpu'; choose host"),
        (["--ops", "0"], "--ops"),
        (["--faults", "1.5"], "--faults"),
        (["--threads", "0"], "--threads"),
        (["--minutes", "soon"], "--minutes"),
        (["--minutes", "0"], "--minutes"),
        (["--minutes", "nan"], "--minutes"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_nonsense_is_refused_with_status_2(arguments: list[str], text: str) -> None:
    result = stress(*arguments)
    assert result.exit_code == 2
    assert text in result.output


def test_where_cuda_is_missing_the_drivers_own_words_say_so() -> None:
    """In a process of its own: this one may have loaded the emulated device."""
    done = run_python(
        "from vmem_kv.cli import main\nimport sys\nsys.argv[1:] = ['stress', '--driver', 'cuda:99']\nmain()"
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "--driver host" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_ends_when_the_time_is_over() -> None:
    clock = ManualClock()
    seen: list[int] = []

    def on_progress(progress: Progress) -> bool:
        seen.append(progress.n_ops)
        return True

    class Ticking(ManualClock):
        def __call__(self) -> float:
            clock.advance(2.0)
            return clock()

    options = StressOptions(n_ops=None, seconds=7.0, fault_share=0.0)
    progress = run_stress(options, lambda: open_driver("native"), on_progress=on_progress, clock=Ticking())
    assert seen == [OPS_OF_ROUND * n for n in (1, 2, 3, 4)]
    assert (progress.n_faults, progress.was_stopped, progress.seconds) == (0, False, 8.0)


def test_it_stops_when_asked() -> None:
    progress = run_stress(StressOptions(), lambda: open_driver("cuda"), on_progress=lambda progress: False)
    assert progress.was_stopped
    assert progress.n_rounds == 1
    assert progress.findings == []
