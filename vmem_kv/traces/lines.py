"""Text files line by line, with a place to point at when something is wrong.

Guarantees: memory is bounded by `MAX_LINE_BYTES` whatever the file holds; a file that starts like gzip is unpacked on
the way; everything that can be wrong with a file raises ConfigError with the file's name, and the line where there
is one.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from vmem_kv.errors import ConfigError

MAX_LINE_BYTES = 1 << 20
"""A longer line is no row of a trace."""

_GZIP_MAGIC = b"\x1f\x8b"


class Place:
    """Where a reader is; `error` makes the exception that says so."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.line = 0

    def error(self, reason: str) -> ConfigError:
        """Return what to raise for this place."""
        where = f"{self.path}, line {self.line}" if self.line else str(self.path)
        return ConfigError(f"{where}: {reason}")


@contextmanager
def open_trace(place: Place) -> Iterator[BinaryIO]:
    """Open a file, gzipped or not, and turn what goes wrong with it into ConfigError."""
    path = place.path
    try:
        if str(path) == "-":
            raise place.error(
                "a trace is read more than once, so it cannot come through a pipe; save it to a file first"
            )
        if path.is_dir():
            raise place.error("this is a folder; name a file")
        if path.exists() and not path.is_file():
            raise place.error("this is a pipe or a device, and a trace is read more than once; save it to a file first")
        with path.open("rb") as raw:
            is_gzip = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            if not is_gzip:
                yield raw
                return
            with gzip.open(raw) as unpacked:
                yield cast(BinaryIO, unpacked)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error) or "it ends in the middle"
        raise place.error(f"cannot be read: {reason}") from error


def read_lines(file: BinaryIO, place: Place) -> Iterator[str]:
    """Yield lines without their ends, and keep `place` at the one that was yielded last.

    Raises:
        ConfigError: A line is too long, or no text.
    """
    while raw := file.readline(MAX_LINE_BYTES + 1):
        place.line += 1
        if len(raw) > MAX_LINE_BYTES:
            raise place.error(f"longer than {MAX_LINE_BYTES:,} bytes; this is no row of a trace")
        yield decode(raw, place).rstrip("\r\n")


def decode(raw: bytes, place: Place) -> str:
    """Return bytes as text.

    Raises:
        ConfigError: They are none.
    """
    if b"\0" in raw:
        raise place.error("holds zero bytes; this is no text file")
    try:
        return raw.decode("utf-8-sig" if place.line <= 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise place.error(f"is not UTF-8 text (byte {error.start}: {error.reason})") from error
