import itertools
import json

import pytest
import torch
from accelerate import Accelerator
from conftest import log_rows
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from mgd.data.reading import load_splits
from mgd.errors import UserError
from mgd.experiment import run_recipe
from mgd.guard import Guard
from mgd.methods.base import StepOutput
from mgd.methods.supervised import Supervised
from mgd.models.segmenter import build_segmenter
from mgd.recipe import load


@pytest.fixture
def broken_at(monkeypatch):
    """Make the supervised loss infinite at some steps; returns the buffers (BatchNorm's) that each step begins with."""
    step = Supervised.step

    def arrange(*steps):
        found = []

        def broken(self, batch, number):
            found.append([buffer.clone() for buffer in self.networks[0].buffers()])
            out = step(self, batch, number)
            return StepOutput(out.loss / (0.0 if number in steps else 1.0), out.log)

        monkeypatch.setattr(Supervised, "step", broken)
        return found

    return arrange


def test_a_loss_that_is_no_number_stops_the_run_and_can_be_reproduced(write_recipe):
    recipe = load(write_recipe(), ["optim.lr=1e18", "optim.steps=20"])
    with pytest.raises(UserError, match=r"loss.* not finite at step \d+; images train-.*; lower \[optim\] lr") as error:
        run_recipe(recipe, Accelerator())
    assert "resume point" not in str(error.value)
    assert not (recipe.run_dir / "checkpoint").exists()
    folder = recipe.run_dir / "nonfinite"
    with safe_open(folder / "batch_0.safetensors", framework="pt") as file:
        header = file.metadata()
        batch = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert "gradient" in json.loads(header["terms"])
    assert len(json.loads(header["ids"])["id"]) == 4 == len(batch["image"])
    splits = load_splits(recipe.data)
    network = build_segmenter(recipe.student, splits.classes, splits.colors, 0)
    weights = load_file(folder / "weights_0.safetensors")
    network.load_state_dict({key.removeprefix("network0/"): value for key, value in weights.items()})
    again = Supervised(recipe.method, [network.train()]).step(batch, int(header["step"]))
    assert not again.loss.isfinite()


def test_a_skipped_step_leaves_no_trace_and_is_counted(write_recipe, broken_at):
    broken_at(0, 1)
    recipe = load(write_recipe(), ["optim.nonfinite=skip", "optim.steps=2"])
    metrics = run_recipe(recipe, Accelerator())
    assert metrics["skipped_steps"] == 2
    trained = load_file(recipe.run_dir / "model" / "model.safetensors")
    splits = load_splits(recipe.data)
    fresh = build_segmenter(recipe.student, splits.classes, splits.colors, 0).state_dict()
    assert [key for key in trained if not trained[key].equal(fresh[key])] == []
    rows = log_rows(recipe.run_dir)
    assert rows[0]["loss"] is None and rows[0]["loss_supervised"] > 0
    buffers = broken_at(1)
    recipe = load(write_recipe(), ["optim.nonfinite=skip", "optim.steps=4", "run.name=other"])
    assert run_recipe(recipe, Accelerator())["skipped_steps"] == 1
    trained = load_file(recipe.run_dir / "model" / "model.safetensors")
    assert all(value.isfinite().all() for value in trained.values())
    same = [all(map(torch.equal, first, second)) for first, second in itertools.pairwise(buffers)]
    assert same == [False, True, False], "step 1 has left its batch statistics, or has undone those of step 0"


class Pair(Accelerator):
    """An accelerator that meets, at each exchange, what another process has seen."""

    others = torch.zeros(1, 3, dtype=torch.long)

    def gather(self, mine):
        return torch.cat([mine, self.others])


@pytest.mark.parametrize("action", ["raise", "skip"])
def test_of_several_processes_the_one_with_the_bad_loss_is_named(tmp_path, capsys, action):
    """Gradients are averaged before the guard sees them, so that all processes have one that is not finite."""
    network, accelerator = nn.Linear(2, 1), Pair()
    network.weight.grad, network.bias.grad = torch.full((1, 2), torch.inf), torch.zeros(1)
    batch = {"id": ["a", "b"], "image": torch.zeros(2)}
    said = []
    for term, others in ((1.0, [2, 1, 0]), (torch.inf, [0, 1, 0]), (1.0, [0, 1, 0])):
        accelerator.others = torch.tensor([others])
        guard = Guard(action, tmp_path / str(len(said)) / "run", {"network0": network}, accelerator)
        out = StepOutput(torch.tensor(term), {"loss_pixel": torch.tensor(term)})
        try:
            guard.before()
            assert guard.look(6, out, batch, 0) == (False, 0)
            said.append(capsys.readouterr().out)
        except UserError as error:
            said.append(str(error))
        assert guard.folder.exists() == (len(said) > 1)
    healthy, bad, of_all = said
    assert "images a, b" not in healthy and "gradient" not in healthy
    assert "loss, loss_pixel, gradient is not finite at step 7" in bad
    assert ": gradient is not finite at step 7" in of_all
    if action == "raise":
        assert "the loss of another process is not finite" in healthy and "images a, b" in bad and "images a" in of_all
    else:
        assert healthy == "", "the other process says it"


def test_skipping_does_not_go_on_for_ever(write_recipe, broken_at):
    broken_at(*range(100))
    recipe = load(write_recipe(), ["optim.nonfinite=skip", "optim.steps=30"])
    with pytest.raises(UserError, match="not finite at step 21, 21 times in a row; images train-") as error:
        run_recipe(recipe, Accelerator())
    assert "nonfinite =" not in str(error.value), "which is what it does"


def test_one_class_everywhere_is_reported(write_recipe, monkeypatch, capsys):
    from mgd import experiment
    from mgd.metrics import scores

    confusion = torch.zeros(7, 7)
    confusion[:, 3] = 5
    monkeypatch.setattr(experiment, "evaluate_network", lambda *_: scores(confusion))
    run_recipe(load(write_recipe(), ["optim.steps=5", "eval.every=1"]), Accelerator())
    said = [line for line in capsys.readouterr().out.splitlines() if "one class is predicted everywhere" in line]
    assert [line.split("at step ")[1][0] for line in said] == ["3", "4", "5"]


def test_sync_batchnorm_needs_gpus(write_recipe):
    if torch.cuda.is_available():
        pytest.skip("for machines without a GPU")
    with pytest.raises(UserError, match="sync_batchnorm = true needs GPUs"):
        run_recipe(load(write_recipe(), ["optim.sync_batchnorm=true"]), Accelerator())
