"""Prediction of whole images: at once or by a sliding window; the confusion matrix of a data set."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mgd.errors import explained, some
from mgd.metrics import confusion_matrix
from mgd.models.segmenter import check_finite
from mgd.sections import Eval


def predict(model: nn.Module, image: Tensor, section: Eval, crop: int) -> Tensor:
    """Predict classes, with the recipe's test-time scales and flip.

    Args:
        model: segmenter in eval mode.
        image: `[B, 3, H, W]`, pixel values 0..255.
        section: the recipe's `[eval]`.
        crop: side of the sliding window when `section.crop` is left out, pixels.

    Returns:
        `[B, H, W]` int64 classes.
    """
    return predict_scores(model, image, section, crop).argmax(dim=1)


def predict_scores(model: nn.Module, image: Tensor, section: Eval, crop: int) -> Tensor:
    """Predict how well each class fits, with the recipe's test-time scales and flip.

    Args:
        model: segmenter in eval mode.
        image: `[B, 3, H, W]`, pixel values 0..255.
        section: the recipe's `[eval]`.
        crop: side of the sliding window when `section.crop` is left out, pixels.

    Returns:
        `[B, K, H, W]`: logits, whose softmax is the probabilities; of several scales or mirrored images, the
        logarithm of the mean probabilities.

    Raises:
        UserError: the network gives values that are no number, of which argmax would make class 0.
    """
    found = _scores(model, image, section, crop)
    check_finite(found)
    return found


def _scores(model: nn.Module, image: Tensor, section: Eval, crop: int) -> Tensor:
    if section.scales == (1.0,) and not section.flip:
        return predict_logits(model, image, section, crop)
    size, total, count = image.shape[-2:], 0.0, 0
    for seen, mirrored in views(image, section.scales, section.flip):
        logits = predict_logits(model, seen, section, crop)
        logits = logits.flip(-1) if mirrored else logits
        logits = functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        total, count = total + logits.softmax(dim=1), count + 1
    return (total / count).clamp(min=1e-12).log()


def views(image: Tensor, scales: Sequence[float], flip: bool) -> Iterator[tuple[Tensor, bool]]:
    """Yield an image as it is seen at test time: at each scale, and mirrored left to right too.

    Args:
        image: `[B, 3, H, W]`, pixel values 0..255.
        scales: factors of its sides.
        flip: yield each scale mirrored, too.

    Yields:
        `[B, 3, h, w]` float, and whether it is mirrored.
    """
    for scale in scales:
        scaled = image.float()
        if scale != 1.0:
            size = [max(1, round(side * scale)) for side in image.shape[-2:]]
            scaled = functional.interpolate(scaled, size=size, mode="bilinear", align_corners=False)
        yield scaled, False
        if flip:
            yield scaled.flip(-1), True


def predict_logits(model: nn.Module, image: Tensor, section: Eval, crop: int) -> Tensor:
    """Predict a batch of images of one size, at one scale.

    Args:
        model: segmenter in eval mode.
        image: `[B, 3, H, W]`, pixel values 0..255.
        section: the recipe's `[eval]`.
        crop: side of the sliding window when `section.crop` is left out, pixels.

    Returns:
        `[B, K, H, W]` logits; where windows overlap, their mean.
    """
    if section.mode == "whole":
        return model(image).logits
    side = section.crop or crop
    height, width = image.shape[-2:]
    corners = list(itertools.product(_starts(height, side, section.stride), _starts(width, side, section.stride)))
    total, count = None, image.new_zeros((1, 1, height, width), dtype=torch.float32)
    for top, left in corners:
        rows, columns = slice(top, min(top + side, height)), slice(left, min(left + side, width))
        logits = model(image[..., rows, columns]).logits
        if total is None:
            total = logits.new_zeros((*logits.shape[:2], height, width))
        total[..., rows, columns] += logits
        count[..., rows, columns] += 1
    return total / count


def _starts(length: int, side: int, stride: float) -> list[int]:
    """Window positions along one axis; the last window ends with the image."""
    if length <= side:
        return [0]
    number = math.ceil((length - side) / (side * stride)) + 1
    return sorted({min(round(place * side * stride), length - side) for place in range(number)})


@torch.inference_mode()
def count_confusion(
    model: nn.Module,
    loader: Iterable,
    num_classes: int,
    section: Eval,
    crop: int,
    device: torch.device,
    keep: Callable[[str, Tensor], None] | None = None,
) -> Tensor:
    """Run a model over labelled images.

    Args:
        model: segmenter in eval mode, on `device`.
        loader: lists of `(id, image [3, H, W], label [H, W])`.
        num_classes: K.
        section: the recipe's `[eval]`.
        crop: sliding window when `section.crop` is left out, pixels.
        device: where to compute.
        keep: called with the id and the predicted classes `[H, W]` of each image.

    Returns:
        `[K, K]` int64 confusion matrix on `device`.

    Raises:
        UserError: an image cannot be predicted.
    """
    total = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    for items in loader:
        for _, group in itertools.groupby(items, key=lambda item: item[1].shape):
            names, images, labels = zip(*group, strict=True)
            remedy = (
                "try --set eval.batch_size=1, or evaluate the model by stages/evaluate.py with --set eval.mode=slide"
            )
            with explained(f"{some(names)} cannot be predicted", remedy):
                classes = predict(model, torch.stack(images).to(device), section, crop)
            total += confusion_matrix(classes, torch.stack(labels).to(device), num_classes)
            for name, prediction in zip(names, classes.cpu(), strict=True) if keep else ():
                keep(name, prediction)
    return total
