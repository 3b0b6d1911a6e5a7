"""Engines on tiny models, and what transformers' own `generate` answers to the same requests."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tests.core.backends import open_backend
from tests.hf.architectures import build_model, random_tokens
from vmem_kv.config import CacheConfig
from vmem_kv.devices import OpenDriver
from vmem_kv.driver.base import Driver
from vmem_kv.driver.ledger import Ledger
from vmem_kv.engine.engine import Engine
from vmem_kv.engine.llm import make_config
from vmem_kv.engine.moves import Carriers, inline
from vmem_kv.engine.request import Request, SequenceUpdate
from vmem_kv.engine.sampling_params import SamplingParams
from vmem_kv.growth import SlotId

WAIT_S = 120.0
"""For what must come true, on however busy a machine."""
MAX_STEPS = 5_000
"""More steps than any test's requests need: who takes more makes no progress."""


def backend(name: str = "native") -> OpenDriver:
    """Return what opens a driver with books of its own, whatever else the test process maps."""

    def open_it(device: torch.device, config: CacheConfig) -> Driver:
        return open_backend(name, Ledger())

    return open_it


@contextmanager
def engine_on(
    architecture: str = "llama",
    *,
    tokenizer: Any = None,
    driver: OpenDriver | None = None,
    may_lose_pages: bool = False,
    clock: Callable[[], float] = time.monotonic,
    carriers: Callable[[Driver], Carriers] = inline,
    **options: Any,
) -> Iterator[Engine]:
    """Yield an engine on a model of its own; afterwards nothing may be left in its memory.

    What moves between tiers has moved when the call returns, unless `carriers` says otherwise.

    But for pages whose release failed, where `may_lose_pages` says so: they are counted, and nobody's.
    """
    model = copy.deepcopy(build_model(architecture))
    config = make_config(**options)
    engine = Engine(model, tokenizer, config, open_driver=driver or backend(), clock=clock, open_carriers=carriers)
    try:
        yield engine
        engine.memory.cache.check()
        engine.slots.check()
        assert not slots_in_use(engine) or engine.has_work
    finally:
        engine.close()
    assert engine.memory.pool.n_owned == (engine.memory.pool.n_quarantined if may_lose_pages else 0)


@contextmanager
def held_after(n_steps: int, engine: Engine) -> Iterator[None]:
    """Let an engine that runs in a thread take so many steps; within the block, any further one does nothing."""
    stock, n_left = engine.step, n_steps

    def step() -> list[SequenceUpdate]:
        nonlocal n_left
        if not n_left:
            time.sleep(0.001)
            return []
        n_left -= 1
        return stock()

    engine.step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine.step = stock  # type: ignore[method-assign]


def slots_in_use(engine: Engine) -> set[SlotId]:
    """Slots that belong to sequences, those left out that are only cached."""
    return set(engine.memory.cache.active_slots()) - engine.slots.cached_slots()


def n_pages_in_use(engine: Engine) -> int:
    """Pages that giving up all that is cached would not free, beside those of warm slots. Of an idle engine.

    What the mapper still maps is waited for, and counted where it lies: it may come late, under a slot that is only
    cached by then.
    """
    premapper = engine.memory.premapper
    assert premapper is None or premapper.wait_idle(WAIT_S)
    n_held = engine.slots.n_available_pages() - engine.memory.n_available_pages()
    return engine.snapshot().cache.n_live_pages - n_held


@functools.cache
def greedy_alone(architecture: str, prompt: tuple[int, ...], n_tokens: int) -> list[int]:
    """The tokens that `generate` answers to one prompt, alone."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        output = build_model(architecture).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens, do_sample=False
        )
    answer: list[int] = output[0, len(prompt) :].tolist()
    return answer


def prompt_of(n_tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Ordinary tokens."""
    return tuple(random_tokens(1, n_tokens, 1_000 * seed + n_tokens)[0].tolist())


def greedy(n_tokens: int, **params: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=n_tokens, **params)


def run(engine: Engine, requests: Sequence[Request] = (), *, every: int = 0) -> dict[str, list[SequenceUpdate]]:
    """Add requests (all at once, or one every so many steps), step until nothing is left; return joined updates."""
    waiting = list(reversed(requests))
    answers: dict[str, dict[int, SequenceUpdate]] = {}
    n_steps = 0
    while waiting or engine.has_work:
        while waiting and (not every or n_steps % every == 0 or not engine.has_work):
            engine.add(waiting.pop())
            if every:
                break
        for update in engine.step():
            parts = answers.setdefault(update.request_id, {})
            if update.index in parts:
                assert not parts[update.index].is_finished
                parts[update.index].append(update)
            else:
                parts[update.index] = update
        n_steps += 1
        assert n_steps < MAX_STEPS, "no progress"
    return {request_id: [part for _, part in sorted(parts.items())] for request_id, parts in answers.items()}


def tokens(answers: dict[str, list[SequenceUpdate]], request: Request) -> list[int]:
    """The tokens of a request's first answer."""
    return answers[request.request_id][0].token_ids
