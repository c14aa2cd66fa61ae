"""Alternating repetitions, medians, and the peak of live tensor memory."""

import contextlib
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def alternate(variants: Mapping[str, Callable[[], object]], repetitions: int, device: torch.device) -> dict[str, float]:
    """Time each variant in turn, again and again, after one round to warm up.

    Args:
        variants: name -> what to time.
        repetitions: rounds that count.
        device: waited for, if it is a GPU.

    Returns:
        name -> median seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repetitions + 1):
        for name, run in variants.items():
            _wait(device)
            began = time.perf_counter()
            run()
            _wait(device)
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Peak bytes of tensors that live at once while `run` runs, beyond those that lived before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveTensors() as live:
        run()
    return live.peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _LiveTensors(TorchDispatchMode):
    """Counts the storages that operators return, until they are freed; scratch space inside an operator is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                self._known.add(key)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, key, storage.nbytes())
        return out

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _tensors(out: object) -> Iterator[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        yield out
    elif isinstance(out, (list, tuple)):
        for item in out:
            yield from _tensors(item)


@contextlib.contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """Autocast to bf16, or leave fp32."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=name == "bf16"):
        yield


def ratio_row(name: str, reference: float, ours: float) -> dict[str, Any]:
    """Return one line of a suite's table; `ratio` is reference / ours, higher is better."""
    return {"name": name, "reference": reference, "ours": ours, "ratio": reference / ours}
