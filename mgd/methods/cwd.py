"""CWD: the student imitates where each class channel of the teachers looks."""

from typing import Literal

from mgd.losses.cwd import channel_wise
from mgd.methods.base import Weight
from mgd.methods.kd import LogitDistillation, LogitSection, Temperature
from mgd.registry import METHODS


class CWDConfig(LogitSection):
    """Keys of `[method]` for `cwd`."""

    name: Literal["cwd"] = "cwd"
    weight: Weight = 3.0
    """Weight of the distillation loss."""
    temperature: Temperature = 4.0
    """Divides the logits of both."""


@METHODS.register("cwd")
class CWD(LogitDistillation):
    """Channel-wise KL divergence over positions (Shu et al., ICCV 2021)."""

    Config = CWDConfig
    loss = staticmethod(channel_wise)
