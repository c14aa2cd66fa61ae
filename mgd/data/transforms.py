"""Decoding and joint augmentation of an image and its label."""

import dataclasses

import numpy as np
import PIL.Image
import torch

from mgd.errors import UserError

IGNORE_INDEX = 255
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
            table = np.arange(256)
            table[[value for value, _ in self.remap]] = [index for _, index in self.remap]
            known = (label >= 0) & (label < 256)
            label = np.where(known, table[np.where(known, label, 0)], label)
        wrong = ((label < 0) | (label >= self.num_classes)) & (label != IGNORE_INDEX)
        if wrong.any():
            raise UserError(
                f"mask of {name}: value {label[wrong][0]} is no class; the data set has "
                f"{self.num_classes} classes (0 to {self.num_classes - 1}) and 255 for ignore"
            )
        return label.astype(np.uint8)

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
            return channels[..., 0].astype(np.int64)
        if mask.mode in ("LA", "PA"):
            mask = mask.getchannel(0)
        values = np.asarray(mask)
        if values.dtype.kind == "f" and not (np.isfinite(values) & (values == np.floor(values))).all():
            raise UserError(f"mask of {name} holds fractions; masks are class indices 0, 1, 2, ... and 255 for ignore")
        return values.astype(np.int64)

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


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return an 8-bit RGB image: 16-bit grey is scaled, transparency is laid on white."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("it holds pixels that are no number")
        top = float(values.max(initial=0.0))
        full = max(top, 1.0)
        if image.mode.startswith("I"):  # 32 bits may hold 8 or 16
            full = 255.0 if image.mode == "I" and top <= 255 else 65535.0
        image = PIL.Image.fromarray((values.clip(0, full) * (255.0 / full)).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = PIL.Image.new("RGBA", rgba.size, "white")
        image = PIL.Image.alpha_composite(white, rgba)
    return image.convert("RGB")


def rescale(
    image: PIL.Image.Image, label: np.ndarray | None, factor: float
) -> tuple[PIL.Image.Image, np.ndarray | None]:
    """Resize an image (bilinear) and its label `[H, W]` (nearest) by `factor`."""
    if factor == 1:
        return image, label
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    if label is not None:
        label = np.asarray(PIL.Image.fromarray(label).resize(size, PIL.Image.Resampling.NEAREST))
    return image.resize(size, PIL.Image.Resampling.BILINEAR), label


def augment(
    image: PIL.Image.Image,
    label: np.ndarray | None,
    crop: int,
    scales: tuple[float, ...],
    flip: bool,
    rng: np.random.Generator,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale, crop, pad and flip an image and its label together.

    Only the pixels that the crop keeps are resized. An image smaller than the crop is centred on
    the mean colour, its label on 255.

    Args:
        image: RGB.
        label: `[H, W]` uint8, or None.
        crop: side of the result, pixels.
        scales: factors to choose from.
        flip: mirror half of the images.
        rng: the only source of randomness.

    Returns:
        image `[3, crop, crop]` uint8 and label `[crop, crop]` int64 (or None).
    """
    factor = scales[int(rng.integers(len(scales)))]
    full = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    size = (min(crop, full[0]), min(crop, full[1]))
    corner = [int(rng.integers(full[axis] - size[axis] + 1)) for axis in (0, 1)]
    ratio = (image.width / full[0], image.height / full[1])
    box = (
        corner[0] * ratio[0],
        corner[1] * ratio[1],
        min((corner[0] + size[0]) * ratio[0], image.width),
        min((corner[1] + size[1]) * ratio[1], image.height),
    )
    offset = ((crop - size[0]) // 2, (crop - size[1]) // 2)
    mirrored = flip and rng.random() < 0.5
    canvas = PIL.Image.new("RGB", (crop, crop), MEAN_COLOR)
    canvas.paste(image.resize(size, PIL.Image.Resampling.BILINEAR, box=box), offset)
    pixels = to_tensor(canvas)
    target = None
    if label is not None:
        scaled = PIL.Image.fromarray(label).resize(size, PIL.Image.Resampling.NEAREST, box=box)
        canvas = PIL.Image.new("L", (crop, crop), IGNORE_INDEX)
        canvas.paste(scaled, offset)
        target = torch.from_numpy(np.array(canvas)).long()
    if mirrored:
        pixels = pixels.flip(-1)
        target = None if target is None else target.flip(-1)
    return pixels, target


def to_tensor(image: PIL.Image.Image) -> torch.Tensor:
    """Return an RGB image as `[3, H, W]` uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
