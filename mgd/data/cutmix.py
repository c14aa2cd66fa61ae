"""CutMix for segmentation: boxes as in CPS (Chen et al., CVPR 2021), tensors only."""

import math

import torch
from torch import Tensor


def box_masks(
    num_masks: int,
    size: tuple[int, int],
    generator: torch.Generator,
    num_boxes: int = 3,
) -> Tensor:
    """Draw CutMix masks.

    A box's area A is uniform in 0.25 to 0.5 of the image, its height A^u of the side (u uniform in 0..1) and its
    width A^(1 - u), both divided by sqrt(num_boxes); its position is uniform inside the image; boxes of one mask are
    XOR-ed. So do the authors of CPS and of MGD in their code (0.25 to 0.5 "by area", at a random aspect ratio).

    Args:
        num_masks: B.
        size: (H, W), pixels.
        generator: CPU generator, the only source of randomness.
        num_boxes: boxes a mask.

    Returns:
        `[B, 1, H, W]` bool, True where the second image shows.
    """
    height, width = size
    sides = torch.tensor([height, width], dtype=torch.float64)
    draws = torch.rand(num_masks, num_boxes, 2, 2, generator=generator, dtype=torch.float64)
    area, aspect = 0.25 + 0.25 * draws[..., 0, 0], draws[..., 0, 1]
    shares = torch.stack([area**aspect, area ** (1 - aspect)], dim=-1)
    extent = (shares / math.sqrt(num_boxes) * sides).round()
    start = ((sides - extent) * draws[..., 1, :]).round()
    stop = start + extent
    rows, columns = torch.arange(height), torch.arange(width)
    in_rows = (rows >= start[..., 0, None]) & (rows < stop[..., 0, None])  # [B, boxes, H]
    in_columns = (columns >= start[..., 1, None]) & (columns < stop[..., 1, None])  # [B, boxes, W]
    boxes = in_rows[..., :, None] & in_columns[..., None, :]
    return boxes.sum(dim=1, keepdim=True) % 2 == 1


def mix(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
    """Lay the True pixels of `second` over `first`.

    Args:
        first: `[B, C, H, W]`, or classes `[B, H, W]`.
        second: of the same shape.
        mask: `[B, 1, H, W]` bool.

    Returns:
        Of the same shape.
    """
    return torch.where(mask if first.ndim == 4 else mask[:, 0], second, first)
