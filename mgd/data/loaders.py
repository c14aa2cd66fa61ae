"""Batches of a training step, and the images of an evaluation.

Sample p of a run (step * batch_size + place in the batch) is a pure function of (seed, p): which
image, which crop, which flip. So the same images come in the same order on one process and on
many, and a resumed run goes on exactly where it stopped.
"""

import functools
from collections.abc import Iterator, Mapping

import numpy as np
import PIL.Image
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mgd.data.cutmix import box_masks
from mgd.data.images import EachImage, Images, available_cpus, evaluation_item, start_worker
from mgd.data.targets import CachedTargets
from mgd.data.transforms import View, augment, draw_view
from mgd.errors import UserError
from mgd.sections import DataSection

LABELED, UNLABELED, MIX, MASK = range(4)  # the streams of randomness; each is drawn on its own
UNLABELED_STREAMS = {"unlabeled": UNLABELED, "mix": MIX}


class TrainingPairs(Dataset):
    """Sample p: one labelled image with its label and, if wanted, two unlabelled ones and a CutMix mask.

    Each stream runs through its images in a new random order every pass, so the shorter one is
    cycled with reshuffling.
    """

    def __init__(
        self,
        labeled: Images,
        unlabeled: Images | None,
        section: DataSection,
        seed: int,
        targets: CachedTargets | None = None,
    ) -> None:
        self.labeled, self.unlabeled, self.section, self.seed, self.targets = labeled, unlabeled, section, seed, targets

    def __getitem__(self, position: int) -> dict[str, torch.Tensor | str]:
        """Return `image`, `label`, `id` and, with an unlabelled set, `unlabeled`, `mix`, `mask`.

        With cached teachers also what they saw in the three: `image/TEACHER/KIND`, `unlabeled/...`, `mix/...`, and of
        some kinds `image/valid`, ... (mgd/data/targets.py).
        """
        pair = {}
        if self.unlabeled is not None:
            for key, stream in UNLABELED_STREAMS.items():
                name, image, _ = self._read(self.unlabeled, stream, position)
                pair[key] = (name, image)
        return self.sample(position, pair)

    def sample(self, position: int, pair: Mapping[str, tuple[str, PIL.Image.Image]]) -> dict[str, torch.Tensor | str]:
        """Return a sample of one labelled and some unlabelled images.

        Args:
            position: p, which draws the labelled image and what is seen of each.
            pair: `unlabeled` and `mix`, name and RGB image of each; or none.

        Returns:
            `id`, `image` `[3, C, C]` uint8 and `label` `[C, C]` int64, C being the crop; with a pair `unlabeled`, `mix`
            `[3, C, C]`, their `_id`s and `mask` `[1, C, C]` bool; and what cached teachers said of each.
        """
        name, image, label = self._read(self.labeled, LABELED, position)
        sample = {"id": name, **self._seen("image", name, image, LABELED, position)}
        sample["image"], sample["label"] = self._augment(image, label, LABELED, position)
        for key, (unlabeled_name, unlabeled) in pair.items():
            sample[f"{key}_id"] = unlabeled_name
            sample |= self._seen(key, unlabeled_name, unlabeled, UNLABELED_STREAMS[key], position)
            sample[key], _ = self._augment(unlabeled, None, UNLABELED_STREAMS[key], position)
        if pair:
            generator = torch.Generator().manual_seed(int(_rng(self.seed, MASK, position).integers(2**63)))
            sample["mask"] = box_masks(1, (self.section.crop, self.section.crop), generator)[0]
        return sample

    def _seen(self, key: str, name: str, image: PIL.Image.Image, stream: int, position: int) -> dict[str, torch.Tensor]:
        if self.targets is None:
            return {}
        view = self.view(*image.size, stream, position)
        return {
            f"{key}/{what}": value
            for what, value in self.targets.cut(name, image.size, view, self.section.crop, stream == LABELED).items()
        }

    def _read(self, images: Images, stream: int, position: int) -> tuple[str, PIL.Image.Image, np.ndarray | None]:
        passes, place = divmod(position, len(images))
        index = int(_order(self.seed, stream, passes, len(images))[place])
        return images.ids[index], *images.read(
            index, stream == LABELED, lambda width, height: self.view(width, height, stream, position).box[3]
        )

    def _augment(
        self, image: PIL.Image.Image, label: np.ndarray | None, stream: int, position: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return augment(image, label, self.section.crop, self.view(*image.size, stream, position))

    def view(self, width: int, height: int, stream: int, position: int) -> View:
        """Return what a sample shows of one of its images.

        Args:
            width: of the image, pixels.
            height: of the image, pixels.
            stream: LABELED, UNLABELED or MIX.
            position: p, of the sample.
        """
        section = self.section
        return _view((self.seed, stream, position), (width, height), section.crop, section.scales, section.flip)


def _rng(seed: int, stream: int, position: int) -> np.random.Generator:
    return np.random.default_rng((seed, stream, position))


@functools.lru_cache(maxsize=8)  # image, mask and augmentation ask for the same one
def _view(key: tuple[int, int, int], size: tuple[int, int], crop: int, scales: tuple[float, ...], flip: bool) -> View:
    return draw_view(*size, crop, scales, flip, _rng(*key))


@functools.lru_cache(maxsize=8)
def _order(seed: int, stream: int, passes: int, length: int) -> np.ndarray:
    return np.random.default_rng((seed, stream, passes, length)).permutation(length)


class StepSampler(Sampler[list[int]]):
    """The positions of this process's part of every global batch, from one step to another."""

    def __init__(self, start: int, stop: int, batch_size: int, rank: int, world_size: int) -> None:
        self.steps = range(start, stop)
        self.batch_size, self.part = batch_size, batch_size // world_size
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        """Yield one list of positions a step."""
        for step in self.steps:
            first = step * self.batch_size + self.rank * self.part
            yield list(range(first, first + self.part))

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.steps)


def training_loader(pairs: TrainingPairs, sampler: StepSampler, workers: int, pin_memory: bool) -> DataLoader:
    """Return the loader of one run.

    Args:
        pairs: the samples.
        sampler: which of them are this process's part of each step.
        workers: data loading processes; no more than there are cores or steps.
        pin_memory: for a GPU.

    Returns:
        Of a dict a step: what `TrainingPairs.sample` returns, stacked to `[b, ...]`; of names a list.
    """
    return DataLoader(
        pairs,
        batch_sampler=sampler,
        num_workers=min(workers, len(sampler), available_cpus()),
        pin_memory=pin_memory,
        worker_init_fn=start_worker,
    )


def evaluation_loader(images: Images, batch_size: int, workers: int, rank: int, world_size: int) -> DataLoader:
    """Return a loader of this process's share of the images: lists of `evaluation_item`s.

    Args:
        images: with labels.
        batch_size: items of one list.
        workers: data loading processes; no more than there are cores or images.
        rank: number of this process.
        world_size: number of processes.
    """
    share = list(range(rank, len(images), world_size))
    return DataLoader(
        EachImage(images, share, evaluation_item),
        batch_size=batch_size,
        num_workers=min(workers, len(share), available_cpus()),
        collate_fn=list,
        worker_init_fn=start_worker,
    )


def per_process(batch_size: int, world_size: int) -> int:
    """Return the part of the global batch that one process takes.

    Raises:
        UserError: the batch does not divide; the message names batch sizes that would.
    """
    if batch_size % world_size:
        below, above = batch_size // world_size * world_size, (batch_size // world_size + 1) * world_size
        fitting = f"{above}" if below == 0 else f"{below} or {above}"
        raise UserError(
            f"[optim] batch_size = {batch_size} does not divide over {world_size} processes; "
            f"use {fitting}, or {_divisors(batch_size)} processes"
        )
    return batch_size // world_size


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
