"""Ask whether anything can be touched at an address, without touching it: a wrong guess does not end the process.

On the host the kernel is asked to read there for us, and refuses without a signal. On a CUDA device the driver's own
books are read. Of other devices nobody can say.

Guarantees: changes nothing, neither there nor in what is current in the calling thread. Assumptions: Linux; the device
has a live driver, so that to use its context starts nothing.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from vmem_kv.driver.cuda_device import answer, load_cuda
from vmem_kv.errors import ConfigError

_INVALID_VALUE = 1  # CUresult

Probe = Callable[[int], bool]
"""Whether something can be touched at an address."""


def find_probe(device: str) -> Probe | None:
    """Return what can tell for a device, by torch's name for it: "cpu", "cuda:0". None where nobody can."""
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return can_read
    if kind != "cuda":
        return None
    try:
        cuda = load_cuda()
    except ConfigError:  # another maker's device that torch calls so
        return None
    return partial(_is_mapped_on_cuda, cuda, int(index or 0))


def can_read(address: int) -> bool:
    """Whether this process can read the byte at an address."""
    reader, writer = os.pipe()
    try:
        os.write(writer, (ctypes.c_char * 1).from_address(address))
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        return False
    finally:
        os.close(reader)
        os.close(writer)
    return True


def _is_mapped_on_cuda(cuda: Any, index: int, address: int) -> bool:
    """Whether the device has memory at an address, by the driver's books.

    Raises:
        DriverError: The driver cannot say.
    """
    device = answer("cuDeviceGet", cuda.cuDeviceGet(index))
    context = answer("cuDevicePrimaryCtxRetain", cuda.cuDevicePrimaryCtxRetain(device))
    try:
        answer("cuCtxPushCurrent", cuda.cuCtxPushCurrent(context))
        try:
            result = cuda.cuPointerGetAttribute(cuda.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MAPPED, address)
        finally:
            cuda.cuCtxPopCurrent()
    finally:
        cuda.cuDevicePrimaryCtxRelease(device)
    if result[0] == _INVALID_VALUE:  # not even reserved
        return False
    return bool(answer("cuPointerGetAttribute", result))
