"""Images and masks as they come from cameras, annotators and broken disks."""

import json
import os
import shutil

import numpy as np
import PIL.Image
import pytest
import tomli_w
from accelerate import Accelerator
from conftest import TINY, forget_data

from mgd.checks import check_recipe
from mgd.data.images import Images
from mgd.errors import UserError
from mgd.experiment import run_recipe
from mgd.export.samples import of_recipe
from mgd.finished import finished
from mgd.models.segmenter import build_segmenter
from mgd.pictures import to_rgb
from mgd.recipe import load

CLASSES = ["left", "right"]


def picture(width=40, height=36, mode="RGB"):
    values = np.random.default_rng(0).integers(0, 255, (height, width, 3)).astype(np.uint8)
    values[:, : width // 2] //= 3
    return PIL.Image.fromarray(values).convert(mode)


def mask(width=40, height=36):
    values = np.ones((height, width), np.uint8)
    values[:, : width // 2] = 0
    return PIL.Image.fromarray(values)


@pytest.fixture
def folder(tmp_path):
    """Ten good images with masks, three without, two to evaluate on."""
    root = tmp_path / "mine"
    for place, count in (("images", 8), ("unlabeled", 3), ("val/images", 2)):
        (root / place).mkdir(parents=True)
        image = picture().transpose(PIL.Image.Transpose.FLIP_TOP_BOTTOM) if place == "val/images" else picture()
        for index in range(count):
            image.save(root / place / f"{index}.png")
    for place, count in (("masks", 8), ("val/masks", 2)):
        (root / place).mkdir(parents=True)
        for index in range(count):
            mask().save(root / place / f"{index}.png")
    return root


@pytest.fixture
def recipe_of(folder, tmp_path):
    def make(**changes):
        data = {"name": "folder", "root": str(folder), "val_root": str(folder / "val"), "classes": CLASSES}
        data |= {"crop": 32, "scales": [1.0], "workers": 0} | changes
        path = tmp_path / "mine.toml"
        run = TINY["run"] | {"output": str(tmp_path / "runs")}
        table = TINY | {"run": run, "data": data, "partition": {"labeled": 8}, "method": {"name": "cps"}}
        path.write_text(tomli_w.dumps(table))
        return load(path)

    return make


def test_a_labelled_image_is_not_evaluated_on(folder, recipe_of):
    shutil.copy(folder / "images" / "1.png", folder / "val" / "images" / "1.png")
    shutil.copy(folder / "images" / "0.png", folder / "val" / "images" / "0.png")
    for place in ("images", "val/images"):  # what is left out is not looked at
        (folder / place / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 validation images are labelled training images, .*\(1\); the score"):
        check_recipe(recipe_of(on_error="skip"), Accelerator())


def cut_short(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def truncated_jpeg(root):
    picture(200, 100).save(root / "unlabeled" / "bad.jpg")
    cut_short(root / "unlabeled" / "bad.jpg", 0.5)
    return "unlabeled/bad", "truncated"


def zero_bytes(root):
    (root / "images" / "3.png").write_bytes(b"")
    return "image 3", "cannot be read"


def no_image_at_all(root):
    (root / "unlabeled" / "page.png").write_text("<html>404</html>")
    return "unlabeled/page", "cannot identify image"


def mask_of_another_size(root):
    mask(10, 10).save(root / "masks" / "4.png")
    return "mask of 4", "10x10"


def mask_value_out_of_range(root):
    PIL.Image.new("L", (40, 36), 7).save(root / "val" / "masks" / "1.png")
    return "mask of 1", "value 7 is no class"


def truncated_mask(root):
    cut_short(root / "masks" / "5.png", 0.6)
    return "5", ""


BAD = [truncated_jpeg, zero_bytes, no_image_at_all, mask_of_another_size, mask_value_out_of_range, truncated_mask]


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_bad_files_are_refused_before_training_or_skipped_and_listed(folder, recipe_of, spoil, tmp_path, capsys):
    name, reason = spoil(folder)
    with pytest.raises(UserError) as refused:
        run_recipe(recipe_of(), Accelerator())
    assert name in str(refused.value) and reason in str(refused.value) and "1 image(s)" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1 and not (tmp_path / "runs").exists()

    splits, partition = check_recipe(recipe_of(on_error="skip"), Accelerator())
    assert "note: 1 image(s) skipped by [data] on_error: " in capsys.readouterr().out
    manifest = partition.manifest(recipe_of().partition, 0)
    ((skipped, why),) = manifest["skipped"].items()
    in_val = spoil is mask_value_out_of_range
    assert name.endswith(skipped.removeprefix("validation: ")) and reason in why
    assert skipped not in manifest["labeled"] + manifest["unlabeled"]
    added = spoil in (truncated_jpeg, no_image_at_all)
    assert manifest["num_labeled"] == 8 - (not in_val and not added) and manifest["num_unlabeled"] == 3
    assert len(splits.val) == 2 - in_val
    if in_val:
        metrics = run_recipe(recipe_of(on_error="skip"), Accelerator())
        assert np.isfinite(metrics["miou"]) and metrics["num_val"] == 1 and metrics["skipped_images"] == 1
        assert json.loads((tmp_path / "runs" / "tiny" / "partition.json").read_text()) == manifest | {"teachers": {}}
        assert finished(recipe_of(on_error="skip"))
        for place in ("images", "masks"):  # what was left out may go
            (folder / "val" / place / f"{skipped.removeprefix('validation: ')}.png").unlink()
        forget_data()
        assert finished(recipe_of(on_error="skip"))


def test_all_bad_files_are_counted_at_once(folder, recipe_of):
    for spoil in BAD:
        spoil(folder)
    with pytest.raises(UserError, match=r"6 image\(s\) cannot be used: .*; and 1 more; mend them \(stages/prepare.py"):
        check_recipe(recipe_of(), Accelerator())


def test_unusual_files_are_read_as_a_user_expects(folder, recipe_of):
    images = folder / "images"
    picture(mode="LA").save(images / "0.png")
    PIL.Image.fromarray(np.linspace(0, 65535, 40 * 36).reshape(36, 40).astype(np.uint16)).save(images / "1.png")
    turned = picture(36, 40)
    exif = turned.getexif()
    exif[0x0112] = 6  # shown turned by 90 degrees: 40 wide, 36 high, as its mask
    turned.save(images / "2.jpg", exif=exif)
    (images / "2.png").unlink()
    picture(1, 1).save(images / "3.png")
    mask(1, 1).save(folder / "masks" / "3.png")
    PIL.Image.new("L", (40, 36), 255).save(folder / "masks" / "4.png")
    picture(mode="CMYK").save(images / "5.jpg")
    (images / "5.png").unlink()
    long = "ü" * 60 + "漢字 (1) [a] {b}"
    for place in ("images", "masks"):
        (folder / place / "6.png").rename(folder / place / f"{long}.png")
    recipe = recipe_of()
    splits, partition = check_recipe(recipe, Accelerator())
    assert len(partition.labeled) == 8 and not partition.skipped
    reads = Images(splits.labeled, splits.decoder)
    by_name = {name: reads.read(index, True) for index, name in enumerate(reads.ids)}
    assert by_name["2"][0].size == (40, 36) and by_name["3"][0].size == (1, 1)
    grey = np.asarray(by_name["1"][0])[..., 0]
    assert grey.min() == 0 and grey.max() == 255 and abs(float(grey.mean()) - 127.5) < 1
    assert (by_name["4"][1] == 255).all() and len(by_name) == 8
    metrics = run_recipe(recipe, Accelerator())
    assert np.isfinite(metrics["miou"])
    rows = (recipe.run_dir / "metrics.jsonl").read_text()
    assert "null" not in rows


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_huge_image_is_cropped_like_any_other(folder, recipe_of):
    PIL.Image.new("RGB", (12000, 9000), (10, 200, 30)).save(folder / "unlabeled" / "huge.png", compress_level=1)
    recipe = recipe_of()
    _, partition = check_recipe(recipe, Accelerator())
    assert "unlabeled/huge" in partition.unlabeled


def test_an_empty_unlabeled_folder_is_said(folder, recipe_of, capsys):
    shutil.rmtree(folder / "unlabeled")
    (folder / "unlabeled").mkdir()
    run_recipe(recipe_of(), Accelerator())
    assert "note: no unlabelled image; the labelled ones serve as the pool" in capsys.readouterr().out


def test_links_that_lead_back_and_things_that_are_no_files(folder, recipe_of):
    (folder / "unlabeled" / "loop").symlink_to(folder / "unlabeled")
    os.mkfifo(folder / "unlabeled" / "pipe.png")
    _, partition = check_recipe(recipe_of(), Accelerator())
    assert len(partition.unlabeled) == 3


def test_tiffs_of_32_bits(folder):
    values = np.arange(200, dtype=np.int32).reshape(10, 20)
    assert np.asarray(to_rgb(PIL.Image.fromarray(values)))[..., 0].tolist() == values.tolist()
    wide = np.asarray(to_rgb(PIL.Image.fromarray(values * 300)))
    assert wide.max() == 199 * 300 * 255 // 65535
    with pytest.raises(ValueError, match="no number"):
        to_rgb(PIL.Image.fromarray(np.full((2, 2), np.nan, np.float32)))


def test_nothing_but_ignore_and_duplicate_stems_are_refused(folder, recipe_of):
    shutil.copy(folder / "images" / "0.png", folder / "images" / "0.jpg")
    with pytest.raises(UserError, match="0.jpg and 0.png share a stem"):
        check_recipe(recipe_of(), Accelerator())
    (folder / "images" / "0.jpg").unlink()
    for index in range(8):
        PIL.Image.new("L", (40, 36), 255).save(folder / "masks" / f"{index}.png")
    with pytest.raises(UserError, match="labelled masks hold nothing but 255"):
        check_recipe(recipe_of(), Accelerator())


def test_a_folder_that_may_not_be_read_is_refused(folder, recipe_of, monkeypatch):
    (folder / "images" / "more").mkdir()
    listing = os.scandir

    def denied(path):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", denied)  # chmod does not stop root
    with pytest.raises(UserError, match="images/more cannot be read: Permission denied"):
        check_recipe(recipe_of(), Accelerator())


def test_a_file_is_tried_on_what_can_be_read(recipe_of, folder, tmp_path):
    recipe = recipe_of(on_error="skip")
    colors = [(0, 0, 0), (9, 9, 9)]
    network = build_segmenter(recipe.student, CLASSES, colors, seed=0)
    assert [len(part) for part in of_recipe(recipe, network, tmp_path, 20, True)] == [2, 3, 0]
    for place in ("val/images/1.png", "unlabeled/2.png"):
        cut_short(folder / place, 0.5)
    tried, calibrated, problems = of_recipe(recipe, network, tmp_path, 20, True)
    assert [len(tried), len(calibrated), len(problems)] == [1, 2, 2]
    assert problems[0].startswith("image 1 cannot be read") and problems[1].startswith("image unlabeled/2 cannot be")
    with pytest.raises(UserError, match="image 1 cannot be read"):
        of_recipe(recipe_of(on_error="raise"), network, tmp_path, 20, True)
    assert of_recipe(recipe, network, tmp_path, 20, False)[1:] == (None, problems[:1]), "a pool that nobody asked for"
    cut_short(folder / "val/images/0.png", 0.5)
    with pytest.raises(UserError, match="none of 2 validation images can be read"):
        of_recipe(recipe, network, tmp_path, 20, True)
