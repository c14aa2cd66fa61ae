"""Reading a data set, by our readers or a plug-in's, and what they must return."""

from collections import Counter

import datasets

from mgd.data.datasets import Splits
from mgd.errors import UserError, one_line, some
from mgd.sections import DataSection

_TEXT, _IMAGE = datasets.Value("string"), datasets.Image()
_COLUMNS = {
    "labeled": {"id": _TEXT, "image": _IMAGE, "label": _IMAGE},
    "unlabeled": {"id": _TEXT, "image": _IMAGE},
    "val": {"id": _TEXT, "image": _IMAGE, "label": _IMAGE},
}


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
