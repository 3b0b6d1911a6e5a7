"""Copies and files on their way, let go by hand: nobody waits for them who need not, and nothing is forgotten."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vmem_kv.driver.base import Driver
from vmem_kv.engine import scheduler as scheduler_module
from vmem_kv.engine.arrivals import Arrivals
from vmem_kv.engine.engine import Engine
from vmem_kv.engine.moves import Carriers, Moves, threads
from vmem_kv.engine.parking import ParkingSlots
from vmem_kv.engine.request import FinishReason, Request
from vmem_kv.errors import ConfigError, DriverError, SessionInUse, UnknownSession
from vmem_kv.testing import ManualClock
from vmem_kv.tiers.host import Parking, Restoring
from vmem_kv.tiers.sessions import Level, Sessions

from ..by_hand import Hands
from ..held import Held
from .harness import engine_on, greedy, greedy_alone, n_pages_in_use, prompt_of, run, slots_in_use, tokens
from .test_parking import FRAME, TIGHT, alone, figures, requests_of
from .test_sessions import ask

OPTIONS: dict[str, Any] = {
    "page_bytes": 4096, "layout": "per_head", "prefix_min_tokens": 1, "host_bytes": 8 * FRAME, "session_ttl_s": 10.0,
    "premap_tokens": 0,
}  # fmt: skip
BROKEN = DriverError("copy", 5, "EIO")


@pytest.fixture(autouse=True)
def _never_wait_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step in which nothing can be computed waits for what a test holds: as long as that takes, in vain."""
    monkeypatch.setattr(scheduler_module, "WAIT_S", 0.001)


@contextmanager
def by_hand(folder: Path | None = None, *, closes: bool = False, **options: Any) -> Iterator[tuple[Engine, Hands]]:
    """An engine whose moves the test holds. At the end everything passes, before it is closed or while it is."""
    hands = Hands()
    disk = {} if folder is None else {"disk_folder": str(folder), "disk_bytes": 64 * FRAME}
    with engine_on(carriers=hands.open, **{**OPTIONS, **disk, **options}) as engine:
        try:
            yield engine, hands
        finally:
            if not closes:
                hands.release()
        if not closes:
            engine.tend()
            engine.slots.check()
            assert figures(engine).n_moving == 0
            return
        stock = engine.slots.close
        engine.slots.close = lambda: hands.release_behind(stock)  # type: ignore[method-assign]


def step(engine: Engine, n_steps: int = 1) -> list[int]:
    """The tokens of some steps; the books are right after each."""
    said: list[int] = []
    for _ in range(n_steps):
        said += [token for update in engine.step() for token in update.token_ids]
        engine.slots.check()
        engine.memory.cache.check()
    return said


def finish(engine: Engine, hands: Hands) -> list[int]:
    """Let everything go as it comes, until nothing is left; return the tokens of one answer."""
    said: list[int] = []
    while engine.has_work:
        said += step(engine)
        hands.let_go()
    return said


def park(engine: Engine) -> None:
    """What want of pages does to the last running sequence."""
    scheduler = engine._scheduler
    scheduler.preempt(scheduler.running()[-1])


def two(engine: Engine, *, session_id: str | None = None) -> tuple[Request, Request, list[int]]:
    """Two requests that run, and what the second has said; the first one goes on for long."""
    first = Request(prompt_of(20), greedy(60, ignore_eos=True))
    second = Request(prompt_of(30, 3), greedy(20, ignore_eos=True), session_id=session_id)
    engine.add(first)
    engine.add(second)
    said: list[int] = []
    for _ in range(4):
        said += [t for u in engine.step() if u.request_id == second.request_id for t in u.token_ids]
    return first, second, said


def check_second(second: Request, before: list[int], after: list[int]) -> None:
    whole = before + after
    expected = greedy_alone("llama", second.prompt_token_ids, 20)
    assert len(whole) == 20
    assert whole[: len(expected)] == expected


def run_held(engine: Engine, hands: Hands) -> Any:
    """Run to the end; what is held passes a step later."""
    stock = engine.step

    def later() -> Any:
        updates = stock()
        hands.let_go()
        return updates

    engine.step = later  # type: ignore[method-assign]
    return run(engine)


# A park, and a restore


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_step_is_not_blocked_while_a_sequence_goes_to_host_memory_and_comes_back(prefix_caching: bool) -> None:
    with by_hand(prefix_caching=prefix_caching) as (engine, hands):
        first, second, said = two(engine)
        slots = slots_in_use(engine)
        park(engine)
        assert figures(engine).n_moving == 1
        assert len(step(engine, 5)) == 5  # of the first one
        assert (figures(engine).n_parked, engine.snapshot().n_waiting) == (0, 1)
        assert slots <= set(engine.memory.cache.active_slots())  # its slot is nobody else's
        n_here, n_soon = engine.memory.n_available_pages(), engine.slots.n_available_pages()
        assert n_here < n_soon
        hands.copies.let_go()
        engine.slots.settle()
        assert figures(engine).n_parked == 1
        engine.slots.give_way(1 << 40)  # what is only cached goes: its rows are in host memory alone
        assert engine.memory.n_available_pages() >= n_soon
        assert len(step(engine, 5)) == 5  # while the second one comes back
        assert (figures(engine).n_moving, figures(engine).n_restored) == (1, 0)
        hands.copies.let_go()
        step_of_both = engine.step()
        assert {u.request_id for u in step_of_both} == {first.request_id, second.request_id}
        said += [t for u in step_of_both if u.request_id == second.request_id for t in u.token_ids]
        assert (figures(engine).n_moving, figures(engine).n_restored) == (0, 1)
        check_second(second, said, tokens(run_held(engine, hands), second))
        assert engine.snapshot().n_recomputed_tokens == 0


def test_who_is_parked_while_its_rows_are_still_cached_takes_them_from_there() -> None:
    with by_hand() as (engine, hands):
        _, second, said = two(engine)
        park(engine)
        step(engine, 2)
        hands.copies.let_go()
        check_second(second, said, tokens(run_held(engine, hands), second))
        assert figures(engine).host.in_bytes == 0


@pytest.mark.parametrize("seed", [None, 5], ids=["greedy", "seeded"])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_pool_at_a_third_of_the_demand_gives_the_same_tokens_however_late_the_moves(
    seed: int | None, prefix_caching: bool
) -> None:
    requests = requests_of(seed)
    with by_hand(**{**TIGHT, "host_bytes": 16 * FRAME, "prefix_caching": prefix_caching}) as (engine, hands):
        answers = run_late(engine, hands, requests, 3)
        assert [tokens(answers, r) for r in requests] == alone(seed)
        assert figures(engine).n_restored > 0
        assert engine.snapshot().n_recomputed_tokens == 0


def run_late(engine: Engine, hands: Hands, requests: list[Request], every: int) -> Any:
    """Run requests, letting everything go every so many steps."""
    stock, n_steps = engine.step, 0

    def later() -> Any:
        nonlocal n_steps
        updates = stock()
        n_steps += 1
        if n_steps % every == 0:
            hands.let_go()
        if n_steps % 7 == 0:
            engine.slots.check()
            engine.memory.cache.check()
        return updates

    engine.step = later  # type: ignore[method-assign]
    return run(engine, requests)


def test_pages_on_their_way_cost_nobody_else_his_slot() -> None:
    """And who needs no page goes on, until everybody waits; then one park makes room for all of them."""
    with by_hand(**{**TIGHT, "host_bytes": 16 * FRAME}) as (engine, hands):
        for request in requests_of(None):
            engine.add(request)
        while not figures(engine).n_moving:
            step(engine)
        assert engine.snapshot().n_preempted == 1
        n_said = [len(step(engine)) for _ in range(30)]
        assert n_said[0] > 0
        assert n_said[-1] == 0  # everybody waits for a page
        assert engine.snapshot().n_preempted <= 3  # as many as the running ones needed pages for
        n_preempted = engine.snapshot().n_preempted
        assert step(engine, 20) == []
        assert engine.snapshot().n_preempted == n_preempted
        hands.let_go()
        assert len(step(engine)) > 0


# Ends on the way


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("state", ["leaving", "parked", "arriving", "arrived"])
@pytest.mark.parametrize("end", ["abort", "close"])
def test_whoever_ends_on_the_way_leaves_nothing(end: str, state: str, prefix_caching: bool) -> None:
    with by_hand(closes=end == "close", prefix_caching=prefix_caching) as (engine, hands):
        first, second, _ = two(engine)
        park(engine)
        step(engine)
        if state != "leaving":
            hands.let_go()
            engine.slots.settle()
            engine.slots.give_way(1 << 40)
        if state in ("arriving", "arrived"):
            step(engine)
            assert figures(engine).n_moving == 1
        if state == "arrived":
            hands.let_go()
        if end == "close":
            return
        (update,) = engine.abort(second.request_id)
        assert update.finish_reason is FinishReason.ABORT
        engine.slots.check()
        assert len(step(engine, 3)) == 3  # of the other one
        hands.let_go()
        answers = run(engine)
        expected = greedy_alone("llama", first.prompt_token_ids, 60)
        assert tokens(answers, first)[-10:] == expected[-10:]
        assert not slots_in_use(engine)
        assert n_pages_in_use(engine) == 0
        assert figures(engine).host.taken_bytes == 0
        assert figures(engine).n_moving == 0


@pytest.mark.parametrize("state", ["leaving", "parked", "arriving", "arrived"])
@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR])
def test_a_conversation_that_is_left_while_it_is_parked_keeps_what_was_computed(
    state: str, reason: FinishReason
) -> None:
    with by_hand(prefix_caching=False) as (engine, hands):
        _, second, said = two(engine, session_id="one")
        park(engine)
        step(engine)
        if state != "leaving":
            hands.let_go()
            engine.slots.settle()
        if state in ("arriving", "arrived"):
            step(engine)
            assert figures(engine).n_moving == 1
        if state == "arrived":
            hands.let_go()
        engine._end(list(engine._requests[second.request_id]), reason)
        hands.let_go()
        engine.tend()
        engine.slots.check()
        stats = figures(engine)
        if reason is FinishReason.ERROR:
            assert (sum(stats.sessions[:4]), stats.host.taken_bytes) == (0, 0)
            return
        assert level(engine, "one") is Level.HOST
        assert stats.host.spare_bytes == 0  # it is nowhere else
        assert go_on(engine, hands, (*second.prompt_token_ids, *said)) == 30 + len(said) - 1


def test_what_is_left_late_replaces_no_later_turn() -> None:
    with by_hand(prefix_caching=False) as (engine, hands):
        _, second, _ = two(engine, session_id="one")
        park(engine)
        engine.abort(second.request_id)
        later = Request(prompt_of(12, 5), greedy(4, ignore_eos=True), session_id="one")
        run_request(engine, later)
        hands.let_go()
        engine.tend()
        assert (level(engine, "one"), tokens_known(engine, "one")) == (Level.DEVICE, 15)
        assert figures(engine).host.taken_bytes == 0


def test_an_engine_at_rest_takes_up_what_passes() -> None:
    with by_hand(prefix_caching=False) as (engine, hands):
        request = Request(prompt_of(20), greedy(30))
        engine.add(request)
        step(engine)
        park(engine)
        engine.abort(request.request_id)
        assert not engine.has_work
        assert engine.memory.cache.active_slots()  # which is being read
        hands.let_go()
        engine.tend()
        assert not engine.memory.cache.active_slots()
        assert figures(engine).host.taken_bytes == 0


@pytest.mark.parametrize("direction", ["out", "in"])
def test_a_copy_that_fails_late_costs_no_token(direction: str) -> None:
    with by_hand(prefix_caching=False) as (engine, hands):
        _, second, said = two(engine)
        park(engine)
        step(engine)
        if direction == "in":
            hands.let_go()
            step(engine)
        hands.copies.fail(BROKEN)
        check_second(second, said, tokens(run_held(engine, hands), second))
        assert figures(engine).n_refused == 1
        assert engine.snapshot().n_recomputed_tokens > 0
        assert figures(engine).host.taken_bytes == 0


def test_a_device_that_is_lost_on_the_way_ends_the_engine() -> None:
    lost = DriverError("copy_to_host", 719, "CUDA_ERROR_LAUNCH_FAILED")
    lost.is_fatal = True
    with by_hand() as (engine, hands):
        two(engine)
        park(engine)
        hands.copies.fail(lost)
        with pytest.raises(DriverError, match="719"):
            engine.step()


def test_under_pressure_a_slot_that_waits_for_its_sequence_is_given_up() -> None:
    """It holds pages that the running one needs to its end; the host copy is as it was."""
    options = {"max_bytes": 12 * 12 * 4096, "max_num_seqs": 4, "prefix_caching": False}
    with by_hand(**options) as (engine, hands):
        first = Request(prompt_of(60), greedy(100, ignore_eos=True))
        second = Request(prompt_of(50, 3), greedy(20, ignore_eos=True))
        engine.add(first)
        engine.add(second)
        said = [t for u in engine.step() if u.request_id == second.request_id for t in u.token_ids]
        park(engine)
        hands.let_go()
        step(engine)  # the second one comes back
        assert figures(engine).n_moving == 1
        answers: dict[str, list[int]] = {first.request_id: [], second.request_id: []}
        n_steps = 0
        while engine.has_work:
            for update in engine.step():
                assert update.error is None
                answers[update.request_id] += update.token_ids
            n_steps += 1
            if n_steps > 60:
                hands.let_go()
            assert n_steps < 1_000
        assert engine.snapshot().n_preempted == 1
        assert engine.snapshot().n_recomputed_tokens == 0
        check_second(second, said, answers[second.request_id])


def test_who_is_parked_while_its_copy_is_still_read_in_vain_gets_another_one() -> None:
    with by_hand() as (engine, hands):
        _, second, said = two(engine)
        park(engine)
        hands.let_go()
        engine.slots.settle()
        engine.slots.give_way(1 << 40)
        step(engine)
        assert figures(engine).n_moving == 1
        assert engine.slots.give_way(1)  # the slot that waits for it, which is being written still
        known = (*second.prompt_token_ids, *said)
        other = Request(known, greedy(3, ignore_eos=True), priority=-1)
        engine.add(other)  # which computes the same, so that the second one finds it
        while engine.is_unfinished(other.request_id) or len(said) < 8:
            said += [t for u in engine.step() if u.request_id == second.request_id for t in u.token_ids]
        assert figures(engine).n_restored == 0
        taken_bytes = figures(engine).host.taken_bytes
        park(engine)
        assert figures(engine).host.taken_bytes > taken_bytes
        check_second(second, said, tokens(run_held(engine, hands), second))
        assert figures(engine).host.taken_bytes == 0


@pytest.mark.parametrize("depth", [None, 1], ids=["parked", "session"])
def test_a_slot_that_waits_for_its_sequence_does_not_keep_a_more_urgent_one_from_running(depth: int | None) -> None:
    with by_hand(max_num_seqs=1, prefix_slots=0, prefix_caching=False) as (engine, hands):
        if depth is None:
            request = Request(prompt_of(30, 3), greedy(20, ignore_eos=True))
            engine.add(request)
            said = step(engine, 4)
            park(engine)
            hands.let_go()
        else:
            known = keep(engine, hands, "one")
            descend(engine, hands, "one", depth)
            request = Request((*known, 5), greedy(20, ignore_eos=True), session_id="one")
            engine.add(request)
            said = []
        assert step(engine, 2) == []  # its slot is taken, and its rows are on their way
        urgent = Request(prompt_of(20, 9), greedy(4, ignore_eos=True), priority=-1)
        engine.add(urgent)
        answers = run_held(engine, hands)
        assert tokens(answers, urgent) == greedy_alone("llama", urgent.prompt_token_ids, 4)
        check_second(request, said, tokens(answers, request))
        assert engine.snapshot().n_recomputed_tokens == 0


# Host memory that comes


def test_who_is_parked_waits_for_the_host_memory_of_sessions_that_go_to_disk(tmp_path: Path) -> None:
    with by_hand(tmp_path, host_bytes=FRAME, prefix_caching=False) as (engine, hands):
        keep(engine, hands, "one")
        with pytest.raises(UnknownSession):
            engine.park_session("two")
        descend(engine, hands, "one", 1)
        first, second, said = two(engine)
        park(engine)
        assert (len(hands.copies.waiting), len(hands.files.waiting)) == (0, 1)
        assert len(step(engine, 3)) == 3
        hands.files.let_go()
        step(engine)
        assert len(hands.copies.waiting) == 1
        assert level(engine, "one") is Level.DISK
        check_second(second, said, tokens(run_held(engine, hands), second))
        assert (figures(engine).n_parked, figures(engine).n_restored, figures(engine).n_refused) == (1, 1, 0)
        assert tokens_known(engine, "one") == 35
        assert first.request_id


def test_who_waits_for_host_memory_and_ends_gives_its_slot_back_at_once(tmp_path: Path) -> None:
    with by_hand(tmp_path, host_bytes=FRAME, prefix_caching=False) as (engine, hands):
        keep(engine, hands, "one")
        descend(engine, hands, "one", 1)
        _, second, _ = two(engine)
        park(engine)
        engine.abort(second.request_id)
        assert len(slots_in_use(engine)) == 1
        assert not hands.copies.waiting
        hands.let_go()
        assert level(engine, "one") is Level.HOST  # as it is noticed in the next step
        engine.tend()
        assert level(engine, "one") is Level.DISK


@pytest.mark.parametrize("error", [OSError(5, "broken disk"), OSError(28, "full")])
def test_a_disk_that_fails_late_makes_host_room_all_the_same(tmp_path: Path, error: OSError) -> None:
    with by_hand(tmp_path, host_bytes=FRAME, prefix_caching=False) as (engine, hands):
        keep(engine, hands, "one")
        descend(engine, hands, "one", 1)
        _, second, said = two(engine)
        park(engine)
        hands.files.fail(error)
        check_second(second, said, tokens(run_held(engine, hands), second))
        assert figures(engine).n_parked == 1
        assert figures(engine).sessions.n_gone == 1
        assert figures(engine).disk_bytes == 0


# Sessions


def keep(engine: Engine, hands: Hands, name: str, seed: int = 0) -> tuple[int, ...]:
    """Let a session wait on the device; return its tokens and what was answered."""
    request = Request(prompt_of(30, seed), greedy(6, ignore_eos=True), session_id=name)
    answers = run_request(engine, request)
    assert not hands.copies.waiting
    return (*request.prompt_token_ids, *answers)


def run_request(engine: Engine, request: Request) -> list[int]:
    engine.add(request)
    said: list[int] = []
    while engine.is_unfinished(request.request_id):
        said += [t for u in engine.step() if u.request_id == request.request_id for t in u.token_ids]
    return said


def descend(engine: Engine, hands: Hands, name: str, n_levels: int) -> None:
    """An operator waits for what he asks for."""
    for _ in range(n_levels):
        with hands.passing():
            engine.park_session(name)


def level(engine: Engine, name: str) -> Level:
    assert engine._sessions is not None
    return engine._sessions._sessions.level(name)


def tokens_known(engine: Engine, name: str) -> int:
    assert engine._sessions is not None
    return len(engine._sessions._sessions.tokens(name))


def go_on(engine: Engine, hands: Hands, known: tuple[int, ...], *, every_step: bool = True) -> int:
    """Go on with a session; return how many tokens it had of it."""
    request = Request((*known, 5), greedy(6, ignore_eos=True), session_id="one")
    engine.add(request)
    said: list[int] = []
    n_cached = 0
    while engine.is_unfinished(request.request_id):
        for update in engine.step():
            if update.request_id == request.request_id:
                said += update.token_ids
                n_cached = update.n_cached_tokens
        if every_step:
            hands.let_go()
    expected = greedy_alone("llama", (*known, 5), 6)
    assert said[: len(expected)] == expected
    engine.slots.check()
    return n_cached


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_time_moves_a_session_while_others_are_computed(tmp_path: Path, prefix_caching: bool) -> None:
    clock = ManualClock()
    with by_hand(tmp_path, clock=clock, prefix_caching=prefix_caching) as (engine, hands):
        known = keep(engine, hands, "one")
        engine.add(Request(prompt_of(20, 7), greedy(60, ignore_eos=True)))
        for seconds, mover, there, then in (
            (10, hands.copies, Level.DEVICE, Level.HOST),
            (100, hands.files, Level.HOST, Level.DISK),
        ):
            clock.advance(seconds)
            assert len(step(engine, 4)) >= 3
            assert (len(mover.waiting), figures(engine).n_moving) == (1, 1)
            assert level(engine, "one") is there
            mover.let_go()
            step(engine)
            assert level(engine, "one") is then
            assert figures(engine).n_moving == 0
        request = Request((*known, 5), greedy(6, ignore_eos=True), session_id="one")
        if prefix_caching:
            engine.slots.give_way(1 << 40)
        engine.add(request)
        assert len(step(engine, 3)) == 3  # of the other one, while the file is read
        assert (len(hands.files.waiting), len(hands.copies.waiting)) == (1, 0)
        hands.files.let_go()
        assert len(step(engine, 3)) == 3  # and while the rows come to the device
        assert (len(hands.files.waiting), len(hands.copies.waiting)) == (0, 1)
        hands.copies.let_go()
        updates = engine.step()
        assert len(updates) == 2
        assert [u.n_cached_tokens for u in updates if u.request_id == request.request_id] == [35]
        engine.abort(request.request_id)


def test_a_session_on_its_way_down_that_is_asked_for_keeps_its_slot() -> None:
    clock = ManualClock()
    with by_hand(clock=clock, prefix_caching=False) as (engine, hands):
        known = keep(engine, hands, "one")
        slots = engine.memory.cache.active_slots()
        clock.advance(10)
        engine.tend()
        assert len(hands.copies.waiting) == 1
        assert go_on(engine, hands, known) == 35
        assert engine.memory.cache.active_slots() == slots
        assert figures(engine).host.in_bytes == 0


def test_a_session_on_its_way_to_disk_that_is_asked_for_comes_from_host_memory(tmp_path: Path) -> None:
    clock = ManualClock()
    with by_hand(tmp_path, clock=clock, prefix_caching=False) as (engine, hands):
        known = keep(engine, hands, "one")
        descend(engine, hands, "one", 1)
        clock.advance(100)
        engine.tend()
        assert len(hands.files.waiting) == 1
        with hands.copies.passing():
            assert go_on(engine, hands, known, every_step=False) == 35  # and the file is still being written
        assert len(hands.files.waiting) == 1
        assert figures(engine).disk_bytes > 0
        hands.files.let_go()
        engine.tend()
        clock.advance(0.2)
        engine.tend()
        assert figures(engine).disk_bytes == 0


def test_a_session_that_was_asked_for_makes_room_all_the_same_for_who_runs() -> None:
    """Who asked for it cannot begin any more where pages are that short."""
    clock = ManualClock()
    options: dict[str, Any] = {"max_bytes": 12 * 12 * 4096, "prefix_caching": False, "clock": clock}
    with by_hand(**options) as (engine, hands):
        known = keep(engine, hands, "one")
        clock.advance(10)
        engine.tend()
        first = Request(prompt_of(40, 5), greedy(140, ignore_eos=True))
        second = Request((*known, 5), greedy(20, ignore_eos=True), session_id="one")
        engine.add(first)
        engine.add(second)
        assert len(step(engine, 3)) == 3
        assert engine._sessions is not None
        assert engine._sessions._sessions.is_held("one")
        answers: dict[str, list[int]] = {first.request_id: [], second.request_id: []}
        n_steps = 0
        while engine.has_work:
            for update in engine.step():
                assert update.error is None
                answers[update.request_id] += update.token_ids
            n_steps += 1
            if n_steps > 150:
                hands.let_go()
            assert n_steps < 1_000
        assert len(answers[first.request_id]) == 140 - 3
        check_second(second, [], answers[second.request_id])
        assert engine.snapshot().n_prompt_tokens == 30 + 40 + 2  # the rest came from the session


@pytest.mark.parametrize("depth", [1, 2], ids=["host", "disk"])
@pytest.mark.parametrize("n_let_go", [0, 1, 2])
def test_who_ends_before_its_session_has_come_leaves_it_where_it_was(tmp_path: Path, depth: int, n_let_go: int) -> None:
    with by_hand(tmp_path, prefix_caching=False) as (engine, hands):
        known = keep(engine, hands, "one")
        descend(engine, hands, "one", depth)
        request = Request((*known, 5), greedy(6, ignore_eos=True), session_id="one")
        engine.add(request)
        step(engine)
        for _ in range(n_let_go):
            hands.let_go()
            if n_let_go < depth:
                step(engine)
        engine.abort(request.request_id)
        engine.slots.check()
        assert level(engine, "one") is [Level.HOST, Level.DISK][depth - 1]
        hands.let_go()
        engine.tend()
        assert not engine.memory.cache.active_slots()
        stats = figures(engine).host
        assert stats.spare_bytes == (stats.taken_bytes if depth == 2 else 0)  # what is nowhere else is not dropped
        assert go_on(engine, hands, known) == 35


@pytest.mark.parametrize("depth", [1, 2], ids=["host", "disk"])
@pytest.mark.parametrize("forgets", [True, False])
def test_a_session_that_is_ended_on_its_way_back_is_computed(tmp_path: Path, depth: int, forgets: bool) -> None:
    with by_hand(tmp_path, prefix_caching=False) as (engine, hands):
        known = keep(engine, hands, "one")
        descend(engine, hands, "one", depth)
        request = Request((*known, 5), greedy(6, ignore_eos=True), session_id="one")
        engine.add(request)
        step(engine, 2)
        if forgets:
            assert engine._sessions is not None
            engine._sessions._sessions.give_up("one")  # for another one's place
        else:
            (hands.copies if depth == 1 else hands.files).fail(BROKEN if depth == 1 else OSError(5, "broken disk"))
        said = finish(engine, hands)
        expected = greedy_alone("llama", request.prompt_token_ids, 6)
        assert said[: len(expected)] == expected
        assert engine.snapshot().n_prompt_tokens == 30 + 37  # everything
        assert tokens_known(engine, "one") == 42  # which is kept again
        assert figures(engine).disk_bytes == 0


def test_a_session_whose_copy_fails_late_for_want_of_pages_is_gone() -> None:
    options: dict[str, Any] = {"max_bytes": 8 * 12 * 4096, "prefix_caching": False}
    with by_hand(**options) as (engine, hands):
        keep(engine, hands, "one")
        keep(engine, hands, "two", 1)
        needy = Request(prompt_of(100, 9), greedy(4, ignore_eos=True))
        engine.add(needy)
        assert step(engine, 3) == []  # it waits for the pages of both
        assert len(hands.copies.waiting) == 2
        hands.copies.fail(BROKEN)
        assert finish(engine, hands) == greedy_alone("llama", needy.prompt_token_ids, 4)
        stats = figures(engine).sessions
        assert (stats.n_on_device, stats.n_on_host) == (0, 1)
        assert engine.snapshot().n_preempted == 0


def test_a_slot_that_is_on_its_way_is_waited_for_and_costs_one_session() -> None:
    options: dict[str, Any] = {"max_num_seqs": 2, "prefix_slots": 0, "prefix_caching": False}
    with by_hand(**options) as (engine, hands):
        keep(engine, hands, "one")
        keep(engine, hands, "two", 1)
        request = Request(prompt_of(12, 9), greedy(4, ignore_eos=True))
        engine.add(request)
        assert step(engine, 5) == []
        assert len(hands.copies.waiting) == 1
        assert finish(engine, hands) == greedy_alone("llama", request.prompt_token_ids, 4)
        stats = figures(engine).sessions
        assert (stats.n_on_device, stats.n_on_host, stats.n_gone) == (1, 1, 0)


def test_an_operator_waits_for_what_is_on_its_way() -> None:
    clock = ManualClock()
    with by_hand(clock=clock) as (engine, hands):
        known = keep(engine, hands, "one")
        clock.advance(10)
        engine.tend()
        assert hands.release_behind(lambda: engine.park_session("one")) is Level.HOST
        engine.slots.give_way(1 << 40)
        assert go_on(engine, hands, known) == 35
        with pytest.raises(UnknownSession):
            engine.park_session("two")


def test_the_session_of_who_runs_is_in_use_however_it_came(tmp_path: Path) -> None:
    with by_hand(tmp_path) as (engine, hands):
        known = keep(engine, hands, "one")
        descend(engine, hands, "one", 2)
        request = Request((*known, 5), greedy(6, ignore_eos=True), session_id="one")
        engine.add(request)
        for _ in range(4):
            step(engine)
            hands.let_go()
        with pytest.raises(SessionInUse):
            engine.park_session("one")
        finish(engine, hands)
        assert ask(engine, (*known, 5)).error is None


def test_closing_in_the_middle_of_everything_leaves_nothing(tmp_path: Path) -> None:
    clock = ManualClock()
    with by_hand(tmp_path, closes=True, clock=clock, prefix_caching=False) as (engine, hands):
        known = {name: keep(engine, hands, name, i) for i, name in enumerate(("one", "two", "three"))}
        descend(engine, hands, "one", 2)
        two(engine)
        park(engine)
        engine.add(Request((*known["one"], 5), greedy(6), session_id="one"))
        clock.advance(10)
        step(engine, 2)
        assert len(hands.copies.waiting) >= 2
        assert len(hands.files.waiting) == 1


# Who carries


def mover_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "vmem_kv-mover"]


def test_an_engine_has_its_things_moved_by_threads_and_ends_them() -> None:
    before = Held.now()
    with engine_on(carriers=threads, **OPTIONS) as engine:
        request = Request(prompt_of(20), greedy(12))
        assert len(mover_threads()) >= 2
        engine.add(request)
        said = [t for _ in range(3) for u in engine.step() for t in u.token_ids]
        park(engine)
        engine.slots.give_way(1 << 40)
        said += tokens(run(engine), request)
        assert said == greedy_alone("llama", request.prompt_token_ids, 12)
        assert figures(engine).n_parked == 1
    assert Held.now().beyond(before) == []


def test_without_threads_left_the_engines_own_moves_things(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def opened(driver: Driver) -> Carriers:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            return threads(driver)

    with engine_on(carriers=opened, **OPTIONS) as engine:
        request = Request(prompt_of(20), greedy(12))
        engine.add(request)
        step(engine, 3)
        park(engine)
        assert (figures(engine).n_parked, figures(engine).n_moving) == (1, 0)


def test_tiers_that_cannot_be_leave_no_thread() -> None:
    before = Held.now()
    options = {"disk_bytes": FRAME, "disk_folder": "/nowhere"}
    with pytest.raises(ConfigError, match="no tier on disk"), engine_on(carriers=threads, **{**OPTIONS, **options}):
        pass
    assert Held.now().beyond(before) == []


def test_nobody_waits_for_a_file_where_a_copy_is_on_its_way(tmp_path: Path) -> None:
    with by_hand(tmp_path, prefix_caching=False) as (engine, hands):
        moves = engine._scheduler._moves
        keep(engine, hands, "one")
        descend(engine, hands, "one", 1)
        while moves.wait(0):
            pass  # what has passed before
        assert engine._sessions is not None
        engine._sessions.make_host_room()
        asked: list[str] = []
        for what in moves._under_way:
            what.passes_within = lambda timeout_s: bool(asked.append("file"))  # type: ignore[method-assign]
        assert moves.wait(0)
        two(engine)
        park(engine)
        assert len(moves) == 2
        assert moves.wait(0)
        assert asked == ["file"]


# Planted mistakes


def forget_who_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who ends while its rows come back leaves them to themselves."""
    monkeypatch.setattr(Arrivals, "drop", lambda self, sequence: self._arriving.pop(sequence, None))


def forget_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who ends leaves its host copy."""
    monkeypatch.setattr(ParkingSlots, "_drop", lambda self, sequence: self._copies.pop(sequence, None))


def ends_while_it(state: str) -> None:
    test_whoever_ends_on_the_way_leaves_nothing("abort", state, False)


def run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes back runs before its rows are there."""
    monkeypatch.setattr("vmem_kv.engine.arrivals.is_over", lambda what: True)
    monkeypatch.setattr(Restoring, "finish", lambda self: None)


def free_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who leaves gives its slot back before that was read."""
    monkeypatch.setattr("vmem_kv.engine.parking.is_over", lambda what: True)
    monkeypatch.setattr(Parking, "finish", lambda self: self._commit())


def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that come do not count."""
    monkeypatch.setattr(Moves, "n_coming_pages", lambda self: 0)


def spared(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was restored into a slot that nobody wants is taken to be there."""
    monkeypatch.setattr(Restoring, "cancel", Restoring.finish)


def stubborn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that wait for their sequences are not given up."""
    monkeypatch.setattr(Arrivals, "drop_one", lambda self: False)


def unheld(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is asked for goes down all the same."""
    monkeypatch.setattr(Sessions, "hold", lambda self, session_id, domain: None)


@pytest.mark.parametrize(
    ("plant", "detector"),
    [
        (forget_who_arrives, lambda folder: ends_while_it("arriving")),
        (forget_copies, lambda folder: ends_while_it("leaving")),
        (forget_copies, lambda folder: ends_while_it("parked")),
        (
            run_at_once,
            lambda folder: test_a_step_is_not_blocked_while_a_sequence_goes_to_host_memory_and_comes_back(False),
        ),
        (
            free_at_once,
            lambda folder: test_a_step_is_not_blocked_while_a_sequence_goes_to_host_memory_and_comes_back(False),
        ),
        (uncounted, lambda folder: test_pages_on_their_way_cost_nobody_else_his_slot()),
        (
            spared,
            lambda folder: test_who_ends_before_its_session_has_come_leaves_it_where_it_was(folder, 1, 0),
        ),
        (stubborn, lambda folder: test_under_pressure_a_slot_that_waits_for_its_sequence_is_given_up()),
        (
            stubborn,
            lambda folder: test_a_slot_that_waits_for_its_sequence_does_not_keep_a_more_urgent_one_from_running(None),
        ),
        (unheld, lambda folder: test_a_session_on_its_way_down_that_is_asked_for_keeps_its_slot()),
    ],
)
def test_a_mistake_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Any, detector: Any) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        detector(tmp_path)
