"""Choosing which images to label: pure functions of tensors, indices out."""

import heapq

import torch
from torch import Tensor
from torch.nn import functional

from mgd.errors import UserError

CANDIDATES_PER_PICK = 4  # most disagreed-about images among which coverage chooses, for each one wanted
_BLOCK = 1024  # images whose first gains are computed at once
_DIGITS = 9  # of two images nearest to each other, either adds the same; the order of sums must not choose


def cover(features: Tensor, budget: int, labeled: Tensor | None = None) -> list[int]:
    """Choose the images that stand for all of them best: greedy facility location.

    A set S is worth the sum over all images of the cosine to their nearest member of S or of `labeled`. Each pick adds
    the most (Nemhauser et al., Math. Programming 1978: at least 1 - 1/e of the best), so a larger budget begins with
    the smaller one's picks. With few labels such a mean of similarities serves better than the largest distance, by
    which k-center (Sener and Savarese, ICLR 2018) collects outliers first: Bae et al., ECCV 2024 (arXiv 2407.12212).

    Args:
        features: `[N, C]`, an image each.
        budget: how many are chosen.
        labeled: `[M, C]`, images that have their label already.

    Returns:
        Indices in the order of choice; of equals the first.

    Raises:
        UserError: the budget is larger than N.
    """
    if budget > len(features):
        raise UserError(f"{budget} images cannot be chosen among {len(features)}")
    features = functional.normalize(features.double(), dim=1)
    best = features.new_full((len(features),), -1.0)  # no cosine is less
    if labeled is not None and len(labeled):
        known = functional.normalize(labeled.double(), dim=1)
        best = torch.cat([(block @ known.T).amax(dim=1) for block in features.split(_BLOCK)])
    gains = [(features @ block.T - best[:, None]).clamp(min=0).sum(dim=0) for block in features.split(_BLOCK)]
    # A gain only shrinks as the set grows: an old one is an upper bound, and few need to be computed anew.
    heap = [(-round(gain, _DIGITS), index) for index, gain in enumerate(torch.cat(gains).tolist())]
    heapq.heapify(heap)
    chosen: list[int] = []
    while len(chosen) < budget:
        _, index = heapq.heappop(heap)
        similarity = features @ features[index]
        now = (-round((similarity - best).clamp(min=0).sum().item(), _DIGITS), index)
        if heap and heap[0] < now:
            heapq.heappush(heap, now)
            continue
        chosen.append(index)
        best = torch.maximum(best, similarity)
    return chosen


def disagreement(first: Tensor, second: Tensor) -> float:
    """Return the share of pixels of which two models say different classes.

    Args:
        first: `[H, W]` classes.
        second: `[h, w]` classes; of another size, it is resized (nearest).
    """
    if second.shape != first.shape:
        second = functional.interpolate(second[None, None].float(), size=first.shape, mode="nearest")[0, 0]
    return (first != second).float().mean().item()


def most_uncertain(scores: Tensor, budget: int) -> list[int]:
    """Return the candidates of a choice by uncertainty: the highest scores, several for each image wanted.

    The highest alone would be near-duplicates, of a video above all; `cover` then chooses among these (candidates
    first, diversity second: Zhdanov, arXiv 1901.05954).

    Args:
        scores: `[N]`, one an image.
        budget: how many images are wanted in the end.

    Returns:
        Indices of the min(N, CANDIDATES_PER_PICK * budget) highest scores, in ascending order; of equals the first.
    """
    order = torch.sort(scores, descending=True, stable=True).indices
    return sorted(order[: CANDIDATES_PER_PICK * budget].tolist())
