"""MGD in one stage: the teachers learn by CPS from each other while the student learns from them."""

from typing import Literal

import torch

from mgd.data.cutmix import mix
from mgd.errors import UserError
from mgd.losses import supervised
from mgd.methods.base import Batch, StepOutput, Weight
from mgd.methods.cps import pseudo_labels
from mgd.methods.mgd import MultiGranularity, TeacherTargets, TermsSection
from mgd.registry import METHODS
from mgd.sections import ModelSection, Networks


class MGDOnlineConfig(TermsSection):
    """Keys of `[method]` for `mgd_online`."""

    name: Literal["mgd_online"] = "mgd_online"
    teachers: Networks = {}
    """`[method.teachers.<name>]`: two or more networks, each a table like [student], that are trained along with it."""
    cps_weight: Weight = 1.0
    """Weight of the teachers' cross pseudo supervision (MGD's teachers: 1 on VOC, 5 on Cityscapes)."""


@METHODS.register("mgd_online")
class MGDOnline(MultiGranularity):
    """Teachers and student in one run.

    Each teacher learns from the labels and from the pseudo labels of the next one, the last from those of
    the first: two teach each other. The student learns from all of them by the losses of MGD.
    """

    Config = MGDOnlineConfig
    trains_teachers = True

    @classmethod
    def check(cls, config: MGDOnlineConfig, teachers: tuple[str, ...]) -> None:
        """Check that there are teachers to train, and none beside them, and that the terms name them."""
        if teachers:
            raise UserError(
                f"name = {config.name!r} trains its teachers along with the student; give their networks as "
                "[method.teachers.<name>], and remove [teachers]"
            )
        if len(config.teachers) < 2:
            raise UserError(
                f"name = {config.name!r} needs two [method.teachers.<name>] or more, which teach each other; "
                f"here: {', '.join(config.teachers) or 'none'}"
            )
        if config.pixel.labels != "hard":
            raise UserError('pixel.labels = "soft" belongs to name = "mgd"; here the teachers\' labels are hard')
        if not cls.check_terms(config, tuple(config.teachers)):
            raise UserError(
                "the student learns from no teacher; name some in pixel.teachers, image.teachers or region.teachers"
            )

    @classmethod
    def sections(cls, config: MGDOnlineConfig, student: ModelSection) -> list[tuple[str, ModelSection]]:
        """Return the student's section and those of the teachers, each with its place in the recipe."""
        return [("student", student), *((f"method.teachers.{name}", table) for name, table in config.teachers.items())]

    def step(self, batch: Batch, step: int) -> StepOutput:
        """Return the student's loss plus supervised and cross pseudo loss of the teachers."""
        student, *teachers = self.networks
        image = torch.cat([batch["image"], mix(batch["unlabeled"], batch["mix"], batch["mask"])])
        # What the student is shown of the teachers comes from the passes by which they learn, so in train mode.
        # Eval mode, as for frozen teachers, would take passes of its own (half as much again of the teachers'
        # work), with running statistics that lag behind weights which change at every step.
        pseudo = pseudo_labels(teachers, batch)
        loss_supervised, loss_cps, targets = 0.0, 0.0, {}
        for index, (name, teacher) in enumerate(zip(self.config.teachers, teachers, strict=True)):
            logits, features = teacher(image)
            self.check_features(self.config, f"method.teachers.{name}", features.shape[-2:])
            labeled, mixed = logits.chunk(2)
            loss_supervised = loss_supervised + self.labeled_loss(labeled, batch["label"])
            loss_cps = loss_cps + supervised.cross_entropy(mixed, pseudo[(index + 1) % len(pseudo)])
            targets[name] = TeacherTargets(
                labeled.argmax(dim=1), pseudo[index], mixed.detach(), features.chunk(2)[1].detach()
            )
        loss, log = self.student_loss(student(image), batch["label"], targets)
        log |= {"loss_teachers_supervised": loss_supervised, "loss_teachers_cps": loss_cps}
        return StepOutput(loss + loss_supervised + self.config.cps_weight * loss_cps, log)
