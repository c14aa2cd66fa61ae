"""MGD: a student under frozen teachers, distilled at pixel, image and region level."""

from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mgd.data.cutmix import mix
from mgd.losses import mgd as losses
from mgd.methods.base import Batch, Method, MethodSection, StepOutput, check_names, check_used, look, num_processes
from mgd.recipe import Section
from mgd.registry import METHODS

Weight = Annotated[float, Field(ge=0)]


class PixelTerm(Section):
    """`[method.pixel]`: cross-entropy against the teachers' hard labels, eq. 2."""

    teachers: tuple[str, ...] = ()
    """Names under [teachers]; empty switches the term off."""
    weight: Weight = 1.0
    """Weight of the term."""
    on: tuple[Literal["labeled", "unlabeled"], ...] = ("labeled", "unlabeled")
    """Images it is taken on."""


class ImageTerm(Section):
    """`[method.image]`: L1 distance of pooled predictions on the mixed images, eq. 3-4."""

    teachers: tuple[str, ...] = ()
    """Names under [teachers]; empty switches the term off."""
    weight: Weight = 0.002
    """lambda1; 0.002 goes with the summed form."""
    reduction: Literal["mean", "sum"] = "sum"
    """`mean` over batch and classes (paper's equation) or `sum` over both (authors' code)."""


class RegionTerm(Section):
    """`[method.region]`: distance of region self-correlations on the mixed images, eq. 5-6."""

    teachers: tuple[str, ...] = ()
    """Names under [teachers]; empty switches the term off."""
    weight: Weight = 100.0
    """lambda2."""
    grid: Annotated[int, Field(gt=0, le=64)] = 7
    """Regions a side."""


class MGDConfig(MethodSection):
    """Keys of `[method]` for `mgd`."""

    name: Literal["mgd"] = "mgd"
    pixel: PixelTerm = PixelTerm()
    image: ImageTerm = ImageTerm()
    region: RegionTerm = RegionTerm()
    remix: Literal["images", "predictions"] = "images"
    """What L_I and L_R see of the teachers: the mixed image, in a pass of its own; or the mixture of
    their predictions and features for the two images, which saves a quarter of their work (and is all
    that cached teachers can do)."""


@METHODS.register("mgd")
class MGD(Method):
    """Total loss, eq. 7: L_Sup + L_P^l + L_P^u + lambda1 L_I + lambda2 L_R."""

    Config = MGDConfig
    needs_teachers = True

    @classmethod
    def check(cls, config: MGDConfig, teachers: tuple[str, ...]) -> None:
        """Check that every term names teachers that exist, and that every teacher is used."""
        super().check(config, teachers)
        used: set[str] = set()
        for term in ("pixel", "image", "region"):
            names = getattr(config, term).teachers
            check_names(f"{term}.teachers", names, teachers)
            used |= set(names)
        check_used(used, teachers, "pixel.teachers, image.teachers or region.teachers")

    @classmethod
    def cached_kinds(cls, config: MGDConfig) -> dict[str, tuple[str, ...]]:
        """Which kinds of cached predictions the losses need of each teacher."""
        terms = {"labels": config.pixel, "logits": config.image, "features": config.region}
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
            seen = {name: look(teacher, views, self._wanted(name)) for name, teacher in self.teachers.items()}
        else:
            seen = _cached(batch, self.cached_kinds(config))
        for name in {*config.image.teachers, *config.region.teachers}:
            if "mixed" not in seen[name]:
                seen[name]["mixed"] = _blend(seen[name]["first"], seen[name]["second"], mask)

        student = self.networks[0](torch.cat([views["labeled"], views["mixed"]]))
        labeled, mixed = student.logits.chunk(2)
        features = student.features.chunk(2)[1]

        log = {"loss_supervised": self.labeled_loss(labeled, batch["label"])}
        loss = log["loss_supervised"]
        if config.pixel.teachers:
            for where, logits in (("labeled", labeled), ("unlabeled", mixed)):
                if where in config.pixel.on:
                    targets = [_pseudo_label(seen[name], where, mask) for name in config.pixel.teachers]
                    log[f"loss_pixel_{where}"] = losses.pixel_level(logits, targets)
                    loss = loss + config.pixel.weight * log[f"loss_pixel_{where}"]
        if config.image.teachers:
            # A sum over the batch is a sum over the global batch: the loop averages over processes.
            scale = num_processes() if config.image.reduction == "sum" else 1
            log["loss_image"] = scale * sum(
                losses.image_level(mixed, seen[name]["mixed"].logits, config.image.reduction)
                for name in config.image.teachers
            )
            loss = loss + config.image.weight * log["loss_image"]
        if config.region.teachers:
            log["loss_region"] = sum(
                losses.region_level(features, seen[name]["mixed"].features, config.region.grid)
                for name in config.region.teachers
            )
            loss = loss + config.region.weight * log["loss_region"]
        return StepOutput(loss, log)

    def _wanted(self, name: str) -> list[str]:
        """The views of a step on which a teacher's terms need it."""
        config, wanted = self.config, []
        on_mixed = name in config.image.teachers or name in config.region.teachers
        if name in config.pixel.teachers and "labeled" in config.pixel.on:
            wanted.append("labeled")
        if (name in config.pixel.teachers and "unlabeled" in config.pixel.on) or (
            on_mixed and config.remix == "predictions"
        ):
            wanted += ["first", "second"]
        if on_mixed and config.remix == "images":
            wanted.append("mixed")
        return wanted


class CachedOutput(NamedTuple):
    """What a cache holds of a teacher's output for a crop, as far as the losses need it."""

    labels: Tensor | None = None
    """`[B, H, W]` int64, 255 in padding."""
    logits: Tensor | None = None
    """`[B, K, g, g]`, means over parts of the crop."""
    features: Tensor | None = None
    """`[B, C, g, g]`, likewise."""


def _cached(batch: Batch, kinds: Mapping[str, tuple[str, ...]]) -> dict[str, dict[str, NamedTuple]]:
    """Return teacher -> view -> what was cached of its output."""
    keys = {"labeled": "image", "first": "unlabeled", "second": "mix"}
    return {
        name: {
            view: CachedOutput(**{kind: batch[f"{key}/{name}/{kind}"] for kind in kinds[name]})
            for view, key in keys.items()
        }
        for name in kinds
    }


def _classes(output: NamedTuple) -> Tensor:
    """A teacher's classes `[B, H, W]`."""
    return output.labels if isinstance(output, CachedOutput) else output.logits.argmax(dim=1)


def _pseudo_label(seen: Mapping, where: str, mask: Tensor) -> Tensor:
    """A teacher's classes `[B, H, W]` for the student's view; those of unmixed images are mixed like the images."""
    if where == "labeled":
        return _classes(seen["labeled"])
    return torch.where(mask[:, 0], _classes(seen["second"]), _classes(seen["first"]))


def _blend(first: NamedTuple, second: NamedTuple, mask: Tensor) -> NamedTuple:
    """Mix logits and features of two outputs; a cell of a coarse map is blended by the share of its pixels."""
    mixed = {}
    for what in ("logits", "features"):
        one, other = getattr(first, what), getattr(second, what)
        if one is not None:
            share = functional.interpolate(mask.to(one.dtype), size=one.shape[-2:], mode="area")
            mixed[what] = torch.lerp(one, other, share)
    return first._replace(**mixed)
