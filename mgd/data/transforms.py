"""Decoding of masks, and joint augmentation of an image and its label."""

import dataclasses
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
from torch.nn import functional

from mgd.errors import UserError, some
from mgd.pictures import to_tensor

IGNORE_INDEX = 255
_MANY_VALUES = 8  # more wrong values than that, and a mask has most likely been through JPEG
_LOSSY = "; or was it saved as JPEG, or resized smoothly? both invent values: make it anew, as PNG"
MEAN_COLOR = (124, 116, 104)  # ImageNet's mean, 0..255: what images are padded with


@dataclasses.dataclass(frozen=True)
class LabelDecoder:
    """Turns the pixels of a mask file into class indices.

    Args:
        num_classes: K; values below it are classes.
        remap: mask value -> class for values that differ (CamVid: 11 -> 255).
        colors: colour table of an RGB-coded mask, one (r, g, b) a class; empty for index masks.
        ignore_color: colour of pixels without a label; any colour outside the table is an error.
        palette_is_index: with `colors`, masks of mode P or L still hold indices (VOC).
    """

    num_classes: int
    remap: tuple[tuple[int, int], ...] = ()
    colors: tuple[tuple[int, int, int], ...] = ()
    ignore_color: tuple[int, int, int] | None = None
    palette_is_index: bool = False

    def __call__(self, mask: PIL.Image.Image, name: str) -> np.ndarray:
        """Decode one mask.

        Returns:
            `[H, W]` uint8, classes 0..K-1 or 255 (ignore).

        Raises:
            UserError: a value or colour outside the classes, naming the image and the value.
        """
        by_color = self.colors and not (self.palette_is_index and mask.mode in ("P", "L"))
        label = self._from_colors(mask, name) if by_color else self._from_indices(mask, name)
        if self.remap:
            table = np.arange(256, dtype=np.uint8)
            table[[value for value, _ in self.remap]] = [index for _, index in self.remap]
            if label.dtype == np.uint8:
                label = table[label]
            else:
                known = (label >= 0) & (label < 256)
                label = np.where(known, table[np.where(known, label, 0)], label)
        if label.dtype == np.uint8:
            wrong = label + np.uint8(1) > self.num_classes  # 255, to be ignored, becomes 0
        else:
            wrong = ((label < 0) | (label >= self.num_classes)) & (label != IGNORE_INDEX)
        if wrong.any():
            values = [str(value) for value in np.unique(label[wrong])]
            which = f"value {values[0]} is" if len(values) == 1 else f"values {some(values)} are"
            raise UserError(
                f"mask of {name}: {which} no class; the data set has {self.num_classes} classes "
                f"(0 to {self.num_classes - 1}) and 255 for ignore; in a folder of yours name every class in [data] "
                "classes, or grey values in [data] colors, v being [v, v, v], and what has no label in ignore_color"
                + (_LOSSY if len(values) > _MANY_VALUES else "")
            )
        return label.astype(np.uint8, copy=False)

    def encode(self, classes: np.ndarray) -> np.ndarray:
        """Return the mask values of predicted classes, the inverse of `remap` (Cityscapes: labelIds).

        Args:
            classes: `[H, W]`, 0..K-1.
        """
        table = np.arange(self.num_classes)
        for value, index in reversed(self.remap):
            if index < self.num_classes:
                table[index] = value
        return table[classes].astype(np.uint8)

    def _from_indices(self, mask: PIL.Image.Image, name: str) -> np.ndarray:
        if mask.mode in ("RGB", "RGBA", "CMYK", "YCbCr"):
            channels = np.asarray(mask.convert("RGB"))
            if (channels != channels[..., :1]).any():
                raise UserError(f"mask of {name} is a colour image; give [data] colors, one [r, g, b] a class")
            return channels[..., 0]
        if mask.mode in ("LA", "PA"):
            mask = mask.getchannel(0)
        values = np.asarray(mask)
        if values.dtype.kind == "f" and not (np.isfinite(values) & (values == np.floor(values))).all():
            raise UserError(f"mask of {name} holds fractions; masks are class indices 0, 1, 2, ... and 255 for ignore")
        return values if values.dtype == np.uint8 else values.astype(np.int64)  # 8 bits, as nearly all, are left alone

    def _from_colors(self, mask: PIL.Image.Image, name: str) -> np.ndarray:
        rgb = np.asarray(mask.convert("RGB")).astype(np.int64)
        code = (rgb[..., 0] << 16) | (rgb[..., 1] << 8) | rgb[..., 2]
        label = np.full(code.shape, -1, np.int64)
        for index, (red, green, blue) in enumerate(self.colors):
            label[code == (red << 16 | green << 8 | blue)] = index
        if self.ignore_color is not None:
            red, green, blue = self.ignore_color
            label[code == (red << 16 | green << 8 | blue)] = IGNORE_INDEX
        if (label < 0).any():
            color = rgb[label < 0][0].tolist()
            raise UserError(
                f"mask of {name}: colour {color} is not in [data] colors; add it, or name it in ignore_color"
            )
        return label


class View(NamedTuple):
    """What a crop shows of an image. Whatever else is cut with the same view stays aligned with the image."""

    box: tuple[int, int, int, int]
    """Left, top, right, bottom of what is shown, pixels of the image."""
    size: tuple[int, int]
    """Width and height that the box is resized to."""
    offset: tuple[int, int]
    """Left and top of the resized box in the crop; the rest of the crop is padding."""
    mirrored: bool
    """The crop is then flipped left to right."""


def draw_view(
    width: int, height: int, crop: int, scales: tuple[float, ...], flip: bool, rng: np.random.Generator
) -> View:
    """Draw a scale, a place and a flip for an image of this size.

    Args:
        width: of the image, pixels.
        height: of the image, pixels.
        crop: side of the result, pixels.
        scales: factors to choose from.
        flip: mirror half of the images.
        rng: the only source of randomness.
    """
    choice, *places, turn = rng.random(4).tolist()  # in one call: each of its own takes long when caches are cold
    factor = scales[int(choice * len(scales))]
    wanted = max(1, round(crop / factor))
    corner, side, size = [], [], []
    for length, place in zip((width, height), places, strict=True):
        side.append(min(length, wanted))
        corner.append(int(place * (length - side[-1] + 1)))
        size.append(crop if length >= wanted else min(crop, max(1, round(length * factor))))
    box = (corner[0], corner[1], corner[0] + side[0], corner[1] + side[1])
    offset = ((crop - size[0]) // 2, (crop - size[1]) // 2)
    return View(box, (size[0], size[1]), offset, flip and turn < 0.5)


def augment(
    image: PIL.Image.Image, label: np.ndarray | None, crop: int, view: View
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cut a view from an image (bilinear) and its label (nearest).

    Only the box is touched. Padding is the mean colour in the image, 255 in the label.

    Args:
        image: RGB.
        label: `[H, W]` uint8, or None; rows below the box may be missing.
        crop: side of the result, pixels.
        view: what to cut, drawn for this image and crop.

    Returns:
        image `[3, crop, crop]` uint8 and label `[crop, crop]` int64 (or None).
    """
    pixels = _pad(_resized(image.crop(view.box), view.size), crop, view, torch.tensor(MEAN_COLOR).view(3, 1, 1))
    target = None if label is None else cut_label(label, crop, view)
    return pixels.flip(-1) if view.mirrored else pixels, target


def cut_label(label: np.ndarray, crop: int, view: View) -> torch.Tensor:
    """Cut a view from a map of classes (nearest); see `augment`.

    Returns:
        `[crop, crop]` int64.
    """
    columns, rows = (_nearest(*view.box[axis::2], view.size[axis]) for axis in (0, 1))
    target = _pad(torch.from_numpy(label[rows][:, columns]), crop, view, IGNORE_INDEX)
    return (target.flip(-1) if view.mirrored else target).long()


def _resized(image: PIL.Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """Return an RGB image as `[3, H, W]` uint8 of another size: PIL's bilinear, at half of its time."""
    if image.size == size:
        return to_tensor(image)
    # Channels last as they come: torch reads that in place, has a kernel for bytes, and answers channel by channel.
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return functional.interpolate(pixels, size[::-1], mode="bilinear", antialias=True)[0].contiguous()


def _nearest(first: int, last: int, size: int) -> np.ndarray:
    """Return the pixel of `first`..`last - 1` under the centre of each of `size` pixels, in whole numbers."""
    return first + (2 * np.arange(size) + 1) * (last - first) // (2 * size)


def _pad(values: torch.Tensor, crop: int, view: View, padding: torch.Tensor | int) -> torch.Tensor:
    """Lay `[..., H, W]` on `[..., crop, crop]` of `padding`, where the view has it."""
    if view.size == (crop, crop):
        return values
    (left, top), (width, height) = view.offset, view.size
    canvas = values.new_empty(*values.shape[:-2], crop, crop)
    canvas[:] = padding
    canvas[..., top : top + height, left : left + width] = values
    return canvas
