"""Mutation score: how many small mistakes in a module do the tests notice?

    python -m tests.proof.mutation vmem_kv/growth.py vmem_kv/slots.py --sample 100 --seed 1

Every mutant changes one place: a comparison, an operator, a number, a condition, a statement that is left out. Left
alone are annotations, since nothing evaluates them, and `strict=True` of a zip, which asks for what is certain. A
mutant lives in a forked process of its own, which imports the package with the changed module and runs the tests until
one fails. Survivors are printed with their lines, to be read: some are equivalent to the original, the others want a
test.

Assumptions: run from the repository's root, on Linux.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

LIMIT_S = 90
"""A mutant that computes for longer, or waits for so long before the tests begin, hangs, which is noticed."""

WAIT_S = 180
"""A mutant that waits for longer in one test hangs: the longest of them takes a few seconds on an idle one."""

TESTS = [
    "tests/core/test_units_and_layout.py",
    "tests/core/test_config.py",
    "tests/core/test_stats.py",
    "tests/core/test_storage.py",
    "tests/core/test_ledger.py",
    "tests/core/test_steps.py",
    "tests/core/test_pool.py",
    "tests/core/test_cache.py",
    "tests/core/test_slots_and_premap.py",
    "tests/core/test_limits.py",
    "tests/core/test_small_repairs.py",
    "tests/core/test_closing.py",
    "tests/core/test_sharing.py",
    "tests/core/test_sharing_edges.py",
    "tests/core/test_exchange.py",
    "tests/core/test_audit.py",
    "tests/core/test_page_table.py",
    "tests/core/test_pending.py",
    "tests/core/test_room.py",
    "tests/core/test_interruptions.py",
    "tests/proof/test_rare_mistakes.py",
    "tests/proof/test_remaining_branches.py",
    "tests/proof/test_exact_values.py",
    "tests/core/test_rows.py",
    "tests/test_tensors.py",
]

ALSO_ABOUT = {
    "audit": ["test_closing", "test_sharing"],
    "claims": ["test_slots_and_premap"],
    "mapping": ["test_limits", "test_sharing_edges"],
    "page_table": ["test_sharing", "test_cache"],
    "pending": ["test_cache"],
    "region": ["test_limits", "test_closing"],
    "rewiring": ["test_exchange", "test_sharing_edges"],
    "room": ["test_sharing", "test_limits"],
    "unmapping": ["test_limits", "test_interruptions", "test_rare_mistakes"],
}
"""Tests about a module beside those that have its name."""

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,  # codespell:ignore notin
    ast.NotIn: ast.In,  # codespell:ignore notin
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}


class Mutant(NamedTuple):
    """One changed module."""

    path: Path
    line: int
    what: str
    tree: ast.Module


class Place(NamedTuple):
    """Where a mutant differs: the n-th change of the node with this number, in the order of `ast.walk`."""

    line: int
    node: int
    change: int


def places_in(tree: ast.Module) -> list[Place]:
    """Every place of a module that can be changed."""
    alone = set(_left_alone(tree))
    return [
        Place(getattr(node, "lineno", 0), index, change)
        for index, node in enumerate(ast.walk(tree))
        if node not in alone
        for change in range(_n_changes(node))
    ]


def mutant_at(path: Path, tree: ast.Module, place: Place) -> Mutant:
    """The module with this change; `tree` stays as it is."""
    changed = copy.deepcopy(tree)
    node = next(node for index, node in enumerate(ast.walk(changed)) if index == place.node)
    what = _change(node, place.change)
    return Mutant(path, place.line, what, ast.fix_missing_locations(changed))


def _left_alone(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "strict":
            yield node.value
        for name in ("annotation", "returns"):
            if (annotation := getattr(node, name, None)) is not None:
                yield from ast.walk(annotation)


def _n_changes(node: ast.AST) -> int:
    if isinstance(node, ast.Compare):
        return sum(type(op) in COMPARISONS for op in node.ops)
    if isinstance(node, ast.BinOp | ast.AugAssign):
        return type(node.op) in OPERATORS
    if isinstance(node, ast.BoolOp | ast.If | ast.IfExp | ast.While):
        return 1
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not)
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, bool)
    if isinstance(node, ast.FunctionDef):
        return len(_droppable(node))
    return 0


def _droppable(function: ast.FunctionDef) -> list[ast.stmt]:
    """Statements that can be left out: calls, and sums onto something."""
    found = []
    for node in ast.walk(function):
        for statement in getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            is_call = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
            if is_call or isinstance(statement, ast.AugAssign | ast.Delete):
                found.append(statement)
    return found


def _change(node: ast.AST, number: int) -> str:
    """Change a node in place; return what was done."""
    before = "" if isinstance(node, ast.FunctionDef | ast.If | ast.While) else ast.unparse(node)
    if isinstance(node, ast.Compare):
        places = [i for i, op in enumerate(node.ops) if type(op) in COMPARISONS]
        node.ops[places[number]] = COMPARISONS[type(node.ops[places[number]])]()
    elif isinstance(node, ast.BinOp | ast.AugAssign):
        node.op = OPERATORS[type(node.op)]()
    elif isinstance(node, ast.BoolOp):
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        before = ast.unparse(node.test)
        node.test = ast.UnaryOp(ast.Not(), node.test)
        return f"{before} -> not ({before})"
    elif isinstance(node, ast.UnaryOp):
        node.op, node.operand = ast.Not(), ast.UnaryOp(ast.Not(), node.operand)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1
    elif isinstance(node, ast.FunctionDef):
        statement = _droppable(node)[number]
        text = ast.unparse(statement)
        for parent in ast.walk(node):
            body = getattr(parent, "body", None)
            if isinstance(body, list) and statement in body:
                body[body.index(statement)] = ast.Pass()
        return f"line {statement.lineno}: {text} -> pass"
    return f"{before} -> {ast.unparse(node)}"


class _Loader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a changed tree."""

    def __init__(self, mutant: Mutant) -> None:
        self._name = ".".join(mutant.path.with_suffix("").parts)
        self._code = compile(mutant.tree, str(mutant.path), "exec")

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(name, self) if name == self._name else None

    def exec_module(self, module: ModuleType) -> None:
        exec(self._code, module.__dict__)


def is_noticed(mutant: Mutant) -> bool:
    """Run the tests on a mutant in a process of its own; whether any failed, hung or crashed."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S))  # whatever else the machine does meanwhile
        signal.alarm(LIMIT_S)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        os._exit(_run_tests(mutant))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def _run_tests(mutant: Mutant) -> int:
    """In the child: 0 if nothing was noticed. Random operations first, they notice most and fastest."""
    try:
        sys.meta_path.insert(0, _Loader(mutant))
        from vmem_kv.testing.operations import random_run
        from vmem_kv.testing.targets import open_driver

        random_run(1, 1500, open_driver("host:native"))
        signal.alarm(0)
        import pytest

        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "not cuda and not python"]
        options += [f"--timeout={WAIT_S}", "--timeout-method=thread"]  # which ends the process, whatever hangs in it
        about = [mutant.path.stem, *ALSO_ABOUT.get(mutant.path.stem, [])]
        tests = sorted(TESTS, key=lambda test: not any(name in test for name in about))
        return int(pytest.main([*options, *tests]))
    except BaseException:
        return 1


def main() -> None:
    """Print a line per survivor and a score per file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--sample", type=int, help="so many mutants of each file, chosen by the seed")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    # What every child needs and no mutant changes. (Not pytest's plugins: it wants to import those itself.)
    import numpy  # noqa: F401
    import torch  # noqa: F401

    for path in given.files:
        tree = ast.parse(path.read_text())
        places = places_in(tree)
        n_all = len(places)
        if given.sample is not None and given.sample < n_all:
            places = sorted(random.Random(given.seed).sample(places, given.sample), key=lambda place: place.line)
        if is_noticed(Mutant(path, 0, "", tree)):
            sys.exit(f"the tests fail without any mutant of {path}: no score can be had")
        begin, n_noticed = time.monotonic(), 0
        for place in places:
            mutant = mutant_at(path, tree, place)
            noticed = is_noticed(mutant)
            n_noticed += noticed
            if not noticed:
                sys.stdout.write(f"survived: {path}:{mutant.line}: {mutant.what}\n")
                sys.stdout.flush()
        score = n_noticed / len(places)
        sys.stdout.write(
            f"{path}: {n_noticed} of {len(places)} mutants noticed ({score:.1%}), of {n_all} there are, seed "
            f"{given.seed}, {time.monotonic() - begin:.0f} s\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
