"""What the NVIDIA driver of this machine offers: its library, its devices, and how pages on them are described.

The only file that imports cuda-python, and only when somebody asks: a machine without one can import this.

Guarantees: asks and describes; begins to use no device. Where something is missing, the ConfigError says what, and what
to do about it.

Source: CUDA driver API, "Initialization", "Device Management" and "Virtual Memory Management" (cuda.h 13.0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from vmem_kv.driver.cuda_errors import LOST_CODES, MISSING_CODES, SUCCESS
from vmem_kv.errors import ConfigError, DriverError


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """A device as the NVIDIA driver describes it."""

    index: int
    name: str
    uuid: str
    memory_bytes: int
    has_virtual_memory: bool


class CudaMachine(NamedTuple):
    """What the NVIDIA driver of this machine offers to this process."""

    driver_version: str  # of CUDA, as "13.0"
    devices: tuple[CudaDevice, ...]


def describe_cuda() -> CudaMachine:
    """Ask the NVIDIA driver what there is, without beginning to use a device.

    Raises:
        ConfigError: CUDA cannot be used; the message says what is missing.
    """
    cuda = load_cuda()
    version = int(answer("cuDriverGetVersion", cuda.cuDriverGetVersion()))
    devices = []
    for index in range(int(answer("cuDeviceGetCount", cuda.cuDeviceGetCount()))):
        device = answer("cuDeviceGet", cuda.cuDeviceGet(index))
        devices.append(
            CudaDevice(
                index,
                answer("cuDeviceGetName", cuda.cuDeviceGetName(128, device)).split(b"\0")[0].decode(errors="replace"),
                uuid_of(cuda, device),
                int(answer("cuDeviceTotalMem", cuda.cuDeviceTotalMem(device))),
                _has_virtual_memory(cuda, device),
            )
        )
    return CudaMachine(f"{version // 1000}.{version % 1000 // 10}", tuple(devices))


def load_cuda() -> Any:
    """Import cuda-python's driver bindings and initialise CUDA.

    Raises:
        ConfigError: One of them is missing, or refuses.
    """
    try:
        from cuda.bindings import driver as cuda
    except ImportError as error:
        raise ConfigError(f"cuda-python is missing ({error}); pip install cuda-bindings") from error
    try:
        (code,) = cuda.cuInit(0)
    except RuntimeError as error:
        raise ConfigError(
            "no NVIDIA driver: libcuda.so.1 was not found; install the driver on a machine with an NVIDIA GPU, or use "
            "device 'cpu'"
        ) from error
    if code != SUCCESS:
        advice = MISSING_CODES.get(int(code), "check nvidia-smi")
        raise ConfigError(f"CUDA cannot be used: cuInit answers {code.name} ({int(code)}); {advice}")
    return cuda


def find_device(cuda: Any, index: int) -> Any:
    """Return a device that has what we need.

    Raises:
        ConfigError: There is no such device, or it has no virtual memory management.
        DriverError: CUDA cannot say.
    """
    n_devices = int(answer("cuDeviceGetCount", cuda.cuDeviceGetCount()))
    if not 0 <= index < n_devices:
        raise ConfigError(
            f"there is no device cuda:{index}: the NVIDIA driver sees {n_devices}; check CUDA_VISIBLE_DEVICES"
        )
    device = answer("cuDeviceGet", cuda.cuDeviceGet(index))
    if not _has_virtual_memory(cuda, device):
        raise ConfigError(f"cuda:{index} has no virtual memory management, which vmem_kv is built on; use another GPU")
    return device


def uuid_of(cuda: Any, device: Any) -> str:
    """What names the device itself, whatever its number."""
    return bytes(answer("cuDeviceGetUuid", cuda.cuDeviceGetUuid(device)).bytes).hex()


def page_properties(cuda: Any, index: int) -> Any:
    """How `cuMemCreate` is told what a page is: plain memory of one device."""
    properties = cuda.CUmemAllocationProp()
    properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = index
    return properties


def read_write(cuda: Any, index: int) -> list[Any]:
    """How `cuMemSetAccess` is told that the same device reads and writes it."""
    access = cuda.CUmemAccessDesc()
    access.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = index
    access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    return [access]


def answer(call: str, result: Any) -> Any:
    """The value of a call that asks something and cannot break off half-way.

    Raises:
        DriverError: The call failed.
    """
    code, *values = result
    if code != SUCCESS:
        error = DriverError(call, int(code), code.name)
        error.is_fatal = int(code) in LOST_CODES
        raise error
    return values[0] if len(values) == 1 else values


def _has_virtual_memory(cuda: Any, device: Any) -> bool:
    supported = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
    return bool(answer("cuDeviceGetAttribute", cuda.cuDeviceGetAttribute(supported, device)))
