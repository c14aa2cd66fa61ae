"""Which images a run reads, and which it makes its samples of."""

from mgd.data.datasets import Splits
from mgd.data.images import Images
from mgd.data.loaders import TrainingPairs
from mgd.data.partitions import ResolvedPartition
from mgd.data.reading import select_ids
from mgd.data.targets import CachedTargets
from mgd.recipe import Recipe


def training_images(recipe: Recipe, splits: Splits, partition: ResolvedPartition) -> Images:
    """Return all images of a partition, labelled or not, without their masks."""
    ids = partition.labeled + partition.unlabeled
    return Images(select_ids(splits.without_masks(), ids), None, recipe.data.image_scale)


def training_pairs(
    recipe: Recipe, splits: Splits, partition: ResolvedPartition, targets: CachedTargets | None = None
) -> TrainingPairs:
    """Return the samples of a run, but for a stream's images.

    Args:
        recipe: of the run.
        splits: its data.
        partition: which images of these are labelled and unlabelled.
        targets: what cached teachers said, if there are any.
    """
    labeled = Images(select_ids(splits.labeled, partition.labeled), splits.decoder, recipe.data.image_scale)
    if not recipe.method_class.uses_unlabeled or partition.streamed:
        return TrainingPairs(labeled, None, recipe.data, recipe.run.seed)
    pool = unlabeled_images(splits, partition, recipe.data.image_scale)
    return TrainingPairs(labeled, pool, recipe.data, recipe.run.seed, targets)


def unlabeled_images(splits: Splits, partition: ResolvedPartition, image_scale: float) -> Images:
    """Return the unlabelled images; with none left the labelled ones serve as the pool, their masks unseen."""
    return Images(select_ids(splits.without_masks(), partition.unlabeled or partition.labeled), None, image_scale)
