"""What `vmem-kv doctor` found out about one thing."""

from __future__ import annotations

from typing import NamedTuple


class Finding(NamedTuple):
    """One line of the report."""

    topic: str
    name: str
    value: str
    is_fine: bool | None = True  # None: absent, which is no fault
    advice: str = ""  # the setting to change, and to what
