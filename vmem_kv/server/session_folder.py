"""The operator's folder for saved sessions: which file a client means by a name.

    FOLDER / everybody, or a digest of the client's API key / NAME.session, or NAME.(a digest of its salt).session

Guarantees: a client names a file by letters, digits, `-` and `_` alone, at most 64 of them, and reaches files of its
own key and salt only; it chooses no other part of a path. Whose a folder is depends on the key itself, not on its place
among the keys. Each client has a bounded number of files, whatever its salts. Folders are the operator's only (0700).
Assumptions: one event loop calls. Nobody else writes there but other servers of the same operator, whose files count.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from vmem_kv.errors import ConfigError, UsageError
from vmem_kv.server.errors import ApiError

MAX_SAVED_NAME = 64
MAX_SAVED = 64
"""Files of one client, by default."""

_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_-]{{0,{MAX_SAVED_NAME - 1}}}")
_SUFFIX = ".session"
_EVERYBODY = "everybody"


def is_saved_name(name: str) -> bool:
    """Whether a saved session can be called so."""
    return _NAME.fullmatch(name) is not None


class Owner(NamedTuple):
    """Whose a saved session is."""

    key: bytes  # a digest of the client's API key; empty where there are no keys
    salt: str | None


class SavedSession(NamedTuple):
    """A file, as its owner sees it."""

    name: str
    n_bytes: int
    saved_s: int


class SessionFolder:
    """Finds files for clients. See this file's first lines.

    Args:
        path: An existing folder.
        max_files: The most files of one client.

    Raises:
        ConfigError: It is no folder, or nothing can be written there.
    """

    def __init__(self, path: str | Path, max_files: int = MAX_SAVED) -> None:
        self._path = Path(path).absolute()
        self._max_files = max_files
        self._coming: set[Path] = set()
        self.turn = asyncio.Lock()
        """One client saves or loads at a time, so that the engine goes on between any two."""
        if not self._path.is_dir() or not os.access(self._path, os.R_OK | os.W_OK | os.X_OK):
            raise ConfigError(f"--session-folder {path} is no folder that can be written; name one that is")

    def file(self, owner: Owner, name: str) -> Path:
        """Return where a client's saved session of this name lies, whether it is there or not.

        Raises:
            UsageError: It is no name: nothing of it may become part of a path.
        """
        if not is_saved_name(name):
            raise UsageError("the name of a saved session is 1 to 64 letters, digits, - or _")
        return self._folder(owner) / f"{name}{_mark(owner)}{_SUFFIX}"

    @contextmanager
    def saving(self, owner: Owner, name: str) -> Iterator[Path]:
        """Where to save a session, as long as the context lasts. A file of that name may be replaced.

        Raises:
            ApiError: 409: the client has as many as it may have.
            OSError: Its folder cannot be made or read.
        """
        file = self.file(owner, name)
        file.parent.mkdir(mode=0o700, exist_ok=True)
        there = {Path(entry.path) for entry in os.scandir(file.parent) if entry.name.endswith(_SUFFIX)}
        there |= {coming for coming in self._coming if coming.parent == file.parent}
        if file not in there and len(there) >= self._max_files:
            text = f"There are {len(there)} saved sessions already, and at most {self._max_files}; delete one first."
            raise ApiError(409, text, param="name", code="too_many_saved_sessions")
        self._coming.add(file)
        try:
            yield file
        finally:
            self._coming.discard(file)

    def find(self, owner: Owner) -> list[SavedSession]:
        """Return a client's saved sessions, by name."""
        end = f"{_mark(owner)}{_SUFFIX}"
        try:
            entries = list(os.scandir(self._folder(owner)))
        except FileNotFoundError:
            return []
        found: list[SavedSession] = []
        for entry in entries:
            name = entry.name.removesuffix(end)
            if entry.name.endswith(end) and is_saved_name(name):
                with suppress(FileNotFoundError):  # another server has deleted it just now
                    found.append(SavedSession(name, entry.stat().st_size, int(entry.stat().st_mtime)))
        return sorted(found)

    def _folder(self, owner: Owner) -> Path:
        return self._path / (_digest(owner.key) if owner.key else _EVERYBODY)


def _mark(owner: Owner) -> str:
    """Tell files of different salts apart. Names have no dot."""
    return "" if owner.salt is None else f".{_digest(owner.salt.encode())}"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16, person=b"vmem_kv folders").hexdigest()
