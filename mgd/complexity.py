"""Parameters and multiply-accumulates (MACs), counted without allocating a weight."""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mgd.errors import explained
from mgd.models.segmenter import nameless_segmenter
from mgd.sections import ModelSection


class Cost(NamedTuple):
    """Cost of a forward pass of one image."""

    params_m: float
    """Parameters, millions."""
    gmacs: float
    """10^9 multiply-accumulates: convolutions, plus two for each element that BatchNorm writes (scale
    and shift), which gives the columns of the paper."""
    conv_gmacs: float
    """The same without BatchNorm: torch's own counter, halved."""


def count(module: nn.Module, image: torch.Tensor) -> Cost:
    """Count one module in eval mode; it and the image, `[B, 3, H, W]`, may live on the meta device."""
    elements = 0

    def add(_: nn.Module, __: tuple, output: torch.Tensor) -> None:
        nonlocal elements
        elements += 2 * output.numel()  # scale and shift

    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    handles = [norm.register_forward_hook(add) for norm in norms]
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module.eval()(image)
    for handle in handles:
        handle.remove()
    macs = counter.get_total_flops() / 2
    params = sum(parameter.numel() for parameter in module.parameters())
    return Cost(params / 1e6, (macs + elements) / 1e9, macs / 1e9)


def model_costs(section: ModelSection, num_classes: int, size: int) -> dict[str, Cost]:
    """Count backbone, head and total of a recipe's network.

    Args:
        section: the recipe's `[student]`.
        num_classes: K.
        size: side of the square image, pixels.

    Raises:
        UserError: the network cannot take such an image.
    """
    with torch.device("meta"):
        model = nameless_segmenter(section, num_classes)
    with explained(f"{section.backbone} cannot take {size}x{size} pixels"):
        image = torch.empty(1, 3, size, size, device="meta")
        backbone, total = count(model.backbone, image), count(model, image)
    head = Cost(*(whole - part for whole, part in zip(total, backbone, strict=True)))
    return {"backbone": backbone, "head": head, "total": total}
