"""The LR-ASPP head (Howard et al., ICCV 2019): one gated branch and a shortcut, for the smallest budgets."""

from typing import Annotated, Literal

from einops import reduce
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from mgd.models.deeplabv3plus import conv_block, initialize
from mgd.registry import HEADS
from mgd.sections import Section


class LRASPPConfig(Section):
    """Keys of `[student.head]` for `lraspp`."""

    name: Literal["lraspp"] = "lraspp"
    channels: Annotated[int, Field(gt=0, le=8192)] = 128
    """Width of the gated branch."""
    norm: Literal["batch", "group"] = "batch"
    """`group` has no batch statistics: for batches of one or two images a process."""


@HEADS.register("lraspp")
class LRASPPHead(nn.Module):
    """Classes from the deepest map, gated by its mean, plus classes from the stride-4 map.

    The deepest map is classified before it is enlarged: 1x1 convolution and bilinear resizing commute, and K maps
    are fewer than `channels`.

    Args:
        config: the recipe's `[student.head]`.
        low_channels: channels of the stride-4 map.
        high_channels: channels of the deepest map.
        num_classes: K.
    """

    Config = LRASPPConfig

    def __init__(self, config: LRASPPConfig, low_channels: int, high_channels: int, num_classes: int) -> None:
        super().__init__()
        self.branch = conv_block(high_channels, config.channels, 1, config.norm)
        self.gate = nn.Conv2d(high_channels, config.channels, 1, bias=False)
        self.low_classifier = nn.Conv2d(low_channels, num_classes, 1)
        self.high_classifier = nn.Conv2d(config.channels, num_classes, 1)
        initialize(self)

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `[B, K, H/4, W/4]` and the gated features `[B, C, H/s, W/s]`.

        Args:
            low: `[B, C1, H/4, W/4]`.
            high: `[B, C2, H/s, W/s]`.
        """
        features = self.branch(high) * self.gate(reduce(high, "b c h w -> b c 1 1", "mean")).sigmoid()
        deep = self.high_classifier(features)
        deep = functional.interpolate(deep, size=low.shape[-2:], mode="bilinear", align_corners=False)
        return deep + self.low_classifier(low), features
