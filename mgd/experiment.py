"""One recipe from data to result, in order: run folder, data, networks, training, evaluation.

`stages/teacher_cps.py` and `stages/distill.py` both call `run_recipe`; the loop is in train.py.
"""

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from mgd.cache import cached_targets
from mgd.checks import check_recipe
from mgd.data.datasets import Splits
from mgd.data.images import Images
from mgd.data.loaders import TrainingPairs, evaluation_loader
from mgd.data.partitions import ResolvedPartition
from mgd.data.stream import Pool
from mgd.files import append_line, keep_lines, write_json
from mgd.finished import all_finished, finished
from mgd.inference import count_confusion, predict
from mgd.locks import hold
from mgd.machine import device_name, peak_memory_mb, versions
from mgd.methods.base import Method
from mgd.methods.contract import check_parts
from mgd.metrics import Scores, scores
from mgd.models.segmenter import build_segmenter, fingerprint
from mgd.optim import total_steps
from mgd.pictures import evenly, to_tensor
from mgd.plots import plot_curves, save_overlays
from mgd.recipe import Recipe
from mgd.run_images import training_images, training_pairs
from mgd.runs import best_so_far, keep_best, open_folder, save_model
from mgd.tracking import track, tracked
from mgd.train import TrainingTime, train


def run_needed(needed: Mapping[str, Recipe], accelerator: Accelerator) -> list[dict[str, Any]]:
    """Run those of a recipe's teachers and baselines that are not finished, all of them checked before.

    Args:
        needed: their recipes, by what a message shall call them.
        accelerator: device, processes and precision.

    Returns:
        metrics.json of all, in order.

    Raises:
        UserError: see `run_recipe`.
    """
    done = all_finished(needed)
    for title, recipe in needed.items():
        if not done[title]:
            check_recipe(recipe, accelerator)
    results = {recipe.run_dir: done[title] for title, recipe in needed.items()}  # several may share a run
    for title, recipe in needed.items():
        if metrics := results[recipe.run_dir]:
            _say_finished(recipe, metrics, accelerator)
            continue
        accelerator.print(f"{title}: {recipe.run_dir} is not finished; training it now: {recipe.command}")
        results[recipe.run_dir] = run_recipe(recipe, accelerator)
    return [results[recipe.run_dir] for recipe in needed.values()]


def run_recipe(
    recipe: Recipe,
    accelerator: Accelerator,
    teachers: Mapping[str, nn.Module] | None = None,
    restart: bool = False,
) -> dict[str, Any]:
    """Train and evaluate one recipe, or take up where it stopped.

    Args:
        recipe: what to run.
        accelerator: device, processes and precision.
        teachers: loaded networks by name, for methods that have them.
        restart: throw away what the run folder holds.

    Returns:
        What `metrics.json` holds; of a finished run, without doing anything.

    Raises:
        UserError: the data, or a run folder that belongs to another recipe.
    """
    folder = recipe.run_dir
    if not restart and (done := finished(recipe)) is not None:
        return _say_finished(recipe, done, accelerator)
    splits, partition = check_recipe(recipe, accelerator, teachers)
    with hold(folder) if accelerator.is_main_process else contextlib.nullcontext(), tracked(accelerator):
        return _run(recipe, accelerator, teachers, restart, splits, partition)


def finished_rows(
    recipe: Recipe, needed: Mapping[str, Recipe], accelerator: Accelerator
) -> list[dict[str, Any]] | None:
    """Return metrics.json of a finished run, after those of what it needs, as far as that is finished; or None.

    Args:
        recipe: of the run.
        needed: recipes of its teachers and baselines.
        accelerator: whose main process says so.

    Raises:
        UserError: see `finished`.
    """
    if (done := finished(recipe)) is None:
        return None
    return [*filter(None, all_finished(needed).values()), _say_finished(recipe, done, accelerator)]


def _say_finished(recipe: Recipe, done: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    accelerator.print(f"{recipe.run_dir}: finished, mIoU {done['miou']:.2f}; --restart trains it anew")
    return done


def _run(
    recipe: Recipe,
    accelerator: Accelerator,
    teachers: Mapping[str, nn.Module] | None,
    restart: bool,
    splits: Splits,
    partition: ResolvedPartition,
) -> dict[str, Any]:
    """Do what `run_recipe` promises, with everything checked and the folder held."""
    folder = recipe.run_dir
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)  # its teachers may have been trained just before
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            fingerprints = {name: fingerprint(teacher) for name, teacher in (teachers or {}).items()}
            open_folder(recipe, partition, fingerprints, restart)
            for first, second in itertools.combinations(fingerprints, 2):
                if fingerprints[first] == fingerprints[second]:
                    print(f"note: {recipe.source}: [teachers.{first}] and [teachers.{second}] are the same network")
    method, pairs = _build(recipe, accelerator, teachers or {}, splits, partition)
    pool = Pool(recipe.data.unlabeled) if partition.streamed and method.uses_unlabeled else None
    val = Images(splits.val, splits.decoder, recipe.data.image_scale)
    num_steps = total_steps(recipe.optim, len(partition.labeled), partition.num_unlabeled)
    accelerator.print(
        f"{folder}: {recipe.method.name} {recipe.student.backbone}, {len(partition.labeled)} labelled / "
        f"{partition.unlabeled_text} unlabelled, {num_steps} steps of {recipe.optim.batch_size}, "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
    )

    one_class = 0

    def evaluate(network: nn.Module, step: int) -> Scores:
        nonlocal one_class
        found = evaluate_network(network, val, recipe, accelerator)
        one_class = one_class + 1 if found.num_predicted == 1 else 0
        if one_class >= 3 or (one_class and step == num_steps):
            accelerator.print(f"note: {folder}: one class is predicted everywhere at step {step}; is [optim] lr right?")
        if recipe.eval.every and accelerator.is_main_process:
            keep_best(folder, network, recipe, step, found.miou)
        return found

    spent = train(method, pairs, pool, recipe, num_steps, accelerator, lambda *args: evaluate(*args).miou)
    if spent.skipped_steps * 2 > num_steps:
        accelerator.print(
            f"note: {folder}: {spent.skipped_steps} of {num_steps} steps were skipped; the result is void"
        )
    network = method.deployed()
    if accelerator.is_main_process:  # before the evaluation: should it fail, stages/evaluate.py can do another
        save_model(folder / "model", network, recipe)
    result = evaluate(network, num_steps)
    track(accelerator, {"step": num_steps, "val_miou": result.miou})
    metrics = _metrics(recipe, splits, partition, result, num_steps, spent, accelerator)
    if accelerator.is_main_process:
        _finish(recipe, network, val, splits, metrics, accelerator)
    accelerator.wait_for_everyone()
    accelerator.print(f"{folder}: mIoU {result.miou:.2f} on {len(val)} val images, {spent.seconds:.0f} s of training")
    return metrics


def _build(
    recipe: Recipe,
    accelerator: Accelerator,
    teachers: Mapping[str, nn.Module],
    splits: Splits,
    partition: ResolvedPartition,
) -> tuple[Method, TrainingPairs]:
    """Return the method with its networks, and the samples of the run with what cached teachers say of them."""
    networks = build_networks(recipe, splits)
    targets = None
    if recipe.cache:
        images = training_images(recipe, splits, partition)
        targets, teachers = cached_targets(recipe, accelerator, teachers, images), {}
    frozen = {name: teacher.to(accelerator.device) for name, teacher in teachers.items()}
    method = build_method(recipe, networks, frozen, partition)
    if recipe.run.compile:
        for network in [*networks, *method.averages.values(), *frozen.values()]:
            network.compile(dynamic=False)  # a crop and a batch are always of one size
    return method, training_pairs(recipe, splits, partition, targets)


def build_method(
    recipe: Recipe, networks: Sequence[nn.Module], teachers: Mapping[str, nn.Module], partition: ResolvedPartition
) -> Method:
    """Return the method of a recipe, checked, its classes weighed.

    Args:
        recipe: the run.
        networks: see `build_networks`.
        teachers: frozen networks by name, on the device.
        partition: of the run.

    Raises:
        UserError: it breaks what `Method` asks of it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.run.seed)  # layers of its own must not depend on what this process did before
        method = recipe.method_class(recipe.method, networks, teachers)
    check_parts(method)
    method.weigh_classes(torch.tensor(partition.class_pixels))
    return method


def _metrics(
    recipe: Recipe,
    splits: Splits,
    partition: ResolvedPartition,
    result: Scores,
    num_steps: int,
    spent: TrainingTime,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """What `metrics.json` holds."""
    seconds = spent.seconds
    return {
        "name": recipe.run_dir.name,
        "method": recipe.method.name,
        "backbone": recipe.student.backbone,
        "miou": result.miou,
        "best_on_val": best_so_far(recipe.run_dir),
        "pixel_accuracy": result.pixel_accuracy,
        "iou": dict(zip(splits.classes, result.iou, strict=True)),
        "num_labeled": len(partition.labeled),
        "num_unlabeled": partition.num_unlabeled,
        "num_val": len(splits.val),
        "seed": recipe.run.seed,
        "steps": num_steps,
        "seconds": seconds,
        "skipped_steps": spent.skipped_steps,
        "skipped_images": len(partition.skipped) + spent.skipped_images,
        "images_per_second": num_steps * recipe.optim.batch_size / seconds if seconds else None,
        "peak_memory_mb": peak_memory_mb(accelerator.device),
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "device": device_name(accelerator.device),
        "versions": versions(),
        "command": recipe.command,
    }


def evaluate_network(
    network: nn.Module,
    images: Images,
    recipe: Recipe,
    accelerator: Accelerator,
    keep: Callable[[str, torch.Tensor], None] | None = None,
) -> Scores:
    """Evaluate on all processes; each takes its share of the images, once.

    Args:
        network: segmenter, on the accelerator's device.
        images: images with labels.
        recipe: `[eval]` and `[data]` are used.
        accelerator: device, processes and precision.
        keep: called with the id and the predicted classes `[H, W]` of each image.
    """
    network.eval()
    num_classes = len(network.classes)
    loader = evaluation_loader(
        images,
        recipe.eval.batch_size,
        recipe.data.workers,
        accelerator.process_index,
        accelerator.num_processes,
    )
    # Images come in any size, and each new one would be compiled for.
    with accelerator.autocast(), torch.compiler.set_stance("force_eager"):
        confusion = count_confusion(
            network, loader, num_classes, recipe.eval, recipe.data.crop, accelerator.device, keep
        )
    return scores(accelerator.reduce(confusion, reduction="sum"))


def build_networks(recipe: Recipe, splits: Splits) -> list[nn.Module]:
    """Return the networks that the method trains, each with initial weights of its own; the first one ships."""
    return [
        build_segmenter(
            section,
            splits.classes,
            splits.colors,
            recipe.run.seed + 1_000_003 * index,
            image_scale=recipe.data.image_scale,
            crop=recipe.data.crop,
        )
        for index, (_, section) in enumerate(recipe.method_class.sections(recipe.method, recipe.student))
    ]


def _finish(
    recipe: Recipe,
    network: nn.Module,
    val: Images,
    splits: Splits,
    metrics: dict[str, Any],
    accelerator: Accelerator,
) -> None:
    """Write what a finished run leaves behind; metrics.json last, for it marks the run finished."""
    folder = recipe.run_dir
    log = folder / "metrics.jsonl"
    last = {"step": metrics["steps"], "val_miou": metrics["miou"]}
    keep_lines(log, lambda row: row.keys() != last.keys() or row["step"] < last["step"])
    append_line(log, last)
    plot_curves(log, folder / "curves.png")
    chosen = evenly(len(val), 4)
    with accelerator.autocast():  # as they were evaluated
        pictures = predict_samples(network, val, chosen, recipe, accelerator.device)
    save_overlays(pictures, splits.classes, splits.colors, folder / "overlays.png")
    write_json(folder / "metrics.json", metrics)


def predict_samples(
    network: nn.Module, images: Images, indices: Sequence[int], recipe: Recipe, device: torch.device
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Predict some images.

    Args:
        network: segmenter, on `device`.
        images: with labels.
        indices: which of them.
        recipe: its `[eval]` says how.
        device: where to compute.

    Returns:
        Of each: image `[H, W, 3]` uint8, label `[H, W]` and predicted classes `[H, W]`.
    """
    found = []
    for index in indices:
        image, label = images.read(index, with_label=True)
        pixels = to_tensor(image)[None].to(device)
        with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
            prediction = predict(network.eval(), pixels, recipe.eval, recipe.data.crop)
        found.append((np.asarray(image), label, prediction[0].cpu().numpy()))
    return found
