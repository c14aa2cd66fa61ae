import importlib.util
import json
import re

import numpy as np
import PIL.Image
import pytest
from accelerate import Accelerator
from conftest import call_stage

from mgd.experiment import run_recipe
from mgd.recipe import load
from mgd.registry import EXPORTERS

pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    import tomli_w
    from conftest import TINY, merged

    folder = tmp_path_factory.mktemp("export")
    path = folder / "tiny.toml"
    path.write_text(tomli_w.dumps(merged(TINY, {"run": {"output": str(folder / "runs")}})))
    recipe = load(path)
    run_recipe(recipe, Accelerator())
    return recipe.run_dir


def test_a_run_becomes_a_file_that_runs_without_us(run, run_here):
    import onnxruntime

    arguments = ("--format", "onnx", "--size", "48x64", "--bake", "--samples", 4, "--set", " data . workers = 0")
    ran = run_here("export.py", "--model", run, *arguments)
    assert ran.returncode == 0, ran.stderr
    assert not ran.stderr
    path = run / "export" / "model-48x64-baked.onnx"
    pixels = np.random.default_rng(0).integers(256, size=(1, 3, 48, 64), dtype=np.uint8)
    classes = onnxruntime.InferenceSession(path).run(None, {"image": pixels})[0]
    assert classes.shape == (1, 48, 64) and classes.dtype == np.uint8
    facts = json.loads((run / "export" / "model-48x64-baked.onnx.json").read_text())
    assert facts["same class %"] > 99.9 and facts["images"] == 4 and facts["baked"] and facts["p95 ms"] > 0
    assert facts["mIoU %"] == pytest.approx(facts["network's mIoU %"], abs=0.5)
    assert facts["versions"]["onnxruntime"] == onnxruntime.__version__
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, f"{path.name}.json"]


def test_tried_on_a_folder_of_images(run, tmp_path, capsys):
    (tmp_path / "pool").mkdir()
    for index in range(4):
        pixels = np.random.default_rng(index).integers(256, size=(60, 50, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / "pool" / f"{index}.png")
    arguments = ("--model", run, "--format", "torch_export", "--size", "48x48", "--images", tmp_path / "pool")
    status, out, error = call_stage(capsys, "export.py", *arguments, "--output", tmp_path / "out")
    assert status == 0, error
    assert "model-48x48.pt2 | " in out and (tmp_path / "out" / "model-48x48.pt2").stat().st_size > 0
    facts = json.loads((tmp_path / "out" / "model-48x48.pt2.json").read_text())
    assert facts["mIoU %"] is None and facts["images"] == 4
    (tmp_path / "pool" / "2.png").write_bytes(b"no picture")
    status, out, error = call_stage(capsys, "export.py", *arguments, "--output", tmp_path / "out")
    assert status == 0, error
    assert re.search(r"note: left out: .*2\.png", out)
    assert json.loads((tmp_path / "out" / "model-48x48.pt2.json").read_text())["images"] == 3
    for index in (0, 1, 3):
        (tmp_path / "pool" / f"{index}.png").write_bytes(b"")
    status, _, error = call_stage(capsys, "export.py", *arguments, "--output", tmp_path / "out")
    assert status == 2 and "none of the 4 images tried can be read" in error


def test_bad_input_is_one_line(run, tmp_path, capsys):
    for arguments, message in (
        (("--format", "onx"), "unknown format 'onx'; did you mean 'onnx'"),
        (("--format", "torch_export", "--int8"), "has no --int8 here; formats that have: executorch, onnx, openvino"),
        (("--format", "onnx", "--cpu"), "--cpu is for --bake with --format onnx"),
        (("--format", "torch_export", "--bake", "--cpu"), "--cpu is for --bake with --format onnx"),
        (("--format", "onnx", "--max-drop", "abc"), "--max-drop: abc is no number of points, 0 to 100"),
        (("--format", "onnx", "--size", "12"), "'12' is no size; HEIGHTxWIDTH"),
        (("--format", "onnx", "--images", tmp_path / "none"), "no image there"),
        (("--format", "onnx", "--recipe", tmp_path / "none.toml"), "none.toml is not there"),
        (("--format", "onnx", "--set", " optim.lr=3"), "--set optim.lr=3: an export reads the images alone"),
    ):
        status, _, error = call_stage(capsys, "export.py", "--model", run, *arguments, "--output", tmp_path / "out")
        assert status == 2 and message in error, error
        assert not (tmp_path / "out").exists()


def test_what_cannot_be_converted_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(EXPORTERS.get("torch_export"), "write", fails)
    status, _, error = call_stage(
        capsys, "export.py", "--model", run, "--format", "torch_export", "--output", tmp_path / "new" / "out"
    )
    assert status == 2 and "--format torch_export cannot take" in error and "no such operator" in error
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(run, monkeypatch, capsys):
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, find=importlib.util.find_spec: None if name == "onnxscript" else find(name),
    )
    status, _, error = call_stage(capsys, "export.py", "--model", run, "--format", "onnx")
    assert status == 2 and 'onnxscript is not installed; pip install -e ".[onnx]"' in error
