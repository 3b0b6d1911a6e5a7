"""Sessions and prompts to files and back, for an engine: what is allowed, and whose rows they are.

    begin_save ─▶ the rows are in host memory, and held there ─▶ a file is written, beside the engine ─▶ settle

A session goes on while its file is written: what is written are the rows that it had.

Guarantees: a file is used by an engine of the same model only (`identity.py`), and nothing has changed after any error.
Assumptions: one thread, the engine's.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel

from vmem_kv.driver.base import PASSED
from vmem_kv.engine.identity import identify
from vmem_kv.engine.moves import Carriers
from vmem_kv.engine.prompt_slots import PromptSlots
from vmem_kv.engine.request import MAX_SESSION_CHARACTERS, is_session_id
from vmem_kv.engine.route import Route
from vmem_kv.engine.session_slots import SessionSlots
from vmem_kv.engine.tiers import Slots
from vmem_kv.errors import ConfigError, OutOfHostMemory, UsageError, VmemError
from vmem_kv.tiers import files
from vmem_kv.tiers.copies import HostCopy
from vmem_kv.tiers.files import ModelIdentity
from vmem_kv.tiers.host import HostTier
from vmem_kv.tiers.moving import Task


class _Tiers(NamedTuple):
    """Where sessions and prompts are kept, and who writes files."""

    sessions: SessionSlots
    prompts: PromptSlots
    host: HostTier
    carriers: Carriers


class _Saving(NamedTuple):
    """A file that is written, and the rows that are held for it."""

    task: Task[None]
    copy: HostCopy


class SavedSessions:
    """Saves and loads.

    Args:
        model: The engine's.
        route: Likewise.
        slots: Likewise, with sessions or without.
    """

    def __init__(self, model: PreTrainedModel, route: Route, slots: Slots) -> None:
        self._model = model
        self._route = route
        self._slots = slots
        self._identity: ModelIdentity | None = None
        self._saving: list[_Saving] = []

    def identity(self) -> ModelIdentity:
        """Return whose rows are saved, and loaded. The first time, every weight is read."""
        if self._identity is None:
            self._identity = identify(self._model, self._route)
        return self._identity

    def require(self) -> _Tiers:
        """Return where sessions and prompts are kept.

        Raises:
            ConfigError: Nowhere.
        """
        _, sessions, prompts, host, carriers, _ = self._slots
        if sessions is None or prompts is None or host is None or carriers is None:
            if not self._route.can_share:
                raise ConfigError(
                    "this model keeps more of a sequence than K and V of all tokens; its sessions cannot be kept, "
                    "saved or loaded"
                )
            raise ConfigError("no sessions are kept, so there is none to save or load; set host_bytes for them")
        return _Tiers(sessions, prompts, host, carriers)

    def begin_save(self, session_id: str, path: str | Path, domain: str) -> Task[None]:
        """Begin to write a session to a file; return what says, in any thread, when and how that has ended.

        Raises:
            VmemError: As `Engine.save_session`, but for what the file fails with: the task says that.
        """
        sessions, _, host, carriers = self.require()
        _check_name(session_id)
        _check_path(path)
        self.settle()
        identity = self.identity()
        copy = sessions.copy_of(session_id, domain)
        task = Task(lambda: files.save(path, host, copy, identity))
        host.hold(copy)
        self._saving.append(_Saving(task, copy))
        with contextlib.suppress(VmemError):  # the task says it
            carriers.files.start(task, PASSED)
        return task

    def settle(self) -> None:
        """Let go of what has been written."""
        for saving in [saving for saving in self._saving if saving.task.passed()]:
            tiers = self.require()
            self._saving.remove(saving)
            tiers.host.release(saving.copy)
            tiers.host.poll()
            tiers.sessions.n_changes += 1

    def close(self) -> None:
        """Wait for what is being written. Idempotent."""
        for saving in self._saving:
            saving.task.wait()
        self.settle()

    def load(self, session_id: str, path: str | Path, domain: str, ttl_s: float | None) -> None:
        """Begin a session with what a file holds. See `Engine.load_session`."""
        sessions = self.require().sessions
        _check_name(session_id)
        is_number = isinstance(ttl_s, (int, float)) and not isinstance(ttl_s, bool)
        if ttl_s is not None and not (is_number and ttl_s >= 0):
            raise UsageError(f"ttl_s is {ttl_s!r:.40}; it must be 0 or more seconds")
        _check_path(path)
        self.settle()
        sessions.load(session_id, domain, path, self.identity(), ttl_s)

    def forget_prompt(self, session_id: str) -> None:
        """End a session that was there to be saved as a prompt. What it has on the device is a cached prefix then.

        Raises:
            UnknownSession: There is none of that name.
            SessionInUse: A request has it.
            DriverError: Its slot could not be given back.
        """
        try:
            self.require().sessions.give_up_name(session_id, "")
        finally:
            self._slots.source.settle()

    def load_prompt(self, path: str | Path, domain: str | None) -> int:
        """Take in a prompt. See `Engine.load_prompt`."""
        sessions, prompts, _, _ = self.require()
        _check_path(path)
        self.settle()
        sessions.n_changes += 1  # host memory is theirs, too
        while True:
            try:
                return prompts.load(path, self.identity(), domain)
            except OutOfHostMemory:
                if not sessions.make_host_room(waits=True):
                    raise


def _check_name(session_id: str) -> None:
    if not is_session_id(session_id):
        raise UsageError(f"session_id must be a text of 1 to {MAX_SESSION_CHARACTERS} characters")


def _check_path(path: str | Path) -> None:
    """Raise UsageError where the system has no words for a path."""
    try:
        is_path = b"\0" not in os.fsencode(path)
    except (TypeError, UnicodeEncodeError):
        is_path = False
    if not is_path:
        raise UsageError(f"{path!r:.80} is no path of a file")
