"""Mean Teacher (Tarvainen and Valpola, NeurIPS 2017) with CutMix consistency (French et al., BMVC 2020)."""

import copy
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from mgd.data.cutmix import mix
from mgd.methods.base import Batch, Method, MethodSection, StepOutput, Weight, bare
from mgd.registry import METHODS


class MeanTeacherConfig(MethodSection):
    """Keys of `[method]` for `mean_teacher`."""

    name: Literal["mean_teacher"] = "mean_teacher"
    weight: Weight = 100.0
    """Weight of the consistency, a mean over pixels and classes."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the average; ramped up as min(decay, 1 - 1 / (step + 1))."""


@METHODS.register("mean_teacher")
class MeanTeacher(Method):
    """The network follows its own moving average, which is what is evaluated and ships."""

    Config = MeanTeacherConfig

    def __init__(
        self,
        config: MeanTeacherConfig,
        networks: Sequence[nn.Module],
        teachers: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__(config, networks, teachers)
        self.average = copy.deepcopy(self.networks[0]).requires_grad_(False)
        self.averages = {"average": self.average}

    def step(self, batch: Batch, step: int) -> StepOutput:
        """Return cross-entropy on labels plus squared distance to the average's mixed predictions."""
        first, second = batch["unlabeled"], batch["mix"]
        with torch.no_grad():  # in train mode: batch statistics, and running ones of its own
            self.average.train()
            target = mix(*self.average(torch.cat([first, second])).logits.chunk(2), batch["mask"])
            # Pixel for pixel, the softmax of the mixed logits is the mix of the two softmaxes.
            target = target.softmax(dim=1)
        image = torch.cat([batch["image"], mix(first, second, batch["mask"])])
        labeled, mixed = self.networks[0](image).logits.chunk(2)
        loss_supervised = self.labeled_loss(labeled, batch["label"])
        loss_consistency = functional.mse_loss(mixed.softmax(dim=1), target)
        loss = loss_supervised + self.config.weight * loss_consistency
        return StepOutput(loss, {"loss_supervised": loss_supervised, "loss_consistency": loss_consistency})

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the average towards the network."""
        decay = min(self.config.decay, 1 - 1 / (step + 1))
        for average, current in zip(self.average.parameters(), bare(self.networks[0]).parameters(), strict=True):
            average.lerp_(current, 1 - decay)

    def deployed(self) -> nn.Module:
        """Return the average."""
        return self.average
