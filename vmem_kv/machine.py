"""What this machine allows: memory, mappings, limits. Reads /proc, /sys and rlimits; changes nothing.

Guarantees: every figure is read when asked; an absent file reads as "no limit" or "not offered", never as an error.
"""

from __future__ import annotations

import os
import resource
from dataclasses import asdict, dataclass
from pathlib import Path

_UNLIMITED = 1 << 62


@dataclass(frozen=True, slots=True)
class Memory:
    """What is left of this machine's memory, in bytes and counts."""

    memory_total_bytes: int
    memory_available_bytes: int
    cgroup_limit_bytes: int | None
    cgroup_used_bytes: int | None
    huge_page_bytes: int  # of hugetlbfs
    n_huge_pages_free: int

    @property
    def usable_memory_bytes(self) -> int:
        """Memory that a new pool may promise: what is available here and in the cgroup."""
        if self.cgroup_limit_bytes is None:
            return self.memory_available_bytes
        left = max(0, self.cgroup_limit_bytes - (self.cgroup_used_bytes or 0))
        return min(self.memory_available_bytes, left)


@dataclass(frozen=True, slots=True)
class Machine(Memory):
    """The limits that matter to a virtual-memory cache, in bytes and counts."""

    os_page_bytes: int
    n_cpus: int
    max_map_count: int
    n_mappings_now: int
    address_space_limit_bytes: int | None  # RLIMIT_AS
    file_size_limit_bytes: int | None  # RLIMIT_FSIZE
    overcommit_memory: int  # vm.overcommit_memory
    shmem_huge_pages: str  # the chosen word of shmem_enabled


def describe_memory(root: Path = Path("/")) -> Memory:
    """Read what memory there is, and nothing else: what every new pool asks; `root` as of `describe_machine`."""
    meminfo = _read_meminfo(root / "proc/meminfo")
    limit, used = _read_cgroup(root)
    return Memory(
        memory_total_bytes=meminfo.get("MemTotal", 0),
        memory_available_bytes=meminfo.get("MemAvailable", 0),
        cgroup_limit_bytes=limit,
        cgroup_used_bytes=used,
        huge_page_bytes=meminfo.get("Hugepagesize", 0),
        n_huge_pages_free=meminfo.get("HugePages_Free", 0),
    )


def describe_machine(root: Path = Path("/")) -> Machine:
    """Read the machine's limits; `root` lets tests lay out their own /proc and /sys."""
    return Machine(
        **asdict(describe_memory(root)),
        os_page_bytes=resource.getpagesize(),
        n_cpus=len(os.sched_getaffinity(0)),
        max_map_count=int(_read(root / "proc/sys/vm/max_map_count") or 65530),
        n_mappings_now=count_mappings(root),
        address_space_limit_bytes=_rlimit(resource.RLIMIT_AS),
        file_size_limit_bytes=_rlimit(resource.RLIMIT_FSIZE),
        overcommit_memory=int(_read(root / "proc/sys/vm/overcommit_memory") or 0),
        shmem_huge_pages=_chosen_word(_read(root / "sys/kernel/mm/transparent_hugepage/shmem_enabled")),
    )


def count_mappings(root: Path = Path("/")) -> int:
    """How many mappings this process holds now (lines of /proc/self/maps)."""
    return _read(root / "proc/self/maps").count("\n")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _read_meminfo(path: Path) -> dict[str, int]:
    fields: dict[str, int] = {}
    for line in _read(path).splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words:
            fields[name] = int(words[0]) * (1024 if words[-1] == "kB" else 1)
    return fields


def _read_cgroup(root: Path) -> tuple[int | None, int | None]:
    """Return (limit, used) of the memory cgroup with the least left above this process, version 2 or 1.

    File pages that nobody used lately are not counted as used: the kernel drops them under pressure.
    """
    tightest: tuple[int | None, int | None] = (None, None)
    least_left = _UNLIMITED
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit_name, used_name = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            limit_name, used_name = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = base / path.lstrip("/")
        for level in (folder, *folder.parents):
            if not level.is_relative_to(base):
                break
            limit = _read(level / limit_name).strip()
            if not limit.isdigit() or int(limit) >= _UNLIMITED:
                continue
            used = max(0, int(_read(level / used_name).strip() or 0) - _idle_file_bytes(level / "memory.stat"))
            if int(limit) - used < least_left:
                tightest, least_left = (int(limit), used), int(limit) - used
    return tightest


def _idle_file_bytes(path: Path) -> int:
    fields = dict(line.split(maxsplit=1) for line in _read(path).splitlines() if " " in line)
    return int(fields.get("total_inactive_file", fields.get("inactive_file", "0")))


def _rlimit(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def _chosen_word(text: str) -> str:
    """The bracketed word of a sysfs choice such as ``always [madvise] never``."""
    for word in text.split():
        if word.startswith("["):
            return word.strip("[]")
    return "not offered"
