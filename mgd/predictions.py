"""A folder of predicted masks: whose it is, and what is written into it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
from torch import Tensor

from mgd.errors import UserError
from mgd.files import read_json, write_aside, write_json
from mgd.pictures import PREDICTIONS
from mgd.sections import Eval


def mark_of(
    model: Path, weights: str, images: str, section: Eval, crop: int, image_scale: float, precision: str
) -> dict[str, str]:
    """Return what predictions are of, which marks their folder.

    Args:
        model: its folder.
        weights: their fingerprint.
        images: the split or the place.
        section: how they are predicted; of it only what changes a prediction.
        crop: side of the sliding window when `section.crop` is left out, pixels.
        image_scale: by which images are resized first.
        precision: the accelerator's `mixed_precision`.
    """
    window = {"crop": section.crop or crop, "stride": section.stride} if section.mode == "slide" else {}
    how = {"mode": section.mode, **window, "scales": section.scales, "flip": section.flip, "image_scale": image_scale}
    settings = ", ".join(f"{key} = {value}" for key, value in (how | {"mixed_precision": precision}).items())
    return {"model": str(model.resolve()), "weights": weights, "images": images, "settings": settings}


def check_predictions(folder: Path, mark: Mapping[str, str], below: Sequence[str] = ("",)) -> None:
    """Refuse a folder with files that no prediction of ours wrote: they may be masks that somebody painted.

    Args:
        folder: where predictions shall go.
        mark: what they are of, see `mark_of`; the folder of the model may have moved.
        below: folders in it that will hold them.

    Raises:
        UserError: one of these is not empty, and nothing says that we wrote what is there, or it is of another model,
            other weights, images or settings.
    """
    if _is_ours(folder, mark):
        return
    for place in (folder / name for name in below):
        if place.is_dir() and any(place.iterdir()):
            raise UserError(f"{place} holds files that are no predictions of ours; name another, or an empty, folder")


def mark_predictions(folder: Path, mark: Mapping[str, str], files: int) -> None:
    """Say that a folder's predictions are ours: before the first one, so that what was cut short can be done again.

    Args:
        folder: of the predictions, see `check_predictions`.
        mark: what they are of, see `mark_of`.
        files: images that are to be predicted.

    Raises:
        UserError: since the check another process has begun to write other predictions there.
    """
    _is_ours(folder, mark)
    write_json(folder / PREDICTIONS, {**mark, "files": files})


def _is_ours(folder: Path, mark: Mapping[str, str]) -> bool:
    """Whether a folder is marked as ours; if it is of something else, which could not be told apart, refuse it."""
    try:
        found = read_json(folder / PREDICTIONS, ("model", "files"))
    except UserError:
        return False
    if not found.keys() <= {*mark, "files"}:
        return False
    here = mark if "settings" in found else {key: mark[key] for key in mark if key != "settings"}  # an older mark
    different = [key for key in here if found.get(key) != here[key]]
    if other := [key for key in different if key != "model" or "weights" in different]:
        what = f"{'another' if other[0] == 'model' else 'other'} {other[0]}: {found.get(other[0], 'unknown')}"
        what = "earlier weights of this model" if other[0] == "weights" and "weights" in found else what
        raise UserError(
            f"{folder} holds predictions of {what}; name another folder for these, or delete those, {PREDICTIONS} too"
        )
    return True


def save_prediction(
    folder: Path,
    colors: Sequence[tuple[int, int, int]],
    encode: Callable[[np.ndarray], np.ndarray],
    name: str,
    classes: Tensor,
) -> None:
    """Save predicted classes as a palette PNG below `folder`.

    Args:
        folder: made when missing; an id with slashes makes folders below it, never outside.
        colors: class colours.
        encode: turns classes into the values that the data set's masks hold.
        name: id of the image.
        classes: `[H, W]`.

    Raises:
        UserError: the id leads out of the folder, or it cannot be written.
    """
    path = (folder / f"{name}.png").resolve()
    if not path.is_relative_to(folder.resolve()):
        raise UserError(f"{name}: the id would be written outside {folder}")
    values = encode(classes.numpy())
    palette = np.full((256, 3), 255, np.uint8)
    palette[encode(np.arange(len(colors)))] = colors
    picture = PIL.Image.fromarray(values).convert("L")
    picture.putpalette(palette.flatten().tolist())
    write_aside(path, lambda aside: picture.save(aside, format="PNG"))
