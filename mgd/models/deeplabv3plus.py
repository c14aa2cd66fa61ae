"""The DeepLabv3+ head (Chen et al., ECCV 2018), compact: ASPP, low-level branch, decoder."""

from typing import Annotated, Literal

import torch
from einops import reduce
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from mgd.registry import HEADS
from mgd.sections import Section


class DeepLabV3PlusConfig(Section):
    """Keys of `[student.head]` for `deeplabv3plus`."""

    name: Literal["deeplabv3plus"] = "deeplabv3plus"
    channels: Annotated[int, Field(gt=0, le=8192)] = 256
    """Width of ASPP and decoder."""
    low_level_channels: Annotated[int, Field(gt=0, le=8192)] = 48
    """Width of the stride-4 branch (the paper: 48, and 24 for MobileNetV2)."""
    aspp_rates: Annotated[tuple[Annotated[int, Field(gt=0, le=512)], ...], Field(min_length=1)] = (6, 12, 18)
    """Dilations of the 3x3 ASPP branches."""
    norm: Literal["batch", "group"] = "batch"
    """`group` has no batch statistics: for batches of one or two images a process."""


@HEADS.register("deeplabv3plus")
class DeepLabV3PlusHead(nn.Module):
    """Feature maps of the backbone to class logits and decoder features, at stride 4.

    Args:
        config: the recipe's `[student.head]`.
        low_channels: channels of the stride-4 map.
        high_channels: channels of the deepest map.
        num_classes: K.
    """

    Config = DeepLabV3PlusConfig

    def __init__(self, config: DeepLabV3PlusConfig, low_channels: int, high_channels: int, num_classes: int) -> None:
        super().__init__()
        width, low, norm = config.channels, config.low_level_channels, config.norm
        self.aspp = nn.ModuleList([conv_block(high_channels, width, 1, norm)])
        self.aspp.extend(self.wide_block(high_channels, width, norm, rate) for rate in config.aspp_rates)
        self.pooled = conv_block(high_channels, width, 1, norm)
        self.project = conv_block(width * (len(self.aspp) + 1), width, 1, norm)
        self.low_level = conv_block(low_channels, low, 1, norm)
        self.decoder = nn.Sequential(
            self.decoder_block(width + low, width, norm), self.decoder_block(width, width, norm)
        )
        self.classifier = nn.Conv2d(width, num_classes, 1)
        initialize(self)

    def wide_block(self, inputs: int, outputs: int, norm: str, dilation: int) -> nn.Module:
        """Return a 3x3 branch of the ASPP."""
        return conv_block(inputs, outputs, 3, norm, dilation=dilation)

    def decoder_block(self, inputs: int, outputs: int, norm: str) -> nn.Module:
        """Return a 3x3 block of the decoder."""
        return conv_block(inputs, outputs, 3, norm, kind=_DecoderConv2d)

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `[B, K, H/4, W/4]` and decoder features `[B, C, H/4, W/4]`.

        Args:
            low: `[B, C1, H/4, W/4]`.
            high: `[B, C2, H/s, W/s]`.
        """
        pooled = self.pooled(reduce(high, "b c h w -> b c 1 1", "mean"))
        branches = [branch(high) for branch in self.aspp]
        branches.append(pooled + torch.zeros_like(branches[0]))  # some mobile converters lack expand
        context = self.project(torch.cat(branches, dim=1))
        context = functional.interpolate(context, size=low.shape[-2:], mode="bilinear", align_corners=False)
        joined = [context, self.low_level(low)]
        if _trains_on_cpu(self, context):
            joined = [branch.contiguous() for branch in joined]
        features = self.decoder(torch.cat(joined, dim=1))
        return self.classifier(features), features


class SeparableConfig(DeepLabV3PlusConfig):
    """Keys of `[student.head]` for `deeplabv3plus_separable`."""

    name: Literal["deeplabv3plus_separable"] = "deeplabv3plus_separable"
    channels: Annotated[int, Field(gt=0, le=8192)] = 128
    """Width of ASPP and decoder."""
    low_level_channels: Annotated[int, Field(gt=0, le=8192)] = 24
    """Width of the stride-4 branch."""


@HEADS.register("deeplabv3plus_separable")
class SeparableHead(DeepLabV3PlusHead):
    """The same with depthwise-separable 3x3 convolutions in ASPP and decoder (Chen et al., ECCV 2018, section 3.1)."""

    Config = SeparableConfig

    def wide_block(self, inputs: int, outputs: int, norm: str, dilation: int) -> nn.Module:
        """Return a separable 3x3 branch of the ASPP."""
        return separable_block(inputs, outputs, norm, dilation)

    def decoder_block(self, inputs: int, outputs: int, norm: str) -> nn.Module:
        """Return a separable 3x3 block of the decoder."""
        return separable_block(inputs, outputs, norm)


class _DecoderConv2d(nn.Conv2d):
    """Trains in NCHW on a CPU, where the backward pass of wide maps takes half the time that it does in NHWC."""

    def forward(self, input: Tensor) -> Tensor:
        if _trains_on_cpu(self, input):
            return self._conv_forward(input.contiguous(), self.weight.contiguous(), self.bias)
        return super().forward(input)


def _trains_on_cpu(module: nn.Module, input: Tensor) -> bool:
    return module.training and input.device.type == "cpu"


def conv_block(
    inputs: int,
    outputs: int,
    kernel: int,
    norm: str,
    dilation: int = 1,
    groups: int = 1,
    kind: type[nn.Conv2d] = nn.Conv2d,
) -> nn.Sequential:
    """Return convolution, norm and ReLU: `[B, inputs, H, W]` to `[B, outputs, H, W]`.

    Args:
        inputs: channels.
        outputs: channels.
        kernel: its side, odd.
        norm: "batch" or "group".
        dilation: of the kernel.
        groups: of the convolution.
        kind: class of the convolution.
    """
    padding = dilation * (kernel // 2)
    # At least 8 channels a group: the pooled branch is 1x1, and one value cannot be normalised.
    norm_groups = next((g for g in (32, 16, 8, 4, 2) if outputs % g == 0 and outputs // g >= 8), 1)
    return nn.Sequential(
        kind(inputs, outputs, kernel, padding=padding, dilation=dilation, groups=groups, bias=False),
        nn.BatchNorm2d(outputs) if norm == "batch" else nn.GroupNorm(norm_groups, outputs),
        nn.ReLU(inplace=True),
    )


def separable_block(inputs: int, outputs: int, norm: str, dilation: int = 1) -> nn.Sequential:
    """Return a 3x3 convolution of each channel, then a 1x1 one of all, each with norm and ReLU."""
    each = conv_block(inputs, inputs, 3, norm, dilation=dilation, groups=inputs)
    return nn.Sequential(*each, *conv_block(inputs, outputs, 1, norm))


def initialize(head: nn.Module) -> None:
    """Draw all convolutions of a head anew, Kaiming normal by fan-in."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
