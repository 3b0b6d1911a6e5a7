"""The engine in its thread: streams that always end, aborts, slow readers, a full queue, and death."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.hf.architectures import build_model
from vmem_kv.engine.async_engine import AnswerStream, AsyncEngine
from vmem_kv.engine.engine import Engine
from vmem_kv.engine.llm import make_config
from vmem_kv.engine.request import FinishReason, Request, SequenceUpdate
from vmem_kv.errors import (
    EngineDead,
    InvalidRequest,
    InvariantError,
    QueueFull,
    ReaderTooSlow,
    ShuttingDown,
    UsageError,
)

from .harness import WAIT_S, backend, greedy, greedy_alone, held_after, prompt_of, slots_in_use
from .tokenizers import word_tokenizer


@asynccontextmanager
async def running(max_unread_characters: int = 65_536, **options: Any) -> AsyncIterator[AsyncEngine]:
    engine = Engine(copy.deepcopy(build_model("llama")), word_tokenizer(), make_config(**options), backend())
    serving = AsyncEngine(engine, max_unread_characters=max_unread_characters)
    serving.start()
    try:
        yield serving
    finally:
        assert await asyncio.to_thread(serving.stop, WAIT_S)
    assert engine.memory.pool.n_owned == 0


async def read(stream: AnswerStream) -> dict[int, SequenceUpdate]:
    answers: dict[int, SequenceUpdate] = {}
    async for update in stream:
        if update.index in answers:
            answers[update.index].append(update)
        else:
            answers[update.index] = update
    return answers


async def until(condition: Any) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.005)


def run(test: Any) -> None:
    asyncio.run(test)


def test_streams_give_what_generate_gives() -> None:
    async def test() -> None:
        async with running(max_num_seqs=3) as serving:
            requests = [Request(prompt_of(4 + i), greedy(12, n=1 + i % 2)) for i in range(6)]
            answers = await asyncio.gather(*(read(serving.submit(r)) for r in requests))
            for request, parts in zip(requests, answers, strict=True):
                assert sorted(parts) == list(range(request.params.n))
                for update in parts.values():
                    assert update.token_ids == greedy_alone("llama", request.prompt_token_ids, 12)
            assert serving.health().n_open == 0
            assert serving.snapshot().n_running == 0

    run(test())


def test_what_is_refused_is_refused_at_once() -> None:
    async def test() -> None:
        async with running(max_num_seqs=1, max_queued=1) as serving:
            with held_after(1, serving.engine):
                with pytest.raises(InvalidRequest):
                    serving.submit(Request((), greedy(1)))
                first = Request(prompt_of(3), greedy(200, ignore_eos=True))
                streams = [serving.submit(first)]
                with pytest.raises(UsageError):
                    serving.submit(first)
                streams.append(serving.submit(Request(prompt_of(4), greedy(200, ignore_eos=True))))
                await until(lambda: serving.snapshot().n_waiting == 1)
                with pytest.raises(QueueFull):
                    serving.submit(Request(prompt_of(5), greedy(200, ignore_eos=True)))
                assert serving.n_rejected == 1
                serving.drain()
                with pytest.raises(ShuttingDown):
                    serving.submit(Request(prompt_of(3), greedy(1)))
                for stream in streams:
                    stream.close()
                assert await serving.wait_drained(WAIT_S)

    run(test())


def test_a_closed_stream_frees_its_memory() -> None:
    async def test() -> None:
        async with running() as serving:
            with held_after(2, serving.engine):
                stream = serving.submit(Request(prompt_of(9), greedy(240, ignore_eos=True)))
                await anext(stream)
                assert serving.snapshot().n_running == 1
                await stream.aclose()
                await until(lambda: serving.snapshot().n_running == 0)
                assert not slots_in_use(serving.engine)
                with pytest.raises(StopAsyncIteration):
                    await anext(stream)
            cancelled = asyncio.create_task(read(serving.submit(Request(prompt_of(9), greedy(5)))))
            assert (await cancelled)[0].is_finished

    run(test())


def test_stop_ends_what_is_unfinished() -> None:
    async def test() -> None:
        async with running() as serving:
            with held_after(2, serving.engine):
                stream = serving.submit(Request(prompt_of(9), greedy(240, ignore_eos=True)))
                await anext(stream)
                assert await asyncio.to_thread(serving.stop, WAIT_S)
                assert (await read(stream))[0].finish_reason is FinishReason.ABORT

    run(test())


def test_a_reader_that_is_too_slow_is_cut_off_and_nobody_waits_for_it() -> None:
    async def test() -> None:
        async with running(max_unread_characters=100) as serving:
            slow = serving.submit(Request(prompt_of(9), greedy(240, ignore_eos=True)))
            quick = Request(prompt_of(7), greedy(20))
            assert (await read(serving.submit(quick)))[0].token_ids == greedy_alone("llama", quick.prompt_token_ids, 20)
            await until(lambda: serving.snapshot().n_running == 0)
            with pytest.raises(ReaderTooSlow):
                await read(slow)

    run(test())


def test_death_answers_everyone() -> None:
    async def test() -> None:
        engine = Engine(copy.deepcopy(build_model("llama")), word_tokenizer(), make_config(), backend())
        serving = AsyncEngine(engine)
        serving.start()

        def broken() -> list[SequenceUpdate]:
            raise InvariantError("planted")

        with held_after(2, engine):
            streams = [serving.submit(Request(prompt_of(9), greedy(240, ignore_eos=True))) for _ in range(3)]
            await anext(streams[0])
            engine.step = broken  # type: ignore[method-assign]
            for stream in streams:
                with pytest.raises(EngineDead, match="planted"):
                    await read(stream)
        assert not serving.health().is_alive
        assert "planted" in serving.health().death
        with pytest.raises(EngineDead):
            serving.submit(Request(prompt_of(9), greedy(2)))
        assert await asyncio.to_thread(serving.stop, WAIT_S)
        assert engine.memory.pool.n_owned == 0

    run(test())


def test_a_step_that_hangs_is_seen_from_outside() -> None:
    async def test() -> None:
        release = threading.Event()
        async with running() as serving:
            await until(lambda: serving.health().silent_s < 0.3)
            stock = serving.engine.step

            def hanging() -> list[SequenceUpdate]:
                release.wait(WAIT_S)
                return stock()

            serving.engine.step = hanging  # type: ignore[method-assign]
            stream = serving.submit(Request(prompt_of(9), greedy(3)))
            await until(lambda: serving.health().silent_s > 0.6)
            assert serving.health().is_alive
            assert not await asyncio.to_thread(serving.stop, 0.05)
            release.set()
            await read(stream)

    run(test())
