"""What the training loop draws its batches from: a map-style pool, or a stream whose place it keeps."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from mgd.data.images import start_worker
from mgd.data.loaders import StepSampler, TrainingPairs, training_loader
from mgd.data.stream import Place, Pool, StreamBatches
from mgd.errors import UserError
from mgd.files import append_line, keep_lines
from mgd.sections import DataSection


class Feed:
    """Batches of one run, from where it was left.

    Args:
        pairs: the samples of the run.
        pool: the stream of unlabelled images, if that is what they are.
        section: the recipe's `[data]`; `workers` and `on_error` are used.
        accelerator: device and processes.
        folder: run folder; images of the stream that are skipped are listed in `skipped.jsonl`.
        reached: the resume point: `step`, and `stream`, which `state` has made.
    """

    def __init__(
        self,
        pairs: TrainingPairs,
        pool: Pool | None,
        section: DataSection,
        accelerator: Accelerator,
        folder: Path,
        reached: Mapping,
    ) -> None:
        self.pairs, self.pool, self.section, self.accelerator = pairs, pool, section, accelerator
        self.log = folder / "skipped.jsonl"
        self.workers = max(1, section.workers)  # whatever the machine: each worker has its own part of the stream
        self.readers = self.workers * accelerator.num_processes
        self.skipped, self.places = 0, {}
        if accelerator.is_main_process:  # the steps after the resume point are done again
            keep_lines(self.log, lambda row: row["step"] <= reached["step"])
        if saved := reached["stream"]:
            self.skipped = saved["skipped"] if accelerator.is_main_process else 0
            self.places = {int(slot): Place(*place) for slot, place in saved["places"].items()}
            if saved["readers"] != self.readers:
                accelerator.print(f"note: {folder}: other readers than before; the stream begins a new pass")
                epoch = 1 + max(place.epoch for place in self.places.values())
                self.places = dict.fromkeys(range(self.readers), Place(epoch))

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[dict]:
        """Yield this process's part of the batch of each step, and note where the stream is.

        Args:
            start: the first step.
            stop: the one after the last.
            batch_size: of all processes.

        Raises:
            UserError: a data worker died, or an image cannot be read.
        """
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        sampler = StepSampler(start, stop, batch_size, rank, world_size)
        loader = self._loader(sampler, pin_memory=self.accelerator.device.type == "cuda")
        try:
            for step, batch in zip(sampler.steps, loader, strict=True):
                if self.pool is not None:
                    self._note(step, batch)
                yield batch
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise UserError(
                "a data worker died (killed for memory?); the same command goes on from the last resume point, "
                "[data] workers = 0 or a smaller buffer needs less"
            ) from error

    def _loader(self, sampler: StepSampler, pin_memory: bool) -> DataLoader:
        if self.pool is None:
            return training_loader(self.pairs, sampler, self.section.workers, pin_memory)
        batches = StreamBatches(self.pairs, self.pool, sampler, self.workers, self.places, self.section.on_error)
        return DataLoader(
            batches,
            batch_size=None,
            num_workers=self.workers if self.section.workers else 0,
            pin_memory=pin_memory,
            worker_init_fn=start_worker,
        )

    def _note(self, step: int, batch: dict) -> None:
        slot, place = batch.pop("stream")
        self.places[int(slot)] = Place(*map(int, place))
        for image in batch.pop("skipped"):
            self.skipped += 1
            append_line(self.log, {"step": step + 1, "image": image})

    def state(self) -> dict | None:
        """Return what a resume point keeps of the stream, the same on all processes."""
        if self.pool is None:
            return None
        # A process knows the old places of the others' readers; their own are further.
        shares = gather_object([(slot, place) for slot, place in self.places.items()])
        places: dict[int, Place] = {}
        for slot, place in shares:
            places[slot] = max(Place(*place), places.get(slot, Place()))
        return {"readers": self.readers, "places": places, "skipped": self.skipped_everywhere()}

    def skipped_everywhere(self) -> int:
        """Images of the stream that were skipped so far, by all processes."""
        return sum(gather_object([self.skipped])) if self.pool else 0
