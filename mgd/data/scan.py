"""Reading every image once, before hours are spent on them."""

from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mgd.data.loaders import Images, available_cpus, start_worker
from mgd.errors import UserError


class Findings(NamedTuple):
    """What reading some images showed."""

    problems: dict[str, str]
    """Id of an image that cannot be used -> why."""
    pixels: np.ndarray
    """`[256]` int64: labelled pixels of each value."""
    sizes: set[tuple[int, int]]
    """Widths and heights, pixels."""


class _Reads(Dataset):
    def __init__(self, images: Images, with_label: bool, share: range) -> None:
        self.images, self.with_label, self.share = images, with_label, share

    def __len__(self) -> int:
        return len(self.share)

    def __getitem__(self, place: int) -> tuple[str, str | None, np.ndarray | None, tuple[int, int] | None]:
        index = self.share[place]
        try:
            image, label = self.images.read(index, self.with_label)
        except UserError as error:
            return self.images.ids[index], str(error), None, None
        pixels = None if label is None else np.bincount(label.ravel(), minlength=256)
        return self.images.ids[index], None, pixels, image.size


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
    # Starting processes costs more than reading a few images.
    workers = min(workers, available_cpus()) if len(share) > 500 else 0
    loader = DataLoader(
        _Reads(images, with_label, share),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=start_worker,
        collate_fn=_as_it_is,
    )
    problems, pixels, sizes = {}, np.zeros(256, np.int64), set()
    for name, problem, counts, size in tqdm(loader, desc=title, disable=None if rank == 0 else True, leave=False):
        if problem:
            problems[name] = problem
            continue
        sizes.add(size)
        if counts is not None:
            pixels += counts
    return Findings(problems, pixels, sizes)


def _as_it_is(row: tuple) -> tuple:
    return row
