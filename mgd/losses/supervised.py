"""Losses against hard labels."""

from torch import Tensor
from torch.nn import functional


def cross_entropy(logits: Tensor, label: Tensor, ignore_index: int = 255) -> Tensor:
    """Mean cross-entropy over the labelled pixels (MGD, eq. 1; CPS, eq. 1).

    Args:
        logits: `[B, K, H, W]`.
        label: `[B, H, W]` int64, classes 0..K-1 or `ignore_index`.
        ignore_index: label of pixels that do not count.

    Returns:
        Scalar; 0 when no pixel is labelled, so that a batch of nothing but ignore trains nothing.
    """
    total = functional.cross_entropy(logits, label, ignore_index=ignore_index, reduction="sum")
    return total / (label != ignore_index).sum().clamp(min=1)
