"""Losses against hard labels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

IGNORE_INDEX = 255
"""Label of pixels that do not count."""


def cross_entropy(logits: Tensor, label: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Mean cross-entropy over the labelled pixels (MGD, eq. 1; CPS, eq. 1).

    Args:
        logits: `[B, K, H, W]`.
        label: `[B, H, W]` int64, classes 0..K-1 or `ignore_index`.
        ignore_index: label of pixels that do not count.

    Returns:
        Scalar; 0 when no pixel is labelled, so that a batch of nothing but ignore trains nothing.
    """
    return cross_entropies(logits, [label], ignore_index)[0]


def class_weights(pixels: Tensor, exponent: float) -> Tensor:
    """Weights that let rare classes count more: (median frequency / frequency) ** exponent.

    With an exponent of 1, median frequency balancing (Eigen and Fergus, ICCV 2015, 6.3.2), except that a frequency is
    counted over all labelled pixels, there over the images that show the class; the median is that of the classes.

    Args:
        pixels: `[K]`, labelled pixels of each class; one that has none weighs 1, and is not in the median.
        exponent: 0 (all weigh the same) to 1.

    Returns:
        `[K]` float32, at most 20, lest a class of a few pixels ever be all that counts.
    """
    seen = pixels > 0
    assert seen.any(), "no labelled pixel"
    ratio = pixels[seen].double().quantile(0.5) / pixels.double()
    return ratio.pow(exponent).clamp(max=20).where(seen, 1.0).float()


def total_weight(label: Tensor, ignore_index: int, weights: Tensor | None = None) -> Tensor:
    """What the pixels of a label map `[B, H, W]` count together: their number, or the sum of their classes' weights."""
    counted = label != ignore_index
    return (counted if weights is None else weights[label.where(counted, 0)] * counted).sum()


def cross_entropies(
    logits: Tensor, labels: Sequence[Tensor], ignore_index: int = IGNORE_INDEX, weights: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of one prediction against each of N label maps.

    Of the logits' size, nothing is kept for the backward pass but the logits, and nothing made there
    but their gradient, whatever N; a log-softmax for each label map would cost three such tensors each.

    Args:
        logits: `[B, K, H, W]`.
        labels: N tensors `[B, H, W]` int64, classes 0..K-1 or `ignore_index`.
        ignore_index: label of pixels that do not count.
        weights: `[K]`, how much a pixel of each class counts; left out, all the same.

    Returns:
        `[N]`, (weighted) means; 0 where no pixel is labelled.
    """
    return _CrossEntropies.apply(logits, torch.stack(list(labels)), ignore_index, weights)


class _CrossEntropies(torch.autograd.Function):
    """-log softmax(z)[y] = logsumexp(z) - z[y]; its gradient is softmax(z) - onehot(y)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, weights: Tensor | None) -> Tensor:
        counted = labels != ignore_index
        index = labels.where(counted, 0)  # `gather` wants a class everywhere
        shares = counted if weights is None else weights[index] * counted
        totals = shares.sum(dim=(1, 2, 3))
        totals = totals.where(totals > 0, 1)
        normalizer = logits.logsumexp(dim=1)
        losses = []
        for n in range(len(labels)):
            loss = (normalizer - logits.gather(1, index[n, :, None])[:, 0]).where(counted[n], 0.0)
            losses.append((loss if weights is None else loss * shares[n]).sum() / totals[n])
        ctx.save_for_backward(logits, normalizer, index, shares, totals)
        return torch.stack(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, normalizer, index, shares, totals = ctx.saved_tensors
        weights = (grad / totals)[:, None, None, None] * shares  # [N, B, H, W]
        result = (logits - normalizer[:, None]).exp_().mul_(weights.sum(dim=0)[:, None])
        for n in range(len(index)):
            result.scatter_add_(1, index[n, :, None], -weights[n, :, None].to(result.dtype))
        return result, None, None, None


def ohem_cross_entropy(
    logits: Tensor,
    label: Tensor,
    threshold: float = 0.7,
    min_kept: int = 50_000,
    ignore_index: int = IGNORE_INDEX,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
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
        weights: `[K]`, how much a pixel of each class counts in the mean (which are kept does not depend on it); left
            out, all the same.

    Returns:
        Scalar, (weighted) mean over the kept pixels, 0 when no pixel is labelled; and how many were kept, or the sum of
        their weights.
    """
    loss = functional.cross_entropy(logits, label, ignore_index=ignore_index, reduction="none")
    valid = label != ignore_index
    loss = loss[valid]
    each = None if weights is None else weights[label[valid]]
    if loss.numel() > min_kept:
        # p <= threshold is loss >= -log(threshold); the k-th smallest p is the k-th largest loss.
        bar = loss.new_tensor(threshold).log().neg()
        if min_kept > 0:
            bar = torch.minimum(bar, loss.detach().topk(min_kept).values[-1])
        hard = loss.detach() >= bar
        loss, each = loss[hard], None if each is None else each[hard]
    if each is None:
        return loss.sum() / max(loss.numel(), 1), label.new_tensor(loss.numel())
    total = each.sum()
    return (loss * each).sum() / total.where(total > 0, 1), total
