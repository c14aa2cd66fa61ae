"""The training loop: the only one, for every method."""

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from tqdm import tqdm

from mgd.checkpoint import load_checkpoint, save_checkpoint
from mgd.data.loaders import StepSampler, TrainingPairs, training_loader
from mgd.errors import UserError
from mgd.methods.base import Method
from mgd.optim import build_optimizer, poly_lr
from mgd.recipe import Recipe
from mgd.runs import recipe_differences


def train(
    method: Method,
    pairs: TrainingPairs,
    recipe: Recipe,
    num_steps: int,
    accelerator: Accelerator,
    folder: Path,
    evaluate: Callable[[nn.Module, int], float],
) -> float:
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
        Seconds spent training, over all sittings.
    """
    run, world_size = recipe.run, accelerator.num_processes
    networks = [network.to(accelerator.device) for network in method.networks]
    averages = {name: network.to(accelerator.device) for name, network in method.averages.items()}
    modules = {f"network{index}": network for index, network in enumerate(networks)} | averages
    optimizer = build_optimizer(recipe.optim, networks)
    start, seconds = _resume(folder / "checkpoint", modules, optimizer, recipe)
    if start:
        accelerator.print(f"{folder}: goes on at step {start} of {num_steps}")
    *method.networks, optimizer = accelerator.prepare(*networks, optimizer)

    log = StepLog(folder / "metrics.jsonl", start, recipe.optim.batch_size, accelerator)
    sampler = StepSampler(start, num_steps, recipe.optim.batch_size, accelerator.process_index, world_size)
    loader = training_loader(pairs, sampler, recipe.data.workers, pin_memory=accelerator.device.type == "cuda")
    bar = tqdm(
        total=num_steps, initial=start, desc=folder.name, unit="step", disable=None if log.writes else True, leave=False
    )
    began = time.perf_counter()
    for step, batch in enumerate(loader, start):
        for network in method.networks:
            network.train()
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        torch.manual_seed(hash((run.seed, step, accelerator.process_index)))  # dropout, if any
        for group in optimizer.param_groups:
            group["lr"] = poly_lr(recipe.optim, step, num_steps)

        # ---- one training step -------------------------------------------------------------------
        with accelerator.autocast():
            out = method.step(batch, step)
        accelerator.backward(out.loss)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(step)
        # ------------------------------------------------------------------------------------------

        done = step + 1
        bar.update()
        saves = done % run.checkpoint_every == 0 or done == num_steps
        if done % run.log_every == 0 or saves:
            row = log.write(done, {"loss": out.loss, **out.log}, lr=poly_lr(recipe.optim, step, num_steps))
            bar.set_postfix(loss=f"{row['loss']:.3f}", img_s=f"{row['images_per_second']:.1f}", refresh=False)
        if recipe.eval.every and done % recipe.eval.every == 0 and done < num_steps:
            share_buffers(modules.values())
            log.write_scores(done, evaluate(method.deployed(), done))
        if saves:
            share_buffers(modules.values())
            if accelerator.is_main_process:
                spent = seconds + time.perf_counter() - began
                reached = {"step": done, "seconds": spent, "recipe": recipe.to_dict()}
                save_checkpoint(folder / "checkpoint", modules, optimizer, reached)
            accelerator.wait_for_everyone()
    bar.close()
    method.networks = networks
    accelerator.free_memory()  # a teacher's optimiser must not stay while its student trains
    return seconds + time.perf_counter() - began


def _resume(
    folder: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, recipe: Recipe
) -> tuple[int, float]:
    """Load the resume point in place, if there is one; return steps done and seconds spent."""
    progress = load_checkpoint(folder, modules, optimizer)
    if progress is None:
        return 0, 0.0
    if differences := recipe_differences(progress.get("recipe", {}), recipe):
        raise UserError(
            f"{folder} is of another recipe ({'; '.join(differences[:4])}); start over: {recipe.command} --restart"
        )
    return progress["step"], progress["seconds"]


class StepLog:
    """Appends to metrics.jsonl; values are means over the processes.

    Args:
        path: the file; lines past `start` are dropped, their steps will be done again.
        start: steps done before this sitting.
        batch_size: labelled images a step.
        accelerator: only its main process writes.
    """

    def __init__(self, path: Path, start: int, batch_size: int, accelerator: Accelerator) -> None:
        self.path, self.batch_size, self.accelerator = path, batch_size, accelerator
        self.writes = accelerator.is_main_process
        self.last_step, self.last_time = start, time.perf_counter()
        if self.writes and path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            path.write_text("".join(line for line in lines if _step_of(line) <= start), encoding="utf-8")

    def write(self, step: int, values: dict[str, torch.Tensor], lr: float) -> dict[str, float]:
        """Write one line and return it; a loss that is no number ends the run.

        Raises:
            UserError: the loss is not finite.
        """
        stacked = torch.stack([value.detach().float() for value in values.values()])
        means = self.accelerator.reduce(stacked, reduction="mean").tolist()
        row = {"step": step, **dict(zip(values, means, strict=True)), "lr": lr}
        now = time.perf_counter()
        row["images_per_second"] = (step - self.last_step) * self.batch_size / (now - self.last_time)
        self.last_step, self.last_time = step, now
        if bad := [name for name, mean in zip(values, means, strict=True) if not math.isfinite(mean)]:
            raise UserError(
                f"{self.path.parent}: {', '.join(bad)} is not finite at step {step}; lower [optim] lr (now {lr:.3g}) "
                "or the weight of that term, and start over with --restart; the last resume point is kept"
            )
        self._append(row)
        return row

    def write_scores(self, step: int, miou: float) -> None:
        """Write the result of an evaluation; its time does not count as training speed."""
        self._append({"step": step, "val_miou": miou})
        self.last_step, self.last_time = step, time.perf_counter()

    def _append(self, row: dict[str, float]) -> None:
        if self.writes:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


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
