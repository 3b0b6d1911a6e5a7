"""What an importer of DLPack is told, read by the standard's own offsets; on a device that need not be there."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable

import pytest
import torch

from vmem_kv.storage import storage_by_dlpack

DL_MANAGED_TENSOR = struct.Struct("=Q ii i BBH Q Q Q Q Q")
"""Of 64 bit: data, device type and number, dimensions, type code and bits and lanes, shape, strides, offset, context,
deleter."""

pointer_of: Callable[[object, bytes], int] = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


@pytest.mark.parametrize(
    ("device", "told"),
    [("cpu", (1, 0)), ("cuda", (2, 0)), ("cuda:3", (2, 3))],
    ids=["host", "a device", "another device"],
)
def test_an_importer_is_told_bytes_at_an_address_of_a_device(
    monkeypatch: pytest.MonkeyPatch, device: str, told: tuple[int, int]
) -> None:
    seen: list[tuple[int, ...]] = []

    def import_tensor(capsule: object) -> torch.Tensor:
        memory = pointer_of(capsule, b"dltensor")
        fields = DL_MANAGED_TENSOR.unpack(ctypes.string_at(memory, DL_MANAGED_TENSOR.size))
        (n_bytes,) = struct.unpack("=q", ctypes.string_at(fields[7], 8))
        seen.append((*fields[:7], *fields[8:11], n_bytes))
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(fields[11])(memory)  # as an importer does when it is done
        return torch.empty(0)

    monkeypatch.setattr("vmem_kv.storage.from_dlpack", import_tensor)
    storage_by_dlpack(0xABC000, 12345, torch.device(device))
    unsigned_8_bit = (1, 8, 1)
    no_strides, no_offset, no_context = 0, 0, 0
    assert seen == [(0xABC000, *told, 1, *unsigned_8_bit, no_strides, no_offset, no_context, 12345)]
