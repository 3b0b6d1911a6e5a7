"""Charges at the limit and beside it, and whose mappings the others are."""

from __future__ import annotations

import pytest

from vmem_kv.driver.ledger import Ledger

COUNTS = ("mappings", "bytes")


class Account:
    """One of a ledger's two counts."""

    def __init__(self, what: str) -> None:
        self._ledger, self._what = Ledger(), what

    @property
    def held(self) -> int:
        """What is charged now."""
        return int(getattr(self._ledger, f"n_{self._what}"))

    def charge(self, n: int, limit: int) -> bool:
        """Charge, if it fits."""
        return bool(getattr(self._ledger, f"charge_{self._what}")(n, limit))

    def refund(self, n: int) -> None:
        """Take back."""
        getattr(self._ledger, f"refund_{self._what}")(n)


@pytest.mark.parametrize("what", COUNTS)
def test_charges_fit_up_to_the_limit_and_one_beyond_changes_nothing(what: str) -> None:
    account = Account(what)
    assert account.charge(6, 10)
    assert not account.charge(5, 10)
    assert account.held == 6
    assert account.charge(4, 10)
    assert not account.charge(1, 10)
    assert account.held == 10
    account.refund(1)
    assert account.charge(1, 10)
    account.refund(10)
    assert account.held == 0


@pytest.mark.parametrize("what", COUNTS)
def test_a_charge_for_nothing_more_fits_even_where_the_limit_was_lowered(what: str) -> None:
    account = Account(what)
    assert account.charge(10, 10)
    assert account.charge(0, 5)
    assert account.charge(-3, 5)
    assert not account.charge(1, 5)
    assert account.held == 7


def test_one_count_is_not_charged_for_the_other() -> None:
    ledger = Ledger()
    assert ledger.charge_mappings(3, 10)
    assert ledger.charge_bytes(8, 10)
    assert (ledger.n_mappings, ledger.n_bytes) == (3, 8)


@pytest.mark.parametrize("n_charged", [0, 50])
def test_a_process_that_has_no_more_mappings_than_ours_has_no_others(n_charged: int) -> None:
    ledger = Ledger()
    assert ledger.charge_mappings(n_charged, 100)
    for n_now in (n_charged, n_charged // 2, 0):  # fewer than charged: the worst case did not come
        assert ledger.other_mappings(n_now) == 0
    assert ledger.other_mappings(n_charged + 1) == 1
