"""What is exported, and what an exporter of a format does."""

import copy
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from timm.layers import AvgPool2dSame, Conv2dSame
from torch import Tensor, nn
from torch.nn import functional

from mgd.errors import UserError
from mgd.models.segmenter import Segmenter

Runner = Callable[[np.ndarray], np.ndarray]
"""Pixels `[1, 3, H, W]` to the output of the exported network."""

LEAST_SIDE, GREATEST_SIDE = 64, 1024
"""Sides of the images that a file of dynamic size takes, pixels."""


class Target(NamedTuple):
    """What pixels the file takes, and what it gives back."""

    height: int
    """Of an image, pixels."""
    width: int
    """Of an image, pixels."""
    dynamic: bool = False
    """The file takes images of other sizes, too."""
    baked: bool = False
    """uint8 pixels in and uint8 classes `[1, H, W]` out, instead of float32 pixels (0..255) in and logits
    `[1, K, H, W]` out. The normalisation is inside in both."""

    cpu: bool = False
    """A baked file for processors alone, in a layout that is fast there and that other hardware may get wrong."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the pixels."""
        return torch.uint8 if self.baked else torch.float32

    @property
    def output(self) -> str:
        """Name of the output."""
        return "classes" if self.baked else "logits"

    def example(self) -> Tensor:
        """Return pixels `[1, 3, H, W]` to trace with."""
        return torch.zeros(1, 3, self.height, self.width, dtype=self.dtype)

    def shapes(self) -> tuple[dict[int, torch.export.Dim], ...] | None:
        """Return what torch.export takes as `dynamic_shapes`."""
        if not self.dynamic:
            return None
        sides = [torch.export.Dim(name, min=LEAST_SIDE, max=GREATEST_SIDE) for name in ("height", "width")]
        return (dict(enumerate(sides, start=2)),)


class Int8(NamedTuple):
    """How a network is quantised."""

    calibration: Sequence[np.ndarray]
    """Pixels `[1, 3, H, W]` of images."""
    float_layers: int = 0
    """So many convolutions, from the first on, stay in float."""


class _SimplyPadded(Conv2dSame):
    """TensorFlow's "same" padding in whole numbers: of timm's, a file of dynamic size takes minutes to trace."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what `Conv2dSame` does."""
        return functional.conv2d(_pad(x, self), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class _SimplyPaddedPool(AvgPool2dSame):
    """The same for pooling."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what `AvgPool2dSame` does."""
        return functional.avg_pool2d(_pad(x, self), self.kernel_size, self.stride)


class _HalvingPool(nn.AvgPool2d):
    """Means of 2x2 pixels, with half windows at the far edges of odd sides, as torch.export can trace them.

    Of `ceil_mode` it cannot tell that it gives a size that is allowed whatever the image's is. A half window has the
    mean of a whole one whose other half repeats it; of even sides the repeated pixels are in no window.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return what `nn.AvgPool2d(2, 2, ceil_mode=True)` does."""
        return functional.avg_pool2d(functional.pad(x, [0, 1, 0, 1], mode="replicate"), 2, 2)


def _pad(x: Tensor, layer: nn.Conv2d | nn.AvgPool2d) -> Tensor:
    padding = []
    for axis in (1, 0):  # functional.pad begins with the last dimension
        missing = _overlap(layer, axis) + -x.shape[2 + axis] % layer.stride[axis]
        padding += [missing // 2, missing - missing // 2]
    return functional.pad(x, padding)


def _overlap(layer: nn.Conv2d | nn.AvgPool2d, axis: int) -> int:
    """Pixels that neighbouring places of the kernel share."""
    dilation = getattr(layer, "dilation", (1, 1))[axis]
    return (layer.kernel_size[axis] - 1) * dilation + 1 - layer.stride[axis]


def traceable(network: nn.Module) -> nn.Module:
    """Return a copy with the same results that torch.export can trace for images of any size."""
    network = copy.deepcopy(network)
    for layer in network.modules():
        layer.__class__ = _traceable_class(layer)
    return network


def _traceable_class(layer: nn.Module) -> type[nn.Module]:
    simple = {Conv2dSame: _SimplyPadded, AvgPool2dSame: _SimplyPaddedPool}.get(type(layer))
    if simple and min(_overlap(layer, 0), _overlap(layer, 1)) >= 0:
        return simple
    if type(layer) is nn.AvgPool2d and layer.ceil_mode and layer.divisor_override is None:
        shape = [tuple(np.broadcast_to(value, 2)) for value in (layer.kernel_size, layer.stride, layer.padding)]
        if shape == [(2, 2), (2, 2), (0, 0)]:
            return _HalvingPool
    return type(layer)


class Deployed(nn.Module):
    """A segmenter with a single tensor out, in eval mode and the layout that converters expect.

    Args:
        model: is copied, to the CPU's default layout.
        target: what comes in and out.
    """

    def __init__(self, model: Segmenter, target: Target) -> None:
        super().__init__()
        self.model, self.baked = copy.deepcopy(model), target.baked
        self.cpu().to(memory_format=torch.contiguous_format).eval().requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits `[B, K, H, W]`, or classes `[B, H, W]` uint8.

        Args:
            image: `[B, 3, H, W]`, pixel values 0..255.
        """
        logits = self.model.of_whole_cells(image).logits
        maps = logits.argmax(dim=1).to(torch.uint8) if self.baked else logits
        if any(isinstance(side, torch.SymInt) for side in image.shape):
            maps = functional.pad(maps, [0, 1, 0, 1])  # a slice can be traced for any size if it is never the whole
        elif maps.shape[-2:] == image.shape[-2:]:
            return maps  # a slice of the whole is an alias in the program, which Core ML's converter does not know
        return maps[..., : image.shape[-2], : image.shape[-1]]


def trace(network: nn.Module, target: Target) -> torch.export.ExportedProgram:
    """Return what every converter but LiteRT's begins with."""
    return torch.export.export(traceable(network), (target.example(),), dynamic_shapes=target.shapes())


class Exporter:
    """One format; a plug-in derives from it, and an entry point of the group `mgd.exporters` names it."""

    suffix: ClassVar[str]
    """Of the file or folder that is written."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Modules that must be there."""
    extra: ClassVar[str] = ""
    """The optional dependency of ours that installs them."""
    runs_here: ClassVar[bool] = True
    """Whether this machine has the runtime."""
    quantizes: ClassVar[bool] = False
    """Whether `write` takes `int8`."""
    has_cpu_layout: ClassVar[bool] = False
    """Whether `Target.cpu` makes a difference."""

    def check(self) -> None:
        """Look for the packages.

        Raises:
            UserError: one is missing.
        """
        if missing := [name for name in self.packages if importlib.util.find_spec(name) is None]:
            command = f'pip install -e ".[{self.extra}]"' if self.extra else f"pip install {missing[0]}"
            raise UserError(f"{missing[0]} is not installed; {command}")

    def versions(self) -> dict[str, str]:
        """Versions of the packages, by the names under which they are installed."""
        owners = importlib.metadata.packages_distributions()
        names = {owners[name][0] for name in self.packages if name in owners}
        return {name: importlib.metadata.version(name) for name in sorted(names)}

    def write(self, network: Deployed, target: Target, path: Path, int8: Int8 | None = None) -> None:
        """Write the network to `path`.

        Args:
            network: what to export.
            target: what comes in and out.
            path: file or folder that is not there yet.
            int8: how weights and activations become int8; left out, they stay in float.
        """
        raise NotImplementedError

    def open(self, path: Path, threads: int) -> Runner:
        """Load what was written into the format's own runtime."""
        raise NotImplementedError
