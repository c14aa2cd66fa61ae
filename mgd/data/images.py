"""The images of a table, decoded one by one, and the processes that may do so."""

import os
import signal
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from torch.utils.data import DataLoader, Dataset

from mgd.data.partitions import val_key
from mgd.data.transforms import LabelDecoder
from mgd.errors import UserError
from mgd.pictures import UNREADABLE, decode, rescale, to_rgb, to_tensor


class Images:
    """Random access to decoded images, with labels where they are asked for.

    Args:
        source: columns `id`, `image` and, unless no label is ever asked for, `label`.
        decoder: turns a mask into class indices; None if no label is ever asked for.
        image_scale: factor by which images and labels are resized first.
    """

    def __init__(self, source: datasets.Dataset, decoder: LabelDecoder | None = None, image_scale: float = 1.0) -> None:
        self.ids = list(source["id"])
        for column in {"image", "label"} & set(source.column_names):
            source = source.cast_column(column, datasets.Image(decode=False))
        self._rows = source
        self._without_masks = source.select_columns(["id", "image"])
        self.decoder, self.image_scale = decoder, image_scale

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.ids)

    def path(self, index: int) -> Path | None:
        """Return where an image lies; None of one that is no file of its own."""
        row = self._without_masks[index]["image"]
        return Path(row["path"]) if row["bytes"] is None else None

    def encoded(self, index: int) -> bytes:
        """Return the file of an image as it is.

        Raises:
            UserError: it cannot be read.
        """
        row = self._without_masks[index]["image"]
        try:
            return row["bytes"] if row["bytes"] is not None else Path(row["path"]).read_bytes()
        except OSError as error:
            raise UserError(f"image {self.ids[index]} cannot be read: {error}") from error

    def mask_sums(self) -> dict[str, int]:
        """Return the CRC-32 of every mask that is a file of its own, by id."""
        masks = ((row["id"], row["label"]) for row in self._rows.select_columns(["id", "label"]))
        files = {name: Path(mask["path"]) for name, mask in masks if mask and mask["bytes"] is None}
        return {name: zlib.crc32(path.read_bytes()) for name, path in files.items()}

    def read(
        self, index: int, with_label: bool, last_row: Callable[[int, int], int] | None = None
    ) -> tuple[PIL.Image.Image, np.ndarray | None]:
        """Return the RGB image and its `[H, W]` uint8 label (None unless asked for).

        Args:
            index: which one.
            with_label: read the mask, too.
            last_row: given width and height, how many rows from the top are needed, which saves time; the
                image may be black below, and the label has no more rows. Left out, or with image_scale: all.

        Raises:
            UserError: image or mask cannot be decoded, or their sizes differ.
        """
        name = self.ids[index]
        try:
            row = (self._rows if with_label else self._without_masks)[index]
            if row["image"] is None or (with_label and row["label"] is None):
                raise ValueError("the table holds no image or no mask for it")
            last_row = last_row if self.image_scale == 1 else None
            image = to_rgb(decode(row["image"], last_row))
            mask = decode(row["label"], last_row) if with_label else None
        except UNREADABLE as error:
            raise UserError(f"image {name} cannot be read: {error}") from error
        label = None
        if mask is not None:
            if mask.size != image.size:
                raise UserError(
                    f"mask of {name} is {mask.width}x{mask.height} pixels, its image "
                    f"{image.width}x{image.height}; the two must agree"
                )
            if last_row is not None:
                mask = mask.crop((0, 0, mask.width, last_row(*mask.size)))
            label = self.decoder(mask, name)
        small = rescale(image, self.image_scale)
        if label is not None and small.size != image.size:
            label = np.asarray(PIL.Image.fromarray(label).resize(small.size, PIL.Image.Resampling.NEAREST))
        return small, label

    def picture(self, index: int) -> PIL.Image.Image:
        """Return the RGB image alone; see `read`."""
        return self.read(index, with_label=False)[0]


def evaluation_item(images: Images, index: int) -> tuple[str, torch.Tensor, torch.Tensor]:
    """Return id, image `[3, H, W]` uint8 and label `[H, W]` int64 of a whole image."""
    image, label = images.read(index, with_label=True)
    return images.ids[index], to_tensor(image), torch.from_numpy(label.astype(np.int64))


class EachImage(Dataset):
    """`what(images, index)` of the images at the indices `order`."""

    def __init__(self, images: Images, order: Sequence[int], what: Callable[[Images, int], Any]) -> None:
        self.images, self.order, self.what = images, order, what

    def __len__(self) -> int:
        """Return the number of indices."""
        return len(self.order)

    def __getitem__(self, place: int) -> Any:
        """Return what is asked of one image."""
        return self.what(self.images, self.order[place])


def read_each(images: Images, order: Sequence[int], what: Callable[[Images, int], Any], workers: int) -> Iterator[Any]:
    """Yield `what(images, index)`, as it is, of some images.

    Args:
        images: where they are.
        order: the indices.
        what: is called in a data loading process, if there are any.
        workers: how many of these may be started; for a few images none is.
    """
    workers = min(workers, available_cpus()) if len(order) > 100 else 0  # processes take seconds to start
    return iter(
        DataLoader(
            EachImage(images, order, what),
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=start_worker,
        )
    )


def _as_it_is(item: Any) -> Any:
    return item


def available_cpus() -> int:
    """Cores that this process may use (a container or `taskset` may hide some)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_worker(_: int) -> None:
    """Set up a data loading process."""
    torch.set_num_threads(1)
    # A signal to the whole group is the training process's to answer; it still needs its workers.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def mask_sums(labeled: datasets.Dataset, val: datasets.Dataset) -> dict[str, int]:
    """Return the CRC-32 of the masks that are files, as `ResolvedPartition.masks` has them."""
    return Images(labeled).mask_sums() | {val_key(name): found for name, found in Images(val).mask_sums().items()}
