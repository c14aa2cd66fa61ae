"""Resume points: one safetensors file that is written aside and renamed, so never torn."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mgd.errors import UserError, one_line
from mgd.files import write_aside

FILE = "state.safetensors"
FORMAT = 3


def save_checkpoint(
    folder: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, progress: Mapping[str, Any]
) -> None:
    """Write everything that a resumed run needs.

    Randomness is drawn from (seed, step) throughout, so that no generator state belongs here.

    Args:
        folder: the run's `checkpoint/`.
        modules: networks by name.
        optimizer: its tensors are stored beside the weights, its numbers in the header.
        progress: JSON values: step, seconds, the resolved recipe.
    """
    tensors = state_tensors(modules)
    state, numbers = optimizer.state_dict(), {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            else:
                numbers[f"{index}/{key}"] = value
    header = {"format": FORMAT, "progress": dict(progress), "param_groups": state["param_groups"], "numbers": numbers}
    for leftover in [*folder.glob(f".*{FILE}*"), *folder.glob(".tmp*")]:
        leftover.unlink(missing_ok=True)  # of a process that was killed while writing
    write_aside(folder / FILE, lambda path: save_file(plain(tensors), path, metadata={"mgd": json.dumps(header)}))


def load_checkpoint(
    folder: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Load a resume point in place; return its `progress`, or None where there is none.

    Raises:
        UserError: the file is damaged or belongs to other networks.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["mgd"])
            if (found := header.get("format", 1)) != FORMAT:
                raise ValueError(f"it is of format {found}, this version of mgd writes {FORMAT}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for name, module in modules.items():
            module.load_state_dict(_below(tensors, name), strict=True)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Any]] = {}
        entries = _below(tensors, "optimizer") | header["numbers"]
        for key, value in entries.items():
            index, name = key.split("/")
            state.setdefault(int(index), {})[name] = _laid_out(value, parameters[int(index)])
        optimizer.load_state_dict({"state": state, "param_groups": header["param_groups"]})
    except (SafetensorError, OSError, KeyError, IndexError, TypeError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} cannot be resumed from: {one_line(error)}; start over with --restart") from error
    return header["progress"]


def state_tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return what modules hold, as "module/key", in the form of `plain`."""
    state = {f"{name}/{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    return plain(state)


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors writes them: on the CPU, contiguous, without gradients."""
    return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}


def _below(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}/")}


def _laid_out(value: Any, parameter: Tensor) -> Any:
    # The same memory layout as before the stop: sums in another order would not be bit-identical.
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
