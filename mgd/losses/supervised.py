"""Losses against hard labels."""

import torch
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


def ohem_cross_entropy(
    logits: Tensor, label: Tensor, threshold: float = 0.7, min_kept: int = 50_000, ignore_index: int = 255
) -> Tensor:
    """Cross-entropy over the hard pixels (online hard example mining; the authors' code on Cityscapes).

    A labelled pixel is kept when the probability of its true class is at most `threshold`. When
    fewer than `min_kept` are, the threshold rises to the probability of the min_kept-th hardest
    pixel, and pixels that tie with it are kept too; with fewer labelled pixels all are kept.

    Args:
        logits: `[B, K, H, W]`.
        label: `[B, H, W]` int64, classes 0..K-1 or `ignore_index`.
        threshold: probability of the true class up to which a pixel is hard.
        min_kept: pixels of the whole batch that are kept at the least.
        ignore_index: label of pixels that do not count.

    Returns:
        Scalar, mean over the kept pixels; 0 when no pixel is labelled.
    """
    loss = functional.cross_entropy(logits, label, ignore_index=ignore_index, reduction="none")
    valid = label != ignore_index
    loss = loss[valid]
    if loss.numel() > min_kept:
        # p <= threshold is loss >= -log(threshold); the k-th smallest p is the k-th largest loss.
        bar = loss.new_tensor(threshold).log().neg()
        if min_kept > 0:
            bar = torch.minimum(bar, loss.detach().topk(min_kept).values[-1])
        loss = loss[loss.detach() >= bar]
    return loss.sum() / max(loss.numel(), 1)
