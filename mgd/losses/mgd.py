"""The three distillation losses of MGD (Qin et al., ECCV 2022): pixel, image and region level."""

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional

from mgd.losses.supervised import IGNORE_INDEX, cross_entropies, total_weight


def pixel_level(
    student_logits: Tensor, targets: Sequence[Tensor], weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """L_P, eq. 2: cross-entropy against what each teacher says; the loss is the sum over the teachers.

    With class probabilities in place of labels (not in the paper) its gradient is that of the KL divergence (Hinton et
    al., 2015, temperature 1).

    Args:
        student_logits: `[B, K, H, W]`.
        targets: of N teachers their argmax `[B, H, W]` int64, 255 where it does not count, or their class
            probabilities `[B, K, H, W]`, all 0 there; no gradient flows into them.
        weights: `[K]`, how much a pixel that is given to a class counts; left out, all the same.

    Returns:
        `[N]`, (weighted) means over pixels, 0 where none counts; and `[N]`, what these pixels count together.
    """
    if targets[0].ndim == 3:
        totals = [total_weight(label, IGNORE_INDEX, weights) for label in targets]
        return cross_entropies(student_logits, targets, IGNORE_INDEX, weights), torch.stack(totals)
    probabilities = torch.stack(list(targets)).detach()  # [N, B, K, H, W]; a copy: autograd keeps no inference tensors
    if weights is not None:
        probabilities = probabilities * weights[:, None, None]
    logarithms, totals = student_logits.log_softmax(dim=1), probabilities.sum(dim=(1, 2, 3, 4))
    sums = torch.stack([(target * logarithms).sum() for target in probabilities])  # one product at a time
    return -sums / totals.where(totals > 0, 1), totals


def image_level(student_logits: Tensor, teacher_logits: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """L_I, eq. 3-4: L1 distance of the globally average-pooled predictions.

    Args:
        student_logits: `[B, K, H, W]`.
        teacher_logits: `[B, K, H, W]`.
        reduction: "mean" over batch and classes (paper), or "sum" over both (authors' code).

    Returns:
        Scalar.

    Raises:
        ValueError: another reduction.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction = {reduction!r}; choices: mean, sum")
    student, teacher = (reduce(logits, "b k h w -> b k", "mean") for logits in (student_logits, teacher_logits))
    distance = (student - teacher.detach()).abs()
    return distance.mean() if reduction == "mean" else distance.sum()


def region_level(student_features: Tensor, teacher_features: Tensor, grid: int = 7) -> Tensor:
    """L_R, eq. 5-6: mean squared difference of the self-correlations of grid x grid regions.

    Args:
        student_features: `[B, C, H, W]`, the decoder map before the classifier.
        teacher_features: `[B, C', H', W']`; channels and size may differ from the student's.
        grid: regions a side.

    Returns:
        Scalar, mean over batch and the grid^2 x grid^2 pairs of regions.
    """
    student = self_correlation(student_features, grid)
    teacher = self_correlation(teacher_features.detach(), grid)
    return functional.mse_loss(student, teacher)


def self_correlation(features: Tensor, grid: int) -> Tensor:
    """Eq. 5: cosine similarity between all pairs of average-pooled regions.

    Args:
        features: `[B, C, H, W]`.
        grid: regions a side.

    Returns:
        `[B, grid * grid, grid * grid]`.
    """
    with torch.autocast(features.device.type, enabled=False):  # differences of cosines drown in bf16
        regions = functional.normalize(rearrange(pool_regions(features, grid), "b c i j -> b (i j) c"), dim=-1)
        return regions @ regions.transpose(1, 2)


def pool_regions(features: Tensor, grid: int) -> Tensor:
    """Average features over grid x grid regions, in at least float32; what is pooled already stays as it is.

    Args:
        features: `[B, C, H, W]`.
        grid: regions a side.

    Returns:
        `[B, C, grid, grid]`.
    """
    precise = features if features.dtype == torch.float64 else features.float()
    return functional.adaptive_avg_pool2d(precise, grid)
