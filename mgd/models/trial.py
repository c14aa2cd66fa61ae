"""Whether a network can train, tried without a byte of weights before hours are spent on it."""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mgd.errors import UserError, one_line
from mgd.models.backbones import build_backbone
from mgd.models.segmenter import Segmenter, nameless_segmenter
from mgd.sections import ModelSection

Size = tuple[int, int]
"""Height and width, pixels."""


def check_trainable(
    where: str,
    section: ModelSection,
    num_classes: int,
    images: int,
    crop: int,
    several_processes: bool,
    whole: Size | None = None,
) -> Size | None:
    """Try one step without a byte of weights (meta device), and look for the ImageNet weights.

    Args:
        where: the section's place in the recipe, "student" or another of its kind.
        section: the network.
        num_classes: K.
        images: images of one forward pass of one process.
        crop: side of the training crop, pixels.
        several_processes: a parameter without gradient, which they cannot share, is then an error.
        whole: height and width of an image that is evaluated at once, pixels.

    Returns:
        Height and width of the features of a crop, pixels; None where only data can show them.

    Raises:
        UserError: the network cannot train at this size, or its weights cannot be had.
    """
    try:
        size = _try(section, num_classes, images, crop, several_processes, whole)
        if section.pretrained:
            _check_weights(section.backbone, section.output_stride)
        return size
    except UserError as error:  # what builds networks knows them as [student]
        raise UserError(str(error).replace("[student", f"[{where}")) from error


class _NeedsData(Exception):
    """Something that cannot be tried on the meta device, which has no values."""


def _tried(trial: Callable[..., Size | None]) -> Callable[..., Size | None]:
    """Remember what a trial showed, as teachers and students of one recipe are tried twice; None: it needs data."""

    @functools.lru_cache(maxsize=32)
    @functools.wraps(trial)
    def tried(*args: Any) -> Size | None:
        try:
            return trial(*args)
        except _NeedsData:  # which proves nothing
            return None

    return tried


@_tried
def features_size(where: str, section: ModelSection, num_classes: int, crop: int) -> Size | None:
    """Return the height and width of the features that a frozen network has of a training crop, pixels.

    Args:
        where: the network's place in the recipe.
        section: the network.
        num_classes: K.
        crop: side of the crop, pixels.

    Returns:
        None where only data can show it, or the network cannot be built, for which its own run has words.

    Raises:
        UserError: it cannot take such a crop.
    """
    try:
        model = _built(section, num_classes).eval()
    except UserError:
        return None
    try:
        return tuple(model(torch.empty(1, 3, crop, crop, device="meta")).features.shape[-2:])
    except Exception as error:
        _raise_if_meta(error)
        raise UserError(
            f"[{where}] backbone = {section.backbone!r} cannot predict crops of {crop}x{crop}: {one_line(error)}; "
            "choose another [data] crop"
        ) from error


@functools.lru_cache(maxsize=32)
def _check_weights(backbone: str, output_stride: int) -> None:
    build_backbone(backbone, output_stride, pretrained=True)


def _built(section: ModelSection, num_classes: int) -> Segmenter:
    try:
        with torch.device("meta"):
            return nameless_segmenter(section, num_classes)
    except RuntimeError as error:
        _raise_if_meta(error)
        raise


@_tried
def _try(
    section: ModelSection,
    num_classes: int,
    images: int,
    crop: int,
    several_processes: bool,
    whole: Size | None,
) -> Size:
    model = _built(section, num_classes)
    if images == 1 and any(isinstance(module, nn.BatchNorm2d) for module in model.head.modules()):
        raise UserError(
            "[optim] batch_size leaves one image a process and forward pass, on which BatchNorm cannot train; "
            'double it, or use [student.head] norm = "group"'
        )
    pixels = torch.empty(images, 3, crop, crop, device="meta")
    try:
        _try_head(model, *model.train().maps(pixels))
        out = model(pixels)
        out.logits.sum().backward()
    except (UserError, _NeedsData):
        raise
    except Exception as error:
        _raise_if_meta(error)
        raise UserError(
            f"[student] backbone = {section.backbone!r} cannot train on {images} crops of {crop}x{crop}: "
            f"{one_line(error)}; choose another [data] crop or backbone"
        ) from error
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    if idle and several_processes:
        raise UserError(
            f"[student] backbone = {section.backbone!r} has {len(idle)} parameters that its two feature maps do not "
            f"use ({idle[0]}, ...), which cannot train on several processes; choose another backbone"
        )
    try:
        if whole is not None:  # a window is a crop, which has just been tried
            model.eval()(torch.empty(1, 3, *whole, device="meta"))
    except Exception as error:
        _raise_if_meta(error)
        raise UserError(
            f"[student] backbone = {section.backbone!r} cannot predict whole images of {whole[1]}x{whole[0]}, only "
            f'crops of {crop}x{crop}; set [eval] mode = "slide"'
        ) from error
    return tuple(out.features.shape[-2:])


def _try_head(model: Segmenter, low: Tensor, high: Tensor) -> None:
    """Check what a head makes of a backbone's maps.

    Raises:
        UserError: it fails, or returns something else than logits and features.
    """
    title = f"[student.head] name = {model.section.head.name!r}"
    maps = f"maps of {list(low.shape)} and {list(high.shape)}"
    try:
        found = model.head(low, high)
    except Exception as error:
        _raise_if_meta(error)
        raise UserError(
            f"{title} cannot train on {maps}: {one_line(error)}; choose another [data] crop or head"
        ) from error
    parts = found if isinstance(found, tuple) else (found,)
    shapes = [list(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
    wanted = ([low.shape[0], len(model.classes)], [high.shape[0]])
    right = len(shapes) == 2 and all(
        len(shape) == 4 and shape[: len(start)] == start for shape, start in zip(shapes, wanted, strict=True)
    )
    if not right or not parts[0].requires_grad:
        raise UserError(
            f"{title} must return logits [B, K, h, w] with a gradient and features [B, C, h, w]; of {maps} and K = "
            f"{len(model.classes)} it returns {shapes}"
        )


def _raise_if_meta(error: Exception) -> None:
    """Raise `_NeedsData` where it is the meta device that an operation failed for."""
    if isinstance(error, NotImplementedError) or re.search(r"\bmeta\b", str(error)):
        raise _NeedsData from error
