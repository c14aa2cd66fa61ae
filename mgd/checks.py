"""Everything that can be wrong with a run, checked before hours are spent on it."""

import dataclasses
import functools
import shutil
from collections.abc import Mapping, Sequence

import datasets
import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from mgd.data.candidates import Candidates
from mgd.data.datasets import Splits
from mgd.data.images import Images, mask_sums
from mgd.data.loaders import per_process
from mgd.data.partitions import ResolvedPartition, val_key
from mgd.data.reading import load_splits, select_ids, split_data, without_augmentation
from mgd.data.scan import scan
from mgd.data.stream import Pool, identity
from mgd.data.transforms import LabelDecoder
from mgd.errors import UserError, some
from mgd.metrics import few_images
from mgd.models.trial import check_trainable, features_size
from mgd.optim import total_steps
from mgd.recipe import Recipe
from mgd.sections import DataSection, ModelSection
from mgd.tracking import check_tracker


def check_recipe(
    recipe: Recipe, accelerator: Accelerator, teachers: Mapping[str, nn.Module] | None = None
) -> tuple[Splits, ResolvedPartition]:
    """Check all that can be checked before a run, and return its data and partition.

    Raises:
        UserError: the batch, the data, the partition, a teacher's classes, the network or its
            ImageNet weights do not fit.
    """
    local_batch = per_process(recipe.optim.batch_size, accelerator.num_processes)
    if recipe.optim.sync_batchnorm and accelerator.device.type != "cuda":
        raise UserError('[optim] sync_batchnorm = true needs GPUs; without one use [student.head] norm = "group"')
    compilers = ("g++", "clang++") if accelerator.device.type == "cpu" else ("cc", "gcc", "clang")
    if recipe.run.compile and not any(map(shutil.which, compilers)):
        raise UserError(
            f"[run] compile = true needs a compiler, {' or '.join(compilers)}; install one, or leave it out"
        )
    check_tracker(recipe.run.tracker)
    if recipe.cache and recipe.cache_dir == recipe.run_dir:
        raise UserError(f"[cache] folder = {recipe.cache.folder!r} is the folder of the run; name another")
    for name, teacher in (teachers or {}).items():
        check_classes(load_splits(recipe.data).classes, teacher, f"[teachers.{name}]")
    if recipe.cache and recipe.data.unlabeled and recipe.data.unlabeled.streaming:
        raise UserError('[teachers] mode = "cached" needs images that come again; a stream needs mode = "online"')
    splits, partition, size = check_data(recipe, accelerator)
    total_steps(recipe.optim, len(partition.labeled), partition.num_unlabeled)  # of a stream that may be unknown
    _check_networks(recipe, len(splits.classes), local_batch, accelerator.num_processes > 1, size)
    return splits, partition


def _check_networks(
    recipe: Recipe, num_classes: int, local_batch: int, several_processes: bool, size: tuple[int, int]
) -> None:
    """Try each kind of network that the method trains; the first one is evaluated on images of `size`, too."""
    whole = size if recipe.eval.mode == "whole" else None
    images = local_batch * recipe.method_class.images_per_label
    for where, section in recipe.networks.items():
        try:
            size = check_trainable(where, section, num_classes, images, recipe.data.crop, several_processes, whole)
            if size is not None:
                recipe.method_class.check_features(recipe.method, where, size)
        except UserError as error:
            raise UserError(f"{recipe.source}: {error}") from error  # it may be a teacher's, which nobody typed
        whole = None


def check_teachers(recipe: Recipe, sections: Mapping[str, ModelSection], num_classes: int) -> None:
    """Hold what teachers make of a training crop against what the method asks of it; of cached ones the cells are kept.

    Args:
        recipe: its `[data] crop`, `[method]` and `[cache]`.
        sections: of the frozen teachers, by name.
        num_classes: K.

    Raises:
        UserError: a teacher cannot take such a crop, or its features are too coarse.
    """
    for name, section in sections.items() if recipe.cache is None else ():
        try:
            where = f"teachers.{name}"
            if size := features_size(where, section, num_classes, recipe.data.crop):
                recipe.method_class.check_features(recipe.method, where, size)
        except UserError as error:
            raise UserError(f"{recipe.source}: {error}") from error


def check_data(recipe: Recipe, accelerator: Accelerator) -> tuple[Splits, ResolvedPartition, tuple[int, int]]:
    """Read every image and mask that a run will need, and say what is odd about them.

    Returns:
        Data and partition, without what is skipped; height and width of the first validation
        image, pixels.

    Raises:
        UserError: the partition, images or masks, or `[data.unlabeled]` cannot be used.
    """
    partition = split_data(recipe.data, recipe.partition, recipe.partition_seed)
    section, pool = without_augmentation(recipe.data), recipe.data.unlabeled
    streamed = pool is not None and pool.streaming
    if streamed:
        if partition.unlabeled:
            _say_once(accelerator, f"{len(partition.unlabeled)} unlabelled images give way to [data.unlabeled]")
        partition = dataclasses.replace(partition, unlabeled=())
    splits, partition, size = _check_images(section, partition.labeled, partition.unlabeled, accelerator)
    if pool:
        count = Pool(pool).count if streamed else None
        partition = dataclasses.replace(partition, pool=identity(pool), streamed=streamed, num_streamed=count)
    if not streamed and not partition.unlabeled and recipe.method_class.uses_unlabeled:
        _say_once(accelerator, "no unlabelled image; the labelled ones serve as the pool, their masks unseen")
    return splits, partition, size


@functools.lru_cache(maxsize=64)
def _say_once(accelerator: Accelerator, text: str) -> None:
    """Print a note, of a run that is checked before its teachers are trained, and again when it begins."""
    accelerator.print(f"note: {text}")


@functools.lru_cache(maxsize=4)
def _check_images(
    section: DataSection, labeled: tuple[str, ...], unlabeled: tuple[str, ...], accelerator: Accelerator
) -> tuple[Splits, ResolvedPartition, tuple[int, int]]:
    """Read every image and mask of a run once, each process its share, before hours are spent on them.

    Returns:
        Data and partition without the images that are skipped; height and width of the first
        validation image, pixels.

    Raises:
        UserError: images or masks that cannot be used; masks that show nothing to learn from.
    """
    splits = load_splits(section)
    parts = {
        "labelled": (select_ids(splits.labeled, labeled), True),
        "validation": (splits.val, True),
        "unlabelled": (select_ids(splits.without_masks(), unlabeled), False),
    }
    problems: dict[str, dict[str, str]] = {}
    pixels = {}
    for what, (source, with_label) in parts.items():
        images = Images(source, splits.decoder, section.image_scale)
        problems[what], pixels[what] = _read_all(images, with_label, what, section, accelerator)
    if any(problems.values()):
        _answer_problems([why for part in problems.values() for why in part.values()], section, accelerator)
    for what in ("labelled", "validation"):
        if len(problems[what]) == len(parts[what][0]):
            raise UserError(f"[data] none of the {len(problems[what])} {what} images can be used")
        if pixels[what][:255].sum() == 0:
            raise UserError(f"[data] the {what} masks hold nothing but 255 (ignore)")
    _check_classes_shown(pixels["labelled"], splits.classes, accelerator)
    if few := few_images(len(splits.val) - len(problems["validation"])):
        accelerator.print(f"note: {few}", flush=True)
    val = [name for name in splits.val["id"] if name not in problems["validation"]]
    splits = dataclasses.replace(splits, val=select_ids(splits.val, val))
    first = Images(splits.val, splits.decoder, section.image_scale).picture(0)
    labeled = tuple(name for name in labeled if name not in problems["labelled"])
    if leaked := _same_images(splits.labeled, splits.val, labeled):
        raise UserError(
            f"[data] {len(leaked)} validation images are labelled training images, the same file under the same name "
            f"({some(leaked)}); the score would be on what was learnt, take them out of one"
        )
    unlabeled = tuple(name for name in unlabeled if name not in problems["unlabelled"])
    skipped = problems["labelled"] | problems["unlabelled"]
    skipped |= {val_key(name): why for name, why in problems["validation"].items()}
    class_pixels = tuple(pixels["labelled"][: len(splits.classes)].tolist())
    masks = mask_sums(select_ids(splits.labeled, labeled), splits.val)
    partition = ResolvedPartition(labeled, unlabeled, skipped, val=tuple(val), class_pixels=class_pixels, masks=masks)
    return splits, partition, (first.height, first.width)


def _check_classes_shown(pixels: np.ndarray, classes: Sequence[str], accelerator: Accelerator) -> None:
    """Refuse labels of a single class, and name the classes that they do not show.

    Args:
        pixels: `[256]`, labelled pixels of each value.
        classes: names.
        accelerator: whose main process names them.
    """
    if np.count_nonzero(pixels[:255]) < 2:
        raise UserError(
            "[data] the labelled masks show a single class (255 is ignored: of masks of 0 and 255, data.colors = "
            "[[0, 0, 0], [255, 255, 255]] says that both are classes)"
        )
    if unseen := [name for index, name in enumerate(classes) if pixels[index] == 0]:
        hint = " (255 is ignored: is it painted 255? then give data.colors)" if pixels[255] else ""
        accelerator.print(f"note: no labelled pixel of class {', '.join(unseen)}{hint}", flush=True)


def _same_images(labeled: datasets.Dataset, val: datasets.Dataset, ids: tuple[str, ...]) -> list[str]:
    """Return which of the labelled images, `ids`, are validation images, too, by id and byte for byte."""
    shared = set(ids).intersection(val["id"][:])
    ours, theirs = (Images(select_ids(source, shared)) for source in (labeled, val))
    places = {name: index for index, name in enumerate(theirs.ids)}
    return [name for index, name in enumerate(ours.ids) if ours.encoded(index) == theirs.encoded(places[name])]


def _read_all(
    images: Images, with_label: bool, what: str, section: DataSection, accelerator: Accelerator
) -> tuple[dict[str, str], np.ndarray]:
    """Decode images, each process its share; return what is wrong by id, and the labelled pixels by value."""
    rank, world_size = accelerator.process_index, accelerator.num_processes
    shares = gather_object([scan(images, with_label, section.workers, f"reading {what} images", rank, world_size)])
    problems = {name: problem for share in shares for name, problem in sorted(share.problems.items())}
    return problems, sum(share.pixels for share in shares)


def usable_masked(
    source: datasets.Dataset, decoder: LabelDecoder, section: DataSection, what: str, accelerator: Accelerator
) -> Images:
    """Return images with masks, without those that cannot be used if the recipe says to skip them.

    Args:
        source: the images.
        decoder: of their masks.
        section: the recipe's `[data]`.
        what: to call them in messages.
        accelerator: each process reads its share.

    Raises:
        UserError: none is left.
    """
    images = Images(source, decoder, section.image_scale)
    if section.on_error == "raise":
        return images
    problems, _ = _read_all(images, True, what, section, accelerator)
    if problems:
        _answer_problems(list(problems.values()), section, accelerator)
    good = tuple(name for name in images.ids if name not in problems)
    if not good:
        raise UserError(f"[data] none of the {len(images)} {what} images can be used")
    return Images(select_ids(source, good), decoder, section.image_scale)


def usable_images(found: Candidates, accelerator: Accelerator) -> Candidates:
    """Read every image, masked or not, and return those that can be used; masks are not read.

    Raises:
        UserError: one cannot be used and the recipe does not say to skip it, or none is left to choose from.
    """
    section, problems, sources = found.section, {}, {"images": found.images, "labeled": found.labeled}
    for name, source in sources.items():
        problems |= _read_all(Images(source), False, "candidate" if name == "images" else name, section, accelerator)[0]
    if problems:
        _answer_problems(list(problems.values()), section, accelerator)
    good = {name: tuple(one for one in source["id"] if one not in problems) for name, source in sources.items()}
    if not good["images"]:
        raise UserError(f"[data] {section.name}: no image to choose from can be used")
    return dataclasses.replace(found, **{name: select_ids(source, good[name]) for name, source in sources.items()})


def _answer_problems(problems: Sequence[str], section: DataSection, accelerator: Accelerator) -> None:
    listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
    if section.on_error == "raise":
        raise UserError(
            f"[data] {len(problems)} image(s) cannot be used: {listed}; mend them (stages/prepare.py lists all), or "
            'leave them out: [data] on_error = "skip"'
        )
    accelerator.print(f"note: {len(problems)} image(s) skipped by [data] on_error: {listed}", flush=True)


def check_classes(classes: Sequence[str], network: nn.Module, title: str) -> None:
    """Refuse a network of other classes than the data's.

    Raises:
        UserError: naming the network and both lists.
    """
    if network.classes != tuple(classes):
        raise UserError(
            f"{title} knows the {len(network.classes)} classes {', '.join(network.classes)}; "
            f"the data has the {len(classes)} classes {', '.join(classes)}; they must be the same: "
            "name another network, or other [data]"
        )
