"""What metrics.jsonl gets also reaches the tracker, which cannot end a run."""

import json
import os
import signal
import subprocess
import sys

import pytest
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, get_available_trackers
from conftest import log_rows, run_stage

from mgd import tracking
from mgd.errors import Stopped, UserError
from mgd.experiment import run_recipe
from mgd.methods.supervised import Supervised
from mgd.needed import needed_recipes
from mgd.recipe import load
from mgd.runs import shaping_keys


def needs(name):
    installed = name in map(str, get_available_trackers())
    return pytest.mark.skipif(not installed, reason=f"{name} is not installed")


def logged(folder):
    """What metrics.jsonl holds: value by key and step."""
    return {(key, row["step"]): value for row in log_rows(folder) for key, value in row.items() if key != "step"}


def on_tensorboard(folder):
    """What TensorBoard shows of a run: value by key and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    found = {}
    for key in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(key)]
        assert steps == sorted(steps)
        found |= {(key, event.step): event.value for event in events.Scalars(key)}
    return found


@needs("tensorboard")
def test_two_runs_in_one_process_and_a_tracker_that_fails(write_recipe, monkeypatch, capsys):
    accelerator = Accelerator()
    runs = [load(write_recipe(), [f"run.name={name}", "run.tracker=tensorboard"]) for name in ("a", "broken", "b")]
    for recipe in runs:
        with monkeypatch.context() as patch:
            if recipe.run.name == "broken":
                patch.setattr(TensorBoardTracker, "log", lambda *_, **__: 1 / 0)
            run_recipe(recipe, accelerator)
        assert not accelerator.trackers
    assert capsys.readouterr().out.count("note: the tracker failed (ZeroDivisionError") == 1
    for recipe in (runs[0], runs[2]):
        wanted = logged(recipe.run_dir)
        assert ("val_miou", 4) in wanted and len({step for _, step in wanted}) == 4
        assert on_tensorboard(recipe.run_dir) == pytest.approx(wanted, rel=1e-6)
    (config,) = runs[0].run_dir.glob("tensorboard/*/hparams.yml")
    assert "student.head.aspp_rates: '[1, 2]'" in config.read_text()
    assert len(logged(runs[1].run_dir)) == len(logged(runs[0].run_dir))


@needs("tensorboard")
@pytest.mark.parametrize("first", ["tensorboard", "none"])
def test_a_killed_run_goes_on_in_the_same_curves(write_recipe, monkeypatch, first):
    """The first sitting ends at step 4, past its resume point at step 2; a resumed run may take up a tracker."""
    path = write_recipe(optim={"steps": 6})
    step = Supervised.step

    def broken(self, batch, number):
        if number == 3:
            raise MemoryError
        return step(self, batch, number)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Supervised, "step", broken)
        run_recipe(load(path, ["run.tracker=tensorboard"] if first == "tensorboard" else []), Accelerator())
    recipe = load(path, ["run.tracker=tensorboard"])
    assert max(step for _, step in logged(recipe.run_dir)) == 3
    run_recipe(recipe, Accelerator())
    wanted = {at: value for at, value in logged(recipe.run_dir).items() if first == "tensorboard" or at[1] > 2}
    assert on_tensorboard(recipe.run_dir) == pytest.approx(wanted, rel=1e-6)
    assert len(list(recipe.run_dir.glob("tensorboard/*/hparams.yml"))) == 1


@needs("tensorboard")
def test_a_stopped_run_closes_its_tracker(write_recipe, monkeypatch):
    closed = []
    finish = TensorBoardTracker.finish
    monkeypatch.setattr(TensorBoardTracker, "finish", lambda self: closed.append(finish(self)))
    step = Supervised.step
    monkeypatch.setattr(Supervised, "step", lambda *args: os.kill(os.getpid(), signal.SIGTERM) or step(*args))
    with pytest.raises(Stopped):
        run_recipe(load(write_recipe(), ["run.tracker=tensorboard"]), Accelerator())
    assert closed


READ_BACK = """
import json, sys, trackio
from trackio.sqlite_storage import SQLiteStorage
runs = list(trackio.Api().runs("mgd"))
logs = [SQLiteStorage.get_logs("mgd", run.name, run_id=run.id) for run in runs]
print(json.dumps([[run.name, run.config, log] for run, log in zip(runs, logs, strict=True)]))
"""


@needs("trackio")
def test_trackio_keeps_the_runs_of_one_output_folder_together(write_recipe, tmp_path, monkeypatch):
    """Teacher and student in one process; the student's tracker is also its teacher's. A run taken up stays one."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    write_recipe("teacher.toml", run={"name": "teacher"})
    recipe = write_recipe(
        "student.toml",
        run={"name": "student", "tracker": "trackio"},
        method={"name": "kd", "distill_from": ["deep"]},
        teachers={"deep": {"recipe": str(tmp_path / "teacher.toml")}},
    )
    for _ in range(2):
        done = run_stage("distill.py", "--recipe", recipe)
        assert done.returncode == 0, done.stderr
        assert "note: the tracker" not in done.stdout
        (tmp_path / "runs" / "student" / "metrics.json").unlink()
    assert "goes on at step 4" in done.stdout and "Resumed existing run: student" in done.stdout
    place = os.environ | {"TRACKIO_DIR": str(tmp_path / "runs" / ".trackio")}
    back = subprocess.run([sys.executable, "-c", READ_BACK], env=place, capture_output=True, text=True, timeout=120)
    assert back.returncode == 0, back.stderr
    runs = json.loads(back.stdout.splitlines()[-1])
    assert sorted(name for name, _, _ in runs) == ["student", "teacher"]
    for name, config, rows in runs:
        assert config["run.name"] == name and config["optim.lr"] == 0.01 and config["data.scales"] == "[0.75, 1.0, 1.5]"
        found = {
            (key, row["step"]): value for row in rows for key, value in row.items() if key not in ("step", "timestamp")
        }
        assert found == pytest.approx(logged(tmp_path / "runs" / name))


def test_a_tracker_that_is_not_installed_is_refused_before_training(write_recipe, monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard"])
    recipe = load(write_recipe(), ["run.tracker=wandb"])
    with pytest.raises(UserError, match='tracker = "wandb": not installed; pip install wandb$'):
        run_recipe(recipe, Accelerator())
    assert not recipe.run_dir.exists()
    with pytest.raises(UserError, match="tracker = \"wand\": is not a choice; did you mean 'wandb'"):
        load(recipe.source, ["run.tracker=wand"])


def test_a_tracker_does_not_shape_a_run(write_recipe, tmp_path):
    path = write_recipe(eval={"baselines": [str(write_recipe("baseline.toml", run={"name": "baseline"}))]})
    tracked = load(path, ["run.tracker=trackio"])
    assert shaping_keys(load(path)) == shaping_keys(tracked)
    assert [other.run.tracker for other in needed_recipes(tracked).values()] == ["trackio"]
    assert [other.run.tracker for other in needed_recipes(load(path)).values()] == [None]
