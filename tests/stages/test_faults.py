"""Runs that are killed, stopped or out of disk, as it happens to a user; then the same command again."""

import json
import random
import signal
import subprocess
import time

import pytest
from conftest import ONLINE, call_stage, log_rows, run_stage, stage_command, steps_done
from safetensors.torch import load_file

TIMES = {"seconds", "images_per_second", "peak_memory_mb", "name", "command"}


def _rows(folder):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in log_rows(folder)]


def same_run(first, second):
    """Every bit of weights, averages, optimiser, log and result; times and names aside."""
    for file in ("model/model.safetensors", "checkpoint/state.safetensors", "best/model.safetensors"):
        here, there = load_file(first / file), load_file(second / file)
        assert here.keys() == there.keys()
        assert [key for key in here if not here[key].equal(there[key])] == []
    assert _rows(first) == _rows(second)
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (first, second)]
    assert {k: v for k, v in metrics[0].items() if k not in TIMES} == {
        k: v for k, v in metrics[1].items() if k not in TIMES
    }


def start(stage, recipe, log):
    """Start a stage; its stderr goes to a file."""
    with open(log, "w") as errors:
        return subprocess.Popen(stage_command(stage, "--recipe", recipe), stdout=subprocess.DEVNULL, stderr=errors)


def kill_at(process, folder, step, number, while_writing=False):
    """Send a signal once this sitting has `step` in the log, or is then writing the next resume point."""
    log, writing = folder / "metrics.jsonl", folder / "checkpoint" / f".state.safetensors.{process.pid}"
    before = log.stat().st_mtime_ns if log.exists() else 0
    while process.poll() is None:
        if log.exists() and log.stat().st_mtime_ns != before and steps_done(folder) >= step:
            break
        time.sleep(0.002)
    while while_writing and process.poll() is None and not writing.exists():
        pass
    process.send_signal(number)
    return process.wait(timeout=60)


def recipes(write_recipe, steps, **changes):
    run = {"checkpoint_every": 2, "log_every": 1}
    common = {"optim": {"steps": steps}, "eval": {"every": 7}} | changes
    return [write_recipe(f"{name}.toml", run={"name": name, **run}, **common) for name in ("whole", "killed")]


def test_killed_stopped_and_started_again_ends_with_the_same_bits(write_recipe, tmp_path, run_here):
    whole, killed = recipes(write_recipe, 16, method={"name": "cps"})
    folder, errors = tmp_path / "runs" / "killed", tmp_path / "errors"
    assert run_here("teacher_cps.py", "--recipe", whole).returncode == 0
    kill_at(start("teacher_cps.py", killed, errors), folder, 5, signal.SIGKILL, while_writing=True)
    assert not (folder / "metrics.json").exists()
    process = start("teacher_cps.py", killed, errors)
    assert kill_at(process, folder, 9, signal.SIGTERM) == 128 + signal.SIGTERM
    (line,) = errors.read_text().splitlines()
    assert line.startswith("error: stopped by SIGTERM; step ") and "of 16 is kept" in line
    assert kill_at(start("teacher_cps.py", killed, errors), folder, 12, signal.SIGINT) == 128 + signal.SIGINT
    (line,) = errors.read_text().splitlines()
    assert line.startswith("error: stopped by SIGINT; step ")
    reached = int(line.split("step ")[1].split()[0])
    again = run_here("teacher_cps.py", "--recipe", killed)
    assert again.returncode == 0 and f"goes on at step {reached}" in again.stdout
    same_run(tmp_path / "runs" / "whole", folder)


@pytest.mark.slow
def test_a_run_that_trains_its_teachers_ends_with_the_same_bits(write_recipe, tmp_path, capsys):
    whole, killed = recipes(write_recipe, 10, method=ONLINE)
    folder = tmp_path / "runs" / "killed"
    assert call_stage(capsys, "teacher_cps.py", "--recipe", whole)[0] == 0
    kill_at(start("teacher_cps.py", killed, tmp_path / "errors"), folder, 4, signal.SIGKILL, while_writing=True)
    assert not (folder / "metrics.json").exists()
    status, printed, _ = call_stage(capsys, "teacher_cps.py", "--recipe", killed)
    assert status == 0 and "goes on at step" in printed
    same_run(tmp_path / "runs" / "whole", folder)
    state = load_file(folder / "checkpoint" / "state.safetensors")
    assert {key.partition("/")[0] for key in state} == {"network0", "network1", "network2", "optimizer"}
    shipped = load_file(folder / "model" / "model.safetensors")
    assert all(value.equal(state[f"network0/{key}"]) for key, value in shipped.items())
    # What ships is a student, and no teacher of another.
    term = {"name": "mgd", "pixel": {"teachers": ["one"]}}
    again = write_recipe("again.toml", method=term, teachers={"one": {"checkpoint": str(folder)}})
    status, _, errors = call_stage(capsys, "distill.py", "--recipe", again)
    assert status == 2 and "is itself a student of teachers" in errors


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cps", "mean_teacher", "mgd", "mgd_online"])
def test_twenty_kills(write_recipe, tmp_path, method):
    stage, changes = "teacher_cps.py", {"method": {"name": method}}
    if method == "mgd":
        stage = "distill.py"
        teacher = write_recipe("teacher.toml", run={"name": "teacher"}, method={"name": "cps"})
        terms = {key: {"teachers": ["one"]} for key in ("pixel", "image", "region")}
        changes = {"method": {"name": "mgd", **terms}, "teachers": {"one": {"recipe": str(teacher)}}}
    if method == "mgd_online":
        changes = {"method": ONLINE}
    whole, killed = recipes(write_recipe, 60, **changes)
    folder = tmp_path / "runs" / "killed"
    assert run_stage(stage, "--recipe", whole).returncode == 0
    draw, landed = random.Random(method), 0
    for index, step in enumerate(sorted(draw.sample(range(1, 59), 20))):
        process = start(stage, killed, tmp_path / "errors")
        landed += kill_at(process, folder, step, signal.SIGKILL, while_writing=index % 2 == 0) == -signal.SIGKILL
    assert landed > 15, "few kills came before the run was through"
    assert run_stage(stage, "--recipe", killed).returncode == 0
    same_run(tmp_path / "runs" / "whole", folder)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_last_resume_point_stays(write_recipe, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    # Room for the networks and optimiser of one resume point (7 MB), not for two.
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        recipe = write_recipe(
            run={"output": str(disk), "checkpoint_every": 1}, method={"name": "cps"}, optim={"steps": 9}
        )
        done = run_stage("teacher_cps.py", "--recipe", recipe)
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert "cannot be written" in line and "what stood there is intact" in line
        state = load_file(disk / "tiny" / "checkpoint" / "state.safetensors")
        assert state["optimizer/0/momentum_buffer"].isfinite().all()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        again = run_stage("teacher_cps.py", "--recipe", recipe)
        assert again.returncode == 0 and "goes on at step 1" in again.stdout
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
