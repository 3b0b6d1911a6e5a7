"""From torch's name of a device to a driver for its memory.

Guarantees: a driver that is returned serves the very device that torch means; what is missing is said in one sentence
by a ConfigError. Nothing of CUDA is imported unless a CUDA device is asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vmem_kv.config import CacheConfig
from vmem_kv.driver.base import Driver
from vmem_kv.driver.host import HostDriver
from vmem_kv.errors import ConfigError

OpenDriver = Callable[[torch.device, CacheConfig], Driver]
"""Opens a driver for the device that a model lies on. Exchange it to wrap or replace drivers."""


def open_driver(device: torch.device, config: CacheConfig | None = None) -> Driver:
    """Open the driver for a device; of the configuration it takes what concerns the driver.

    Raises:
        ConfigError: The device, or what is needed to use it, is missing here; the message says what.
    """
    config = config or CacheConfig()
    if device.type == "cpu":
        return HostDriver(config.host_path, huge_pages=config.huge_pages)
    if device.type == "cuda":
        return _open_cuda(device)
    raise ConfigError(f"there is no driver for {device}; vmem_kv maps memory on 'cpu' and on 'cuda'")


class TorchRuntime:
    """torch as the one who launches work on a CUDA device and keeps memory of it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def current_stream(self) -> int:
        """The stream on which the calling thread's torch operations run."""
        return int(torch.cuda.current_stream(self._device).cuda_stream)

    def spare_bytes(self) -> int:
        """What torch has of the driver and uses for no tensor."""
        return torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)

    def free_cached_memory(self) -> None:
        """Give torch's unused blocks back to the driver."""
        torch.cuda.empty_cache()


def _open_cuda(device: torch.device) -> Driver:
    from vmem_kv.driver.cuda import CudaDriver

    if torch.version.cuda is None:
        raise ConfigError(
            f"this torch ({torch.__version__}) was built without CUDA, so it cannot use {device}; install a build of "
            "torch with CUDA, or use device 'cpu'"
        )
    # torch first: its own errors are clear, and both of us use the same primary context.
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        index = torch.cuda.current_device() if device.index is None else device.index
        properties = torch.cuda.get_device_properties(index)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"torch cannot use {device}: {error}; check nvidia-smi and CUDA_VISIBLE_DEVICES") from error
    driver = CudaDriver(index, TorchRuntime(torch.device("cuda", index)))
    uuid = str(properties.uuid).replace("-", "")
    if driver.uuid != uuid:
        driver.close()
        raise ConfigError(
            f"cuda:{index} is device {uuid} to torch and {driver.uuid} to the CUDA driver; set CUDA_VISIBLE_DEVICES "
            "before the process starts, and not while it runs"
        )
    return driver
