"""Optimiser, schedule, and the one conversion from epochs to steps."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from mgd.errors import UserError
from mgd.sections import Optim


def build_optimizer(section: Optim, networks: Iterable[nn.Module]) -> torch.optim.Optimizer:
    """Return SGD or AdamW over all trainable parameters, without decay on norms and biases."""
    decayed, spared = [], []
    for network in networks:
        for parameter in network.parameters():
            if parameter.requires_grad:
                # Biases, and the scales of norms and of layers, are vectors; what multiplies features is not.
                (spared if parameter.ndim <= 1 else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": section.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    if section.name == "adamw":
        return torch.optim.AdamW(groups, lr=section.lr)
    return torch.optim.SGD(groups, lr=section.lr, momentum=section.momentum)


def poly_lr(section: Optim, step: int, total_steps: int) -> float:
    """Learning rate of a step, counted from 0: lr * (1 - step / total_steps) ** power."""
    return section.lr * (1 - step / total_steps) ** section.power


def total_steps(section: Optim, num_labeled: int, num_unlabeled: int | None) -> int:
    """Turn the recipe's length into optimiser steps.

    An epoch is a pass over the larger of the two sets; it does not depend on the method, so all
    methods train equally long.

    Args:
        section: `[optim]`, which has steps or epochs.
        num_labeled: images.
        num_unlabeled: images; None of a stream of unknown length.

    Raises:
        UserError: epochs over a stream of unknown length.
    """
    if section.steps is not None:
        return section.steps
    if num_unlabeled is None:
        raise UserError("[optim] epochs: the length of the unlabelled stream is not known; give steps instead")
    return max(1, math.ceil(section.epochs * max(num_labeled, num_unlabeled) / section.batch_size))
