"""Many cells by one command: each once, whatever is in between."""

import contextlib
import json
import multiprocessing
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import call_stage, run_stage, stage_command, steps_done

import mgd.locks
from mgd.locks import claim, hold, is_held, is_taken
from mgd.needed import folders_of
from mgd.recipe import load


@pytest.fixture
def cells(write_recipe, tmp_path):
    """A baseline, and a student whose teacher's recipe comes along."""
    student = {"student": {"head": {"channels": 8}}}
    teacher = write_recipe("teacher.toml", run={"name": "teacher-s{seed}"}, method={"name": "cps"})
    alone = write_recipe("alone.toml", run={"name": "alone-s{seed}"}, **student)
    under = write_recipe(
        "under.toml",
        run={"name": "under-s{seed}"},
        teachers={"big": {"recipe": str(teacher)}},
        method={"name": "kd", "distill_from": ["big"]},
        **student,
    )
    return [alone, under]


def test_every_cell_is_run_once(cells, tmp_path, capsys):
    table = tmp_path / "table.json"
    status, _, err = call_stage(capsys, "sweep.py", *cells, "--seeds", "0", "--json", table)
    assert status == 0, err
    assert [row["run"] for row in json.loads(table.read_text())] == ["alone-s0", "under-s0"]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/metrics.json")}
    assert {path.parent.name for path in written} == {"alone-s0", "under-s0", "teacher-s0"}

    status, out, err = call_stage(capsys, "sweep.py", *cells, "--seeds", "0", "--json", table)
    assert status == 0 and "[" not in out, "nothing is left to be done"
    assert written == {path: path.stat().st_mtime_ns for path in written}
    rows = json.loads(table.read_text())
    for row in rows:
        assert row["val mIoU %"] == json.loads((tmp_path / "runs" / row["run"] / "metrics.json").read_text())["miou"]

    launch = ("--launch", "false")  # the cells of seed 0 stand between and beside some that fail
    status, out, err = call_stage(capsys, "sweep.py", *cells, "--seeds", "1", "0", "2", "--json", table, *launch)
    assert status == 2 and "4 of 6 did not finish: alone-s1, under-s1, alone-s2, under-s2" in err
    assert out.count("ended with status 1 and left no result") == 4
    again = json.loads(table.read_text())
    assert again[2:4] == rows and again[0].keys() == rows[0].keys() and again[0]["val mIoU %"] is None


@pytest.mark.slow
def test_a_cell_that_fails_leaves_the_others_alone(cells, tmp_path):
    (tmp_path / "runs" / "alone-s1" / "metrics.jsonl").mkdir(parents=True)  # cannot be written
    result = run_stage("sweep.py", cells[0], "--seeds", "0", "1", "--set", "optim.steps=2")
    assert result.returncode == 2 and "alone-s1" in result.stderr.splitlines()[-1]
    assert "metrics.jsonl cannot be read: Is a directory" in result.stderr
    assert "1 of 2 did not finish" in result.stderr and "Traceback" not in result.stderr
    assert (tmp_path / "runs" / "alone-s0" / "metrics.json").exists()
    first, last = (line.split("|")[1:-1] for line in result.stdout.splitlines()[-2:])
    assert first[0].strip() == "alone-s0" and float(first[5]) >= 0
    assert last[0].strip() == "alone-s1" and last[5].strip() == "-"


@pytest.mark.parametrize("take", [hold, claim])
def test_what_others_are_at_or_about_to_start_is_waited_for(cells, tmp_path, capsys, monkeypatch, take):
    teacher, held = tmp_path / "runs" / "teacher-s0", contextlib.ExitStack()
    assert not is_taken(teacher)
    held.enter_context(take(teacher))
    assert is_taken(teacher) and is_held(teacher) == (take is hold)
    monkeypatch.setattr(time, "sleep", lambda seconds: held.close())  # the other ends as soon as it is waited for
    status, out, err = call_stage(capsys, "sweep.py", *reversed(cells), "--launch", "false")
    assert status == 2 and "2 of 2 did not finish: under-s0, alone-s0" in err and not is_taken(teacher)
    order = [line for line in out.splitlines() if line.startswith(("[", "waiting"))]
    assert "alone.toml" in order[0] and order[1].startswith("waiting: all of the 1 left") and "under.toml" in order[2]


def test_others_are_told_of_a_run_while_its_stage_still_loads(cells, tmp_path, capsys):
    """Of many sweeps that are started together each would else load every stage in turn, to find another at it."""
    folder, launcher = tmp_path / "runs" / "alone-s0", tmp_path / "launcher"
    ask = f"from mgd.locks import *; from pathlib import Path; exit(7 if is_taken(Path({str(folder)!r})) else 3)"
    launcher.write_text(f'#!/bin/sh\n{sys.executable} -c "{ask}"\n')
    launcher.chmod(0o755)
    status, out, _ = call_stage(capsys, "sweep.py", cells[0], "--launch", launcher)
    assert status == 2 and "ended with status 7 and left no result" in out and not is_taken(folder)


def test_a_run_that_another_sweep_claims_in_the_same_moment_is_tried_again(cells, tmp_path, capsys, monkeypatch):
    other = contextlib.ExitStack()
    other.enter_context(claim(tmp_path / "runs" / "alone-s0"))

    seen = iter([False])  # it seems to be free
    monkeypatch.setattr(mgd.locks, "is_taken", lambda folder: next(seen, is_taken(folder)))
    monkeypatch.setattr(time, "sleep", lambda seconds: seconds > 1 and other.close())  # the other ends, waited for
    status, out, err = call_stage(capsys, "sweep.py", cells[0], "--launch", "false")
    assert status == 2 and "waiting" in out and "[1/1]" in out and "ended with status 1" in out, out + err


def test_a_run_that_is_being_written_is_known_however_it_is_named(cells, tmp_path, monkeypatch):
    teacher = tmp_path / "runs" / "teacher-s0"
    (teacher / "model").mkdir(parents=True)
    (teacher / "partition.json").write_text("{}")
    monkeypatch.chdir(teacher)
    for place in (".", "model", teacher, teacher / "model"):
        recipe = load(cells[1], [f"teachers.big={{checkpoint={str(place)!r}}}"])
        assert not any(map(is_held, folders_of(recipe, {})))
        with hold(teacher):
            assert any(map(is_held, folders_of(recipe, {}))), place


def test_a_stage_that_finds_another_at_its_run_is_started_again(cells, tmp_path, capsys):
    with hold(tmp_path / "runs" / "alone-s0"):
        status, _, err = call_stage(capsys, "teacher_cps.py", "--recipe", cells[0])
    assert status == 75 and "is being written by another process" in err
    launcher = tmp_path / "launcher"  # the first time another process is quicker, the second time it fails
    launcher.write_text(f"#!/bin/sh\nif mkdir {tmp_path}/tried 2>/dev/null; then exit 75; fi; exit 3\n")
    launcher.chmod(0o755)
    status, out, err = call_stage(capsys, "sweep.py", cells[0], "--launch", launcher)
    assert status == 2 and out.count("[1/1]") == 2 and "ended with status 3 and left no result" in out


def test_a_launcher_that_hides_the_status_does_not_make_a_cell_fail(cells, tmp_path, capsys):
    """As Accelerate's and torchrun do: 75 becomes 1."""
    folder, launcher, tried = tmp_path / "runs" / "alone-s0", tmp_path / "launcher", tmp_path / "tried"
    imports = "from pathlib import Path\nfrom time import sleep\nfrom mgd.locks import hold\n"
    hold_it = f"with hold(Path({str(folder)!r})):\n    Path({str(tried)!r}).touch()\n    sleep(3)\n"
    (tmp_path / "holder.py").write_text(imports + hold_it)
    again = f"test -e {tried} && exit 1\n{sys.executable} {tmp_path / 'holder.py'} &\n"
    launcher.write_text(f"#!/bin/sh\n{again}until test -e {tried}; do sleep 0.05; done\nexit 1\n")
    launcher.chmod(0o755)
    status, out, err = call_stage(capsys, "sweep.py", cells[0], "--launch", launcher)
    assert status == 2 and out.count("[1/1]") == 2 and "ended with status 1 and left no result" in out


def test_a_process_that_outlives_the_holder_of_a_folder_does_not_hold_it(tmp_path):
    with hold(tmp_path / "run"):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        assert is_held(tmp_path / "run")
    try:
        until = time.monotonic() + 20  # the child may not have begun yet
        while is_held(tmp_path / "run") and time.monotonic() < until:
            time.sleep(0.05)
        assert not is_held(tmp_path / "run")
    finally:
        child.kill()
        child.join()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, which no byte fits on")
def test_a_full_disk_does_not_keep_a_folder_from_being_held(tmp_path):
    (tmp_path / ".run.lock").symlink_to("/dev/full")
    with hold(tmp_path / "run"):
        assert is_held(tmp_path / "run")


def test_cells_that_would_share_a_folder_are_refused_before_anything_runs(cells, tmp_path, capsys):
    teacher = tmp_path / "teacher.toml"
    status, out, err = call_stage(capsys, "sweep.py", *cells, teacher, "--set", "optim.steps=2", "--launch", "false")
    assert status == 2 and not out
    assert re.search(r"big of .*under.toml, seed 0, .* and the run of .*teacher.toml, seed 0, .* would share", err)
    assert "optim.steps 4 there, 2 here" in err


@pytest.mark.slow
def test_a_signal_stops_the_cell_that_is_running_and_the_same_command_goes_on(cells, tmp_path):
    arguments = (cells[0], "--seeds", "0", "1", "--set", "optim.steps=400", "--set", "run.checkpoint_every=1000")
    first, second = (tmp_path / "runs" / f"alone-s{seed}" for seed in (0, 1))
    process = subprocess.Popen(stage_command("sweep.py", *arguments), stderr=subprocess.PIPE, text=True)
    while steps_done(first) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and not second.exists()
    assert "alone-s0 holds is kept; the same command goes on" in errors.splitlines()[-1]
    assert (first / "checkpoint" / "state.safetensors").exists() and not (first / "metrics.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "run.name=same"], "give each a [run] name of its own, with {seed}"),
        (["--set", "optim.lr=fast"], "[optim] lr"),
        (["--set", "run.seed=5"], "--set run.seed=5: the seeds of a sweep are given by --seeds"),
        (["--launch", "'open"], 'argument --launch: "\'open": No closing quotation'),
        (["--launch", "no-such-launcher"], "argument --launch: 'no-such-launcher': no such program"),
    ],
)
def test_bad_input_gets_one_line(cells, tmp_path, capsys, more, message):
    status, _, err = call_stage(capsys, "sweep.py", cells[0], "--seeds", "0", "1", *more)
    assert status == 2 and message in err and "Traceback" not in err
    assert not list(tmp_path.glob("runs/*/metrics.json"))


def test_a_launcher_that_leaves_nothing_and_a_cell_named_twice(cells, tmp_path, capsys):
    status, out, err = call_stage(capsys, "sweep.py", cells[0], cells[0], "--launch", "true")
    assert status == 2 and "[1/1]" in out and "ended with status 0 and left no result" in out
    assert "1 of 1 did not finish: alone-s0" in err


@pytest.mark.slow
def test_the_launcher_is_asked(cells, tmp_path):
    launcher = f"{sys.executable} -m accelerate.commands.launch --cpu --num_processes 1"
    result = run_stage("sweep.py", cells[0], "--launch", launcher)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs" / "alone-s0" / "metrics.json").exists()
