"""An exported file beside the network it was made of, on real images."""

import errno
import shutil
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mgd.errors import UserError, one_line
from mgd.export.base import GREATEST_SIDE, LEAST_SIDE, Deployed, Exporter, Int8, Runner, Target
from mgd.metrics import confusion_matrix, scores
from mgd.models.segmenter import Segmenter, enlarge

LOGITS_WITHIN = 1e-3
AGREE_AT_LEAST = 99.9
INT8_AGREE_AT_LEAST = 95.0
WARM_UP, REPETITIONS = 3, 30
FLOAT_LAYERS = (0, 3, 8, 16)
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class Sample(NamedTuple):
    """One image that a file is tried on."""

    pixels: Tensor
    """`[3, H, W]` uint8, at the scale that the network was trained at."""
    label: Tensor | None = None
    """`[H, W]` int64 classes, 255 = ignore."""


class Findings(NamedTuple):
    """What the comparison showed."""

    images: int
    """Images that were compared."""
    logits_off_by: float | None
    """Greatest difference of a logit; None of a baked file."""
    logits_up_to: float | None
    """Greatest size of a logit of the network."""
    agreement: float
    """Pixels with the same class, %."""
    miou: float | None
    """Of the file on the labelled images, %."""
    miou_network: float | None
    """Of the network on the same."""


def pixels_of(sample: Sample, target: Target) -> np.ndarray:
    """Return what a file takes for a sample, `[1, 3, H, W]` of its type: resized unless the file takes its size."""
    pixels = sample.pixels[None].float()
    if not target.dynamic or not all(LEAST_SIDE <= side <= GREATEST_SIDE for side in pixels.shape[-2:]):
        size = (target.height, target.width)
        pixels = functional.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)
    return pixels.round().to(target.dtype).numpy() if target.baked else pixels.numpy()


def compare(network: Deployed, run: Runner, samples: Iterable[Sample], target: Target) -> Findings:
    """Run file and network on the same pixels.

    Args:
        network: what was exported.
        run: the file, in its own runtime.
        samples: images; the mIoU is over those with a label, at the size of the label.
        target: what the file takes and gives.

    Raises:
        UserError: the file's output has another shape or type than the network's.
    """
    num_classes = len(network.model.classes)
    confusions = {"file": 0, "network": 0}
    off, size, same, count, labeled = 0.0, 0.0, 0.0, 0, 0
    for sample in samples:
        pixels = pixels_of(sample, target)
        with torch.inference_mode():
            wanted = network(torch.from_numpy(pixels))
            if count == 0:
                logits = network.model(torch.from_numpy(pixels)).logits if target.baked else wanted
                if not logits.isfinite().all():
                    raise UserError("the network itself gives values that are no number")
        found = torch.from_numpy(np.array(run(pixels)))
        if found.shape != wanted.shape or found.is_floating_point() != wanted.is_floating_point():
            raise UserError(f"the file gives {tuple(found.shape)} {found.dtype}, the network {tuple(wanted.shape)}")
        if not target.baked:
            if not found.isfinite().all():
                raise UserError("the file gives values that are no number")
            off = max(off, (found - wanted).abs().max().item())
            size = max(size, wanted.abs().max().item())
        classes = {"file": found, "network": wanted}
        same += _same(found, wanted, target)
        count += 1
        if sample.label is not None:
            labeled += 1
            for name, output in classes.items():
                resized = _classes(output, tuple(sample.label.shape), target)
                confusions[name] += confusion_matrix(resized, sample.label[None], num_classes)
    mious = [scores(confusions[name]).miou if labeled else None for name in ("file", "network")]
    logits = (None, None) if target.baked else (off, size)
    return Findings(count, *logits, 100 * same / count, *mious)


def _same(found: Tensor, wanted: Tensor, target: Target) -> float:
    if target.baked:
        return (found == wanted).double().mean().item()
    return (found.argmax(dim=1) == wanted.argmax(dim=1)).double().mean().item()


def _classes(output: Tensor, size: tuple[int, int], target: Target) -> Tensor:
    if target.baked:
        return functional.interpolate(output[None].float(), size=size, mode="nearest-exact")[0].long()
    return enlarge(output, size).argmax(dim=1)


def judge(findings: Findings, is_int8: bool, max_drop: float) -> str | None:
    """Say why a file must not be used; None when it may.

    Args:
        findings: of `compare`.
        is_int8: rounding may then change pixels, and the mIoU decides where there are labels.
        max_drop: points of mIoU that an int8 file may lose.
    """
    if is_int8 and findings.miou is not None:
        drop = findings.miou_network - findings.miou
        fits = drop <= max_drop  # not so of no number
        return None if fits else f"it loses {drop:.2f} points of mIoU; at most {max_drop:g} may go (--max-drop)"
    least, instead = AGREE_AT_LEAST, ""
    if is_int8:
        least = INT8_AGREE_AT_LEAST
        instead = "; leave out --int8, or let the mIoU of images with masks decide (a recipe, not --images)"
    if findings.agreement < least:
        return f"only {findings.agreement:.2f} % of the pixels keep their class; {least} are wanted{instead}"
    if is_int8 or findings.logits_off_by is None:
        return None
    limit = LOGITS_WITHIN * max(1.0, findings.logits_up_to)  # in the thousands float32 keeps no three decimals
    if findings.logits_off_by > limit:
        return f"logits are off by {findings.logits_off_by:.3g}; at most {limit:.3g} is allowed"
    return None


def verified_export(
    exporter: Exporter,
    name: str,
    model: Segmenter,
    target: Target,
    path: Path,
    tried: Sequence[Sample],
    calibrated: Sequence[Sample] | None,
    max_drop: float,
    threads: int,
) -> tuple[dict[str, Any], list[str]]:
    """Write a file and try it; of int8, keep ever more layers in float until it is good.

    Args:
        exporter: of the format.
        name: of the format.
        model: what to export.
        target: what comes in and out.
        path: file or folder to write.
        tried: images to compare on.
        calibrated: images to calibrate int8 with; None for float.
        max_drop: see `judge`.
        threads: of the runtime.

    Returns:
        A row for a table, and what else there is to say.

    Raises:
        UserError: the network cannot be converted, or the file does not do what the network does.
    """
    network = Deployed(model, target)
    calibration = None if calibrated is None else [pixels_of(sample, target) for sample in calibrated]
    for layers in (0,) if calibration is None else FLOAT_LAYERS:
        _remove(path)
        try:
            exporter.write(network, target, path, None if calibration is None else Int8(calibration, layers))
        except Exception as error:
            raise _refusal(f"--format {name} cannot take {model.section.backbone}", error, target) from error
        notes = [f"the first {layers} convolutions stay in float"] if layers else []
        size = sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
        if not exporter.runs_here:
            notes.append("converted, not executed here: this machine lacks the runtime")
            return {"file": path.name, "MB": size / 1e6}, notes
        try:
            run = exporter.open(path, threads)
            findings = compare(network, run, tried, target)
            speed = latency(run, target.example().numpy(), REPETITIONS)
        except Exception as error:
            raise _refusal(f"--format {name}: the file cannot be run and was not kept", error, target) from error
        problem = judge(findings, calibration is not None, max_drop)
        if problem is None:
            return row(path.name, findings, size, speed), notes
    raise UserError(f"--format {name}: the file does not do what the network does and was not kept: {problem}")


def _refusal(what: str, error: Exception, target: Target) -> UserError:
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return UserError(f"the file cannot be written: {error.strerror}; make room, or name another --output")
    return UserError(f"{what}{'; leave out --dynamic' if target.dynamic else ''}: {one_line(error, 300)}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def latency(run: Runner, pixels: np.ndarray, repetitions: int) -> dict[str, float]:
    """Time one image after another.

    Returns:
        `p50 ms` and `p95 ms`, milliseconds an image.
    """
    taken = []
    for repetition in range(WARM_UP + repetitions):
        start = time.perf_counter()
        run(pixels)
        if repetition >= WARM_UP:
            taken.append((time.perf_counter() - start) * 1e3)
    return {"p50 ms": statistics.median(taken), "p95 ms": float(np.percentile(taken, 95))}


def row(name: str, findings: Findings, size_bytes: int, speed: dict[str, float]) -> dict[str, Any]:
    """Return one line of the table that is printed and kept."""
    return {
        "file": name,
        "MB": size_bytes / 1e6,
        "images": findings.images,
        "logits off by": findings.logits_off_by,
        "same class %": findings.agreement,
        "mIoU %": findings.miou,
        "network's mIoU %": findings.miou_network,
        **speed,
    }
