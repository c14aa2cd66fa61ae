"""Readers: a folder, or a generator, as `datasets.Dataset`s with columns `id`, `image`, `label`.

A reader is the model of its own `[data]` section with the methods `load` and `class_names`. Ours are registered with
`@DATASETS.register("name")`, those of other packages by the entry-point group `mgd.datasets`.
"""

import dataclasses
import hashlib
import io
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import datasets
import PIL.Image
from pydantic import Field

from mgd.data import shapes
from mgd.data.transforms import LabelDecoder
from mgd.errors import UserError, some
from mgd.pictures import SUFFIXES, pictures_below
from mgd.registry import DATASETS
from mgd.sections import DataSection, Positive

Color = tuple[
    Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)]
]


@dataclasses.dataclass(frozen=True)
class Splits:
    """What a reader returns.

    Args:
        labeled: training images that have a mask (which of them a run may see is the
            partition's choice).
        unlabeled: training images without one; may be empty.
        val: images with masks, for the reported mIoU.
        classes: K class names.
        colors: K colours for overlays and palette PNGs.
        decoder: turns a mask into class indices.
        pool: ids among `unlabeled` that are of `[data.unlabeled]`, which joins later.
    """

    labeled: datasets.Dataset
    unlabeled: datasets.Dataset
    val: datasets.Dataset
    classes: tuple[str, ...]
    colors: tuple[Color, ...]
    decoder: LabelDecoder
    pool: tuple[str, ...] = ()

    def without_masks(self) -> datasets.Dataset:
        """Return all training images, columns `id` and `image`."""
        return datasets.concatenate_datasets([self.labeled.select_columns(["id", "image"]), self.unlabeled])


@DATASETS.register("shapes")
class Shapes(DataSection):
    """Generated images, see mgd/data/shapes.py; nothing is read from disk."""

    num_train: Positive = 300
    """Training images."""
    num_val: Positive = 100
    """Validation images."""
    size: Annotated[int, Field(ge=32, le=1024)] = 96
    """Side of an image, pixels."""
    draw_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the drawing; other seeds are other data sets."""

    def class_names(self) -> tuple[str, ...]:
        """Return the K class names, without touching data."""
        return shapes.CLASSES

    def load(self) -> Splits:
        """Draw both splits."""
        return Splits(
            labeled=self._draw("train", 0, self.num_train),
            unlabeled=table([], []),
            val=self._draw("val", 1_000_000, self.num_val),
            classes=shapes.CLASSES,
            colors=default_colors(len(shapes.CLASSES)),
            decoder=LabelDecoder(len(shapes.CLASSES)),
        )

    def _draw(self, split: str, first: int, count: int) -> datasets.Dataset:
        pairs = [shapes.draw(self.draw_seed, first + index, self.size) for index in range(count)]
        return table(
            [f"{split}-{index:06d}" for index in range(count)],
            [{"bytes": _png(image), "path": None} for image, _ in pairs],
            [{"bytes": _png(label), "path": None} for _, label in pairs],
        )


_CAMVID = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign_symbol": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}


@DATASETS.register("camvid")
class CamVid(DataSection):
    """CamVid in SegNet's layout: train/ trainannot/ val/ valannot/ (test/ testannot/)."""

    same_everywhere: ClassVar[bool] = True
    root: str
    """Folder of CamVid."""
    val_split: Literal["val", "test"] = "val"
    """Split that is evaluated: val or test."""

    def class_names(self) -> tuple[str, ...]:
        """Return the K class names, without touching data."""
        return tuple(_CAMVID)

    def load(self) -> Splits:
        """List both splits."""
        root = existing_folder(self.root, "[data] root")
        return Splits(
            labeled=self._split(root, "train"),
            unlabeled=table([], []),
            val=self._split(root, self.val_split),
            classes=tuple(_CAMVID),
            colors=tuple(_CAMVID.values()),
            decoder=LabelDecoder(len(_CAMVID), remap=((11, 255),)),
        )

    def _split(self, root: Path, name: str) -> datasets.Dataset:
        images = by_stem(existing_folder(root / name, "CamVid images"))
        masks = by_stem(existing_folder(root / f"{name}annot", "CamVid masks"))
        missing = sorted(images.keys() ^ masks.keys())
        if missing:
            raise UserError(f"{root}: {name}/ and {name}annot/ differ: {some(missing)} in one of them only")
        return paired(images, masks)


@DATASETS.register("folder")
class Folder(DataSection):
    """Your own images: images/, masks/ (same stems) and, if you like, unlabeled/."""

    root: str
    """Folder that holds images/, masks/ and perhaps unlabeled/; images without a mask are unlabelled."""
    classes: Annotated[tuple[str, ...], Field(min_length=2, max_length=255)]
    """Class names; mask value i is classes[i], 255 is ignored."""
    colors: tuple[Color, ...] = ()
    """For colour-coded masks: one [r, g, b] a class, a grey value v being [v, v, v]. Left empty, masks hold class
    indices. Pictures of predictions have these colours, unless all are grey."""
    ignore_color: Color | None = None
    """Colour of unlabelled pixels in colour-coded masks."""
    val_root: str | None = None
    """Folder with images/ and masks/ to evaluate on; left out, `val_share` is held out."""
    val_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Chance of an image with a mask to be held out; its name decides, whatever the seed."""

    def class_names(self) -> tuple[str, ...]:
        """Return the K class names, without touching data."""
        return self.classes

    def load(self) -> Splits:
        """List images and masks, and hold out the validation images."""
        self._check_keys()
        images, masks = self._pairs(existing_folder(self.root, "[data] root"))
        if self.val_root is None and len(masks) < 2:
            raise UserError(f"{self.root}: one image with a mask; at least 2 are needed (one to evaluate)")
        held_out = {name: masks.pop(name) for name in self.held_out(masks)}
        val = (images, held_out)
        if self.val_root is not None:
            val = self._pairs(existing_folder(self.val_root, "[data] val_root"))
        pool = sorted(images.keys() - masks.keys() - held_out.keys())
        grey = all(len(set(color)) == 1 for color in self.colors)
        return Splits(
            labeled=paired(images, masks),
            unlabeled=table(pool, [str(images[name]) for name in pool]),
            val=paired(*val),
            classes=self.classes,
            colors=default_colors(len(self.classes)) if grey else self.colors,
            decoder=LabelDecoder(len(self.classes), colors=self.colors, ignore_color=self.ignore_color),
        )

    def images(self, root: Path) -> dict[str, Path]:
        """Return every image of a folder of this layout by id; those of unlabeled/ have it in their id.

        Raises:
            UserError: there is no images/, or two images would share an id.
        """
        images, more = by_stem(existing_folder(root / "images", "images")), root / "unlabeled"
        more = {f"unlabeled/{name}": path for name, path in by_stem(more).items()} if more.is_dir() else {}
        if clash := sorted(more.keys() & images.keys()):
            raise UserError(f"{root}: images/{clash[0]} and {clash[0]} would share an id; rename one")
        return images | more

    def held_out(self, names: Iterable[str]) -> list[str]:
        """Return which of the images that have masks, `names`, are evaluated on: none where `val_root` is.

        An image's own name decides, so that no mask that is added later moves another image from training to
        evaluation or back; but at least one image is held out, and one is left.
        """
        drawn = {name: hashlib.sha256(name.encode()).digest() for name in names}
        ordered = sorted(drawn, key=drawn.get)
        count = sum(int.from_bytes(digest, "big") < self.val_share * 2**256 for digest in drawn.values())
        return [] if self.val_root is not None else ordered[: min(max(1, count), len(ordered) - 1)]

    def _check_keys(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            UserError: names or colours that come twice, or do not match; val_root equal to root.
        """
        used = [*self.colors, *([self.ignore_color] if self.ignore_color else [])]
        problems = {
            f"colors has {len(self.colors)} entries, classes {len(self.classes)}; one colour a class": self.colors
            and len(self.colors) != len(self.classes),
            "classes: a name comes twice": len(set(self.classes)) < len(self.classes),
            "classes: a name is empty, or not one line": any(
                not name.strip() or name.splitlines() != [name] for name in self.classes
            ),
            "colors, ignore_color: a colour comes twice": len(set(used)) < len(used),
            "ignore_color is for colour-coded masks; give colors too": self.ignore_color and not self.colors,
            "val_root is root: the score would be on the training images": self.val_root is not None
            and Path(self.val_root).resolve() == Path(self.root).resolve(),
        }
        for problem, found in problems.items():
            if found:
                raise UserError(f"[data] {problem}")

    def _pairs(self, root: Path) -> tuple[dict[str, Path], dict[str, Path]]:
        images, folder = self.images(root), root / "masks"
        if not folder.is_dir() and root == Path(self.root):
            raise UserError(
                f"the folder {folder} does not exist; stages/choose.py says which images to paint masks for"
            )
        masks = by_stem(existing_folder(folder, "masks"))
        orphans = sorted(masks.keys() - images.keys())
        if orphans:
            raise UserError(f"{root}: masks without an image of the same stem: {some(orphans)}")
        if not masks:
            raise UserError(f"{root / 'masks'}: no mask files ({', '.join(SUFFIXES)})")
        return images, masks


def default_colors(num_classes: int) -> tuple[Color, ...]:
    """Return the colours of the PASCAL VOC palette: class i takes the bits of i, high ones first."""
    colors = []
    for index in range(num_classes):
        red = green = blue = 0
        for bit in range(8):
            red |= (index >> (3 * bit) & 1) << (7 - bit)
            green |= (index >> (3 * bit + 1) & 1) << (7 - bit)
            blue |= (index >> (3 * bit + 2) & 1) << (7 - bit)
        colors.append((red, green, blue))
    return tuple(colors)


def table(ids: list[str], images: list, labels: list | None = None) -> datasets.Dataset:
    """Return a data set of ids, images and labels (paths, or {"bytes", "path"})."""
    columns: dict[str, list] = {"id": ids, "image": images}
    features = {"id": datasets.Value("string"), "image": datasets.Image()}
    if labels is not None:
        columns["label"], features["label"] = labels, datasets.Image()
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def paired(images: dict[str, Path], masks: dict[str, Path]) -> datasets.Dataset:
    """Return the images that have a mask, with it, sorted by id."""
    names = sorted(masks)
    return table(names, [str(images[name]) for name in names], [str(masks[name]) for name in names])


def existing_folder(path: str | Path, what: str) -> Path:
    """Return `path` if it is a folder.

    Raises:
        UserError: it is not; `what` says what was looked for.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{what}: the folder {path} does not exist (paths are relative to the working directory)")
    return path


def by_stem(folder: Path) -> dict[str, Path]:
    """Map relative path without suffix -> file, for the image files below a folder.

    Raises:
        UserError: two share it, a name is no text, or a folder cannot be read.
    """
    found: dict[str, Path] = {}
    for path in pictures_below(folder):
        place = path.relative_to(folder)
        try:
            place.as_posix().encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{folder}: the file name {str(place)!r} is not UTF-8; rename it") from error
        stem = unicodedata.normalize("NFC", place.with_suffix("").as_posix())
        if stem in found:
            raise UserError(f"{folder}: {found[stem].name} and {path.name} share a stem; rename one")
        found[stem] = path
    return found


def _png(array) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(array).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
