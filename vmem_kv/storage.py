"""A range of addresses as torch storage: nothing is copied, nothing is owned, and most of it may be unmapped.

Guarantees: on any device; no C++ extension; the storage's death can be observed with `weakref`, since torch keeps the
Python object alive as long as any tensor looks into it. Freeing the storage frees nothing.

Assumptions: torch's `_construct_storage_from_data_pointer`, a private name that several large projects build on. Where
a torch has lost it, DLPack does the same through a public door.

Source of the structures: DLPack, dlpack.h, version 0 (`DLManagedTensor`).
"""

from __future__ import annotations

import ctypes

import torch
from torch.utils.dlpack import from_dlpack


def open_storage(address: int, n_bytes: int, device: torch.device) -> torch.UntypedStorage:
    """Return storage over `[address, address + n_bytes)` of a device, without looking at it."""
    construct = getattr(torch._C, "_construct_storage_from_data_pointer", None)
    if construct is None:
        return storage_by_dlpack(address, n_bytes, device)
    storage: torch.UntypedStorage = construct(address, device, n_bytes)
    return storage


def storage_by_dlpack(address: int, n_bytes: int, device: torch.device) -> torch.UntypedStorage:
    """Do the same by importing a tensor of bytes."""
    memory = _libc.malloc(ctypes.sizeof(_Managed))
    if not memory:
        raise MemoryError("no memory for a DLPack tensor")
    managed = _Managed.from_address(memory)
    managed.shape = n_bytes
    managed.tensor = _Tensor(
        data=address,
        device_type=_CPU if device.type == "cpu" else _CUDA,
        device_id=device.index or 0,
        n_dims=1,
        code=_UNSIGNED,
        bits=8,
        lanes=1,
        shape=memory + _Managed.shape.offset,
        strides=None,
        byte_offset=0,
    )
    managed.context = None
    # The importer calls it with the structure itself, which is all that there is to free; a Python function could be
    # called when the interpreter is gone.
    managed.deleter = ctypes.cast(_libc.free, ctypes.c_void_p).value
    storage: torch.UntypedStorage = from_dlpack(_new_capsule(memory, b"dltensor", None)).untyped_storage()
    return storage


_CPU, _CUDA = 1, 2
_UNSIGNED = 1


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("n_dims", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (
        ("tensor", _Tensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("shape", ctypes.c_int64),  # ours, behind what the standard knows
    )


_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = [ctypes.c_size_t]
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
