"""The operator's folder for saved sessions: which file a client means by a name.

    FOLDER / everybody, or a digest of the client's API key / NAME.session, or NAME.(a digest of its salt).session

Guarantees: a client names a file by letters, digits, `-` and `_` alone, at most 64 of them, and reaches files of its
own key and salt only; it chooses no other part of a path. Nothing counts as a file but plain files: no link is
followed, and no folder taken for one. Whose a folder is depends on the key itself, not on its place
among the keys. Each client has a bounded number of files, whatever its salts. Folders are the operator's only (0700).
What a process that was killed had begun to save is removed when a later one opens the folder, `STALE_S` afterwards.
Assumptions: one event loop calls. Nobody else writes there but other servers of the same operator, whose files count,
and who save something of a file at least each `STALE_S`.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import stat
import time
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
_DIGEST = "[0-9a-f]{32}"
_CLIENT = re.compile(rf"{_EVERYBODY}|{_DIGEST}")
_PART = re.compile(rf"\.{_NAME.pattern}(\.{_DIGEST})?\{_SUFFIX}\.[a-z0-9_]+\.part")
"""What `tiers.files.save` writes before it gives it its name."""

STALE_S = 3_600.0
"""So old is what nobody writes any more, though its name says that somebody does."""


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
        path: An existing folder. What saves that were killed have left in it is removed.
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
        self._remove_parts(time.time() - STALE_S)

    def file(self, owner: Owner, name: str) -> Path:
        """Return where a client's saved session of this name lies, whether it is there or not.

        Raises:
            UsageError: It is no name: nothing of it may become part of a path.
        """
        if not is_saved_name(name):
            raise UsageError("the name of a saved session is 1 to 64 letters, digits, - or _")
        return self._folder(owner) / f"{name}{_mark(owner)}{_SUFFIX}"

    def existing(self, owner: Owner, name: str) -> Path:
        """Return where a client's saved session of this name lies.

        Raises:
            UsageError: As `file`.
            FileNotFoundError: There is none, or something that is no plain file.
            OSError: Its folder cannot be read.
        """
        file = self.file(owner, name)
        if not stat.S_ISREG(os.lstat(file).st_mode):
            raise FileNotFoundError(errno.ENOENT, "not a plain file", str(file))
        return file

    @contextmanager
    def saving(self, owner: Owner, name: str) -> Iterator[Path]:
        """Where to save a session, as long as the context lasts. A file of that name may be replaced.

        Raises:
            ApiError: 409: the client has as many as it may have.
            OSError: Its folder cannot be made or read.
        """
        file = self.file(owner, name)
        file.parent.mkdir(mode=0o700, exist_ok=True)
        there = {Path(entry.path) for entry in _plain_files(file.parent) if entry.name.endswith(_SUFFIX)}
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
        """Return a client's saved sessions, by name.

        Raises:
            OSError: Its folder cannot be read.
        """
        end = f"{_mark(owner)}{_SUFFIX}"
        try:
            entries = _plain_files(self._folder(owner))
        except FileNotFoundError:
            return []
        found: list[SavedSession] = []
        for entry in entries:
            name = entry.name.removesuffix(end)
            if entry.name.endswith(end) and is_saved_name(name):
                with suppress(FileNotFoundError):  # another server has deleted it just now
                    status = entry.stat(follow_symlinks=False)
                    found.append(SavedSession(name, status.st_size, int(status.st_mtime)))
        return sorted(found)

    def _remove_parts(self, before_s: float) -> None:
        """Remove what was being saved, and was last written before that time. What cannot be removed stays."""
        for folder in self._path.iterdir():
            if _CLIENT.fullmatch(folder.name) and not folder.is_symlink():
                with suppress(OSError):
                    for part in _plain_files(folder):
                        if _PART.fullmatch(part.name) and part.stat(follow_symlinks=False).st_mtime < before_s:
                            os.unlink(part.path)

    def _folder(self, owner: Owner) -> Path:
        return self._path / (_digest(owner.key) if owner.key else _EVERYBODY)


def _plain_files(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, links and folders left out."""
    with os.scandir(folder) as entries:
        return [entry for entry in entries if entry.is_file(follow_symlinks=False)]


def _mark(owner: Owner) -> str:
    """Tell files of different salts apart. Names have no dot."""
    return "" if owner.salt is None else f".{_digest(owner.salt.encode())}"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16, person=b"vmem_kv folders").hexdigest()
