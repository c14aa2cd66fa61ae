"""Which images a file is tried on, and which it is calibrated with."""

from collections.abc import Callable
from pathlib import Path

from mgd.checks import check_classes
from mgd.data.images import Images, evaluation_item
from mgd.data.reading import load_splits, split_data
from mgd.errors import UserError
from mgd.export.verify import Sample
from mgd.models.segmenter import Segmenter
from mgd.pictures import evenly, list_pictures, read_picture, rescale, to_tensor
from mgd.recipe import Recipe
from mgd.run_images import unlabeled_images
from mgd.unseen import note_learned


def of_recipe(
    recipe: Recipe, model: Segmenter, folder: Path, count: int, calibrates: bool
) -> tuple[list[Sample], list[Sample] | None, list[str]]:
    """Return labelled val images, images of the unlabelled pool, and what is wrong with those that are left out.

    Args:
        recipe: its `[data]` and `[partition]`.
        model: whose classes the data must have.
        folder: of the model; if its run learned from the val images by name, that is said.
        count: of each, at most; spread evenly.
        calibrates: whether the images of the pool are needed; else there is None in their place.

    Raises:
        UserError: the data is not there, or has other classes.
    """
    splits = load_splits(recipe.data)
    check_classes(splits.classes, model, "the model")
    partition = split_data(recipe.data, recipe.partition, recipe.partition_seed)
    val = Images(splits.val, splits.decoder, model.image_scale)
    note_learned(folder, val.ids, print)
    skips = recipe.data.on_error == "skip"
    tried, problems = _readable(len(val), count, lambda index: Sample(*evaluation_item(val, index)[1:]), skips)
    if not tried:
        raise UserError(f"[data] none of {min(count, len(val))} validation images can be read")
    if not calibrates:
        return tried, None, problems
    pool = unlabeled_images(splits, partition, model.image_scale)
    calibrated, more = _readable(len(pool), count, lambda index: Sample(to_tensor(pool.picture(index))), skips)
    if not calibrated:
        raise UserError(f"[data] none of {min(count, len(pool))} unlabelled images can be read")
    return tried, calibrated, problems + more


def _readable(
    total: int, count: int, read: Callable[[int], Sample], skips: bool = True
) -> tuple[list[Sample], list[str]]:
    """Read up to `count` of `total` images, spread evenly; return them, and what is wrong with others if it `skips`."""
    found, problems = [], []
    for index in evenly(total, count):
        try:
            found.append(read(index))
        except UserError as error:
            if not skips:
                raise
            problems.append(str(error))
    return found, problems


def of_folder(source: str | Path, model: Segmenter, count: int) -> tuple[list[Sample], list[str]]:
    """Return images of a folder, without labels, spread evenly; and what is wrong with those that cannot be read.

    Raises:
        UserError: no image there, or none of those chosen can be read.
    """
    files = list_pictures(source)
    samples, problems = _readable(
        len(files), count, lambda index: Sample(to_tensor(rescale(read_picture(files[index]), model.image_scale)))
    )
    if not samples:
        raise UserError(f"{source}: none of the {len(problems)} images tried can be read; {problems[0]}")
    return samples, problems
