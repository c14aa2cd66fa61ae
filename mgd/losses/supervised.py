"""Losses against hard labels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
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
    return cross_entropies(logits, [label], ignore_index)[0]


def cross_entropies(logits: Tensor, labels: Sequence[Tensor], ignore_index: int = 255) -> Tensor:
    """Mean cross-entropy of one prediction against each of N label maps.

    Of the logits' size, nothing is kept for the backward pass but the logits, and nothing made there
    but their gradient, whatever N; a log-softmax for each label map would cost three such tensors each.

    Args:
        logits: `[B, K, H, W]`.
        labels: N tensors `[B, H, W]` int64, classes 0..K-1 or `ignore_index`.
        ignore_index: label of pixels that do not count.

    Returns:
        `[N]`; 0 where no pixel is labelled.
    """
    return _CrossEntropies.apply(logits, torch.stack(list(labels)), ignore_index)


class _CrossEntropies(torch.autograd.Function):
    """-log softmax(z)[y] = logsumexp(z) - z[y]; its gradient is softmax(z) - onehot(y)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        counted = labels != ignore_index
        counts = counted.sum(dim=(1, 2, 3)).clamp(min=1)
        index = labels.where(counted, 0)  # `gather` wants a class everywhere
        normalizer = logits.logsumexp(dim=1)
        losses = [
            (normalizer - logits.gather(1, index[n, :, None])[:, 0]).where(counted[n], 0.0).sum() / counts[n]
            for n in range(len(labels))
        ]
        ctx.save_for_backward(logits, normalizer, index, counted, counts)
        return torch.stack(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, normalizer, index, counted, counts = ctx.saved_tensors
        weights = (grad / counts)[:, None, None, None] * counted  # [N, B, H, W]
        result = (logits - normalizer[:, None]).exp_().mul_(weights.sum(dim=0)[:, None])
        for n in range(len(index)):
            result.scatter_add_(1, index[n, :, None], -weights[n, :, None].to(result.dtype))
        return result, None, None


def ohem_cross_entropy(
    logits: Tensor, label: Tensor, threshold: float = 0.7, min_kept: int = 50_000, ignore_index: int = 255
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

    Returns:
        Scalar, mean over the kept pixels, 0 when no pixel is labelled; and how many were kept.
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
    return loss.sum() / max(loss.numel(), 1), label.new_tensor(loss.numel())
