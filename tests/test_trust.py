"""What comes from outside is data: it is never code, and never leads out of its place."""

import ast
import contextlib
import json

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT
from safetensors.torch import load_file, save_file

from mgd.data.datasets import by_stem, default_colors
from mgd.errors import UserError
from mgd.experiment import run_recipe
from mgd.models.segmenter import build_segmenter, load_segmenter
from mgd.predictions import save_prediction
from mgd.recipe import load

SOURCES = [path for folder in ("mgd", "stages", "recipes") for path in (ROOT / folder).rglob("*.py")]
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "subprocess", "yaml"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "os.system", "os.popen", "torch.save", "__import__"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_the_source_runs_nothing_from_outside(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            # A sweep starts our own stages, word by word; nothing goes through a shell.
            allowed = {"subprocess"} if path.name == "sweep.py" else set()
            assert not {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_MODULES - allowed
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in FORBIDDEN_MODULES
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert name not in FORBIDDEN_CALLS
            assert not keywords.keys() & {"trust_remote_code", "shell"}
            assert keywords.get("allow_pickle", "False") == "False"
            if name.endswith("torch.load") or name == "torch.load":
                assert keywords.get("weights_only") == "True"


@pytest.fixture
def model(write_recipe, tmp_path):
    recipe = load(write_recipe())
    classes = recipe.data.class_names()
    build_segmenter(recipe.student, classes, default_colors(len(classes)), seed=0).save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("backbone", "hf-hub:someone/evil", "may hold letters, digits"),
        ("backbone", "hf_hub:someone/evil", "may hold letters, digits"),
        ("backbone", "local-dir:/etc", "may hold letters, digits"),
        ("backbone", "../../evil", "may hold letters, digits"),
        ("backbone", "os.system", "has no such model"),
        ("head", {"name": "os.system"}, "unknown head 'os.system'"),
        ("head", {"name": "builtins:exec", "channels": 1}, "unknown head 'builtins:exec'"),
        ("auto_map", {"AutoModel": "evil.Model"}, "auto_map: unknown key"),
        ("pretrained", "__import__('os').system('touch pwned')", "should be a valid boolean"),
        ("pretrained", True, None),  # which is about the weights that training begins with
    ],
)
def test_a_config_cannot_import_or_fetch(model, tmp_path, monkeypatch, key, value, message):
    config = json.loads((model / "config.json").read_text())
    config["model"][key] = value
    (model / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)

    asked = []
    monkeypatch.setattr("socket.socket.connect", lambda *address: asked.append(address))
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        load_segmenter(model)
    assert not asked and not (tmp_path / "pwned").exists()


def test_tampered_weights_are_refused(model):
    path = model / "model.safetensors"
    weights = load_file(path)
    name = next(key for key, tensor in weights.items() if tensor.is_floating_point())
    for tensor, message in (
        (weights[name] * float("nan"), "no number"),
        (weights[name].long(), "int64, not torch.float32"),
    ):
        save_file(weights | {name: tensor}, path)
        with pytest.raises(UserError, match=message):
            load_segmenter(model)
    (model / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="config.json cannot be read"):
        load_segmenter(model)


BOMB = b"cos\nmkdir\n(Vpwned\ntR."  # a pickle that makes a folder when it is opened


def test_a_pickle_in_a_model_folder_is_not_opened(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (model / "pytorch_model.bin").write_bytes(BOMB)
    load_segmenter(model)
    (model / "model.safetensors").write_bytes(BOMB)
    with pytest.raises(UserError, match="model.safetensors cannot be read"):
        load_segmenter(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors cannot be read"):
        load_segmenter(model)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/../../out", "..\x00"])
def test_an_id_cannot_lead_out_of_the_folder(tmp_path, name):
    folder = tmp_path / "predictions"
    before = set(tmp_path.rglob("*"))
    with pytest.raises((UserError, ValueError)):
        save_prediction(folder, [(0, 0, 0)] * 2, lambda classes: classes, name, torch.zeros(2, 2, dtype=torch.uint8))
    assert set(tmp_path.rglob("*")) - before <= {folder}


def test_file_names_are_only_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for name in ("$(touch pwned)", "`touch pwned`", "; touch pwned", "{0.__class__}", "%s%n", "-rf"):
        PIL.Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "images" / f"{name}.png")
    assert len(by_stem(tmp_path / "images")) == 6 and not (tmp_path / "pwned").exists()


def test_tokens_stay_out_of_everything_that_is_written(write_recipe, monkeypatch, capsys):
    secret = "hf_averysecrettokenindeed"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, secret)
    recipe = load(write_recipe(), ["eval.every=1"])
    run_recipe(recipe, Accelerator())
    written = [path for path in recipe.run_dir.rglob("*") if path.is_file()]
    assert len(written) > 10 and not [path for path in written if secret.encode() in path.read_bytes()]
    out, err = capsys.readouterr()
    assert secret not in out + err
