"""The two pictures of a run: curves.png and overlays.png."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import PIL.Image
from torch import Tensor

from mgd.errors import UserError

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


def plot_curves(log: Path, output: Path) -> None:
    """Draw the losses and the val mIoU of a metrics.jsonl over the steps."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    losses = sorted({key for row in rows for key in row if key.startswith("loss")})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for key in losses:
        points = [(row["step"], row[key]) for row in rows if key in row]
        left.plot(*zip(*points, strict=True), label=key)
    left.set(xlabel="step", ylabel="loss", yscale="log")
    left.legend(fontsize="small")
    points = [(row["step"], row["val_miou"]) for row in rows if "val_miou" in row]
    right.plot(*zip(*points, strict=True), marker="o")
    right.set(xlabel="step", ylabel="val mIoU, %")
    figure.savefig(output, dpi=100)
    pyplot.close(figure)


def colorize(label: np.ndarray, colors: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Return `[H, W, 3]` uint8 colours of a label map `[H, W]`; 255 is white."""
    table = np.full((256, 3), 255, np.uint8)
    table[: len(colors)] = colors
    return table[label]


def overlay(image: np.ndarray, label: np.ndarray, colors: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Lay class colours over an image `[H, W, 3]` uint8, half transparent."""
    return ((image.astype(np.uint16) + colorize(label, colors)) // 2).astype(np.uint8)


def save_prediction(
    folder: Path,
    colors: Sequence[tuple[int, int, int]],
    encode: Callable[[np.ndarray], np.ndarray],
    name: str,
    classes: Tensor,
) -> None:
    """Save predicted classes as a palette PNG below `folder`.

    Args:
        folder: made when missing; an id with slashes makes folders below it, never outside.
        colors: class colours.
        encode: turns classes into the values that the data set's masks hold.
        name: id of the image.
        classes: `[H, W]`.
    """
    path = (folder / f"{name}.png").resolve()
    if not path.is_relative_to(folder.resolve()):
        raise UserError(f"{name}: the id would be written outside {folder}")
    path.parent.mkdir(parents=True, exist_ok=True)
    values = encode(classes.numpy())
    palette = np.full((256, 3), 255, np.uint8)
    palette[encode(np.arange(len(colors)))] = colors
    picture = PIL.Image.fromarray(values).convert("L")
    picture.putpalette(palette.flatten().tolist())
    picture.save(path)


def save_overlays(
    rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], colors: Sequence[tuple[int, int, int]], output: Path
) -> None:
    """Save a picture with one row an image: image, truth, prediction.

    Args:
        rows: image `[H, W, 3]` uint8, label `[H, W]`, prediction `[H, W]`.
        colors: class colours.
        output: PNG file.
    """
    gap, side = 4, 320
    tiles = []
    for image, label, prediction in rows:
        pictures = (image, overlay(image, label, colors), overlay(image, prediction, colors))
        factor = side / image.shape[1]
        size = (side, max(1, round(image.shape[0] * factor)))
        tiles.append([PIL.Image.fromarray(picture).resize(size) for picture in pictures])
    height = sum(row[0].height + gap for row in tiles) - gap
    canvas = PIL.Image.new("RGB", (3 * side + 2 * gap, height), "white")
    top = 0
    for row in tiles:
        for column, picture in enumerate(row):
            canvas.paste(picture, (column * (side + gap), top))
        top += row[0].height + gap
    canvas.save(output)
