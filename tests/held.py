"""What this process holds that a leak would add to: open files and threads.

Compared by what was added, never by counts: what an earlier test left behind may be closed by the garbage collector at
any moment, and is no finding of this test.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from contextlib import suppress
from typing import NamedTuple


class Held(NamedTuple):
    """What was held at one moment."""

    files: Counter[str]
    threads: frozenset[threading.Thread]

    @classmethod
    def now(cls) -> Held:
        """Look now."""
        return cls(open_files(), frozenset(threading.enumerate()))

    def beyond(self, before: Held) -> list[str | threading.Thread]:
        """What is held beyond what was held before."""
        return [*(self.files - before.files).elements(), *(self.threads - before.threads)]


def open_files() -> Counter[str]:
    """How often each file is open. Memory files of one name are one here; pipes and sockets each have their own."""
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing itself, closed by now
            found[os.readlink(f"/proc/self/fd/{name}")] += 1
    return found
