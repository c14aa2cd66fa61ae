"""What a method must keep to, ours or a plug-in's, checked where breaking it would go unnoticed."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mgd.errors import UserError
from mgd.methods.base import Method, StepOutput, bare

_PLACES = ("networks", "layers", "averages", "teachers")
# Names in a log line, and in a step's terms, that are not a method's to give.
_RESERVED = ("step", "loss", "lr", "images_per_second", "val_miou", "gradient")


def check_parts(method: Method) -> None:
    """Check that all that a method learns is trained and kept in resume points, and that what ships is a network.

    Args:
        method: as it was built.

    Raises:
        UserError: naming the attribute.
    """
    if not hasattr(method, "layers"):
        raise UserError(f"{type(method).__name__}: __init__ must call super().__init__(config, networks, teachers)")
    title = f"[method] name = {method.config.name!r}"
    for place in ("layers", "averages"):
        for name, part in getattr(method, place).items():
            if not isinstance(part, nn.Module):
                raise UserError(
                    f"{title}: {place}[{name!r}] must be a torch.nn.Module, not {type(part).__name__}; a tensor or a "
                    "number can be a buffer of one"
                )
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) or re.fullmatch(r"network\d+|optimizer", name):
                raise UserError(
                    f"{title}: {place} cannot hold the name {name!r}; letters, digits, - and _ make another"
                )
    if both := sorted(method.layers.keys() & method.averages.keys()):
        raise UserError(f"{title}: layers and averages both hold {both[0]!r}; rename one")
    if odd := [name for name, part in method.averages.items() if any(p.requires_grad for p in part.parameters())]:
        raise UserError(f"{title}: averages[{odd[0]!r}] wants a gradient; requires_grad_(False), or put it into layers")
    kept = set(map(id, _tensors(method.averages)))
    for name, part in vars(method).items():
        if name not in _PLACES and any(id(tensor) not in kept for tensor in _tensors(part)):
            raise UserError(
                f"{title}: self.{name} holds a module that is neither trained nor kept there; put it into self.layers "
                "(trained) or self.averages (not) and use it from there, as networks from self.networks, where the "
                "loop puts what several processes share"
            )
    networks = [bare(network) for network in method.networks]
    if not any(bare(method.deployed()) is network for network in [*networks, *method.averages.values()]):
        raise UserError(f"{title}: deployed() must return one of self.networks or self.averages, which all are kept")


def checked_output(out: StepOutput, method: Method) -> StepOutput:
    """Return what a step returned, its log as tensors.

    Args:
        out: of `Method.step`.
        method: whose it is.

    Raises:
        UserError: no loss to back-propagate, or a log that cannot be written.
    """
    title = f"[method] name = {method.config.name!r}: step"
    if not isinstance(out, StepOutput):
        raise UserError(f"{title} must return StepOutput(loss, log), not {type(out).__name__}")
    if not (isinstance(out.loss, Tensor) and out.loss.ndim == 0 and out.loss.requires_grad):
        raise UserError(f"{title} must return a scalar loss with a gradient, not {_shown(out.loss)}")
    if not isinstance(out.log, Mapping):
        raise UserError(f"{title} must return a dict of numbers as its log, not {type(out.log).__name__}")
    log = {}
    for name, value in out.log.items():
        if not isinstance(name, str):
            raise UserError(f"{title} logs {name!r}, which is no name; names are text")
        if name in _RESERVED:
            raise UserError(f"{title} logs {name!r}, which the loop writes itself; choose another name")
        try:
            log[name] = torch.as_tensor(value, device=out.loss.device)  # itself, if it is one: terms have gradients
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{title} logs {name!r}, which is {_shown(value)} and no number") from error
        if log[name].ndim:
            raise UserError(f"{title} logs {name!r}, which is {_shown(value)} and no single number")
    return StepOutput(out.loss, log)


def _tensors(part: object) -> list[Tensor]:
    """Return the parameters and buffers that an attribute holds, itself or in a list or dict."""
    parts = part.values() if isinstance(part, Mapping) else part if isinstance(part, (list, tuple)) else [part]
    loose = [one for one in parts if isinstance(one, nn.Parameter)]
    modules = [one for one in parts if isinstance(one, nn.Module)]
    return loose + [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def _shown(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"of type {type(value).__name__}"
    return f"a tensor of shape {list(value.shape)}{'' if value.requires_grad else ' without a gradient'}"
