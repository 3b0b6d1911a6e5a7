"""CUDA's result codes, sorted by what they mean to us. Imports nothing of CUDA, so that the table can be read anywhere.

Source: the descriptions of CUresult in cuda.h 13.0.
"""

from __future__ import annotations

SUCCESS = 0
OUT_OF_MEMORY = 2
INVALID_HANDLE = 400
NOT_READY = 600
CONTEXT_IS_DESTROYED = 709

LOST_CODES = frozenset(
    {
        4,  # DEINITIALIZED: the driver is shutting down with the process
        214,  # ECC_UNCORRECTABLE
        220,  # NVLINK_UNCORRECTABLE
        226,  # CONTAINED
        700,  # ILLEGAL_ADDRESS
        702,  # LAUNCH_TIMEOUT
        709,  # CONTEXT_IS_DESTROYED
        710,  # ASSERT
        714,  # HARDWARE_STACK_ERROR
        715,  # ILLEGAL_INSTRUCTION
        716,  # MISALIGNED_ADDRESS
        717,  # INVALID_ADDRESS_SPACE
        718,  # INVALID_PC
        719,  # LAUNCH_FAILED
        721,  # TENSOR_MEMORY_LEAK
        810,  # MPS_CLIENT_TERMINATED
        911,  # EXTERNAL_DEVICE
    }
)
"""Sticky errors: the context is in an inconsistent state, and every later call answers the same."""

MISSING_CODES = {
    2: "its memory is full; end other processes that use it",
    46: "another process has it for itself; end that one, or use another device",
    3: "CUDA could not be initialised in this process; if it was forked from one that used CUDA, spawn it instead",
    100: "the NVIDIA driver sees no device; check nvidia-smi and CUDA_VISIBLE_DEVICES",
    801: "the device or its driver lacks what vmem_kv is built on; use another GPU or a newer driver",
    803: "the NVIDIA driver does not fit the kernel module; reboot, or install matching versions",
    804: "this version of CUDA does not run on this device without a newer NVIDIA driver",
    999: "the NVIDIA driver failed for an unknown reason; check nvidia-smi and dmesg",
}
"""What CUDA says where it cannot be used, and what to do about it."""
