"""The stage as a user starts it: one process or two, and the way out of each mistake."""

import pytest
from conftest import run_stage, torchrun

from mgd.models.segmenter import build_segmenter
from mgd.recipe import load

TERMS = {"pixel": {"teachers": ["a"]}, "image": {"teachers": ["a"]}, "region": {"teachers": ["a"], "grid": 3}}


def recipe_of(write_recipe, tmp_path, mode="cached"):
    base = load(write_recipe())
    classes = base.data.class_names()
    build_segmenter(base.student, classes, [(0, 0, 0)] * len(classes), 1).save(tmp_path / "a")
    teachers = {"mode": mode, "a": {"checkpoint": str(tmp_path / "a")}}
    method = {"name": "mgd", "remix": "predictions", **TERMS}
    cache = {"cache": {"cell": 8}} if mode == "cached" else {}
    return write_recipe(teachers=teachers, method=method, data={"num_train": 70, "workers": 1}, **cache)


@pytest.mark.xdist_group("ports")  # of fixed numbers
@pytest.mark.slow
def test_two_processes_write_what_one_does(write_recipe, tmp_path):
    recipe = recipe_of(write_recipe, tmp_path)
    done = run_stage("cache_teachers.py", "--recipe", recipe, "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr
    assert "same class %" in done.stdout and "70 images, " in done.stdout and (tmp_path / "rows.json").exists()
    done = run_stage(
        *("cache_teachers.py", "--recipe", recipe, "--set", "cache.folder=two"),
        launcher=torchrun(2, 29541),
        env={"ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr
    one, two = (sorted((tmp_path / "runs" / name).glob("[ms]*")) for name in ("teacher_cache-s0", "two"))
    assert [path.name for path in one] == [path.name for path in two] and len(one) == 4
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_online_teachers_have_no_cache(write_recipe, tmp_path, run_here):
    done = run_here("cache_teachers.py", "--recipe", recipe_of(write_recipe, tmp_path, mode="online"))
    assert done.returncode == 2 and "error: " in done.stderr and "--set teachers.mode=cached" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_damaged_shard_ends_a_run_with_workers_at_once(write_recipe, tmp_path):
    """Workers do not heed SIGTERM; the run must not wait for them for ever."""
    recipe = recipe_of(write_recipe, tmp_path)
    assert run_stage("cache_teachers.py", "--recipe", recipe).returncode == 0
    for path in (tmp_path / "runs" / "teacher_cache-s0").glob("shard-*"):
        content = bytearray(path.read_bytes())
        for place in range(len(content) // 2, len(content), 97):
            content[place] ^= 1
        path.write_bytes(content)
    done = run_stage("distill.py", "--recipe", recipe)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "is damaged" in done.stderr and "this mends it: accelerate launch stages/cache_teachers.py" in done.stderr
