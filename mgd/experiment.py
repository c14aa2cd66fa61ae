"""One recipe from data to result, in order: run folder, data, networks, training, evaluation.

`stages/teacher_cps.py` and `stages/distill.py` both call `run_recipe`; the loop is in train.py.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from mgd.data.datasets import Splits
from mgd.data.loaders import Images, TrainingPairs, evaluation_loader, per_process
from mgd.data.partitions import Split, split
from mgd.data.scan import scan
from mgd.data.stream import Pool, whole_pool
from mgd.errors import UserError
from mgd.files import write_json, write_text
from mgd.inference import count_confusion, predict
from mgd.metrics import Scores, scores
from mgd.models.segmenter import build_segmenter, check_trainable, fingerprint
from mgd.optim import total_steps
from mgd.plots import plot_curves, save_overlays
from mgd.recipe import DataSection, Recipe
from mgd.registry import METHODS
from mgd.runs import best_so_far, device_name, finished_metrics, keep_best, open_folder, peak_memory_mb, versions
from mgd.train import TrainingTime, train


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
    if not restart and (done := finished_metrics(recipe)) is not None:
        accelerator.print(f"{folder}: finished, mIoU {done['miou']:.2f}; --restart trains it anew")
        return done
    splits, partition = check_recipe(recipe, accelerator, teachers)
    method_class = METHODS.get(recipe.method.name)
    seeds = [recipe.run.seed + 1_000_003 * index for index in range(method_class.num_networks)]
    with accelerator.main_process_first():
        networks = [build_segmenter(recipe.student, splits.classes, splits.colors, seed) for seed in seeds]
    frozen = {name: teacher.to(accelerator.device) for name, teacher in (teachers or {}).items()}
    method = method_class(recipe.method, networks, frozen)
    pairs = _training_pairs(recipe, splits, partition, method_class.uses_unlabeled)
    pool = Pool(recipe.data.unlabeled) if partition.streamed and method_class.uses_unlabeled else None
    val = Images(splits.val, splits.decoder, recipe.data.image_scale)
    num_steps = total_steps(recipe.optim, len(partition.labeled), partition.num_unlabeled)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            fingerprints = {name: fingerprint(teacher) for name, teacher in (teachers or {}).items()}
            open_folder(recipe, partition, fingerprints, restart)
    accelerator.print(
        f"{folder}: {recipe.method.name} {recipe.student.backbone}, {len(partition.labeled)} labelled / "
        f"{_count(partition)} unlabelled, {num_steps} steps of {recipe.optim.batch_size}, "
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

    spent = train(method, pairs, pool, recipe, num_steps, accelerator, folder, lambda *args: evaluate(*args).miou)
    network = method.deployed()
    result = evaluate(network, num_steps)
    metrics = _metrics(recipe, splits, partition, result, num_steps, spent, accelerator)
    if accelerator.is_main_process:
        _finish(folder, recipe, network, val, splits, metrics, accelerator.device)
    accelerator.wait_for_everyone()
    accelerator.print(f"{folder}: mIoU {result.miou:.2f} on {len(val)} val images, {spent.seconds:.0f} s of training")
    return metrics


def _metrics(
    recipe: Recipe,
    splits: Splits,
    partition: Split,
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


def load_splits(section: DataSection) -> Splits:
    """Load the data of a recipe; runs of one comparison share it.

    Raises:
        UserError: see the readers; or there is nothing to evaluate on.
    """
    return _load_splits(_without_augmentation(section))


def _without_augmentation(section: DataSection) -> DataSection:
    """The section with the keys that only shape batches at one value, so that runs share what is read."""
    return section.model_copy(update={"crop": 32, "scales": (1.0,), "flip": False})


@functools.lru_cache(maxsize=2)
def _load_splits(section: DataSection) -> Splits:
    splits = section.load()
    if section.unlabeled and not section.unlabeled.streaming:
        pool = whole_pool(section.unlabeled)
        splits = dataclasses.replace(splits, unlabeled=datasets.concatenate_datasets([splits.unlabeled, pool]))
    if len(splits.val) == 0:
        raise UserError(f"[data] {section.name}: no validation image; the result of a run is its mIoU on them")
    return splits


def check_recipe(
    recipe: Recipe, accelerator: Accelerator, teachers: Mapping[str, nn.Module] | None = None
) -> tuple[Splits, Split]:
    """Check all that can be checked before a run, and return its data and partition.

    Raises:
        UserError: the batch, the data, the partition, a teacher's classes, the network or its
            ImageNet weights do not fit.
    """
    local_batch = per_process(recipe.optim.batch_size, accelerator.num_processes)
    if recipe.optim.sync_batchnorm and accelerator.device.type != "cuda":
        raise UserError('[optim] sync_batchnorm = true needs GPUs; without one use [student.head] norm = "group"')
    splits = load_splits(recipe.data)
    partition = split_data(recipe, splits)
    for name, teacher in (teachers or {}).items():
        check_classes(splits, teacher, f"[teachers.{name}]")
    section = _without_augmentation(recipe.data)
    if recipe.data.unlabeled and recipe.data.unlabeled.streaming:
        if partition.unlabeled:
            accelerator.print(f"note: {len(partition.unlabeled)} unlabelled images give way to [data.unlabeled]")
        partition = dataclasses.replace(partition, unlabeled=())
    splits, partition, size = _check_images(section, partition.labeled, partition.unlabeled, accelerator)
    whole = size if recipe.eval.mode == "whole" else None
    images = local_batch * METHODS.get(recipe.method.name).forwards_per_label
    check_trainable(recipe.student, len(splits.classes), images, recipe.data.crop, accelerator.num_processes > 1, whole)
    if recipe.data.unlabeled and recipe.data.unlabeled.streaming:
        count = Pool(recipe.data.unlabeled).count
        return splits, dataclasses.replace(partition, streamed=True, num_streamed=count)
    if not partition.unlabeled and METHODS.get(recipe.method.name).uses_unlabeled:
        accelerator.print("note: no unlabelled image; the labelled ones serve as the pool, their masks unseen")
    return splits, partition


@functools.lru_cache(maxsize=4)
def _check_images(
    section: DataSection, labeled: tuple[str, ...], unlabeled: tuple[str, ...], accelerator: Accelerator
) -> tuple[Splits, Split, tuple[int, int]]:
    """Read every image and mask of a run once, each process its share, before hours are spent on them.

    Returns:
        Data and partition without the images that are skipped; height and width of the first
        validation image, pixels.

    Raises:
        UserError: images or masks that cannot be used; masks that show nothing to learn from.
    """
    splits = load_splits(section)
    everything = datasets.concatenate_datasets([splits.labeled.select_columns(["id", "image"]), splits.unlabeled])
    parts = {
        "labelled": (_rows(splits.labeled, labeled), True),
        "validation": (splits.val, True),
        "unlabelled": (_rows(everything, unlabeled), False),
    }
    problems: dict[str, dict[str, str]] = {}
    pixels = {}
    for what, (source, with_label) in parts.items():
        images = Images(source, splits.decoder, section.image_scale)
        rank, world_size = accelerator.process_index, accelerator.num_processes
        found = scan(images, with_label, section.workers, f"reading {what} images", rank, world_size)
        shares = gather_object([found])
        problems[what] = {name: problem for share in shares for name, problem in sorted(share.problems.items())}
        pixels[what] = sum(share.pixels for share in shares)
    if any(problems.values()):
        _answer_problems([why for part in problems.values() for why in part.values()], section, accelerator)
    for what in ("labelled", "validation"):
        if pixels[what][:255].sum() == 0:
            raise UserError(f"[data] the {what} masks hold nothing but 255 (ignore)")
    if np.count_nonzero(pixels["labelled"][:255]) < 2:
        raise UserError("[data] the labelled masks show a single class (255 is ignored: is a class painted 255?)")
    unseen = [name for index, name in enumerate(splits.classes) if pixels["labelled"][index] == 0]
    if unseen:
        hint = " (255 is ignored: is it painted 255?)" if pixels["labelled"][255] else ""
        accelerator.print(f"note: no labelled pixel of class {', '.join(unseen)}{hint}", flush=True)
    val = [name for name in splits.val["id"] if name not in problems["validation"]]
    splits = dataclasses.replace(splits, val=_rows(splits.val, tuple(val)))
    first = Images(splits.val, splits.decoder, section.image_scale).read(0, with_label=False)[0]
    labeled = tuple(name for name in labeled if name not in problems["labelled"])
    unlabeled = tuple(name for name in unlabeled if name not in problems["unlabelled"])
    skipped = problems["labelled"] | problems["unlabelled"]
    skipped |= {f"validation: {name}": why for name, why in problems["validation"].items()}
    return splits, Split(labeled, unlabeled, skipped), (first.height, first.width)


def _answer_problems(problems: Sequence[str], section: DataSection, accelerator: Accelerator) -> None:
    listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
    if section.on_error == "raise":
        raise UserError(
            f"[data] {len(problems)} image(s) cannot be used: {listed}; mend them (stages/prepare.py lists all), or "
            'leave them out: [data] on_error = "skip"'
        )
    accelerator.print(f"note: {len(problems)} image(s) skipped, listed in partition.json: {listed}", flush=True)


def split_data(recipe: Recipe, splits: Splits) -> Split:
    """Draw the recipe's partition."""
    presence = None
    if recipe.partition.balanced:
        images = Images(splits.labeled, splits.decoder)
        presence = {}
        for index, name in enumerate(images.ids):
            values = np.unique(images.read(index, with_label=True)[1])
            presence[name] = np.isin(np.arange(len(splits.classes)), values)
    labeled, unlabeled = list(splits.labeled["id"]), list(splits.unlabeled["id"])
    return split(recipe.partition, labeled, unlabeled, recipe.partition_seed, presence, recipe.data.name)


def check_classes(splits: Splits, network: nn.Module, title: str) -> None:
    """Refuse a network of other classes than the data's.

    Raises:
        UserError: naming the network and both lists.
    """
    if network.classes != tuple(splits.classes):
        raise UserError(
            f"{title} knows the {len(network.classes)} classes {', '.join(network.classes)}; "
            f"the data has the {len(splits.classes)} classes {', '.join(splits.classes)}; they must be the same"
        )


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
    with accelerator.autocast():
        confusion = count_confusion(
            network, loader, num_classes, recipe.eval, recipe.data.crop, accelerator.device, keep
        )
    return scores(accelerator.reduce(confusion, reduction="sum"))


def _training_pairs(recipe: Recipe, splits: Splits, partition: Split, uses_unlabeled: bool) -> TrainingPairs:
    scale = recipe.data.image_scale
    labeled = Images(_rows(splits.labeled, partition.labeled), splits.decoder, scale)
    if not uses_unlabeled or partition.streamed:
        return TrainingPairs(labeled, None, recipe.data, recipe.run.seed)
    # With no image left unlabelled, the labelled ones serve as the pool, their masks unseen.
    pool = partition.unlabeled or partition.labeled
    source = datasets.concatenate_datasets([splits.labeled.select_columns(["id", "image"]), splits.unlabeled])
    return TrainingPairs(labeled, Images(_rows(source, pool), splits.decoder, scale), recipe.data, recipe.run.seed)


def _count(partition: Split) -> str:
    if not partition.streamed:
        return str(len(partition.unlabeled))
    return "a stream of " + ("unknown length" if partition.num_streamed is None else str(partition.num_streamed))


def _rows(source: datasets.Dataset, ids: tuple[str, ...]) -> datasets.Dataset:
    wanted = set(ids)
    return source.select([index for index, name in enumerate(source["id"]) if name in wanted])


def _finish(
    folder: Path,
    recipe: Recipe,
    network: nn.Module,
    val: Images,
    splits: Splits,
    metrics: dict[str, Any],
    device: torch.device,
) -> None:
    """Write what a finished run leaves behind; metrics.json last, for it marks the run finished."""
    log = folder / "metrics.jsonl"
    last = {"step": metrics["steps"], "val_miou": metrics["miou"]}
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    rows = [line for line in lines if json.loads(line).keys() != last.keys() or json.loads(line)["step"] < last["step"]]
    write_text(log, "\n".join([*rows, json.dumps(last)]) + "\n")
    network.save(folder / "model")
    write_text(folder / "model" / "recipe.toml", recipe.to_toml())
    plot_curves(log, folder / "curves.png")
    chosen = sample_indices(len(val), 4)
    pictures = predict_samples(network, val, chosen, recipe, device)
    save_overlays(pictures, splits.classes, splits.colors, folder / "overlays.png")
    write_json(folder / "metrics.json", metrics)


def sample_indices(count: int, wanted: int) -> list[int]:
    """Return up to `wanted` positions, evenly spread over `count` images, the first and last included."""
    return sorted({round(place * (count - 1) / max(1, wanted - 1)) for place in range(min(wanted, count))})


def predict_samples(
    network: nn.Module, images: Images, indices: Sequence[int], recipe: Recipe, device: torch.device
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Predict some images with the recipe's `[eval]`.

    Returns:
        Of each: image `[H, W, 3]` uint8, label `[H, W]` and predicted classes `[H, W]`.
    """
    found = []
    for index in indices:
        image, label = images.read(index, with_label=True)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(device)
        with torch.inference_mode():
            prediction = predict(network.eval(), pixels, recipe.eval, recipe.data.crop)
        found.append((np.asarray(image), label, prediction[0].cpu().numpy()))
    return found
