"""The part of `vmem-kv doctor` about GPUs: whether one can be used, what is missing, and which kernels there are."""

from __future__ import annotations

from vmem_kv.cli.finding import Finding
from vmem_kv.errors import VmemError
from vmem_kv.units import format_bytes

_TOPIC = "CUDA"


def cuda_findings() -> list[Finding]:
    """Say whether CUDA devices can be used, and if not, what would be needed."""
    return [*_driver_findings(), _torch_finding()]


def _driver_findings() -> list[Finding]:
    from vmem_kv.driver.cuda import describe_cuda

    try:
        machine = describe_cuda()
    except VmemError as error:
        return [_missing("NVIDIA driver", error)]
    findings = [Finding(_TOPIC, "NVIDIA driver", f"CUDA {machine.driver_version}")]
    for device in machine.devices:
        value = f"{device.name}, {format_bytes(device.memory_bytes)}"
        if device.has_virtual_memory:
            findings += [Finding(_TOPIC, f"cuda:{device.index}", value), _opened(device.index)]
        else:
            advice = "use another GPU: vmem_kv is built on virtual memory management"
            findings.append(Finding(_TOPIC, f"cuda:{device.index}", f"{value}, no virtual memory", False, advice))
    return findings


def _opened(index: int) -> Finding:
    """Try what a cache would do first."""
    try:
        import torch

        from vmem_kv.devices import open_driver

        driver = open_driver(torch.device("cuda", index))
    except ImportError:
        return Finding(_TOPIC, f"cache on cuda:{index}", "torch is not installed", None, "pip install torch")
    except VmemError as error:
        return _missing(f"cache on cuda:{index}", error, is_fine=False)
    info = driver.info
    driver.close()
    return Finding(
        _TOPIC,
        f"cache on cuda:{index}",
        f"pages of {format_bytes(info.granularity_bytes)} or multiples, {format_bytes(info.memory_bytes)} free, up to "
        f"{info.max_mappings:,} mappings",
    )


def _torch_finding() -> Finding:
    try:
        import torch
    except ImportError:
        return Finding(_TOPIC, "torch", "not installed", None, "pip install torch")
    if torch.version.cuda is None:
        advice = "for a GPU, install a build of torch with CUDA (see pytorch.org)"
        return Finding(_TOPIC, "torch", f"{torch.__version__}, built without CUDA", None, advice)
    return Finding(_TOPIC, "torch", f"{torch.__version__}, built for CUDA {torch.version.cuda}")


def _missing(name: str, error: VmemError, *, is_fine: bool | None = None) -> Finding:
    """Our errors say what is wrong and, behind a semicolon, what would be right."""
    what, _, advice = str(error).partition("; ")
    return Finding(_TOPIC, name, what, is_fine, advice)


def kernel_findings() -> list[Finding]:
    """Say which attention kernels there are for every device, which one `auto` takes, and why."""
    try:
        import torch

        from vmem_kv.attention.choose import explain
    except ImportError:
        return []
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return [
        Finding("Kernels", f"{verdict.name} on {device}", *_verdict(verdict.is_chosen, verdict.is_usable, verdict.why))
        for device in devices
        for verdict in explain(device)
    ]


def _verdict(is_chosen: bool, is_usable: bool, why: str) -> tuple[str, bool | None]:
    if not is_usable:
        return why, None
    return f"{why} (taken by auto)" if is_chosen else why, True
