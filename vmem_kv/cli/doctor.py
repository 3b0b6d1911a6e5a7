"""`vmem-kv doctor`: what this machine offers, what will be used, and what to change."""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import vmem_kv
from vmem_kv.cli.doctor_cuda import cuda_findings, kernel_findings
from vmem_kv.cli.finding import Finding
from vmem_kv.driver.base import DriverInfo
from vmem_kv.driver.host import HostDriver
from vmem_kv.driver.host_mapper import NativeMapper
from vmem_kv.errors import VmemError
from vmem_kv.layout import LayerSpec, choose_layout
from vmem_kv.machine import Machine, describe_machine
from vmem_kv.units import GIB, format_bytes

_FEW_MAPPINGS = 16_384
"""With fewer than this, `auto` has to leave the layouts that a CPU reads fastest for modest batches."""

_MARKS = {True: Text("ok", "green"), False: Text("!!", "bold yellow"), None: Text("--", "dim")}
_LITTLE_MEMORY = 1 * GIB
_MEMFD_BYTES = 1 << 48
"""The host driver's file is sparse and this large, whatever is in it."""


class Drivers(NamedTuple):
    """The host driver: what it says of itself, or why it cannot be used."""

    info: DriverInfo | None
    error: str
    native_error: str  # why the native part cannot be used; empty where it can


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Say what this machine offers, what will be used, and which setting changes it.

    Changes nothing. Exits with 1 where no driver can be used.
    """
    machine, drivers = describe_machine(), _open_drivers()
    findings = [*_driver_findings(drivers), *_memory_findings(machine), *_limit_findings(machine, drivers)]
    findings += [*_huge_page_findings(machine), *cuda_findings(), *kernel_findings(), *_software_findings()]
    out = Console()
    if as_json:
        out.print_json(data=_as_data(machine, drivers, findings))
    else:
        _print_findings(out, findings)
    if drivers.info is None:
        raise typer.Exit(1)


def _open_drivers() -> Drivers:
    try:
        NativeMapper()
        native_error = ""
    except OSError as error:
        native_error = str(error)
    try:
        driver = HostDriver()
    except VmemError as error:
        return Drivers(None, str(error), native_error)
    info = driver.info
    driver.close()
    return Drivers(info, "", native_error)


def _driver_findings(drivers: Drivers) -> list[Finding]:
    topic, info = "Driver", drivers.info
    if info is None:
        return [Finding(topic, "host", "cannot be used", False, drivers.error)]
    if drivers.native_error:
        native = Finding(
            topic,
            "native part",
            f"not in use, Python makes the calls: {drivers.native_error}",
            False,
            "install a C compiler, then install vmem_kv again",
        )
    else:
        native = Finding(topic, "native part", "in use: one call maps a whole batch of pages")
    example = choose_layout(info, [LayerSpec.uniform(3, 64, 4)] * 30, n_slots=1, expected_tokens=4096)
    return [
        Finding(topic, info.name, f"memfd and mmap, device {info.device}"),
        native,
        Finding(topic, "granularity", format_bytes(info.granularity_bytes)),
        Finding(
            topic,
            "page size",
            f"{format_bytes(example.page_bytes)} with layout {example.kind}, for SmolLM2-135M in float32",
            advice="--page-bytes and --layout; chosen for each model",
        ),
    ]


def _memory_findings(machine: Machine) -> list[Finding]:
    topic = "Memory"
    limit = machine.cgroup_limit_bytes
    cgroup = "no limit"
    if limit is not None:
        cgroup = f"{format_bytes(machine.cgroup_used_bytes or 0)} of {format_bytes(limit)} in use"
    usable = machine.usable_memory_bytes
    return [
        Finding(
            topic,
            "machine",
            f"{format_bytes(machine.memory_available_bytes)} available of {format_bytes(machine.memory_total_bytes)}",
        ),
        Finding(topic, "cgroup", cgroup, advice="" if limit is None else "memory.max (docker run --memory)"),
        Finding(
            topic,
            "usable now",
            format_bytes(usable),
            usable >= _LITTLE_MEMORY,
            "--max-memory is the budget of a cache; without it, 90 % of this",
        ),
    ]


def _limit_findings(machine: Machine, drivers: Drivers) -> list[Finding]:
    topic = "Limits"
    budget = drivers.info.max_mappings if drivers.info else 0
    address_space, file_size = machine.address_space_limit_bytes, machine.file_size_limit_bytes
    strict = machine.overcommit_memory == 2
    return [
        Finding(
            topic,
            "mappings",
            f"{budget:,} for caches, of {machine.max_map_count:,}; {machine.n_mappings_now:,} in use",
            budget >= _FEW_MAPPINGS,
            "sysctl -w vm.max_map_count=1048576",
        ),
        Finding(
            topic,
            "address space",
            _limit_text(address_space),
            address_space is None,
            "" if address_space is None else "ulimit -v unlimited: a reservation costs addresses only",
        ),
        Finding(
            topic,
            "file size",
            _limit_text(file_size),
            file_size is None or file_size >= _MEMFD_BYTES,
            "" if file_size is None else "ulimit -f unlimited: pages live in a sparse memory file",
        ),
        Finding(
            topic,
            "overcommit",
            f"vm.overcommit_memory = {machine.overcommit_memory}",
            not strict,
            "sysctl -w vm.overcommit_memory=0: with 2, large reservations may be refused" if strict else "",
        ),
        Finding(topic, "CPUs", f"{machine.n_cpus}", advice="taskset; --threads says how many torch uses"),
    ]


def _limit_text(n_bytes: int | None) -> str:
    return "no limit" if n_bytes is None else format_bytes(n_bytes)


def _huge_page_findings(machine: Machine) -> list[Finding]:
    topic = "Huge pages"
    n_free, huge = machine.n_huge_pages_free, machine.huge_page_bytes
    oversized = machine.shmem_huge_pages in ("always", "force")
    return [
        Finding(
            topic,
            "transparent",
            f"shmem_enabled: {machine.shmem_huge_pages}",
            not oversized,
            "echo never > /sys/kernel/mm/transparent_hugepage/shmem_enabled: "
            "the system may back a small page with a huge one"
            if oversized
            else "",
        ),
        Finding(
            topic,
            "hugetlbfs",
            f"{n_free:,} free pages of {format_bytes(huge)}" if huge else "not offered",
            advice="sysctl -w vm.nr_hugepages=N, then CacheConfig(huge_pages=True)" if huge else "",
        ),
    ]


def _software_findings() -> list[Finding]:
    topic = "Software"
    findings = [
        Finding(topic, "vmem_kv", vmem_kv.__version__),
        Finding(topic, "Python", platform.python_version()),
        Finding(topic, "Linux", platform.release()),
    ]
    for package, extra in (("torch", ""), ("transformers", "[hf]"), ("accelerate", "[hf]"), ("gguf", "[hf]")):
        found = _version_of(package)
        advice = "" if found else f"pip install 'vmem_kv{extra}'"
        findings.append(Finding(topic, package, found or "not installed", found is not None, advice))
    names = ", ".join(_attention_names())
    return [*findings, Finding(topic, "attention", names or "none", bool(names), "--attention")]


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _attention_names() -> tuple[str, ...]:
    """Name the attention functions that run here."""
    if _version_of("torch") is None or _version_of("transformers") is None:
        return ()
    return ("vmem_kv (grouped-query heads packed)", "sdpa", "eager")


def _print_findings(console: Console, findings: list[Finding]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    topic = None
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            table.add_row("", Text(topic, "bold"))
        mark = _MARKS[finding.is_fine]
        table.add_row(mark, finding.name, Text(finding.value))
        if finding.advice:
            table.add_row("", "", Text(f"change: {finding.advice}", "dim"))
    console.print(table)


def _as_data(machine: Machine, drivers: Drivers, findings: list[Finding]) -> dict[str, Any]:
    return {
        "vmem_kv": vmem_kv.__version__,
        "python": sys.version.split()[0],
        "machine": {**asdict(machine), "usable_memory_bytes": machine.usable_memory_bytes},
        "drivers": {
            "host": {
                "usable": drivers.info is not None,
                "error": drivers.error or None,
                "native_error": drivers.native_error or None,
                "info": asdict(drivers.info) if drivers.info else None,
            }
        },
        "packages": {name: _version_of(name) for name in ("torch", "transformers", "accelerate", "gguf")},
        "attention": list(_attention_names()),
        "findings": [finding._asdict() for finding in findings],
    }
