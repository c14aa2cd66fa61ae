"""The same run on several processes: from the start, taken up by more or fewer, or losing one."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import datasets
import PIL.Image
import pytest
import tomli_w
from accelerate import Accelerator
from conftest import ONLINE, TINY, log_rows, merged, run_stage, stage_command, steps_done, torchrun
from plugin_package import install
from safetensors.torch import load_file

from mgd.data.images import Images
from mgd.data.reading import load_splits
from mgd.experiment import evaluate_network
from mgd.models.segmenter import load_segmenter
from mgd.recipe import load

# Norms without batch statistics: only the order of sums tells the number of processes.
# Crops larger than half an image: the padding spreads the labelled pixels unevenly.
EXACT = {
    "data": {"scales": [0.5, 1.0, 1.5]},
    "student": {"backbone": "test_convnext", "output_stride": 32, "head": {"norm": "group"}},
    "method": {"name": "cps"},
}
ON_CPU = {"ACCELERATE_USE_CPU": "true"}
pytestmark = pytest.mark.xdist_group("ports")  # of fixed numbers


def same_within_tolerance(first, second):
    """Losses to 2e-4 relative, weights to 1e-4, mIoU to 0.1 points: what the README promises."""
    rows = [{row["step"]: row for row in log_rows(folder)} for folder in (first, second)]
    assert rows[0].keys() == rows[1].keys()
    for step, row in rows[0].items():
        for key in (key for key in row if key.startswith("loss")):
            assert row[key] == pytest.approx(rows[1][step][key], rel=2e-4), (step, key)
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (first, second)]
    assert all(weights[0][key].allclose(weights[1][key], atol=1e-4) for key in weights[0])
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (first, second)]
    assert metrics[0]["miou"] == pytest.approx(metrics[1]["miou"], abs=0.1)
    return metrics


def recipes(write_recipe, steps, names=("one", "many"), **changes):
    optim, changes = {"lr": 0.001, "steps": steps, "batch_size": 4}, EXACT | changes
    return [write_recipe(f"{name}.toml", run={"name": name}, optim=optim, **changes) for name in names]


def stop_at(launcher, recipe, folder, step):
    """Start, send SIGTERM to the launcher once `step` is done; return what was printed to stderr."""
    process = subprocess.Popen(
        stage_command("teacher_cps.py", "--recipe", recipe, launcher=launcher),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ON_CPU},
    )
    while steps_done(folder) < step and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    return process.communicate(timeout=120)[1]


@pytest.mark.slow
def test_two_processes_take_up_what_one_began(write_recipe, tmp_path):
    one, many = recipes(write_recipe, 10)
    folder = tmp_path / "runs" / "many"
    assert run_stage("teacher_cps.py", "--recipe", one).returncode == 0
    assert "is kept" in stop_at((), many, folder, 3)
    done = run_stage("teacher_cps.py", "--recipe", many, launcher=torchrun(2, 29517), env=ON_CPU)
    assert done.returncode == 0, done.stderr
    assert "goes on at step" in done.stdout and "2 process(es)" in done.stdout
    metrics = same_within_tolerance(tmp_path / "runs" / "one", folder)
    assert [row["num_processes"] for row in metrics] == [1, 2]


TERMS = {
    "supervised": {"ohem": {"threshold": 0.2, "min_kept_per_image": 0}},
    "mean_teacher": {},
    "mgd": {"pixel": {"teachers": ["one"]}, "image": {"teachers": ["one"]}, "region": {"teachers": ["one"]}},
    "kd": {"distill_from": ["one"]},
    "cwd": {"distill_from": ["one"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TERMS)
def test_a_method_learns_the_same_on_two_processes(write_recipe, tmp_path, name):
    more, stage = {"method": {"name": name, **TERMS[name]}}, "teacher_cps.py"
    if name in ("mgd", "kd", "cwd"):
        stage, teacher = "distill.py", write_recipe("teacher.toml", run={"name": "teacher"}, data=EXACT["data"])
        more["teachers"] = {"one": {"recipe": str(teacher)}}
    one, two = recipes(write_recipe, 5, names=("one", "two"), **more)
    for recipe, launcher in ((one, ()), (two, torchrun(2, 29544))):
        done = run_stage(stage, "--recipe", recipe, launcher=launcher, env=ON_CPU)
        assert done.returncode == 0, done.stderr
    metrics = same_within_tolerance(tmp_path / "runs" / "one", tmp_path / "runs" / "two")
    assert [found["num_processes"] for found in metrics] == [1, 2]


@pytest.mark.slow
def test_teachers_that_train_along_learn_the_same_on_two_processes(write_recipe, tmp_path):
    head = TINY["student"]["head"] | EXACT["student"]["head"]
    teacher = {"pretrained": False, **EXACT["student"], "head": head}
    method = ONLINE | {"teachers": {"deep": teacher, "wide": teacher}}
    one, many = recipes(write_recipe, 5, method=method)
    assert run_stage("teacher_cps.py", "--recipe", one).returncode == 0
    done = run_stage("teacher_cps.py", "--recipe", many, launcher=torchrun(2, 29543), env=ON_CPU)
    assert done.returncode == 0, done.stderr
    metrics = same_within_tolerance(tmp_path / "runs" / "one", tmp_path / "runs" / "many")
    assert [found["num_processes"] for found in metrics] == [1, 2]


@pytest.mark.slow
def test_layers_of_a_plugin_learn_the_same_on_two_processes(write_recipe, tmp_path):
    install(tmp_path / "site")
    student = EXACT["student"] | {"head": {"name": "flat"}}
    recipe = tmp_path / "recipe.toml"
    for name, launcher in (("one", ()), ("two", torchrun(2, 29546))):
        run = {"name": name, "output": str(tmp_path / "runs")}
        table = merged(TINY, {"run": run, "data": EXACT["data"]}) | {"method": {"name": "adapted"}}
        recipe.write_text(tomli_w.dumps(table | {"student": {"pretrained": False} | student}))
        env = ON_CPU | {"PYTHONPATH": str(tmp_path / "site")}
        done = run_stage("teacher_cps.py", "--recipe", recipe, launcher=launcher, env=env)
        assert done.returncode == 0, done.stderr
    metrics = same_within_tolerance(tmp_path / "runs" / "one", tmp_path / "runs" / "two")
    assert [found["num_processes"] for found in metrics] == [1, 2]
    states = [load_file(tmp_path / "runs" / name / "checkpoint" / "state.safetensors") for name in ("one", "two")]
    for key in ("projection/weight", "seen/count"):
        assert states[0][key].allclose(states[1][key], atol=1e-4)


@pytest.mark.slow
def test_one_two_four_one(write_recipe, tmp_path):
    one, many = recipes(write_recipe, 60)
    folder = tmp_path / "runs" / "many"
    assert run_stage("teacher_cps.py", "--recipe", one).returncode == 0
    for launcher, step in (((), 8), (torchrun(2, 29518), 20), (torchrun(4, 29519), 32)):
        assert "is kept" in stop_at(launcher, many, folder, step)
        assert not (folder / "metrics.json").exists()
    done = run_stage("teacher_cps.py", "--recipe", many)
    assert done.returncode == 0 and "goes on at step" in done.stdout
    same_within_tolerance(tmp_path / "runs" / "one", folder)


def test_what_two_processes_score_is_what_they_save(write_recipe, tmp_path):
    """Each has batch statistics of its own; all are evaluated with those of the first, which are saved."""
    recipe = write_recipe(optim={"steps": 8})
    done = run_stage("teacher_cps.py", "--recipe", recipe, launcher=torchrun(2, 29547), env=ON_CPU)
    assert done.returncode == 0, done.stderr
    recipe = load(recipe)
    metrics = json.loads((recipe.run_dir / "metrics.json").read_text())
    splits = load_splits(recipe.data)
    val = Images(splits.val, splits.decoder)
    alone = evaluate_network(load_segmenter(recipe.run_dir), val, recipe, Accelerator())
    assert metrics["num_processes"] == 2 and alone.miou == pytest.approx(metrics["miou"], abs=1e-6)


@pytest.mark.slow
def test_four_processes_and_two_machines(write_recipe, tmp_path):
    one, four, machines = recipes(write_recipe, 5, names=("one", "four", "machines"))
    assert run_stage("teacher_cps.py", "--recipe", one).returncode == 0
    done = run_stage("teacher_cps.py", "--recipe", four, launcher=torchrun(4, 29520), env=ON_CPU)
    assert done.returncode == 0, done.stderr
    assert same_within_tolerance(tmp_path / "runs" / "one", tmp_path / "runs" / "four")[1]["num_processes"] == 4
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2")
    launcher += ("--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", "29521")
    launcher += ("--rdzv_backend", "static", "--machine_rank")
    started = [
        subprocess.Popen(
            stage_command("teacher_cps.py", "--recipe", machines, launcher=(*launcher, str(rank))),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **ON_CPU},
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=250)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    metrics = same_within_tolerance(tmp_path / "runs" / "one", tmp_path / "runs" / "machines")
    assert metrics[1]["num_processes"] == 2


@pytest.mark.slow
def test_uneven_shards_of_a_stream_do_not_hang_two_processes(write_recipe, tmp_path):
    (tmp_path / "pool").mkdir()
    features = datasets.Features({"image": datasets.Image()})
    for shard, size in enumerate((1, 40, 3)):
        buffer = io.BytesIO()
        PIL.Image.new("RGB", (40, 40), (shard, 200, 9)).save(buffer, "PNG")
        rows = [{"bytes": buffer.getvalue(), "path": None}] * size
        datasets.Dataset.from_dict({"image": rows}, features=features).to_parquet(
            tmp_path / "pool" / f"{shard}.parquet"
        )
    unlabeled = {"parquet": str(tmp_path / "pool"), "streaming": True, "buffer": 4}
    changes = EXACT | {"data": EXACT["data"] | {"unlabeled": unlabeled}}
    recipe = write_recipe(**changes, optim={"lr": 0.001, "steps": 12})
    done = run_stage("teacher_cps.py", "--recipe", recipe, launcher=torchrun(2, 29523), env=ON_CPU)
    assert done.returncode == 0, done.stderr
    assert "a stream of 44 unlabelled" in done.stdout and "2 process(es)" in done.stdout


@pytest.mark.slow
def test_a_process_that_dies_brings_the_job_down_with_its_error(write_recipe, tmp_path):
    """A file vanishes after the check, and the process that meets it says so; the other does not hang."""
    probe = tmp_path / "sitecustomize.py"
    probe.write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import mgd.data.loaders as loaders\n"
        "    from mgd.errors import UserError\n"
        "    def vanish(self, position):\n"
        "        raise UserError('image 17 cannot be read: No such file or directory')\n"
        "    loaders.TrainingPairs.__getitem__ = vanish\n"
    )
    (recipe,) = recipes(write_recipe, 5, names=("dies",))
    env = {**ON_CPU, "PYTHONPATH": str(tmp_path)}
    began = time.monotonic()
    done = run_stage("teacher_cps.py", "--recipe", recipe, launcher=torchrun(2, 29522), env=env)
    assert done.returncode != 0 and "error: image 17 cannot be read" in done.stderr
    assert time.monotonic() - began < 120
