"""What one request causes ends that request; only a lost device or a bug ends the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.core.backends import open_backend
from vmem_kv.config import CacheConfig
from vmem_kv.driver.base import Driver
from vmem_kv.driver.ledger import Ledger
from vmem_kv.engine.engine import Engine
from vmem_kv.engine.packed import packed_attention
from vmem_kv.engine.request import FinishReason, Request
from vmem_kv.errors import ConfigError, DriverError, RequestFailed, UsageError
from vmem_kv.testing.faults import FaultyDriver, driver_error, fail_from, fail_kind, natural_error

from .harness import engine_on, greedy, greedy_alone, prompt_of, run, tokens
from .tokenizers import word_tokenizer

POISON = [5, 127, 6]
"""A prompt: passes that see it raise."""


def poisoned(engine: Engine) -> None:
    """Make every forward pass raise that holds `POISON`."""

    def refuse(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tokens = kwargs["input_ids"][0].tolist()
        if any(tokens[i : i + len(POISON)] == POISON for i in range(len(tokens))):
            raise RuntimeError("poisoned")

    engine.route._model.register_forward_pre_hook(refuse, with_kwargs=True)  # type: ignore[attr-defined]


def good_requests(n: int = 4) -> list[Request]:
    return [Request(prompt_of(9, i), greedy(20)) for i in range(n)]


def check_good(answers: dict[str, Any], requests: list[Request]) -> None:
    for request in requests:
        assert tokens(answers, request) == greedy_alone("llama", request.prompt_token_ids, 20)


def test_a_pass_that_raises_ends_only_the_request_that_raises_alone() -> None:
    bad, good = Request(tuple(POISON), greedy(20)), good_requests()
    with engine_on() as engine:
        poisoned(engine)
        answers = run(engine, [*good[:2], bad, *good[2:]])
        update = answers[bad.request_id][0]
        assert update.finish_reason is FinishReason.ERROR
        assert isinstance(update.error, RequestFailed)
        assert "poisoned" in str(update.error.__cause__)
        assert "poisoned" not in str(update.error)  # clients get our words only
        check_good(answers, good)
        check_good(run(engine, again := good_requests()), again)


@pytest.mark.parametrize("n_th", range(1, 6))
def test_a_pass_that_raises_once_harms_nobody(n_th: int) -> None:
    with engine_on() as engine:
        stock, n_calls = engine.route.run, 0

        def flaky(batch: Any) -> torch.Tensor:
            nonlocal n_calls
            n_calls += 1
            if n_calls == n_th:
                raise MemoryError
            return stock(batch)

        engine.route.run = flaky  # type: ignore[method-assign]
        check_good(run(engine, requests := good_requests()), requests)


@pytest.mark.parametrize("architecture", ["llama", "qwen3_next", "falcon_h1"])
@pytest.mark.parametrize("n_th", [1, 2, 5, 9])
def test_by_rows_a_pass_that_raises_half_way_harms_nobody(architecture: str, n_th: int) -> None:
    """Recurrent states that have moved on are not moved on twice."""
    with engine_on(architecture, route="rows", max_num_seqs=3) as engine:
        n_calls = 0

        def flaky(module: torch.nn.Module, args: Any, output: Any) -> None:
            nonlocal n_calls
            n_calls += 1
            if n_calls == n_th:
                raise MemoryError

        engine.route._model.register_forward_hook(flaky)  # type: ignore[attr-defined]
        requests = good_requests()
        answers = run(engine, requests)
    for request in requests:
        assert tokens(answers, request) == greedy_alone(architecture, request.prompt_token_ids, 20)


def test_a_tokenizer_that_raises_ends_its_request() -> None:
    bad, good = Request(prompt_of(5), greedy(20)), good_requests(2)
    with engine_on(tokenizer=word_tokenizer()) as engine:
        engine.add(bad)
        for sequence, answer in engine._answers.items():

            def refuse(token_id: int) -> str:
                raise ValueError("no such token")

            assert sequence.request is bad
            answer._text.add = refuse  # type: ignore[method-assign,union-attr]
        answers = run(engine, good)
        assert answers[bad.request_id][0].finish_reason is FinishReason.ERROR
        check_good(answers, good)


def test_logits_that_are_no_numbers_end_their_request() -> None:
    bad, good = Request(prompt_of(5), greedy(20)), good_requests(2)
    with engine_on() as engine:
        stock = engine.route.run

        def spoiled(batch: Any) -> torch.Tensor:
            logits = stock(batch).clone()
            logits[0] = torch.nan
            engine.route.run = stock  # type: ignore[method-assign]
            return logits

        engine.route.run = spoiled  # type: ignore[method-assign]
        answers = run(engine, [bad, *good])
        assert answers[bad.request_id][0].finish_reason is FinishReason.ERROR
        check_good(answers, good)


@pytest.mark.parametrize("operation", ["create", "map", "set_access", "unmap", "release", "scrub"])
@pytest.mark.parametrize("make_error", [natural_error, driver_error()], ids=["natural", "driver"])
def test_driver_calls_that_fail_end_requests_at_most(operation: str, make_error: Any) -> None:
    """Every answer is right or says that it failed; afterwards all goes on as if nothing had been."""
    options = {"max_num_seqs": 3, "page_bytes": 4096, "max_bytes": 96 * 4096}
    n_failed = 0
    for n_th in (1, 2, 13, 25, 60):
        drivers: list[FaultyDriver] = []

        def opened(device: torch.device, config: CacheConfig, drivers: list[FaultyDriver] = drivers) -> Driver:
            drivers.append(FaultyDriver(open_backend("native", Ledger())))
            return drivers[0]

        # Under pressure the host's pool gives pages back to the system; a failed release is not tried again.
        with engine_on(driver=opened, may_lose_pages=operation == "release", **options) as engine:
            requests = [
                Request(r.prompt_token_ids, r.params, domain=str(i % 2)) for i, r in enumerate(good_requests(6))
            ]
            drivers[0].begin_count()
            with drivers[0].failing(fail_kind(operation, n_th, make_error)):
                answers = run(engine, requests)
            for request in requests:
                update = answers[request.request_id][0]
                n_failed += update.error is not None
                assert update.error or update.token_ids == greedy_alone("llama", request.prompt_token_ids, 20)
            engine.memory.cache.check()
            again = good_requests()
            check_good(run(engine, again), again)
    assert n_failed <= 5


def test_a_lost_device_ends_the_engine() -> None:
    def lost(point: Any) -> DriverError:
        error = DriverError(point.operation, 719, "CUDA_ERROR_LAUNCH_FAILED")
        error.is_fatal = True
        return error

    drivers: list[FaultyDriver] = []

    def opened(device: torch.device, config: CacheConfig) -> Driver:
        drivers.append(FaultyDriver(open_backend("native", Ledger())))
        return drivers[0]

    with engine_on(driver=opened, premap_tokens=0) as engine:
        run(engine, good_requests(1))
        engine.add(Request(prompt_of(60), greedy(9)))
        with drivers[0].failing(fail_from(1, lost)), pytest.raises(DriverError, match="719"):
            run(engine)


def test_a_model_in_use_is_not_called_by_others() -> None:
    with engine_on() as engine:
        model = engine.route._model  # type: ignore[attr-defined]
        with pytest.raises(UsageError, match="belongs to a vmem_kv engine"):
            model(torch.tensor([[3, 4]]))


@pytest.mark.parametrize("name", ["position_bias", "indices", "cache"])
def test_what_the_route_lacks_is_refused_not_left_out(name: str) -> None:
    states = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ConfigError, match="has no"):
        packed_attention(torch.nn.Module(), states, states, states, None, vmem_step=object(), **{name: 1})
