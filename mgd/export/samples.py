"""Which images a file is tried on, and which it is calibrated with."""

from pathlib import Path

from mgd.checks import check_classes, load_splits, rows_of, split_data
from mgd.data.loaders import EvaluationImages, Images
from mgd.experiment import training_images
from mgd.export.verify import Sample, evenly
from mgd.models.segmenter import Segmenter
from mgd.pictures import list_pictures, read_picture, rescale, to_tensor
from mgd.recipe import Recipe


def of_recipe(recipe: Recipe, model: Segmenter, count: int) -> tuple[list[Sample], list[Sample]]:
    """Return labelled val images, and images of the unlabelled pool.

    Args:
        recipe: its `[data]` and `[partition]`.
        model: whose classes the data must have.
        count: of each, at most; spread evenly.

    Raises:
        UserError: the data is not there, or has other classes.
    """
    splits = load_splits(recipe.data)
    check_classes(splits.classes, model, "the model")
    partition = split_data(recipe, splits)
    ids = partition.unlabeled or partition.labeled
    ids = tuple(ids[index] for index in evenly(len(ids), count))
    val = Images(
        rows_of(splits.val, tuple(splits.val["id"][index] for index in evenly(len(splits.val), count))),
        splits.decoder,
        model.image_scale,
    )
    tried = [Sample(image, label) for _, image, label in map(EvaluationImages(val).__getitem__, range(len(val)))]
    pool = training_images(recipe, splits, partition)
    places = {name: index for index, name in enumerate(pool.ids)}
    read = [to_tensor(pool.read(places[name], with_label=False)[0]) for name in ids]
    return tried, [Sample(image) for image in read]


def of_folder(source: str | Path, model: Segmenter, count: int) -> list[Sample]:
    """Return images of a folder, without labels, spread evenly.

    Raises:
        UserError: no image there, or one that cannot be read.
    """
    files = list_pictures(source)
    samples = []
    for index in evenly(len(files), count):
        small, _ = rescale(read_picture(files[index]), None, model.image_scale)
        samples.append(Sample(to_tensor(small)))
    return samples
