"""What run_recipe promises, in this process."""

import pytest
from accelerate import Accelerator

from mgd.errors import UserError
from mgd.experiment import run_recipe
from mgd.recipe import load

BACKBONES = ["resnet18d", "mobilenetv3_small_100", "mobilenetv4_conv_small", "convnext_atto", "efficientvit_b0"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_swapping_the_backbone_trains_or_says_what_is_missing(write_recipe, backbone):
    recipe = load(write_recipe(), [f"student.backbone={backbone}", "optim.steps=2"])
    if backbone == "efficientvit_b0":
        with pytest.raises(UserError, match="output_stride = 16 .*use output_stride = 32"):
            run_recipe(recipe, Accelerator())
        recipe = load(recipe.source, [f"student.backbone={backbone}", "optim.steps=2", "student.output_stride=32"])
    metrics = run_recipe(recipe, Accelerator())
    assert metrics["steps"] == 2 and metrics["backbone"] == backbone
    assert (recipe.run_dir / "model" / "model.safetensors").exists()


def test_all_labelled_distils_on_the_labelled_images(write_recipe):
    metrics = run_recipe(load(write_recipe(method={"name": "cps"}), ["partition.labeled=1.0"]), Accelerator())
    assert (metrics["num_labeled"], metrics["num_unlabeled"]) == (12, 0)


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


def test_a_loss_that_is_no_number_stops_the_run(write_recipe):
    with pytest.raises(UserError, match=r"loss.* is not finite at step \d+; lower \[optim\] lr"):
        run_recipe(load(write_recipe(), ["optim.lr=1e30", "optim.steps=20"]), Accelerator())


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


def test_images_that_change_under_an_unfinished_run(write_recipe):
    recipe = load(write_recipe())
    run_recipe(recipe, Accelerator())
    (recipe.run_dir / "metrics.json").unlink()
    path = recipe.run_dir / "partition.json"
    path.write_text(path.read_text().replace("train-000003", "train-999999"))
    with pytest.raises(UserError, match=r"the images of \[data\] have changed since this run began"):
        run_recipe(recipe, Accelerator())
