"""The data of a recipe: read by our readers or a plug-in's, which must keep to a contract, and divided."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Collection

import datasets
import numpy as np

from mgd.data.datasets import Splits
from mgd.data.images import Images
from mgd.data.partitions import ResolvedPartition, split
from mgd.data.stream import whole_pool
from mgd.errors import UserError, one_line, some
from mgd.sections import DataSection, Partition

_TEXT, _IMAGE = datasets.Value("string"), datasets.Image()
_COLUMNS = {
    "labeled": {"id": _TEXT, "image": _IMAGE, "label": _IMAGE},
    "unlabeled": {"id": _TEXT, "image": _IMAGE},
    "val": {"id": _TEXT, "image": _IMAGE, "label": _IMAGE},
}


def load_splits(section: DataSection) -> Splits:
    """Load the data of a recipe; runs of one comparison share it.

    Raises:
        UserError: see the readers; or there is nothing to evaluate on.
    """
    return _load_splits(without_augmentation(section))


def without_augmentation(section: DataSection) -> DataSection:
    """The section with the keys that only shape batches at one value, so that runs share what is read."""
    return section.model_copy(update={"crop": 32, "scales": (1.0,), "flip": False})


@functools.lru_cache(maxsize=2)
def _load_splits(section: DataSection) -> Splits:
    splits = read_splits(section)
    if section.unlabeled and not section.unlabeled.streaming:
        pool = whole_pool(section.unlabeled)
        unlabeled = datasets.concatenate_datasets([splits.unlabeled, pool])
        splits = dataclasses.replace(splits, unlabeled=unlabeled, pool=tuple(pool["id"]))
    if len(splits.val) == 0:
        raise UserError(f"[data] {section.name}: no validation image; the result of a run is its mIoU on them")
    return splits


def split_data(section: DataSection, partition: Partition, seed: int) -> ResolvedPartition:
    """Draw a partition of the data of a recipe.

    Args:
        section: its `[data]`.
        partition: its `[partition]`.
        seed: of the draw.

    Raises:
        UserError: see `load_splits` and `split`.
    """
    splits = load_splits(section)
    presence = _presence(without_augmentation(section)) if partition.balanced else None
    labeled, unlabeled = list(splits.labeled["id"]), list(splits.unlabeled["id"])
    return split(partition, labeled, unlabeled, seed, presence, section.name, splits.pool, splits.val["id"][:])


@functools.lru_cache(maxsize=2)
def _presence(section: DataSection) -> dict[str, np.ndarray]:
    """Return the classes that each image with a mask shows: id -> `[K]` bool."""
    splits = _load_splits(section)
    images, found = Images(splits.labeled, splits.decoder), {}
    for index, name in enumerate(images.ids):
        try:
            values = np.unique(images.read(index, with_label=True)[1])
        except UserError:
            if section.on_error == "raise":
                raise
            values = np.array([])  # shows nothing; if it is drawn all the same, it is skipped then
        found[name] = np.isin(np.arange(len(splits.classes)), values)
    return found


def select_ids(source: datasets.Dataset, ids: Collection[str]) -> datasets.Dataset:
    """Return the rows of these ids, in the table's order."""
    wanted = set(ids)
    return source.select([index for index, name in enumerate(source["id"]) if name in wanted])


def read_splits(section: DataSection) -> Splits:
    """Let a reader read, and check what it returns.

    Args:
        section: the recipe's `[data]`, which is the reader.

    Raises:
        UserError: see the readers; a file cannot be read, or it does not return what `Splits` says.
    """
    title = f"[data] name = {section.name!r}"
    try:
        splits = section.load()
    except OSError as error:
        raise UserError(f"{title}: {one_line(error)}") from error
    if not isinstance(splits, Splits):
        raise UserError(f"{title}: load() must return mgd.data.datasets.Splits, not {type(splits).__name__}")
    for name, columns in _COLUMNS.items():
        table = getattr(splits, name)
        kinds = {key: type(kind) for key, kind in getattr(table, "features", {}).items()}
        if any(kinds.get(key) is not type(kind) for key, kind in columns.items()) or table.features["id"] != _TEXT:
            raise UserError(
                f"{title}: {name} must be a datasets.Dataset with columns {', '.join(columns)}, id text and the others "
                "images; mgd.data.datasets.table makes one"
            )
    for what, tables in {"training": (splits.labeled, splits.unlabeled), "val": (splits.val,)}.items():
        counts = Counter(name for table in tables for name in table["id"][:])
        if twice := [name for name, count in counts.items() if count > 1]:
            raise UserError(f"{title}: ids must be unique, but of the {what} images several are called {some(twice)}")
    if tuple(splits.classes) != tuple(section.class_names()):
        raise UserError(
            f"{title}: class_names() says {some(section.class_names())}, load() {some(splits.classes)}; they must be "
            "the same classes in the same order"
        )
    if len(splits.colors) != len(splits.classes):
        raise UserError(f"{title}: {len(splits.classes)} classes, but {len(splits.colors)} colours; give one a class")
    return splits
