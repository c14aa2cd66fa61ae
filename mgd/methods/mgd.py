"""MGD: a student under frozen teachers, distilled at pixel, image and region level; and its losses for others."""

from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

import torch
from einops import reduce
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mgd.data.cutmix import mix
from mgd.errors import UserError
from mgd.losses import mgd as losses
from mgd.losses import supervised
from mgd.methods.base import (
    Batch,
    Method,
    MethodSection,
    OnImages,
    StepOutput,
    Weight,
    balance_processes,
    check_names,
    check_used,
    num_processes,
    teacher_outputs,
)
from mgd.registry import METHODS
from mgd.sections import Section


class PixelTerm(Section):
    """`[method.pixel]`: cross-entropy against the teachers' labels, eq. 2."""

    teachers: tuple[str, ...] = ()
    """Names of teachers; empty switches the term off."""
    weight: Weight = 1.0
    """Weight of the term."""
    on: OnImages = ("labeled", "unlabeled")
    """Images it is taken on."""
    labels: Literal["hard", "soft"] = "hard"
    """What is taken from a teacher: its likeliest classes (paper), or its class probabilities."""
    class_balance: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Pixels that a teacher gives to rare classes count more, as `[method] class_balance` does it for true labels, by
    the frequencies of these."""


class ImageTerm(Section):
    """`[method.image]`: L1 distance of pooled predictions on the mixed images, eq. 3-4."""

    teachers: tuple[str, ...] = ()
    """Names of teachers; empty switches the term off."""
    weight: Weight = 0.002
    """lambda1; 0.002 goes with the summed form."""
    reduction: Literal["mean", "sum"] = "sum"
    """`mean` over batch and classes (paper's equation) or `sum` over both (authors' code, whose sum was over the
    two images of one GPU: with a batch of B it weighed 2 / B of what ours does)."""


class RegionTerm(Section):
    """`[method.region]`: distance of region self-correlations on the mixed images, eq. 5-6."""

    teachers: tuple[str, ...] = ()
    """Names of teachers; empty switches the term off."""
    weight: Weight = 100.0
    """lambda2."""
    grid: Annotated[int, Field(gt=0, le=64)] = 7
    """Regions a side."""


class TermsSection(MethodSection):
    """Keys that `mgd` and `mgd_online` share: the three terms."""

    pixel: PixelTerm = PixelTerm()
    image: ImageTerm = ImageTerm()
    region: RegionTerm = RegionTerm()


class TeacherTargets(NamedTuple):
    """What one teacher says of a batch, as far as its losses need it."""

    labeled: Tensor | None = None
    """Classes `[B, H, W]` of the labelled images, or class probabilities `[B, K, H, W]`."""
    unlabeled: Tensor | None = None
    """The same for the mixed images: those of the two images, mixed like them. Of cached teachers classes are 255 in
    padding, and probabilities 0."""
    logits: Tensor | None = None
    """`[B, K, g, g]` of the mixed images, means over equal parts of them (or `[B, K, H, W]`, before any mean)."""
    features: Tensor | None = None
    """`[B, C, g, g]`, likewise."""


class MultiGranularity(Method):
    """What the student learns from its teachers, eq. 7: L_Sup + L_P^l + L_P^u + lambda1 L_I + lambda2 L_R."""

    pixel_weights: Tensor | None = None
    """`[K]`, of L_P; see `weigh_classes`."""

    def weigh_classes(self, pixels: Tensor) -> None:
        """Set the weights that `[method] class_balance` and `[method.pixel] class_balance` ask for.

        Args:
            pixels: `[K]`, labelled pixels of each class.
        """
        super().weigh_classes(pixels)
        if self.config.pixel.class_balance:
            self.pixel_weights = supervised.class_weights(pixels, self.config.pixel.class_balance)

    @classmethod
    def check_terms(cls, config: TermsSection, teachers: tuple[str, ...]) -> set[str]:
        """Check that every term names teachers that exist; return the names of all that are used.

        Raises:
            UserError: one does not, or pixel.class_balance has no pixel.teachers.
        """
        used: set[str] = set()
        for term in ("pixel", "image", "region"):
            names = getattr(config, term).teachers
            check_names(f"{term}.teachers", names, teachers)
            used |= set(names)
        if config.pixel.class_balance and not config.pixel.teachers:
            raise UserError("pixel.class_balance does nothing without pixel.teachers; name some, or leave it out")
        return used

    @classmethod
    def check_features(cls, config: TermsSection, where: str, size: tuple[int, int]) -> None:
        """Check that the features of the student, and of teachers that L_R names, are as fine as its regions.

        Raises:
            UserError: they are coarser: some regions would be the same cells.
        """
        of_term = {"student"} if config.region.teachers else set()
        of_term |= {f"{table}.{name}" for table in ("teachers", "method.teachers") for name in config.region.teachers}
        grid, (height, width) = config.region.grid, size
        if where in of_term and min(size) < grid:
            raise UserError(
                f"[method.region] grid = {grid} is finer than the {width} x {height} cells of the features of "
                f"[{where}]; make it smaller, [data] crop larger, or choose a head with finer features"
            )

    def student_loss(self, output: NamedTuple, label: Tensor, targets: Mapping[str, TeacherTargets]) -> StepOutput:
        """Return the loss of the student and its terms.

        Args:
            output: of the student, `logits` and `features`: labelled images first, as many mixed ones after them.
            label: `[B, H, W]` of the labelled images.
            targets: what the teachers that the terms name say of them.

        Raises:
            UserError: the student's features are coarser than the regions of L_R.
        """
        config = self.config
        labeled, mixed = output.logits.chunk(2)
        features = output.features.chunk(2)[1]
        log = {"loss_supervised": self.labeled_loss(labeled, label)}
        loss = log["loss_supervised"]
        if config.pixel.teachers:
            if self.pixel_weights is not None:
                self.pixel_weights = self.pixel_weights.to(label.device)
            for where, logits in (("labeled", labeled), ("unlabeled", mixed)):
                if where in config.pixel.on:
                    labels = [getattr(targets[name], where) for name in config.pixel.teachers]
                    of_teachers = losses.pixel_level(logits, labels, self.pixel_weights)
                    log[f"loss_pixel_{where}"] = balance_processes(*of_teachers).sum()
                    loss = loss + config.pixel.weight * log[f"loss_pixel_{where}"]
        if config.image.teachers:
            # A sum over the batch is a sum over the global batch: the loop averages over processes.
            scale = num_processes() if config.image.reduction == "sum" else 1
            log["loss_image"] = scale * sum(
                losses.image_level(mixed, targets[name].logits, config.image.reduction)
                for name in config.image.teachers
            )
            loss = loss + config.image.weight * log["loss_image"]
        if config.region.teachers:
            self.check_features(config, "student", features.shape[-2:])
            log["loss_region"] = sum(
                losses.region_level(features, targets[name].features, config.region.grid)
                for name in config.region.teachers
            )
            loss = loss + config.region.weight * log["loss_region"]
        return StepOutput(loss, log)


class MGDConfig(TermsSection):
    """Keys of `[method]` for `mgd`."""

    name: Literal["mgd"] = "mgd"
    remix: Literal["images", "predictions"] = "images"
    """What L_I and L_R see of the teachers: the mixed image, in a pass of its own; or the mixture of
    their predictions and features for the two images, which saves a quarter of their work (and is all
    that cached teachers can do)."""


@METHODS.register("mgd")
class MGD(MultiGranularity):
    """Teachers that were trained beforehand and stay as they are, asked in every step or beforehand."""

    Config = MGDConfig
    needs_teachers = True

    @classmethod
    def check(cls, config: MGDConfig, teachers: tuple[str, ...]) -> None:
        """Check that every term names teachers that exist, and that every teacher is used."""
        super().check(config, teachers)
        check_used(cls.check_terms(config, teachers), teachers, "pixel.teachers, image.teachers or region.teachers")

    @classmethod
    def check_cached(cls, config: MGDConfig, crop: int, cell: int) -> None:
        """Check that nothing is asked of cached teachers that they do not know.

        Raises:
            UserError: of mixed images, or of regions finer than what is kept.
        """
        if config.remix == "images" and (config.image.teachers or config.region.teachers):
            raise UserError(
                'remix = "images" asks the teachers for the mixed images, which are not cached; set [method] remix = '
                '"predictions"'
            )
        grid, parts = config.region.grid, -(-crop // cell)
        if config.region.teachers and parts < grid:
            raise UserError(
                f"region.grid = {grid} is finer than the {parts} x {parts} cells of [cache] cell = {cell} in a crop of "
                f"{crop}; cell may be at most {crop // grid} (and not below 4), or make grid smaller"
            )

    @classmethod
    def cached_kinds(cls, config: MGDConfig) -> dict[str, tuple[str, ...]]:
        """Which kinds of cached predictions the losses need of each teacher."""
        pixel = "labels" if config.pixel.labels == "hard" else "probabilities"
        terms = {pixel: config.pixel, "logits": config.image, "features": config.region}
        names = sorted({name for term in terms.values() for name in term.teachers})
        return {name: tuple(kind for kind, term in terms.items() if name in term.teachers) for name in names}

    def step(self, batch: Batch, step: int) -> StepOutput:
        """Return the loss of the labelled and the CutMix-ed unlabelled images."""
        config, mask = self.config, batch["mask"]
        views = {
            "labeled": batch["image"],
            "first": batch["unlabeled"],
            "second": batch["mix"],
            "mixed": mix(batch["unlabeled"], batch["mix"], mask),
        }
        if self.teachers:
            targets = {name: self._online(name, views, mask) for name in self.teachers}
        else:
            targets = {name: _cached(batch, name, kinds) for name, kinds in self.cached_kinds(config).items()}

        student = self.networks[0](torch.cat([views["labeled"], views["mixed"]]))
        return self.student_loss(student, batch["label"], targets)

    def _online(self, name: str, views: Mapping[str, Tensor], mask: Tensor) -> TeacherTargets:
        """Ask a teacher; of its outputs, which are large, only what the losses need outlives this."""
        config = self.config
        with torch.inference_mode():
            outputs = teacher_outputs(self.teachers[name], views, self._wanted(name))
            labels = {view: self._labels(outputs[view].logits) for view in self._pixel_views(name)}
            labeled = labels.get("labeled")
            unlabeled = mix(labels["first"], labels["second"], mask) if "first" in labels else None
            logits = features = None
            if name in config.image.teachers:
                logits = reduce(_mixed(outputs, "logits", mask), "b k h w -> b k 1 1", "mean")
            if name in config.region.teachers:
                features = _mixed(outputs, "features", mask)
                self.check_features(config, f"teachers.{name}", features.shape[-2:])
                features = losses.pool_regions(features, config.region.grid)
        return TeacherTargets(labeled, unlabeled, logits, features)

    def _labels(self, teacher_logits: Tensor) -> Tensor:
        return teacher_logits.softmax(dim=1) if self.config.pixel.labels == "soft" else teacher_logits.argmax(dim=1)

    def _pixel_views(self, name: str) -> list[str]:
        """The views of a step that L_P wants a teacher's labels of; it never wants those of the mixed images."""
        pixel = self.config.pixel
        shown = {"labeled": ["labeled"], "unlabeled": ["first", "second"]}
        return [view for kind in pixel.on for view in shown[kind]] if name in pixel.teachers else []

    def _wanted(self, name: str) -> list[str]:
        """The views of a step on which a teacher's terms need it."""
        config, wanted = self.config, self._pixel_views(name)
        if name in config.image.teachers or name in config.region.teachers:
            wanted += ["mixed"] if config.remix == "images" else ["first", "second"]
        return list(dict.fromkeys(wanted))


def _cached(batch: Batch, name: str, kinds: tuple[str, ...]) -> TeacherTargets:
    """Put together what was cached of a teacher's view of the images."""
    found, mask = {}, batch["mask"]
    if "probabilities" in kinds:
        labeled, first, second = (
            functional.interpolate(batch[f"{view}/{name}/probabilities"], size=mask.shape[-2:], mode="bilinear")
            * batch[f"{view}/valid"][:, None]
            for view in ("image", "unlabeled", "mix")
        )
        found["labeled"], found["unlabeled"] = labeled, mix(first, second, mask)
    if "labels" in kinds:
        found["labeled"] = batch[f"image/{name}/labels"]
        found["unlabeled"] = mix(batch[f"unlabeled/{name}/labels"], batch[f"mix/{name}/labels"], mask)
    for kind in ("logits", "features"):
        if kind in kinds:
            found[kind] = _blend(batch[f"unlabeled/{name}/{kind}"], batch[f"mix/{name}/{kind}"], mask)
    return TeacherTargets(**found)


def _mixed(outputs: Mapping[str, NamedTuple], what: str, mask: Tensor) -> Tensor:
    """Return a teacher's logits or features for the mixed images, seen or mixed from those of the two images."""
    if "mixed" in outputs:
        return getattr(outputs["mixed"], what)
    return _blend(getattr(outputs["first"], what), getattr(outputs["second"], what), mask)


def _blend(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
    """Mix two maps `[B, C, h, w]`; a cell of a coarse one is blended by the share of its pixels."""
    share = functional.interpolate(mask.to(first.dtype), size=first.shape[-2:], mode="area")
    return torch.lerp(first, second, share)
