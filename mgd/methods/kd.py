"""KD: the student imitates the teachers' logits pixel by pixel; and what it shares with CWD."""

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mgd.data.cutmix import mix
from mgd.losses.kd import pixel_kl
from mgd.methods.base import Batch, Method, MethodSection, StepOutput, Temperature, check_names, check_used, look
from mgd.registry import METHODS


class LogitSection(MethodSection):
    """Keys that `kd` and `cwd` share."""

    distill_from: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names under [teachers]; the losses of several are averaged."""
    on: Annotated[tuple[Literal["labeled", "unlabeled"], ...], Field(min_length=1)] = ("labeled", "unlabeled")
    """Images it is taken on; the unlabelled ones are CutMix-ed, teachers and student see the same."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distillation loss."""
    temperature: Temperature = 1.0
    """Divides the logits of both."""


class LogitDistillation(Method):
    """Supervised cross-entropy plus a loss between the logits of student and teachers."""

    needs_teachers = True
    loss: ClassVar[Callable[[Tensor, Tensor, float], Tensor]]

    @classmethod
    def check(cls, config: LogitSection, teachers: tuple[str, ...]) -> None:
        """Check that the teachers exist, and that every one is used."""
        super().check(config, teachers)
        check_names("distill_from", config.distill_from, teachers)
        check_used(config.distill_from, teachers, "distill_from")

    def step(self, batch: Batch, step: int) -> StepOutput:
        """Return the loss of the labelled and the CutMix-ed unlabelled images."""
        config = self.config
        views = {"labeled": batch["image"], "unlabeled": mix(batch["unlabeled"], batch["mix"], batch["mask"])}
        logits = self.networks[0](torch.cat(list(views.values()))).logits.chunk(2)
        student = dict(zip(views, logits, strict=True))
        log = {"loss_supervised": self.labeled_loss(student["labeled"], batch["label"])}
        seen = [look(self.teachers[name], views, config.on) for name in config.distill_from]
        for view in config.on:
            losses = [type(self).loss(student[view], outputs[view].logits, config.temperature) for outputs in seen]
            log[f"loss_{config.name}_{view}"] = sum(losses) / len(losses)
        distilled = sum(value for key, value in log.items() if key != "loss_supervised")
        return StepOutput(log["loss_supervised"] + config.weight * distilled, log)


class KDConfig(LogitSection):
    """Keys of `[method]` for `kd`."""

    name: Literal["kd"] = "kd"


@METHODS.register("kd")
class KD(LogitDistillation):
    """Per-pixel KL divergence of soft labels (Hinton et al., 2015)."""

    Config = KDConfig
    loss = staticmethod(pixel_kl)
