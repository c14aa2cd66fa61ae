"""KD: the student imitates the teachers' logits pixel by pixel; and what it shares with CWD."""

from collections.abc import Callable, Mapping
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mgd.data.cutmix import mix
from mgd.losses.kd import pixel_kl
from mgd.methods.base import (
    Batch,
    Method,
    MethodSection,
    OnImages,
    StepOutput,
    Weight,
    check_names,
    check_used,
    teacher_outputs,
)
from mgd.registry import METHODS

Temperature = Annotated[float, Field(ge=1e-3, le=1e3)]


class LogitSection(MethodSection):
    """Keys that `kd` and `cwd` share."""

    distill_from: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names under [teachers]; the losses of several are averaged."""
    on: OnImages = ("labeled", "unlabeled")
    """Images it is taken on; the unlabelled ones are CutMix-ed, teachers and student see the same."""
    weight: Weight = 1.0
    """Weight of the distillation loss."""
    temperature: Temperature = 1.0
    """Divides the logits of both."""


class TeacherLogits(NamedTuple):
    """What a teacher says of a batch of images."""

    logits: Tensor
    """`[B, K, H, W]`."""
    valid: Tensor | None
    """`[B, H, W]` bool, where it saw them; None is everywhere."""


class LogitDistillation(Method):
    """Supervised cross-entropy plus a loss between the logits of student and teachers.

    `loss` takes the student's and a teacher's logits, the temperature and `TeacherLogits.valid`.
    """

    needs_teachers = True
    loss: ClassVar[Callable[[Tensor, Tensor, float, Tensor | None], Tensor]]

    @classmethod
    def check(cls, config: LogitSection, teachers: tuple[str, ...]) -> None:
        """Check that the teachers exist, and that every one is used."""
        super().check(config, teachers)
        check_names("distill_from", config.distill_from, teachers)
        check_used(config.distill_from, teachers, "distill_from")

    @classmethod
    def check_cached(cls, config: LogitSection, crop: int, cell: int) -> None:
        """Cached teachers will do: their logits are kept finely enough, and mixed like the images."""

    @classmethod
    def cached_kinds(cls, config: LogitSection) -> dict[str, tuple[str, ...]]:
        """Of each teacher the logits."""
        return dict.fromkeys(config.distill_from, ("fine_logits",))

    def step(self, batch: Batch, step: int) -> StepOutput:
        """Return the loss of the labelled and the CutMix-ed unlabelled images."""
        config = self.config
        views = {"labeled": batch["image"], "unlabeled": mix(batch["unlabeled"], batch["mix"], batch["mask"])}
        logits = self.networks[0](torch.cat(list(views.values()))).logits.chunk(2)
        student = dict(zip(views, logits, strict=True))
        log = {"loss_supervised": self.labeled_loss(student["labeled"], batch["label"])}
        names = config.distill_from
        teachers = [self._online(name, views) if self.teachers else self._cached(name, batch) for name in names]
        for view in config.on:
            losses = [
                type(self).loss(student[view], teacher[view].logits, config.temperature, teacher[view].valid)
                for teacher in teachers
            ]
            log[f"loss_{config.name}_{view}"] = sum(losses) / len(losses)
        distilled = sum(value for key, value in log.items() if key != "loss_supervised")
        return StepOutput(log["loss_supervised"] + config.weight * distilled, log)

    def _online(self, name: str, views: Mapping[str, Tensor]) -> dict[str, TeacherLogits]:
        outputs = teacher_outputs(self.teachers[name], views, self.config.on)
        return {view: TeacherLogits(output.logits, None) for view, output in outputs.items()}

    def _cached(self, name: str, batch: Batch) -> dict[str, TeacherLogits]:
        """Put together what was cached of a teacher's view of the images; padding it has not seen."""
        mask, found = batch["mask"], {}

        def cached(key: str) -> TeacherLogits:
            logits, size = batch[f"{key}/{name}/fine_logits"], mask.shape[-2:]
            return TeacherLogits(functional.interpolate(logits, size=size, mode="bilinear"), batch[f"{key}/valid"])

        if "labeled" in self.config.on:
            found["labeled"] = cached("image")
        if "unlabeled" in self.config.on:
            found["unlabeled"] = TeacherLogits(
                *(mix(*both, mask) for both in zip(cached("unlabeled"), cached("mix"), strict=True))
            )
        return found


class KDConfig(LogitSection):
    """Keys of `[method]` for `kd`."""

    name: Literal["kd"] = "kd"


@METHODS.register("kd")
class KD(LogitDistillation):
    """Per-pixel KL divergence of soft labels (Hinton et al., 2015)."""

    Config = KDConfig
    loss = staticmethod(pixel_kl)
