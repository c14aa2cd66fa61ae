"""How hard each term of a method's loss pulls at the networks that it trains."""

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mgd.errors import UserError
from mgd.methods.base import Method
from mgd.methods.contract import checked_output


def suite(method: Method, batches: Iterable[Mapping[str, Tensor]]) -> list[dict[str, Any]]:
    """Compare the gradients of the terms of a loss, each with its weight; nothing is trained.

    Args:
        method: its networks are in train mode.
        batches: of a training run, on the device of the networks.

    Returns:
        Rows `term, value, weight, gradient, beside the first`, means over the batches: the value before it is weighted,
        the weight, the norm of the weighted gradient; and that mean beside the first term's, the supervised one.

    Raises:
        UserError: the method logs no term.
    """
    parameters = [value for network in method.networks for value in network.parameters() if value.requires_grad]
    found: dict[str, list[tuple[float, float, float]]] = {}
    for step, batch in enumerate(batches):
        out = checked_output(method.step(batch, step), method)
        for name, value in out.log.items():
            if not value.requires_grad:  # a plug-in may log more than the terms of its loss
                continue
            # By what it is multiplied in the loss, which is a weighted sum.
            (weight,) = torch.autograd.grad(out.loss, value, retain_graph=True, materialize_grads=True)
            parts = torch.autograd.grad(value, parameters, weight, retain_graph=True, allow_unused=True)
            norm = torch.nn.utils.get_total_norm([part for part in parts if part is not None])
            found.setdefault(name, []).append((value.item(), weight.item(), norm.item()))
    means = {name: [statistics.fmean(column) for column in zip(*values, strict=True)] for name, values in found.items()}
    if not means:
        raise UserError(f"[method] {method.config.name} logs no term of its loss; StepOutput.log is where they belong")
    first = next(iter(means.values()))[2] or math.nan
    return [
        {"term": name, "value": value, "weight": weight, "gradient": norm, "beside the first": norm / first}
        for name, (value, weight, norm) in means.items()
    ]
