"""timm backbones by name, as feature extractors at a chosen output stride."""

import difflib

import timm
import torch
from torch import Tensor, nn

from mgd.errors import UserError, one_line

LOW_LEVEL_STRIDE = 4


def build_backbone(
    name: str, output_stride: int, pretrained: bool = False, multi_grid: tuple[int, ...] = ()
) -> nn.Module:
    """Build a timm backbone that returns two maps: stride 4, and the deepest at `output_stride`.

    Args:
        name: any timm model with `features_only`, e.g. "resnet18d".
        output_stride: 8, 16 or 32.
        pretrained: load timm's weights, from the hub or its cache.
        multi_grid: dilations of the 3x3 convolutions in the blocks of a ResNet's last stage.

    Returns:
        Module for `feature_maps`: `[B, 3, H, W]` -> list of `[B, C, H/4, W/4]` and `[B, C', H/s, W/s]`. It has timm's
        `feature_info` and `pretrained_cfg`.

    Raises:
        UserError: timm lacks the name, the model lacks one of the two strides, or its weights
            cannot be had.
    """
    indices = _indices(name, output_stride)
    try:
        backbone = _create(name, output_stride, pretrained=pretrained, out_indices=indices)
    except Exception as error:
        if not pretrained:
            raise
        raise UserError(
            f"[student] backbone = {name!r}: its ImageNet weights cannot be loaded "
            f"({one_line(error, 160)}); go online once, point HF_HOME at a cache that has "
            "them, or set pretrained = false"
        ) from error
    if multi_grid:
        _apply_multi_grid(backbone, name, multi_grid)
    return backbone


def feature_maps(backbone: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two maps of a backbone with their channels in the second place, where Swin's kind has them last.

    Args:
        backbone: of `build_backbone`.
        pixels: `[B, 3, H, W]`, normalised.

    Returns:
        `[B, C, H/4, W/4]` and `[B, C', H/s, W/s]`.
    """
    low, high = backbone(pixels)
    if getattr(backbone, "output_fmt", None) == "NHWC":
        low, high = low.permute(0, 3, 1, 2), high.permute(0, 3, 1, 2)
    return low, high


def _create(name: str, output_stride: int, **options) -> nn.Module:
    # Many timm families know only their native stride and do not accept the argument at all.
    if output_stride != 32:
        options["output_stride"] = output_stride
    return timm.create_model(name, features_only=True, **options)


def _indices(name: str, output_stride: int) -> tuple[int, int]:
    """Find the two feature maps on the meta device, where no weight is allocated."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5)
        hint = f"closest: {', '.join(near)}" if near else "timm.list_models() has them all"
        raise UserError(f"[student] backbone = {name!r}: timm {timm.__version__} has no such model; {hint}")
    try:
        with torch.device("meta"):
            reductions = list(_create(name, output_stride).feature_info.reduction())
    except Exception as error:
        other = "use output_stride = 32, or " if output_stride != 32 and _fits_at_32(name) else ""
        raise UserError(
            f"[student] backbone = {name!r} cannot return feature maps at output_stride = {output_stride} "
            f"({one_line(error, 160)}); {other}choose another backbone"
        ) from error
    if LOW_LEVEL_STRIDE not in reductions or reductions[-1] != output_stride:
        raise UserError(
            f"[student] backbone = {name!r} has feature strides {reductions}; needed are {LOW_LEVEL_STRIDE} and, "
            f"last, output_stride = {output_stride}; choose a convolutional or hierarchical backbone"
        )
    low_level = max(index for index, value in enumerate(reductions) if value == LOW_LEVEL_STRIDE)
    return low_level, len(reductions) - 1


def _fits_at_32(name: str) -> bool:
    try:
        with torch.device("meta"):
            reductions = list(_create(name, 32).feature_info.reduction())
    except Exception:  # whatever timm raises: it does not fit
        return False
    return LOW_LEVEL_STRIDE in reductions and reductions[-1] == 32


def _apply_multi_grid(backbone: nn.Module, name: str, multi_grid: tuple[int, ...]) -> None:
    """Set the dilations of the last stage, as the authors' code does, also where a stride was traded for dilation."""
    if "layer4" not in dict(backbone.named_children()):
        raise UserError(f"[student] multi_grid needs a ResNet backbone, not {name!r}; leave it out")
    for index, block in enumerate(backbone["layer4"] if isinstance(backbone, nn.ModuleDict) else backbone.layer4):
        dilation = multi_grid[index % len(multi_grid)]
        for conv in block.modules():
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.stride == (1, 1):
                conv.dilation = conv.padding = (dilation, dilation)
