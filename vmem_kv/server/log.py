"""Logs as JSON, one object a line.

Guarantees: a line is one line whatever a client sends, and holds none of its texts.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

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
        "loggers": {"vmem_kv": ours, "uvicorn": ours, "uvicorn.access": silent},
    }


def note(message: str, level: int = logging.INFO, **fields: object) -> None:
    """Write a line with fields."""
    LOGGER.log(level, message, extra={"fields": fields})
