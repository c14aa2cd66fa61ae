"""Mean intersection over union from one confusion matrix."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

FEW_IMAGES = 20
"""Of fewer validation images the mIoU is a rough guide."""


def few_images(count: int) -> str:
    """Return what is to be said of so few validation images; of enough of them nothing, ""."""
    if count >= FEW_IMAGES:
        return ""
    return f"{count} validation image(s); below {FEW_IMAGES} the mIoU is a rough guide"


class Scores(NamedTuple):
    """Scores of a confusion matrix, in percent; NaN for a class that is nowhere."""

    miou: float
    iou: list[float]
    pixel_accuracy: float
    num_predicted: int
    """Classes that were predicted anywhere."""


def confusion_matrix(prediction: Tensor, label: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Count pixels by true and predicted class.

    Args:
        prediction: `[B, H, W]` or any shape, classes 0..K-1.
        label: the same shape, classes 0..K-1 or `ignore_index`.
        num_classes: K.
        ignore_index: pixels of this label do not count, whatever is predicted there.

    Returns:
        `[K, K]` int64, rows true, columns predicted.

    Raises:
        ValueError: a counted label or prediction that is no class.
    """
    on_cpu = label.device.type == "cpu"
    if on_cpu:  # torch's integer arithmetic and count take ten times as long there
        label, prediction = label.numpy(), prediction.numpy()
    counted = label != ignore_index
    label, prediction = label[counted], prediction[counted]
    for what, values in (("label", label), ("prediction", prediction)):
        if len(values) and not (0 <= values.min() and values.max() < num_classes):
            wrong = values[(values < 0) | (values >= num_classes)][0].item()
            raise ValueError(f"{what} {wrong} is no class; they are 0 to {num_classes - 1}, {ignore_index} is ignored")
    cells = num_classes * num_classes
    if on_cpu:
        counts = torch.from_numpy(np.bincount(label.astype(np.int64) * num_classes + prediction, minlength=cells))
    else:
        counts = torch.bincount(label.long() * num_classes + prediction, minlength=cells)
    return counts.view(num_classes, num_classes)


def scores(confusion: Tensor) -> Scores:
    """IoU = TP / (TP + FP + FN) a class; a class with an empty union is left out of the mean.

    Args:
        confusion: `[K, K]` counts, rows true, columns predicted.
    """
    confusion = confusion.cpu().double()  # Apple's GPUs have no doubles
    hit = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hit
    iou = 100 * hit / union  # 0 / 0 is NaN: a class that is neither there nor predicted
    present = ~iou.isnan()
    return Scores(
        miou=iou[present].mean().item() if present.any() else float("nan"),
        iou=iou.tolist(),
        pixel_accuracy=(100 * hit.sum() / confusion.sum()).item(),
        num_predicted=int((confusion.sum(0) > 0).sum()),
    )
