import json
import math

import numpy as np
import PIL.Image
import pytest
import tomli_w
from accelerate import Accelerator
from conftest import TINY

from mgd.experiment import run_recipe
from mgd.recipe import load

SIZES = [(48, 48), (32, 32), (20, 27), (61, 90)]  # the window is 32: more than one, one, less, no multiple


def make_folder(root, classes, random):
    """Write images of all sizes, each a grid of its classes in as many colours."""
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for index, (height, width) in enumerate(SIZES):
        mask = np.kron(random.choice(classes, (4, 4)), np.ones((25, 25), int))[:height, :width].astype(np.uint8)
        image = np.stack([mask * 60, 255 - mask * 60, mask * 0 + 40], 2) + random.integers(0, 9, (*mask.shape, 3))
        mask[0, :5] = 255
        PIL.Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"{index}.png")
        PIL.Image.fromarray(mask).save(root / "masks" / f"{index}.png")


def test_window_sizes_and_absent_classes_against_the_saved_predictions(tmp_path, run_here):
    random = np.random.default_rng(0)
    make_folder(tmp_path / "train", [0, 1, 2], random)
    make_folder(tmp_path / "val", [0, 1], random)
    data = {"name": "folder", "root": str(tmp_path / "train"), "val_root": str(tmp_path / "val")}
    data |= {"classes": ["a", "b", "c", "never"], "crop": 32, "scales": [1.0], "workers": 0}
    run = TINY["run"] | {"output": str(tmp_path / "runs")}
    optim = {"name": "adamw", "lr": 0.01, "batch_size": 4, "steps": 30}
    path = tmp_path / "folder.toml"
    path.write_text(tomli_w.dumps(TINY | {"run": run, "data": data, "optim": optim}))
    run_recipe(load(path), Accelerator(cpu=True))
    scored = run_here(
        *("evaluate.py", "--model", tmp_path / "runs" / "tiny", "--set", "eval.mode=slide"),
        *("--save-predictions", tmp_path / "out", "--json", tmp_path / "e.json"),
    )
    assert scored.returncode == 0, scored.stderr
    inter, union = np.zeros(4), np.zeros(4)
    for index, (height, width) in enumerate(SIZES):
        label = np.asarray(PIL.Image.open(tmp_path / "val" / "masks" / f"{index}.png"))
        guess = np.asarray(PIL.Image.open(tmp_path / "out" / f"{index}.png"))
        assert guess.shape == (height, width)
        for k in range(4):
            valid = label != 255
            inter[k] += np.sum((label == k) & (guess == k))
            union[k] += np.sum(((label == k) | (guess == k)) & valid)
    expected = {name: 100 * inter[k] / union[k] if union[k] else math.nan for k, name in enumerate(data["classes"])}
    rows = {row["class"]: row["IoU %"] for row in json.loads((tmp_path / "e.json").read_text())}
    absent = [name for name, value in expected.items() if math.isnan(value)]
    for name, value in expected.items():
        assert rows[name] is None if name in absent else rows[name] == pytest.approx(value)
    assert rows["mean"] == pytest.approx(np.nanmean(list(expected.values())))
    assert "never" in absent
    painted = {path: path.read_bytes() for path in (tmp_path / "val" / "masks").iterdir()}
    refused = run_here(
        *("evaluate.py", "--model", tmp_path / "runs" / "tiny", "--save-predictions", tmp_path / "val" / "masks")
    )
    assert refused.returncode == 2 and "files that are no predictions of ours" in refused.stderr
    assert painted == {path: path.read_bytes() for path in (tmp_path / "val" / "masks").iterdir()}
    assert f"left out of the mean: {', '.join(absent)}" in scored.stdout
