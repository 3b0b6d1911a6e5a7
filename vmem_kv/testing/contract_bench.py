"""What every rule of the driver contract is tried on: a driver of its own, its memory, and short ways to use them.

Guarantees: counts what it checks; a rule that does not hold raises `ContractBreach`. Assumptions: one rule per bench.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from vmem_kv.driver.base import Driver, Handle, Reservation, Span
from vmem_kv.errors import VmemError
from vmem_kv.testing.memory import Memory

MANY = 300
"""Items of a large batch."""
MEMORY_SHARE = 16
"""A large batch takes at most one part in so many of the memory that could be handed out."""
FEW = 16
"""Items of a large batch at least."""


class ContractBreach(AssertionError):
    """A driver does not do what the contract says."""


@runtime_checkable
class CountsMemory(Protocol):
    """A driver that counts its own memory. No part of the contract: who offers it gets a sharper verdict."""

    def physical_bytes(self) -> int:
        """Memory behind this driver's live pages now, by the count of whoever is below it. Others' is not in it."""


@dataclass(slots=True)
class Bench:
    """A driver under test with what every rule needs."""

    driver: Driver
    memory: Memory
    open_driver: Callable[[], Driver]
    """Opens another one, for rules about opening and closing."""
    n_checks: int = 0
    n_batch_items: int = MANY
    """Items of the large batches so far."""
    unseen: list[str] = field(default_factory=list)
    """What could not be looked at."""
    reservations: list[Reservation] = field(default_factory=list)

    @property
    def page(self) -> int:
        """The smallest page, in bytes."""
        return self.driver.info.granularity_bytes

    def require(self, condition: bool, what: str) -> None:
        """Count a check. Raises ContractBreach if it does not hold."""
        self.n_checks += 1
        if not condition:
            raise ContractBreach(what)

    def refuses(self, call: Callable[[], object], kinds: type[VmemError], what: str) -> VmemError:
        """Require that a call raises the given error; return it. Raises ContractBreach if it does not."""
        self.n_checks += 1
        try:
            call()
        except kinds as error:
            return error
        raise ContractBreach(what)

    def cannot_see(self, what: str) -> None:
        """Note what this driver, device or machine leaves nobody to look at. It is no breach."""
        self.unseen.append(what)

    def available(self) -> int:
        """Return what the driver says could be handed out now. Raises ContractBreach if that is no number of bytes."""
        n_bytes = self.driver.available_bytes()
        self.require(type(n_bytes) is int and n_bytes >= 0, f"available_bytes() is {n_bytes!r}, no number of bytes")
        return n_bytes

    def many(self) -> int:
        """Say how many of the smallest pages a large batch has: `MANY`, or fewer where memory is scarce."""
        n_affordable = self.available() // MEMORY_SHARE // self.page
        self.n_batch_items = max(FEW, min(MANY, n_affordable))
        return self.n_batch_items

    def reserve(self, n_pages: int) -> Reservation:
        """Reserve addresses for so many pages."""
        reservation = self.driver.reserve(n_pages * self.page)
        self.reservations.append(reservation)
        return reservation

    def free(self, reservation: Reservation) -> None:
        """Free a reservation."""
        self.driver.free_reservation(reservation)
        self.reservations.remove(reservation)

    def create(self, places: Sequence[int], page_bytes: int | None = None) -> list[Handle]:
        """Create pages, of the smallest size unless another is given."""
        handles: list[Handle] = []
        self.driver.create(page_bytes or self.page, places, handles)
        return handles

    def map(self, addresses: Sequence[int], handles: Sequence[Handle]) -> None:
        """Map pages of the smallest size, and make them accessible."""
        self.driver.map(self.page, addresses, handles)
        self.driver.set_access([(address, self.page) for address in addresses])

    def blank(self, spans: Sequence[Span]) -> None:
        """Zero new pages, if the driver does not."""
        if not self.driver.info.zeroes_new_pages:
            self.driver.scrub(spans)

    def unmap(self, addresses: Sequence[int]) -> None:
        """Unmap pages of the smallest size, one span each."""
        self.driver.unmap([(address, self.page) for address in addresses])

    def require_unmapped(self, address: int, what: str) -> None:
        """Require that nothing can be touched at an address, where somebody can say so."""
        self.require(self.memory.is_mapped(address) is not True, f"memory can be touched at {address:#x}, {what}")

    def require_mapped(self, address: int, what: str) -> None:
        """Require that memory can be touched at an address, where somebody can say so."""
        self.require(self.memory.is_mapped(address) is not False, f"no memory is at {address:#x}, {what}")

    def tag(self, address: int, text: str) -> None:
        """Write a text at the first and the last bytes of a page."""
        self.memory.write(address, text.encode())
        self.memory.write(address + self.page - len(text), text.encode())

    def has_tag(self, address: int, text: str) -> bool:
        """Whether `tag` wrote this text there, and nothing has changed it."""
        data = self.memory.read(address, self.page)
        return data.startswith(text.encode()) and data.endswith(text.encode())

    def mark(self, address: int, number: int) -> None:
        """Write a number at both ends of a page: a tag for pages of which there are many."""
        for at in (address, address + self.page - 8):
            self.memory.write(at, number.to_bytes(8, "little"))

    def marks(self, address: int) -> tuple[int, int]:
        """Return the numbers at both ends of a page."""
        first, last = self.memory.read(address, 8), self.memory.read(address + self.page - 8, 8)
        return int.from_bytes(first, "little"), int.from_bytes(last, "little")

    def is_zero(self, address: int, n_bytes: int | None = None) -> bool:
        """Whether a page, or so many bytes, hold nothing but zeros."""
        return not any(self.memory.read(address, n_bytes or self.page))


Rule = Callable[[Bench], None]
"""Tries one rule of the contract, which its docstring says."""
