"""Latency on a CPU, in ONNX Runtime: of a student beside a well-known library's, and of many students."""

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mgd.benchmarks.timing import alternate, ratio_row
from mgd.complexity import model_costs
from mgd.errors import UserError, one_line
from mgd.export.base import Deployed, Int8, Target
from mgd.export.onnx import OnnxExporter
from mgd.export.verify import latency
from mgd.models.segmenter import Segmenter, nameless_segmenter
from mgd.progress import progress_bar
from mgd.recipe import parse_model
from mgd.sections import ModelSection

BACKBONES = (
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "mobilenetv4_conv_small",
    "efficientvit_b0",
    "hgnetv2_b0",
    "tf_efficientnet_lite0",
    "starnet_s1",
    "resnet18d",
)
COMPARED_HEADS: dict[str, dict[str, Any]] = {
    "dense, width 256": {"name": "deeplabv3plus", "channels": 256},
    "dense, width 48": {"name": "deeplabv3plus", "channels": 48, "low_level_channels": 24},
    "separable, width 128": {"name": "deeplabv3plus_separable"},
    "lraspp": {"name": "lraspp"},
}


def suite(section: ModelSection, num_classes: int, size: int, threads: int, repetitions: int) -> list[dict[str, Any]]:
    """Time a student beside DeepLabV3+ with MobileNetV2 of segmentation_models.pytorch, both without trained weights.

    Args:
        section: the recipe's `[student]`.
        num_classes: K.
        size: side of the image, pixels.
        threads: of the runtime.
        repetitions: rounds that count.

    Returns:
        Rows `name, reference, ours, ratio`, milliseconds an image: theirs beside ours in float32, from pixels to
        logits; ours in float32 beside ours in int8, from pixels to logits and from uint8 pixels to classes.

    Raises:
        UserError: a package is missing.
    """
    OnnxExporter().check()
    try:
        import segmentation_models_pytorch
    except ImportError as error:
        raise UserError(
            'segmentation-models-pytorch, the reference, is not installed; pip install -e ".[dev]"'
        ) from error
    torch.manual_seed(0)
    theirs = segmentation_models_pytorch.DeepLabV3Plus("mobilenet_v2", encoder_weights=None, classes=num_classes)
    ours = _network(section, num_classes)
    target, baked = Target(size, size), Target(size, size, baked=True, cpu=True)
    noise = [np.random.default_rng(index).integers(0, 256, (1, 3, size, size), np.uint8) for index in range(4)]
    pixels = [image.astype(np.float32) for image in noise]
    with tempfile.TemporaryDirectory() as folder:
        calls = {
            "theirs": functools.partial(_runner(theirs.eval(), target, Path(folder) / "a.onnx", threads), pixels[0]),
            "ours": functools.partial(_runner(ours, target, Path(folder) / "b.onnx", threads), pixels[0]),
            "int8": functools.partial(_runner(ours, target, Path(folder) / "c.onnx", threads, pixels), pixels[0]),
            "baked": functools.partial(_runner(ours, baked, Path(folder) / "d.onnx", threads), noise[0]),
            "baked int8": functools.partial(_runner(ours, baked, Path(folder) / "e.onnx", threads, noise), noise[0]),
        }
        seconds = alternate(calls, repetitions, torch.device("cpu"))
    milliseconds = {name: value * 1e3 for name, value in seconds.items()}
    return [
        ratio_row("infer: fp32, ms", milliseconds["theirs"], milliseconds["ours"]),
        ratio_row("infer: fp32 -> int8, ms", milliseconds["ours"], milliseconds["int8"]),
        ratio_row("infer: baked, fp32 -> int8, ms", milliseconds["baked"], milliseconds["baked int8"]),
    ]


def students(
    backbones: Sequence[str], num_classes: int, size: int, threads: int, target_ms: float, repetitions: int
) -> list[dict[str, Any]]:
    """List backbones under heads: what they cost, how long an image takes, and whether that is fast enough.

    Args:
        backbones: timm names.
        num_classes: K.
        size: side of the image, pixels.
        threads: of the runtime.
        target_ms: milliseconds an image may take.
        repetitions: images that are timed.

    Returns:
        A row a pair, the fastest first.
    """
    OnnxExporter().check()
    target, rows = Target(size, size), []
    pairs = [(backbone, head) for backbone in backbones for head in COMPARED_HEADS]
    sections, costs = {}, {}
    for backbone, head in pairs:  # all are counted before hours are spent on one that cannot be
        table = {"backbone": backbone, "pretrained": False, "output_stride": 32, "head": COMPARED_HEADS[head]}
        sections[backbone, head] = parse_model(table, source=f"--backbones {backbone}")
        costs[backbone, head] = model_costs(sections[backbone, head], num_classes, size)["total"]
    for backbone, head in progress_bar(True, iterable=pairs):
        section, cost = sections[backbone, head], costs[backbone, head]
        with tempfile.TemporaryDirectory() as folder:
            run = _runner(_network(section, num_classes), target, Path(folder) / "model.onnx", threads)
            speed = latency(run, target.example().numpy(), repetitions)
        row = {"backbone": backbone, "head": head, "params M": cost.params_m, "GMACs": cost.gmacs, **speed}
        rows.append(row | {"fits": "yes" if speed["p50 ms"] <= target_ms else ""})
    return sorted(rows, key=lambda row: row["p50 ms"])


def _network(section: ModelSection, num_classes: int) -> Segmenter:
    torch.manual_seed(0)
    return nameless_segmenter(section, num_classes)


def _runner(
    network: nn.Module, target: Target, path: Path, threads: int, calibration: Sequence[np.ndarray] | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    deployed = Deployed(network, target) if isinstance(network, Segmenter) else network
    exporter = OnnxExporter()
    try:
        exporter.write(deployed, target, path, Int8(calibration) if calibration else None)
    except Exception as error:  # whatever the exporter raises
        name = network.section.backbone if isinstance(network, Segmenter) else "the reference"
        size = f"{target.height}x{target.width}"
        raise UserError(
            f"{name} cannot be exported for {size}, try a --size that 32 divides: {one_line(error)}"
        ) from error
    return exporter.open(path, threads)
