import itertools
import json
import math
import shutil

import numpy as np
import PIL.Image
import pytest
import tomli_w
import torch
from accelerate import Accelerator
from conftest import TINY, forget_data

from mgd.experiment import run_recipe
from mgd.models.segmenter import load_segmenter
from mgd.pictures import to_tensor
from mgd.recipe import load

SIZES = [(48, 48), (32, 32), (20, 27), (61, 90)]  # the window is 32: more than one, one, less, no multiple


CLASSES = ["a", "b", "c", "never"]


def folder_recipe(root, **sections):
    """Write a recipe of the folders that `make_folder` makes in `root`, train and val."""
    data = {"name": "folder", "root": str(root / "train"), "val_root": str(root / "val"), "classes": CLASSES}
    data |= {"crop": 32, "scales": [1.0], "workers": 0}
    run = TINY["run"] | {"output": str(root / "runs")}
    optim = {"name": "adamw", "lr": 0.01, "batch_size": 4, "steps": 30}
    path = root / "folder.toml"
    path.write_text(tomli_w.dumps(TINY | {"run": run, "data": data, "optim": optim} | sections))
    return path


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


def expected_ious(masks, predictions, sizes, classes):
    """IoU in % of saved predictions, counted in numpy; `sizes`: file name -> height and width."""
    inter, union = np.zeros(len(classes)), np.zeros(len(classes))
    for name, size in sizes.items():
        label, guess = (np.asarray(PIL.Image.open(folder / name)) for folder in (masks, predictions))
        assert guess.shape == size
        for k in range(len(classes)):
            valid = label != 255
            inter[k] += np.sum((label == k) & (guess == k))
            union[k] += np.sum(((label == k) | (guess == k)) & valid)
    return {name: 100 * inter[k] / union[k] if union[k] else math.nan for k, name in enumerate(classes)}


def test_window_sizes_and_absent_classes_against_the_saved_predictions(tmp_path, run_here):
    random = np.random.default_rng(0)
    make_folder(tmp_path / "train", [0, 1, 2], random)
    make_folder(tmp_path / "val", [0, 1], random)
    run_recipe(load(folder_recipe(tmp_path)), Accelerator())
    scored = run_here(
        *("evaluate.py", "--model", tmp_path / "runs" / "tiny", "--set", "eval.mode=slide"),
        *("--save-predictions", tmp_path / "out", "--json", tmp_path / "e.json"),
    )
    assert scored.returncode == 0, scored.stderr
    sizes = {f"{index}.png": size for index, size in enumerate(SIZES)}
    expected = expected_ious(tmp_path / "val" / "masks", tmp_path / "out", sizes, CLASSES)
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
    # Windows of 32 two thirds of it apart, the last of which ends with the image of 61 x 90: what was scored is theirs.
    network, last = load_segmenter(tmp_path / "runs" / "tiny").eval(), PIL.Image.open(tmp_path / "val/images/3.png")
    pixels, total, count = to_tensor(last)[None], torch.zeros(1, len(CLASSES), 61, 90), torch.zeros(61, 90)
    with torch.no_grad():
        for top, left in itertools.product((0, 21, 29), (0, 21, 43, 58)):
            place = (..., slice(top, top + 32), slice(left, left + 32))
            total[place] += network(pixels[place]).logits
            count[place] += 1
        whole = network(pixels).logits.argmax(dim=1)[0].numpy()
    kept = np.asarray(PIL.Image.open(tmp_path / "out" / "3.png"))
    assert np.array_equal(kept, (total / count).argmax(dim=1)[0].numpy()) and not np.array_equal(kept, whole)


def test_images_that_a_run_learned_from_are_announced(tmp_path, run_here):
    for seed, part in enumerate(("train", "val")):
        make_folder(tmp_path / part, [0, 1, 2], np.random.default_rng(seed))
    for kind in ("images", "masks"):
        for index in range(len(SIZES)):  # names of their own
            (tmp_path / "val" / kind / f"{index}.png").rename(tmp_path / "val" / kind / f"v{index}.png")
    run_recipe(load(folder_recipe(tmp_path, partition={"labeled": 2, "seed": 3})), Accelerator())
    run, copy = tmp_path / "runs" / "tiny", shutil.copytree(tmp_path / "train", tmp_path / "copy")
    said = "of these 4 images have the names of labelled training images of"
    own = run_here("evaluate.py", "--model", run)
    assert own.returncode == 0 and said not in own.stdout
    for model in (run, run / "model"):
        other = run_here("evaluate.py", "--model", model, "--set", f"data.val_root={copy}")
        assert other.returncode == 0 and f"note: 2 {said} {run} " in other.stdout
    (run / "partition.json").write_text("{")
    damaged = run_here("evaluate.py", "--model", run, "--set", f"data.val_root={copy}")
    assert damaged.returncode == 0 and said not in damaged.stdout, damaged.stderr


def test_the_images_that_a_run_saw_without_masks(tmp_path, run_here):
    for seed, part in enumerate(("train", "val")):
        make_folder(tmp_path / part, [0, 1, 2], np.random.default_rng(seed))
    recipe = folder_recipe(tmp_path, partition={"labeled": 2, "seed": 3}, eval={"every": 15})
    run_recipe(load(recipe), Accelerator())
    run = tmp_path / "runs" / "tiny"
    flags = ("evaluate.py", "--model", run / "model", "--split", "unlabeled")
    scored = run_here(*flags, "--save-predictions", tmp_path / "out", "--json", tmp_path / "e.json")
    assert scored.returncode == 0, scored.stderr
    assert "2 unlabelled training images" in scored.stdout
    of_val = run_here("evaluate.py", "--model", run / "model", "--save-predictions", tmp_path / "out")
    assert of_val.returncode == 2 and "holds predictions of other images: unlabeled" in of_val.stderr
    labeled = json.loads((run / "partition.json").read_text())["labeled"]
    sizes = {f"{index}.png": size for index, size in enumerate(SIZES) if str(index) not in labeled}
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == set(sizes) and len(sizes) == 2
    expected = expected_ious(tmp_path / "train" / "masks", tmp_path / "out", sizes, CLASSES)
    rows = {row["class"]: row["IoU %"] for row in json.loads((tmp_path / "e.json").read_text())}
    assert rows["mean"] == pytest.approx(np.nanmean(list(expected.values())))
    kept = json.loads((run / "unlabeled.json").read_text())
    assert kept == {"miou": pytest.approx(rows["mean"]), "num_images": 2, "sum": kept["sum"]}
    mask = tmp_path / "train" / "masks" / min(sizes)
    painted = mask.read_bytes()
    PIL.Image.new("L", PIL.Image.open(mask).size, 1).save(mask)
    forget_data()
    assert run_here(*flags).returncode == 0
    assert json.loads((run / "unlabeled.json").read_text())["sum"] != kept["sum"], "scored on another mask"
    mask.write_bytes(painted)
    forget_data()
    (run / "unlabeled.json").unlink()
    for override in ("eval.flip=true", "data.image_scale=0.5"):
        otherwise = run_here(*flags, "--set", override)
        assert otherwise.returncode == 0 and f"not kept: {override.split('=')[0]}" in otherwise.stdout
        noted = "learned from images at 1 of their size and sees these at 0.5" in otherwise.stdout
        assert noted == ("image_scale" in override)
        assert ("images, whole, flip, image_scale 1.0" in otherwise.stdout) == ("flip" in override)
    odd = run_here(*flags, "--set", "optim.lr=3")
    assert odd.returncode == 2 and "--set optim.lr=3: of a trained model only data.*, eval.*, " in odd.stderr
    best = run_here("evaluate.py", "--model", run / "best", "--split", "unlabeled")
    assert best.returncode == 0 and "not kept: not the last weights of the run" in best.stdout
    assert not (run / "unlabeled.json").exists()
    elsewhere = run_here(
        *flags, "--set", f"data.root={tmp_path / 'val'}", "--set", f"data.val_root={tmp_path / 'train'}"
    )
    assert elsewhere.returncode == 2 and "which masks it had is known of its own data only" in elsewhere.stderr
    (run / "metrics.json").rename(run / "aside.json")
    unfinished = run_here(*flags)
    assert unfinished.returncode == 2 and "a run that is not finished" in unfinished.stderr
    (run / "aside.json").rename(run / "metrics.json")

    for index in range(len(SIZES)):
        if str(index) not in labeled:
            (tmp_path / "train" / "masks" / f"{index}.png").unlink()
    forget_data()  # another process would look at the folder anew
    nothing = run_here(*flags)
    assert nothing.returncode == 2 and "has a mask in [data] that neither it nor a teacher" in nothing.stderr
    shutil.copytree(run / "model", tmp_path / "shipped")
    shipped = run_here("evaluate.py", "--model", tmp_path / "shipped", "--split", "unlabeled")
    assert shipped.returncode == 2 and "has no partition.json beside it" in shipped.stderr


def test_masks_that_a_teacher_given_by_its_weights_learned_from_are_left_out(tmp_path, run_here):
    for seed, part in enumerate(("train", "val")):
        make_folder(tmp_path / part, [0, 1, 2], np.random.default_rng(seed))
    run = {"output": str(tmp_path / "runs"), "name": "teacher", "threads": 1}
    run_recipe(load(folder_recipe(tmp_path, partition={"labeled": 3, "seed": 0}, run=run)), Accelerator())
    method = {"name": "kd", "distill_from": ["deep"]}
    teachers = {"deep": {"checkpoint": str(tmp_path / "runs" / "teacher")}}
    student = folder_recipe(tmp_path, partition={"labeled": 1, "seed": 0}, method=method, teachers=teachers)
    trained = run_here("distill.py", "--recipe", student)
    assert trained.returncode == 0, trained.stderr
    assert "note: [teachers.deep] learned from the labels of 3 of the validation images" in trained.stdout
    scored = run_here("evaluate.py", "--model", tmp_path / "runs" / "tiny", "--split", "unlabeled")
    assert scored.returncode == 0, scored.stderr
    assert "note: 2 images are left out, as [teachers.deep] learned from their masks" in scored.stdout
    assert "1 unlabelled training images" in scored.stdout
