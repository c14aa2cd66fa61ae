import os
import signal

import pytest
import torch
from accelerate import Accelerator
from conftest import log_rows
from safetensors.torch import load_file
from torch.nn import functional

from mgd.data.loaders import TrainingPairs
from mgd.data.reading import load_splits, split_data
from mgd.errors import UserError
from mgd.experiment import build_networks, run_recipe
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


def test_a_data_worker_that_is_killed_is_one_line(write_recipe, monkeypatch):
    monkeypatch.setattr(TrainingPairs, "__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match=r"a data worker died \(killed for memory\?\); the same command goes on"):
        run_recipe(load(write_recipe(data={"workers": 1})), Accelerator())
