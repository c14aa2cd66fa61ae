"""Which images there are to choose from when some are to be labelled; no mask is read."""

import dataclasses
from collections.abc import Collection
from pathlib import Path

import datasets

from mgd.data.datasets import Folder, by_stem, table
from mgd.data.partitions import split
from mgd.data.reading import read_splits
from mgd.errors import UserError
from mgd.sections import DataSection, Partition


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The training images of a data set, as they are before a choice."""

    images: datasets.Dataset
    """Columns `id` and `image`: those that can be chosen."""
    labeled: datasets.Dataset
    """Columns `id` and `image`: those that have a mask already, and keep it."""
    section: DataSection
    """The recipe's `[data]`."""
    painted: tuple[str, ...] = ()
    """Ids of all images of a folder that have a mask, readable or not: a share of these is held out."""
    masks: Path | None = None
    """Folder for the masks of what is chosen; None: they are there, or elsewhere."""

    def lists(self, chosen: Collection[str]) -> tuple[list[str], list[str], list[str]]:
        """Return the ids that a run sees as labelled and as unlabelled once `chosen` have masks, and the held-out ones.

        Of a folder without `val_root` a share of all masks is held out for evaluation; these stand in neither list.
        """
        with_mask = {*self.labeled["id"], *chosen}
        held_out = self.section.held_out({*self.painted, *chosen}) if self.masks else []
        unlabeled = {*self.images["id"]} - with_mask  # [data.unlabeled] joins by itself
        return sorted(with_mask.difference(held_out)), sorted(unlabeled), held_out


def find_candidates(section: DataSection, partition: Partition) -> Candidates:
    """Return the images without a mask; [data.unlabeled] is not among them.

    Where all have one: those of a recipe's own unlabelled list, as if only its labelled list had been painted; without
    such lists all training images.

    Raises:
        UserError: see the readers; or a list does not fit the data.
    """
    if isinstance(section, Folder):  # which may have no mask at all yet
        root = Path(section.root)
        images, masks = section.images(root), root / "masks"
        if not images:
            raise UserError(f"{root / 'images'} holds no image")
        painted = sorted(images.keys() & by_stem(masks).keys()) if masks.is_dir() else []
        if bare := sorted(images.keys() - set(painted)):
            return Candidates(_rows(bare, images), _rows(painted, images), section, tuple(painted), masks)
    splits = read_splits(section)
    everything = splits.labeled.select_columns(["id", "image"])
    if len(splits.unlabeled):
        return Candidates(splits.unlabeled, everything, section)
    if partition.protocol != "files":
        return Candidates(everything, everything.select([]), section)
    places = {name: index for index, name in enumerate(everything["id"])}
    halves = split(partition, list(places), [], seed=0, held_out=splits.val["id"][:])
    unlabeled, labeled = (
        everything.select([places[name] for name in names]) for names in (halves.unlabeled, halves.labeled)
    )
    return Candidates(unlabeled, labeled, section)


def _rows(names: list[str], images: dict[str, Path]) -> datasets.Dataset:
    return table(names, [str(images[name]) for name in names])
