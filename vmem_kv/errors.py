"""Every error that vmem_kv raises.

    VmemError
    ├── ConfigError            wrong before anything started: fix the value that the message names
    ├── CapacityError          transient: nothing changed, give something back and try again
    │   ├── OutOfPages         the page budget is spent
    │   ├── OutOfSlots         every slot belongs to a sequence
    │   ├── OutOfAddressSpace  a sequence is longer than its slot, or no range of that size is left
    │   ├── OutOfMappings      the system's limit on mappings would be passed
    │   ├── OutOfHostMemory    the budget of host memory for parked sequences is spent
    │   └── OutOfDiskSpace     the budget on disk, or the disk itself, is spent
    ├── DriverError            a driver call failed; carries operation, code, name and how far it came
    ├── UsageError             the caller broke a contract; nothing changed
    │   ├── UnknownSession     nobody of this domain has a session of that name, or it expired
    │   └── SessionInUse       the session belongs to a request that still runs
    ├── FileError              a file could not be read or written; the cause is chained, nothing changed
    │   └── FileRefused        its contents are truncated, altered, foreign or from a newer version; nothing changed
    ├── RequestError           one request was refused or ended; the engine and all other requests go on
    │   ├── InvalidRequest     its values make no sense here; carries the parameter's name
    │   │   └── RequestTooLong it can never fit: in the model's length, or in the memory budget
    │   ├── QueueFull          too many requests wait; try again later
    │   ├── ShuttingDown       no new requests are taken on
    │   ├── ReaderTooSlow      its output was not read, and was not waited for
    │   └── RequestFailed      computing it failed
    ├── EngineDead             the serving engine ended, and why; it answers nobody any more
    └── InvariantError         our bug: the books do not add up; carries a dump of the state

After any of them except InvariantError all sequences are as they were before the call. Warm slots may have gone cold to
make room, and pages that could not be given back are quarantined; each call's "Raises" says so.
"""

from __future__ import annotations


class VmemError(Exception):
    """Base of every error that this package raises on purpose.

    Attributes:
        n_done: For a batched driver call, how many items took effect before the failure.
    """

    n_done: int = 0


class ConfigError(VmemError, ValueError):
    """A configuration cannot work here. Raised before anything was allocated."""


class CapacityError(VmemError):
    """Something finite has run out. No sequence changed: reclaim, retire or wait, and try again."""


class OutOfPages(CapacityError):
    """The budget of physical pages does not cover what was asked for."""


class OutOfSlots(CapacityError):
    """No slot (or no run of neighbouring slots) is free."""


class OutOfAddressSpace(CapacityError):
    """A sequence would outgrow its slot, or no virtual range of that size can be reserved."""


class OutOfMappings(CapacityError):
    """The limit on live mappings (``vm.max_map_count`` on the host) would be passed."""


class OutOfHostMemory(CapacityError):
    """The budget of host memory for parked sequences does not cover what was asked for."""


class OutOfDiskSpace(CapacityError):
    """The budget on disk does not cover what was asked for, or the file system is full."""


class DriverError(VmemError):
    """A driver call failed.

    Attributes:
        operation: The contract's name of the call, e.g. ``"map"``.
        code: The driver's own error number (errno on the host).
        name: The symbolic name of ``code``, e.g. ``"ENOSPC"``.
        n_done: How many of the items given to the call took effect before the failure.
        is_fatal: Whether the device is lost: no further call can succeed, and closing forgets instead of freeing.
    """

    is_fatal: bool = False

    def __init__(self, operation: str, code: int, name: str, n_done: int = 0, detail: str = "") -> None:
        super().__init__(operation, code, name, n_done, detail)
        self.operation = operation
        self.code = code
        self.name = name
        self.n_done = n_done
        self.detail = detail

    def __str__(self) -> str:
        text = f"{self.operation} failed with {self.name} ({self.code})"
        return f"{text}: {self.detail}" if self.detail else text


class UsageError(VmemError):
    """The caller broke a contract. Nothing changed."""


class UnknownSession(UsageError):
    """No session of that name is kept for this domain: it never was, it expired, or it was forgotten."""


class SessionInUse(UsageError):
    """The session was resumed and not retained since: it belongs to a request that still runs."""


class FileError(VmemError):
    """A file could not be opened, read or written. The cause is chained."""


class FileRefused(FileError):
    """A file's contents cannot be used here: truncated, altered, foreign, oversized, or from a newer version."""


class RequestError(VmemError):
    """One request was refused or ended early. The engine and all other requests go on."""


class InvalidRequest(RequestError, ValueError):
    """A request's values make no sense here. Raised before anything was allocated for it.

    Attributes:
        param: The name of the value that is wrong, as `SamplingParams` and `Request` call it.
    """

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class RequestTooLong(InvalidRequest):
    """A request can never fit: it is longer than the model takes, or than the whole memory budget holds."""


class QueueFull(RequestError):
    """Too many requests wait already. Nothing was queued: try again later."""


class ShuttingDown(RequestError):
    """The engine finishes what it has and takes on nothing new."""


class ReaderTooSlow(RequestError):
    """A request's output piled up unread, so the request was ended. Its memory is free."""


class RequestFailed(RequestError):
    """Computing this request failed. Its cause is chained."""


class EngineDead(VmemError):
    """The serving engine ended: a broken driver, or a bug. It answers nobody any more; the cause is chained."""


class InvariantError(VmemError):
    """The books contradict each other: a bug in vmem_kv. The message ends with a dump of the state."""
