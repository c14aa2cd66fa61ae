"""An unlabelled pool of any length: read as a stream, shuffled by a buffer, taken up where it was left.

The processes and their data workers are numbered through as `slots`. In every pass each slot draws
its own shards, and shuffles one buffer of images after another. A place in the stream is therefore
four numbers, and a resumed run reads again no more than the shard and the buffer it was in.
"""

import contextlib
import glob
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import PIL.Image
import pyarrow.parquet
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from mgd.data.loaders import UNLABELED_STREAMS, StepSampler, TrainingPairs
from mgd.errors import UserError, one_line
from mgd.pictures import UNREADABLE, decode, rescale, to_rgb
from mgd.sections import UnlabeledSection

CHUNK = 64  # rows that are read at once


class Place(NamedTuple):
    """Place of one slot in its stream: the buffer it is in, and how much of that is used up."""

    epoch: int = 0
    """Passes done."""
    shard: int = 0
    """Shards of this pass that were read before the buffer."""
    row: int = 0
    """Rows of the next shard that were read before the buffer."""
    used: int = 0
    """Images of the shuffled buffer that were handed out."""


class Pool:
    """The images of `[data.unlabeled]`.

    Args:
        section: the recipe's `[data.unlabeled]`.

    Raises:
        UserError: it cannot be opened, or has no such column.
    """

    def __init__(self, section: UnlabeledSection) -> None:
        self.section, self.count = section, None
        name, files = _source(section)
        with _one_line_errors(section):
            if section.parquet:
                rows = [pyarrow.parquet.read_metadata(path).num_rows for path in files]
                self.count = sum(rows)
                files = [path for path, number in zip(files, rows, strict=True) if number]
                if not files:
                    raise ValueError("its files hold no row")
            found = datasets.load_dataset(name, **_files_of(section, files), split=section.split, streaming=True)
            columns = list(found.features or next(iter(found.iter(1))))
        _check_column(section, columns)
        if found.info.splits and self.count is None and section.split in found.info.splits:
            self.count = found.info.splits[section.split].num_examples
        self.files = files
        found = found.select_columns([section.image_column])
        self.source = found.cast_column(section.image_column, datasets.Image(decode=False))

    def read(self, slot: int, slots: int, seed: int, place: Place) -> Iterator[tuple[str, dict, Place]]:
        """Yield the images of one slot without end.

        Args:
            slot: number of the reader.
            slots: number of readers.
            seed: shuffles shards and buffers.
            place: where to begin.

        Yields:
            A name for messages, {"bytes", "path"} of an image, and the place behind it.

        Raises:
            UserError: the slot has nothing to read, or a file of the pool cannot be read.
        """
        with _one_line_errors(self.section):
            yield from self._read(slot, slots, seed, place)

    def _read(self, slot: int, slots: int, seed: int, place: Place) -> Iterator[tuple[str, dict, Place]]:
        source = self.source
        if source.num_shards < slots:
            source = source.reshard()
        shared = source.num_shards < slots  # then every reader passes through all of it, and takes each n-th row
        epoch, first = place.epoch, place
        while True:
            order = np.random.default_rng((seed, epoch)).permutation(source.num_shards)
            mine = order if shared else order[slot::slots]
            start = first if first.epoch == epoch else Place(epoch)
            empty = True
            for window, begins in self._windows(source, mine, start, (slot, slots) if shared else (0, 1)):
                rng = np.random.default_rng((seed, epoch, slot, begins.shard, begins.row))
                used = start.used if begins[:3] == start[:3] else 0
                for number, index in enumerate(rng.permutation(len(window)).tolist(), 1):
                    if number > used:
                        empty = False
                        yield *window[index], begins._replace(used=number)
            if empty and start == Place(epoch):
                raise UserError(
                    f"[data.unlabeled] {self.section.location}: too few images for {slots} readers (processes times "
                    "[data] workers); lower workers, or set streaming = false"
                )
            epoch += 1

    def _windows(
        self, source: datasets.IterableDataset, shards: np.ndarray, start: Place, share: tuple[int, int]
    ) -> Iterator[tuple[list[tuple[str, dict]], Place]]:
        """Yield buffers of up to `buffer` images of these shards, and where each begins."""
        whole_files = source.num_shards == len(self.files)
        titles = [Path(path).name for path in self.files] if whole_files else range(source.num_shards)
        window: list[tuple[str, dict]] = []
        begins = start._replace(used=0)
        for number in range(start.shard, len(shards)):
            shard = int(shards[number])
            row = 0
            done = start.row if number == start.shard else 0
            # Not `iter(source)`: in a data worker that would divide the shards once more.
            for chunk in source.shard(source.num_shards, shard).iter(CHUNK):
                for image in chunk[self.section.image_column]:
                    row += 1
                    if row <= done:
                        continue
                    if (row + shard) % share[1] == share[0]:
                        window.append((f"{titles[shard]} row {row - 1}", image))
                    if len(window) == self.section.buffer:
                        yield window, begins
                        window, begins = [], Place(start.epoch, number, row)
        if window:
            yield window, begins


def scan_pool(pool: Pool) -> tuple[int, list[str]]:
    """Read a stream once; return how many images it has, and a line on each that cannot be used."""
    count, problems = 0, []
    for name, value, place in pool.read(0, 1, 0, Place()):
        if place.epoch:
            break
        count += 1
        try:
            _decode(name, value)
        except UserError as error:
            problems.append(str(error))
    return count, problems


def _decode(name: str, value: dict | None) -> PIL.Image.Image:
    try:
        if value is None:
            raise ValueError("the table holds no image for it")
        is_here = value["bytes"] is not None or Path(value["path"]).is_file()
        return to_rgb(decode(value) if is_here else datasets.Image().decode_example(value))  # which reads urls
    except UNREADABLE as error:
        reason = re.sub(r" <_io.BytesIO object at \w+>", "", str(error))
        raise UserError(f"image {name} cannot be read: {reason}") from error


class StreamBatches(IterableDataset):
    """Batches of a run whose unlabelled images are a stream; labelled images and masks are as ever.

    A batch also has `stream`: the slot that made it and its place behind it; and `skipped`: names
    of images that could not be used.

    Args:
        pairs: labelled images and augmentation.
        pool: the stream.
        sampler: positions of this process's part of every step.
        workers: data workers of this process, at least 1.
        places: slot -> place, of a resumed run.
        on_error: "raise" or "skip".
    """

    def __init__(
        self,
        pairs: TrainingPairs,
        pool: Pool,
        sampler: StepSampler,
        workers: int,
        places: Mapping[int, Place],
        on_error: str,
    ) -> None:
        self.pairs, self.pool, self.sampler, self.workers = pairs, pool, sampler, workers
        self.places, self.on_error = places, on_error

    def __iter__(self) -> Iterator[dict]:
        """Yield the batches of this worker's steps."""
        worker = get_worker_info()
        steps = self.sampler.steps
        # The same steps for the same slot, wherever a run is taken up.
        local = (steps.start + (worker.id if worker else 0)) % self.workers
        slot = self.sampler.rank * self.workers + local
        slots = self.sampler.world_size * self.workers
        images = self.pool.read(slot, slots, self.pairs.seed, self.places.get(slot, Place()))
        place = self.places.get(slot, Place())
        skipped: list[str] = []
        for step, positions in zip(steps, self.sampler, strict=True):
            if step % self.workers != local:
                continue
            samples = []
            for position in positions:
                pair = {}
                for key in UNLABELED_STREAMS:
                    name, image, place = self._next(images, skipped)
                    pair[key] = (name, image)
                samples.append(self.pairs.sample(position, pair))
            yield default_collate(samples) | {"stream": (slot, place), "skipped": skipped}
            skipped = []

    def _next(self, images: Iterator, skipped: list[str]) -> tuple[str, PIL.Image.Image, Place]:
        while True:
            name, value, place = next(images)
            try:
                image = rescale(_decode(name, value), self.pairs.section.image_scale)
                return name, image, place
            except UserError as error:
                where = f"[data.unlabeled] {self.pool.section.location}: {error}"
                if self.on_error == "raise":
                    raise UserError(f'{where}; mend it, or leave it out: [data] on_error = "skip"') from error
                skipped.append(where)
                if len(skipped) > 1000:
                    raise UserError(f"{where}, as were the 1000 before it") from error


def whole_pool(section: UnlabeledSection) -> datasets.Dataset:
    """Load `[data.unlabeled]` as a table with columns `id` and `image`, for a pool that fits the disk.

    Raises:
        UserError: it cannot be loaded, or has no such column.
    """
    name, files = _source(section)
    with _one_line_errors(section):
        found = datasets.load_dataset(name, **_files_of(section, files), split=section.split)
        _check_column(section, found.column_names)
        found = found.select_columns([section.image_column])
        found = found if section.image_column == "image" else found.rename_column(section.image_column, "image")
        found = found.cast_column("image", datasets.Image())
    return found.add_column("id", [f"pool/{index:08d}" for index in range(len(found))]).select_columns(["id", "image"])


def identity(section: UnlabeledSection) -> str:
    """Return a SHA-256 over names and sizes of the pool's files (of a hub pool, its name), to tell it has changed."""
    name, files = _source(section)
    listed = [f"{Path(path).name} {Path(path).stat().st_size}" for path in files]
    return hashlib.sha256("\n".join([name, section.split, section.image_column, *listed]).encode()).hexdigest()


def _files_of(section: UnlabeledSection, files: list[str]) -> dict[str, dict]:
    """Return `data_files` for `load_dataset`, which takes names for patterns."""
    return {"data_files": {section.split: [glob.escape(path) for path in files]}} if files else {}


def _check_column(section: UnlabeledSection, columns: list[str]) -> None:
    if section.image_column not in columns:
        raise UserError(
            f"[data.unlabeled] image_column = {section.image_column!r}: there is no such column; "
            f"choices: {', '.join(columns)}"
        )


@contextlib.contextmanager
def _one_line_errors(section: UnlabeledSection) -> Iterator[None]:
    """Word whatever the many libraries that read a pool may raise as one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = one_line(error.__cause__ or error)
        raise UserError(
            f"[data.unlabeled] {section.location} cannot be read: {reason}; mend it, and run the same command"
        ) from error


def _source(section: UnlabeledSection) -> tuple[str, list[str]]:
    """Return what `datasets.load_dataset` calls it, and its local files."""
    if section.hub:
        return section.hub, []
    kind = "parquet" if section.parquet else "webdataset"
    folder = Path(section.location)
    ending = "parquet" if section.parquet else "tar"
    files = sorted(
        str(path)
        for path in (folder.rglob("*") if folder.is_dir() else [])
        if path.suffix.lower() == f".{ending}" and not path.name.startswith(".") and path.is_file()
    )
    if not files:
        raise UserError(f"[data.unlabeled] {kind} = {section.location!r}: no *.{ending} there")
    return kind, files
