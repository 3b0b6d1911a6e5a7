"""A conversation keeps its slot by name, wherever that goes meanwhile, and says what it would without any caching."""

from __future__ import annotations

import copy
import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.core.backends import open_backend
from tests.hf.architectures import build_model
from vmem_kv.config import CacheConfig
from vmem_kv.driver.base import Driver
from vmem_kv.driver.ledger import Ledger
from vmem_kv.engine.async_engine import AsyncEngine
from vmem_kv.engine.engine import Engine
from vmem_kv.engine.llm import LLM
from vmem_kv.engine.request import Request, SequenceUpdate
from vmem_kv.engine.session_slots import Name
from vmem_kv.engine.slot_source import SlotSource
from vmem_kv.engine.slots_over import SlotsOver
from vmem_kv.errors import EngineDead, InvalidRequest, SessionInUse, UnknownSession, VmemError
from vmem_kv.testing import ManualClock
from vmem_kv.testing.faults import (
    FaultyDriver,
    Plan,
    Point,
    driver_error,
    fail_kind,
    fail_next,
    natural_error,
    no_faults,
)
from vmem_kv.tiers import host as host_module
from vmem_kv.tiers.disk import DiskTier
from vmem_kv.tiers.sessions import Level, SessionStats

from ..held import Held
from .harness import (
    WAIT_S,
    backend,
    engine_on,
    greedy,
    greedy_alone,
    n_pages_in_use,
    prompt_of,
    run,
    slots_in_use,
    tokens,
)

MIB = 1 << 20
FRAME = 2 * MIB
OPTIONS: dict[str, Any] = {
    "page_bytes": 4096, "layout": "per_head", "prefix_min_tokens": 1, "host_bytes": 8 * FRAME, "session_ttl_s": 10.0
}  # fmt: skip
N_ANSWER = 6
N_ASKED = 5


@contextmanager
def sessions_on(folder: Path | None = None, **options: Any) -> Iterator[Engine]:
    """An engine with sessions, with a tier on disk where a folder is given; afterwards nothing is left."""
    disk = {} if folder is None else {"disk_folder": str(folder), "disk_bytes": 64 * MIB}
    before = Held.now()
    with engine_on(**{**OPTIONS, **disk, **options}) as engine:
        yield engine
    left = [what for what in Held.now().beyond(before) if "emulated device" not in str(what)]  # which stays open
    assert left == []


def figures(engine: Engine) -> SessionStats:
    tiers = engine.snapshot().tiers
    assert tiers is not None
    return tiers.sessions


def ask(engine: Engine, prompt: tuple[int, ...], session_id: str | None = "one", **fields: Any) -> SequenceUpdate:
    """Ask, and hold the answer against what `generate` says."""
    n_tokens = fields.pop("n_tokens", N_ANSWER)
    request = Request(prompt, greedy(n_tokens, ignore_eos=True), session_id=session_id, **fields)
    update = run(engine, [request])[request.request_id][0]
    assert update.error is None
    expected = greedy_alone("llama", prompt, n_tokens)
    assert update.token_ids[: len(expected)] == expected  # `generate` ends earlier
    engine.slots.check()
    engine.memory.cache.check()
    return update


def converse(engine: Engine, n_turns: int, between: Callable[[int], None]) -> list[tuple[int, int]]:
    """Hold a conversation; return for each turn the tokens of the prompt, and those that were computed."""
    prompt, counts = prompt_of(20), []
    for turn in range(n_turns):
        n_before = engine.snapshot().n_prompt_tokens
        update = ask(engine, prompt)
        n_computed = engine.snapshot().n_prompt_tokens - n_before
        assert update.n_cached_tokens == len(prompt) - n_computed
        counts.append((len(prompt), n_computed))
        between(turn)
        prompt = (*prompt, *update.token_ids, *prompt_of(N_ASKED, turn))
    return counts


def check_only_new(counts: list[tuple[int, int]]) -> None:
    assert [n for _, n in counts] == [20] + [1 + N_ASKED] * (len(counts) - 1)


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 2], ids=["device", "host", "disk"])
@pytest.mark.parametrize("driver", ["python", "native", "cuda"])
def test_ten_turns_compute_only_what_is_new_wherever_the_session_was(
    tmp_path: Path, driver: str, depth: int, prefix_caching: bool
) -> None:
    levels = [Level.DEVICE, Level.HOST, Level.DISK]
    with sessions_on(tmp_path, driver=backend(driver), prefix_caching=prefix_caching) as engine:

        def sink(turn: int) -> None:
            for level in levels[1 : depth + 1]:
                assert engine.park_session("one") is level
            if depth:
                engine.slots.give_way(1)  # what else is cached goes, and does not help
                assert engine.snapshot().cache.n_live_pages == 0

        counts = converse(engine, 10, sink)
        check_only_new(counts)
        tiers = engine.snapshot().tiers
        assert tiers is not None
        assert tiers.n_session_tokens == sum(n - computed for n, computed in counts)
        assert figures(engine).n_resumed == 9
        engine.forget_session("one")
        assert tiers.disk_bytes == 0 or depth == 2
        assert engine.snapshot().cache.n_live_pages == 0


def test_between_turns_only_what_was_added_goes_to_host_memory() -> None:
    with sessions_on() as engine:
        moved: list[int] = []

        def sink(turn: int) -> None:
            engine.park_session("one")
            tiers = engine.snapshot().tiers
            assert tiers is not None
            moved.append(tiers.host.out_bytes)

        converse(engine, 3, sink)
        token_bytes = engine.memory.cache.layout.token_bytes
        n_per_turn = N_ANSWER + N_ASKED
        assert [m // token_bytes for m in moved] == [25, 25 + n_per_turn, 25 + 2 * n_per_turn]


def test_time_moves_a_session_down_and_away(tmp_path: Path) -> None:
    clock = ManualClock()
    with sessions_on(tmp_path, clock=clock) as engine:
        said = ask(engine, prompt_of(20))
        for seconds, n_on in ((9, (1, 0, 0)), (1, (0, 1, 0)), (99, (0, 1, 0)), (1, (0, 0, 1)), (600, (0, 0, 0))):
            clock.advance(seconds)
            engine.tend()
            stats = figures(engine)
            assert (stats.n_on_device, stats.n_on_host, stats.n_on_disk) == n_on
            engine.slots.check()
        assert figures(engine).n_gone == 1
        update = ask(engine, (*prompt_of(20), *said.token_ids, 5))
        assert update.n_cached_tokens == 0


@pytest.mark.parametrize("depth", [0, 1, 2], ids=["device", "host", "disk"])
@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("n_same", [0, 1, 15, 16, 17, 24, 25])
def test_a_prompt_that_leaves_the_session_uses_what_is_common(
    tmp_path: Path, n_same: int, prefix_caching: bool, depth: int
) -> None:
    with sessions_on(tmp_path, prefix_caching=prefix_caching) as engine:
        known = (*prompt_of(20), *ask(engine, prompt_of(20)).token_ids)
        for _ in range(depth):
            engine.park_session("one")
        other = [t for t in prompt_of(30, 9) if n_same == len(known) or t != known[n_same]]
        update = ask(engine, (*known[:n_same], *other))
        assert update.n_cached_tokens == n_same
        again = ask(engine, (*known[:n_same], *other, *update.token_ids, 7))  # the session went the new way
        assert again.n_cached_tokens == n_same + len(other) + N_ANSWER - 1


def test_a_shorter_prompt_leaves_the_session_there() -> None:
    with sessions_on() as engine:
        ask(engine, prompt_of(40))
        assert ask(engine, prompt_of(40)[:10]).n_cached_tokens == 9
        assert ask(engine, prompt_of(40)[:1]).n_cached_tokens == 0


def check_isolation(engine: Engine, *, sinks: bool) -> None:
    """A name means nothing in another domain, whether the session waits on the device or in host memory."""
    for i, domain in enumerate(("a", "b", "")):
        assert ask(engine, prompt_of(30), "one", domain=domain).n_cached_tokens == 0
        with pytest.raises(UnknownSession):
            engine.park_session("one", "other")
        if sinks:
            engine.park_session("one", domain)
        assert figures(engine).n_on_device + figures(engine).n_on_host == i + 1
    assert ask(engine, prompt_of(31), "one", domain="b").n_cached_tokens == 0 or prompt_of(31)[:30] == prompt_of(30)


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("sinks", [True, False])
def test_domains_share_no_session(sinks: bool, prefix_caching: bool) -> None:
    with sessions_on(prefix_caching=prefix_caching) as engine:
        check_isolation(engine, sinks=sinks)


def test_a_session_found_without_its_domain_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless(sequence: Any) -> Name | None:
        return Name("", sequence.request.session_id)

    monkeypatch.setattr("vmem_kv.engine.session_slots._name_of", nameless)
    with sessions_on() as engine, pytest.raises((AssertionError, UnknownSession)):
        check_isolation(engine, sinks=False)


def stale_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host copy is taken for that of whatever is as long."""
    monkeypatch.setattr(host_module, "n_common", lambda one, other: min(len(one), len(other)))


def unmoved_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that were added since are not moved."""
    stock = host_module.HostTier._moves

    def fewer(self: Any, copy: Any, cache: Any, slot_id: Any, first: int, end: int) -> Any:
        return [] if first else stock(self, copy, cache, slot_id, first, end)

    monkeypatch.setattr(host_module.HostTier, "_moves", fewer)


@pytest.mark.parametrize("plant", [stale_rows, unmoved_rows])
def test_a_stale_host_copy_that_is_restored_is_found(
    monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    def edited(engine: Engine) -> None:
        said = ask(engine, prompt_of(40)).token_ids
        engine.park_session("one")
        other = (*prompt_of(40)[:30], *prompt_of(40, 3)[30:])  # as long, and another one
        said = ask(engine, other).token_ids
        engine.park_session("one")
        ask(engine, (*other, *said, 5), n_tokens=12)

    with sessions_on(prefix_caching=False) as engine:
        edited(engine)
    plant(monkeypatch)
    with sessions_on(prefix_caching=False) as engine, pytest.raises(AssertionError):
        edited(engine)


def test_retained_sessions_block_nobodys_pages() -> None:
    """A pool full of sessions serves a request that needs all of it, at once; and they come back afterwards."""
    with sessions_on(max_bytes=12 * 12 * 4096, max_num_seqs=4) as engine:
        said = [ask(engine, prompt_of(30, i), f"s{i}").token_ids for i in range(4)]
        needy = ask(engine, prompt_of(100, 40), None, n_tokens=90)
        assert len(needy.token_ids) == 90
        stats = engine.snapshot()
        assert stats.n_preempted == 0
        assert figures(engine).n_on_host > 0
        assert figures(engine).n_gone == 0
        for i, answer in enumerate(said):
            update = ask(engine, (*prompt_of(30, i), *answer, 9), f"s{i}")
            assert update.n_cached_tokens == 35


@pytest.mark.parametrize("prefix_slots", [0, 1])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_retained_sessions_block_nobodys_slot(prefix_caching: bool, prefix_slots: int) -> None:
    with sessions_on(max_num_seqs=2, prefix_slots=prefix_slots, prefix_caching=prefix_caching) as engine:
        for i in range(5):
            ask(engine, prompt_of(30, i), f"s{i}")
        others = [Request(prompt_of(12, 50 + i), greedy(3)) for i in range(4)]
        answers = run(engine, others)
        for request in others:
            assert tokens(answers, request) == greedy_alone("llama", request.prompt_token_ids, 3)
        for i in range(5):
            said = tuple(greedy_alone("llama", prompt_of(30, i), N_ANSWER))
            assert ask(engine, (*prompt_of(30, i), *said, 9), f"s{i}").n_cached_tokens >= 30


def test_where_sessions_hold_everything_a_new_one_begins_with_what_is_common() -> None:
    """Its system prompt lies under all of them, and they leave room for its own pages."""
    common = prompt_of(64)
    with sessions_on(max_bytes=13 * 12 * 4096, max_num_seqs=2) as engine:
        for i in range(9):
            update = ask(engine, (*common, *prompt_of(12, i)), f"s{i}")
            assert update.n_cached_tokens >= (64 if i else 0)
        assert figures(engine).n_on_host > 0
        assert figures(engine).n_on_device > 1


def test_with_sessions_a_pool_at_a_third_of_the_demand_gives_the_same_tokens(tmp_path: Path) -> None:
    """Many conversations at once, most of them somewhere below, while running ones are parked."""
    options: dict[str, Any] = {"max_num_seqs": 6, "max_bytes": 14 * 12 * 4096, "host_bytes": 2 * FRAME}
    with sessions_on(tmp_path, **options) as engine:
        prompts = {f"s{i}": prompt_of(8 + i, i) for i in range(10)}
        for turn in range(3):
            requests = [
                Request(p, greedy(40, ignore_eos=True), session_id=name, domain=str(i % 2))
                for i, (name, p) in enumerate(prompts.items())
            ]
            answers = run(engine, requests, every=1)
            engine.slots.check()
            for request in requests:
                name, said = request.session_id, tokens(answers, request)
                expected = greedy_alone("llama", request.prompt_token_ids, 40)
                assert said[: len(expected)] == expected
                assert name is not None
                prompts[name] = (*request.prompt_token_ids, *said, *prompt_of(3, turn))
        assert engine.snapshot().n_preempted > 0
        assert figures(engine).n_moved_down > 0
        assert n_pages_in_use(engine) == 0


def test_two_at_once_of_one_name_both_answer_and_the_later_one_is_kept() -> None:
    first, second = (Request(prompt_of(30, i), greedy(n), session_id="one") for i, n in ((0, 4), (1, 12)))
    with sessions_on() as engine:
        engine.add(first)
        engine.add(second)
        engine.step()
        with pytest.raises(SessionInUse):
            engine.park_session("one")
        answers = run(engine)
        assert len(answers) == 2
        engine.slots.check()
        stats = figures(engine)
        assert (stats.n_on_device, stats.n_in_use) == (1, 0)
        said = greedy_alone("llama", second.prompt_token_ids, 12)
        assert ask(engine, (*second.prompt_token_ids, *said, 3)).n_cached_tokens == 41


@pytest.mark.parametrize("level", [None, Level.DEVICE, Level.DISK], ids=["first turn", "device", "disk"])
def test_whoever_runs_has_the_name_also_where_no_session_is_left(tmp_path: Path, level: Level | None) -> None:
    """One in its first turn has none yet; one that says something else has given it up."""
    prompt = prompt_of(30)
    with sessions_on(tmp_path, prefix_caching=False) as engine:
        if level is not None:
            ask(engine, prompt)
        if level is Level.DISK:
            assert [engine.park_session("one") for _ in range(2)] == [Level.HOST, Level.DISK]
        other = tuple(t for t in prompt_of(40, 9) if t != prompt[0])
        engine.add(Request(other, greedy(6, ignore_eos=True), session_id="one"))
        engine.step()
        assert figures(engine).n_in_use == 0
        calls: list[Callable[[], object]] = [
            lambda: engine.park_session("one"),
            lambda: engine.forget_session("one"),
            lambda: engine.save_session("one", tmp_path / "file"),
        ]
        for call in calls:
            with pytest.raises(SessionInUse, match="'one' is in use by a request"):
                call()
        run(engine)
        for call in (calls[2], calls[0], calls[1]):
            call()


def test_of_several_answers_the_first_is_what_goes_on() -> None:
    request = Request(prompt_of(30), greedy(N_ANSWER, n=3, ignore_eos=True), session_id="one")
    with sessions_on() as engine:
        run(engine, [request])
        assert figures(engine).n_on_device == 1
        assert not slots_in_use(engine)


@pytest.mark.parametrize("n_steps", [0, 1, 4])
def test_an_aborted_turn_leaves_the_session_with_what_it_had(n_steps: int) -> None:
    with sessions_on() as engine:
        said = ask(engine, prompt_of(30)).token_ids
        request = Request((*prompt_of(30), *said, *prompt_of(9, 2)), greedy(20), session_id="one")
        engine.add(request)
        for _ in range(n_steps):
            engine.step()
        engine.abort(request.request_id)
        engine.slots.check()
        assert figures(engine).n_in_use == 0
        again = ask(engine, request.prompt_token_ids)
        assert again.n_cached_tokens == (35 if n_steps == 0 else 44)


def test_a_preempted_turn_goes_on_and_is_kept_in_the_end() -> None:
    with sessions_on() as engine:
        said = ask(engine, prompt_of(30)).token_ids
        request = Request((*prompt_of(30), *said, *prompt_of(9, 2)), greedy(20, ignore_eos=True), session_id="one")
        engine.add(request)
        for _ in range(5):
            engine.step()
        before = list(engine._requests[request.request_id][0].token_ids)
        engine._scheduler.preempt(engine._scheduler.running()[-1])
        engine.slots.give_way(1 << 40)
        assert figures(engine).n_in_use == 1
        for end in (engine.park_session, engine.forget_session):
            with pytest.raises(SessionInUse):
                end("one")
        answers = run(engine)
        expected = greedy_alone("llama", request.prompt_token_ids, 20)
        assert [*before[45:], *tokens(answers, request)][: len(expected)] == expected
        assert figures(engine).n_on_device == 1
        engine.slots.check()


def test_a_preempted_turn_that_is_aborted_leaves_nothing() -> None:
    with sessions_on() as engine:
        ask(engine, prompt_of(30))
        request = Request((*prompt_of(30), 5), greedy(20), session_id="one")
        engine.add(request)
        engine.step()
        engine._scheduler.preempt(engine._scheduler.running()[-1])
        engine.abort(request.request_id)
        assert figures(engine).n_in_use == 0
        assert not slots_in_use(engine)


def test_the_number_of_sessions_is_bounded(tmp_path: Path) -> None:
    with sessions_on(tmp_path, max_sessions=3) as engine:
        for i in range(7):
            ask(engine, prompt_of(20, i), f"s{i}")
            if i % 2:
                engine.park_session(f"s{i}")
            stats = figures(engine)
            assert stats.n_on_device + stats.n_on_host + stats.n_on_disk <= 3


@pytest.mark.parametrize("operation", ["copy_to_host", "copy_from_host", "map", "create"])
@pytest.mark.parametrize("make_error", [natural_error, driver_error()], ids=["natural", "driver"])
@pytest.mark.parametrize("n_th", [1, 5, 12])
def test_a_fault_between_turns_costs_no_token(operation: str, make_error: Any, n_th: int) -> None:
    drivers: list[FaultyDriver] = []

    def opened(device: torch.device, config: CacheConfig) -> Driver:
        drivers.append(FaultyDriver(open_backend("native", Ledger())))
        return drivers[0]

    with sessions_on(driver=opened, premap_tokens=0) as engine:
        said = ask(engine, prompt_of(30)).token_ids
        drivers[0].begin_count()
        with drivers[0].failing(fail_kind(operation, n_th, make_error)):
            if operation == "copy_to_host":
                assert engine.slots.give_way(1)  # for others: a session that cannot be moved goes
                engine.tend()
                assert (figures(engine).n_on_device, figures(engine).n_on_host) == (0, 0)
            else:
                engine.park_session("one")
            request = Request((*prompt_of(30), *said, *prompt_of(9, 2)), greedy(20, ignore_eos=True), session_id="one")
            update = run(engine, [request])[request.request_id][0]
        expected = greedy_alone("llama", request.prompt_token_ids, 20)
        assert update.error or update.token_ids[: len(expected)] == expected
        assert update.error is None or operation in ("map", "create")
        engine.slots.check()
        ask(engine, (*prompt_of(30), *said, 9))


def check_turns(engine: Engine, driver: FaultyDriver, plan: Plan) -> None:
    """A session goes down to the disk, its next turn is parked on the way; every answer is right or says it failed."""
    prompt, name = prompt_of(20), "one"
    with driver.failing(plan):
        for turn in range(2):
            request = Request(prompt, greedy(8, ignore_eos=True), session_id=name)
            engine.add(request)
            said: list[int] = []
            n_steps = 0
            while engine.has_work:
                for update in engine.step():
                    said += update.token_ids
                    if update.error is not None:
                        return
                n_steps += 1
                if n_steps == 3:
                    for running in engine._scheduler.running():
                        engine._scheduler.preempt(running)
                    engine.slots.give_way(1 << 40)
            expected = greedy_alone("llama", prompt, 8)
            assert said[: len(expected)] == expected
            prompt = (*prompt, *said, *prompt_of(5, turn))
            for _ in range(2):
                with suppress(VmemError):
                    engine.park_session(name)


@pytest.mark.parametrize("layout", ["token_major", "per_layer"])
def test_whatever_call_fails_no_token_changes_and_nothing_is_left(tmp_path: Path, layout: str) -> None:
    drivers: list[FaultyDriver] = []

    def opened(device: torch.device, config: CacheConfig) -> Driver:
        drivers.append(FaultyDriver(open_backend("native", Ledger())))
        return drivers[0]

    n_hits = 0
    options: dict[str, Any] = {"layout": layout, "page_bytes": 16384, "may_lose_pages": True, "premap_tokens": 0}
    with sessions_on(tmp_path, driver=opened, **options) as engine:
        for n_th in range(1, 1_000):
            hits: list[Point] = []

            def plan(point: Point, n_th: int = n_th, hits: list[Point] = hits) -> BaseException | None:
                if point.n != n_th:
                    return None
                hits.append(point)
                return driver_error()(point)

            drivers[0].begin_count()
            check_turns(engine, drivers[0], plan)
            if not hits:
                break
            n_hits += 1
            engine.slots.check()
            engine.memory.cache.check()
            check_turns(engine, drivers[0], no_faults)
            engine.forget_session("one")
            engine.slots.give_way(1 << 40)
            engine.memory.retire([])  # where that failed, it is tried again with the next ones
            engine.memory.reclaim()
            engine.memory.pool.trim()
            tiers = engine.snapshot().tiers
            assert tiers is not None
            assert (tiers.host.taken_bytes, tiers.disk_bytes, tiers.sessions.n_in_use) == (0, 0, 0)
            assert engine.snapshot().cache.n_live_pages == 0
    assert n_hits > 30


def test_a_session_that_cannot_be_moved_in_time_keeps_no_other_from_it() -> None:
    drivers: list[FaultyDriver] = []
    clock = ManualClock()

    def opened(device: torch.device, config: CacheConfig) -> Driver:
        drivers.append(FaultyDriver(open_backend("native", Ledger())))
        return drivers[0]

    with sessions_on(driver=opened, clock=clock) as engine:
        ask(engine, prompt_of(30), "a")
        clock.advance(1)
        ask(engine, prompt_of(30, 2), "b")
        clock.advance(10)
        with drivers[0].failing(fail_next("copy_to_host", 0, driver_error())):
            engine.tend()
        assert figures(engine).n_on_device == 2
        for _ in range(3):
            clock.advance(1)
            engine.tend()
        assert figures(engine).n_on_host == 2


def test_a_disk_that_is_full_loses_a_session_and_no_token(tmp_path: Path) -> None:
    with sessions_on(tmp_path, disk_bytes=4096) as engine:
        said = ask(engine, prompt_of(30)).token_ids
        assert engine.park_session("one") is Level.HOST
        assert engine.park_session("one") is None
        assert ask(engine, (*prompt_of(30), *said, 5)).n_cached_tokens == 0


def test_a_damaged_session_is_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sessions_on(tmp_path, prefix_caching=False) as engine:
        said = ask(engine, prompt_of(30)).token_ids
        engine.park_session("one")
        engine.park_session("one")
        monkeypatch.setattr(DiskTier, "begin_load", functools.partialmethod(_damaged, DiskTier.begin_load))
        assert ask(engine, (*prompt_of(30), *said, 5)).n_cached_tokens == 0
        monkeypatch.undo()
        assert figures(engine).n_on_disk == 0


def _damaged(self: DiskTier, stock: Any, stored: Any, host: Any) -> Any:
    """Read a copy whose first bytes were overwritten."""
    os.pwrite(self._fd, b"damage", stored.offset)
    return stock(self, stored, host)


def test_without_host_memory_a_name_means_nothing() -> None:
    with engine_on(prefix_caching=False) as engine:
        said = ask(engine, prompt_of(30)).token_ids
        assert ask(engine, (*prompt_of(30), *said, 5)).n_cached_tokens == 0
        with pytest.raises(UnknownSession, match="keeps no sessions"):
            engine.park_session("one")


@pytest.mark.parametrize("session_id", ["", "x" * 257, 5])
def test_names_that_are_none_are_refused(session_id: Any) -> None:
    with engine_on() as engine, pytest.raises(InvalidRequest, match="session_id"):
        engine.check(Request(prompt_of(5), greedy(1), session_id=session_id))


def test_a_source_over_another_one_hands_everything_on() -> None:
    """Or what is missing would do nothing, and answer None."""
    methods = {name for name, value in vars(SlotSource).items() if callable(value) and not name.startswith("_")}
    assert methods > {"begin", "keep", "tiers"}
    assert methods <= vars(SlotsOver).keys()


def test_a_script_names_its_conversations() -> None:
    with LLM(copy.deepcopy(build_model("llama")), host_bytes="4MiB", prefix_min_tokens=1, max_bytes="8MiB") as llm:
        (first,) = llm.generate([prompt_of(20)], greedy(4, ignore_eos=True), session_ids=["one"], progress=False)
        assert llm.park_session("one") is Level.HOST
        prompt = (*prompt_of(20), *first.answers[0].token_ids, 5)
        (second,) = llm.generate([prompt], greedy(4), session_ids=["one"], progress=False)
        assert second.n_cached_tokens == 23
        with pytest.raises(InvalidRequest, match="2 sessions were named for 1 prompt"):
            llm.generate([prompt], greedy(4), session_ids=["one", "two"], progress=False)


def test_the_engines_thread_parks_and_expires_sessions_while_it_is_idle(tmp_path: Path) -> None:
    clock = ManualClock()
    with sessions_on(tmp_path, clock=clock) as inner:
        ask(inner, prompt_of(30))
        ask(inner, prompt_of(30, 2), "two")
        engine = AsyncEngine(inner)
        with pytest.raises(EngineDead):
            engine.park_session("one")
        engine.start()
        try:
            assert engine.park_session("one") is Level.HOST
            with pytest.raises(UnknownSession):
                engine.park_session("three")
            clock.advance(11)
            end_s = time.monotonic() + WAIT_S
            while figures(inner).n_on_device:
                assert time.monotonic() < end_s, "it never left"
                time.sleep(0.01)
        finally:
            assert engine.stop()
        with pytest.raises(EngineDead):
            engine.park_session("one")
