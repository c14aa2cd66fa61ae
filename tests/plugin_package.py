"""A package from outside that brings one of each: a method, a head, a data set and a format."""

from pathlib import Path

PACKAGE = '''
from typing import Literal

import torch
from torch import nn

from mgd.data.datasets import Shapes
from mgd.export.torch_export import TorchExporter
from mgd.methods.base import Method, MethodSection, StepOutput
from mgd.sections import Section


class AdaptedConfig(MethodSection):
    name: Literal["adapted"] = "adapted"
    weights: tuple[float, ...] = (1.0,)


class Seen(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))


class Adapted(Method):
    Config = AdaptedConfig
    uses_unlabeled = False
    fails_at = None

    def __init__(self, config, networks, teachers=None):
        super().__init__(config, networks, teachers)
        self.layers["projection"] = nn.Conv2d(24, 3, 1)
        self.averages["seen"] = Seen()

    def step(self, batch, step):
        if step == Adapted.fails_at:
            raise RuntimeError("the power is gone")
        self.averages["seen"].count += 1
        out = self.networks[0](batch["image"])
        pull = (self.layers["projection"](out.features) - 1).square().mean()
        loss = self.labeled_loss(out.logits, batch["label"]) + self.config.weights[0] * pull
        return StepOutput(loss, {"loss_pull": pull, "seen": float(self.averages["seen"].count)})


class FlatConfig(Section):
    name: Literal["flat"] = "flat"


class Flat(nn.Module):
    Config = FlatConfig

    def __init__(self, config, low_channels, high_channels, num_classes):
        super().__init__()
        self.squeeze = nn.Conv2d(high_channels, 24, 1)
        self.classifier = nn.Conv2d(24, num_classes, 1)

    def forward(self, low, high):
        features = self.squeeze(high)
        return nn.functional.interpolate(self.classifier(features), size=low.shape[-2:]), features


class Drawn(Shapes):
    """Ours under another name."""


class Again(TorchExporter):
    suffix = ".again"
'''
POINTS = {
    "mgd.methods": {
        "adapted": "segplus:Adapted",
        "broken": "segplus_that_is_not_there:A",
        "cwd": "segplus:Adapted",
    },
    "mgd.heads": {"flat": "segplus:Flat"},
    "mgd.datasets": {"drawn": "segplus:Drawn"},
    "mgd.exporters": {"again": "segplus:Again"},
}


def install(site: Path) -> None:
    """Install it into a folder, as far as Python looks at one."""
    info = site / "segplus-1.2.dist-info"
    info.mkdir(parents=True)
    (site / "segplus.py").write_text(PACKAGE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: segplus\nVersion: 1.2\n")
    groups = (
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in POINTS.items()
    )
    (info / "entry_points.txt").write_text("\n".join(groups))
