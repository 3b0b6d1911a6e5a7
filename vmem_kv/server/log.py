"""Logs as JSON, one object a line.

Guarantees: a line is one line whatever a client sends, and holds none of its texts. A line that cannot be written (the
disk is full, or whoever read it has gone) is lost, and nothing else.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from typing import Any, TextIO

from vmem_kv.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error")
LOGGER = logging.getLogger("vmem_kv.server")


class JsonFormatter(logging.Formatter):
    """Formats a record, and the fields in its `extra={"fields": ...}`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class LossyStream(io.TextIOBase):
    """A text stream around another one, to which a failure to write is no error.

    Args:
        inner: Where the text goes.
    """

    def __init__(self, inner: TextIO) -> None:
        self._inner = inner

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The inner stream's."""
        return self._inner.encoding

    def write(self, text: str) -> int:
        """Write, if that is possible."""
        with suppress(OSError):
            self._inner.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, if that is possible."""
        with suppress(OSError):
            self._inner.flush()

    def isatty(self) -> bool:
        """Whether a terminal is behind it."""
        return self._inner.isatty()

    def fileno(self) -> int:
        """The inner stream's descriptor."""
        return self._inner.fileno()


@contextmanager
def lossy_stderr() -> Iterator[None]:
    """Make standard error lossy as long as the context lasts, so that no server ends for want of a log."""
    inner = sys.stderr
    with redirect_stderr(LossyStream(inner)):
        yield
    try:
        inner.flush()
    except OSError:  # what is left in the buffer would make the interpreter's end a failure
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), inner.fileno())


def check_level(level: str) -> None:
    """Check the name of a level.

    Raises:
        ConfigError: There is none of that name.
    """
    if level not in LEVELS:
        raise ConfigError(f"--log-level is {level!r}; choose one of {', '.join(LEVELS)}")


def log_config(level: str = "INFO") -> dict[str, Any]:
    """Return the configuration of `logging`: our logs and uvicorn's, on standard error."""
    ours = {"handlers": ["stderr"], "level": level, "propagate": False}
    silent: dict[str, Any] = {"handlers": [], "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": JsonFormatter}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json", "stream": sys.stderr}},
        # uvicorn's access log has what clients wrote in it; the gate writes a line of its own.
        "root": {"handlers": ["stderr"], "level": "WARNING"},  # asyncio's, for one, and that of libraries
        "loggers": {"vmem_kv": ours, "uvicorn": ours, "uvicorn.access": silent},
    }


def note(message: str, level: int = logging.INFO, **fields: object) -> None:
    """Write a line with fields."""
    LOGGER.log(level, message, extra={"fields": fields})
