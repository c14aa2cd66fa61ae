"""Predictions of frozen teachers for whole images, kept on disk, and cut like the images they belong to.

A cache is a folder. `manifest.json` says of which images, by which teachers and how; image i of its list lies
in `shard-<i // IMAGES_PER_SHARD>.safetensors` as tensors named `i/teacher/kind`:

labels      `[H, W]` uint8, the teacher's classes
probabilities  `[K, ceil(H / 4), ceil(W / 4)]` uint8, of all classes, means over cells times 255
fine_logits `[K, ceil(H / 4), ceil(W / 4)]` float16, in the middle of each cell
logits      `[K, ceil(H / cell), ceil(W / cell)]` float16, averaged over cells of the image
features    `[C, ceil(H / cell), ceil(W / cell)]` float16, likewise: the decoder map before the classifier
"""

import functools
import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mgd.data.transforms import View, cut_label
from mgd.errors import UserError
from mgd.files import write_aside

FORMAT = 2
IMAGES_PER_SHARD = 32
FINE_CELL = 4
FINE = ("probabilities", "fine_logits")
"""Kinds over cells of FINE_CELL pixels; they come with `valid`."""
OF_CELLS = ("logits", "features")
"""Kinds over cells of `[cache] cell` pixels."""
OF_LABELED = ("labels", *FINE)
"""Kinds that losses on labelled images need, too."""


def shard_path(folder: Path, number: int) -> Path:
    """Return the file of the images from `number * IMAGES_PER_SHARD` on."""
    return folder / f"shard-{number:05d}.safetensors"


def digest(manifest: Mapping[str, Any]) -> str:
    """Return a SHA-256 of a manifest, which its shards carry."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def write_shard(folder: Path, number: int, manifest: str, tensors: Mapping[str, Tensor]) -> None:
    """Write one shard, whole or not at all.

    Args:
        folder: the cache.
        number: of the shard.
        manifest: digest of the cache's.
        tensors: by the names that the module's docstring gives.
    """
    sums = {name: _checksum(tensor) for name, tensor in tensors.items()}
    header = {"cache": json.dumps({"manifest": manifest, "checksums": sums})}  # one key: their order varies
    write_aside(shard_path(folder, number), lambda path: save_file(dict(tensors), path, metadata=header))


def serves(path: Path, manifest: str) -> bool:
    """Whether a shard is there, opens, and is of the manifest with this digest; its tensors are not read."""
    try:
        with safe_open(path, framework="pt") as shard:
            return _header(shard)["manifest"] == manifest
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return False


def _header(shard: safe_open) -> dict[str, Any]:
    return json.loads(shard.metadata()["cache"])


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy())


class CachedTargets:
    """What a cache holds, cut to what a crop shows.

    Args:
        folder: the cache.
        manifest: its `manifest.json`.
        kinds: teacher -> kinds of tensors that are wanted of it.
        remedy: the command that mends a damaged cache.
    """

    def __init__(
        self, folder: Path, manifest: Mapping[str, Any], kinds: Mapping[str, tuple[str, ...]], remedy: str
    ) -> None:
        self.folder, self.kinds, self.cell, self.digest = folder, dict(kinds), manifest["cell"], digest(manifest)
        self.remedy = remedy
        self.places = {name: index for index, name in enumerate(manifest["ids"])}

    def bytes_per_image(self) -> float:
        """Return the mean size of an image's predictions on disk."""
        files = {shard_path(self.folder, index // IMAGES_PER_SHARD) for index in self.places.values()}
        return sum(file.stat().st_size for file in files) / len(self.places)

    def cut(self, name: str, size: tuple[int, int], view: View, crop: int, labeled: bool = False) -> dict[str, Tensor]:
        """Return what the teachers saw in a crop.

        Args:
            name: id of the image.
            size: width and height of the image, pixels.
            view: what the crop shows of it.
            crop: side of the crop, pixels.
            labeled: leave out logits and features, which belong to losses on unlabelled images.

        Returns:
            By `teacher/kind`: labels `[crop, crop]` int64, 255 in padding; probabilities and fine_logits `[K, p, p]`
            float32, p = ceil(crop / 4), and with these `valid`, `[crop, crop]` bool, False in padding; logits and
            features `[C, g, g]` float32, g = ceil(crop / cell). All but labels are means over what a part of the crop
            shows; in padding, of the nearest cell.

        Raises:
            UserError: the cache lacks the image, has it in another size, or is damaged.
        """
        index = self.places.get(name)
        if index is None:
            raise UserError(f"{self.folder} has no image {name}; write it anew: {self.remedy} --restart")
        path = shard_path(self.folder, index // IMAGES_PER_SHARD)
        found = {}
        try:
            for teacher, kinds in self.kinds.items():
                for kind in [kind for kind in kinds if kind in OF_LABELED or not labeled]:
                    stored = self._read(path, f"{index}/{teacher}/{kind}")
                    cell = 1 if kind == "labels" else FINE_CELL if kind in FINE else self.cell
                    if tuple(stored.shape[-2:]) != (-(-size[1] // cell), -(-size[0] // cell)):
                        raise UserError(
                            f"{path}: {name} is not of {size[0]}x{size[1]} pixels there; the image has changed: "
                            f"{self.remedy} --restart"
                        )
                    if kind == "labels":
                        found[f"{teacher}/{kind}"] = cut_label(stored.numpy(), crop, view)
                        continue
                    cells = cut_cells(stored, size, view, crop, -(-crop // cell))
                    if kind == "probabilities":
                        cells = cells / cells.sum(dim=0)  # many classes of 8 bits do not sum to 1
                    if kind in FINE and "valid" not in found:
                        found["valid"] = valid_pixels(view, crop)
                    found[f"{teacher}/{kind}"] = cells
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"{path} cannot be read: {error}; delete it, and this mends it: {self.remedy}") from error
        return found

    def _read(self, path: Path, name: str) -> Tensor:
        tensor = _open(path, self.digest).read(name)
        if tensor is None:
            raise UserError(f"{path} is damaged ({name}); delete it, and this mends it: {self.remedy}")
        return tensor


class _Shard:
    """A shard that is open; an image of it is cut again and again, so what was found sound is not summed up again.

    Args:
        path: of the file.
        manifest: digest of the cache that it must be of.

    Raises:
        UserError: it is of another cache.
    """

    def __init__(self, path: Path, manifest: str) -> None:
        self.file = safe_open(path, framework="pt")
        header = _header(self.file)
        if header["manifest"] != manifest:
            raise UserError(f"{path} is of another cache than the run began with; start the run over: --restart")
        self.checksums, self.sound = header["checksums"], set()

    def read(self, name: str) -> Tensor | None:
        """Return a tensor, or None if it is damaged."""
        tensor = self.file.get_tensor(name)
        if name not in self.sound and self.checksums[name] != _checksum(tensor):
            return None
        self.sound.add(name)
        return tensor


@functools.lru_cache(maxsize=512)
def _open(path: Path, manifest: str) -> _Shard:
    """Open a shard; a process keeps those it has opened."""
    return _Shard(path, manifest)


def valid_pixels(view: View, crop: int) -> Tensor:
    """Return `[crop, crop]` bool: where a crop shows its image; elsewhere is padding."""
    (x, y), (width, height) = view.offset, view.size
    found = torch.zeros(crop, crop, dtype=torch.bool)
    found[y : y + height, x : x + width] = True
    return found.flip(-1) if view.mirrored else found


def cut_cells(cells: Tensor, size: tuple[int, int], view: View, crop: int, parts: int) -> Tensor:
    """Average a coarse map of an image over the parts of a crop, each cell by the area that it shares with the part.

    Args:
        cells: `[C, h, w]`, of cells that divide the image evenly.
        size: width and height of the image, pixels.
        view: what the crop shows of it.
        crop: side of the crop, pixels.
        parts: the crop is divided into parts x parts.

    Returns:
        `[C, parts, parts]` float32.
    """
    columns, rows = (_shares(axis, cells.shape[2 - axis], size, view, crop, parts) for axis in (0, 1))
    (left, right), (top, bottom) = (shares.any(dim=0).nonzero()[[0, -1], 0].tolist() for shares in (columns, rows))
    seen = cells[:, top : bottom + 1, left : right + 1].float()  # most of a large image is not
    return rows[:, top : bottom + 1] @ (seen @ columns[:, left : right + 1].T)


@functools.lru_cache(maxsize=8)  # logits and features, of all teachers, are cut alike
def _shares(axis: int, count: int, size: tuple[int, int], view: View, crop: int, parts: int) -> Tensor:
    """Return `[parts, count]`: the share of each cell in each part of the crop along one axis; rows sum to 1."""
    first, last = view.box[axis], view.box[axis + 2]
    edges = np.arange(parts + 1) * (crop / parts)
    edges = first + (edges - view.offset[axis]) * ((last - first) / view.size[axis])  # pixels of the image
    edges = edges.clip(first, last) * (count / size[axis])  # cells; padding has become empty parts
    low, high, cell = edges[:-1, None], edges[1:, None], np.arange(count)
    shares = (np.minimum(high, cell + 1) - np.maximum(low, cell)).clip(min=0)
    empty = (high - low)[:, 0] < 1e-9
    shares[empty] = cell == low[empty].astype(int).clip(max=count - 1)
    shares /= shares.sum(axis=1, keepdims=True)
    return torch.from_numpy((shares[::-1] if axis == 0 and view.mirrored else shares).astype(np.float32))
