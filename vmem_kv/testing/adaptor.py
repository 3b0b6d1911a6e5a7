"""What the adaptors of this package share: their base, and how far a batch came.

The base lies with the drivers (`driver/adaptor.py`): `CheckedDriver` is an adaptor too, and no driver imports tests.
"""

from __future__ import annotations

from types import TracebackType

from vmem_kv.driver.adaptor import Adaptor
from vmem_kv.errors import VmemError

__all__ = ["Adaptor", "Effect"]


class Effect:
    """How many items of a batch took effect, known behind the block, whether the call in it failed or not.

        with (effect := Effect(len(handles))):
            self.inner.release(page_bytes, handles)

    Of an exception that does not say how far the call came, none is assumed.

    Attributes:
        n_done: Items that took effect.
    """

    def __init__(self, n_items: int) -> None:
        self.n_done = 0
        self._n_items = n_items

    def __enter__(self) -> Effect:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.n_done = self._n_items if error is None else error.n_done if isinstance(error, VmemError) else 0
