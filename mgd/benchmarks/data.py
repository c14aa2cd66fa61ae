"""Decoding and augmentation of labelled training images beside what the common codebases do, on one core.

The reference is written plainly with OpenCV: the whole image and mask are resized, then padded, cropped,
flipped and normalised in float32.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch

from mgd.benchmarks.timing import alternate, ratio_row
from mgd.data.datasets import table
from mgd.data.images import Images
from mgd.data.loaders import LABELED, TrainingPairs
from mgd.data.transforms import IGNORE_INDEX, MEAN_COLOR, LabelDecoder, View
from mgd.errors import UserError
from mgd.sections import DataSection

MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # ImageNet's, of values 0..1
STD = np.array([0.229, 0.224, 0.225], np.float32)
BICUBIC = PIL.Image.Resampling.BICUBIC


class Case(NamedTuple):
    """Generated files of one kind, and the crop that is cut from them."""

    width: int
    height: int
    kind: str
    """jpg or png."""
    noise: float
    """Standard deviation of the noise on a pixel; it says how many bytes the files have."""
    crop: int


# Pascal VOC's files have about 100 KB, those of Cityscapes 2 MB and more; so have these.
CASES = (Case(500, 375, "jpg", 6, 320), Case(2048, 1024, "png", 1, 800))


def suite(
    section: DataSection, num_images: int, repetitions: int, cases: Sequence[Case] = CASES
) -> list[dict[str, Any]]:
    """Measure both on the same files, with the same views.

    Args:
        section: a recipe's `[data]`, for `scales` and `flip`.
        num_images: files of a case; each is read six times a round.
        repetitions: rounds that count.
        cases: files and crops.

    Returns:
        One row a case: `name, reference, ours, ratio`, milliseconds an image.

    Raises:
        UserError: OpenCV is not installed.
    """
    opencv().setNumThreads(1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_row(section, case, num_images, repetitions) for case in cases]
    finally:
        torch.set_num_threads(threads)


def _row(section: DataSection, case: Case, num_images: int, repetitions: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        pairs, files = write_case(Path(folder), case, section, num_images)
        positions = range(6 * num_images)

        def reference() -> None:
            for position in positions:
                view = pairs.view(case.width, case.height, LABELED, position)
                reference_sample(*files[position % num_images], case.crop, view)

        def ours() -> None:
            for position in positions:
                pairs[position]

        seconds = alternate({"reference": reference, "ours": ours}, repetitions, torch.device("cpu"))
    name = f"data: {case.width}x{case.height} {case.kind} to {case.crop}, ms an image"
    return ratio_row(name, **{name: 1000 * value / len(positions) for name, value in seconds.items()})


def opencv() -> Any:
    """Return the module cv2, which only the reference needs.

    Raises:
        UserError: it is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise UserError('--suite data compares with OpenCV; pip install -e ".[dev]"') from error
    return cv2


def reference_sample(image_file: Path, mask_file: Path, crop: int, view: View) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an image `[3, crop, crop]` float32, normalised, and its label `[crop, crop]` int64.

    Args:
        image_file: a file without EXIF.
        mask_file: grey, class indices.
        crop: side of the result, pixels.
        view: its scale, place and flip are used.
    """
    cv2 = opencv()
    image = cv2.cvtColor(cv2.imread(str(image_file)), cv2.COLOR_BGR2RGB)
    mask = cv2.imread(str(mask_file), cv2.IMREAD_GRAYSCALE)
    left, top, right, bottom = view.box
    scale_x, scale_y = view.size[0] / (right - left), view.size[1] / (bottom - top)
    full = (max(view.size[0], round(image.shape[1] * scale_x)), max(view.size[1], round(image.shape[0] * scale_y)))
    image = cv2.resize(image, full, interpolation=cv2.INTER_LINEAR)
    mask = cv2.resize(mask, full, interpolation=cv2.INTER_NEAREST)
    x, y = (min(round(left * scale_x), full[0] - view.size[0]), min(round(top * scale_y), full[1] - view.size[1]))
    border = (view.offset[1], crop - view.size[1] - view.offset[1], view.offset[0])
    border += (crop - view.size[0] - view.offset[0], cv2.BORDER_CONSTANT)
    image = cv2.copyMakeBorder(image[y : y + view.size[1], x : x + view.size[0]], *border, value=MEAN_COLOR)
    mask = cv2.copyMakeBorder(mask[y : y + view.size[1], x : x + view.size[0]], *border, value=IGNORE_INDEX)
    if view.mirrored:
        image, mask = image[:, ::-1], mask[:, ::-1]
    values = (image.astype(np.float32) / 255 - MEAN) / STD
    planes = np.ascontiguousarray(values.transpose(2, 0, 1))
    return torch.from_numpy(planes), torch.from_numpy(mask.astype(np.int64))


def write_case(
    folder: Path, case: Case, section: DataSection, num_images: int
) -> tuple[TrainingPairs, list[tuple[Path, Path]]]:
    """Write generated images and masks; return the samples of a run on them, and the files."""
    num_classes = len(section.class_names())
    files = []
    for index in range(num_images):
        rng = np.random.default_rng(index)
        image, mask = folder / f"{index}.{case.kind}", folder / f"{index}_mask.png"
        _picture(case, rng).save(image, quality=95)
        _mask(case, min(num_classes, 19), rng).save(mask)
        files.append((image, mask))
    ids = [str(index) for index in range(num_images)]
    source = table(ids, [str(image) for image, _ in files], [str(mask) for _, mask in files])
    section = section.model_copy(update={"crop": case.crop})
    return TrainingPairs(Images(source, LabelDecoder(num_classes)), None, section, seed=0), files


def _picture(case: Case, rng: np.random.Generator) -> PIL.Image.Image:
    """Large soft patches, a texture of six pixels, and noise."""
    values = rng.normal(0, case.noise, (case.height, case.width, 1))
    for cell, weight in ((case.width // 12, 0.8), (6, 0.15)):
        colors = rng.integers(0, 256, (case.height // cell + 2, case.width // cell + 2, 3), dtype=np.uint8)
        values = values + weight * np.asarray(PIL.Image.fromarray(colors).resize((case.width, case.height), BICUBIC))
    return PIL.Image.fromarray(values.clip(0, 255).astype(np.uint8))


def _mask(case: Case, num_classes: int, rng: np.random.Generator) -> PIL.Image.Image:
    """Blobs of all classes."""
    heights = rng.normal(size=(num_classes, 7, 9)).astype(np.float32)
    smooth = [np.asarray(PIL.Image.fromarray(h).resize((case.width, case.height), BICUBIC)) for h in heights]
    return PIL.Image.fromarray(np.argmax(smooth, axis=0).astype(np.uint8))
