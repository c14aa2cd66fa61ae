"""Supervised: labelled images only, the baseline that everything else must beat."""

from typing import Literal

from mgd.methods.base import Batch, Method, MethodSection, StepOutput
from mgd.registry import METHODS


class SupervisedConfig(MethodSection):
    """Keys of `[method]` for `supervised`."""

    name: Literal["supervised"] = "supervised"


@METHODS.register("supervised")
class Supervised(Method):
    """Cross-entropy on the labelled images."""

    Config = SupervisedConfig
    uses_unlabeled = False
    images_per_label = 1

    def step(self, batch: Batch, step: int) -> StepOutput:
        """Return the cross-entropy of the labelled batch."""
        logits = self.networks[0](batch["image"]).logits
        loss = self.labeled_loss(logits, batch["label"])
        return StepOutput(loss, {"loss_supervised": loss})
