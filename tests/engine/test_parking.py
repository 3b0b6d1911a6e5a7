"""Who loses its slot for want of pages waits in host memory, and says the same when it comes back."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.core.backends import open_backend
from vmem_kv.config import CacheConfig
from vmem_kv.driver.base import Driver
from vmem_kv.driver.ledger import Ledger
from vmem_kv.engine.engine import Engine
from vmem_kv.engine.request import Request
from vmem_kv.engine.sampling_params import SamplingParams
from vmem_kv.engine.tier_stats import TierFigures
from vmem_kv.errors import ConfigError, DriverError
from vmem_kv.testing.faults import FaultyDriver, driver_error, fail_from, fail_kind
from vmem_kv.tiers.host import HostTier

from .harness import backend, engine_on, greedy, greedy_alone, prompt_of, run, tokens

MIB = 1 << 20
FRAME = 2 * MIB
OPTIONS: dict[str, Any] = {"page_bytes": 4096, "layout": "per_head", "prefix_min_tokens": 1}
TIGHT: dict[str, Any] = {**OPTIONS, "max_num_seqs": 8, "max_batch_tokens": 32, "max_bytes": 17 * 12 * 4096}
"""Pages for 272 tokens, in all: a third of what the requests below need."""
TIERS = {"large": 16 * FRAME, "small": FRAME, "zero": 0}


def requests_of(seed: int | None) -> list[Request]:
    """Requests that are sampled greedily, or from seeds."""
    params = [
        greedy(90, ignore_eos=True)
        if seed is None
        else SamplingParams(max_tokens=90, temperature=1.1, top_k=30, seed=seed + i, ignore_eos=True)
        for i in range(8)
    ]
    return [Request(prompt_of(n, n), p) for n, p in zip(range(6, 14), params, strict=True)]


@functools.cache
def alone(seed: int | None) -> list[list[int]]:
    """What they are answered where nothing is cached and nothing is short."""
    with engine_on(prefix_caching=False, **OPTIONS) as engine:
        return [tokens(run(engine, [request]), request) for request in requests_of(seed)]


def figures(engine: Engine) -> TierFigures:
    found = engine.snapshot().tiers
    assert found is not None
    return found


def check_steps(engine: Engine) -> None:
    """Hold the books against each other every few steps."""
    stock, n_steps = engine.step, 0

    def checked() -> Any:
        nonlocal n_steps
        updates = stock()
        n_steps += 1
        if n_steps % 7 == 0:
            engine.slots.check()
            engine.memory.cache.check()
        return updates

    engine.step = checked  # type: ignore[method-assign]


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("tier", list(TIERS))
@pytest.mark.parametrize("seed", [None, 5], ids=["greedy", "seeded"])
def test_a_pool_at_a_third_of_the_demand_gives_the_same_tokens(
    seed: int | None, tier: str, prefix_caching: bool
) -> None:
    requests = requests_of(seed)
    with engine_on(host_bytes=TIERS[tier], prefix_caching=prefix_caching, **TIGHT) as engine:
        check_steps(engine)
        answers = run(engine, requests)
        assert [tokens(answers, r) for r in requests] == alone(seed)
        stats = engine.snapshot()
        assert stats.n_preempted > 0
        if tier == "zero":
            assert stats.tiers is None
            assert stats.n_recomputed_tokens > 0
            return
        assert figures(engine).n_restored > 0
        assert figures(engine).host.taken_bytes == 0
        if tier == "large":
            assert stats.n_recomputed_tokens == 0
            assert figures(engine).n_refused == 0
        else:
            assert figures(engine).n_refused > 0


@pytest.mark.parametrize("driver", ["python", "native", "cuda"])
def test_parked_on_every_driver_it_says_the_same(driver: str) -> None:
    requests = requests_of(5)
    with engine_on(driver=backend(driver), host_bytes=TIERS["large"], **TIGHT) as engine:
        answers = run(engine, requests)
        assert [tokens(answers, r) for r in requests] == alone(5)
        assert figures(engine).n_restored > 0


def park_last(engine: Engine) -> None:
    """What want of pages does to the last running sequence; and what is only cached goes."""
    scheduler = engine._scheduler
    scheduler.preempt(scheduler.running()[-1])
    engine.slots.give_way(1 << 40)


def test_parked_again_only_what_was_added_is_moved() -> None:
    request = Request(prompt_of(50), greedy(30, ignore_eos=True))
    with engine_on(host_bytes=FRAME, **OPTIONS) as engine:
        engine.add(request)
        moved, n_parked = [0], 0
        updates = []
        token_bytes = engine.memory.cache.layout.token_bytes
        for n_steps in (3, 5, 1):
            for _ in range(n_steps):
                updates += engine.step()
            n_computed = engine._scheduler.running()[0].n_computed
            park_last(engine)
            moved.append(figures(engine).host.out_bytes)
            assert moved[-1] - moved[-2] == (n_computed - n_parked) * token_bytes
            n_parked = n_computed
            engine.slots.check()
        while engine.has_work:
            updates += engine.step()
        assert [t for u in updates for t in u.token_ids] == greedy_alone("llama", request.prompt_token_ids, 30)
        stats = engine.snapshot()
        assert (stats.n_preempted, stats.n_recomputed_tokens, stats.n_prompt_tokens) == (3, 0, 50)
        assert (figures(engine).n_parked, figures(engine).n_restored) == (3, 3)


def test_what_is_still_in_a_slot_is_taken_up_there() -> None:
    request = Request(prompt_of(50), greedy(10, ignore_eos=True))
    with engine_on(host_bytes=FRAME, **OPTIONS) as engine:
        engine.add(request)
        engine.step()
        engine._scheduler.preempt(engine._scheduler.running()[-1])
        answers = run(engine)
        assert figures(engine).host.in_bytes == 0
        assert engine.snapshot().n_prompt_tokens == 50
        assert len(tokens(answers, request)) == 9


@pytest.mark.parametrize("architecture", ["qwen3_next", "falcon_h1"])
def test_a_model_with_state_beside_its_slots_is_not_parked_but_computed_again(architecture: str) -> None:
    requests = [Request(prompt_of(9, i), greedy(20)) for i in range(2)]
    with engine_on(architecture, route="rows", host_bytes=FRAME) as engine:
        for request in requests:
            engine.add(request)
        for _ in range(4):
            engine.step()
        engine._scheduler.preempt(engine._scheduler.running()[-1])
        said = {r.request_id: list(engine._requests[r.request_id][0].token_ids) for r in requests}
        answers = run(engine)
        assert engine.snapshot().tiers is None
        assert engine.snapshot().n_recomputed_tokens > 0
    for request in requests:
        before = said[request.request_id][len(request.prompt_token_ids) :]
        whole = before + tokens(answers, request)
        assert whole == greedy_alone(architecture, request.prompt_token_ids, 20)


@pytest.mark.parametrize(("architecture", "route"), [("llama", "rows"), ("deepseek_v3", "auto"), ("gpt2", "auto")])
def test_whatever_the_model_keeps_in_slots_is_parked(architecture: str, route: str) -> None:
    request = Request(prompt_of(20), greedy(12))
    with engine_on(architecture, route=route, host_bytes=FRAME, prefix_min_tokens=1) as engine:
        engine.add(request)
        said: list[int] = []
        for _ in range(3):
            for _ in range(2):
                said += [t for u in engine.step() for t in u.token_ids]
            park_last(engine)
        said += tokens(run(engine), request)
        assert said == greedy_alone(architecture, request.prompt_token_ids, 12)
        assert figures(engine).n_restored == 3
        assert engine.snapshot().n_recomputed_tokens == 0


@contextmanager
def faulty_engine(**options: Any) -> Iterator[tuple[Engine, FaultyDriver]]:
    drivers: list[FaultyDriver] = []

    def opened(device: torch.device, config: CacheConfig) -> Driver:
        drivers.append(FaultyDriver(open_backend("native", Ledger())))
        return drivers[0]

    with engine_on(driver=opened, **options) as engine:
        yield engine, drivers[0]


@pytest.mark.parametrize("operation", ["copy_to_host", "copy_from_host"])
@pytest.mark.parametrize("n_th", [1, 7, 12, 13, 40])
def test_a_copy_that_fails_costs_no_token(operation: str, n_th: int) -> None:
    requests = requests_of(5)
    with faulty_engine(host_bytes=TIERS["large"], **TIGHT) as (engine, driver):
        check_steps(engine)
        driver.begin_count()
        with driver.failing(fail_kind(operation, n_th, driver_error())):
            answers = run(engine, requests)
        assert figures(engine).n_refused == 1
        assert [tokens(answers, r) for r in requests] == alone(5)
        assert engine.snapshot().n_finished["error"] == 0
        assert figures(engine).host.taken_bytes == 0


@pytest.mark.parametrize("operation", ["copy_to_host", "copy_from_host"])
def test_where_every_copy_fails_everything_is_computed_again(operation: str) -> None:
    requests = requests_of(None)
    with faulty_engine(host_bytes=TIERS["large"], **TIGHT) as (engine, driver):
        stock, broken = getattr(driver, operation), DriverError(operation, 5, "EIO")

        def failing(*args: Any) -> Any:
            raise broken

        setattr(driver, operation, failing)
        answers = run(engine, requests)
        setattr(driver, operation, stock)
        assert [tokens(answers, r) for r in requests] == alone(None)
        assert figures(engine).n_restored == 0
        assert figures(engine).n_refused > 0
        assert engine.snapshot().n_recomputed_tokens > 0


@pytest.mark.parametrize("operation", ["create", "map", "unmap", "scrub"])
@pytest.mark.parametrize("n_th", [20, 60])
def test_driver_calls_that_fail_beside_parking_end_requests_at_most(operation: str, n_th: int) -> None:
    requests = [Request(r.prompt_token_ids, r.params, domain=str(i % 2)) for i, r in enumerate(requests_of(None))]
    with faulty_engine(host_bytes=TIERS["large"], **TIGHT) as (engine, driver):
        driver.begin_count()
        with driver.failing(fail_kind(operation, n_th, driver_error())):
            answers = run(engine, requests)
        for request, expected in zip(requests, alone(None), strict=True):
            update = answers[request.request_id][0]
            assert update.error or update.token_ids == expected
        engine.slots.check()


def test_a_device_that_is_lost_while_parking_ends_the_engine() -> None:
    def lost(point: Any) -> DriverError:
        error = DriverError(point.operation, 719, "CUDA_ERROR_LAUNCH_FAILED")
        error.is_fatal = True
        return error

    with faulty_engine(host_bytes=FRAME, premap_tokens=0, **OPTIONS) as (engine, driver):
        for i in range(2):
            engine.add(Request(prompt_of(30, i), greedy(20)))
        engine.step()
        with driver.failing(fail_from(1, lost)), pytest.raises(DriverError, match="719"):
            engine._scheduler.preempt(engine._scheduler.running()[-1])


def test_rows_that_never_arrived_in_host_memory_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: a copy that holds what it held, and says that it holds everything."""
    stock = HostTier._moves

    def fewer(self: HostTier, copy: Any, cache: Any, slot_id: Any, first: int, end: int) -> Any:
        return stock(self, copy, cache, slot_id, first, end) if first == 0 else []

    monkeypatch.setattr(HostTier, "_moves", fewer)
    with pytest.raises(AssertionError):
        test_parked_again_only_what_was_added_is_moved()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"host_bytes": -1}, "host_bytes is -1"),
        ({"host_bytes": 1}, "needs at least a frame"),
        ({"host_bytes": 1 << 60}, "more than 90%"),
        ({"disk_bytes": MIB, "host_bytes": FRAME}, "without disk_folder"),
        ({"disk_bytes": MIB, "disk_folder": "."}, "without host_bytes"),
        ({"disk_bytes": MIB, "disk_folder": "/nowhere", "host_bytes": FRAME}, "no tier on disk in /nowhere"),
        ({"session_ttl_s": -1.0}, "session_ttl_s is -1.0"),
        ({"max_sessions": 0}, "max_sessions is 0"),
    ],
)
def test_tiers_that_cannot_be_are_refused_and_leave_nothing(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text), engine_on(**options):
        pass
