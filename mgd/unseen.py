"""What a run scores on the training images that it had without their masks."""

import json
import math
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets

from mgd.data.datasets import Splits
from mgd.data.images import Images
from mgd.data.partitions import read_manifest
from mgd.data.reading import select_ids
from mgd.errors import UserError, some
from mgd.files import read_json, write_json
from mgd.metrics import Scores
from mgd.recipe import Recipe, load
from mgd.runs import UNLABELED, find_partition, recipe_differences, with_places


def unseen_masks(splits: Splits, model: Path, recipe: Recipe, say: Callable[[str], None]) -> datasets.Dataset:
    """Return the training images that the run of a model folder had without their masks, which the data has.

    Args:
        splits: the data.
        model: the folder.
        recipe: whose data that is.
        say: prints a line.

    Raises:
        UserError: the model belongs to no finished run, that run had other data, or there is no such image.
    """
    if (path := find_partition(model)) is None:
        raise UserError(f"{model} has no partition.json beside it, which says what it was not shown; name a run folder")
    run = path.parent
    if not (run / "metrics.json").exists():
        raise UserError(f"{run}: a run that is not finished; its command goes on with it")
    own = load(run / "recipe.toml")
    keys = {"name", *type(own.data).image_keys()} - ({"root"} if type(own.data).same_everywhere else set())
    mine, theirs = (with_places(one.to_dict())["data"] for one in (recipe, own))
    if other := sorted(key for key in keys if mine.get(key) != theirs.get(key)):
        raise UserError(
            f"[data] {other[0]} = {mine.get(other[0])!r}, but {theirs.get(other[0])!r} in {run}/recipe.toml; which "
            "masks it had is known of its own data only"
        )
    names = set(read_manifest(path).unlabeled).intersection(splits.labeled["id"])
    for name, teacher in own.teachers.items():
        found = find_partition(teacher.checkpoint) if teacher.checkpoint else None
        if found and (shown := names.intersection(read_manifest(found).labeled)):
            say(f"note: {len(shown)} images are left out, as [teachers.{name}] learned from their masks")
            names -= shown
    if not names:
        raise UserError(
            f"{run}: no image of its unlabelled list (partition.json) has a mask in [data] that neither it nor a "
            "teacher of it was shown; there is nothing to score"
        )
    return select_ids(splits.labeled, names)


def note_learned(model: str | Path, ids: Iterable[str], say: Callable[[str], None]) -> None:
    """Say how many images that a network is scored on have the names of those whose masks its run learned from.

    Args:
        model: folder of the network.
        ids: of the images.
        say: prints a line.
    """
    path, names = find_partition(model), list(ids)
    try:
        run = read_manifest(path) if path else None
    except UserError:  # it is damaged, which is no reason not to score
        run = None
    # Its own val images may have names of training images, in a folder of theirs; the run itself looked at those.
    if run and (learned := sorted(set(run.labeled).intersection(names).difference(run.val or ()))):
        say(
            f"note: {len(learned)} of these {len(names)} images have the names of labelled training images of "
            f"{path.parent} ({some(learned)}); if they are those, the score is on what it learned from"
        )


def keep_unlabeled(model: Path, recipe: Recipe, scores: Scores, images: Images) -> str:
    """Keep what a run's last weights score on those images in `unlabeled.json`, for the report.

    Args:
        model: folder of the weights.
        recipe: what they were scored with.
        scores: of all images.
        images: that were scored.

    Returns:
        A line that says whether that was done.
    """
    run = find_partition(model).parent
    if model.resolve() != (run / "model").resolve():
        return "not kept: not the last weights of the run"
    differences = recipe_differences(load(run / "recipe.toml").to_dict(), recipe)
    if other := [line for line in differences if line.startswith(("eval.", "data.crop", "data.image_scale"))]:
        return f"not kept: {other[0]}"
    if not math.isfinite(scores.miou):
        return "not kept: no labelled pixel"
    try:
        scored = json.dumps([sorted(images.ids), sorted(images.mask_sums().items())])
        found = {"miou": scores.miou, "num_images": len(images), "sum": zlib.crc32(scored.encode())}
        write_json(run / UNLABELED, found)
    except (UserError, OSError) as error:
        return f"not kept: {error}"
    return f"kept in {run / UNLABELED}, for stages/report.py"


def read_unlabeled(run: Path) -> dict[str, Any]:
    """Return what `keep_unlabeled` kept; nothing of a run without it.

    Returns:
        `unlabeled_miou`; `unlabeled_images`, how many these were; `unlabeled_sum`, of their names and of the masks that
        are files, None of an older version.

    Raises:
        UserError: it is damaged.
    """
    path = run / UNLABELED
    if not path.exists():
        return {}
    try:
        found = read_json(path, ("miou", "num_images"))
        miou, num_images, scored = found["miou"], found["num_images"], found.get("sum")
        whole = type(num_images) is int and isinstance(scored, int | None)
        if type(miou) in (int, float) and 0 <= miou <= 100 and whole:
            return {"unlabeled_miou": float(miou), "unlabeled_images": num_images, "unlabeled_sum": scored}
    except UserError:
        pass
    raise UserError(f"{path} is damaged; score the run again: stages/evaluate.py --model {run} --split unlabeled")
