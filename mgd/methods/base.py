"""What the training loop asks of a method."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from mgd.errors import UserError, did_you_mean
from mgd.losses import supervised
from mgd.losses.supervised import IGNORE_INDEX
from mgd.sections import ModelSection, Section

Weight = Annotated[float, Field(ge=0)]
OnImages = Annotated[tuple[Literal["labeled", "unlabeled"], ...], Field(min_length=1)]
"""Which images of a step a term is computed on."""

Batch = Mapping[str, Tensor]
"""Of tensors, and lists of ids that methods leave alone. Keys: `image` `[B, 3, H, W]` uint8 and `label` `[B, H, W]`
int64; with an unlabelled set also `unlabeled` and `mix` `[B, 3, H, W]` uint8 and the CutMix `mask` `[B, 1, H, W]`
bool; with cached teachers what they saw in `image`, `unlabeled` and `mix`, as `image/TEACHER/KIND`, and
of some kinds `image/valid` (mgd/data/targets.py)."""


class OHEM(Section):
    """`[method.ohem]`: the supervised loss counts hard pixels only (the authors' code on Cityscapes)."""

    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """Probability of the true class up to which a pixel is hard."""
    min_kept_per_image: Annotated[int, Field(ge=0)] = 50_000
    """Pixels kept at the least, times the images of a process, among which they are looked for."""


class MethodSection(Section):
    """Keys of `[method]` that every method has."""

    ohem: OHEM | None = None
    """Left out, every labelled pixel counts."""
    class_balance: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Pixels of rare classes count more in the supervised loss, by (median frequency / frequency) ** class_balance over
    the labelled pixels, up to 20 times: 0 is not at all, 1 is median frequency balancing."""


class StepOutput(NamedTuple):
    """Result of one step: the loss to back-propagate, and named scalars for the log."""

    loss: Tensor
    log: Mapping[str, Tensor | float]


class Method:
    """Base of all methods; networks and teachers are handed in built.

    All that a method learns or counts stands in one of four places; what stands elsewhere is neither trained nor kept
    in resume points.

    - `networks`: what is trained, segmenters as the recipe's sections describe them.
    - `layers`: modules of the method's own by name, trained along with them and never shipped (a projection, say).
      Fill it in `__init__`, where `torch.manual_seed` has been called with the run's seed.
    - `averages`: modules by name that no gradient reaches: a moving average of a network, or counters and thresholds
      as buffers of a module.
    - `teachers`: frozen.

    Args:
        config: the recipe's `[method]`.
        networks: the networks to train, a `Segmenter` (mgd/models/segmenter.py) for each of `sections`; the first one
            ships. The loop puts their distributed wrappers in their place, and those of the layers.
        teachers: frozen networks by name; they stay in eval mode and out of the checkpoint.
    """

    Config: ClassVar[type[MethodSection]]
    num_networks: ClassVar[int] = 1
    uses_unlabeled: ClassVar[bool] = True
    needs_teachers: ClassVar[bool] = False
    trains_teachers: ClassVar[bool] = False
    """Networks at other places than "student" (`sections`) teach it: it is a student, which may teach no other."""
    images_per_label: ClassVar[int] = 2
    """Images of one forward pass for each labelled image: what batch statistics are made of."""
    class_weights: Tensor | None = None
    """`[K]`, of the supervised loss; see `weigh_classes`."""

    def __init__(
        self, config: MethodSection, networks: Sequence[nn.Module], teachers: Mapping[str, nn.Module] | None = None
    ) -> None:
        self.config = config
        self.networks = list(networks)
        self.layers: dict[str, nn.Module] = {}
        self.averages: dict[str, nn.Module] = {}
        self.teachers = {name: teacher.eval().requires_grad_(False) for name, teacher in (teachers or {}).items()}

    @classmethod
    def check(cls, config: MethodSection, teachers: tuple[str, ...]) -> None:
        """Check `[method]` against the names under `[teachers]`, before anything is trained.

        Raises:
            UserError: teachers missing, or given to a method that has none.
        """
        if cls.needs_teachers and not teachers:
            raise UserError(f"name = {config.name!r} needs at least one [teachers.<name>]")
        if teachers and not cls.needs_teachers:
            raise UserError(f"name = {config.name!r} has no teachers; remove [teachers]")

    @classmethod
    def sections(cls, config: MethodSection, student: ModelSection) -> list[tuple[str, ModelSection]]:
        """Return the sections of the networks to train, each with its place in the recipe; the first one ships.

        Args:
            config: the recipe's `[method]`.
            student: the recipe's `[student]`.
        """
        return [("student", student)] * cls.num_networks

    @classmethod
    def check_features(cls, config: MethodSection, where: str, size: tuple[int, int]) -> None:
        """Check the features that a network has of a training crop; nothing is asked of them, by most methods.

        Args:
            config: the recipe's `[method]`.
            where: the network's place in the recipe: "student", "teachers.deep", ...
            size: height and width of the features, pixels.

        Raises:
            UserError: they are too coarse.
        """

    @classmethod
    def check_cached(cls, config: MethodSection, crop: int, cell: int) -> None:
        """Check whether the method can learn from cached teachers.

        Args:
            config: the recipe's `[method]`.
            crop: side of a training crop, pixels.
            cell: side of the cells over which cached logits and features are averaged, pixels.

        Raises:
            UserError: it needs them online, or smaller cells.
        """
        raise UserError(f'name = {config.name!r} needs [teachers] mode = "online"')

    @classmethod
    def cached_kinds(cls, config: MethodSection) -> dict[str, tuple[str, ...]]:
        """Which kinds of cached predictions the losses need of each teacher; see mgd/data/targets.py."""
        raise NotImplementedError

    def step(self, batch: Batch, step: int) -> StepOutput:
        """Return the loss of one optimiser step.

        Args:
            batch: this process's part of the global batch.
            step: number of the step, from 0.
        """
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Do what follows the optimiser's step; nothing, for most methods."""

    def deployed(self) -> nn.Module:
        """Return the network that is evaluated and ships, one of `networks` or `averages`."""
        return bare(self.networks[0])

    def weigh_classes(self, pixels: Tensor) -> None:
        """Set the weights that `[method] class_balance` asks for.

        Args:
            pixels: `[K]`, labelled pixels of each class, not all 0.
        """
        if self.config.class_balance:
            self.class_weights = supervised.class_weights(pixels, self.config.class_balance)

    def labeled_loss(self, logits: Tensor, label: Tensor) -> Tensor:
        """Cross-entropy over the labelled pixels of the *global* batch; weighted, or OHEM, if the recipe says so.

        Args:
            logits: `[b, K, H, W]`.
            label: `[b, H, W]`.
        """
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(label.device)
        weights = self.class_weights
        if (ohem := self.config.ohem) is not None:
            min_kept = ohem.min_kept_per_image * label.shape[0]
            return balance_processes(
                *supervised.ohem_cross_entropy(logits, label, ohem.threshold, min_kept, IGNORE_INDEX, weights)
            )
        total = supervised.total_weight(label, IGNORE_INDEX, weights)
        return balance_processes(supervised.cross_entropies(logits, [label], IGNORE_INDEX, weights)[0], total)


def teacher_outputs(teacher: nn.Module, views: Mapping[str, Tensor], wanted: Sequence[str]) -> dict:
    """Run a frozen teacher once over just the views that are wanted.

    Args:
        teacher: network in eval mode.
        views: name -> `[b, 3, H, W]`.
        wanted: names; none runs nothing.

    Returns:
        name -> the teacher's output for that view.
    """
    if not wanted:
        return {}
    with torch.inference_mode():
        output = teacher(torch.cat([views[view] for view in wanted]))
    parts = zip(*(tensor.chunk(len(wanted)) for tensor in output), strict=True)
    return {view: type(output)(*tensors) for view, tensors in zip(wanted, parts, strict=True)}


def check_used(used: Iterable[str], teachers: tuple[str, ...], keys: str) -> None:
    """Check that no teacher is trained and loaded for nothing.

    Raises:
        UserError: naming the teacher and the keys that could use it.
    """
    if unused := sorted(set(teachers) - set(used)):
        raise UserError(f"nothing uses the teacher {unused[0]!r}; name it in {keys}, or remove [teachers.{unused[0]}]")


def check_names(key: str, names: tuple[str, ...], teachers: tuple[str, ...]) -> None:
    """Check that a term's teachers exist, and are named once.

    Raises:
        UserError: naming the key, the teacher and the closest match.
    """
    for name in names:
        if name not in teachers:
            raise UserError(f"{key} = {name!r}: no such teacher; {did_you_mean(name, teachers)}")
        if names.count(name) > 1:
            raise UserError(f"{key} names {name!r} twice; once is enough")


def bare(network: nn.Module) -> nn.Module:
    """The network without its distributed wrapper, which counts one forward a backward."""
    return getattr(network, "module", network)


def balance_processes(local_mean: Tensor, count: Tensor) -> Tensor:
    """Weigh a process's mean so that the average over processes is the mean over all items.

    Labelled pixels are not spread evenly over processes; without this the same recipe would mean
    something else on one process and on two.

    Args:
        local_mean: `[]` or `[N]`: mean, or several, over this process's items.
        count: likewise, the number of these items, or the sum of their weights.

    Returns:
        As `local_mean`.
    """
    if (world_size := num_processes()) == 1:
        return local_mean
    total = count.detach().clone().float()
    torch.distributed.all_reduce(total)
    return local_mean * (count * world_size / total.where(total > 0, 1))


def num_processes() -> int:
    """Number of processes that share the global batch."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size()
