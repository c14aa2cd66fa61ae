"""What networks see in every image of a pool: descriptions of the images, and where two networks disagree."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from mgd.data.images import Images, read_each
from mgd.errors import explained
from mgd.inference import predict
from mgd.models.segmenter import Segmenter, build_segmenter
from mgd.pictures import rescale, to_tensor
from mgd.progress import progress_bar
from mgd.recipe import Recipe
from mgd.selection import disagreement


def untrained(recipe: Recipe, accelerator: Accelerator) -> Segmenter:
    """Return the recipe's student before training, for its backbone's sake.

    Raises:
        UserError: the backbone, or its ImageNet weights, cannot be had.
    """
    if not recipe.student.pretrained:
        accelerator.print("note: [student] pretrained = false: a backbone of random weights sees little; give --model")
    classes = recipe.data.class_names()
    with accelerator.main_process_first():  # one of them fetches the ImageNet weights
        network = build_segmenter(recipe.student, classes, [(0, 0, 0)] * len(classes), recipe.run.seed)
    return network.eval().to(accelerator.device)


def descriptions(
    network: Segmenter, images: Images, order: Sequence[int], recipe: Recipe, accelerator: Accelerator
) -> Tensor:
    """Describe images by a backbone; called on all processes.

    Args:
        network: in eval mode, on the device.
        images: the pool; of any sizes, each is squeezed into a square of the training crop.
        order: indices of those that are wanted.
        recipe: its `[data]` crop and workers.
        accelerator: device and processes.

    Returns:
        `[N, C]` float32, see `Segmenter.describe`.

    Raises:
        UserError: an image cannot be read.
    """
    square = functools.partial(_square, side=recipe.data.crop)
    found = _of_each(images, order, square, lambda seen, _: network.describe(seen[0])[0].cpu(), recipe, accelerator)
    return torch.stack(found) if found else torch.empty(0, network.backbone.feature_info.channels()[-1])


def disagreements(networks: Sequence[Segmenter], images: Images, recipe: Recipe, accelerator: Accelerator) -> Tensor:
    """Score images by the share of pixels that two networks give different classes; called on all processes.

    Args:
        networks: two of the same classes, in eval mode, on the device; each sees an image at its own scale.
        images: the pool.
        recipe: its `[eval]` says how they predict.
        accelerator: device and processes.

    Returns:
        `[N]` float32, 0 to 1.

    Raises:
        UserError: an image cannot be read or predicted.
    """

    def score(seen: list[Tensor], name: str) -> float:
        with explained(f"{name} cannot be predicted", "try --set eval.mode=slide"):
            return disagreement(
                *(
                    predict(network, pixels, recipe.eval, network.crop or recipe.data.crop)[0]
                    for network, pixels in zip(networks, seen, strict=True)
                )
            )

    scaled = functools.partial(_scaled, factors=[network.image_scale for network in networks])
    return torch.tensor(_of_each(images, range(len(images)), scaled, score, recipe, accelerator))


def _of_each(
    images: Images,
    order: Sequence[int],
    pixels: Callable[[Images, int], list[Tensor]],
    compute: Callable[[list[Tensor], str], Any],
    recipe: Recipe,
    accelerator: Accelerator,
) -> list:
    """Return `compute` of the `pixels` (as batches of one) and the id of each image, each process its share."""
    places = range(accelerator.process_index, len(order), accelerator.num_processes)
    read = read_each(images, [order[place] for place in places], pixels, recipe.data.workers)
    pairs = zip(places, read, strict=True)
    bar = progress_bar(accelerator.is_main_process, iterable=pairs, total=len(places), unit="img")
    found = []
    with torch.inference_mode():
        for place, seen in bar:
            batches = [one[None].to(accelerator.device) for one in seen]
            found.append((place, compute(batches, images.ids[order[place]])))
    return [value for _, value in sorted(gather_object(found), key=lambda pair: pair[0])]


def _square(images: Images, index: int, side: int) -> list[Tensor]:
    return [to_tensor(images.picture(index).resize((side, side)))]


def _scaled(images: Images, index: int, factors: Sequence[float]) -> list[Tensor]:
    picture = images.picture(index)
    return [to_tensor(rescale(picture, factor)) for factor in factors]
