"""Clients save sessions where the operator allows it, and load them in a later server; never by a path, nor others'."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from vmem_kv.engine.llm import LLM
from vmem_kv.errors import ConfigError, UsageError
from vmem_kv.server.auth import Keys
from vmem_kv.server.preload import Preload
from vmem_kv.server.schemas import ListAsk
from vmem_kv.server.session_folder import STALE_S, Owner, SessionFolder
from vmem_kv.tiers.files import save as save_file

from ..engine.harness import held_after
from ..tiers.bench import TierBench
from ..tiers.test_files import IDENTITY
from .harness import PATHS, WAIT_S, Running, good, serving, text_of, until
from .test_commands import process, run
from .test_forgetting import code_of
from .test_prefix_cache import n_cached
from .test_sessions import KEY, LONG, N_LONG, OPTIONS, OTHER

ROUTE = "/v1/saved_sessions"
FIELDS: dict[str, Any] = {**OPTIONS, "prefix_caching": False}
Headers = Mapping[str, str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def saving(tiny_model_folder: Path, folder: Path) -> Iterator[Running]:
    with serving(tiny_model_folder, saves_in=SessionFolder(folder, 4), **FIELDS) as server:
        yield server


@pytest.fixture(autouse=True)
def leaves_no_file(folder: Path) -> Iterator[None]:
    yield
    for path in folder.rglob("*.session"):
        path.unlink()
    assert [path for path in folder.rglob("*") if path.is_file()] == []


def say(running: Running, name: str = "tea", headers: Headers | None = None, **fields: Any) -> int:
    """Go on with a session; return how many tokens it had."""
    ask = good("completions", **{"prompt": LONG, "session_id": name, **fields})
    response = running.client.post(PATHS["completions"], json=ask, headers=headers)
    assert response.status_code == 200, response.text
    until(running.is_idle)
    return n_cached(response.json())


def save(running: Running, name: Any, session: Any = "tea", headers: Headers | None = None, **salt: Any) -> Any:
    return running.client.post(ROUTE, json={"name": name, "session_id": session, **salt}, headers=headers)


def load(running: Running, name: Any, session: Any = "tea", headers: Headers | None = None, **more: Any) -> Any:
    return running.client.post(f"{ROUTE}/load", json={"name": name, "session_id": session, **more}, headers=headers)


def listed(running: Running, headers: Headers | None = None, **query: str) -> list[str]:
    data = running.client.get(ROUTE, headers=headers, params=query).json()["data"]
    return [entry["id"] for entry in data]


def delete(running: Running, name: str, headers: Headers | None = None, **query: str) -> httpx.Response:
    return running.client.delete(f"{ROUTE}/{quote(name, safe='')}", params=query, headers=headers)


def forget(running: Running, name: str = "tea", **query: str) -> None:
    running.client.delete(f"/v1/sessions/{quote(name, safe='')}", params=query)


def test_a_later_server_goes_on_where_an_earlier_one_was(tiny_model_folder: Path, tmp_path: Path) -> None:
    said = []
    for is_later in (False, True):
        with serving(tiny_model_folder, saves_in=SessionFolder(tmp_path), **FIELDS) as running:
            if is_later:
                response = load(running, "evening-1", "tee")
                assert response.json() == {"id": "tee", "object": "session", "loaded": True}
            data = running.post("completions", prompt=LONG, session_id="tee").json()
            assert n_cached(data) == (N_LONG - 1 if is_later else 0)
            said.append(text_of("completions", data))
            until(running.is_idle)
            response = save(running, "evening-1", "tee")
            assert response.status_code == 200, response.text
            [file] = [path for path in tmp_path.rglob("*") if path.is_file()]
            assert response.json() == {
                "id": "evening-1", "object": "saved_session", "session_id": "tee", "bytes": file.stat().st_size
            }  # fmt: skip
            assert file.relative_to(tmp_path) == Path("everybody/evening-1.session")
            assert [path.stat().st_mode & 0o777 for path in (file, file.parent)] == [0o600, 0o700]
    assert said[0] == said[1]


def test_a_client_lists_and_deletes_what_it_saved(saving: Running) -> None:
    say(saving)
    for name in ("b", "a"):
        assert save(saving, name).status_code == 200
    [first, second] = saving.client.get(ROUTE).json()["data"]
    assert (first["id"], second["id"], first["bytes"]) == ("a", "b", second["bytes"])
    assert first["created"] > 1_700_000_000
    response = delete(saving, "a")
    assert response.json() == {"id": "a", "object": "saved_session.deleted", "deleted": True}
    assert listed(saving) == ["b"]
    assert code_of(delete(saving, "a")) == (404, "saved_session_not_found")
    forget(saving)


NO_NAMES = [
    "", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "a\0", "a\n", "a.session", ".hidden", "-", "~", "a b",
    "%2e%2e", "é", "x" * 65, "everybody/../x",
]  # fmt: skip


@pytest.mark.parametrize("name", [*NO_NAMES, 5, None, ["a"], {"a": "b"}])
def test_a_name_that_could_be_a_path_is_refused(saving: Running, folder: Path, name: Any) -> None:
    before = sorted(folder.parent.rglob("*"))
    for response in (save(saving, name), load(saving, name)):
        assert (response.status_code, response.json()["error"]["param"]) == (400, "name")
    if isinstance(name, str) and name:
        assert delete(saving, name).status_code in (400, 404, 405)  # whatever the path is taken for on its way
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize("name", NO_NAMES)
def test_the_folder_itself_takes_no_such_name(folder: Path, name: str) -> None:
    with pytest.raises(UsageError, match="1 to 64 letters"):
        SessionFolder(folder).file(Owner(b"", None), name)


def test_no_salt_and_no_key_can_look_like_another(folder: Path) -> None:
    made = SessionFolder(folder)
    owners = [Owner(key, salt) for key in (b"", b"k", b"l") for salt in (None, "", "a", "../a", "a\0b", "x" * 256)]
    files = {made.file(owner, name) for owner in owners for name in ("a", "b")}
    assert len(files) == 2 * len(owners)
    assert {file.parent.parent for file in files} == {folder}
    assert all(len(file.name) < 200 for file in files)


def check_strangers(running: Running) -> None:
    """What one key saves under one salt, nobody else finds."""
    mine, other = ({"Authorization": f"Bearer {key}"} for key in (KEY, OTHER))
    say(running, "tea", mine, cache_salt="a")
    for headers, salt in ((other, {"cache_salt": "a"}), (mine, {}), (mine, {"cache_salt": "b"}), (other, {})):
        assert code_of(save(running, "one", "tea", headers, **salt)) == (404, "session_not_found")
    assert save(running, "one", "tea", mine, cache_salt="a").status_code == 200
    for headers, salt in ((other, {"cache_salt": "a"}), (mine, {}), (mine, {"cache_salt": "b"}), (other, {})):
        assert code_of(load(running, "one", "two", headers, **salt)) == (404, "saved_session_not_found")
        assert listed(running, headers, **salt) == []
        assert code_of(delete(running, "one", headers, **salt)) == (404, "saved_session_not_found")
    assert save(running, "one").status_code == 401
    assert listed(running, mine, cache_salt="a") == ["one"]
    assert load(running, "one", "two", mine, cache_salt="a").status_code == 200
    for headers, salt in ((other, {"cache_salt": "a"}), (mine, {}), (mine, {"cache_salt": "a"})):
        expected = N_LONG - 1 if salt and headers is mine else 0
        assert say(running, "two", headers, **salt) == expected


def test_nobody_reaches_what_another_key_or_salt_has_saved(tiny_model_folder: Path, tmp_path: Path) -> None:
    with serving(tiny_model_folder, keys=(KEY, OTHER), saves_in=SessionFolder(tmp_path), **FIELDS) as running:
        check_strangers(running)


@pytest.mark.parametrize("plant", ["key", "salt"])
def test_an_owner_that_is_ignored_is_found(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: str
) -> None:
    if plant == "key":
        monkeypatch.setattr(Keys, "digest_of", lambda self, domain: b"")
    else:
        monkeypatch.setattr("vmem_kv.server.session_folder._mark", lambda owner: "")
    with (
        serving(tiny_model_folder, keys=(KEY, OTHER), saves_in=SessionFolder(tmp_path), **FIELDS) as running,
        pytest.raises(AssertionError),
    ):
        check_strangers(running)


def test_keys_in_another_order_have_their_own_files_still(tiny_model_folder: Path, tmp_path: Path) -> None:
    mine, other = ({"Authorization": f"Bearer {key}"} for key in (KEY, OTHER))
    with serving(tiny_model_folder, keys=(KEY, OTHER), saves_in=SessionFolder(tmp_path), **FIELDS) as running:
        say(running, "tea", mine)
        assert save(running, "one", "tea", mine).status_code == 200
    with serving(tiny_model_folder, keys=(OTHER, KEY), saves_in=SessionFolder(tmp_path), **FIELDS) as running:
        assert (listed(running, mine), listed(running, other)) == (["one"], [])
        assert load(running, "one", "tea", mine).status_code == 200
        assert say(running, "tea", mine) == N_LONG - 1
    assert KEY not in str(list(tmp_path.rglob("*")))


def test_a_client_saves_so_many_and_no_more(saving: Running) -> None:
    say(saving)
    salted: dict[str, Any] = {"cache_salt": "s"}
    unsalted: dict[str, Any] = {}
    say(saving, **salted)
    assert [save(saving, name).status_code for name in "abc"] == [200] * 3
    assert save(saving, "a", **salted).status_code == 200
    for salt in (unsalted, salted):
        assert code_of(save(saving, "d", **salt)) == (409, "too_many_saved_sessions")
    assert save(saving, "c").status_code == 200  # in place of the one before
    assert delete(saving, "b").status_code == 200
    assert save(saving, "d").status_code == 200
    forget(saving)
    forget(saving, **salted)


def test_those_on_their_way_count(folder: Path) -> None:
    made, owner = SessionFolder(folder, 1), Owner(b"", None)
    with made.saving(owner, "a"):
        with pytest.raises(Exception, match="at most 1"), made.saving(owner, "b"):
            pass
        with made.saving(owner, "a"), made.saving(Owner(b"k", None), "b"):
            pass
    with made.saving(owner, "b"):
        pass


def test_what_is_not_there_or_not_free_is_said(saving: Running) -> None:
    assert code_of(save(saving, "one", "nobody")) == (404, "session_not_found")
    assert code_of(load(saving, "one", "nobody")) == (404, "saved_session_not_found")
    say(saving)
    save(saving, "one")
    assert code_of(load(saving, "one")) == (409, "session_exists")
    ask = good("completions", prompt=LONG, session_id="tea", max_tokens=60, ignore_eos=True, stream=True)
    with (
        held_after(3, saving.engine),
        saving.client.stream("POST", PATHS["completions"], json=ask),
    ):
        until(lambda: saving.engine.snapshot().n_running == 1)
        assert code_of(save(saving, "one")) == (409, "session_in_use")
        assert code_of(load(saving, "one")) == (409, "session_in_use")
    until(saving.is_idle)
    forget(saving)


def test_a_damaged_file_is_refused_and_only_the_log_says_why(
    saving: Running, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    say(saving)
    save(saving, "onlyme")
    forget(saving)
    [file] = folder.rglob("onlyme.session")
    file.write_bytes(file.read_bytes()[:-1])
    response = load(saving, "onlyme")
    assert code_of(response) == (409, "saved_session_refused")
    assert "byte" not in response.text
    records = [r for r in caplog.records if r.message == "a saved session was not loaded"]
    assert len(records) == 1
    assert "truncated" in str(vars(records[0]))
    assert "onlyme" not in str([vars(record) for record in caplog.records])
    assert str(folder) not in str([vars(record) for record in caplog.records])
    assert say(saving) == 0
    forget(saving)


@pytest.mark.parametrize(
    ("code", "status", "name"), [(errno.ENOSPC, 507, "disk_full"), (errno.EIO, 500, None)], ids=["full", "broken"]
)
def test_a_disk_that_fails_is_said(
    saving: Running, folder: Path, monkeypatch: pytest.MonkeyPatch, code: int, status: int, name: str | None
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    say(saving)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", fail)
        assert code_of(save(saving, "one")) == (status, name)
    assert [path for path in folder.rglob("*") if path.is_file()] == []
    assert say(saving) == N_LONG - 1
    forget(saving)


def test_others_are_answered_while_a_file_is_written(saving: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, stock = threading.Event(), os.fsync
    say(saving)

    def wait(fd: int) -> None:
        assert go_on.wait(WAIT_S)
        stock(fd)

    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(os, "fsync", wait)
        saved = pool.submit(save, saving, "one")
        until(lambda: bool(saving.engine.saved._saving))
        assert saving.post("completions").status_code == 200
        assert say(saving) == N_LONG - 1  # the session itself, too
        assert not saved.done()
        go_on.set()
        assert saved.result().status_code == 200
    forget(saving)


def test_a_name_with_a_line_end_reaches_no_other_file(saving: Running) -> None:
    say(saving)
    assert save(saving, "one").status_code == 200
    response = delete(saving, "one\n")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "name")
    assert listed(saving) == ["one"]
    forget(saving)


def test_what_is_no_plain_file_is_no_saved_session(saving: Running, folder: Path) -> None:
    say(saving)
    assert save(saving, "plain").status_code == 200
    forget(saving)
    [plain] = folder.rglob("plain.session")
    made, link = plain.with_name("made.session"), plain.with_name("link.session")
    made.mkdir()
    link.symlink_to(plain)
    try:
        assert listed(saving) == ["plain"]
        for name in ("made", "link"):
            assert code_of(load(saving, name)) == (404, "saved_session_not_found")
            assert code_of(delete(saving, name)) == (404, "saved_session_not_found")
        assert (made.is_dir(), link.is_symlink()) == (True, True)
        with SessionFolder(folder, 2).saving(Owner(b"", None), "second"):  # only `plain` counts
            pass
    finally:
        made.rmdir()
        link.unlink()
    assert load(saving, "plain").status_code == 200
    forget(saving)


def test_a_folder_that_refuses_is_said(
    tiny_model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "everybody").write_bytes(b"")
    with serving(tiny_model_folder, saves_in=SessionFolder(tmp_path), **FIELDS) as running:
        for what, response in (
            ("list", running.client.get(ROUTE)),
            ("load", load(running, "one")),
            ("delete", delete(running, "one")),
        ):
            assert response.status_code == 500
            assert response.json()["error"]["message"] == f"The server could not {what} this client's saved sessions."
    noted = [str(vars(record)) for record in caplog.records if "no saved session to" in record.message]
    assert ["NotADirectoryError" in text for text in noted] == [True] * 3
    assert str(tmp_path) not in str([vars(record) for record in caplog.records])


def test_a_file_that_the_system_does_not_let_go_of_stays(saving: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    say(saving)
    assert save(saving, "one").status_code == 200
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        response = delete(saving, "one")
    assert response.status_code == 500
    assert "could not delete" in response.json()["error"]["message"]
    assert listed(saving) == ["one"]
    assert delete(saving, "one").status_code == 200
    forget(saving)


def test_what_a_killed_save_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    salted = SessionFolder(tmp_path).file(Owner(b"k", "salt"), "b")
    folders = [tmp_path / "everybody", salted.parent]
    parts = [".a.session.x1_y2z3w.part", f".{salted.name}.abcdefgh.part"]
    others = ["a.session", "a.session.x.part", ".a.session.part", ".a.txt.x.part", ".a b.session.x.part", ".part"]
    old_s = time.time() - 2 * STALE_S

    def put(path: Path, *, is_old: bool) -> Path:
        path.write_bytes(b"x")
        if is_old:
            os.utime(path, (old_s, old_s))
        return path

    stale, kept = [], []
    for folder in folders:
        folder.mkdir()
        stale += [put(folder / name, is_old=True) for name in parts]
        kept += [put(folder / name, is_old=True) for name in others]
        kept.append(put(folder / ".new.session.x.part", is_old=False))
        (folder / ".folder.session.x.part").mkdir()
        (folder / ".link.session.x.part").symlink_to(tmp_path / "missing")
        os.utime(folder / ".link.session.x.part", (old_s, old_s), follow_symlinks=False)
        kept += [folder / ".folder.session.x.part", folder / ".link.session.x.part"]
    for foreign in (tmp_path, tmp_path / "foreign"):
        foreign.mkdir(exist_ok=True)
        kept.append(put(foreign / parts[0], is_old=True))
    (tmp_path / ("0" * 32)).symlink_to(tmp_path / "foreign")
    SessionFolder(tmp_path)
    assert [path for path in stale if path.exists()] == []
    assert [path for path in kept if not os.path.lexists(path)] == []


def test_a_killed_save_leaves_a_name_that_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def kill(*arguments: object) -> None:
        raise Killed

    tiers = TierBench(backend="native")
    with tiers.host.filling(tiers.layout, range(3)) as copy:
        pass
    with monkeypatch.context() as patch, SessionFolder(tmp_path).saving(Owner(b"", "salt"), "one") as file:
        patch.setattr(os, "posix_fallocate", kill)
        patch.setattr(os, "unlink", kill)
        with pytest.raises(Killed):
            save_file(file, tiers.host, copy, IDENTITY)
    [part] = file.parent.iterdir()
    SessionFolder(tmp_path)
    assert part.exists()
    os.utime(part, (0, 0))
    SessionFolder(tmp_path)
    assert not part.exists()
    tiers.host.drop(copy)
    tiers.end()


def test_a_folder_that_went_is_a_failure_of_ours(tiny_model_folder: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    with serving(tiny_model_folder, saves_in=SessionFolder(gone), **FIELDS) as running:
        say(running)
        gone.rmdir()
        assert code_of(save(running, "one")) == (500, None)
        assert listed(running) == []
        assert say(running) == N_LONG - 1


def test_without_room_in_host_memory_nothing_is_saved_or_loaded(tiny_model_folder: Path, tmp_path: Path) -> None:
    with serving(tiny_model_folder, saves_in=SessionFolder(tmp_path), **{**FIELDS, "host_bytes": 2 << 20}) as running:
        say(running)
        assert save(running, "one").status_code == 200
        [file] = tmp_path.rglob("*.session")
        running.service.engine.load_prompt(file)
        say(running, "two", prompt="up to see the light of it " * 3)
        assert code_of(save(running, "two", "two")) == (503, "no_room")
        assert code_of(load(running, "one", "three")) == (503, "no_room")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"session_id": ""}, "session_id"),
        ({"session_id": "x" * 257}, "session_id"),
        ({"session_id": None}, "session_id"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"path": "/etc"}, "path"),
        ({"session_ttl": -1}, "session_ttl"),
        ({"session_ttl": 60.5}, "session_ttl"),
        ({"session_ttl": "1"}, "session_ttl"),
    ],
)
def test_what_is_wrong_is_said(saving: Running, fields: dict[str, Any], param: str) -> None:
    response = saving.client.post(f"{ROUTE}/load", json={"name": "a", "session_id": "tea", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert saving.client.get(ROUTE, params={"other": "x"}).status_code == 400


@pytest.mark.parametrize("route", [ROUTE, f"{ROUTE}/load"])
def test_bodies_are_read_by_the_same_rules_as_all(saving: Running, route: str) -> None:
    body = b'{"name": "a", "session_id": "tea"}'
    assert saving.client.post(route, content=body).status_code == 415  # which any web page could send
    assert saving.client.post(route, content=b"{}" + b" " * (1 << 20)).status_code == 413
    assert saving.client.post(route, content=b"[", headers={"Content-Type": "application/json"}).status_code == 400


def test_where_the_operator_named_no_folder_nothing_is_saved(tiny_model_folder: Path) -> None:
    with serving(tiny_model_folder, **FIELDS) as running:
        say(running)
        for response in (save(running, "a"), load(running, "a"), delete(running, "a"), running.client.get(ROUTE)):
            assert code_of(response) == (404, "not_enabled")


# How long a session stays


@pytest.mark.parametrize("endpoint", list(PATHS))
def test_a_request_says_how_long_its_session_stays(saving: Running, endpoint: str) -> None:
    def n_kept() -> int:
        tiers = saving.engine.snapshot().tiers
        assert tiers is not None
        return tiers.n_sessions_by_tier["device"]

    assert saving.post(endpoint, session_id="long", session_ttl=60).status_code == 200
    assert n_kept() == 1
    assert saving.post(endpoint, session_id="short", session_ttl=0).status_code == 200
    until(lambda: n_kept() == 1)  # a minute later without that
    forget(saving, "long")
    forget(saving, "short")
    for fields, code in (
        ({"session_ttl": 60.5, "session_id": "a"}, "decimal_above_max_value"),
        ({"session_ttl": -1, "session_id": "a"}, "decimal_below_min_value"),
        ({"session_ttl": True, "session_id": "a"}, "invalid_type"),
        ({"session_ttl": 5}, "invalid_value"),
    ):
        response = saving.post(endpoint, **fields)
        assert (code_of(response), response.json()["error"]["param"]) == ((400, code), "session_ttl")


# What an operator loads


@pytest.fixture(scope="module")
def file(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "system.session"
    with LLM(str(tiny_model_folder), **{**OPTIONS, "max_num_seqs": 4}) as llm:
        assert llm.save_prompt(LONG, path) == N_LONG
    return path


def test_what_an_operator_loads_is_there_from_the_first_request(tiny_model_folder: Path, file: Path) -> None:
    with serving(tiny_model_folder, keys=(KEY, OTHER), **OPTIONS) as running:
        for key in (KEY, OTHER):
            headers = {"Authorization": f"Bearer {key}"}
            assert say(running, "before", headers) == 0  # each key for itself
        Preload(prompts=(file,)).into(running.engine, Keys(()))
        for key in (KEY, OTHER):
            headers = {"Authorization": f"Bearer {key}"}
            for salt in ("a", "b"):
                ask = good("completions", prompt=LONG + "up", cache_salt=salt)
                data = running.client.post(PATHS["completions"], json=ask, headers=headers).json()
                assert n_cached(data) == N_LONG


def look(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the command would serve with."""
    seen: list[dict[str, Any]] = []

    def serve(model: Any, tokenizer: Any, config: Any, **others: Any) -> int:
        seen.append({"config": config, **others})
        return 0

    monkeypatch.setattr("vmem_kv.server.serving.serve_model", serve)
    return seen


def test_the_command_hands_its_options_on(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = look(monkeypatch)
    options = ["--session-folder", str(tmp_path), "--max-saved", "3", "--load-session", "tea=a=b.session"]
    options += ["--load-prompt", "p", "--load-prompt", "q", "--max-session-ttl", "900", "--host-memory", "4m"]
    for arguments in (options, []):
        assert run("serve", str(tiny_model_folder), "--port", "0", *arguments).exit_code == 0
    assert seen[0]["preload"] == Preload((("tea", Path("a=b.session")),), (Path("p"), Path("q")))
    assert seen[0]["folder"].file(Owner(b"", None), "x").parent.parent == tmp_path
    assert seen[0]["config"].longest_session_ttl_s == 900
    assert (seen[1]["preload"], seen[1]["folder"]) == (Preload(), None)
    assert seen[1]["config"].longest_session_ttl_s == 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--load-session", "tea"], "--load-session tea has no name or no file; write NAME=FILE"),
        (["--load-session", "=tea"], "write NAME=FILE"),
        (["--load-session", "tea="], "write NAME=FILE"),
        (
            ["--load-session", "tea=nowhere"],
            "no sessions are kept, so there is none to save or load; set --host-memory",
        ),
        (["--load-prompt", "nowhere", "--host-memory", "4m"], "cannot load nowhere"),
        (["--load-session", "tea=nowhere", "--host-memory", "4m"], "cannot load nowhere"),
        (["--session-folder", "nowhere"], "--session-folder nowhere is no folder that can be written"),
        (["--session-folder", "."], "no sessions are kept, so there is none to save or load; set --host-memory"),
        (["--max-session-ttl", "5"], "--max-session-ttl is 5.0; it must be --session-ttl (60) or more"),
    ],
)
def test_what_cannot_be_is_one_line_that_names_the_remedy(
    tiny_model_folder: Path, arguments: list[str], message: str
) -> None:
    result = run("serve", str(tiny_model_folder), "--port", "0", *arguments)
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_session_is_loaded_for_one_key_only(tiny_model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{KEY}\n{OTHER}\n")
    result = run("serve", str(tiny_model_folder), "--api-key-file", str(tmp_path / "keys"), "--load-session", "a=b")
    assert result.exit_code == 1
    assert "several API keys" in result.stderr
    with pytest.raises(ConfigError, match="several"):
        Preload((("a", Path("b")),)).check(Keys((KEY, OTHER)))
    Preload((("a", Path("b")),)).check(Keys((KEY,)))


@pytest.mark.parametrize("keys", [(), (KEY,)])
def test_a_session_that_is_loaded_is_the_one_clients(
    tiny_model_folder: Path, file: Path, keys: tuple[str, ...]
) -> None:
    headers = {"Authorization": f"Bearer {KEY}"} if keys else None
    with serving(tiny_model_folder, keys=keys, **FIELDS) as running:
        Preload((("tea", file),)).into(running.engine, Keys(keys))
        assert say(running, "tea", headers, cache_salt="x") == 0
        assert say(running, "tea", headers) == N_LONG - 1


def test_a_process_begins_with_what_it_was_given(tiny_model_folder: Path, tmp_path: Path, file: Path) -> None:
    options = ["--host-memory", "16m", "--session-folder", str(tmp_path), "--load-session", f"tea={file}"]
    with (
        process(tiny_model_folder, *options, "--load-prompt", str(file)) as (_, url, _),
        httpx.Client(base_url=url, timeout=WAIT_S, trust_env=False) as client,
    ):
        response = client.post(ROUTE, json={"name": "one", "session_id": "tea"})
        assert response.status_code == 200, response.text
        ask = good("completions", model=tiny_model_folder.name, prompt=LONG + "up", cache_salt="x")
        assert n_cached(client.post(PATHS["completions"], json=ask).json()) == N_LONG
    assert (tmp_path / "everybody" / "one.session").read_bytes() == file.read_bytes()


def test_the_help_speaks_of_it() -> None:
    text = run("serve", "--help").stdout
    options = ("--session-folder", "--max-saved", "--load-session", "--load-prompt", "--max-session-ttl")
    assert [word for word in (*options, "/v1/saved_sessions", "session_ttl") if word not in text] == []


def test_a_listing_has_no_name() -> None:
    assert "name" not in ListAsk.model_fields
