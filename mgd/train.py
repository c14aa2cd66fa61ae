"""The training loop: the only one, for every method."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm.layers
import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn

from mgd.checkpoint import load_checkpoint, save_checkpoint
from mgd.data.feed import Feed
from mgd.data.loaders import TrainingPairs
from mgd.data.stream import Pool
from mgd.errors import Stopped, UserError
from mgd.files import append_line, keep_lines
from mgd.guard import Guard, StopSignals
from mgd.methods.base import Method, bare
from mgd.methods.contract import checked_output
from mgd.optim import build_optimizer, poly_lr
from mgd.progress import progress_bar
from mgd.recipe import Recipe
from mgd.runs import recipe_differences
from mgd.sections import Optim
from mgd.tracking import open_tracker, track


class TrainingTime(NamedTuple):
    """What a training took."""

    seconds: float
    skipped_steps: int
    skipped_images: int
    """Of the unlabelled stream."""


def train(
    method: Method,
    pairs: TrainingPairs,
    pool: Pool | None,
    recipe: Recipe,
    num_steps: int,
    accelerator: Accelerator,
    evaluate: Callable[[nn.Module, int], float],
) -> TrainingTime:
    """Train a method's networks in place, from the last resume point if there is one.

    Args:
        method: its networks and layers are trained.
        pairs: the samples of the run.
        pool: the stream of unlabelled images, if any.
        recipe: the run; `[run]`, `[optim]`, `[eval] every` and, of `[data]`, `workers` and `on_error` are used.
            `metrics.jsonl` and `checkpoint/` are written into its folder.
        num_steps: optimiser steps of the whole run.
        accelerator: device, processes and precision.
        evaluate: bare network and step -> mIoU; called on all processes.

    Returns:
        What it took, over all sittings.

    Raises:
        UserError: a loss that is not finite, or a resume point that does not fit.
        Stopped: a signal came; a resume point has been written.
    """
    trained, modules = _on_device(method, recipe.optim, accelerator)
    optimizer, folder, every = build_optimizer(recipe.optim, trained), recipe.run_dir, recipe.eval.every
    point = ResumePoint(folder / "checkpoint", modules, optimizer, recipe, accelerator)
    start = point.reached["step"]
    *prepared, optimizer = accelerator.prepare(*trained, optimizer)
    _hand_over(method, prepared)

    def evaluates_at(step: int) -> bool:
        return every > 0 and 0 < step < num_steps and step % every == 0

    log = StepLog(recipe, start, num_steps, evaluates_at(start), accelerator)
    guard = Guard(recipe.optim.nonfinite, folder, modules, accelerator, point.reached["skipped"])
    feed = Feed(pairs, pool, recipe.data, accelerator, folder, point.reached)
    kept = f"step {{}} of {num_steps} is kept; the same command goes on from there"
    with StopSignals() as signals:

        def score(step: int) -> None:
            with signals.at_once(kept.format(step)), point.not_training():  # it is done again from the resume point
                log.write_scores(step, evaluate(bare(method.deployed()), step))

        if evaluates_at(start):
            score(start)
        for step, batch in enumerate(feed.batches(start, num_steps, recipe.optim.batch_size), start):
            batch = send_to_device(batch, accelerator.device, non_blocking=True)
            lr = poly_lr(recipe.optim, step, num_steps)
            _begin_step(method, optimizer, lr, seed=hash((recipe.run.seed, step, accelerator.process_index)))
            guard.before()

            # ---- one training step ---------------------------------------------------------------
            with accelerator.autocast():
                out = checked_output(method.step(batch, step), method)
            accelerator.backward(out.loss)
            sound, signal_number = guard.look(step, out, batch, signals.received)
            if sound:
                optimizer.step()
                method.after_step(step)
            optimizer.zero_grad()
            # --------------------------------------------------------------------------------------

            done = step + 1
            saves = done % recipe.run.checkpoint_every == 0 or done == num_steps or evaluates_at(done) or signal_number
            if done % recipe.run.log_every == 0 or saves:
                log.write(done, {"loss": out.loss, **out.log}, lr)
            if saves:
                point.write(step=done, skipped=guard.skipped, stream=feed.state())
            if signal_number:
                raise Stopped(signal_number, kept.format(done))
            if evaluates_at(done):
                score(done)
        guard.stop_if_asked(signals.received, kept.format(num_steps))
    _hand_over(method, trained)
    accelerator.free_memory()  # a teacher's optimiser must not stay while its student trains
    return TrainingTime(point.seconds(), guard.skipped, feed.skipped_everywhere())


class ResumePoint:
    """The resume point of a run: loaded in place if there is one, written again and again.

    Args:
        folder: the run's `checkpoint/`.
        modules: networks by name.
        optimizer: their optimiser.
        recipe: the run; a resume point of another is refused.
        accelerator: device and processes.

    Raises:
        UserError: it is damaged, of another recipe, or not the same on all machines.
    """

    def __init__(
        self,
        folder: Path,
        modules: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        recipe: Recipe,
        accelerator: Accelerator,
    ) -> None:
        self.folder, self.modules, self.optimizer = folder, modules, optimizer
        self.recipe, self.accelerator = recipe, accelerator
        self.reached: dict[str, Any] = {"step": 0, "seconds": 0.0, "skipped": 0, "stream": None}
        found = load_checkpoint(folder, modules, optimizer)
        step = found["step"] if found else 0
        steps = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
        if len(set(steps)) > 1:
            raise UserError(
                f"{folder}: the processes see different resume points (steps {', '.join(map(str, steps))}); "
                "[run] output must lie on a disk that all machines share"
            )
        if found:
            if differences := recipe_differences(found.get("recipe", {}), recipe):
                raise UserError(
                    f"{folder} is of another recipe ({'; '.join(differences[:4])}); start over: "
                    f"{recipe.command} --restart"
                )
            self.reached |= found
            now = accelerator.mixed_precision
            before = found.get("mixed_precision", now)
            changed = f", with mixed_precision = {now!r}, until now with {before!r}" if before != now else ""
            accelerator.print(f"{folder.parent}: goes on at step {step}{changed}")
        self.began = time.perf_counter()

    def seconds(self) -> float:
        """Seconds spent training, over all sittings."""
        return self.reached["seconds"] + time.perf_counter() - self.began

    @contextlib.contextmanager
    def not_training(self) -> Iterator[None]:
        """What happens inside does not count as training time."""
        paused = time.perf_counter()
        yield
        self.began += time.perf_counter() - paused

    def write(self, **progress: Any) -> None:
        """Write it, with the statistics of the first process; called on all processes."""
        share_buffers(self.modules.values())
        if self.accelerator.is_main_process:
            progress |= {"seconds": self.seconds(), "recipe": self.recipe.to_dict()}
            progress["mixed_precision"] = self.accelerator.mixed_precision
            save_checkpoint(self.folder, self.modules, self.optimizer, progress)
        self.accelerator.wait_for_everyone()


def _on_device(
    method: Method, section: Optim, accelerator: Accelerator
) -> tuple[list[nn.Module], dict[str, nn.Module]]:
    """Put a method's modules on the device; return those to train, and all that a resume point holds by name."""
    trained = [*method.networks, *method.layers.values()]
    if section.sync_batchnorm:
        trained = [timm.layers.convert_sync_batchnorm(module) for module in trained]
        for average in method.averages.values():  # in place: its method holds it, too
            timm.layers.convert_sync_batchnorm(average)
    trained = [module.to(accelerator.device) for module in trained]
    averages = {name: network.to(accelerator.device) for name, network in method.averages.items()}
    names = [*(f"network{index}" for index in range(len(method.networks))), *method.layers]
    return trained, dict(zip(names, trained, strict=True)) | averages


def _hand_over(method: Method, trained: Sequence[nn.Module]) -> None:
    """Give a method its networks and layers, with or without their distributed wrappers."""
    count = len(method.networks)
    method.networks = list(trained[:count])
    method.layers = dict(zip(method.layers, trained[count:], strict=True))


def _begin_step(method: Method, optimizer: torch.optim.Optimizer, lr: float, seed: int) -> None:
    for module in [*method.networks, *method.layers.values()]:
        module.train()
    for group in optimizer.param_groups:
        group["lr"] = lr
    torch.manual_seed(seed)  # dropout, if any


class StepLog:
    """Appends to metrics.jsonl, and to the tracker if there is one; values are means over the processes.

    Args:
        recipe: the run.
        start: steps done before this sitting; lines past it are dropped, their steps will be done again.
        num_steps: steps of the whole run, for the progress bar.
        evaluates_again: an evaluation at `start` will be done again, so its line is dropped, too.
        accelerator: only its main process writes.
    """

    def __init__(
        self, recipe: Recipe, start: int, num_steps: int, evaluates_again: bool, accelerator: Accelerator
    ) -> None:
        folder = recipe.run_dir
        self.path, self.batch_size, self.accelerator = folder / "metrics.jsonl", recipe.optim.batch_size, accelerator
        self.writes = accelerator.is_main_process
        self.bar = progress_bar(self.writes, total=num_steps, initial=start, desc=folder.name, unit="step")
        open_tracker(recipe, accelerator, start)
        self.last_step, self.last_time = start, time.perf_counter()
        if self.writes:
            keep_lines(
                self.path,
                lambda row: (
                    row["step"] <= start and not (evaluates_again and row["step"] == start and "val_miou" in row)
                ),
            )

    def write(self, step: int, values: dict[str, torch.Tensor], lr: float) -> None:
        """Write one line, and move the progress bar."""
        stacked = torch.stack([value.detach().float() for value in values.values()])
        means = self.accelerator.reduce(stacked, reduction="mean").tolist()
        row = {"step": step, **dict(zip(values, means, strict=True)), "lr": lr}
        now = time.perf_counter()
        row["images_per_second"] = (step - self.last_step) * self.batch_size / (now - self.last_time)
        self.last_step, self.last_time = step, now
        self._append(row)
        self.bar.set_postfix(loss=row["loss"], img_s=f"{row['images_per_second']:.1f}", refresh=False)
        self.bar.update(step - self.bar.n)
        if step == self.bar.total:
            self.bar.close()

    def write_scores(self, step: int, miou: float) -> None:
        """Write the result of an evaluation; its time does not count as training speed."""
        self._append({"step": step, "val_miou": miou})
        self.last_step, self.last_time = step, time.perf_counter()

    def _append(self, row: dict[str, float]) -> None:
        if self.writes:
            append_line(self.path, row)
            track(self.accelerator, row)


def share_buffers(networks: Iterable[nn.Module]) -> None:
    """Give all processes the BatchNorm statistics of the first, which are the ones that are saved."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for network in networks:
            for buffer in network.buffers():
                torch.distributed.broadcast(buffer, src=0)
