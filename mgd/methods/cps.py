"""CPS: two networks teach each other (Chen et al., CVPR 2021), with CutMix."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mgd.data.cutmix import mix
from mgd.losses import supervised
from mgd.methods.base import Batch, Method, MethodSection, StepOutput, Weight, bare
from mgd.registry import METHODS


class CPSConfig(MethodSection):
    """Keys of `[method]` for `cps`."""

    name: Literal["cps"] = "cps"
    weight: Weight = 1.0
    """Weight of the cross pseudo supervision (MGD's teachers: 1 on VOC, 5 on Cityscapes)."""


@METHODS.register("cps")
class CPS(Method):
    """Each network learns from the labels and from the other's pseudo labels."""

    Config = CPSConfig
    num_networks = 2

    def step(self, batch: Batch, step: int) -> StepOutput:
        """Return supervised plus cross pseudo loss of both networks."""
        image = torch.cat([batch["image"], mix(batch["unlabeled"], batch["mix"], batch["mask"])])
        targets = reversed(pseudo_labels(self.networks, batch))
        loss_supervised, loss_cps = 0.0, 0.0
        for network, pseudo_label in zip(self.networks, targets, strict=True):
            logits = network(image).logits
            labeled, mixed = logits.chunk(2)
            loss_supervised = loss_supervised + self.labeled_loss(labeled, batch["label"])
            loss_cps = loss_cps + supervised.cross_entropy(mixed, pseudo_label)
        loss = loss_supervised + self.config.weight * loss_cps
        return StepOutput(loss, {"loss_supervised": loss_supervised, "loss_cps": loss_cps})


def pseudo_labels(networks: Sequence[nn.Module], batch: Batch) -> list[Tensor]:
    """Return each network's classes `[B, H, W]` for the mixed images: those of the two images, mixed like them."""
    both = torch.cat([batch["unlabeled"], batch["mix"]])
    with torch.no_grad():  # in train mode, as the authors': pseudo labels by batch statistics
        found = [mix(*bare(network)(both).logits.chunk(2), batch["mask"]).argmax(dim=1) for network in networks]
    # Before pytorch/pytorch#165068 autocast reuses casts made without gradient in the forward passes that follow.
    torch.clear_autocast_cache()
    return found
