"""Reading every image once, before hours are spent on them."""

import functools
from typing import NamedTuple

import numpy as np

from mgd.data.images import Images, read_each
from mgd.errors import UserError
from mgd.progress import progress_bar


class Findings(NamedTuple):
    """What reading some images showed."""

    problems: dict[str, str]
    """Id of an image that cannot be used -> why."""
    pixels: np.ndarray
    """`[256]` int64: labelled pixels of each value."""
    sizes: set[tuple[int, int]]
    """Widths and heights, pixels."""


def scan(images: Images, with_label: bool, workers: int, title: str, rank: int = 0, world_size: int = 1) -> Findings:
    """Decode this process's share of the images.

    Args:
        images: what to read.
        with_label: read and check the masks, too.
        workers: data loading processes.
        title: of the progress bar.
        rank: number of this process.
        world_size: number of processes.
    """
    share = range(rank, len(images), world_size)
    read = read_each(images, share, functools.partial(_look, with_label=with_label), workers)
    bar = progress_bar(rank == 0, iterable=read, total=len(share), desc=title)
    problems, pixels, sizes = {}, np.zeros(256, np.int64), set()
    for name, problem, counts, size in bar:
        if problem:
            problems[name] = problem
            continue
        sizes.add(size)
        if counts is not None:
            pixels += counts
    return Findings(problems, pixels, sizes)


def _look(
    images: Images, index: int, with_label: bool
) -> tuple[str, str | None, np.ndarray | None, tuple[int, int] | None]:
    """Return id, what is wrong, labelled pixels by value `[256]`, and width and height of one image."""
    try:
        image, label = images.read(index, with_label)
    except UserError as error:
        return images.ids[index], str(error), None, None
    pixels = None if label is None else np.bincount(label.ravel(), minlength=256)
    return images.ids[index], None, pixels, image.size
