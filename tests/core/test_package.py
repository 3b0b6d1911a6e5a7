"""What imports what, what is exported, and that everything public says what it does."""

from __future__ import annotations

import ast
import inspect
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import vmem_kv
import vmem_kv.testing
from vmem_kv import errors

from .subprocesses import output_of

ROOT = Path(vmem_kv.__file__).parent

CORE = [
    # From the bottom up: a module may import what stands above it in this list, never what stands below.
    "vmem_kv.errors",
    "vmem_kv.units",
    "vmem_kv.machine",
    "vmem_kv.driver.ledger",
    "vmem_kv.driver.base",
    "vmem_kv.driver.adaptor",
    "vmem_kv.driver.host_mapper",
    "vmem_kv.driver.host",
    "vmem_kv.driver.checked",
    "vmem_kv.driver.accounting",
    "vmem_kv.driver.cuda_errors",
    "vmem_kv.driver.cuda_calls",
    "vmem_kv.layout",
    "vmem_kv.growth",
    "vmem_kv.pages",
    "vmem_kv.shares",
    "vmem_kv.sharing",
    "vmem_kv.page_table",
    "vmem_kv.unmapping",
    "vmem_kv.mapping",
    "vmem_kv.rewiring",
    "vmem_kv.region",
    "vmem_kv.slots",
    "vmem_kv.steps",
    "vmem_kv.stats",
    "vmem_kv.claims",
    "vmem_kv.pending",
    "vmem_kv.room",
    "vmem_kv.exchange",
    "vmem_kv.audit",
    "vmem_kv.cache",
    "vmem_kv.premap",
    "vmem_kv.prefix.tree",
    "vmem_kv.prefix.entry",
    "vmem_kv.prefix.value",
    "vmem_kv.prefix.policy",
    "vmem_kv.prefix.index",
]
HEAVY = ("torch", "cuda", "transformers", "numpy")


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package, with its file."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports_of(path: Path, *, everywhere: bool) -> set[str]:
    """Modules that a file imports: at its top (not for type checkers only), or in any function too."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not everywhere:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            found.add(node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_downwards_and_nothing_heavy(name: str) -> None:
    path = ROOT.parent / (name.replace(".", "/") + ".py")
    for imported in imports_of(path, everywhere=True):
        if imported.split(".")[0] == "vmem_kv":
            assert imported in CORE[: CORE.index(name)], f"{name} imports {imported}"
        assert imported.split(".")[0] not in HEAVY, f"{name} imports {imported}"


def test_an_import_is_seen_wherever_it_hides(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nimport os.path as p\nif TYPE_CHECKING:\n    import torch\n"
        "def f():\n    if p:\n        from cuda import core\n"
    )
    assert imports_of(file, everywhere=True) == {"typing", "os.path", "cuda"}
    assert imports_of(file, everywhere=False) == {"typing", "os.path"}


def test_only_what_stands_above_the_core_imports_transformers() -> None:
    for name, path in modules():
        if any(i.split(".")[0] == "transformers" for i in imports_of(path, everywhere=True)):
            allowed = ("vmem_kv.integrations", "vmem_kv.models", "vmem_kv.engine", "vmem_kv.server", "vmem_kv.cli")
            assert name.startswith(allowed), name


def test_only_one_file_of_the_cuda_driver_imports_cuda() -> None:
    importers = {
        n for n, path in modules() if any(i.split(".")[0] == "cuda" for i in imports_of(path, everywhere=True))
    }
    assert importers == {"vmem_kv.driver.cuda_device"}
    assert not any(i.split(".")[0] == "cuda" for i in imports_of(ROOT / "driver" / "cuda_device.py", everywhere=False))


def test_testing_is_imported_by_nothing_and_needs_no_test_framework() -> None:
    for name, path in modules():
        imported = imports_of(path, everywhere=True)
        if name.startswith("vmem_kv.testing"):
            assert not any(i.split(".")[0] in ("pytest", "hypothesis", "transformers") for i in imported), name
        elif name != "vmem_kv.cli.stress":  # the command that runs the proof
            assert not any(i.startswith("vmem_kv.testing") for i in imported), name


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = """
        import sys, vmem_kv, vmem_kv.testing
        dir(vmem_kv), vmem_kv.__all__
        print(sorted({m.split(".")[0] for m in sys.modules} & {"torch", "cuda", "transformers", "numpy"}))
        """
    assert output_of(code) == "[]"


def test_using_the_core_loads_nothing_heavy() -> None:
    code = """
        import sys
        from vmem_kv import HostDriver, KVCache, LayerSpec, Layout, PagePool
        import vmem_kv.premap, vmem_kv.testing
        driver = HostDriver()
        layout = Layout.build("per_layer", [LayerSpec.uniform(2, 8, 2)], n_slots=2, max_tokens=8, page_bytes=1 << 16)
        cache = KVCache(PagePool(driver, 1 << 16, 8), layout)
        slot = cache.acquire()
        cache.ensure({slot: 5})
        cache.retire(slot)
        cache.close()
        driver.close()
        print(sorted({m.split(".")[0] for m in sys.modules} & {"torch", "cuda", "transformers", "numpy"}))
        """
    assert output_of(code) == "[]"


def test_the_prefix_index_knows_no_memory() -> None:
    prefix = [name for name, _ in modules() if name.startswith("vmem_kv.prefix")]
    assert len(prefix) == 6
    for name, path in modules():
        if name in prefix:
            inside = {i for i in imports_of(path, everywhere=True) if i.startswith("vmem_kv")}
            assert inside <= {*prefix, "vmem_kv.errors"}, name


def test_the_core_is_right_without_assertions_too() -> None:
    for name, path in modules():
        if name in CORE:
            asserts = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
            assert not asserts, f"{name} asserts in lines {asserts}: python -O would leave that out"


def test_exported_names() -> None:
    assert {"__version__", "HostDriver", "KVCache", "LayerSpec", "Layout", "PagePool", "VmemCache"} <= set(
        vmem_kv.__all__
    )
    assert dir(vmem_kv) == sorted(vmem_kv.__all__)
    for name in ("HostDriver", "KVCache", "LayerSpec", "Layout", "PagePool"):
        assert getattr(vmem_kv, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        vmem_kv.no_such_name  # noqa: B018
    assert sorted(vmem_kv.testing.__all__) == [
        *("Adaptor", "Call", "Clock", "ContractBreach", "DriverMemory", "FaultyDriver", "HostMemory"),
        *("LimitingDriver", "LoggingDriver", "ManualClock", "ManualFence", "Memory", "ModelMismatch"),
        *("Plan", "Point", "PoisonDriver", "ReferenceModel", "Report", "StatisticsDriver", "Taken", "TrackingDriver"),
        *("check_driver", "driver_error", "fail_any", "fail_from", "fail_kind", "fail_next", "fail_once"),
        *("interruption", "natural_error", "no_faults", "replay", "slow"),
    ]


def test_the_error_tree_is_the_one_that_its_file_draws() -> None:
    tree = {
        name: kind.__mro__[1].__name__
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, Exception)
    }
    assert tree == {
        "VmemError": "Exception",
        "ConfigError": "VmemError",
        "CapacityError": "VmemError",
        "OutOfPages": "CapacityError",
        "OutOfSlots": "CapacityError",
        "OutOfAddressSpace": "CapacityError",
        "OutOfMappings": "CapacityError",
        "OutOfHostMemory": "CapacityError",
        "OutOfDiskSpace": "CapacityError",
        "DriverError": "VmemError",
        "UsageError": "VmemError",
        "UnknownSession": "UsageError",
        "SessionInUse": "UsageError",
        "FileError": "VmemError",
        "FileRefused": "FileError",
        "RequestError": "VmemError",
        "InvalidRequest": "RequestError",
        "RequestTooLong": "InvalidRequest",
        "QueueFull": "RequestError",
        "ShuttingDown": "RequestError",
        "ReaderTooSlow": "RequestError",
        "RequestFailed": "RequestError",
        "EngineDead": "VmemError",
        "InvariantError": "VmemError",
    }
    assert issubclass(errors.ConfigError, ValueError)


def modules_for_testing() -> list[str]:
    """Names of the modules of `vmem_kv.testing`; the emulated library is none."""
    return [m.name for m in pkgutil.iter_modules(vmem_kv.testing.__path__) if not m.name.startswith("_")]


def public_things() -> Iterator[tuple[str, object]]:
    """Everything public in the core and in `vmem_kv.testing`, with its dotted name."""
    names = [*CORE, *(f"vmem_kv.testing.{name}" for name in modules_for_testing())]
    for name in names:
        module = import_module(name)
        yield name, module
        for key, thing in vars(module).items():
            if key.startswith("_") or getattr(thing, "__module__", None) != name:
                continue
            if inspect.isfunction(thing):
                yield f"{name}.{key}", thing
            elif inspect.isclass(thing):
                yield f"{name}.{key}", thing
                for attribute, member in vars(thing).items():
                    function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
                    if not attribute.startswith("_") and inspect.isfunction(function):
                        inherited = any(hasattr(base, attribute) for base in thing.__mro__[1:])
                        if not inherited:  # a method that implements a contract is documented there, once
                            yield f"{name}.{key}.{attribute}", function


def test_everything_public_says_what_it_does() -> None:
    silent = [name for name, thing in public_things() if not (getattr(thing, "__doc__", None) or "").strip()]
    # Mappers implement a protocol that they do not inherit from; its methods carry the text.
    assert [n for n in silent if not n.startswith("vmem_kv.driver.host_mapper.")] == []
    assert sum(1 for _ in public_things()) > 150
