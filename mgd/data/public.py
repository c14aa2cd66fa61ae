"""Readers of PASCAL VOC 2012 and Cityscapes: official folders, a hub data set, or Parquet files."""

import glob
from pathlib import Path
from typing import ClassVar, Literal

import datasets
import pyarrow
from pydantic import model_validator

from mgd.data.datasets import Splits, by_stem, default_colors, existing_folder, paired, table
from mgd.data.lists import read_list
from mgd.data.transforms import LabelDecoder
from mgd.errors import UserError, one_line, some
from mgd.registry import DATASETS
from mgd.sections import DataSection

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)

CITYSCAPES = {  # the 19 classes of the benchmark, by train id: name -> (label id, colour)
    "road": (7, (128, 64, 128)),
    "sidewalk": (8, (244, 35, 232)),
    "building": (11, (70, 70, 70)),
    "wall": (12, (102, 102, 156)),
    "fence": (13, (190, 153, 153)),
    "pole": (17, (153, 153, 153)),
    "traffic light": (19, (250, 170, 30)),
    "traffic sign": (20, (220, 220, 0)),
    "vegetation": (21, (107, 142, 35)),
    "terrain": (22, (152, 251, 152)),
    "sky": (23, (70, 130, 180)),
    "person": (24, (220, 20, 60)),
    "rider": (25, (255, 0, 0)),
    "car": (26, (0, 0, 142)),
    "truck": (27, (0, 0, 70)),
    "bus": (28, (0, 60, 100)),
    "train": (31, (0, 80, 100)),
    "motorcycle": (32, (0, 0, 230)),
    "bicycle": (33, (119, 11, 32)),
}


_SPLITS = ("train", "val")


class PublicSection(DataSection):
    """Keys that the readers of public data sets share; `hub` or `parquet` takes the place of `root`."""

    same_everywhere: ClassVar[bool] = True
    root: str | None = None
    """Official folder."""
    hub: str | None = None
    """Data set on the hub ("org/name") with splits train and val (or validation)."""
    parquet: str | None = None
    """Folder with train*.parquet and val*.parquet."""
    id_column: str = "id"
    """Column of a hub or Parquet table that names the image; the partition lists speak of it."""
    image_column: str = "image"
    """Column of the image."""
    label_column: str = "label"
    """Column of the mask."""

    @model_validator(mode="after")
    def _one_source(self) -> "PublicSection":
        if (self.hub is None) == (self.parquet is None) and (self.hub is not None or self.root is None):
            raise ValueError("give root (official folder), or one of hub and parquet in its place")
        return self

    def class_names(self) -> tuple[str, ...]:
        """Return the K class names, without touching data."""
        return self._coding()[0]

    def load(self) -> Splits:
        """List both splits."""
        if self.hub is None and self.parquet is None:
            labeled, val = self._from_folder(existing_folder(self.root, "[data] root"))
        else:
            labeled, val = self._from_tables()
        unlabeled = table([], [])
        classes, colors, decoder = self._coding()
        return Splits(labeled, unlabeled, val, classes, colors, decoder)

    def _from_tables(self) -> tuple[datasets.Dataset, datasets.Dataset]:
        files = None if self.parquet is None else self._parquet_files()
        try:
            tables = datasets.load_dataset("parquet", data_files=files) if files else datasets.load_dataset(self.hub)
        except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"[data] {self.hub or self.parquet} cannot be loaded: {one_line(error)}") from error
        val = "val" if "val" in tables else "validation"
        if missing := [split for split in ("train", val) if split not in tables]:
            raise UserError(f"[data] {self.hub}: no split {missing[0]}; it has {', '.join(tables)}")
        return self._columns(tables["train"]), self._columns(tables[val])

    def _parquet_files(self) -> dict[str, list[str]]:
        folder = existing_folder(self.parquet, "[data] parquet")
        found = {split: sorted(folder.glob(f"{split}*.parquet")) for split in _SPLITS}
        if missing := [split for split, paths in found.items() if not paths]:
            raise UserError(f"{folder}: no {missing[0]}*.parquet")
        # `load_dataset` takes names for patterns.
        return {split: [glob.escape(str(path)) for path in paths] for split, paths in found.items()}

    def _columns(self, source: datasets.Dataset) -> datasets.Dataset:
        wanted = {self.id_column: "id", self.image_column: "image", self.label_column: "label"}
        if missing := [column for column in wanted if column not in source.column_names]:
            raise UserError(
                f"[data] {self.hub or self.parquet}: no column {missing[0]!r}; it has "
                f"{', '.join(source.column_names)}; see id_column, image_column, label_column"
            )
        source = source.select_columns(list(wanted)).rename_columns({k: v for k, v in wanted.items() if k != v})
        features = {"id": datasets.Value("string"), "image": datasets.Image(), "label": datasets.Image()}
        try:
            return source.cast(datasets.Features({name: features[name] for name in source.column_names}))
        except (TypeError, ValueError, NotImplementedError, pyarrow.ArrowException) as error:
            kinds = ", ".join(f"{name} {kind}" for name, kind in source.features.items())
            raise UserError(
                f"[data] {self.hub or self.parquet}: id must be text, image and label images; they are {kinds}"
            ) from error


@DATASETS.register("voc")
class VOC(PublicSection):
    """PASCAL VOC 2012; `root` is VOCdevkit/VOC2012."""

    masks: Literal["SegmentationClassAug", "SegmentationClass"] = "SegmentationClassAug"
    """Masks of the training images: the augmented 10 582, or the official 1 464."""

    def _from_folder(self, root: Path) -> tuple[datasets.Dataset, datasets.Dataset]:
        images = by_stem(existing_folder(root / "JPEGImages", "VOC images"))
        val_ids = read_list(root / "ImageSets" / "Segmentation" / "val.txt")
        masks = by_stem(existing_folder(root / self.masks, "VOC masks"))
        if self.masks == "SegmentationClass":
            train_ids = read_list(root / "ImageSets" / "Segmentation" / "train.txt")
        else:
            train_ids = sorted(masks.keys() - set(val_ids))
        official = root / "SegmentationClass"
        val_masks = by_stem(official) if official.is_dir() else masks
        return _choose(root, images, masks, train_ids), _choose(root, images, val_masks, val_ids)

    def _coding(self) -> tuple:
        colors = default_colors(21)
        decoder = LabelDecoder(21, colors=colors, ignore_color=(224, 224, 192), palette_is_index=True)
        return VOC_CLASSES, colors, decoder


@DATASETS.register("cityscapes")
class Cityscapes(PublicSection):
    """Cityscapes; `root` holds leftImg8bit/ and gtFine/."""

    label_ids: Literal["labelIds", "labelTrainIds"] = "labelIds"
    """Masks that are read: the official labelIds, or labelTrainIds (of a hub table too)."""

    def _from_folder(self, root: Path) -> tuple[datasets.Dataset, datasets.Dataset]:
        return self._split(root, "train"), self._split(root, "val")

    def _split(self, root: Path, split: str) -> datasets.Dataset:
        images = _city_files(root / "leftImg8bit" / split, "_leftImg8bit")
        masks = _city_files(root / "gtFine" / split, f"_gtFine_{self.label_ids}")
        return _choose(root, images, masks, sorted(images.keys() | masks.keys()))

    def _coding(self) -> tuple:
        remap = ()
        if self.label_ids == "labelIds":
            train_id = {label_id: index for index, (label_id, _) in enumerate(CITYSCAPES.values())}
            remap = tuple((value, train_id.get(value, 255)) for value in range(256))
        colors = tuple(color for _, color in CITYSCAPES.values())
        return tuple(CITYSCAPES), colors, LabelDecoder(19, remap=remap)


def _city_files(folder: Path, suffix: str) -> dict[str, Path]:
    files = by_stem(existing_folder(folder, "Cityscapes"))
    return {path.stem.removesuffix(suffix): path for path in files.values() if path.stem.endswith(suffix)}


def _choose(root: Path, images: dict[str, Path], masks: dict[str, Path], ids: list[str]) -> datasets.Dataset:
    problems = []
    for what, files in (("image", images), ("mask", masks)):
        if missing := [name for name in ids if name not in files]:
            problems.append(f"{root}: {len(missing)} of {len(ids)} have no {what}: {some(missing)}")
    if problems:
        raise UserError("\n".join(problems))
    return paired(images, {name: masks[name] for name in ids})
