import os
import signal

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ONLINE, log_rows
from safetensors.torch import load_file
from torch.nn import functional

from mgd.data.loaders import TrainingPairs
from mgd.data.reading import load_splits, split_data
from mgd.errors import UserError
from mgd.experiment import build_networks, run_recipe
from mgd.models.segmenter import build_segmenter
from mgd.recipe import load
from mgd.run_images import training_pairs


def test_a_run_is_plain_sgd_on_its_samples(write_recipe):
    """The whole of a supervised run, stated in a few lines of PyTorch: the same weights and the same log."""
    optim = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.8, "power": 0.9, "batch_size": 4, "steps": 5}
    recipe = load(write_recipe(optim=optim, method={"name": "supervised", "class_balance": 0.0}))
    run_recipe(recipe, Accelerator())
    splits = load_splits(recipe.data)
    partition = split_data(recipe.data, recipe.partition, recipe.partition_seed)
    pairs = training_pairs(recipe, splits, partition, None)
    network = build_networks(recipe, splits)[0].train()
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.8)
    losses = []
    for step in range(5):
        samples = [pairs[step * 4 + index] for index in range(4)]
        image, label = (torch.stack([sample[key] for sample in samples]) for key in ("image", "label"))
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 5) ** 0.9
        loss = functional.cross_entropy(network(image).logits, label, ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found = load_file(recipe.run_dir / "model" / "model.safetensors")
    for name, value in network.state_dict().items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name
    rows = log_rows(recipe.run_dir)
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(losses, rel=1e-4)


OF_ONE = {"distill_from": ["one"]}
METHODS = {
    "supervised": {},
    "mean_teacher": {},
    "cps": {},
    "mgd": {"pixel": {"teachers": ["one"]}, "image": {"teachers": ["one"]}, "region": {"teachers": ["one"], "grid": 2}},
    "kd": OF_ONE,
    "cwd": OF_ONE,
    "mgd_online": ONLINE,
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_in_bf16_what_it_learns_without(write_recipe, tmp_path, name):
    changes, teachers = {"method": METHODS[name] | {"name": name}}, {}
    if name in ("mgd", "kd", "cwd"):
        changes["teachers"] = {"one": {"checkpoint": "unread"}}
    losses, weights = {}, {}
    for precision in ("no", "bf16"):
        recipe = load(write_recipe(run={"name": precision}, **changes))
        splits = load_splits(recipe.data)
        if recipe.teachers:
            teachers = {"one": build_segmenter(recipe.student, splits.classes, splits.colors, seed=7)}
        AcceleratorState._reset_state(reset_partial_state=True)
        run_recipe(recipe, Accelerator(mixed_precision=precision), teachers)
        losses[precision] = {key: value for key, value in log_rows(recipe.run_dir)[0].items() if key.startswith("loss")}
        weights[precision] = load_file(recipe.run_dir / "model" / "model.safetensors")
    fresh = build_networks(recipe, splits)[0].state_dict()
    assert losses["bf16"] != losses["no"] and losses["bf16"] == pytest.approx(losses["no"], rel=0.05, abs=2e-4)
    names = [key for key, value in fresh.items() if value.is_floating_point()]
    learned = {precision: {key: found[key] - fresh[key] for key in names} for precision, found in weights.items()}
    for key in names:
        exact, rough = learned["no"][key].norm(), learned["bf16"][key].norm()
        assert weights["bf16"][key].dtype == torch.float32
        assert exact / 3 <= rough <= exact * 3, f"{key} learns {rough} in bf16, {exact} without"
    exact, rough = (torch.cat([found[key].flatten() for key in names]) for found in learned.values())
    assert functional.cosine_similarity(exact, rough, dim=0) > 0.9


def test_a_data_worker_that_is_killed_is_one_line(write_recipe, monkeypatch):
    monkeypatch.setattr(TrainingPairs, "__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match=r"a data worker died \(killed for memory\?\); the same command goes on"):
        run_recipe(load(write_recipe(data={"workers": 1})), Accelerator())
