"""A run folder: whose it is, whether it is finished, what is written into it."""

import importlib.metadata
import json
import platform
import resource
import shutil
import tomllib
from collections.abc import Mapping
from typing import Any

import torch

from mgd.checkpoint import write_text
from mgd.data.partitions import Split
from mgd.errors import UserError
from mgd.recipe import DataSection, Partition, Recipe

# Keys of a recipe that change how a run is done, not what comes out.
_FREE = {"run.log_every", "run.checkpoint_every", "run.threads", "run.output", "data.workers", "eval.baselines"}


def finished_metrics(recipe: Recipe) -> dict[str, Any] | None:
    """Return metrics.json of a finished run of this very recipe, or None.

    Raises:
        UserError: the folder holds a run of another recipe.
    """
    folder = recipe.run_dir
    try:
        there = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{folder / 'recipe.toml'} cannot be read: {error}; --restart starts over") from error
    path = folder / "metrics.json"
    something_to_lose = path.exists() or (folder / "checkpoint").exists()
    differences = _differences(there, recipe.to_dict())
    if differences and something_to_lose:
        raise UserError(
            f"{folder} holds a run of another recipe ({'; '.join(differences[:4])}); give this one another "
            f"name (--set run.name=...), or start over with --restart"
        )
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def open_folder(recipe: Recipe, partition: Split, restart: bool) -> None:
    """Make the run folder with `recipe.toml` and `partition.json`; `restart` empties it first.

    Raises:
        UserError: the folder cannot be made, or `restart` would delete something that is no run.
    """
    folder = recipe.run_dir
    if restart and folder.exists():
        if not (folder / "recipe.toml").exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty and not a run; --restart deletes runs only")
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the run folder {folder} cannot be made: {error.strerror or error}") from error
    write_text(folder / "recipe.toml", recipe.to_toml())
    manifest = partition.manifest(recipe.partition, recipe.partition_seed)
    write_text(folder / "partition.json", json.dumps(manifest, indent=1) + "\n")


def _differences(there: Mapping, here: Mapping) -> list[str]:
    first, second = _flat(there), _flat(here)
    keys = sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))
    return [f"{key} {first.get(key)} there, {second.get(key)} here" for key in keys if key not in _FREE]


def _flat(table: Mapping, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process so far, MiB: of the GPU if there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if platform.system() == "Darwin" else peak / 1024  # bytes there, KiB on Linux


def device_name(device: torch.device) -> str:
    """Name of the GPU, or the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads, {platform.machine()}"


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that shape a result."""
    packages = ("mgd", "torch", "timm", "accelerate", "datasets", "safetensors")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def check_same_labels(recipe: Recipe, other: Recipe, title: str) -> None:
    """Refuse to distil from, or to compare with, a run that sees other labels.

    Raises:
        UserError: `[partition]` or the images of `[data]` differ, naming the first key.
    """
    for section, keys in (("partition", Partition.model_fields), ("data", _image_keys(recipe.data))):
        mine, theirs = recipe.to_dict()[section], other.to_dict()[section]
        for key in keys:
            if mine.get(key) != theirs.get(key):
                raise UserError(
                    f"{recipe.source}: {title} ({other.source}) must see the same labelled images, but its "
                    f"[{section}] {key} is {theirs.get(key)!r}, here {mine.get(key)!r}; make them equal, or name a "
                    "teacher by checkpoint = its folder"
                )


def _image_keys(section: DataSection) -> list[str]:
    """Keys of a reader that say which images there are; what all readers share only shapes batches."""
    return ["name", *(key for key in type(section).model_fields if key not in DataSection.model_fields)]
