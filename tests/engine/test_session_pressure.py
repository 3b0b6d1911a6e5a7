"""Sessions where something is short or fails for good: nobody waits in vain, nobody takes what is another's share."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.core.backends import open_backend
from tests.hf.architectures import build_model
from vmem_kv.config import CacheConfig
from vmem_kv.devices import OpenDriver
from vmem_kv.driver.base import Driver
from vmem_kv.driver.ledger import Ledger
from vmem_kv.engine.async_engine import AsyncEngine
from vmem_kv.engine.engine import Engine
from vmem_kv.engine.llm import LLM
from vmem_kv.engine.request import Request
from vmem_kv.errors import DriverError, EngineDead, InvariantError, UnknownSession
from vmem_kv.testing.faults import FaultyDriver, Plan, Point, driver_error
from vmem_kv.tiers.disk import DiskTier
from vmem_kv.tiers.sessions import Level

from .harness import WAIT_S, greedy, greedy_alone, prompt_of, run
from .test_sessions import FRAME, ask, figures, sessions_on

ONE_SLOT: dict[str, Any] = {"max_num_seqs": 1, "prefix_slots": 0, "prefix_caching": False, "premap_tokens": 0}
TWO_SLOTS: dict[str, Any] = {**ONE_SLOT, "max_num_seqs": 2}


def faulty() -> tuple[list[FaultyDriver], OpenDriver]:
    drivers: list[FaultyDriver] = []

    def opened(device: torch.device, config: CacheConfig) -> Driver:
        drivers.append(FaultyDriver(open_backend("native", Ledger())))
        return drivers[0]

    return drivers, opened


def first_fences(n_failing: int) -> Plan:
    """The next so many fences cannot be recorded."""
    left = [n_failing]

    def plan(point: Point) -> BaseException | None:
        if point.operation != "fence" or not left[0]:
            return None
        left[0] -= 1
        return driver_error()(point)

    return plan


def request_of(seed: int, session_id: str | None = None) -> Request:
    return Request(prompt_of(30, seed), greedy(4, ignore_eos=True), session_id=session_id)


def n_held_pages(engine: Engine) -> int:
    return engine.slots.n_available_pages() - engine.memory.n_available_pages()


# Slots that the driver does not let go of


@pytest.mark.parametrize("n_failing", range(1, 7))
def test_fences_that_fail_in_a_row_end_a_request_at_most(n_failing: int) -> None:
    drivers, opened = faulty()
    with sessions_on(driver=opened, **ONE_SLOT) as engine:
        ask(engine, prompt_of(30), "a")
        request = request_of(2, "b")
        with drivers[0].failing(first_fences(n_failing)):
            update = run(engine, [request])[request.request_id][0]
        assert (update.error is None) == (n_failing < 2)
        ask(engine, prompt_of(30, 3), "c")
        assert figures(engine).n_on_device == 1


def test_where_one_session_cannot_leave_another_one_does() -> None:
    drivers, opened = faulty()
    with sessions_on(driver=opened, **TWO_SLOTS) as engine:
        ask(engine, prompt_of(30), "a")
        ask(engine, prompt_of(30, 1), "b")
        request = request_of(2)
        with drivers[0].failing(first_fences(2)):  # of the first one: it neither moves nor goes
            update = run(engine, [request])[request.request_id][0]
        assert update.error is None
        assert update.token_ids == greedy_alone("llama", request.prompt_token_ids, 4)
        assert engine.park_session("a") is Level.HOST  # which it was not yet
        assert engine.park_session("b") is None


def test_who_finds_no_slot_waits_for_the_running() -> None:
    drivers, opened = faulty()
    with sessions_on(driver=opened, **TWO_SLOTS) as engine:
        ask(engine, prompt_of(30), "a")
        running, waiting = request_of(1), request_of(2)
        engine.add(running)
        engine.step()
        engine.add(waiting)
        with drivers[0].failing(first_fences(1_000)):
            assert not [u for u in engine.step() if u.request_id == waiting.request_id]
            assert engine.snapshot().n_waiting == 1
        update = run(engine)[waiting.request_id][0]
        assert update.error is None
        assert update.token_ids == greedy_alone("llama", waiting.prompt_token_ids, 4)


def test_a_session_that_cannot_be_replaced_stays_and_the_engine_goes_on() -> None:
    drivers, opened = faulty()
    with sessions_on(driver=opened, **TWO_SLOTS) as engine:
        said = ask(engine, prompt_of(30)).token_ids
        request = request_of(2, "one")
        with drivers[0].failing(first_fences(1_000)):
            update = run(engine, [request])[request.request_id][0]
        assert update.error is None
        assert figures(engine).n_on_device == 1
        assert ask(engine, (*prompt_of(30), *said, 5)).n_cached_tokens == 35
        engine.memory.retire([])  # what failed is tried again with the next ones


class Stuck:
    """A fence that no device can say anything about, until it has recovered."""

    def __init__(self) -> None:
        self.is_well = False

    def passed(self) -> bool:
        self.wait()
        return True

    def wait(self) -> None:
        if not self.is_well:
            raise DriverError("fence", 5, "EIO")


@pytest.mark.parametrize("recovers", [True, False])
def test_a_restore_that_cannot_be_waited_for_costs_the_session_and_no_token(recovers: bool) -> None:
    drivers, opened = faulty()
    fence = Stuck()
    with sessions_on(driver=opened, premap_tokens=0, prefix_caching=False) as engine:
        said = ask(engine, prompt_of(30)).token_ids
        engine.park_session("one")
        stock = drivers[0].copy_from_host
        drivers[0].copy_from_host = lambda *args: (stock(*args), fence)[1]  # type: ignore[method-assign]
        assert ask(engine, (*prompt_of(30), *said, 5)).n_cached_tokens == 0
        drivers[0].copy_from_host = stock  # type: ignore[method-assign]
        fence.is_well = recovers
        engine.tend()
        engine.forget_session("one")
        tiers = engine.snapshot().tiers
        assert tiers is not None
        assert (tiers.host.taken_bytes == 0) == recovers


# Room, and shares of it


def test_who_is_brought_back_is_not_what_makes_room_for_it() -> None:
    """One frame, which it has itself; its slot is that of another one, which would have to go there."""
    with sessions_on(host_bytes=FRAME, **ONE_SLOT) as engine:
        said = ask(engine, prompt_of(30), "a").token_ids
        engine.park_session("a")
        ask(engine, prompt_of(30, 2), "b")
        assert ask(engine, (*prompt_of(30), *said, 5), "a").n_cached_tokens == 35


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_the_share_of_what_nobody_uses_bounds_sessions(prefix_caching: bool) -> None:
    n_pages = 40 * 12
    options: dict[str, Any] = {"max_bytes": n_pages * 4096, "prefix_caching": prefix_caching, "premap_tokens": 0}
    for share, n_kept in ((0.0, 0), (0.25, 3), (1.0, 6)):
        with sessions_on(prefix_share=share, prefix_slots=12, **options) as engine:
            for i in range(6):
                said = ask(engine, prompt_of(30, i), f"s{i}").token_ids
                assert n_held_pages(engine) <= share * n_pages
            stats = figures(engine)
            assert (stats.n_on_device, stats.n_on_host, stats.n_gone) == (n_kept, 6 - n_kept, 0)
            for i in range(6 - n_kept):  # the longest idle ones left
                with pytest.raises(UnknownSession):
                    engine.forget_session(f"s{i}", "other")
                assert engine._sessions is not None
                assert engine._sessions._sessions.level(f"s{i}") is Level.HOST
            assert ask(engine, (*prompt_of(30, 5), *said, 5), "s5").n_cached_tokens == 35


@pytest.mark.parametrize("salts", [True, False])
def test_whoever_has_most_sessions_makes_place_for_one_more(salts: bool) -> None:
    """However a client spreads them over salts."""
    with sessions_on(max_sessions=4, premap_tokens=0) as engine:
        said = [ask(engine, prompt_of(30, i), f"a{i}", domain="A").token_ids for i in range(2)]
        for i in range(6):
            ask(engine, prompt_of(20, i), f"x{i}", domain=f"B\0{i}" if salts else "B")
        assert figures(engine).n_gone == 4
        for i in range(2):
            assert ask(engine, (*prompt_of(30, i), *said[i], 5), f"a{i}", domain="A").n_cached_tokens == 35


def test_of_equal_ones_who_comes_takes_his_own_place() -> None:
    with sessions_on(max_sessions=2, premap_tokens=0) as engine:
        for domain, name in (("A", "a"), ("B", "b"), ("B", "c")):
            ask(engine, prompt_of(20), name, domain=domain)
        engine.forget_session("a", "A")
        engine.forget_session("c", "B")
        with pytest.raises(UnknownSession):
            engine.forget_session("b", "B")


def test_what_goes_for_want_of_a_place_is_not_written_to_disk_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sessions_on(tmp_path, max_sessions=1) as engine:
        ask(engine, prompt_of(20), "a")
        engine.park_session("a")
        monkeypatch.setattr(DiskTier, "begin_store", None)
        ask(engine, prompt_of(20, 1), "b")
        stats = figures(engine)
        assert (stats.n_on_device, stats.n_on_host, stats.n_gone) == (1, 0, 1)


# Through the engine's thread


def started(inner: Engine) -> tuple[AsyncEngine, threading.Event]:
    """An engine whose thread is held until the event is set."""
    engine, go_on = AsyncEngine(inner), threading.Event()
    engine.start()
    engine._queue(lambda: go_on.wait(WAIT_S))
    return engine, go_on


def test_a_client_deletes_what_it_left() -> None:
    with sessions_on() as inner:
        ask(inner, prompt_of(30))
        engine = AsyncEngine(inner)
        with pytest.raises(EngineDead):
            engine.forget_session("one")
        engine.start()
        try:
            with pytest.raises(UnknownSession):
                engine.forget_session("one", "other")
            engine.forget_session("one")
            assert figures(inner).n_on_device == 0
            with pytest.raises(UnknownSession):
                engine.forget_session("one")
        finally:
            assert engine.stop()


def test_a_script_deletes_what_it_left() -> None:
    with LLM(copy.deepcopy(build_model("llama")), host_bytes="4MiB", prefix_min_tokens=1, max_bytes="8MiB") as llm:
        llm.generate([prompt_of(20)], greedy(4), session_ids=["one"], progress=False)
        llm.forget_session("one")
        with pytest.raises(UnknownSession):
            llm.park_session("one")


def test_who_waits_behind_what_ends_the_engine_learns_it() -> None:
    def end() -> None:
        raise InvariantError("planted")

    with sessions_on() as inner:
        engine, go_on = started(inner)
        first, second = engine._queue(end), engine.ending_session("one")
        go_on.set()
        with pytest.raises(InvariantError, match="planted"):
            first.result(WAIT_S)
        with pytest.raises(EngineDead):
            second.result(30)  # only a failure takes so long
        assert engine.stop()


def test_nothing_is_done_for_who_no_longer_waits() -> None:
    with sessions_on() as inner:
        ask(inner, prompt_of(30))
        engine, go_on = started(inner)
        ending = engine.ending_session("one")
        assert ending.cancel()
        go_on.set()
        assert engine.park_session("one") is Level.HOST
        assert engine.stop()
