"""Supervised: labelled images only, the baseline that everything else must beat."""

from typing import Literal

from torch import Tensor

from mgd.losses import supervised
from mgd.methods.base import Batch, Method, StepOutput, balance_processes
from mgd.recipe import Section
from mgd.registry import METHODS


class SupervisedConfig(Section):
    """Keys of `[method]` for `supervised`."""

    name: Literal["supervised"] = "supervised"


@METHODS.register("supervised")
class Supervised(Method):
    """Cross-entropy on the labelled images."""

    Config = SupervisedConfig
    uses_unlabeled = False
    forwards_per_label = 1

    def step(self, batch: Batch, step: int) -> StepOutput:
        """Return the cross-entropy of the labelled batch."""
        logits = self.networks[0](batch["image"]).logits
        loss = labeled_loss(logits, batch["label"])
        return StepOutput(loss, {"loss_supervised": loss})


def labeled_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy over the labelled pixels of the *global* batch (see `balance_processes`)."""
    return balance_processes(supervised.cross_entropy(logits, label), (label != 255).sum())
