"""CPS: two networks teach each other (Chen et al., CVPR 2021), with CutMix."""

from typing import Annotated, Literal

import torch
from pydantic import Field

from mgd.data.cutmix import mix
from mgd.losses import supervised
from mgd.methods.base import Batch, Method, MethodSection, StepOutput, bare
from mgd.registry import METHODS


class CPSConfig(MethodSection):
    """Keys of `[method]` for `cps`."""

    name: Literal["cps"] = "cps"
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the cross pseudo supervision (MGD's teachers: 1 on VOC, 5 on Cityscapes)."""


@METHODS.register("cps")
class CPS(Method):
    """Each network learns from the labels and from the other's pseudo labels."""

    Config = CPSConfig
    num_networks = 2

    def step(self, batch: Batch, step: int) -> StepOutput:
        """Return supervised plus cross pseudo loss of both networks."""
        first, second = batch["unlabeled"], batch["mix"]
        image = torch.cat([batch["image"], mix(first, second, batch["mask"])])
        both = torch.cat([first, second])
        with torch.no_grad():  # in train mode, as the authors': pseudo labels by batch statistics
            pseudo_labels = [
                mix(*bare(network)(both).logits.chunk(2), batch["mask"]).argmax(dim=1) for network in self.networks
            ]
        # Older torch would reuse the casts made without gradient in the forward passes below.
        torch.clear_autocast_cache()
        loss_supervised, loss_cps = 0.0, 0.0
        for network, pseudo_label in zip(self.networks, reversed(pseudo_labels), strict=True):
            logits = network(image).logits
            labeled, mixed = logits.chunk(2)
            loss_supervised = loss_supervised + self.labeled_loss(labeled, batch["label"])
            loss_cps = loss_cps + supervised.cross_entropy(mixed, pseudo_label)
        loss = loss_supervised + self.config.weight * loss_cps
        return StepOutput(loss, {"loss_supervised": loss_supervised, "loss_cps": loss_cps})
