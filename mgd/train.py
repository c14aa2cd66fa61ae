"""The training loop: the only one, for every method."""

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import timm.layers
import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from tqdm import tqdm

from mgd.checkpoint import load_checkpoint, save_checkpoint
from mgd.data.loaders import StepSampler, TrainingPairs, training_loader
from mgd.errors import Stopped, UserError
from mgd.files import append_line, write_text
from mgd.guard import Guard, StopSignals
from mgd.methods.base import Method
from mgd.optim import build_optimizer, poly_lr
from mgd.recipe import Optim, Recipe
from mgd.runs import recipe_differences


class TrainingTime(NamedTuple):
    """What a training took."""

    seconds: float
    skipped_steps: int


def train(
    method: Method,
    pairs: TrainingPairs,
    recipe: Recipe,
    num_steps: int,
    accelerator: Accelerator,
    folder: Path,
    evaluate: Callable[[nn.Module, int], float],
) -> TrainingTime:
    """Train a method's networks in place, from the last resume point if there is one.

    Args:
        method: built method; its networks are trained.
        pairs: the samples of the run.
        recipe: the run; `[run]`, `[optim]`, `[eval] every` and `[data] workers` are used.
        num_steps: optimiser steps of the whole run.
        accelerator: device, processes and precision.
        folder: run folder; `metrics.jsonl` and `checkpoint/` are written.
        evaluate: bare network and step -> mIoU; called on all processes.

    Returns:
        What it took, over all sittings.

    Raises:
        UserError: a loss that is not finite; a resume point that does not fit.
        Stopped: a signal came; a resume point has been written.
    """
    run, world_size, every = recipe.run, accelerator.num_processes, recipe.eval.every
    networks = [_synced(network, recipe.optim, accelerator) for network in method.networks]
    averages = {name: network.to(accelerator.device) for name, network in method.averages.items()}
    modules = {f"network{index}": network for index, network in enumerate(networks)} | averages
    optimizer = build_optimizer(recipe.optim, networks)
    start, seconds, skipped = _resume(folder / "checkpoint", modules, optimizer, recipe, accelerator)
    *method.networks, optimizer = accelerator.prepare(*networks, optimizer)

    log = StepLog(folder / "metrics.jsonl", start, recipe.optim.batch_size, accelerator, every)
    guard = Guard(recipe.optim.nonfinite, folder, modules, accelerator, skipped)
    sampler = StepSampler(start, num_steps, recipe.optim.batch_size, accelerator.process_index, world_size)
    bar = tqdm(
        total=num_steps, initial=start, desc=folder.name, unit="step", disable=None if log.writes else True, leave=False
    )
    kept = f"step {{}} of {num_steps} is kept; the same command goes on from there"
    began = time.perf_counter()
    with StopSignals() as signals:

        def score(step: int) -> None:
            share_buffers(modules.values())
            with signals.at_once(kept.format(step)):  # it follows a resume point, from which it is done again
                log.write_scores(step, evaluate(method.deployed(), step))

        if every and 0 < start < num_steps and start % every == 0:
            score(start)
        loader = training_loader(pairs, sampler, recipe.data.workers, pin_memory=accelerator.device.type == "cuda")
        for step, batch in enumerate(loader, start):
            for network in method.networks:
                network.train()
            batch = send_to_device(batch, accelerator.device, non_blocking=True)
            torch.manual_seed(hash((run.seed, step, accelerator.process_index)))  # dropout, if any
            for group in optimizer.param_groups:
                group["lr"] = poly_lr(recipe.optim, step, num_steps)
            guard.before()

            # ---- one training step ---------------------------------------------------------------
            with accelerator.autocast():
                out = method.step(batch, step)
            accelerator.backward(out.loss)
            sound, signal_number = guard.look(step, out, batch, signals.received)
            if sound:
                optimizer.step()
                method.after_step(step)
            optimizer.zero_grad()
            # --------------------------------------------------------------------------------------

            done = step + 1
            bar.update()
            evaluates = every and done % every == 0 and done < num_steps
            saves = done % run.checkpoint_every == 0 or done == num_steps or evaluates or signal_number
            if done % run.log_every == 0 or saves:
                row = log.write(done, {"loss": out.loss, **out.log}, lr=poly_lr(recipe.optim, step, num_steps))
                bar.set_postfix(loss=row["loss"], img_s=f"{row['images_per_second']:.1f}", refresh=False)
            if saves:
                share_buffers(modules.values())
                if accelerator.is_main_process:
                    spent = seconds + time.perf_counter() - began
                    reached = {"step": done, "seconds": spent, "skipped": guard.skipped, "recipe": recipe.to_dict()}
                    save_checkpoint(folder / "checkpoint", modules, optimizer, reached)
                accelerator.wait_for_everyone()
            if signal_number and done < num_steps:
                raise Stopped(signal_number, kept.format(done))
            if evaluates:
                score(done)
    bar.close()
    method.networks = networks
    accelerator.free_memory()  # a teacher's optimiser must not stay while its student trains
    return TrainingTime(seconds + time.perf_counter() - began, guard.skipped)


def _resume(
    folder: Path,
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    accelerator: Accelerator,
) -> tuple[int, float, int]:
    """Load the resume point in place, if there is one; return steps done, seconds spent, steps skipped."""
    progress = load_checkpoint(folder, modules, optimizer) or {}
    starts = accelerator.gather(torch.tensor([progress.get("step", 0)], device=accelerator.device)).tolist()
    if len(set(starts)) > 1:
        raise UserError(
            f"{folder}: the processes see different resume points (steps {', '.join(map(str, sorted(set(starts))))}); "
            "[run] output must lie on a disk that all machines share"
        )
    if not progress:
        return 0, 0.0, 0
    if differences := recipe_differences(progress.get("recipe", {}), recipe):
        raise UserError(
            f"{folder} is of another recipe ({'; '.join(differences[:4])}); start over: {recipe.command} --restart"
        )
    accelerator.print(f"{folder.parent}: goes on at step {progress['step']}")
    return progress["step"], progress["seconds"], progress.get("skipped", 0)


def _synced(network: nn.Module, section: Optim, accelerator: Accelerator) -> nn.Module:
    """Put a network on its device, its BatchNorm over all processes if the recipe says so."""
    if section.sync_batchnorm:
        network = timm.layers.convert_sync_batchnorm(network)
    return network.to(accelerator.device)


class StepLog:
    """Appends to metrics.jsonl; values are means over the processes.

    Args:
        path: the file; lines past `start` are dropped, their steps will be done again.
        start: steps done before this sitting.
        batch_size: labelled images a step.
        accelerator: only its main process writes.
        every: steps between two evaluations; one at `start` is done again, so its line is dropped.
    """

    def __init__(self, path: Path, start: int, batch_size: int, accelerator: Accelerator, every: int = 0) -> None:
        self.path, self.batch_size, self.accelerator = path, batch_size, accelerator
        self.writes = accelerator.is_main_process
        self.last_step, self.last_time = start, time.perf_counter()
        if self.writes and path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= start]
            if every and start % every == 0:
                kept = [line for line in kept if _step_of(line) < start or "val_miou" not in line]
            write_text(path, "".join(kept))

    def write(self, step: int, values: dict[str, torch.Tensor], lr: float) -> dict[str, float]:
        """Write one line and return it."""
        stacked = torch.stack([value.detach().float() for value in values.values()])
        means = self.accelerator.reduce(stacked, reduction="mean").tolist()
        row = {"step": step, **dict(zip(values, means, strict=True)), "lr": lr}
        now = time.perf_counter()
        row["images_per_second"] = (step - self.last_step) * self.batch_size / (now - self.last_time)
        self.last_step, self.last_time = step, now
        self._append(row)
        return row

    def write_scores(self, step: int, miou: float) -> None:
        """Write the result of an evaluation; its time does not count as training speed."""
        self._append({"step": step, "val_miou": miou})
        self.last_step, self.last_time = step, time.perf_counter()

    def _append(self, row: dict[str, float]) -> None:
        if self.writes:
            append_line(self.path, row)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line that was cut short is written again


def share_buffers(networks: Iterable[nn.Module]) -> None:
    """Give all processes the BatchNorm statistics of the first, which are the ones that are saved."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for network in networks:
            for buffer in network.buffers():
                torch.distributed.broadcast(buffer, src=0)
