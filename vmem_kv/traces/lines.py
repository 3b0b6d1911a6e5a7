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

_NO_TRACES = (
    (b"PK\x03\x04", "a zip archive or a spreadsheet; unpack it, or save it as CSV"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd; unpack it, or pack it with gzip"),
    (b"BZh", "packed with bzip2; unpack it, or pack it with gzip"),
    (b"\xfd7zXZ", "packed with xz; unpack it, or pack it with gzip"),
    (b"PAR1", "a Parquet table; save it as CSV"),
    (b"\xff\xfe", "UTF-16 text; save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text; save it as UTF-8"),
)
"""How files begin that people take for traces, and what to do about it."""


class Place:
    """Where a reader is; `error` makes the exception that says so."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.line = 0
        self.n_left_out = 0  # rows that were understood and are no requests

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
            raise place.error("this is a folder; name a file in it")
        if path.exists() and not path.is_file():
            raise place.error("this is a pipe or a device, and a trace is read more than once; save it to a file first")
        with path.open("rb") as raw:
            start = raw.read(8)
            raw.seek(0)
            for magic, what in _NO_TRACES:
                if start.startswith(magic):
                    raise place.error(f"this is {what}")
            if not start.startswith(_GZIP_MAGIC):
                yield raw
                return
            with gzip.open(raw) as unpacked:
                yield cast(BinaryIO, unpacked)
    except FileNotFoundError as error:
        raise place.error(
            "there is no such file; name a request trace: a CSV file with the columns prompt_tokens and output_tokens "
            "will do"
        ) from error
    except PermissionError as error:
        raise place.error("may not be read by you; allow it (chmod u+r), or name a copy of it") from error
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
        raise place.error("holds zero bytes; this is no text file, and a trace is one")
    try:
        return raw.decode("utf-8-sig" if place.line <= 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise place.error(f"is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8") from error
