"""The main job as a user runs it: recipes in, a run folder out."""

import importlib.util
import json
import os
import subprocess
import sys

import PIL.Image
import pytest
from conftest import ROOT, call_stage, log_rows, run_stage

RUN_FILES = {
    "recipe.toml",
    "partition.json",
    "metrics.jsonl",
    "metrics.json",
    "curves.png",
    "overlays.png",
    "model/model.safetensors",
    "model/config.json",
    "model/recipe.toml",
    "checkpoint/state.safetensors",
    "best/model.safetensors",
    "best/config.json",
    "best/recipe.toml",
    "best/metrics.json",
}
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--quiet")


def _files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def mgd_recipe(write_recipe, tmp_path):
    """A student under two teachers and beside a baseline, each by its own recipe."""
    write_recipe("deep.toml", run={"name": "deep-s{seed}"}, method={"name": "cps"})
    write_recipe("wide.toml", run={"name": "wide"}, method={"name": "cps"}, student={"backbone": "test_efficientnet"})
    write_recipe("baseline.toml", run={"name": "baseline"})
    terms = {"pixel": {"teachers": ["deep", "wide"]}, "image": {"teachers": ["deep"]}, "region": {"teachers": ["wide"]}}
    return write_recipe(
        "mgd.toml",
        run={"name": "mgd"},
        method={"name": "mgd", **terms},
        teachers={name: {"recipe": str(tmp_path / f"{name}.toml")} for name in ("deep", "wide")},
        eval={"baselines": [str(tmp_path / "baseline.toml")], "every": 2},
    )


def test_baselines_come_first_without_teachers_too(write_recipe, tmp_path, capsys):
    write_recipe("baseline.toml", run={"name": "baseline"})
    path = write_recipe(method={"name": "mean_teacher"}, eval={"baselines": [str(tmp_path / "baseline.toml")]})
    for printed in ("is not finished; training it now", "tiny: finished, mIoU"):
        status, out, err = call_stage(capsys, "teacher_cps.py", "--recipe", path, "--json", tmp_path / "table.json")
        assert status == 0 and printed in out, err
        assert [row["run"] for row in json.loads((tmp_path / "table.json").read_text())] == ["baseline", "tiny"]


def test_the_main_job(mgd_recipe, tmp_path, run_here):
    refused = run_here("distill.py", "--recipe", mgd_recipe, "--no-train-teachers")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "[teachers.deep] is not trained: accelerate launch stages/teacher_cps.py --recipe" in refused.stderr
    assert not (tmp_path / "runs").exists()

    table = tmp_path / "table.json"
    done = run_stage("distill.py", "--recipe", mgd_recipe, "--json", table, launcher=ACCELERATE)
    assert done.returncode == 0, done.stderr
    rows = json.loads(table.read_text())
    assert [row["run"] for row in rows] == ["deep-s0", "wide", "baseline", "mgd"]
    assert all(row["labelled"] == 4 and row["unlabelled"] == 8 for row in rows)
    assert "deep: " in done.stdout and "is not finished; training it now" in done.stdout

    run = tmp_path / "runs" / "mgd"
    assert _files(run) == RUN_FILES
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["num_processes"] == 1 and metrics["steps"] == 4 and 0 <= metrics["miou"] <= 100
    assert len(metrics["iou"]) == 7 and metrics["versions"]["torch"] and metrics["peak_memory_mb"] > 0
    steps = [row["step"] for row in log_rows(run) if "loss" in row]
    assert steps == [1, 2, 3, 4] and [row["step"] for row in log_rows(run) if "val_miou" in row] == [2, 4]
    assert {"loss_supervised", "loss_pixel_labeled", "loss_image", "loss_region", "lr"} <= set(log_rows(run)[0])
    manifests = [json.loads((tmp_path / "runs" / name / "partition.json").read_text()) for name in ("deep-s0", "mgd")]
    assert manifests[0]["labeled"] == manifests[1]["labeled"] and manifests[0]["num_unlabeled"] == 8
    with PIL.Image.open(run / "overlays.png") as picture:
        assert picture.width > 900

    again = run_here("distill.py", "--recipe", mgd_recipe)
    assert again.returncode == 0 and "finished, mIoU" in again.stdout

    # A stage started inside stages/ must not find its own evaluate.py in place of the package.
    scored = run_stage("evaluate.py", "--model", run, "--json", tmp_path / "e.json", cwd=ROOT / "stages")
    assert scored.returncode == 0, scored.stderr
    classes = {row["class"]: row["IoU %"] for row in json.loads((tmp_path / "e.json").read_text())}
    assert classes["mean"] == pytest.approx(metrics["miou"], abs=1e-9)


@pytest.mark.parametrize(
    "start", [["stages/distill.py"], ["-m", "cProfile", "stages/distill.py"], ["-m", "evaluate"]], ids=" ".join
)
def test_no_stage_hides_the_evaluate_package(start, tmp_path):
    inside = "stages" not in start[-1]
    probe = tmp_path / "sitecustomize.py"  # runs before the stage, and looks once the stage is set up
    probe.write_text(
        "import atexit\n"
        "def look():\n"
        "    import importlib.util\n"
        "    print('evaluate is', importlib.util.find_spec('evaluate').origin)\n"
        "atexit.register(look)\n"
    )
    done = subprocess.run(
        [sys.executable, *start, "--help"],
        cwd=ROOT / "stages" if inside else ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    origin = done.stdout.partition("evaluate is ")[2].strip()
    assert origin.endswith(os.path.join("evaluate", "__init__.py"))


def test_bad_input_is_one_line(write_recipe, tmp_path, run_here):
    recipe = write_recipe(data={"name": "camvid", "root": str(tmp_path / "nowhere")})
    text = recipe.read_text()
    for key in ("num_train", "num_val", "size"):
        text = "\n".join(line for line in text.splitlines() if not line.startswith(f"{key} ="))
    recipe.write_text(text)
    done = run_here("teacher_cps.py", "--recipe", recipe)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: [data] root: the folder") and not (tmp_path / "runs").exists()
    done = run_here("prepare.py", "--recipe", write_recipe(), "--set", 'data.classes=["a",', '"b"]')
    assert done.returncode == 2 and "a value with blanks or quotes wants quotes of the shell: --set '" in done.stderr
    done = run_here("benchmark.py", "--recipe", write_recipe(), "--suite", "data", "--target-ms", "3")
    assert done.returncode == 2 and done.stderr == "error: --target-ms does nothing for --suite data; leave it out\n"
    done = run_here("benchmark.py", "--recipe", write_recipe(), "--set", "optim.batch_size=1")
    assert done.returncode == 2 and done.stderr.startswith("error: [optim] batch_size leaves one image a process")


def test_costs_tell_a_teacher_of_any_name_from_the_student(write_recipe, mgd_recipe, run_here, tmp_path):
    text = mgd_recipe.read_text()
    assert "[teachers.deep]" in text and '"deep"' in text
    mgd_recipe.write_text(text.replace("[teachers.deep]", "[teachers.student]").replace('"deep"', '"student"'))
    done = run_here("benchmark.py", "--recipe", mgd_recipe, "--json", tmp_path / "costs.json")
    assert done.returncode == 0, done.stderr
    networks = {row["network"] for row in json.loads((tmp_path / "costs.json").read_text())}
    assert networks == {"student", "teachers.student", "teachers.wide"}


def test_the_demo_says_what_it_needs(tmp_path, run_here, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else find(name, *rest)
    )
    done = run_here("demo.py", "--model", tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: the demo needs gradio: pip install -e '.[demo]'\n")
