"""What the server lets one client, and all of them together, take. Every number is an upper bound."""

from __future__ import annotations

from dataclasses import dataclass, fields

from vmem_kv.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on requests and on time.

    Attributes:
        max_body_bytes: Of a request's body; more is 413.
        max_header_bytes: Of a request's head, request line included; more is 431 or 400.
        max_headers: Header lines; more is 431.
        max_connections: Open connections; more get 503. Fewer where the process may not open so many files.
        head_timeout_s: For a request's head to arrive.
        body_timeout_s: For a request's body to arrive.
        send_timeout_s: How long a client may leave the send buffer without emptying it before it is cut off.
        request_timeout_s: For the whole answer.
        ping_s: An idle event stream gets a comment so often, for the proxies between.
        silent_s: The engine is not ready once it has shown no life for so long: the longest step to be expected.
        grace_s: For unfinished answers, once the server was told to end.
    """

    max_body_bytes: int = 1 << 20
    max_header_bytes: int = 16 << 10
    max_headers: int = 64
    max_connections: int = 1_000
    head_timeout_s: float = 10.0
    body_timeout_s: float = 10.0
    send_timeout_s: float = 30.0
    request_timeout_s: float = 600.0
    ping_s: float = 15.0
    silent_s: float = 10.0
    grace_s: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ConfigError(f"{field.name} is {value}; it must be above 0")
