"""Sessions to files and back: what a later engine computes, what it refuses, and that nothing has changed then."""

from __future__ import annotations

import copy
import errno
import os
import threading
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
from vmem_kv.engine import identity as identity_module
from vmem_kv.engine.async_engine import AsyncEngine
from vmem_kv.engine.engine import Engine
from vmem_kv.engine.identity import identify
from vmem_kv.engine.llm import LLM, make_config
from vmem_kv.engine.moves import threads
from vmem_kv.engine.request import Request
from vmem_kv.engine.session_slots import Name
from vmem_kv.errors import (
    CapacityError,
    ConfigError,
    DriverError,
    FileError,
    FileRefused,
    InvalidRequest,
    OutOfDiskSpace,
    OutOfHostMemory,
    SessionInUse,
    UnknownSession,
    UsageError,
    VmemError,
)
from vmem_kv.testing import ManualClock
from vmem_kv.testing.faults import FaultyDriver, MakeError, driver_error, fail_kind, fail_once, natural_error
from vmem_kv.tiers.memory import FramePool
from vmem_kv.tiers.sessions import Level

from .harness import WAIT_S, backend, engine_on, greedy, greedy_alone, prompt_of, run
from .test_sessions import FRAME, MIB, N_ANSWER, OPTIONS, ask, figures, sessions_on

LEVELS = (Level.DEVICE, Level.HOST, Level.DISK)
PROMPT = prompt_of(30)
FOLLOWING = prompt_of(5, 3)


def sink(engine: Engine, level: Level, name: str = "one") -> None:
    for below in LEVELS[1 : LEVELS.index(level) + 1]:
        assert engine.park_session(name) is below


def look(engine: Engine, folder: Path) -> tuple[Any, ...]:
    """What an error must leave as it was: sessions, memory, and files."""
    assert engine._sessions is not None
    stats, tiers = engine.snapshot(), engine.snapshot().tiers
    assert tiers is not None
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    waiting = engine._sessions._sessions.waiting()
    return waiting, tiers.sessions, tiers.host.taken_bytes, tiers.disk_bytes, stats.cache.n_live_pages, files


@contextmanager
def refusing(
    engine: Engine, folder: Path, error: type[Exception] | tuple[type[Exception], ...], match: str | None = None
) -> Iterator[None]:
    """The block raises, and changes nothing."""
    before = look(engine, folder)
    with pytest.raises(error, match=match):
        yield
    assert look(engine, folder) == before
    engine.slots.check()
    engine.memory.cache.check()


@pytest.fixture(scope="module")
def answered() -> tuple[int, ...]:
    """What the model answers to `PROMPT`."""
    with engine_on(page_bytes=4096) as engine:
        request = Request(PROMPT, greedy(N_ANSWER, ignore_eos=True))
        return tuple(run(engine, [request])[request.request_id][0].token_ids)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A session of `PROMPT` and its answer."""
    path = tmp_path_factory.mktemp("saved") / "one.session"
    with sessions_on() as engine:
        ask(engine, PROMPT)
        engine.save_session("one", path)
    return path


N_SAVED = len(PROMPT) + N_ANSWER - 1


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("pair", [("native", "native"), ("native", "cuda"), ("cuda", "native")], ids="-".join)
def test_a_later_engine_goes_on_and_computes_only_what_is_new(
    tmp_path: Path, answered: tuple[int, ...], pair: tuple[str, str], level: Level, prefix_caching: bool
) -> None:
    path, disk = tmp_path / "one.session", tmp_path / "disk"
    disk.mkdir()
    with sessions_on(disk, driver=backend(pair[0]), prefix_caching=prefix_caching) as engine:
        ask(engine, PROMPT)
        sink(engine, level)
        engine.save_session("one", path)
        stats = figures(engine)
        assert {Level.DEVICE: stats.n_on_device, Level.HOST: stats.n_on_host, Level.DISK: stats.n_on_disk}[level] == 1
        update = ask(engine, (*PROMPT, *answered, *FOLLOWING))  # it goes on here, too
        assert update.n_cached_tokens == N_SAVED
    # Another layout turns the rows on their way in.
    options: dict[str, Any] = {"layout": "token_major", "prefix_caching": prefix_caching}
    with sessions_on(disk, driver=backend(pair[1]), **options) as engine:
        engine.load_session("two", path)
        path.unlink()  # what was loaded needs it no more
        assert figures(engine).n_on_host == 1
        n_before = engine.snapshot().n_prompt_tokens
        update = ask(engine, (*PROMPT, *answered, *FOLLOWING), "two")
        assert update.n_cached_tokens == N_SAVED
        assert engine.snapshot().n_prompt_tokens - n_before == 1 + len(FOLLOWING)


@pytest.mark.parametrize("level", LEVELS)
def test_saving_a_session_that_was_loaded_gives_the_same_file(tmp_path: Path, file: Path, level: Level) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with sessions_on(disk) as engine:
        engine.load_session("one", file)
        if level is Level.DEVICE:
            ask(engine, PROMPT[:-1], n_tokens=N_ANSWER)
        elif level is Level.DISK:
            engine.park_session("one")
        engine.save_session("one", tmp_path / "again")
        again = (tmp_path / "again").read_bytes()
        assert (again == file.read_bytes()) == (level is not Level.DEVICE)  # there it has gone on meanwhile


def test_a_session_in_files_is_the_owners_and_is_replaced_whole(tmp_path: Path) -> None:
    with sessions_on() as engine:
        for n_turns in (1, 2):
            ask(engine, prompt_of(20 + n_turns))
            engine.save_session("one", tmp_path / "one")
        assert [path.name for path in tmp_path.iterdir()] == ["one"]
        assert (tmp_path / "one").stat().st_mode & 0o777 == 0o600


# Whose rows they are


def model_with(change: Callable[[Any], None] | None = None, dtype: torch.dtype = torch.float32) -> Any:
    model = copy.deepcopy(build_model("llama"))
    if change is not None:
        with torch.no_grad():
            change(model)
    return model.to(dtype)


@contextmanager
def engine_of(model: Any, **options: Any) -> Iterator[Engine]:
    engine = Engine(model, None, make_config(**{**OPTIONS, **options}), open_driver=backend())
    try:
        yield engine
    finally:
        engine.close()


def one_bit(model: Any) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.view(-1).view(torch.int32)[1_234] ^= 1


def two_rows(model: Any) -> None:
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight[[0, 1]] = weight[[1, 0]]


def other_rotation(model: Any) -> None:
    model.config.rope_parameters["rope_theta"] = 20_000.0


@pytest.mark.parametrize("change", [one_bit, two_rows, other_rotation])
def test_a_file_of_another_model_is_refused(tmp_path: Path, file: Path, change: Callable[[Any], None]) -> None:
    with engine_of(model_with(change)) as engine:
        for load in (lambda: engine.load_session("one", file), lambda: engine.load_prompt(file)):
            with refusing(engine, tmp_path, FileRefused, "belongs to 'LlamaForCausalLM, configuration"):
                load()


def test_a_file_of_another_number_type_is_refused(tmp_path: Path, file: Path) -> None:
    with (
        engine_of(model_with(dtype=torch.bfloat16)) as engine,
        refusing(engine, tmp_path, FileRefused, "in 'float32'; wanted .* in 'bfloat16'"),
    ):
        engine.load_session("one", file)


def test_a_file_of_another_geometry_is_refused(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sessions_on() as engine:
        name = engine.saved.identity()
    monkeypatch.setattr("vmem_kv.engine.saved.identify", lambda model, route: name)  # as if the names were the same
    with (
        engine_of(copy.deepcopy(build_model("qwen3"))) as engine,
        refusing(engine, tmp_path, FileRefused, "its 3 layers are not those of this cache"),
    ):
        engine.load_session("one", file)


def test_a_file_of_another_route_is_refused(tmp_path: Path, file: Path) -> None:
    with engine_of(model_with(), route="rows") as engine, refusing(engine, tmp_path, FileRefused, "packed route"):
        engine.load_session("one", file)


def test_where_a_model_was_found_does_not_matter(file: Path) -> None:
    def elsewhere(model: Any) -> None:
        model.config._name_or_path = "/somewhere/else"
        model.config.transformers_version = "0"

    with engine_of(model_with(elsewhere), pack_weights=False) as engine:
        engine.load_session("one", file)


def test_a_name_that_says_nothing_of_the_weights_is_noticed(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity_module, "_sum", lambda weight: 0)
    with sessions_on() as engine:
        ask(engine, PROMPT)
        engine.save_session("one", tmp_path / "one")
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_a_file_of_another_model_is_refused(tmp_path, tmp_path / "one", one_bit)


def test_every_kind_of_weight_has_a_sum() -> None:
    class Route:
        name = "packed"

        class memory:  # noqa: N801
            dtype = torch.float32

    model = model_with()
    names = set()
    for weight in (
        torch.zeros(0),
        torch.ones(3, dtype=torch.int8),
        torch.ones(2, 3, dtype=torch.bfloat16),
        torch.ones(3, 2, dtype=torch.bfloat16).t(),
        torch.ones(2, dtype=torch.float64),
        torch.ones(2, dtype=torch.complex128),
        torch.ones(1 << 20 | 1, dtype=torch.bool),
    ):
        model.register_buffer("extra", weight)
        names.add(identify(model, Route).model)  # type: ignore[arg-type]
    assert len(names) == 6  # the two of one shape and type are the same


# Files that are none


def truncated(data: bytes) -> bytes:
    return data[:-1]


def header_only(data: bytes) -> bytes:
    return data[:56]


def longer(data: bytes) -> bytes:
    return data + b"\0"


def empty(data: bytes) -> bytes:
    return b""


def foreign(data: bytes) -> bytes:
    return b"GGUF" + data[4:]


def newer(data: bytes) -> bytes:
    return data[:8] + b"\2\0\0\0" + data[12:]


def altered(place: float) -> Callable[[bytes], bytes]:
    def alter(data: bytes) -> bytes:
        at = min(int(place * len(data)), len(data) - 1)
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    alter.__name__ = f"altered at {place}"
    return alter


@pytest.mark.parametrize(
    "damage",
    [truncated, header_only, longer, empty, foreign, newer, *map(altered, (0.0, 0.001, 0.01, 0.2, 0.6, 1.0))],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_file_is_refused(tmp_path: Path, file: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "damaged"
    path.write_bytes(damage(file.read_bytes()))
    with sessions_on() as engine:
        ask(engine, prompt_of(20, 1), "other")
        with refusing(engine, tmp_path, FileRefused, "damaged: "):
            engine.load_session("one", path)
        with refusing(engine, tmp_path, FileRefused, "damaged: "):
            engine.load_prompt(path)


def test_a_file_longer_than_a_slot_is_refused(tmp_path: Path, file: Path) -> None:
    with (
        engine_of(model_with(), max_model_len=34) as engine,
        refusing(engine, tmp_path, FileRefused, "it has 35 tokens; a slot of this cache holds 34"),
    ):
        engine.load_session("one", file)


def test_a_file_larger_than_all_host_memory_is_refused(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FramePool, "n_frames_for", lambda self, n_bytes: -(-n_bytes // 4096))  # smaller frames
    with sessions_on(host_bytes=2 * FRAME) as engine:
        for load in (lambda: engine.load_session("one", file), lambda: engine.load_prompt(file)):
            with refusing(engine, tmp_path, FileRefused, "frames of host memory, of which there are 2 in all"):
                load()


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "it"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with sessions_on() as engine:
        for load in (lambda: engine.load_session("one", path), lambda: engine.load_prompt(path)):
            with refusing(engine, tmp_path, FileError):
                load()


@pytest.mark.parametrize("path", ["a\0b", "\ud800", 5, None])
def test_what_is_no_path_is_refused(tmp_path: Path, path: Any) -> None:
    with sessions_on() as engine:
        ask(engine, PROMPT)
        calls: list[Callable[[], object]] = [
            lambda: engine.save_session("one", path),
            lambda: engine.load_session("two", path),
            lambda: engine.load_prompt(path),
        ]
        for call in calls:
            with refusing(engine, tmp_path, UsageError, "is no path"):
                call()


# Names


def test_names_that_cannot_be_are_refused(tmp_path: Path, file: Path) -> None:
    with sessions_on() as engine:
        ask(engine, PROMPT)
        with refusing(engine, tmp_path, UnknownSession, "no session 'two'"):
            engine.save_session("two", tmp_path / "two")
        with refusing(engine, tmp_path, UsageError, "exists"):
            engine.load_session("one", file)
        names: tuple[Any, ...] = ("", "x" * 257, 5, None, b"one")
        for name in names:
            with refusing(engine, tmp_path, UsageError, "1 to 256 characters"):
                engine.load_session(name, file)
            with refusing(engine, tmp_path, UsageError, "1 to 256 characters"):
                engine.save_session(name, tmp_path / "one")
        times: tuple[Any, ...] = (-1, float("nan"), "5", True)
        for ttl_s in times:
            with refusing(engine, tmp_path, UsageError, "0 or more seconds"):
                engine.load_session("two", file, ttl_s=ttl_s)


@pytest.mark.parametrize("is_first_turn", [True, False])
def test_a_session_in_use_is_neither_saved_nor_replaced(
    tmp_path: Path, file: Path, answered: tuple[int, ...], is_first_turn: bool
) -> None:
    with sessions_on() as engine:
        if not is_first_turn:
            ask(engine, PROMPT)
        request = Request((*PROMPT, *answered, 5), greedy(20, ignore_eos=True), session_id="one")
        engine.add(request)
        engine.step()
        with refusing(engine, tmp_path, SessionInUse):
            engine.save_session("one", tmp_path / "one")
        with refusing(engine, tmp_path, SessionInUse):
            engine.load_session("one", file)
        run(engine)
        engine.save_session("one", tmp_path / "one")


def check_domains(folder: Path, file: Path) -> None:
    """A session is saved from its own domain, and loaded into one: others know nothing of it."""
    with sessions_on(prefix_caching=False) as engine:
        ask(engine, PROMPT, "one", domain="a")
        for domain in ("", "b"):
            with pytest.raises(UnknownSession):
                engine.save_session("one", folder / "one", domain)
        engine.save_session("one", folder / "one", "a")
        engine.load_session("one", folder / "one", "b")
        engine.load_session("one", file, "c")
        assert ask(engine, (*PROMPT, 5), "one", domain="").n_cached_tokens == 0
        for domain in "abc":
            assert ask(engine, (*PROMPT, 5), "one", domain=domain).n_cached_tokens == len(PROMPT)


def test_domains_share_no_saved_session(tmp_path: Path, file: Path) -> None:
    check_domains(tmp_path, file)


def test_a_name_without_its_domain_is_noticed(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "vmem_kv.engine.session_slots._name_of", lambda sequence: Name("c", sequence.request.session_id)
    )
    with pytest.raises((AssertionError, VmemError)):
        check_domains(tmp_path, file)


def test_the_number_of_sessions_is_bounded_for_loaded_ones_too(file: Path) -> None:
    with sessions_on(max_sessions=3) as engine:
        for i in range(5):
            engine.load_session(f"s{i}", file)
            ask(engine, prompt_of(20, i), f"t{i}")
            assert figures(engine).n_on_device + figures(engine).n_on_host == min(2 * i + 2, 3)
        engine.save_session("t4", file.with_name("t4"))


def test_where_no_session_can_be_given_up_none_is_loaded(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drivers: list[FaultyDriver] = []
    with sessions_on(max_sessions=1, driver=faulty(drivers), premap_tokens=0) as engine:
        ask(engine, PROMPT)
        with (
            drivers[0].failing(fail_kind("fence", None, driver_error())),
            refusing(engine, tmp_path, CapacityError, "there are 1 sessions"),
        ):
            engine.load_session("two", file)
        engine.load_session("two", file)


# Disks and memories that fail


def faulty(drivers: list[FaultyDriver]) -> Callable[[torch.device, CacheConfig], Driver]:
    def opened(device: torch.device, config: CacheConfig) -> Driver:
        drivers.append(FaultyDriver(open_backend("native", Ledger())))
        return drivers[-1]

    return opened


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("function", "code", "error"),
    [
        ("posix_fallocate", errno.ENOSPC, OutOfDiskSpace),
        ("pwrite", errno.EIO, FileError),
        ("fsync", errno.EIO, FileError),
        ("replace", errno.EACCES, FileError),
    ],
)
def test_a_disk_that_fails_leaves_the_old_file_and_the_session(
    tmp_path: Path, answered: tuple[int, ...], level: Level, function: str, code: int, error: type[VmemError]
) -> None:
    disk, folder = tmp_path / "disk", tmp_path / "saved"
    disk.mkdir()
    folder.mkdir()
    (folder / "one").write_bytes(b"old")

    def fail(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    with sessions_on(disk) as engine:
        ask(engine, PROMPT)
        sink(engine, level)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, function, fail)
            with pytest.raises(error):
                engine.save_session("one", folder / "one")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"one": b"old"}
        stats = figures(engine)
        assert {Level.DEVICE: stats.n_on_device, Level.HOST: stats.n_on_host, Level.DISK: stats.n_on_disk}[level] == 1
        assert ask(engine, (*PROMPT, *answered, 5)).n_cached_tokens == N_SAVED


@pytest.mark.parametrize("target", ["nowhere/one", "file/one", "folder", "n" * 300])
def test_a_place_where_nothing_can_be_written_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with sessions_on() as engine:
        ask(engine, PROMPT)
        engine.park_session("one")
        with refusing(engine, tmp_path, FileError, "cannot save to"):
            engine.save_session("one", tmp_path / target)


@pytest.mark.parametrize("make_error", [natural_error, driver_error()], ids=["full", "broken"])
def test_host_memory_that_cannot_be_had_for_a_load_is_said(tmp_path: Path, file: Path, make_error: MakeError) -> None:
    drivers: list[FaultyDriver] = []
    with sessions_on(driver=faulty(drivers)) as engine:
        calls = (lambda: engine.load_session("one", file), lambda: engine.load_prompt(file))
        for call in calls:
            with (
                drivers[0].failing(fail_kind("pin", None, make_error)),
                refusing(engine, tmp_path, (OutOfHostMemory, DriverError)),
            ):
                call()
        for call in calls:
            call()


def test_a_copy_that_fails_on_the_way_to_a_file_leaves_the_session(tmp_path: Path, answered: tuple[int, ...]) -> None:
    drivers: list[FaultyDriver] = []
    with sessions_on(driver=faulty(drivers), prefix_caching=False) as engine:
        ask(engine, PROMPT)
        with (
            drivers[0].failing(fail_kind("copy_to_host", None, driver_error())),
            refusing(engine, tmp_path, DriverError),
        ):
            engine.save_session("one", tmp_path / "one")
        assert ask(engine, (*PROMPT, *answered, 5)).n_cached_tokens == N_SAVED


@contextmanager
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Files are complete when the event is set, at the latest when the block ends."""
    go_on, stock = threading.Event(), os.fsync

    def wait(fd: int) -> None:
        assert go_on.wait(WAIT_S)
        stock(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", wait)
        try:
            yield go_on
        finally:
            go_on.set()


@pytest.mark.parametrize("level", LEVELS)
def test_a_session_goes_on_while_its_file_is_written(
    tmp_path: Path, file: Path, answered: tuple[int, ...], level: Level, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with sessions_on(disk, prefix_caching=False, carriers=threads) as engine:
        ask(engine, PROMPT)
        sink(engine, level)
        with slow_disk(monkeypatch) as go_on:
            saving = engine.begin_save_session("one", tmp_path / "one")
            assert ask(engine, (*PROMPT, *answered, 5)).n_cached_tokens == N_SAVED
            engine.park_session("one")
            assert not saving.passed()
            assert not (tmp_path / "one").exists()
            go_on.set()
            saving.result()
        engine.tend()
        assert (tmp_path / "one").read_bytes() == file.read_bytes()  # what it had
        engine.forget_session("one")
        assert look(engine, tmp_path)[2:4] == (0, 0)


@pytest.mark.parametrize("how", ["forgotten", "closed"])
def test_a_session_that_ends_while_its_file_is_written_is_in_it(
    tmp_path: Path, file: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sessions_on(host_bytes=FRAME, carriers=threads) as engine:
        ask(engine, PROMPT)
        with slow_disk(monkeypatch) as go_on:
            engine.begin_save_session("one", tmp_path / "one")
            if how == "forgotten":
                engine.forget_session("one")
                assert look(engine, tmp_path)[2] == FRAME  # which nobody else may have yet
                ask(engine, PROMPT, "two")
                engine.park_session("two")
                assert figures(engine).n_on_host == 0
            else:
                later = threading.Timer(0.1, go_on.set)
                later.start()
                engine.close()
                later.join()
        assert go_on.is_set()
        if how == "forgotten":
            engine.saved.close()
            engine.tend()
            assert look(engine, tmp_path)[2] == 0
    assert (tmp_path / "one").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("level", LEVELS[:2])
def test_whatever_call_fails_on_the_way_to_a_file_and_back_nothing_is_lost(
    tmp_path: Path, file: Path, answered: tuple[int, ...], level: Level
) -> None:
    drivers: list[FaultyDriver] = []
    n_hits = 0
    with sessions_on(driver=faulty(drivers), premap_tokens=0, layout="token_major") as engine:
        for n_th in range(1, 200):
            engine.load_session("one", file)
            if level is Level.DEVICE:
                ask(engine, (*PROMPT, *answered, 5))
            before = look(engine, tmp_path)[0]
            drivers[0].begin_count()
            with drivers[0].failing(fail_once(n_th, driver_error())), suppress(DriverError):
                engine.save_session("one", tmp_path / "one")
            assert look(engine, tmp_path)[0] == before
            engine.slots.check()
            if not drivers[0].faults:
                break
            n_hits += 1
            engine.save_session("one", tmp_path / "one")
            (tmp_path / "one").unlink()
            engine.forget_session("one")
        assert (tmp_path / "one").exists()
        assert (n_hits > 0) == (level is Level.DEVICE)  # what is in host memory needs no driver


def test_what_waits_in_host_memory_makes_room_for_what_is_loaded(tmp_path: Path, file: Path) -> None:
    with sessions_on(tmp_path, host_bytes=2 * FRAME) as engine:
        for i in range(5):
            engine.load_session(f"s{i}", file)
        assert (figures(engine).n_on_host, figures(engine).n_on_disk) == (2, 3)
        assert figures(engine).n_gone == 0


def test_without_room_for_its_rows_a_session_is_not_saved(tmp_path: Path, file: Path) -> None:
    with sessions_on(host_bytes=FRAME) as engine:
        engine.load_prompt(file)  # which stays
        ask(engine, prompt_of(20, 1))
        with refusing(engine, tmp_path, OutOfHostMemory):
            engine.save_session("one", tmp_path / "one")


def test_a_session_whose_copy_is_on_its_way_is_saved_whole(tmp_path: Path, answered: tuple[int, ...]) -> None:
    clock = ManualClock()
    with sessions_on(clock=clock, driver=backend("cuda"), prefix_caching=False) as engine:
        ask(engine, PROMPT)
        clock.advance(10)
        engine.tend()
        engine.save_session("one", tmp_path / "one")
    with sessions_on() as engine:
        engine.load_session("one", tmp_path / "one")
        assert ask(engine, (*PROMPT, *answered, 5)).n_cached_tokens == N_SAVED


def test_without_sessions_the_remedy_is_named(tmp_path: Path, file: Path) -> None:
    with engine_on() as engine:
        calls: list[Callable[[], object]] = [
            lambda: engine.save_session("one", tmp_path / "one"),
            lambda: engine.load_session("one", file),
            lambda: engine.load_prompt(file),
        ]
        for call in calls:
            with pytest.raises(ConfigError, match="set host_bytes"):
                call()
    with engine_on("mistral", host_bytes=8 * MIB) as engine, pytest.raises(ConfigError, match="this model keeps more"):
        engine.load_session("one", file)


# How long


def n_on(engine: Engine) -> tuple[int, int, int]:
    return figures(engine).n_on_device, figures(engine).n_on_host, figures(engine).n_on_disk


def pass_time(engine: Engine, clock: ManualClock, seconds: float) -> tuple[int, int, int]:
    """Let time pass, and what is due happen; return how many sessions are where."""
    clock.advance(seconds)
    for _ in range(4):
        clock.advance(0.125)
        engine.tend()
    engine.slots.check()
    return n_on(engine)


def test_a_request_says_how_long_its_session_stays(tmp_path: Path) -> None:
    clock = ManualClock()
    with sessions_on(tmp_path, clock=clock, max_session_ttl_s=100.0) as engine:
        ask(engine, prompt_of(20, 1), "short", session_ttl_s=1)
        ask(engine, prompt_of(20, 2), "usual")
        ask(engine, prompt_of(20, 3), "long", session_ttl_s=100.0)
        found = [pass_time(engine, clock, seconds) for seconds in (2, 12, 61, 30, 15, 910)]
        assert found == [(2, 1, 0), (1, 2, 0), (1, 2, 0), (0, 2, 1), (0, 1, 2), (0, 1, 0)]


def test_the_next_request_says_it_anew() -> None:
    clock = ManualClock()
    with sessions_on(clock=clock) as engine:
        ask(engine, prompt_of(20), session_ttl_s=1)
        ask(engine, prompt_of(20))
        assert pass_time(engine, clock, 8) == (1, 0, 0)
        ask(engine, prompt_of(20), session_ttl_s=0)
        assert pass_time(engine, clock, 1) == (0, 1, 0)  # its slot goes, and nothing else
        assert pass_time(engine, clock, 97) == (0, 1, 0)
        assert pass_time(engine, clock, 2) == (0, 0, 0)


def test_a_loaded_session_stays_as_long_as_was_said(file: Path) -> None:
    clock = ManualClock()
    with sessions_on(clock=clock) as engine:
        engine.load_session("short", file, ttl_s=0)
        engine.load_session("usual", file)
        engine.load_session("long", file, ttl_s=50)
        assert [pass_time(engine, clock, seconds)[1] for seconds in (9, 89, 1, 397, 3)] == [3, 3, 1, 1, 0]


@pytest.mark.parametrize("ttl_s", [-1, 10.5, float("inf"), float("nan"), True, "5"])
def test_a_time_beyond_the_bound_is_refused(ttl_s: Any) -> None:
    request = Request(PROMPT, greedy(2), session_id="one", session_ttl_s=ttl_s)
    with sessions_on() as engine, pytest.raises(InvalidRequest, match="0 to 10 seconds") as refused:
        engine.check(request)
    assert refused.value.param == "session_ttl_s"


def test_a_time_needs_a_session_and_a_bound_that_holds_the_usual_one() -> None:
    with sessions_on() as engine, pytest.raises(InvalidRequest, match="name the session"):
        engine.check(Request(PROMPT, greedy(2), session_ttl_s=5.0))
    with pytest.raises(ConfigError, match="max_session_ttl_s is 5"):
        make_config(session_ttl_s=10.0, max_session_ttl_s=5)


# The other doors


def test_a_script_saves_and_loads(tmp_path: Path, answered: tuple[int, ...]) -> None:
    params = greedy(N_ANSWER, ignore_eos=True)

    def llm() -> LLM:
        return LLM(model_with(), **OPTIONS)

    with llm() as one:
        one.generate([PROMPT], params, session_ids=["tea"], session_ttl_s=5.0, progress=False)
        one.save_session("tea", tmp_path / "tea")
        with pytest.raises(InvalidRequest, match="session_ttl_s"):
            one.generate([PROMPT], params, session_ids=["tea"], session_ttl_s=11.0, progress=False)
        one.generate([PROMPT], params, session_ttl_s=11.0, progress=False)  # for no session
    with llm() as two:
        two.load_session("tea", tmp_path / "tea", ttl_s=5.0)
        prompt = (*PROMPT, *answered, 5)
        [output] = two.generate([prompt], params, session_ids=["tea"], progress=False)
        assert output.n_cached_tokens == N_SAVED
        assert list(output.answers[0].token_ids) == greedy_alone("llama", prompt, N_ANSWER)


def test_a_thread_saves_and_loads_and_outlives_what_is_refused(tmp_path: Path, file: Path) -> None:
    inner = Engine(model_with(), None, make_config(**OPTIONS), open_driver=backend())
    engine = AsyncEngine(inner)
    engine.start()
    try:
        with pytest.raises(FileError):
            engine.load_session("one", tmp_path / "nowhere", timeout_s=WAIT_S)
        for path in ("a\0b", "\ud800"):
            with pytest.raises(UsageError):
                engine.load_session("one", path, timeout_s=WAIT_S)
        engine.load_session("one", file, "a", ttl_s=5.0, timeout_s=WAIT_S)
        with pytest.raises(UnknownSession):
            engine.save_session("one", tmp_path / "one", timeout_s=WAIT_S)
        engine.save_session("one", tmp_path / "one", "a", timeout_s=WAIT_S)
        assert engine.load_prompt(tmp_path / "one", timeout_s=WAIT_S) == N_SAVED
        assert (tmp_path / "one").read_bytes() == file.read_bytes()
        assert engine.health().is_alive
    finally:
        assert engine.stop(WAIT_S)
