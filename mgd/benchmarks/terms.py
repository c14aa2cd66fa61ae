"""How hard each term of a method's loss pulls at the networks that it trains."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mgd.methods.base import Method


def suite(method: Method, batches: Iterable[Mapping[str, Tensor]]) -> list[dict[str, Any]]:
    """Compare the gradients of the terms of a loss, each with its weight; nothing is trained.

    Args:
        method: its networks are in train mode.
        batches: of a training run, on the device of the networks.

    Returns:
        Rows `term, value, weight, gradient, beside the first, cosine`, means over the batches: the value before it is
        weighted; the weight; the norm of the weighted gradient; that norm divided by the norm of the first term's,
        which is the supervised one, and the cosine of the angle between the two.
    """
    parameters = [value for network in method.networks for value in network.parameters() if value.requires_grad]
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    weights = {}
    for step, batch in enumerate(batches):
        out = method.step(batch, step)
        gradients = {}
        for name, value in out.log.items():
            if not value.requires_grad:
                continue
            # By what it is multiplied in the loss, which is a weighted sum; nothing, if it is logged only.
            (weight,) = torch.autograd.grad(out.loss, value, retain_graph=True, allow_unused=True)
            if weight is None:
                continue
            weights[name] = weight.item()
            parts = torch.autograd.grad(value, parameters, weight, retain_graph=True, materialize_grads=True)
            gradients[name] = torch.cat([part.flatten().double() for part in parts])
        first = next(iter(gradients.values()))
        for name, gradient in gradients.items():
            cosine = functional.cosine_similarity(gradient, first, dim=0)
            norms = gradient.norm().item(), first.norm().item()
            found.setdefault(name, []).append((out.log[name].item(), *norms, cosine.item()))
    rows = []
    for name, values in found.items():
        value, norm, first_norm, cosine = (math.fsum(column) / len(values) for column in zip(*values, strict=True))
        row = {"term": name, "value": value, "weight": f"{weights[name]:g}", "gradient": norm}
        rows.append(row | {"beside the first": norm / first_norm, "cosine": cosine})
    return rows
