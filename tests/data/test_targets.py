"""Cached targets are cut like the image: against sampling many points, and against the image's own label."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

from mgd.data import targets
from mgd.data.targets import CachedTargets, cut_cells, digest, shard_path, write_shard
from mgd.data.transforms import View, augment, draw_view
from mgd.errors import UserError

SIZE, CROP = (100, 70), 48
MANIFEST = {"ids": ["a", "b"], "cell": 16}


def by_points(cells, size, view, crop, parts, points=64):
    """Look up the cell under points of the crop that show the image, and average them; else that of the nearest."""
    found = np.zeros((len(cells), parts, parts), np.float32)
    axes = []
    for axis in (0, 1):
        places = ((np.arange(parts * points) + 0.5) * crop / (parts * points)).reshape(parts, points)
        first, last = view.box[axis], view.box[axis + 2]
        places = (places - view.offset[axis]) * (last - first) / view.size[axis]
        shown = [part[(part >= 0) & (part < last - first)] for part in places]
        near = np.clip(places.mean(1), 0, last - first - 1e-9)
        kept = [part if len(part) else near[index : index + 1] for index, part in enumerate(shown)]
        axes.append([((first + part) * cells.shape[2 - axis] / size[axis]).astype(int) for part in kept])
    for row in range(parts):
        for column in range(parts):
            found[:, row, column] = cells.numpy()[:, axes[1][row]][:, :, axes[0][column]].mean((1, 2))
    return torch.from_numpy(found[..., ::-1].copy() if view.mirrored else found)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("parts", [1, 3, 7])
def test_cells_by_area(seed, parts):
    view = draw_view(*SIZE, CROP, (0.4, 1.0, 2.0), True, np.random.default_rng(seed))
    cells = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(seed))
    found = cut_cells(cells, SIZE, view, CROP, parts)
    assert found.shape == (2, parts, parts)
    assert torch.allclose(found, by_points(cells, SIZE, view, CROP, parts), atol=0.06)


def test_the_whole_image_gives_its_own_cells():
    cells = torch.randn(3, 4, 4)
    view = View((0, 0, 64, 64), (64, 64), (0, 0), False)
    assert torch.allclose(cut_cells(cells, (64, 64), view, 64, 4), cells, atol=1e-6)
    assert torch.allclose(cut_cells(cells, (64, 64), view._replace(mirrored=True), 64, 4), cells.flip(-1), atol=1e-6)


def write(folder):
    rng = np.random.default_rng(0)
    tensors = {}
    for index in range(2):
        tensors[f"{index}/t/labels"] = torch.from_numpy(rng.integers(0, 5, SIZE[::-1]).astype(np.uint8))
        tensors[f"{index}/t/logits"] = torch.from_numpy(rng.normal(size=(5, 5, 7))).half()
    write_shard(folder, 0, digest(MANIFEST), tensors)
    return tensors


def test_labels_are_cut_like_those_of_the_image(tmp_path):
    tensors = write(tmp_path)
    targets = CachedTargets(tmp_path, MANIFEST, {"t": ("labels", "logits")}, "mend")
    image = PIL.Image.new("RGB", SIZE)
    for seed in range(20):
        view = draw_view(*SIZE, CROP, (0.4, 1.0, 2.0), True, np.random.default_rng(seed))
        found = targets.cut("b", SIZE, view, CROP)
        assert (found["t/labels"] == augment(image, tensors["1/t/labels"].numpy(), CROP, view)[1]).all()
        assert found["t/logits"].shape == (5, 3, 3) and found["t/logits"].dtype == torch.float32


def test_what_is_shown_is_no_padding_and_probabilities_sum_to_one(tmp_path):
    rng = np.random.default_rng(0)
    stored = torch.from_numpy((rng.dirichlet([0.02] * 150, (18, 25)) * 255).round().astype(np.uint8)).permute(2, 0, 1)
    write_shard(tmp_path, 0, digest(MANIFEST), {"1/t/probabilities": stored.contiguous()})
    targets = CachedTargets(tmp_path, MANIFEST, {"t": ("probabilities",)}, "mend")
    parts = set()
    for seed in range(20):
        view = draw_view(*SIZE, CROP, (0.4, 1.0, 2.0), True, np.random.default_rng(seed))
        found = targets.cut("b", SIZE, view, CROP, labeled=True)
        label = augment(PIL.Image.new("RGB", SIZE), np.zeros(SIZE[::-1], np.uint8), CROP, view)[1]
        assert torch.equal(found["valid"], label != 255)
        assert torch.allclose(found["t/probabilities"].sum(0), torch.ones(12, 12), atol=1e-5)
        parts |= {bool(found["valid"].all())}
    assert parts == {True, False}


@pytest.mark.parametrize(
    "kind, shape",
    [("labels", (60, 40)), ("probabilities", (3, 15, 10)), ("logits", (3, 4, 3)), ("fine_logits", (3, 15, 10))],
)
def test_predictions_for_an_image_of_another_size_are_named(tmp_path, kind, shape):
    stored = torch.ones(shape, dtype=torch.half if "logits" in kind else torch.uint8)
    write_shard(tmp_path, 0, digest(MANIFEST), {f"0/t/{kind}": stored})
    targets = CachedTargets(tmp_path, MANIFEST, {"t": (kind,)}, "mend")
    view = View((0, 0, 40, 40), (48, 48), (0, 0), False)
    assert targets.cut("a", (40, 60), view, CROP)
    with pytest.raises(UserError, match="a is not of 60x40 pixels there; the image has changed"):
        targets.cut("a", (60, 40), view, CROP)


def test_what_does_not_fit_is_named(tmp_path):
    write(tmp_path)
    view = View((0, 0, 48, 48), (48, 48), (0, 0), False)
    with pytest.raises(UserError, match="has no image c; .*mend --restart"):
        CachedTargets(tmp_path, MANIFEST, {"t": ("labels",)}, "mend").cut("c", SIZE, view, CROP)
    with pytest.raises(UserError, match="a is not of 90x70 pixels there; the image has changed"):
        CachedTargets(tmp_path, MANIFEST, {"t": ("labels",)}, "mend").cut("a", (90, 70), view, CROP)
    with pytest.raises(UserError, match="shard-00000.safetensors cannot be read: .*features.*delete it"):
        CachedTargets(tmp_path, MANIFEST, {"t": ("features",)}, "mend").cut("a", SIZE, view, CROP)


@pytest.mark.parametrize("damage", ["cut", "gone", "other", "flipped"])
def test_a_damaged_shard_is_named(tmp_path, damage):
    write(tmp_path)
    path = shard_path(tmp_path, 0)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "gone":
        path.unlink()
    elif damage == "flipped":
        tensors = load_file(path)
        at = path.read_bytes().index(tensors["0/t/labels"].numpy().tobytes())
        with open(path, "r+b") as file:
            file.seek(at + 9)
            file.write(b"\x44")
    else:
        save_file(
            {"x": torch.zeros(1)}, path, metadata={"cache": json.dumps({"manifest": digest(MANIFEST), "checksums": {}})}
        )
    with pytest.raises(
        UserError, match="shard-00000.safetensors (cannot be read|is damaged).*delete it, and this mends it: mend"
    ):
        view = View((0, 0, 48, 48), (48, 48), (0, 0), False)
        CachedTargets(tmp_path, MANIFEST, {"t": ("labels",)}, "mend").cut("a", SIZE, view, CROP)


def test_each_tensor_is_summed_up_once(tmp_path, monkeypatch):
    write(tmp_path)
    summed, view = [], View((0, 0, 48, 48), (48, 48), (0, 0), False)
    checksum = targets._checksum
    monkeypatch.setattr(targets, "_checksum", lambda tensor: summed.append(0) or checksum(tensor))
    cached = CachedTargets(tmp_path, MANIFEST, {"t": ("labels",)}, "mend")
    for name in ("a", "a", "a", "b", "b"):
        cached.cut(name, SIZE, view, CROP)
    assert len(summed) == 2


def test_damage_is_found_in_a_shard_that_was_read_before(tmp_path):
    write(tmp_path)
    path, view = shard_path(tmp_path, 0), View((0, 0, 48, 48), (48, 48), (0, 0), False)
    at = path.read_bytes().index(load_file(path)["1/t/labels"].numpy().tobytes())
    with open(path, "r+b") as file:
        file.seek(at + 9)
        file.write(b"\x44")
    cached = CachedTargets(tmp_path, MANIFEST, {"t": ("labels",)}, "mend")
    cached.cut("a", SIZE, view, CROP)
    with pytest.raises(UserError, match="shard-00000.safetensors is damaged"):
        cached.cut("b", SIZE, view, CROP)
