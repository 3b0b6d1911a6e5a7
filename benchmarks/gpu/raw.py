"""The bare binding, with the arguments that every call needs: returns what the binding returns, checks nothing."""

from __future__ import annotations

import ctypes
from typing import Any


class CallFailed(RuntimeError):
    """A call that had to succeed did not."""


class Raw:
    """`cuda.bindings.driver` on device 0.

    Args:
        cuda: The module, initialised, with a context current.
    """

    def __init__(self, cuda: Any) -> None:
        self.cuda = cuda
        self.device = self.must(cuda.cuDeviceGet(0))
        self.properties = self.device_memory(0)
        self.access = self.device_access(0)
        flags = cuda.CUmemAllocationGranularity_flags
        self.granularity_bytes, self.recommended_bytes = (
            int(self.must(cuda.cuMemGetAllocationGranularity(self.properties, flag)))
            for flag in (flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM, flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED)
        )

    @staticmethod
    def must(result: Any) -> Any:
        """The value of a call that has to succeed.

        Raises:
            CallFailed: It did not; with CUDA's code and name.
        """
        code, *values = result
        if int(code):
            raise CallFailed(f"CUDA answered {code.name} ({int(code)})")
        return values[0] if values else None

    def device_memory(self, index: int) -> Any:
        """Properties of memory on a device."""
        cuda = self.cuda
        properties = cuda.CUmemAllocationProp()
        properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = index
        return properties

    def device_access(self, index: int) -> Any:
        """Access for reading and writing from a device."""
        cuda = self.cuda
        access = cuda.CUmemAccessDesc()
        access.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = index
        access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        return access

    def reserve(self, n_bytes: int, alignment: int | None = None) -> Any:
        """Call cuMemAddressReserve."""
        return self.cuda.cuMemAddressReserve(n_bytes, self.granularity_bytes if alignment is None else alignment, 0, 0)

    def free(self, base: int, n_bytes: int) -> Any:
        """Call cuMemAddressFree."""
        return self.cuda.cuMemAddressFree(base, n_bytes)

    def create(self, n_bytes: int, properties: Any = None) -> Any:
        """Call cuMemCreate."""
        return self.cuda.cuMemCreate(n_bytes, properties or self.properties, 0)

    def release(self, handle: int) -> Any:
        """Call cuMemRelease."""
        return self.cuda.cuMemRelease(handle)

    def map(self, address: int, n_bytes: int, handle: int, offset: int = 0, flags: int = 0) -> Any:
        """Call cuMemMap."""
        return self.cuda.cuMemMap(address, n_bytes, offset, handle, flags)

    def set_access(self, address: int, n_bytes: int) -> Any:
        """Call cuMemSetAccess."""
        return self.cuda.cuMemSetAccess(address, n_bytes, [self.access], 1)

    def unmap(self, address: int, n_bytes: int) -> Any:
        """Call cuMemUnmap."""
        return self.cuda.cuMemUnmap(address, n_bytes)

    def read(self, address: int, n_bytes: int) -> bytes:
        """Copy to the host, and wait."""
        buffer = ctypes.create_string_buffer(n_bytes)
        self.must(self.cuda.cuMemcpyDtoH(ctypes.addressof(buffer), address, n_bytes))
        return buffer.raw
