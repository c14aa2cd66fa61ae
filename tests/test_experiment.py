"""What run_recipe promises, in this process."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import tomli_w
import torch
import torch._dynamo
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ONLINE, ROOT, forget_data, log_rows

from mgd.checks import check_recipe
from mgd.errors import Stopped, UserError
from mgd.experiment import run_recipe
from mgd.finished import finished
from mgd.methods.base import Method
from mgd.methods.mean_teacher import MeanTeacher, MeanTeacherConfig
from mgd.methods.supervised import Supervised
from mgd.models.segmenter import build_segmenter, load_segmenter
from mgd.needed import needed_recipes, note_other_data, refuse_students
from mgd.recipe import load
from mgd.runs import is_here, open_folder, recipe_differences
from mgd.sections import Optim
from mgd.train import _on_device

BACKBONES = ["resnet18d", "mobilenetv3_small_100", "mobilenetv4_conv_small", "convnext_atto", "efficientvit_b0"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_swapping_the_backbone_trains_or_says_what_is_missing(write_recipe, backbone):
    recipe = load(write_recipe(), [f"student.backbone={backbone}", "optim.steps=2"])
    if backbone == "efficientvit_b0":
        with pytest.raises(UserError, match=r"tiny\.toml: .*output_stride = 16 .*use output_stride = 32"):
            run_recipe(recipe, Accelerator())
        recipe = load(recipe.source, [f"student.backbone={backbone}", "optim.steps=2", "student.output_stride=32"])
    metrics = run_recipe(recipe, Accelerator())
    assert metrics["steps"] == 2 and metrics["backbone"] == backbone
    assert (recipe.run_dir / "model" / "model.safetensors").exists()


def test_a_network_of_a_teachers_recipe_is_named_with_it(write_recipe, run_here):
    wrong = write_recipe("deep.toml", run={"name": "deep"}, student={"backbone": "efficientvit_b0"})
    term = {"name": "kd", "distill_from": ["deep"]}
    path = write_recipe(method=term, teachers={"deep": {"recipe": str(wrong)}})
    ended = run_here("distill.py", "--recipe", path)
    assert ended.returncode == 2 and f"error: {wrong}: [student] backbone = 'efficientvit_b0'" in ended.stderr


def test_all_labelled_distils_on_the_labelled_images(write_recipe):
    metrics = run_recipe(load(write_recipe(method={"name": "cps"}), ["partition.labeled=1.0"]), Accelerator())
    assert (metrics["num_labeled"], metrics["num_unlabeled"]) == (12, 0)


@pytest.mark.parametrize("coarse", ["student", "teachers.one"])
def test_regions_finer_than_features_are_refused_before_a_teacher_is_trained(write_recipe, run_here, tmp_path, coarse):
    teacher = write_recipe("teacher.toml", run={"name": "teacher"})
    student = write_recipe(
        method={"name": "mgd", "region": {"teachers": ["one"], "grid": 3}}, teachers={"one": {"recipe": str(teacher)}}
    )
    path = student if coarse == "student" else teacher
    table = tomllib.loads(path.read_text())
    table["student"]["head"] = {"name": "lraspp"}  # its features are of stride 16: 2 x 2 of a crop of 32
    path.write_text(tomli_w.dumps(table))
    refused = run_here("distill.py", "--recipe", student)
    assert refused.returncode == 2 and f"finer than the 2 x 2 cells of the features of [{coarse}]" in refused.stderr
    assert not (tmp_path / "runs").exists()
    assert run_here("distill.py", "--recipe", student, "--set", "method.region.grid=2").returncode == 0


def test_a_teacher_that_cannot_take_the_students_crops_is_found_before_it_is_trained(write_recipe, run_here, tmp_path):
    swin = {"backbone": "swin_tiny_patch4_window7_224", "output_stride": 32}
    teacher = write_recipe("teacher.toml", run={"name": "teacher"}, student=swin, data={"crop": 224})
    student = write_recipe(method={"name": "kd", "distill_from": ["one"]}, teachers={"one": {"recipe": str(teacher)}})
    refused = run_here("distill.py", "--recipe", student)
    assert refused.returncode == 2 and "[teachers.one] backbone = 'swin_tiny_" in refused.stderr
    assert "cannot predict crops of 32x32" in refused.stderr and not (tmp_path / "runs").exists()


def test_regions_finer_than_features_of_teachers_that_train_along(write_recipe, run_here, tmp_path):
    path = write_recipe(method=ONLINE)
    refused = run_here("teacher_cps.py", "--recipe", path, "--set", "method.region.grid=3")
    assert refused.returncode == 2 and "the features of [method.teachers.wide]" in refused.stderr
    assert not (tmp_path / "runs").exists()


def test_one_image_a_forward_pass_is_refused(write_recipe):
    with pytest.raises(UserError, match="leaves one image a process and forward pass, on which BatchNorm cannot train"):
        run_recipe(load(write_recipe(), ["optim.batch_size=1"]), Accelerator())
    run_recipe(load(write_recipe(), ["optim.batch_size=1", "method.name=cps", "run.name=cps1"]), Accelerator())


def test_restart_deletes_runs_only(write_recipe, tmp_path):
    keep = tmp_path / "runs" / "tiny" / "thesis.tex"
    keep.parent.mkdir(parents=True)
    keep.write_text("years of work")
    with pytest.raises(UserError, match="is not empty and not a run; --restart deletes runs only"):
        run_recipe(load(write_recipe()), Accelerator(), restart=True)
    assert keep.exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.backbone=swin_tiny_patch4_window7_224", "student.output_stride=32"], "cannot (train|return)"),
        (["student.backbone=dla34"], "cannot return feature maps at output_stride = 16"),
    ],
)
def test_backbones_that_cannot_run_are_refused_before_training(write_recipe, overrides, message):
    recipe = load(write_recipe(), overrides)
    with pytest.raises(UserError, match=message):
        run_recipe(recipe, Accelerator())
    assert not recipe.run_dir.exists()


def test_a_checkpoint_of_another_recipe_is_not_resumed(write_recipe):
    recipe = load(write_recipe())
    run_recipe(recipe, Accelerator())
    for name in ("recipe.toml", "metrics.json"):
        (recipe.run_dir / name).unlink()
    with pytest.raises(UserError, match=r"checkpoint is of another recipe \(optim.lr 0.01 there, 0.02 here\)"):
        run_recipe(load(recipe.source, ["optim.lr=0.02"]), Accelerator())


def test_a_run_that_goes_on_in_another_precision_says_so(write_recipe, capsys):
    recipe = load(write_recipe())
    run_recipe(recipe, Accelerator())
    for precision, expected in {"bf16": "4, with mixed_precision = 'bf16', until now with 'no'\n", "no": "4\n"}.items():
        (recipe.run_dir / "metrics.json").unlink()
        AcceleratorState._reset_state(reset_partial_state=True)
        capsys.readouterr()
        run_recipe(recipe, Accelerator(mixed_precision=precision))
        assert f"goes on at step {expected}" in capsys.readouterr().out


def test_images_that_change_under_an_unfinished_run(write_recipe):
    recipe = load(write_recipe())
    run_recipe(recipe, Accelerator())
    (recipe.run_dir / "metrics.json").unlink()
    path = recipe.run_dir / "partition.json"
    manifest = json.loads(path.read_text())
    gone = {key: manifest[key][0] for key in ("labeled", "unlabeled")}
    path.write_text(path.read_text().replace(gone["unlabeled"], "train-999999"))
    run_recipe(recipe, Accelerator())  # a supervised run sees none of these
    assert json.loads(path.read_text()) == manifest
    (recipe.run_dir / "metrics.json").unlink()
    path.write_text(path.read_text().replace(gone["labeled"], "train-999999"))
    differing = f"4 / 5 then, 4 / 5 now; differing: {gone['labeled']}, train-999999"
    with pytest.raises(UserError, match=rf"the images of \[data\] have changed since this run began .*{differing}"):
        run_recipe(recipe, Accelerator())
    path.write_text(json.dumps(manifest | {"unlabeled": manifest["unlabeled"][1:]}))
    of_cps = load(write_recipe(method={"name": "cps"}))
    differing = f"4 / 7 / 5 then, 4 / 8 / 5 now; differing: {gone['unlabeled']}"
    with pytest.raises(UserError, match=f"have changed since this run began .*{differing}"):
        open_folder(of_cps, check_recipe(of_cps, Accelerator())[1], {}, restart=False)


def test_images_that_lengthen_an_epoch_make_another_run(write_recipe, tmp_path):
    """Also of a method that sees none of them: an epoch is a pass over the larger of both lists."""
    table = tomllib.loads(write_recipe().read_text())
    del table["optim"]["steps"]
    table["optim"]["epochs"] = 2
    (tmp_path / "epochs.toml").write_text(tomli_w.dumps(table))
    recipe = load(tmp_path / "epochs.toml")
    assert run_recipe(recipe, Accelerator())["steps"] == 4
    path = recipe.run_dir / "partition.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"unlabeled": manifest["unlabeled"][1:]}))
    with pytest.raises(UserError, match="was trained on other images"):
        finished(recipe)
    (recipe.run_dir / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"the images of \[data\] have changed since this run began"):
        run_recipe(recipe, Accelerator())


def test_images_to_evaluate_on_that_change_under_an_unfinished_run(write_recipe):
    recipe = load(write_recipe())
    run_recipe(recipe, Accelerator())
    (recipe.run_dir / "metrics.json").unlink()
    path = recipe.run_dir / "partition.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in manifest.items() if key != "val"}))
    run_recipe(recipe, Accelerator())  # of an older version, which did not note them
    (recipe.run_dir / "metrics.json").unlink()
    path.write_text(json.dumps(manifest | {"val": manifest["val"][1:]}))
    count = len(manifest["val"])
    with pytest.raises(UserError, match=rf"have changed .* / {count - 1} then, .* / {count} now; .*\); put them back"):
        run_recipe(recipe, Accelerator())


@pytest.mark.parametrize(
    ("name", "change", "same"),
    [
        ("camvid/half_lite0_1-16", "data.root=elsewhere", True),
        ("folder_cpu", "data.root=elsewhere", False),
        ("folder_cpu", "data.root=./mine", True),
        ("voc_r18_1-8", "partition.root=elsewhere", True),
        ("voc_r18_1-8", "data.masks=SegmentationClass", False),
    ],
)
def test_where_data_lies_makes_no_other_run(name, change, same):
    path = ROOT / "recipes" / f"{name}.toml"
    assert (recipe_differences(load(path).to_dict(), load(path, [change])) == []) == same


@pytest.mark.parametrize(
    "key", ["data.parquet", "data.unlabeled.parquet", "data.unlabeled.webdataset", "partition.labeled_list"]
)
def test_one_place_is_one_whether_it_is_named_from_here_or_from_the_root(key):
    path, sets = (
        ROOT / "recipes" / "voc_r18_1-8.toml",
        ["partition.protocol=files", "partition.unlabeled_list=rest.txt"],
    )
    sets += [] if key == "partition.labeled_list" else ["partition.labeled_list=some.txt"]
    here, absolute, other = (load(path, [*sets, f"{key}={place}"]) for place in ("x", os.path.abspath("x"), "y"))
    assert recipe_differences(here.to_dict(), absolute) == []
    assert [line.split()[0] for line in recipe_differences(here.to_dict(), other)] == [key]


def test_images_that_change_after_a_finished_run(write_recipe, tmp_path, monkeypatch):
    root = tmp_path / "mine"

    def paint(folder, names):
        forget_data()  # another command would begin without it
        for index, name in enumerate(names):
            for part, value in (("images", 9 * index), ("masks", index % 2)):
                (root / folder / part).mkdir(parents=True, exist_ok=True)
                mask = PIL.Image.new("L", (40, 40), value)
                mask.paste(1 - value if part == "masks" else 200, (0, 0, 20, 40))
                mask.save(root / folder / part / f"{name}.png")

    paint(".", "abcd")
    paint("val", "xy")
    table = tomllib.loads(write_recipe().read_text())
    table["data"] = {"name": "folder", "root": str(root), "classes": ["0", "1"], "val_root": f"{root}/val", "crop": 32}
    table["partition"] = {"labeled": "1/1"}
    (tmp_path / "mine.toml").write_text(tomli_w.dumps(table))
    recipe = load(tmp_path / "mine.toml")
    done = run_recipe(recipe, Accelerator())
    assert finished(recipe) == json.loads((recipe.run_dir / "metrics.json").read_text())
    orphan = root / "masks" / "typo.png"
    orphan.write_bytes((root / "masks" / "a.png").read_bytes())
    forget_data()
    with pytest.raises(UserError, match="typo"):  # what there is now cannot be read, and may be other images
        finished(recipe)
    orphan.unlink()
    paint(".", "e")  # one more mask
    with pytest.raises(UserError, match=r" 4 / 2 then, 5 / 2 now; differing: e\); .* or train it anew: .* --restart"):
        run_recipe(recipe, Accelerator())
    for part in ("images", "masks"):
        (root / part / "e.png").unlink()
    (root / "unlabeled").mkdir()
    shutil.copy(root / "images" / "a.png", root / "unlabeled" / "more.png")
    forget_data()
    assert finished(recipe)["miou"] == done["miou"], "a supervised run sees none of them"
    with monkeypatch.context() as patch:
        patch.setattr(Supervised, "uses_unlabeled", True)
        with pytest.raises(UserError, match=r"4 / 0 / 2 then, 4 / 1 / 2 now; differing: unlabeled/more"):
            finished(recipe)
    shutil.rmtree(root / "unlabeled")
    paint("val", "z")
    with pytest.raises(UserError, match=r"4 / 2 then, 4 / 3 now; differing: z"):
        finished(recipe)
    (root / "val" / "masks" / "z.png").unlink()
    for part in ("images", "masks"):
        (root / "val" / part / "y.png").rename(root / "val" / part / "w.png")
    forget_data()
    with pytest.raises(UserError, match=r"4 / 2 then, 4 / 2 now; differing: w, y"):
        finished(recipe)
    for part in ("images", "masks"):
        (root / "val" / part / "w.png").rename(root / "val" / part / "y.png")
    forget_data()
    assert run_recipe(recipe, Accelerator())["miou"] == done["miou"]
    for folder, name, title in ((".", "b", "b"), ("val", "x", "validation: x")):
        mask = root / folder / "masks" / f"{name}.png"
        before = mask.read_bytes()
        PIL.Image.new("L", (40, 40), 1).save(mask)  # mended in its place
        with pytest.raises(
            UserError, match=rf"learned from other masks than there are now: {title}; keep it and write"
        ):
            finished(recipe)
        mask.write_bytes(before)
    assert finished(recipe)["miou"] == done["miou"]
    PIL.Image.new("L", (40, 40), 1).save(root / "masks" / "a.png")
    (recipe.run_dir / "metrics.json").unlink()
    forget_data()
    with pytest.raises(UserError, match=r"masks have changed since this run began: a; put them back, or start over"):
        run_recipe(recipe, Accelerator())
    PIL.Image.new("L", (40, 40), 0).save(root / "masks" / "a.png")
    forget_data()
    done = run_recipe(recipe, Accelerator(), restart=True)
    root.rename(tmp_path / "elsewhere")
    forget_data()
    assert finished(recipe)["miou"] == done["miou"], "a result outlives its images"


def test_files_that_are_mended_after_a_run_that_left_them_out(write_recipe, tmp_path):
    """They are labels that it has not seen: a run beside it would have them, and be compared with it."""
    for folder, index in itertools.product(("mine", "val"), range(5)):
        for part, value in (("images", 200 if folder == "mine" else 90), ("masks", 1)):
            (tmp_path / folder / part).mkdir(parents=True, exist_ok=True)
            picture = PIL.Image.new("L", (40, 40), 0)
            picture.paste(value, (0, 0, 20, 40))
            picture.save(tmp_path / folder / part / f"{index}.png")
    shutil.copytree(tmp_path / "mine" / "images", tmp_path / "mine" / "unlabeled")
    table = tomllib.loads(write_recipe(method={"name": "cps"}).read_text())
    table["data"] = {"name": "folder", "root": str(tmp_path / "mine"), "classes": ["0", "1"], "crop": 32}
    table["data"] |= {"val_root": str(tmp_path / "val"), "on_error": "skip"}
    table["partition"] = {"labeled": 1.0}
    (tmp_path / "mine.toml").write_text(tomli_w.dumps(table))
    recipe = load(tmp_path / "mine.toml")
    for place, name in (("mine/masks", "1"), ("mine/unlabeled", "unlabeled/2"), ("val/images", "3")):
        path = tmp_path / place / f"{name[-1]}.png"
        whole = path.read_bytes()
        path.write_bytes(whole[:50])
        forget_data()
        done = run_recipe(recipe, Accelerator())
        assert len(json.loads((recipe.run_dir / "partition.json").read_text())["skipped"]) == 1
        forget_data()
        assert finished(recipe)["miou"] == done["miou"]
        path.write_bytes(whole)
        forget_data()
        with pytest.raises(UserError, match=rf"was trained on other images .*differing: {name}\)"):
            finished(recipe)
        shutil.rmtree(recipe.run_dir)


def test_all_that_is_stale_is_named_at_once(write_recipe, run_here, tmp_path):
    """Each takes a command, and time: an error a night would be one too many."""
    others = {name: write_recipe(f"{name}.toml", run={"name": name}) for name in ("one", "two", "baseline")}
    student = write_recipe(
        method={"name": "kd", "distill_from": ["one", "two"]},
        teachers={name: {"recipe": str(others[name])} for name in ("one", "two")},
        eval={"baselines": [str(others["baseline"])]},
    )
    assert run_here("distill.py", "--recipe", student).returncode == 0
    for name in ("one", "baseline", "tiny"):
        path = tmp_path / "runs" / name / "partition.json"
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps(manifest | {"labeled": [*manifest["labeled"][1:], "gone"]}))
    refused = run_here("distill.py", "--recipe", student)
    assert "runs/tiny was trained on other" in refused.stderr
    assert "or train it anew, after its teachers and baselines: accelerate launch" in refused.stderr
    refused = run_here("distill.py", "--recipe", student, "--restart")
    lines = refused.stderr.splitlines()
    assert [Path(line.split()[1]).name for line in lines] == ["one", "baseline"]
    assert all("or train it anew: accelerate launch stages/teacher_cps.py" in line for line in lines)
    refused = run_here("sweep.py", student)
    assert [Path(line.split()[1]).name for line in refused.stderr.splitlines()] == ["tiny", "one", "baseline"]


def test_data_that_is_away_is_told_from_data_that_is_wrong(write_recipe, tmp_path):
    assert not is_here(load(write_recipe())), "it is drawn, nothing of it lies anywhere"
    table = tomllib.loads(write_recipe().read_text())
    table["data"] = {"name": "folder", "root": str(tmp_path), "classes": ["0", "1"], "crop": 32}
    (tmp_path / "mine.toml").write_text(tomli_w.dumps(table))
    assert is_here(load(tmp_path / "mine.toml"))
    for key, value in (("val_root", "away"), ("unlabeled.parquet", "away"), ("unlabeled.hub", "org/name")):
        assert not is_here(load(tmp_path / "mine.toml", [f"data.{key}={value}"])), key
    assert is_here(load(tmp_path / "mine.toml", [f"data.unlabeled.webdataset={tmp_path}"]))


def test_what_a_given_teacher_saw_otherwise_is_said(write_recipe, tmp_path):
    network = SimpleNamespace(image_scale=1.0)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "partition.json").write_text(json.dumps({"labeled": ["a", "b", "v"], "unlabeled": []}))
    term = {"name": "mgd", "pixel": {"teachers": ["deep"]}}
    deep = {"deep": {"checkpoint": str(tmp_path / "teacher")}}
    recipe = load(write_recipe(method=term, teachers=deep), ["data.image_scale=0.5"])
    said = []
    note_other_data(recipe, {"deep": network}, ["a", "c"], ["v", "w"], said.append)
    assert len(said) == 3 and "at 1 of their size and sees these at 0.5" in said[0]
    assert "1 labels that this run does not see" in said[1] and "labels of 1 of the validation images" in said[2]
    said.clear()
    note_other_data(load(recipe.source), {"deep": network}, ["a", "b", "v"], ["w"], said.append)
    assert said == []
    below = load(recipe.source, [f"teachers.deep.checkpoint={tmp_path / 'teacher' / 'model'}"])
    note_other_data(below, {"deep": network}, ["a", "b"], ["v"], said.append)
    assert len(said) == 1 and "labels of 1 of the validation images" in said[0]


def test_synchronised_statistics_reach_the_average(tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    method = MeanTeacher(MeanTeacherConfig(), [network])
    networks, kept = _on_device(method, Optim(lr=0.1, steps=1, sync_batchnorm=True), Accelerator())
    for module in (networks[0], kept["average"], method.average):
        assert isinstance(module[1], torch.nn.SyncBatchNorm)


def test_what_a_student_passes_on(write_recipe, tmp_path):
    ohem = {"name": "supervised", "ohem": {"threshold": 0.7, "min_kept_per_image": 10}}
    for name in ("deep", "baseline"):
        write_recipe(f"{name}.toml", run={"name": f"{name}-s{{seed}}"}, method=ohem)
    path = write_recipe(
        "student.toml",
        run={"name": "student-s{seed}"},
        method={"name": "kd", "distill_from": ["deep", "twin"], "ohem": ohem["ohem"]},
        teachers={
            "deep": {"recipe": str(tmp_path / "deep.toml")},
            "twin": {"recipe": str(tmp_path / "deep.toml"), "seed_offset": 1000},
        },
        eval={"baselines": [str(tmp_path / "baseline.toml")]},
    )
    sets = ["run.seed=3", "run.checkpoint_every=7", "data.crop=40", "optim.lr=0.5", "method.ohem.threshold=0.5"]
    sets += ["method.class_balance=0.5", "run.log_every=3", "run.threads=2", "run.compile=true", "eval.flip=true"]
    deep, twin, baseline = needed_recipes(load(path, sets)).values()
    assert [recipe.run_dir.name for recipe in (deep, twin, baseline)] == ["deep-s3", "deep-s1003", "baseline-s3"]
    for recipe in (deep, twin, baseline):
        assert (recipe.partition_seed, recipe.run.checkpoint_every, recipe.data.crop) == (3, 7, 40)
        assert (recipe.run.log_every, recipe.run.threads, recipe.run.compile) == (3, 2, True)
    assert [recipe.eval.flip for recipe in (deep, baseline)] == [False, True]
    assert [recipe.optim.lr for recipe in (deep, baseline)] == [0.01, 0.5]
    assert [recipe.method.ohem.threshold for recipe in (deep, baseline)] == [0.7, 0.5]
    assert [recipe.method.class_balance for recipe in (deep, baseline)] == [0.0, 0.5]
    with pytest.raises(UserError, match=r"\[teachers.twin\] seed_offset = -4: run.seed = 3 is too small"):
        needed_recipes(load(path, [*sets, "teachers.twin.seed_offset=-4"]))
    outputs = [f"run.output={tmp_path}/\U0001f600", 'run.name = "mine"', " student . head.channels = 24"]
    deep, _, baseline = needed_recipes(load(path, [*sets, *outputs])).values()
    assert deep.run_dir == tmp_path / "\U0001f600" / "deep-s3"
    assert (baseline.run_dir.name, baseline.student.head.channels) == ("mine-baseline", 24)
    with pytest.raises(UserError, match=r"baseline .*baseline.toml.* must agree in \[eval\] scales, but has \[0.5\]"):
        write_recipe("baseline.toml", run={"name": "baseline-s{seed}"}, method=ohem, eval={"scales": [0.5]})
        needed_recipes(load(path))
    for key, changed in (
        (r"\[method\] ohem, but has nothing, here {'threshold': 0.7, .*--set 'eval.baselines=\[\]'", {}),
        (r"\[student\] head, but has {.*'channels': 20", {"student": {"head": {"channels": 20}}, "method": ohem}),
        (r"\[method\] class_balance, but has 0.5, here 0.0", {"method": ohem | {"class_balance": 0.5}}),
        (r"\[data\] flip, but has False, here True", {"method": ohem, "data": {"flip": False}}),
    ):
        write_recipe("baseline.toml", run={"name": "baseline-s{seed}"}, **changed)
        with pytest.raises(UserError, match=r"baseline .*baseline.toml.* must agree in " + key):
            needed_recipes(load(path))
    write_recipe("baseline.toml", run={"name": "baseline-s{seed}"}, method=ohem)
    with pytest.raises(UserError, match=r"deep \(.*\) must agree in \[data\] image_scale"):
        write_recipe("deep.toml", run={"name": "deep-s{seed}"}, data={"image_scale": 0.5})
        needed_recipes(load(path))
    write_recipe("deep.toml", run={"name": "deep-s{seed}"}, partition={"root": "lists"})
    needed_recipes(load(path))  # the public lists are the same wherever they lie
    pool = {"unlabeled": {"parquet": "pool"}}  # which a supervised teacher does not see, and one by CPS does
    write_recipe("deep.toml", run={"name": "deep-s{seed}"}, data=pool)
    needed_recipes(load(path))
    write_recipe("deep.toml", run={"name": "deep-s{seed}"}, data=pool, method={"name": "cps"})
    with pytest.raises(UserError, match=r"deep \(.*\) must agree in \[data\] unlabeled, but has .*pool"):
        needed_recipes(load(path))


def test_classes_without_a_label_are_announced(write_recipe, capsys):
    run_recipe(load(write_recipe(), ["partition.labeled=1", "optim.batch_size=2"]), Accelerator())
    assert "note: no labelled pixel of class " in capsys.readouterr().out


def test_class_balance_goes_by_the_labelled_masks(write_recipe, monkeypatch):
    seen, weights, weigh = [], [], Method.weigh_classes

    def spy(self, pixels):
        weigh(self, pixels)
        seen.append(pixels)
        weights.append(self.class_weights)

    monkeypatch.setattr(Method, "weigh_classes", spy)
    losses = []
    for balance in (0.0, 1.0):
        recipe = load(write_recipe(), [f"method.class_balance={balance}", f"run.name=b{balance}"])
        run_recipe(recipe, Accelerator())
        losses.append(log_rows(recipe.run_dir)[0]["loss"])
    splits, partition = check_recipe(recipe, Accelerator())
    masks = [np.asarray(row["label"]) for row in splits.labeled if row["id"] in partition.labeled]
    counts = np.bincount(np.concatenate([mask.ravel() for mask in masks]), minlength=len(splits.classes))
    assert len(masks) == 4 and len(seen) == 2 and seen[1].tolist() == counts.tolist()
    assert weights[0] is None and losses[0] != pytest.approx(losses[1], rel=1e-4)
    expected = [min(np.median(counts[counts > 0]) / count, 20.0) if count else 1.0 for count in counts]
    assert weights[1].tolist() == pytest.approx(expected, rel=1e-5)


def test_bad_validation_masks_are_found_before_training(write_recipe, tmp_path):
    for index in range(6):
        for folder, value in (("images", 9), ("masks", index % 2), ("val/images", 9), ("val/masks", 7)):
            path = tmp_path / "mine" / folder / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.new("L", (40, 40), value).save(path)
    mine = str(tmp_path / "mine")
    table = tomllib.loads(write_recipe().read_text())
    table["data"] = {"name": "folder", "root": mine, "classes": ["a", "b"], "val_root": f"{mine}/val", "crop": 32}
    path = tmp_path / "mine.toml"
    path.write_text(tomli_w.dumps(table))
    with pytest.raises(UserError, match="mask of 0: value 7 is no class"):
        run_recipe(load(path), Accelerator())
    assert not load(path).run_dir.exists()


def test_a_resumed_student_must_have_its_teachers(write_recipe):
    terms = {"name": "mgd", "pixel": {"teachers": ["deep"]}}
    recipe = load(write_recipe(method=terms, teachers={"deep": {"checkpoint": "x"}}))
    classes = recipe.data.class_names()
    first, other = (build_segmenter(recipe.student, classes, [(0, 0, 0)] * 7, seed) for seed in (0, 1))
    run_recipe(recipe, Accelerator(), {"deep": first})
    (recipe.run_dir / "metrics.json").unlink()
    with pytest.raises(UserError, match="its teachers are not those that it began with"):
        run_recipe(recipe, Accelerator(), {"deep": other})
    run_recipe(recipe, Accelerator(), {"deep": first})


def test_a_teacher_of_other_classes_is_refused(write_recipe):
    terms = {"name": "mgd", "pixel": {"teachers": ["deep"]}}
    recipe = load(write_recipe(method=terms, teachers={"deep": {"checkpoint": "x"}}))
    reversed_ones = recipe.data.class_names()[::-1]
    teacher = build_segmenter(recipe.student, reversed_ones, [(0, 0, 0)] * 7, 0)
    with pytest.raises(UserError, match=r"\[teachers.deep\] knows the 7 classes .*; they must be the same"):
        run_recipe(recipe, Accelerator(), {"deep": teacher})
    assert not recipe.run_dir.exists()


def test_two_teachers_that_are_one_are_announced(write_recipe, capsys):
    terms = {"name": "mgd", "pixel": {"teachers": ["deep", "wide"]}}
    recipe = load(write_recipe(method=terms, teachers={name: {"checkpoint": "x"} for name in ("deep", "wide")}))
    classes = recipe.data.class_names()
    first, other = (build_segmenter(recipe.student, classes, [(0, 0, 0)] * 7, seed) for seed in (0, 1))
    for wide, announced in ((first, True), (other, False)):
        run_recipe(recipe, Accelerator(), {"deep": first, "wide": wide}, restart=True)
        assert ("[teachers.deep] and [teachers.wide] are the same network" in capsys.readouterr().out) == announced


def test_damaged_run_files_are_one_line(write_recipe):
    recipe = load(write_recipe())
    run_recipe(recipe, Accelerator())
    whole = (recipe.run_dir / "metrics.json").read_text()
    for text in ("", "{}", "[]", whole[:40]):
        (recipe.run_dir / "metrics.json").write_text(text)
        with pytest.raises(UserError, match="metrics.json (cannot be read|is damaged)"):
            run_recipe(recipe, Accelerator())
    (recipe.run_dir / "metrics.json").write_text(whole)
    (recipe.run_dir / "model" / "model.safetensors").unlink()
    again = run_recipe(recipe, Accelerator())
    assert again["miou"] == json.loads(whole)["miou"] and (recipe.run_dir / "model" / "model.safetensors").exists()


def test_runs_that_would_share_a_folder_are_refused(write_recipe, tmp_path):
    write_recipe("deep.toml", run={"name": "same"})
    terms = {"name": "mgd", "pixel": {"teachers": ["deep"]}}
    teacher = {"deep": {"recipe": str(tmp_path / "deep.toml")}}
    recipe = load(write_recipe("mgd.toml", run={"name": "same"}, method=terms, teachers=teacher))
    with pytest.raises(UserError, match=r"this run \(.*mgd.toml\) and deep \(.*deep.toml\) would share the folder"):
        needed_recipes(recipe)


def test_a_folder_of_another_recipe_is_not_touched(write_recipe):
    recipe = load(write_recipe())
    done = run_recipe(recipe, Accelerator())
    other = load(recipe.source, ["optim.lr=0.02"])
    with pytest.raises(UserError, match=r"another recipe \(optim.lr 0.01 there, 0.02 here\); .* another name by --set"):
        run_recipe(other, Accelerator())
    other = load(recipe.source, ["data.crop=64"])  # which its teachers would be called with, too
    with pytest.raises(UserError, match=r"\(data.crop 32 there, 64 here\); .* another folder by --set run.output="):
        run_recipe(other, Accelerator())
    assert run_recipe(recipe, Accelerator())["miou"] == done["miou"]
    free = load(recipe.source, ["run.log_every=3", "data.workers=1", "run.checkpoint_every=7"])
    assert run_recipe(free, Accelerator())["miou"] == done["miou"]


def test_a_student_is_no_teacher(write_recipe, run_here, monkeypatch, tmp_path):
    teacher = load(write_recipe(), ["run.name=teacher"])
    run_recipe(teacher, Accelerator())
    term = {"name": "mgd", "pixel": {"teachers": ["one"]}}
    given = {"one": {"checkpoint": str(teacher.run_dir)}}
    student = load(write_recipe("student.toml", run={"name": "s"}, method=term, teachers=given))
    refuse_students(student)
    run_recipe(student, Accelerator(), {"one": load_segmenter(teacher.run_dir)})
    for place in (student.run_dir, student.run_dir / "model"):
        again = load(write_recipe(method=term, teachers={"one": {"checkpoint": str(place)}}))
        with pytest.raises(UserError, match=r"\[teachers.one\] checkpoint = .* is itself a student of teachers"):
            refuse_students(again)
    elsewhere = student.run_dir / "model" / "recipe.toml"
    text = elsewhere.read_text()
    elsewhere.write_text(text.replace('name = "shapes"', 'name = "lidar"'))  # of a plug-in that is not installed here
    refuse_students(again)
    elsewhere.write_text(text)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: student.run_dir / "model")
    with pytest.raises(UserError, match=r"\[teachers.one\] checkpoint = 'org/name' is itself a student of teachers"):
        refuse_students(load(write_recipe(method=term, teachers={"one": {"checkpoint": "org/name"}})))
    teacher.run_dir.rename(tmp_path / "away")  # a result does not need its teacher
    for stage, flags in (("distill.py", ["--recipe"]), ("sweep.py", [])):
        shown = run_here(stage, *flags, student.source)
        assert shown.returncode == 0 and "| s " in shown.stdout, shown.stderr
    for stage, flags in (("distill.py", ["--recipe"]), ("sweep.py", []), ("cache_teachers.py", ["--recipe"])):
        mode = "cached" if stage == "cache_teachers.py" else "online"
        refused = run_here(stage, *flags, again.source, "--set", f"teachers.mode={mode}")
        assert refused.returncode == 2 and "is itself a student of teachers" in refused.stderr, stage


def test_a_folder_is_written_by_one_process_at_a_time(write_recipe, tmp_path):
    recipe = load(write_recipe())
    ready, child = tmp_path / "ready", tmp_path / "child.py"
    child.write_text(
        "import pathlib, sys, time\nfrom mgd.locks import hold\n"
        f"with hold(pathlib.Path({str(recipe.run_dir)!r})):\n"
        f"    pathlib.Path({str(ready)!r}).touch()\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, child], env={**os.environ, "PYTHONPATH": str(ROOT)})
    while not ready.exists():
        assert process.poll() is None
        time.sleep(0.05)
    with pytest.raises(UserError, match=rf"is being written by another process \(pid {process.pid}\)"):
        run_recipe(recipe, Accelerator())
    process.kill()
    process.wait()
    run_recipe(recipe, Accelerator())


def test_a_signal_in_the_last_step_still_ends_the_command(write_recipe, monkeypatch):
    step = Supervised.step

    def signalled(self, batch, number):
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, number)

    monkeypatch.setattr(Supervised, "step", signalled)
    recipe = load(write_recipe())
    with pytest.raises(Stopped, match="step 4 of 4 is kept"):
        run_recipe(recipe, Accelerator())
    monkeypatch.setattr(Supervised, "step", step)
    assert run_recipe(recipe, Accelerator())["steps"] == 4


def test_a_run_that_is_not_finished_cannot_be_evaluated(write_recipe):
    recipe = load(write_recipe())
    recipe.run_dir.mkdir(parents=True)
    (recipe.run_dir / "recipe.toml").write_text(recipe.to_toml())
    with pytest.raises(UserError, match="a run that is not finished; its command goes on with it"):
        load_segmenter(recipe.run_dir)


def test_compiling_needs_a_compiler(write_recipe, monkeypatch):
    monkeypatch.setenv("PATH", "")
    wanted = "cc or gcc or clang" if torch.cuda.is_available() else r"g\+\+ or clang\+\+"
    with pytest.raises(UserError, match=f"compile = true needs a compiler, {wanted}; install one"):
        run_recipe(load(write_recipe(run={"compile": True})), Accelerator())


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(write_recipe, tmp_path):
    for compiled in (False, True):
        torch._dynamo.utils.counters.clear()
        run_recipe(load(write_recipe(run={"compile": compiled, "name": f"c{compiled}"})), Accelerator())
        assert (torch._dynamo.utils.counters["frames"]["ok"] > 0) == compiled
    plain, ours = ([row.get("loss") for row in log_rows(tmp_path / "runs" / name)] for name in ("cFalse", "cTrue"))
    assert plain[:3] == pytest.approx(ours[:3], rel=1e-3)


def test_a_training_that_begins_anew_keeps_no_score_of_the_one_before(write_recipe):
    path = write_recipe()
    folder = load(path).run_dir
    run_recipe(load(path), Accelerator())
    (folder / "unlabeled.json").write_text('{"miou": 1.0, "num_images": 8}')
    (folder / "best").mkdir()
    (folder / "best" / "metrics.json").write_text('{"step": 1, "miou": 99.0}')
    (folder / "metrics.json").unlink()
    shutil.rmtree(folder / "checkpoint")
    again = run_recipe(load(path, ["partition.labeled=6"]), Accelerator())
    assert again["num_labeled"] == 6 and again["best_on_val"] is None
    assert not (folder / "unlabeled.json").exists() and not (folder / "best").exists()
