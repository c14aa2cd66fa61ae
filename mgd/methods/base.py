"""What the training loop asks of a method."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mgd.errors import UserError
from mgd.recipe import Section

Batch = Mapping[str, Tensor]
"""Keys: `image` `[B, 3, H, W]` uint8 and `label` `[B, H, W]` int64; with an unlabelled set also
`unlabeled` and `mix` `[B, 3, H, W]` uint8 and the CutMix `mask` `[B, 1, H, W]` bool."""


class StepOutput(NamedTuple):
    """Result of one step: the loss to back-propagate, and named scalars for the log."""

    loss: Tensor
    log: dict[str, Tensor]


class Method:
    """Base of all methods; networks and teachers are handed in built.

    Args:
        config: the recipe's `[method]`.
        networks: the networks to train, `num_networks` of them; the first one ships. The loop
            puts their distributed wrappers in their place.
        teachers: frozen networks by name; they stay in eval mode and out of the checkpoint.
    """

    Config: ClassVar[type[Section]]
    num_networks: ClassVar[int] = 1
    uses_unlabeled: ClassVar[bool] = True
    needs_teachers: ClassVar[bool] = False
    forwards_per_label: ClassVar[int] = 2
    """Images of one forward pass for each labelled image: what batch statistics are made of."""

    def __init__(
        self, config: Section, networks: Sequence[nn.Module], teachers: Mapping[str, nn.Module] | None = None
    ) -> None:
        self.config = config
        self.networks = list(networks)
        self.teachers = {name: teacher.eval().requires_grad_(False) for name, teacher in (teachers or {}).items()}

    @classmethod
    def check(cls, config: Section, teachers: tuple[str, ...]) -> None:
        """Check `[method]` against the names under `[teachers]`, before anything is trained.

        Raises:
            UserError: teachers missing, or given to a method that has none.
        """
        if cls.needs_teachers and not teachers:
            raise UserError(f"name = {config.name!r} needs at least one [teachers.<name>]")
        if teachers and not cls.needs_teachers:
            raise UserError(f"name = {config.name!r} has no teachers; remove [teachers]")

    def step(self, batch: Batch, step: int) -> StepOutput:
        """Return the loss of one optimiser step.

        Args:
            batch: this process's part of the global batch.
            step: number of the step, from 0.
        """
        raise NotImplementedError


def balance_processes(local_mean: Tensor, count: Tensor) -> Tensor:
    """Weigh a process's mean so that the average over processes is the mean over all items.

    Labelled pixels are not spread evenly over processes; without this the same recipe would mean
    something else on one process and on two.

    Args:
        local_mean: scalar, mean over this process's items.
        count: number of this process's items.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return local_mean
    total = count.detach().clone().float()
    torch.distributed.all_reduce(total)
    return local_mean * (count * torch.distributed.get_world_size() / total.clamp(min=1))


def num_processes() -> int:
    """Number of processes that share the global batch."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size()
