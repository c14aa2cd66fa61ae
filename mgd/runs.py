"""A run folder: whose it is, whether it is finished, what is written into it."""

import contextlib
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from mgd.data.partitions import Manifest, ResolvedPartition, Seen, read_manifest, repainted
from mgd.errors import UserError, some
from mgd.files import absolute, read_json, write_json, write_text
from mgd.recipe import FREE_KEYS, Recipe, parse
from mgd.registry import DATASETS
from mgd.tables import flatten

_PLACES = {"data": ("root", "val_root", "parquet"), "partition": ("labeled_list", "unlabeled_list")}
OF_ALL = ("data.", "partition.")
"""What of a student's recipe its teachers and baselines have, too."""
UNLABELED = "unlabeled.json"
"""In a run folder, what it scores on its unlabelled images; see mgd/unseen.py."""


class FinishedRun(NamedTuple):
    """A finished run: what was asked, and what came out."""

    folder: Path
    recipe: Recipe
    metrics: dict[str, Any]
    """`metrics.json`."""
    seen: Seen | None
    """What it was shown, if its `partition.json` is there."""


def find_partition(model: str | Path) -> Path | None:
    """Return `partition.json` of the run that a model folder belongs to (or is), or None of one without a run."""
    folders = [Path(model), Path(model).resolve()]  # a run's model/ may be a link to elsewhere
    folders += [folder.parent for folder in folders if folder.name in ("model", "best")]
    return next((path for folder in folders if (path := folder / "partition.json").is_file()), None)


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
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'recipe.toml'} cannot be read: {error}; --restart starts over") from error
    path = folder / "metrics.json"
    something_to_lose = path.exists() or (folder / "checkpoint").exists()
    differences = recipe_differences(there, recipe)
    if differences and something_to_lose:
        elsewhere = "folder by --set run.output=..., which teachers and baselines follow"
        if not all(key.startswith(OF_ALL) for key in differences):
            elsewhere = f'name by --set "run.name=NAME-s{{seed}}", which baselines follow, or {elsewhere}'
        raise UserError(
            f"{folder} holds a run of another recipe ({'; '.join(differences[:4])}); give what you start another "
            f"{elsewhere}; or start anew in this one, which deletes what is there: {recipe.command} --restart"
        )
    if not path.exists() or not all(
        (folder / "model" / name).exists() for name in ("config.json", "model.safetensors")
    ):
        return None  # without its model a run is taken up again from its last resume point
    return read_metrics(folder, recipe, ("name", "method", "backbone"))


def read_metrics(folder: Path, recipe: Recipe, more: Sequence[str] = ()) -> dict[str, Any]:
    """Return `metrics.json` of a finished run, its numbers checked.

    Args:
        folder: of the run.
        recipe: of the run.
        more: other keys that must be there.

    Raises:
        UserError: it cannot be read, lacks a key, or holds what no run of ours writes.
    """
    path = folder / "metrics.json"
    metrics = read_json(path, ("miou", "num_labeled", "num_unlabeled", "num_val", "seed", "seconds", "steps", *more))
    best = metrics.get("best_on_val")
    wrong = [
        *(key for key in ("miou", "seconds") if not isinstance(metrics[key], float | int)),
        *(key for key in ("num_labeled", "num_val", "steps") if not isinstance(metrics[key], int)),
        *(["seed"] if metrics["seed"] != recipe.run.seed else []),
        *(["num_unlabeled"] if not isinstance(metrics["num_unlabeled"], int | None) else []),
        *(["versions"] if not isinstance(metrics.get("versions", {}), Mapping) else []),
        *(
            []
            if best is None or (isinstance(best, dict) and isinstance(best.get("miou"), float | int))
            else ["best_on_val"]
        ),
    ]
    if not wrong and not 0 <= metrics["miou"] <= 100:
        wrong = ["miou"]
    if wrong:
        value = str(metrics.get(wrong[0]))[:40]
        raise UserError(f"{path} is not as a run wrote it: {wrong[0]} = {value}; start over with --restart")
    return metrics


def open_folder(recipe: Recipe, partition: ResolvedPartition, teachers: Mapping[str, str], restart: bool) -> None:
    """Make the run folder with `recipe.toml` and `partition.json`; `restart` empties it first.

    Args:
        recipe: the run.
        partition: its labelled and unlabelled ids.
        teachers: fingerprints of the teachers' weights by name; a resumed run must have the same.
        restart: throw away what the folder holds.

    Raises:
        UserError: the folder cannot be made, or `restart` would delete something that is no run.
    """
    folder = recipe.run_dir
    try:
        if restart and folder.exists():
            _delete_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the run folder {folder} cannot be made: {error.strerror or error}") from error
    manifest = partition.manifest(recipe.partition, recipe.partition_seed) | {"teachers": dict(teachers)}
    path = folder / "partition.json"
    if (folder / "checkpoint").exists() and path.exists():
        if changed := _changed(read_manifest(path), manifest, recipe.depends_on_unlabeled):
            raise UserError(f"{path}: {changed}; put them back, or start over: {recipe.command} --restart")
    else:  # it begins anew, and what is there was another training's
        (folder / UNLABELED).unlink(missing_ok=True)
        shutil.rmtree(folder / "best", ignore_errors=True)
    write_text(folder / "recipe.toml", recipe.to_toml())
    write_json(path, manifest)


def _changed(there: Manifest, manifest: Mapping[str, Any], counts_unlabeled: bool) -> str | None:
    """Say which of its teachers, images and masks a run that goes on does not find as they were."""
    if there.teachers != manifest["teachers"]:
        return "its teachers are not those that it began with"
    if counts_unlabeled and there.pool != manifest["pool"]:
        return "the files of [data.unlabeled] have changed since this run began"
    if differing := there.differs(manifest, counts_unlabeled):
        return f"the images of [data] have changed since this run began ({differing})"
    if painted := repainted(there.masks, manifest["masks"]):
        return f"masks have changed since this run began: {some(painted)}"
    return None


def _delete_run(folder: Path) -> None:
    folder = folder.resolve()
    if not folder.is_dir() or (
        any(folder.iterdir()) and not any((folder / name).exists() for name in ("recipe.toml", "checkpoint"))
    ):
        raise UserError(f"{folder} is not empty and not a run; --restart deletes runs only")
    # Out of the way in one step: a kill while it is deleted must not leave half a run that looks whole.
    aside = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def recipe_differences(there: Mapping, here: Recipe) -> list[str]:
    """List the keys, of those that shape a result, in which two resolved recipes differ."""
    with contextlib.suppress(UserError):
        there = parse(there, source="").to_dict()  # of an older version: keys that came since, at their defaults
    first, second = _shaping(there), shaping_keys(here)
    keys = sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))
    return [f"{key} {first.get(key)} there, {second.get(key)} here" for key in keys]


def is_here(recipe: Recipe) -> bool:
    """Whether all images and lists of a recipe lie where it says, on this machine; not so of a data set of the hub."""
    data, pool = recipe.data, recipe.data.unlabeled
    if getattr(data, "hub", None) or (pool and pool.hub):
        return False
    named = [getattr(data, key, None) for key in _PLACES["data"]] + [pool and (pool.parquet or pool.webdataset)]
    if not any(named):
        return False
    named += [getattr(recipe.partition, key) for key in _PLACES["partition"]]
    return all(Path(place).exists() for place in named if place)


def with_places(tables: Mapping) -> dict[str, Any]:
    """Return the tables of a recipe with the places of images and lists from the root, to be compared."""
    found = dict(tables)
    for section, keys in _PLACES.items():
        if isinstance(table := found.get(section), Mapping):
            found[section] = table | {key: absolute(table[key]) for key in keys if key in table}
    data = found.get("data")
    if isinstance(data, Mapping) and isinstance(pool := data.get("unlabeled"), Mapping):
        placed = {key: absolute(pool[key]) for key in ("parquet", "webdataset") if key in pool}
        found["data"] = data | {"unlabeled": pool | placed}
    return found


def shaping_keys(recipe: Recipe) -> dict[str, Any]:
    """Return the keys and values of a recipe that shape a result, as `section.key`."""
    return _shaping(recipe.to_dict())


# What a supervised run and those measured against it, of the same student, have in common, by the beginning of a key.
_COMPARABLE = (
    *("student.", "data.", "partition.", "eval.", "method.class_balance", "method.ohem"),
    *("optim.steps", "optim.epochs", "optim.batch_size"),
)
_NOT_COMPARED = ("data.unlabeled", "partition.seed")


def comparable_keys(recipe: Recipe) -> dict[str, Any]:
    """Return the keys and values in which a run and a baseline of the same student must agree, as `section.key`."""
    return {
        key: value
        for key, value in shaping_keys(recipe).items()
        if key.startswith(_COMPARABLE) and not key.startswith(_NOT_COMPARED)
    }


def _shaping(tables: Mapping) -> dict[str, Any]:
    flat, free = flatten(with_places(tables)), FREE_KEYS
    with contextlib.suppress(UserError):  # a data set of a package that is not here: its root counts
        if DATASETS.get(str(flat.get("data.name"))).same_everywhere:
            free = FREE_KEYS | {"data.root"}
    return {key: value for key, value in flat.items() if key not in free}


def save_model(folder: Path, network: nn.Module, recipe: Recipe) -> None:
    """Write a network, and the recipe that says how it predicts, into a folder."""
    network.save(folder)
    write_text(folder / "recipe.toml", recipe.to_toml())


def keep_best(folder: Path, network: nn.Module, recipe: Recipe, step: int, miou: float) -> None:
    """Keep the weights of the highest val mIoU so far in `best/`, apart from `model/`, the last ones.

    Being chosen on the images that it is reported on, this result is optimistic.

    Args:
        folder: of the run.
        network: segmenter.
        recipe: of the run.
        step: after which `miou` was measured.
        miou: on val, %.
    """
    there = best_so_far(folder)
    if there is None or miou > there["miou"]:
        save_model(folder / "best", network, recipe)
        write_json(folder / "best" / "metrics.json", {"step": step, "miou": miou})


def best_so_far(folder: Path) -> dict[str, Any] | None:
    """Return step and val mIoU of what `keep_best` kept, or None."""
    path = folder / "best" / "metrics.json"
    return read_json(path, ("step", "miou")) if path.exists() else None
