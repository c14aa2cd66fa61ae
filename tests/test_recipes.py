"""The generated recipes: up to date, whole, buildable; one of each family trains."""

import functools
import importlib.util
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
from accelerate import Accelerator
from conftest import ROOT

from mgd.experiment import run_recipe
from mgd.models.segmenter import build_segmenter, check_trainable
from mgd.recipe import load

RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


def test_generated_recipes_are_up_to_date():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "recipes" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    files = generate.all_files()
    for name, text in files.items():
        assert (ROOT / "recipes" / name).read_text() == text, f"{name}: run python recipes/generate.py"
    by_hand = {path.name for path in RECIPES} - files.keys()
    tails = ("", "_deep", "_wide", "_supervised")
    assert by_hand == {f"{name}{tail}.toml" for name in ("quickstart", "folder") for tail in tails}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_named_recipes_exist_and_see_the_same_labels(path):
    recipe = load(path)
    for other in [*(t.recipe for t in recipe.teachers.values() if t.recipe), *recipe.eval.baselines]:
        named = load(ROOT / other)
        assert (named.partition, named.data) == (recipe.partition, recipe.data)


@functools.cache
def _builds(section, num_classes, crop):
    check_trainable(section.model_copy(update={"pretrained": False}), num_classes, 2, crop, several_processes=True)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_networks_build_and_their_weights_exist(path):
    recipe = load(path)
    _builds(recipe.student, len(recipe.data.class_names()), recipe.data.crop)
    assert not recipe.student.pretrained or timm.models.is_model_pretrained(recipe.student.backbone)


@pytest.fixture
def trees(tmp_path, monkeypatch):
    """VOC and Cityscapes of a few images each, where the recipes look for them, with lists to match."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)

    def save(path, array):
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(array).save(path)

    voc, city = tmp_path / "data" / "VOCdevkit" / "VOC2012", tmp_path / "data" / "cityscapes"
    for index in range(6):
        split = "val" if index == 5 else "train"
        image, label = rng.integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
        save(voc / "JPEGImages" / f"v{index}.jpg", image)
        save(voc / "SegmentationClassAug" / f"v{index}.png", label[..., 0] % 21)
        save(city / "leftImg8bit" / split / "ulm" / f"c{index}_leftImg8bit.png", image)
        save(city / "gtFine" / split / "ulm" / f"c{index}_gtFine_labelIds.png", label[..., 0] % 34)
    sets = voc / "ImageSets" / "Segmentation"
    sets.mkdir(parents=True)
    (sets / "val.txt").write_text("v5\n")
    for letter in "vc":
        (tmp_path / f"{letter}_labeled.txt").write_text(f"{letter}0\n{letter}1\n")
        (tmp_path / f"{letter}_unlabeled.txt").write_text("".join(f"{letter}{index}\n" for index in (2, 3, 4)))


@pytest.mark.parametrize(
    ("data", "method"),
    [
        *(("voc", method) for method in ("", "_supervised", "_mean_teacher", "_cps", "_kd", "_cwd")),
        *(("city", method) for method in ("", "_cps")),
    ],
)
def test_a_recipe_of_each_family_takes_two_steps(trees, data, method):
    changes = [
        "partition.protocol=files",
        f"partition.labeled_list={data[0]}_labeled.txt",
        f"partition.unlabeled_list={data[0]}_unlabeled.txt",
        *("student.pretrained=false", "student.head.channels=16", "data.crop=32", "data.workers=0"),
        *("optim.batch_size=2", "optim.steps=2", "eval.crop=32"),
    ]
    text = (ROOT / "recipes" / f"{data}_mbv2_1-8{method}.toml").read_text()
    Path("recipe.toml").write_text(text.replace("epochs = ", "# epochs = ").replace('labeled = "1/8"', ""))
    recipe = load("recipe.toml", changes)
    classes = recipe.data.class_names()
    teachers = {
        name: build_segmenter(recipe.student, classes, [(0, 0, 0)] * len(classes), seed)
        for seed, name in enumerate(recipe.teachers)
    }
    metrics = run_recipe(recipe, Accelerator(), teachers)
    assert (metrics["steps"], metrics["num_labeled"], metrics["num_unlabeled"], metrics["num_val"]) == (2, 2, 3, 1)
