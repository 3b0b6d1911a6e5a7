"""Prompts from files: every request that begins as one of them begins with its rows, and nobody else does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf.architectures import build_model
from vmem_kv.driver.base import Driver, Fence
from vmem_kv.engine import prompt_slots
from vmem_kv.engine.arrivals import Arrivals
from vmem_kv.engine.engine import Engine
from vmem_kv.engine.llm import LLM
from vmem_kv.engine.moves import Carriers, inline, threads
from vmem_kv.engine.prompt_slots import PromptSlots
from vmem_kv.engine.request import Request
from vmem_kv.errors import ConfigError, FileRefused, InvalidRequest, OutOfHostMemory, RequestFailed, VmemError
from vmem_kv.testing.faults import FaultyDriver, Point, driver_error, fail_kind, natural_error
from vmem_kv.tiers.moving import InlineMover, Job

from .harness import backend, greedy, greedy_alone, n_pages_in_use, prompt_of, run, tokens
from .test_saved_sessions import faulty
from .test_sessions import FRAME, OPTIONS, ask, figures, sessions_on
from .tokenizers import word_tokenizer

SYSTEM = prompt_of(40)
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A session of `SYSTEM`."""
    path = tmp_path_factory.mktemp("prompts") / "system.session"
    with script() as llm:
        assert llm.save_prompt(SYSTEM, path) == len(SYSTEM)
        stats = llm.stats().tiers
        assert stats is not None
        assert sum(stats.n_sessions_by_tier.values()) == 0
    return path


def script(tokenizer: Any = None, **options: Any) -> LLM:
    return LLM(copy.deepcopy(build_model("llama")), tokenizer=tokenizer, **{**OPTIONS, **options})


def forget_all(engine: Engine) -> None:
    """Give up all that is cached."""
    engine.slots.give_way(1 << 40)
    assert n_pages_in_use(engine) == engine.snapshot().cache.n_live_pages == 0


def in_bytes(engine: Engine) -> int:
    tiers = engine.snapshot().tiers
    assert tiers is not None
    return tiers.host.in_bytes


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("driver", ["native", "cuda"])
def test_every_request_that_begins_so_computes_only_what_is_new(file: Path, driver: str, prefix_caching: bool) -> None:
    with sessions_on(driver=backend(driver), prefix_caching=prefix_caching) as engine:
        assert engine.load_prompt(file) == 40
        assert engine.snapshot().cache.n_live_pages == 0
        for i in range(3):
            n_before = engine.snapshot().n_prompt_tokens
            assert ask(engine, (*SYSTEM, *prompt_of(5, i)), None).n_cached_tokens == 40
            assert engine.snapshot().n_prompt_tokens - n_before == 5
            if i:
                forget_all(engine)


@pytest.mark.parametrize("n_same", [0, 1, 15, 16, 17, 39, 40])
def test_what_is_common_is_used_exact_to_the_token(file: Path, n_same: int) -> None:
    with sessions_on(prefix_min_tokens=1 if n_same % 2 else 16) as engine:
        engine.load_prompt(file)
        other = [token for token in prompt_of(30, 9) if n_same == 40 or token != SYSTEM[n_same]]
        expected = n_same if n_same >= engine.config.prefix_min_tokens else 0
        assert ask(engine, (*SYSTEM[:n_same], *other), None).n_cached_tokens == expected


def test_the_last_token_is_computed_and_one_alone_is_no_beginning(file: Path) -> None:
    with sessions_on() as engine:
        engine.load_prompt(file)
        assert ask(engine, SYSTEM, None).n_cached_tokens == 39
        assert ask(engine, SYSTEM[:1], None).n_cached_tokens == 0


def test_the_longest_of_several_is_used(tmp_path: Path, file: Path) -> None:
    with script() as llm:
        llm.save_prompt((*SYSTEM, *prompt_of(20, 1)), tmp_path / "long")
    with sessions_on() as engine:
        for path in (tmp_path / "long", file):
            engine.load_prompt(path)
        assert ask(engine, (*SYSTEM, *prompt_of(20, 1), 5), None).n_cached_tokens == 60
        assert ask(engine, (*SYSTEM, *prompt_of(20, 2)), None).n_cached_tokens >= 40


@pytest.mark.parametrize("carriers", [inline, threads])
def test_those_that_come_at_once_share_one_copy(file: Path, carriers: Callable[[Driver], Carriers]) -> None:
    with sessions_on(carriers=carriers) as engine:
        engine.load_prompt(file)
        requests = [Request((*SYSTEM, 9, i), greedy(4, ignore_eos=True)) for i in range(4)]
        answers = run(engine, requests)
        for request in requests:
            expected = greedy_alone("llama", request.prompt_token_ids, 4)
            assert tokens(answers, request)[: len(expected)] == expected
            assert answers[request.request_id][0].n_cached_tokens >= 40
        assert in_bytes(engine) == 40 * engine.memory.cache.layout.token_bytes


# While the rows are on their way


class HeldMover:
    """Launches nothing before it is told to."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self._is_open = False

    def start(self, job: Job, after: Fence) -> None:
        self._jobs.append(job)
        if self._is_open:
            self.open()

    def open(self) -> None:
        self._is_open = True
        while self._jobs:
            self._jobs.pop(0).launch()

    def stop(self) -> None:
        self.open()


@contextmanager
def held_prompt(file: Path, **options: Any) -> Iterator[tuple[Engine, HeldMover]]:
    """An engine with a prompt for everybody whose rows are on their way until the mover is opened."""
    mover = HeldMover()
    with sessions_on(carriers=lambda driver: Carriers(mover, InlineMover()), **options) as engine:
        engine.load_prompt(file, None)
        yield engine, mover


def ends_of(engine: Engine, n_steps: int) -> set[str]:
    """The requests that end within some steps."""
    updates = [update for _ in range(n_steps) for update in engine.step()]
    assert all(update.error is None for update in updates)
    return {update.request_id for update in updates if update.is_finished}


def asking(*tokens_behind: int, n_tokens: int = 4, **fields: Any) -> Request:
    return Request((*SYSTEM, *tokens_behind), greedy(n_tokens, ignore_eos=True), **fields)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_others_compute_while_rows_are_on_their_way(file: Path, prefix_caching: bool) -> None:
    with held_prompt(file, prefix_caching=prefix_caching) as (engine, mover):
        first, other = asking(5), Request(prompt_of(20, 1), greedy(4, ignore_eos=True))
        engine.add(first)
        engine.add(other)
        assert ends_of(engine, 6) == {other.request_id}
        mover.open()
        [update] = run(engine)[first.request_id]
        assert update.n_cached_tokens == 40
        assert update.token_ids[: len(expected := greedy_alone("llama", first.prompt_token_ids, 4))] == expected


def test_who_can_share_rows_waits_for_them_and_others_have_their_own(file: Path) -> None:
    with held_prompt(file) as (engine, mover):
        requests = [asking(5), asking(6), asking(7, domain="b")]
        for request in requests:
            engine.add(request)
        assert ends_of(engine, 3) == set()
        mover.open()
        answers = run(engine)
        assert [answers[request.request_id][0].n_cached_tokens for request in requests] == [40] * 3
        assert in_bytes(engine) == 2 * 40 * engine.memory.cache.layout.token_bytes


def test_who_waited_for_rows_that_nobody_wants_any_more_has_his_own(file: Path) -> None:
    with held_prompt(file) as (engine, mover):
        first, second = asking(5), asking(6)
        engine.add(first)
        engine.add(second)
        assert ends_of(engine, 2) == set()
        engine.abort(first.request_id)
        assert ends_of(engine, 2) == set()
        mover.open()
        assert run(engine)[second.request_id][0].n_cached_tokens == 40
        assert n_pages_in_use(engine) == 0


def test_rows_on_their_way_give_way_to_those_who_run(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[bool] = []
    stock = Arrivals.drop_one

    def drop_one(self: Arrivals) -> bool:
        dropped.append(stock(self))
        return dropped[-1]

    monkeypatch.setattr(Arrivals, "drop_one", drop_one)
    with held_prompt(file, max_bytes=8 * 12 * 4096, max_num_seqs=2, prefix_caching=False) as (engine, mover):
        large = Request(prompt_of(40, 2), greedy(50, ignore_eos=True))
        requests = [large, asking(5)]
        said: dict[str, list[int]] = {request.request_id: [] for request in requests}
        for request in requests:
            engine.add(request)
        for n_steps in range(1_000):
            if True in dropped or n_steps > 60:
                mover.open()
            for update in engine.step():
                said[update.request_id] += update.token_ids
            if not engine.has_work:
                break
        assert True in dropped
        for request in requests:
            expected = greedy_alone("llama", request.prompt_token_ids, request.params.max_tokens or 0)
            assert said[request.request_id][: len(expected)] == expected
        assert n_pages_in_use(engine) == 0


# Whose they are


def check_domains(file: Path) -> None:
    with sessions_on() as engine:
        engine.load_prompt(file, "a")
        for domain, expected in (("", 0), ("b", 0), ("a", 40)):
            assert ask(engine, (*SYSTEM, 5), None, domain=domain).n_cached_tokens == expected


def test_another_domain_does_not_begin_with_it(file: Path) -> None:
    check_domains(file)


def test_a_domain_that_is_ignored_is_noticed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_slots._Prompt, "is_for", lambda self, domain: True)
    with pytest.raises(AssertionError):
        check_domains(file)


def test_everybodys_prompt_is_everybodys_and_no_page_is(file: Path) -> None:
    with sessions_on() as engine:
        engine.load_prompt(file, None)
        for domain in ("", "a", "b\0salt"):
            n_before = engine.snapshot().cache.n_live_pages
            assert ask(engine, (*SYSTEM, 5), None, domain=domain).n_cached_tokens == 40
            n_after = engine.snapshot().cache.n_live_pages
            assert n_after - n_before == engine.memory.n_pages(len(SYSTEM) + 6)
        assert in_bytes(engine) == 3 * 40 * engine.memory.cache.layout.token_bytes


def test_what_is_known_already_takes_no_more_memory(file: Path) -> None:
    def taken(engine: Engine) -> int:
        tiers = engine.snapshot().tiers
        assert tiers is not None
        return tiers.host.taken_bytes // FRAME

    with sessions_on() as engine:
        loads: list[tuple[str | None, int]] = [("a", 1), ("a", 1), ("b", 2), (None, 3), (None, 3), ("c", 3)]
        for domain, expected in loads:
            assert engine.load_prompt(file, domain) == 40
            assert taken(engine) == expected


# Beside sessions and parked sequences


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_conversation_that_begins_so_goes_on_in_its_session(file: Path, prefix_caching: bool) -> None:
    with sessions_on(prefix_caching=prefix_caching) as engine:
        engine.load_prompt(file)
        prompt: tuple[int, ...] = (*SYSTEM, 5)
        for turn in range(4):
            update = ask(engine, prompt)
            assert update.n_cached_tokens == (len(prompt) - 4 if turn else 40)
            prompt = (*prompt, *update.token_ids, 7, 8, 9)
            if turn % 2:
                engine.park_session("one")
        assert figures(engine).n_resumed == 3


def test_a_conversation_that_is_edited_behind_the_prompt_begins_with_it_again(file: Path) -> None:
    with sessions_on(prefix_caching=False) as engine:
        engine.load_prompt(file)
        ask(engine, prompt_of(30, 4))
        assert ask(engine, (*SYSTEM, 5)).n_cached_tokens == 40  # the session has nothing of it
        assert figures(engine).n_on_device + figures(engine).n_on_host == 1
        update = ask(engine, (*SYSTEM, 5, *greedy_alone("llama", (*SYSTEM, 5), 6)[:5], 9))
        assert update.n_cached_tokens == 46


def test_a_request_that_lost_its_slot_comes_back_with_all_that_it_had(file: Path) -> None:
    with sessions_on(prefix_caching=False) as engine:
        engine.load_prompt(file)
        request = Request((*SYSTEM, 5), greedy(20, ignore_eos=True))
        engine.add(request)
        for _ in range(6):
            engine.step()
        before = list(engine._requests[request.request_id][0].token_ids)
        engine._scheduler.preempt(engine._scheduler.running()[-1])
        engine.slots.give_way(1 << 40)
        said = [*before[41:], *tokens(run(engine), request)]
        expected = greedy_alone("llama", request.prompt_token_ids, 20)
        assert said[: len(expected)] == expected
        assert engine.snapshot().n_recomputed_tokens == 0


def check_room(file: Path) -> None:
    """Sessions fill host memory again and again, and the prompt is there still."""
    with sessions_on(host_bytes=2 * FRAME, prefix_caching=False) as engine:
        engine.load_prompt(file)
        for i in range(4):
            assert ask(engine, (*SYSTEM, 5), None).n_cached_tokens == 40
            ask(engine, prompt_of(20, i), f"s{i}")
            engine.park_session(f"s{i}")
        assert figures(engine).n_on_host == 1


def test_no_session_pushes_a_prompt_out(file: Path) -> None:
    check_room(file)


def test_a_prompt_that_may_go_for_room_is_noticed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = PromptSlots.load

    def load(self: PromptSlots, *arguments: Any) -> int:
        n_tokens = stock(self, *arguments)
        self._host.release(self._prompts[-1].copy)
        return n_tokens

    monkeypatch.setattr(PromptSlots, "load", load)
    with pytest.raises((AssertionError, VmemError)):
        check_room(file)


def test_sessions_make_room_for_a_prompt_and_prompts_for_nobody(tmp_path: Path, file: Path) -> None:
    with sessions_on(tmp_path, host_bytes=2 * FRAME) as engine:
        for i in range(2):
            ask(engine, prompt_of(20, i), f"s{i}")
            engine.park_session(f"s{i}")
        assert figures(engine).n_on_host == 2
        engine.load_prompt(file, "a")
        engine.load_prompt(file, "b")
        assert (figures(engine).n_on_host, figures(engine).n_on_disk) == (0, 2)
        with pytest.raises(OutOfHostMemory):
            engine.load_prompt(file, "c")
        for domain, expected in (("a", 40), ("b", 40), ("c", 0)):
            assert ask(engine, (*SYSTEM, 5), None, domain=domain).n_cached_tokens == expected


def test_where_pages_are_short_sessions_leave_for_a_prompts_rows(file: Path) -> None:
    options: dict[str, Any] = {"max_bytes": 12 * 12 * 4096, "max_num_seqs": 2, "host_bytes": 12 * FRAME}
    with sessions_on(prefix_caching=False, **options) as engine:
        engine.load_prompt(file)
        for i in range(9):
            ask(engine, prompt_of(30, i), f"s{i}")
        assert figures(engine).n_on_device > 0
        for i in range(3):
            requests = [Request((*SYSTEM, i, j), greedy(30, ignore_eos=True)) for j in range(2)]
            answers = run(engine, requests)
            for request in requests:
                expected = greedy_alone("llama", request.prompt_token_ids, 30)
                assert tokens(answers, request)[: len(expected)] == expected
                assert answers[request.request_id][0].n_cached_tokens == 40
        assert figures(engine).n_gone == 0


def test_a_request_that_ends_before_it_began_leaves_nothing(file: Path) -> None:
    with sessions_on(prefix_caching=False) as engine:
        engine.load_prompt(file)
        for n_steps in range(3):
            request = Request((*SYSTEM, 5), greedy(20, ignore_eos=True))
            engine.add(request)
            for _ in range(n_steps):
                engine.step()
            engine.abort(request.request_id)
            engine.slots.check()
        assert ask(engine, (*SYSTEM, 5), None).n_cached_tokens == 40
        assert n_pages_in_use(engine) == 0


# What fails


@pytest.mark.parametrize("make_error", [natural_error, driver_error()], ids=["natural", "driver"])
@pytest.mark.parametrize("operation", ["copy_from_host", "map", "create", "fence"])
def test_a_prompt_that_cannot_be_restored_is_computed(file: Path, operation: str, make_error: Any) -> None:
    drivers: list[FaultyDriver] = []
    with sessions_on(driver=faulty(drivers), premap_tokens=0, prefix_caching=False) as engine:
        engine.load_prompt(file)
        drivers[0].begin_count()
        with drivers[0].failing(fail_kind(operation, 1, make_error)):
            request = Request((*SYSTEM, 5), greedy(6, ignore_eos=True))
            [update] = run(engine, [request])[request.request_id]
        expected = greedy_alone("llama", request.prompt_token_ids, 6)
        assert update.error or update.token_ids[: len(expected)] == expected
        assert update.error is None or operation != "copy_from_host"
        engine.slots.check()
        forget_all(engine)
        assert ask(engine, (*SYSTEM, 5), None).n_cached_tokens == 40


def test_whatever_call_fails_no_token_changes_and_nothing_is_left(file: Path) -> None:
    drivers: list[FaultyDriver] = []
    n_hits = 0
    request_of = greedy(4, ignore_eos=True)
    expected = greedy_alone("llama", (*SYSTEM, 5), 4)
    options: dict[str, Any] = {"layout": "token_major", "page_bytes": 16384, "premap_tokens": 0}
    with sessions_on(driver=faulty(drivers), may_lose_pages=True, **options) as engine:
        engine.load_prompt(file)
        for n_th in range(1, 500):
            hits: list[Point] = []

            def plan(point: Point, n_th: int = n_th, hits: list[Point] = hits) -> BaseException | None:
                if point.n != n_th:
                    return None
                hits.append(point)
                return driver_error()(point)

            drivers[0].begin_count()
            with drivers[0].failing(plan):
                request = Request((*SYSTEM, 5), request_of)
                [update] = run(engine, [request])[request.request_id]
            assert update.error or update.token_ids[: len(expected)] == expected
            engine.slots.check()
            engine.slots.give_way(1 << 40)
            engine.memory.retire([])  # where that failed, it is tried again with the next ones
            engine.memory.reclaim()
            engine.memory.pool.trim()
            assert engine.snapshot().cache.n_live_pages == 0
            if not hits:
                break
            n_hits += 1
    assert n_hits > 5


# Saving prompts


def test_a_script_computes_a_prompt_once_and_later_scripts_never(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(word_tokenizer())
    tokenizer.chat_template = TEMPLATE
    system = {"role": "system", "content": " ".join(f"w{i}" for i in range(3, 40))}
    with script(tokenizer) as llm:
        n_tokens = llm.save_prompt([system], tmp_path / "chat")
        assert llm.save_prompt("w5 w6 w7", tmp_path / "text") == 3
        params = greedy(4, ignore_eos=True)
        turns = [[system, {"role": "user", "content": f"w{i} w9"}] for i in range(50, 53)]
        expected = [output.text for output in llm.chat(turns, params, progress=False)]
    with script(tokenizer, prefix_caching=False) as llm:
        assert llm.load_prompt(tmp_path / "chat") == n_tokens
        assert llm.load_prompt(tmp_path / "text") == 3
        outputs = llm.chat(turns, params, progress=False)
        assert [output.text for output in outputs] == expected
        assert [output.n_cached_tokens for output in outputs] == [n_tokens] * 3
        assert llm.generate("w5 w6 w7 w8", params, progress=False)[0].n_cached_tokens == 3


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_prompt_that_was_saved_is_a_cached_prefix_here(tmp_path: Path, prefix_caching: bool) -> None:
    with script(prefix_caching=prefix_caching) as llm:
        llm.save_prompt(SYSTEM, tmp_path / "it")
        stats = llm.stats().tiers
        assert stats is not None
        assert (sum(stats.n_sessions_by_tier.values()), stats.host.taken_bytes) == (0, 0)
        assert bool(llm.engine.memory.cache.active_slots()) is prefix_caching
        prompt = (*SYSTEM, *prompt_of(5, 1))
        params = greedy(4, ignore_eos=True)
        (output,) = llm.generate([prompt], params, progress=False)
        assert output.n_cached_tokens == (len(SYSTEM) if prefix_caching else 0)
        expected = greedy_alone("llama", prompt, 4)
        assert list(output.answers[0].token_ids[: len(expected)]) == expected
        llm.engine.slots.check()


def test_a_prompt_that_cannot_be_saved_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "it"
    with script(prefix_min_tokens=16) as llm:
        with pytest.raises(InvalidRequest, match="15 tokens; at least 16 are kept"):
            llm.save_prompt(prompt_of(15), path)
        with pytest.raises(InvalidRequest, match="no tokenizer"):
            llm.save_prompt("a text", path)
        with pytest.raises(ConfigError, match="no chat template"):
            llm.save_prompt([{"role": "system", "content": "x"}], path)
        with pytest.raises(InvalidRequest):
            llm.save_prompt(prompt_of(300), path)
        with monkeypatch.context() as patch:
            patch.setattr(llm.engine.route, "run", _broken)
            with pytest.raises(RequestFailed):
                llm.save_prompt(SYSTEM, path)
        stats = llm.stats().tiers
        assert stats is not None
        assert sum(stats.n_sessions_by_tier.values()) == 0
        llm.save_prompt(SYSTEM, path)
    path.unlink()
    with script(host_bytes=0) as llm, pytest.raises(ConfigError, match="set host_bytes"):
        llm.save_prompt(SYSTEM, path)
    assert list(tmp_path.iterdir()) == []


def _broken(batch: Any) -> Any:
    raise RuntimeError("the model is broken")


def test_a_prompt_that_cannot_be_written_leaves_no_session(tmp_path: Path) -> None:
    with script() as llm:
        with pytest.raises(Exception, match="cannot save to"):
            llm.save_prompt(SYSTEM, tmp_path / "nowhere" / "it")
        stats = llm.stats().tiers
        assert stats is not None
        assert sum(stats.n_sessions_by_tier.values()) == 0


def test_a_prompt_of_another_number_type_is_refused(tmp_path: Path, file: Path) -> None:

    model = copy.deepcopy(build_model("llama")).to(torch.bfloat16)
    with LLM(model, **OPTIONS) as llm, pytest.raises(FileRefused, match="bfloat16"):
        llm.load_prompt(file)
