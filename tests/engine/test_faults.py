"""What happens around an engine: a dead mapper, mappings that run out, overload, storms of aborts, many engines."""

from __future__ import annotations

import copy
import gc
import json
import os
import random
import subprocess
import sys
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.core.backends import open_backend
from tests.core.subprocesses import ROOT, TIMEOUT_S
from tests.hf.architectures import build_model
from vmem_kv.config import CacheConfig
from vmem_kv.driver.base import Driver
from vmem_kv.driver.ledger import Ledger
from vmem_kv.engine.async_engine import AsyncEngine
from vmem_kv.engine.engine import Engine
from vmem_kv.engine.llm import make_config
from vmem_kv.engine.memory import SlotMemory
from vmem_kv.engine.request import Request, SequenceUpdate
from vmem_kv.engine.sampling_params import SamplingParams
from vmem_kv.errors import ConfigError, DriverError, InvalidRequest, QueueFull, UsageError
from vmem_kv.layout import LayerSpec
from vmem_kv.testing.adaptor import Adaptor
from vmem_kv.testing.faults import FaultyDriver, driver_error, fail_kind

from ..held import Held
from .harness import WAIT_S, backend, engine_on, greedy, greedy_alone, n_pages_in_use, prompt_of, run, tokens
from .tokenizers import word_tokenizer


def good_requests(n: int = 4) -> list[Request]:
    return [Request(prompt_of(9, i), greedy(20)) for i in range(n)]


def check_good(answers: dict[str, Any], requests: list[Request]) -> None:
    for request in requests:
        assert tokens(answers, request) == greedy_alone("llama", request.prompt_token_ids, 20)


@pytest.mark.parametrize("n_th", [1, 2, 9])
def test_a_mapper_that_dies_costs_no_token(n_th: int) -> None:
    with engine_on(premap_tokens=16) as engine:
        stock, n_calls = engine.memory.cache.premap, 0

        def dying(lengths: Any) -> int:
            nonlocal n_calls
            n_calls += 1
            if n_calls == n_th:
                raise MemoryError
            return stock(lengths)

        premapper, step = engine.memory.premapper, engine.step
        assert premapper is not None

        def in_turns() -> list[SequenceUpdate]:
            """A step, and what the mapper is asked for in it, before the next request would replace that one."""
            updates = step()
            assert premapper.wait_idle(WAIT_S)
            return updates

        engine.memory.cache.premap = dying  # type: ignore[method-assign]
        engine.step = in_turns  # type: ignore[method-assign]
        check_good(run(engine, requests := good_requests()), requests)
        assert n_calls == n_th
        assert engine.snapshot().is_mapper_alive is False
        check_good(run(engine, again := good_requests()), again)


def test_a_mapper_that_is_slow_costs_no_token() -> None:
    with engine_on(premap_tokens=16) as engine:
        stock, may_go_on = engine.memory.cache.premap, threading.Event()

        def slow(lengths: Any) -> int:
            may_go_on.wait(WAIT_S)
            return stock(lengths)

        engine.memory.cache.premap = slow  # type: ignore[method-assign]
        check_good(run(engine, requests := good_requests()), requests)
        assert engine.snapshot().is_mapper_alive
        may_go_on.set()


def few_mappings(n: int) -> Any:
    """Open a driver whose system allows only so many mappings."""

    def opened(device: torch.device, config: CacheConfig) -> Driver:
        inner = open_backend("native", Ledger())
        return Adaptor(inner, replace(inner.info, max_mappings=n))

    return opened


def test_where_mappings_run_out_requests_wait_and_all_are_answered() -> None:
    options: dict[str, Any] = {"max_num_seqs": 6, "page_bytes": 4096, "layout": "per_head", "max_model_len": 128}
    with engine_on(**options) as engine:
        run(engine, good_requests(6))
        per_run = engine.memory.pool.driver.info.mappings_per_run
        n_planes = engine.memory.cache.layout.n_pages(1)
    with engine_on(driver=few_mappings(3 * per_run * n_planes), **options) as engine:
        check_good(run(engine, requests := good_requests(6)), requests)
        assert engine.snapshot().n_finished["error"] == 0
        thread = threading.Thread(target=int)  # the system has mappings left for a thread's stack
        thread.start()
        thread.join()


def test_a_budget_below_one_sequence_is_refused_with_the_number_to_set() -> None:
    options: dict[str, Any] = {"page_bytes": 4096, "layout": "per_head"}
    with pytest.raises(ConfigError, match=r"max_bytes is 4096, which holds no sequence") as caught:
        Engine(copy.deepcopy(build_model("llama")), None, make_config(max_bytes=4096, **options), backend())
    least = int(str(caught.value).split("set it to ")[1].split()[0])
    with pytest.raises(ConfigError, match="holds no sequence"):
        Engine(copy.deepcopy(build_model("llama")), None, make_config(max_bytes=least - 1, **options), backend())
    with engine_on(max_bytes=least, **options) as engine:
        request = Request(prompt_of(1), greedy(1))
        assert tokens(run(engine, [request]), request) == greedy_alone("llama", request.prompt_token_ids, 1)


def test_a_tokenizer_that_cannot_read_a_prompt_refuses_it() -> None:
    tokenizer = copy.deepcopy(word_tokenizer())
    stock = tokenizer.decode

    def picky(token_ids: Any, **options: Any) -> Any:
        if 66 in token_ids:
            raise IndexError("piece id is out of range")
        return stock(token_ids, **options)

    tokenizer.decode = picky
    with engine_on(tokenizer=tokenizer) as engine:
        with pytest.raises(InvalidRequest, match="cannot read the prompt"):
            engine.add(Request((5, 66), greedy(3)))
        assert not engine.has_work
        good = Request(prompt_of(9), greedy(1))
        run(engine, [good])


def test_an_engine_that_died_gives_back_its_memory_and_its_model() -> None:
    """Also where ending what was unfinished fails."""

    def lost(request_id: str) -> list[Any]:
        raise DriverError("unmap", 719, "CUDA_ERROR_LAUNCH_FAILED")

    model = copy.deepcopy(build_model("llama"))
    engine = Engine(model, None, make_config(), backend())
    serving = AsyncEngine(engine)
    engine.add(Request(prompt_of(9), greedy(9)))
    engine.step()
    engine.abort = lost  # type: ignore[method-assign]
    with pytest.raises(DriverError):
        serving.stop()
    assert engine.memory.pool.n_owned == 0
    model(torch.tensor([[3, 4]]))  # which belongs to nobody again
    serving._die(DriverError("unmap", 719, "CUDA_ERROR_LAUNCH_FAILED"))
    assert serving.stop()


def test_overload_is_refused_and_costs_those_no_step_who_were_taken_on() -> None:
    """Twice what can be computed arrives: the queue has its bound, and every slot computes in every step."""
    n_tokens, n_slots, n_steps = 8, 4, 400
    per_step = 2 * n_slots / n_tokens
    with engine_on(max_num_seqs=n_slots, max_queued=6) as engine:
        n_offered = n_refused = n_given = n_most = 0
        arrived_at: dict[str, int] = {}
        waits: list[int] = []
        for step in range(n_steps):
            while n_offered < step * per_step:
                n_offered += 1
                request = Request(prompt_of(1, n_offered), greedy(n_tokens, ignore_eos=True))
                try:
                    engine.add(request)
                    arrived_at[request.request_id] = step
                except QueueFull:
                    n_refused += 1
            n_most = max(n_most, engine.snapshot().n_waiting)
            for update in engine.step():
                n_given += len(update.token_ids)
                if update.is_finished:
                    waits.append(step - arrived_at[update.request_id])
        assert n_most <= 6 + n_slots
        assert 0.4 * n_offered < n_refused < 0.6 * n_offered
        assert n_given >= 0.9 * n_slots * n_steps
        assert max(waits) <= (6 + 2 * n_slots) / n_slots * n_tokens + n_tokens
        run(engine)


def test_a_storm_of_aborts_leaves_nothing() -> None:
    rng = random.Random(5)
    with engine_on(max_num_seqs=8, max_queued=64, page_bytes=4096, max_bytes=1 << 21) as engine:
        open_ids: list[str] = []
        n_aborted = 0
        while n_aborted < 2_000:
            while engine.has_place(2) and len(open_ids) < 40:
                request = Request(prompt_of(rng.randrange(1, 40), rng.randrange(30)), greedy(90, n=rng.choice([1, 2])))
                engine.add(request)
                open_ids.append(request.request_id)
            engine.step()
            for _ in range(min(len(open_ids), rng.randrange(40))):
                engine.abort(open_ids.pop(rng.randrange(len(open_ids))))
                n_aborted += 1
        for request_id in open_ids:
            engine.abort(request_id)
        assert not engine.has_work
        stats = engine.snapshot()
        assert n_pages_in_use(engine) == 0
        assert stats.n_finished["error"] == 0
        check_good(run(engine, requests := good_requests()), requests)


class Opened:
    """Opens a driver of its own that can be made to fail, and keeps hold of it."""

    driver: FaultyDriver

    def __call__(self, device: torch.device, config: CacheConfig) -> Driver:
        self.driver = FaultyDriver(open_backend("native", Ledger()))
        return self.driver

    def is_closed(self) -> bool:
        """Whether it was closed, which it refuses while anything is reserved."""
        try:
            self.driver.inner.set_access([])
        except UsageError:
            return True
        return False


def filled(opened: Opened) -> SlotMemory:
    """Slots that are active, warm, and that share pages."""
    memory = SlotMemory(
        CacheConfig(page_bytes=4096, layout="per_layer", max_bytes=64 * 4096),
        [LayerSpec.uniform(1, 64, 2)] * 2,
        torch.float16,
        torch.device("cpu"),
        n_slots=4,
        max_tokens=256,
        slack_tokens=0,
        premap_tokens=0,
        needs_rows=False,
        open_driver=opened,
    )
    slots = [memory.acquire(100, "a") for _ in range(3)]
    memory.grow(dict.fromkeys(slots, 100))
    memory.grow({memory.fork(slots[0], 64): 128})
    memory.retire(slots[1:2])
    return memory


def n_points_of_closing(operation: str) -> int:
    opened = Opened()
    memory = filled(opened)
    opened.driver.begin_count()
    memory.close()
    return sum(point.operation == operation for point in opened.driver.points)


@pytest.mark.parametrize("operation", ["unmap", "release", "free_reservation", "fence"])
def test_closing_gets_by_any_one_call_that_fails(operation: str) -> None:
    n_points = n_points_of_closing(operation)
    assert n_points
    for n_th in range(1, n_points + 1):
        opened = Opened()
        memory = filled(opened)
        with opened.driver.failing(fail_kind(operation, n_th, driver_error())):
            memory.close()
            assert len(opened.driver.faults) == 1
        assert opened.is_closed()
        assert memory.pool.n_owned == memory.pool.n_quarantined == (1 if operation == "release" else 0)
        memory.close()


@pytest.mark.parametrize("operation", ["unmap", "free_reservation", "fence"])
def test_what_stays_refused_is_said_as_it_was_and_closing_again_tries_again(operation: str) -> None:
    opened = Opened()
    memory = filled(opened)
    plan = fail_kind(operation, None, driver_error())
    with opened.driver.failing(plan), pytest.raises(DriverError, match="EIO") as caught:
        memory.close()
    assert caught.value.operation == operation
    assert not opened.is_closed()
    memory.close()
    assert opened.is_closed()
    assert memory.pool.n_owned == 0


@pytest.mark.parametrize("route", ["packed", "rows"])
def test_an_engine_that_could_not_be_closed_says_why_and_is_closed_again(route: str) -> None:
    opened = Opened()
    engine = Engine(copy.deepcopy(build_model("llama")), None, make_config(route=route, premap_tokens=0), opened)
    run(engine, [Request(prompt_of(30), greedy(3))])
    with opened.driver.failing(fail_kind("unmap", None, driver_error())), pytest.raises(DriverError, match="EIO"):
        engine.close()
    assert not opened.is_closed()
    engine.close()
    assert opened.is_closed()


def test_engines_beside_and_after_each_other_leave_nothing() -> None:
    model = copy.deepcopy(build_model("llama"))
    other = copy.deepcopy(build_model("llama"))

    def once() -> None:
        one = Engine(model, None, make_config(), backend())
        two = Engine(other, None, make_config(max_num_seqs=2), backend())
        try:
            requests = [Request(prompt_of(3), greedy(2)), Request(prompt_of(4), greedy(2))]
            for engine, request in zip((one, two), requests, strict=True):
                engine.add(request)
            while one.has_work or two.has_work:
                one.step()
                two.step()
        finally:
            two.close()
            one.close()

    once()
    gc.collect()
    before = Held.now()
    for _ in range(50):
        once()
    gc.collect()
    assert not Held.now().beyond(before)


SCRIPT = """
import gc, json, tracemalloc
from tests.engine.harness import engine_on, run, tokens
from tests.engine.test_faults import seeded_requests
tracemalloc.start(5)
gc.set_threshold(50)
with engine_on(max_num_seqs=3) as engine:
    requests = seeded_requests()
    answers = run(engine, requests)
print(json.dumps([tokens(answers, request) for request in requests]))
"""


def seeded_requests() -> list[Request]:
    return [
        Request(prompt_of(9, i), SamplingParams(temperature=i % 2 * 1.1, seed=i, max_tokens=12, top_k=20))
        for i in range(6)
    ]


@pytest.mark.parametrize(
    ("flags", "environment"),
    [
        (["-X", "dev"], {"PYTHONHASHSEED": "1"}),
        (["-O"], {"PYTHONHASHSEED": "2"}),
    ],
)
def test_how_python_is_started_changes_no_token(flags: list[str], environment: dict[str, str]) -> None:
    with engine_on(max_num_seqs=3) as engine:
        requests = seeded_requests()
        answers = run(engine, requests)
    here = [tokens(answers, request) for request in requests]
    done = subprocess.run(
        [sys.executable, *flags, "-c", SCRIPT],
        cwd=ROOT,
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == here
