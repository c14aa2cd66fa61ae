"""The pictures of runs and reports: curves, overlays, contact sheets, cost and partition plots."""

import json
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import PIL.ImageOps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from mgd.files import write_aside
from mgd.pictures import colorize

LINES = ("-", "--", ":", "-.")


def plot_curves(log: Path, output: Path) -> None:
    """Draw the losses and the val mIoU of a metrics.jsonl over the steps."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").split("\n") if line]
    losses = sorted({key for row in rows for key in row if key.startswith("loss")})
    figure = Figure(figsize=(10, 4), layout="constrained")  # pyplot would change the backend of who imports this
    left, right = figure.subplots(1, 2)
    for key in losses:
        points = [(row["step"], row[key]) for row in rows if key in row]
        left.plot(*zip(*points, strict=True), label=key)
    left.set(xlabel="step", ylabel="loss", yscale="log")
    left.legend(fontsize="small")
    points = [(row["step"], row["val_miou"]) for row in rows if "val_miou" in row]
    right.plot(*zip(*points, strict=True), marker="o")
    right.set(xlabel="step", ylabel="val mIoU, %")
    write_aside(output, lambda path: figure.savefig(path, dpi=100, format="png"))


def overlay(image: np.ndarray, label: np.ndarray, colors: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Lay class colours over an image `[H, W, 3]` uint8, half transparent."""
    return ((image.astype(np.uint16) + colorize(label, colors)) // 2).astype(np.uint8)


def save_overlays(
    rows: Sequence[tuple[np.ndarray, ...]],
    classes: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
    output: Path,
    titles: Sequence[str] = ("image", "truth", "prediction"),
) -> None:
    """Save a picture with one row an image: the image, then label maps laid over it; a legend below.

    Args:
        rows: image `[H, W, 3]` uint8, then label maps `[H, W]`.
        classes: class names.
        colors: class colours.
        output: PNG file.
        titles: of the columns; may have several lines.
    """
    gap, side = 4, 320 if len(titles) <= 3 else 220
    font = PIL.ImageFont.load_default(13)
    tiles = []
    for image, *labels in rows:
        pictures = (image, *(overlay(image, label, colors) for label in labels))
        size = (side, max(1, round(image.shape[0] * side / image.shape[1])))
        tiles.append([PIL.Image.fromarray(picture).resize(size) for picture in pictures])
    head = 4 + 16 * max(title.count("\n") + 1 for title in titles)
    width = len(titles) * (side + gap) - gap
    legend, legend_height = _legend(classes, colors, width, font)
    height = head + sum(row[0].height + gap for row in tiles) + legend_height
    canvas = PIL.Image.new("RGB", (width, height), "white")
    draw = PIL.ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.multiline_text((column * (side + gap) + 2, 2), title, "black", font)
    top = head
    for row in tiles:
        for column, picture in enumerate(row):
            canvas.paste(picture, (column * (side + gap), top))
        top += row[0].height + gap
    for left, down, name, color in legend:
        draw.rectangle((left, top + down + 3, left + 12, top + down + 15), tuple(color), "black")
        draw.text((left + 17, top + down + 1), name, "black", font)
    write_aside(output, lambda aside: canvas.save(aside, format="PNG"))


def save_contact_sheet(pictures: Sequence[tuple[str, PIL.Image.Image]], output: Path) -> None:
    """Save thumbnails in rows, in their order, with the ends of their names below.

    Args:
        pictures: name and RGB image.
        output: PNG file.
    """
    side, gap, line = 160, 4, 16
    font = PIL.ImageFont.load_default(11)
    columns = max(1, min(10, round(len(pictures) ** 0.5 + 0.5)))
    rows = -(-len(pictures) // columns)
    canvas = PIL.Image.new("RGB", (columns * (side + gap), rows * (side + line + gap)), "white")
    draw = PIL.ImageDraw.Draw(canvas)
    for place, (name, picture) in enumerate(pictures):
        left, top = place % columns * (side + gap), place // columns * (side + line + gap)
        thumbnail = PIL.ImageOps.contain(picture, (side, side))
        canvas.paste(thumbnail, (left + (side - thumbnail.width) // 2, top + (side - thumbnail.height) // 2))
        draw.text((left + 2, top + side + 1), name[-26:], "black", font)
    write_aside(output, lambda aside: canvas.save(aside, format="PNG"))


def _legend(
    classes: Sequence[str], colors: Sequence[tuple[int, int, int]], width: int, font: PIL.ImageFont.FreeTypeFont
) -> tuple[list[tuple[int, int, str, tuple[int, int, int]]], int]:
    """Place name and colour of each class in lines of `width` pixels; return them and the height."""
    items, left, top = [], 2, 0
    for name, color in zip(classes, colors, strict=True):
        length = 17 + round(font.getlength(name)) + 14
        if left + length > width and left > 2:
            left, top = 2, top + 20
        items.append((left, top, name, color))
        left += length
    return items, top + 22


def plot_costs(panels: Mapping[str, Sequence[tuple[str, str, float, float, float | None]]], output: Path) -> None:
    """Draw mIoU against the cost of the whole network, as Fig. 1 of the paper; points of one cost side by side.

    Args:
        panels: by title, the points: method, text, GMACs, val mIoU %, spread.
        output: PNG file.
    """
    figure, axes = _panels(panels)
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        colors = {method: f"C{index % 10}" for index, method in enumerate(sorted({point[0] for point in points}))}
        best_first = sorted(points, key=lambda point: -point[3])
        costs = np.array([point[2] for point in best_first])
        places = costs.copy()
        for cost, count in zip(*np.unique(costs, return_counts=True), strict=True):
            places[costs == cost] *= _side_by_side(count)
        for number, (place, point) in enumerate(zip(places.tolist(), best_first, strict=True), 1):
            method, text, _, miou, spread = point
            label = f"{number} {text} ({method})"
            axis.errorbar(place, miou, spread or 0.0, fmt="o", capsize=3, color=colors[method], label=label)
            axis.annotate(str(number), (place, miou), xytext=(3, 3), textcoords="offset points", fontsize=7)
        axis.set(
            xlabel="GMACs of backbone and head, one crop (equal costs side by side)", ylabel="val mIoU, %", xscale="log"
        )
        axis.set_title(title, fontsize="small")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(LogFormatter())  # the fewer labels, the more decades
        axis.tick_params(axis="x", which="both", labelsize=7)
        axis.margins(x=0.3)
        axis.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    write_aside(output, lambda path: figure.savefig(path, dpi=100, format="png"))


def plot_partitions(
    panels: Mapping[str, Mapping[str, Sequence[tuple[int, float, float | None]]]], output: Path
) -> None:
    """Draw mIoU against the number of labelled images, as Fig. 3 of the paper; lines side by side.

    Args:
        panels: by title and name of the line, the points: labelled images, val mIoU %, spread.
        output: PNG file.
    """
    figure, axes = _panels(panels)
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        factors = _side_by_side(len(lines))
        for index, (name, points) in enumerate(lines.items()):
            counts, means, spreads = zip(*sorted(points), strict=True)
            places = np.array(counts) * factors[index]
            errors = [spread or 0.0 for spread in spreads]
            style = LINES[index // 10 % len(LINES)]  # colours come again after ten
            axis.errorbar(places, means, errors, marker="o", capsize=3, label=name, linestyle=style)
        counts = sorted({point[0] for points in lines.values() for point in points})
        axis.set(xlabel="labelled images (lines side by side)", ylabel="val mIoU, %", xscale="log")
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.set_title(title, fontsize="small")
        axis.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside it: lines may be many
    write_aside(output, lambda path: figure.savefig(path, dpi=100, format="png"))


def _side_by_side(count: int) -> np.ndarray:
    """Return factors that move points at one place of a logarithmic axis apart: by 4 % each, and 17 % at the most."""
    return np.exp(np.linspace(-1, 1, count) * 0.02 * min(count - 1, 8))


def _panels(panels: Mapping[str, Sized]) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels side by side, each with room beside it for a legend of all that it shows."""
    height = max(4.5, 1 + max(map(len, panels.values()), default=0) / 6)
    figure = Figure(figsize=(8.5 * len(panels), height), layout="constrained")
    return figure, list(figure.subplots(1, len(panels), squeeze=False)[0])
