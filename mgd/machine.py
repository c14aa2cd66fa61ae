"""What a result was measured on: device, memory, versions."""

import importlib.metadata
import platform
from pathlib import Path

import torch

import mgd
from mgd.registry import plugin_packages

try:
    import resource
except ImportError:  # Windows
    resource = None


def device_name(device: torch.device) -> str:
    """Name of the GPU, or the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads, {processor()}"


def processor() -> str:
    """Name of the CPU."""
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        facts = []
    models = (fact.partition(":")[2].strip() for fact in facts if fact.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory, MiB: of the GPU since the run began, or of this process, with the runs before this one.

    On Windows that of a process is not known, and 0.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if not resource:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if platform.system() == "Darwin" else peak / 1024  # bytes there, KiB on Linux


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result, those of plug-ins that were used included."""
    packages = ("torch", "timm", "accelerate", "datasets", "safetensors")
    ours = {"python": platform.python_version(), "mgd": mgd.__version__}  # mgd may be run without being installed
    return ours | {name: importlib.metadata.version(name) for name in packages} | plugin_packages()
