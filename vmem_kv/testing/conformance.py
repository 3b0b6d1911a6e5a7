"""The driver contract, executed: one function that any driver must pass.

Every rule of `driver/base.py` that can be observed from outside is one function, its docstring is the rule, and it
works on a driver of its own: where pages lie (`contract_pages.py`), what is done with them (`contract_work.py`), in
large amounts (`contract_amounts.py`), and what comes back (`contract_returns.py`). `check_driver` runs all of them and
raises `ContractBreach` at the first that does not hold, with the rule in the message:

    check_driver(HostDriver)

Assumptions: Linux; the device has memory for 8 MiB and for 32 pages of the granularity; nobody else uses the driver
meanwhile. Others may use the device, and take and give its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmem_kv.driver.base import Driver
from vmem_kv.testing import contract_amounts, contract_pages, contract_returns, contract_work
from vmem_kv.testing.contract_bench import MANY, Bench, Rule
from vmem_kv.testing.contract_bench import ContractBreach as ContractBreach
from vmem_kv.testing.memory import DriverMemory, Memory

RULES: tuple[Rule, ...] = (
    *contract_pages.RULES,
    *contract_work.RULES,
    *contract_amounts.RULES,
    *contract_returns.RULES,
)


@dataclass(frozen=True, slots=True)
class Report:
    """What `check_driver` looked at."""

    driver: str
    rules: tuple[str, ...]
    n_checks: int
    n_batch_items: int
    """Items of the large batches that were tried: 300, or fewer where memory is scarce."""
    unseen: tuple[str, ...]
    """What this driver, device or machine left nobody to look at. No breach, and no proof."""


def check_driver(open_driver: Callable[[], Driver], open_memory: Callable[[Driver], Memory] = DriverMemory) -> Report:
    """Hold a driver against every rule of the contract.

    Args:
        open_driver: Opens a new driver; called once per rule, and by one rule a few times more.
        open_memory: Returns what reads and writes a driver's memory; by default the driver's own copies to and from
            the host.

    Returns:
        What was checked.

    Raises:
        ContractBreach: A rule does not hold; the message begins with the rule. Drivers opened so far may be left open.
    """
    name, n_checks, n_batch_items = "", 0, MANY
    unseen: list[str] = []
    for rule in RULES:
        driver = open_driver()
        bench = Bench(driver, open_memory(driver), open_driver)
        name = f"{type(driver).__name__} ({driver.info.name}, {driver.info.path})"
        try:
            rule(bench)
            driver.close()
        except ContractBreach as breach:
            raise ContractBreach(f"{name} breaks a rule. {_text(rule)}: {breach}") from None
        except Exception as error:
            wrong = f"unexpected {type(error).__name__}: {error}"
            raise ContractBreach(f"{name} breaks a rule. {_text(rule)}: {wrong}") from error
        n_checks += bench.n_checks
        n_batch_items = min(n_batch_items, bench.n_batch_items)
        unseen += bench.unseen
    return Report(name, tuple(map(_text, RULES)), n_checks, n_batch_items, tuple(unseen))


def _text(rule: Rule) -> str:
    return (rule.__doc__ or rule.__name__).strip().rstrip(".")
