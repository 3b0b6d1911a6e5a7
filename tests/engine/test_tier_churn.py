"""Conversations are edited, parked, aborted, expire and collide, with too little of everything: the same tokens."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.core.backends import open_backend
from vmem_kv.config import CacheConfig
from vmem_kv.driver.base import Driver
from vmem_kv.driver.ledger import Ledger
from vmem_kv.engine import moves
from vmem_kv.engine.engine import Engine
from vmem_kv.engine.request import FinishReason, Request
from vmem_kv.engine.sampling_params import SamplingParams
from vmem_kv.errors import DriverError, SessionInUse, UnknownSession, UsageError
from vmem_kv.testing import ManualClock
from vmem_kv.testing.faults import FaultyDriver, Plan, driver_error, fail_kind, no_faults
from vmem_kv.testing.late import LateDriver
from vmem_kv.tiers.moving import Transfer

from .harness import MAX_STEPS, WAIT_S, engine_on, n_pages_in_use, prompt_of

MIB = 1 << 20
OPTIONS: dict[str, Any] = {"page_bytes": 4096, "layout": "per_head", "prefix_min_tokens": 1, "max_batch_tokens": 48}
SHORT: dict[str, Any] = {
    **OPTIONS, "max_num_seqs": 5, "max_bytes": 14 * 12 * 4096, "prefix_slots": 4, "host_bytes": 6 * MIB,
    "disk_bytes": 200_000, "session_ttl_s": 5.0, "max_sessions": 6,
}  # fmt: skip
N_TURNS = 40
Answers = dict[tuple[str, int], list[int]]
"""Tokens, by the request's id and the answer's index."""


class Talk:
    """One conversation. Its tokens are known without any engine but the one that answers it alone."""

    def __init__(self, rng: random.Random, index: int) -> None:
        self.session_id = f"s{index % 5}"  # some names are used by several
        self.domain = "ab"[index % 2]
        self.tokens = prompt_of(rng.randrange(1, 30), index)
        self.is_busy = False


def ask(rng: random.Random, talk: Talk, index: int) -> Request:
    """The next turn: it goes on, or begins somewhere within what was said."""
    kept = talk.tokens if rng.random() < 0.7 else talk.tokens[: rng.randrange(1, len(talk.tokens) + 1)]
    prompt = (*kept[:120], *prompt_of(rng.randrange(1, 12), 100 + index))
    params = SamplingParams(
        max_tokens=rng.choice([1, 10, 40, 60]),
        temperature=rng.choice([0.0, 1.1]),
        top_k=20,
        seed=index,
        ignore_eos=True,
        n=rng.choice([1, 1, 1, 2]),
    )
    priority = rng.randrange(2)
    return Request(prompt, params, priority=priority, domain=talk.domain, session_id=talk.session_id)


def churn(engine: Engine, clock: ManualClock, seed: int) -> tuple[list[Request], Answers]:
    """Let everything happen to a few conversations; return what was asked, and the answers that came to their end."""
    rng = random.Random(seed)
    talks = [Talk(rng, i) for i in range(8)]
    running: dict[str, tuple[Request, Talk]] = {}
    said: dict[tuple[str, int], list[int]] = {}
    asked: list[Request] = []
    answers: Answers = {}
    n_asked = n_steps = 0
    while n_asked < N_TURNS or engine.has_work:
        idle = [talk for talk in talks if not talk.is_busy]
        if n_asked < N_TURNS and idle and rng.random() < 0.3:
            talk = rng.choice(idle)
            request = ask(rng, talk, 1_000 * seed + n_asked)
            engine.add(request)
            asked.append(request)
            running[request.request_id] = request, talk
            talk.is_busy = True
            n_asked += 1
        for update in engine.step():
            said.setdefault((update.request_id, update.index), []).extend(update.token_ids)
            if update.finish_reason is not FinishReason.LENGTH:
                continue
            request, talk = running[update.request_id]
            answer = answers[update.request_id, update.index] = said[update.request_id, update.index]
            if update.index == 0:
                talk.tokens = (*request.prompt_token_ids, *answer)[:150]
        for request_id, (_, talk) in list(running.items()):
            if not engine.is_unfinished(request_id):
                talk.is_busy = False
                del running[request_id]
        happen(rng, engine, clock, list(running))
        n_steps += 1
        assert n_steps < MAX_STEPS
        if n_steps % 10 == 0:
            engine.slots.check()
            engine.memory.cache.check()
    return asked, answers


def happen(rng: random.Random, engine: Engine, clock: ManualClock, running: list[str]) -> None:
    """Something between two steps, or nothing."""
    chance = rng.random()
    if chance < 0.05:
        clock.advance(rng.choice([1, 4, 50, 300]))
        engine.tend()
    elif chance < 0.15:
        end = rng.choice([engine.park_session, engine.park_session, engine.forget_session])
        with suppress(UnknownSession, SessionInUse, DriverError):
            end(f"s{rng.randrange(5)}", rng.choice("ab"))
    elif chance < 0.18 and len(scheduled := engine._scheduler.running()) > 1:
        engine._scheduler.preempt(scheduled[-1])
    elif chance < 0.2 and running:
        engine.abort(rng.choice(running))


def check_alone(asked: list[Request], answers: Answers) -> None:
    """Hold answers against those of an engine that keeps nothing and lacks nothing."""
    expected: Answers = {}
    with engine_on(prefix_caching=False, **OPTIONS) as engine:
        for request in asked:
            engine.add(Request(request.prompt_token_ids, request.params, request_id=request.request_id))
        while engine.has_work:
            for update in engine.step():
                expected.setdefault((update.request_id, update.index), []).extend(update.token_ids)
    assert answers == {key: expected[key] for key in answers}


def come_to_rest(engine: Engine) -> None:
    """Let what is on its way pass."""
    while engine._scheduler._moves.wait(WAIT_S):
        engine.tend()
    engine.tend()


def faulty(plan: Plan, name: str) -> Any:
    def opened(device: torch.device, config: CacheConfig) -> Driver:
        return FaultyDriver(open_backend(name, Ledger()), plan)

    return opened


def check_churn(
    folder: Path, seed: int, plan: Plan = no_faults, name: str = "native", *, is_exact: bool = True, **options: Any
) -> None:
    """Hold the answers of one churn. Not exact, when moves pass decides who runs: what happened is not known then."""
    clock = ManualClock()
    driver = faulty(plan, name)
    options = {"driver": driver, **SHORT, **options}
    with engine_on(clock=clock, disk_folder=str(folder), **options) as engine:
        asked, answers = churn(engine, clock, seed)
        come_to_rest(engine)
        stats = engine.snapshot()
        assert stats.tiers is not None
        if is_exact:
            assert stats.n_preempted > 0
            assert stats.tiers.n_session_tokens > 0
            assert stats.tiers.n_parked > 0
            assert len(answers) > N_TURNS // 2
        assert stats.tiers.n_moving == 0
        assert plan is not no_faults or stats.n_finished["error"] == 0
        assert n_pages_in_use(engine) == 0
        assert stats.tiers.sessions.n_in_use == 0
        engine.slots.check()
    check_alone(asked, answers)


@pytest.mark.parametrize("seed", range(4))
def test_no_token_changes_whatever_happens_to_sessions(tmp_path: Path, seed: int) -> None:
    check_churn(tmp_path, seed)


def test_no_token_changes_without_cached_prefixes(tmp_path: Path) -> None:
    check_churn(tmp_path, 10, prefix_caching=False)


def test_no_token_changes_on_the_cuda_driver(tmp_path: Path) -> None:
    check_churn(tmp_path, 11, name="cuda")


@pytest.mark.parametrize("operation", ["copy_to_host", "copy_from_host"])
def test_no_token_changes_where_every_few_copies_fail(tmp_path: Path, operation: str) -> None:
    def plan(point: Any) -> BaseException | None:
        is_hit = point.operation == operation and point.n_of_kind % 70 == 0
        return driver_error()(point) if is_hit else None

    check_churn(tmp_path, 12, plan)


@pytest.mark.parametrize("operation", ["unmap", "copy", "fence"])
def test_a_driver_call_that_fails_meanwhile_changes_no_token(tmp_path: Path, operation: str) -> None:
    check_churn(tmp_path, 13, fail_kind(operation, 20, driver_error()))


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_no_token_changes_while_threads_move_things(tmp_path: Path, prefix_caching: bool) -> None:
    check_churn(tmp_path, 14, is_exact=False, carriers=moves.threads, prefix_caching=prefix_caching)


def test_no_token_changes_while_threads_move_things_and_every_few_copies_fail(tmp_path: Path) -> None:
    def plan(point: Any) -> BaseException | None:
        is_hit = point.operation in ("copy_to_host", "copy_from_host") and point.n_of_kind % 70 == 0
        return driver_error()(point) if is_hit else None

    check_churn(tmp_path, 15, plan, is_exact=False, carriers=moves.threads)


def late(device: torch.device, config: CacheConfig) -> Driver:
    """A device whose copies run as late as the contract lets them."""
    return LateDriver(open_backend("native", Ledger()))


@pytest.mark.parametrize("seed", [16, 17])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_no_token_changes_on_a_device_whose_copies_are_late(tmp_path: Path, seed: int, prefix_caching: bool) -> None:
    check_churn(tmp_path, seed, driver=late, prefix_caching=prefix_caching)


def test_who_runs_before_its_rows_are_there_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed, wait = Transfer.passed, Transfer.wait
    monkeypatch.setattr(Transfer, "passed", lambda self: not self._to_host or passed(self))
    monkeypatch.setattr(Transfer, "wait", lambda self: wait(self) if self._to_host else None)
    with pytest.raises((AssertionError, UsageError)):
        check_churn(tmp_path, 16, driver=late, prefix_caching=False)
