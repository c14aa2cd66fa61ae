"""The generated recipes: up to date, whole, buildable; one of each family trains."""

import importlib.util
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
from accelerate import Accelerator
from conftest import ROOT

from mgd.complexity import model_costs
from mgd.experiment import run_recipe
from mgd.models.segmenter import build_segmenter
from mgd.models.trial import check_trainable
from mgd.needed import check_folders, needed_recipes
from mgd.recipe import load
from mgd.runs import recipe_differences

PAPER = ROOT.parent / "shared" / "reference" / "paper_tables.toml"
RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))


def _name(path: Path) -> str:
    return path.relative_to(ROOT / "recipes").as_posix()


def test_generated_recipes_are_up_to_date():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "recipes" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    files = generate.all_files()
    for name, text in files.items():
        assert (ROOT / "recipes" / name).read_text() == text, f"{name}: run python recipes/generate.py"
    by_hand = {_name(path) for path in RECIPES} - files.keys()
    assert by_hand == {f"quickstart{tail}.toml" for tail in ("", "_deep", "_wide", "_supervised", "_online")}


@pytest.mark.parametrize("path", RECIPES, ids=_name)
def test_named_recipes_exist_and_see_the_same_labels(path):
    recipe = load(path)
    for other in [*(t.recipe for t in recipe.teachers.values() if t.recipe), *recipe.eval.baselines]:
        named = load(ROOT / other)
        assert (named.partition, named.data) == (recipe.partition, recipe.data)


@pytest.mark.parametrize(("family", "size"), [("folder", "full"), ("folder_cpu", "half")])
def test_the_recipes_for_images_of_your_own_have_the_measured_settings(family, size):
    measured = {
        "": "lite0_1-16_long_cwd",
        "_deep": "lite2_1-16_long",
        "_wide": "lite1_1-16_long",
        "_supervised": "lite0_1-16_supervised",
    }
    for tail, name in measured.items():
        ours = load(ROOT / "recipes" / f"{family}{tail}.toml")
        theirs = load(ROOT / "recipes" / "camvid" / f"{size}_{name}.toml", ["optim.steps=1200"])
        assert (ours.student, ours.method, ours.optim) == (theirs.student, theirs.method, theirs.optim), tail
        assert (ours.data.crop, ours.data.scales) == (theirs.data.crop, theirs.data.scales), tail


def test_no_two_runs_share_a_folder_whatever_the_seed():
    writers = {}
    for path in [path for path in RECIPES if re.match("half_lite0_1-16|voc_r18_1-8", path.stem)]:
        for seed in (0, 1):
            recipe = load(path, [f"run.seed={seed}"])
            for title, other in {"run": recipe, **needed_recipes(recipe)}.items():
                writers[f"{title} of {path.stem}, seed {seed}"] = other
    assert len({recipe.run_dir for recipe in writers.values()}) > 60
    check_folders(writers)


# What method.md says, in this order: lr of r101, wrn50, r18, mbv2; epochs; batch of teachers and students.
PROTOCOL = {
    "voc": ((0.01, 0.004, 0.01, 0.014), (32, 34, 40, 60), (8, 8), 512, 1.0),
    "city": ((0.02, 0.02, 0.02, 0.02), (128, 137, 160, 240), (8, 16), 800, 5.0),
}


@pytest.mark.parametrize("data", PROTOCOL)
def test_the_protocol_of_the_paper(data):
    rates, epochs, batches, crop, cps_weight = PROTOCOL[data]
    networks = {"r101": "resnet101s", "wrn50": "wide_resnet50_2", "r18": "resnet18d", "mbv2": "mobilenetv2_100"}
    for (network, backbone), rate in zip(networks.items(), rates, strict=True):
        for share, length in zip(("1-16", "1-8", "1-4", "1-2"), epochs, strict=True):
            is_student = network in ("r18", "mbv2")
            tails = ("", "_supervised", "_mean_teacher", "_cps", "_kd", "_cwd") if is_student else ("",)
            for tail in tails:
                recipe = load(ROOT / "recipes" / f"{data}_{network}_{share}{tail}.toml")
                optim, head = recipe.optim, recipe.student.head
                assert (optim.lr, optim.epochs, optim.batch_size) == (rate, length, batches[is_student])
                assert (optim.name, optim.momentum, optim.weight_decay, optim.power) == ("sgd", 0.9, 5e-4, 0.9)
                assert recipe.student.backbone == backbone and recipe.student.pretrained
                assert (head.channels, head.aspp_rates) == (256, (6, 12, 18)) and recipe.data.crop == crop
                assert head.low_level_channels == (24 if network == "mbv2" else 48)
                assert recipe.student.output_stride == (32 if network == "mbv2" else 16)
                assert recipe.eval.mode == "slide" and recipe.eval.stride == pytest.approx(2 / 3)
                method = recipe.method
                assert method.name == (tail[1:] or ("mgd" if is_student else "cps"))
                if method.name == "cps":
                    assert method.weight == cps_weight
                if method.name == "mgd":
                    assert (method.image.weight, method.image.reduction) == (0.002, "sum")
                    assert (method.region.weight, method.region.grid, method.pixel.weight) == (100.0, 7, 1.0)
                if method.name == "cwd":
                    assert (method.temperature, method.weight) == (4.0, 3.0)


@pytest.mark.parametrize(
    ("family", "networks"), [("voc_r18_1-8", ["r101", "wrn50"]), ("camvid/half_lite0_1-16_long", ["lite2", "lite1"])]
)
def test_the_ablations_of_the_paper(family, networks):
    names = dict(zip(networks, ("r101", "wrn50"), strict=True))

    def terms(name):
        recipe = load(ROOT / "recipes" / f"{family}{name}.toml")
        method = recipe.method
        stems = {key: names[Path(t.recipe).stem.split("_")[1]] for key, t in recipe.teachers.items()}
        nets = {key: stem + ("'" if recipe.teachers[key].seed_offset else "") for key, stem in stems.items()}
        used = [[nets[key] for key in term.teachers] for term in (method.pixel, method.image, method.region)]
        return [*used, method.pixel.on, method.region.grid]

    both, everywhere = ["r101", "wrn50"], ("labeled", "unlabeled")
    assert terms("") == [both, ["r101"], ["wrn50"], everywhere, 7]
    assert terms("_teachers_deep") == [["r101"], ["r101"], ["r101"], everywhere, 7]
    assert terms("_teachers_wide") == [["wrn50"], ["wrn50"], ["wrn50"], everywhere, 7]
    assert terms("_teachers_deep_deep") == [["r101", "r101'"], ["r101"], ["r101'"], everywhere, 7]
    assert terms("_teachers_wide_wide") == [["wrn50", "wrn50'"], ["wrn50"], ["wrn50'"], everywhere, 7]
    assert terms("_losses_p") == [both, [], [], everywhere, 7]
    assert terms("_losses_p_i") == [both, ["r101"], [], everywhere, 7]
    assert terms("_losses_p_r") == [both, [], ["wrn50"], everywhere, 7]
    assert terms("_losses_p_i_r_of_both") == [both, both, both, everywhere, 7]
    assert terms("_losses_labeled") == [both, [], [], ("labeled",), 7]
    assert [terms(f"_grid_{grid}")[-1] for grid in (3, 5, 9, 11)] == [3, 5, 9, 11]


@pytest.mark.skipif(not PAPER.exists(), reason="the paper's tables are not beside the project")
def test_the_targets_of_the_paper():
    paper = tomllib.loads(PAPER.read_text())
    rows = {"T_D resnet101 CPS": "r101", "T_W wide_resnet CPS": "wrn50", "resnet18": "r18", "mobilenetv2": "mbv2"}
    tails = {"Sup": "_supervised", "MT": "_mean_teacher", "CPS": "_cps", "KD": "_kd", "CWD": "_cwd", "MGD": ""}
    tables = {"voc": "voc_cps_partitions", "voc_pseudoseg": "voc_pseudoseg_partitions"}
    tables["city"] = "cityscapes_cps_partitions"
    checked = 0
    for data, table in tables.items():
        for row, values in paper[table].items():
            network = rows.get(row) or rows[row.split()[0]]
            tail = "" if row.startswith("T_") else tails[row.split()[1]]
            for share, value in zip(("1-16", "1-8", "1-4", "1-2"), values, strict=True):
                recipe = load(ROOT / "recipes" / f"{data}_{network}_{share}{tail}.toml")
                assert recipe.reference.miou == value, recipe.source
                checked += 1
    names = {"T_D": "teachers_deep", "T_W": "teachers_wide", "T_D+T_D": "teachers_deep_deep"}
    names |= {"T_W+T_W": "teachers_wide_wide", "Sup+P": "losses_p", "Sup+P+I(T_D)": "losses_p_i"}
    names |= {"Sup+P+R(T_W)": "losses_p_r", "Sup+P+I(both)+R(both)": "losses_p_i_r_of_both"}
    names |= {"labelled losses only": "losses_labeled"}
    for row, values in (paper["ablation_teachers"] | paper["ablation_losses"]).items():
        for data, value in zip(("voc", "city"), values, strict=True):
            if row in names:
                assert load(ROOT / "recipes" / f"{data}_r18_1-8_{names[row]}.toml").reference.miou == value
                checked += 1
    for grid, value in paper["ablation_grid_voc"].items():
        if grid != "7":
            assert load(ROOT / "recipes" / f"voc_r18_1-8_grid_{grid}.toml").reference.miou == value
            checked += 1
    assert checked == 4 * (14 + 6 + 14) + 2 * 9 + 4


@pytest.mark.xdist_group("builds")  # one process, so that equal networks are built once
@pytest.mark.parametrize("path", RECIPES, ids=_name)
def test_networks_build_and_their_weights_exist(path):
    recipe = load(path)
    for section in recipe.networks.values():
        bare, classes = section.model_copy(update={"pretrained": False}), recipe.data.class_names()
        check_trainable("student", bare, len(classes), 2, recipe.data.crop, several_processes=True)
        assert not section.pretrained or timm.models.is_model_pretrained(section.backbone)


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


LIGHT = [f"voc_mbv2_1-8{method}" for method in ("", "_supervised", "_mean_teacher", "_cps", "_kd", "_cwd")]
LIGHT += ["city_mbv2_1-8", "voc_r18_1-8_losses_labeled"]
HEAVY = ["city_mbv2_1-8_cps", "city_r18_1-8", "voc_pseudoseg_r18_1-8", "voc_r101_1-8", "voc_r18_1-8_grid_3"]
HEAVY += ["voc_r18_1-8_teachers_deep_deep"]
FAMILIES = [*LIGHT, *(pytest.param(name, marks=pytest.mark.slow) for name in HEAVY)]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_recipe_of_each_family_takes_two_steps(trees, name):
    data = name.split("_")[0]
    changes = [
        "partition.protocol=files",
        f"partition.labeled_list={data[0]}_labeled.txt",
        f"partition.unlabeled_list={data[0]}_unlabeled.txt",
        *("student.pretrained=false", "student.head.channels=16", "data.crop=32", "data.workers=0"),
        *("optim.batch_size=2", "optim.steps=2", "eval.crop=32", "run.log_every=1"),
        *(["data.masks=SegmentationClassAug"] if data == "voc" else []),
    ]
    text = (ROOT / "recipes" / f"{name}.toml").read_text()
    Path("recipe.toml").write_text(
        text.replace("epochs = ", "# epochs = ").replace("steps = 40000", "").replace('labeled = "1/8"', "")
    )
    recipe = load("recipe.toml", changes)
    classes = recipe.data.class_names()
    teachers = {
        name: build_segmenter(recipe.student, classes, [(0, 0, 0)] * len(classes), seed)
        for seed, name in enumerate(recipe.teachers)
    }
    metrics = run_recipe(recipe, Accelerator(), teachers)
    assert (metrics["steps"], metrics["num_labeled"], metrics["num_unlabeled"], metrics["num_val"]) == (2, 2, 3, 1)


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem.endswith("_compact")], ids=lambda p: p.name)
def test_compact_students_are_light(path):
    section, dense = load(path).student, load(ROOT / "recipes" / "voc_mbv2_1-8.toml").student
    cost = model_costs(section, 21, 512)["total"].gmacs
    assert cost <= 3 and cost * 7 <= model_costs(dense, 21, 512)["total"].gmacs
    assert f"For devices: {cost:.1f} GMACs at 512x512" in path.read_text()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_trial_of_the_readme_is_the_same_four_runs_in_a_few_steps(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    script = text[text.index("mkdir trial\n") : text.index("python stages/distill.py --recipe trial/")]
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    subprocess.run(["bash", "-c", script], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    whole, trial = (load(f"{folder}/folder_cpu.toml") for folder in ("recipes", "trial"))
    runs = zip((whole, *needed_recipes(whole).values()), (trial, *needed_recipes(trial).values()), strict=True)
    for mine, short in runs:
        assert short.run.name == mine.run.name.replace("folder_cpu", "trial")
        differing = {line.split()[0] for line in recipe_differences(mine.to_dict(), short)}
        assert differing - {"teachers.deep.recipe", "teachers.wide.recipe"} == {"run.name", "optim.steps"}
        assert short.optim.steps == 20
