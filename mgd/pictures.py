"""Image files and PIL images to pixels, for training and for prediction alike."""

import glob
import io
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.ExifTags
import PIL.Image
import torch

from mgd.errors import UserError, one_line

# What PIL's decoders raise on files that are damaged or no images; the last two on entries of EXIF.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
    PIL.Image.DecompressionBombError,
    struct.error,
    TypeError,
)
_TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
PREDICTIONS = "predictions.json"
"""Marks a folder of predictions as ours."""
KINDS = ("masks", "colors", "overlays", "probabilities")
"""The folders in it that stages/predict.py writes."""


def decode(value: Mapping, last_row: Callable[[int, int], int] | None = None) -> PIL.Image.Image:
    """Open and decode an image file as `datasets.Image` does: upright, as its EXIF says.

    Args:
        value: `bytes` of the file, or else its `path`.
        last_row: given width and height, how many rows from the top are needed. Of a PNG the others are then not
            read, nor is it noticed that they are damaged; they are black. Left out: all rows.

    Raises:
        One of UNREADABLE: what PIL raises on what it cannot read; there is neither a path nor bytes.
    """
    if value["path"] is None and value["bytes"] is None:
        raise ValueError("the table holds no image")
    image = PIL.Image.open(value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"]))
    # Interlaced rows are not in order; of deep pixels (I, F) `to_rgb` takes the maximum over all.
    ordered = image.format == "PNG" and len(image.tile) == 1 and not image.info.get("interlace")
    shortened = last_row is not None and ordered and not image.mode.startswith(("I", "F"))
    if shortened:
        extents = (0, 0, image.width, last_row(*image.size))
        image.tile = [image.tile[0]._replace(extents=extents)]
    turned = upright(image)
    return decode(value) if shortened and turned is not image else turned  # what is turned is read as a whole


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Load an image and turn it as its EXIF says; one that is upright is returned as it is.

    The result has no EXIF: `PIL.ImageOps.exif_transpose` writes it anew, and fails on entries of unexpected types,
    which cameras do write.
    """
    image.load()  # Pillow turns a TIFF when it loads it
    turn = _TURNS.get(image.getexif().get(PIL.ExifTags.Base.Orientation))
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = {key: value for key, value in image.info.items() if key == "transparency"}
    return turned


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return an 8-bit RGB image: 16-bit grey is scaled, transparency is laid on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("it holds pixels that are no number")
        top = float(values.max(initial=0.0))
        full = max(top, 1.0)
        if image.mode.startswith("I"):  # 32 bits may hold 8 or 16
            full = 255.0 if image.mode == "I" and top <= 255 else 65535.0
        image = PIL.Image.fromarray((values.clip(0, full) * (255.0 / full)).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = PIL.Image.new("RGBA", rgba.size, "white")
        image = PIL.Image.alpha_composite(white, rgba)
    return image.convert("RGB")


def rescale(image: PIL.Image.Image, factor: float) -> PIL.Image.Image:
    """Resize an image by `factor`, bilinearly."""
    if factor == 1:
        return image
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, PIL.Image.Resampling.BILINEAR)


def to_tensor(image: PIL.Image.Image) -> torch.Tensor:
    """Return an RGB image as `[3, H, W]` uint8."""
    return torch.from_numpy(np.array(np.asarray(image).transpose(2, 0, 1), order="C"))


def colorize(label: np.ndarray, colors: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Return `[H, W, 3]` uint8 colours of a label map `[H, W]`; 255 is white."""
    table = np.full((256, 3), 255, np.uint8)
    table[: len(colors)] = colors
    return table[label]


def pictures_below(folder: Path) -> list[Path]:
    """Return the image files below a folder, sorted; what is hidden is left out, links are followed.

    So is what stages/predict.py wrote in a folder of predictions, which are no photos. Unlike `Path.rglob` it does not
    pass over what it may not read.

    Raises:
        UserError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}")

    found, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        ours = KINDS if PREDICTIONS in names else ()
        folders[:] = [name for name in folders if not name.startswith(".") and name not in ours]
        folders.sort(key=lambda name, place=place: (os.path.islink(os.path.join(place, name)), name))
        if os.path.realpath(place) in seen:  # a link that leads back, or to what was seen: the folder itself goes first
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        pictures = (Path(place, name) for name in names if not name.startswith("."))
        found += [
            path for path in pictures if path.suffix.lower() in SUFFIXES and (path.is_file() or path.is_symlink())
        ]
    return sorted(found)


def list_pictures(source: str | Path) -> list[Path]:
    """Return image files, sorted.

    Args:
        source: one file, a folder (with those below it), or a glob pattern ("shots/*.jpg").

    Raises:
        UserError: none there, or a folder cannot be read.
    """
    if not str(source):
        raise UserError("no image is named; give a file, a folder or a pattern")
    place = Path(source)
    if place.is_file():
        return [place]
    if place.is_dir():
        files = pictures_below(place)
    else:
        found = [Path(path) for path in glob.glob(str(source), recursive=True)]
        files = sorted(path for path in found if path.is_file() and not path.name.startswith("."))
    if not files:
        raise UserError(f"{source}: no image there; give a file, a folder or a pattern ({', '.join(SUFFIXES)})")
    return files


def read_picture(path: Path) -> PIL.Image.Image:
    """Return an image file as upright 8-bit RGB.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return to_rgb(decode({"path": path, "bytes": None}))
    except (*UNREADABLE, MemoryError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error


def evenly(count: int, wanted: int) -> list[int]:
    """Return up to `wanted` positions, evenly spread over `count` images, from the first to the last."""
    wanted = min(count, wanted)
    return [round(place * (count - 1) / max(1, wanted - 1)) for place in range(wanted)]
