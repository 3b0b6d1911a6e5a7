"""What is on its way between the tiers while the engine's thread goes on, and which pages come free then.

Who moves something owns it, and looks in every step whether it has passed (`SlotSource.settle`, `begin`):

    Sessions        sessions on their way down, and from disk to host memory      (tiers/sessions.py)
    ParkingSlots    sequences that lost their slot, on their way to host memory   (parking.py)
    Arrivals        rows on their way from host memory into a slot                (arrivals.py)

Here is only what the scheduler has to know: whether anything is on its way, how many pages will be free when it has
passed, and how to wait for it where nothing can be computed meanwhile.

Guarantees: bookkeeping only; no driver call but to ask what is on its way.
Assumptions: one thread.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import Driver
from vmem_kv.engine.prefix_pages import CachedPages
from vmem_kv.errors import UsageError
from vmem_kv.growth import SlotId
from vmem_kv.tiers.host import Parking, Restoring
from vmem_kv.tiers.moving import InlineMover, Mover, MoverThread, Passing, is_over

_LOG = logging.getLogger("vmem_kv")


class Moves:
    """See this file's first lines.

    Args:
        cache: Whose slots are moved.
    """

    def __init__(self, cache: KVCache) -> None:
        self._under_way: dict[Passing, None] = {}  # the oldest first
        self._has_news = False  # something has passed since somebody last wanted to wait
        self._pages = CachedPages(cache)

    def __len__(self) -> int:
        return len(self._under_way)

    @property
    def leaving(self) -> set[SlotId]:
        """Slots that are retired, or only cached, once what reads or writes them has passed. Their owners keep it."""
        return self._pages.slot_ids

    def note(self, what: Passing) -> None:
        """Note that something is on its way. It is forgotten when it has passed."""
        self._under_way.setdefault(what)

    def poll(self) -> None:
        """Forget what has passed."""
        for what in [what for what in self._under_way if is_over(what)]:
            del self._under_way[what]
            self._has_news = True

    def n_coming_pages(self) -> int:
        """Pages under slots that leave, and nowhere else."""
        return self._pages.held() if self.leaving else 0

    def wait(self, timeout_s: float) -> bool:
        """Wait for the oldest copy on its way, at most so long; for the oldest file, where there is no copy.

        Not where something has passed since this was last called: its owner may not have looked since. Whoever owns it
        learns what it failed with, if it did.

        Returns:
            Whether there was anything to wait for, so that it is worth to look again.
        """
        self.poll()
        if self._has_news:
            self._has_news = False
            return True
        if not self._under_way:
            return False
        copies = [what for what in self._under_way if isinstance(what, (Parking, Restoring))]
        next(iter(copies or self._under_way)).passes_within(timeout_s)
        return True


class Carriers:
    """Who makes the copies, and who reads and writes files: for an engine, from its beginning to its end.

    Args:
        copies: Between the device and host memory.
        files: Beside them, so that no copy waits for a disk.
    """

    def __init__(self, copies: Mover, files: Mover) -> None:
        self.copies = copies
        self.files = files

    def close(self) -> None:
        """Let them finish what they have begun, and end them. Idempotent."""
        with ExitStack() as stack:
            for mover in (self.copies, self.files):
                stack.callback(_stop, mover)


def threads(driver: Driver) -> Carriers:
    """Carry on two threads. Where the system has no thread left, the engine's carries."""
    return Carriers(_begun(MoverThread(driver)), _begun(MoverThread(driver)))


def inline(driver: Driver) -> Carriers:
    """Carry on the engine's thread, and its stream: on a device without streams everything has passed at once."""
    return Carriers(InlineMover(), InlineMover())


def _begun(mover: MoverThread) -> MoverThread:
    try:
        mover.begin()
    except RuntimeError as error:
        _LOG.warning("no thread for copies, the engine's own makes them: %s", error)
    return mover


def _stop(mover: Mover) -> None:
    try:
        mover.stop()
    except UsageError as error:  # a device that does not answer; the thread ends with the process
        _LOG.warning("closing: %s", error)
