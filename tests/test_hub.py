"""Pushed to a hub on loopback, and loaded from it on what is as good as another machine."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tomli_w
import torch
from accelerate import Accelerator
from conftest import ONLINE, ROOT, TINY, merged
from hub_server import READER, WRITER, Hub, Repository
from huggingface_hub import ModelCard, constants
from safetensors.torch import load, load_file, save_file

from mgd.errors import UserError
from mgd.experiment import run_recipe
from mgd.hub import model_card, open_run, push, write_folder
from mgd.models.segmenter import Segmenter, load_segmenter
from mgd.portable import portable, portable_command
from mgd.recipe import load as load_recipe

pytestmark = pytest.mark.xdist_group("hub")  # all share one run, one hub and one process

FILES = {"README.md", "config.json", "metrics.json", "model.safetensors", "overlays.png", "recipe.toml"}

# One process does what is asked line by line: to import torch takes longer than all of it.
ELSEWHERE = """
import json, sys
for line in sys.stdin:
    script, given = json.loads(line)
    exec(script, {"given": given})
"""

PUSHES = """
import contextlib, io, json, os, runpy, sys, traceback
done = {}
for name, (argv, token) in given.items():
    os.environ.pop("HF_TOKEN", None)
    os.environ.update({"HF_TOKEN": token} if token else {})
    sys.argv, code, out, err = ["push.py", *argv], 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(os.environ["STAGE"], run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            code = traceback.format_exc()
    done[name] = [code, out.getvalue(), err.getvalue()]
os.environ.pop("HF_TOKEN", None)
print(json.dumps(done), flush=True)
"""

LOADS = """
import json, runpy
import torch
from safetensors.torch import save_file
from mgd.errors import UserError
from mgd.models.segmenter import Segmenter
torch.set_num_threads(1)  # as the tests: on some processors other numbers round otherwise
image = torch.arange(3 * 40 * 56).view(1, 3, 40, 56).remainder(256).to(torch.uint8)
refused, logits = {}, {}
with torch.inference_mode():
    for name, (repo, download) in given["loads"].items():
        try:
            model = Segmenter.from_pretrained(repo, **download)
            logits[name] = model(image).logits.contiguous()
        except UserError as error:
            refused[name] = str(error)
    model = Segmenter.from_pretrained("org/tiny")
    model.push_to_hub("org/plain", token=given["token"], model_card_kwargs={"license": "mit"})
    logits["plain"] = Segmenter.from_pretrained("org/plain")(image).logits.contiguous()
save_file(logits, "logits.safetensors")
runpy.run_path("snippet.py")
print(json.dumps(refused), flush=True)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def run(root):
    """A finished run whose recipe and command name places on this machine."""
    torch.set_num_threads(1)
    path = root / "tiny.toml"
    path.write_text(tomli_w.dumps(TINY))
    recipe = load_recipe(path, [f"run.output={root / 'runs of mine'}", "eval.flip=true"])
    run_recipe(recipe, Accelerator())
    return recipe.run_dir


def altered(run, name, recipe=None, metrics=None):
    """Copy a run; change its recipe and its metrics."""
    folder = run.parent / name
    shutil.copytree(run, folder)
    table = merged(tomllib.loads((run / "recipe.toml").read_text()), recipe or {})
    (folder / "recipe.toml").write_text(tomli_w.dumps(table))
    numbers = json.loads((run / "metrics.json").read_text()) | (metrics or {})
    (folder / "metrics.json").write_text(json.dumps(numbers))
    return folder


def trained_on(run, name):
    """Copy a run; its weights are others."""
    folder = altered(run, name)
    path = folder / "model" / "model.safetensors"
    tensors = {key: tensor * 1.5 if tensor.is_floating_point() else tensor for key, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def hub():
    with Hub() as server:
        yield server


@pytest.fixture(scope="module")
def elsewhere(hub, root):
    """Return what runs Python in a process with a hub, a cache and a login of its own, and returns what it prints."""
    home = root / "elsewhere"
    home.mkdir()
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    env |= {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": paths}
    env["STAGE"] = str(ROOT / "stages" / "push.py")
    with (
        open(home / "stderr", "w") as errors,
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", ELSEWHERE],
            **dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=home, env=env),
        ) as process,
    ):

        def ask(script, given):
            process.stdin.write(json.dumps([script, given]) + "\n")
            process.stdin.flush()
            answer = next((line for line in process.stdout if line.startswith("{")), None)
            assert answer, (home / "stderr").read_text()
            return json.loads(answer)

        yield ask
        process.stdin.close()


REFUSED = {  # name -> what is said
    "no token": "does not know you; log in with `hf auth login`, or set HF_TOKEN .*; nothing was committed",
    "may only read": "your token may not write there; log in with one that may",
    "may only read, there": "your token may not write there; log in with one that may",
    "no org": "'tiny' is no name of a repository; expected org/name",
    "bad id": "'org/a b' is no name of a repository; expected org/name",
    "too deep": "'a/b/c' is no name of a repository; expected org/name",
    "public already": "org/tiny is there already and public; make it private in its settings",
    "no metrics": r"a run that is not finished \(it lacks metrics.json\); the command that began it goes on with it",
    "no model": r"a run that is not finished \(it lacks model/model.safetensors\)",
    "no run": "no recipe.toml there; give the folder of a run",
    "torn weights": "model.safetensors cannot be read",
    "other classes": "metrics.json and model/config.json have other classes",
    "no such licence": r'the card is refused: .*"license" must be one of .*repositories-licenses',
    "into a full folder": "is not empty; give an empty folder",
}


@pytest.fixture(scope="module")
def pushed(run, elsewhere, root):
    """Push whatever can be pushed; return exit status and output by name."""
    for name in ("no metrics", "no model", "torn weights"):
        altered(run, name)
    (run.parent / "no metrics" / "metrics.json").unlink()
    (run.parent / "no model" / "model" / "model.safetensors").unlink()
    (run.parent / "torn weights" / "model" / "model.safetensors").write_bytes(b"torn")
    altered(run, "other classes", metrics={"iou": {"a": 1.0}})
    second = trained_on(run, "second")

    def case(folder, repo, *more, token=WRITER):
        return [["--run", str(folder), "--repo", repo, *map(str, more)], token]

    cases = {
        "first": case(run, "org/tiny"),
        "same": case(run, "org/tiny"),
        "second": case(second, "org/tiny", "--license", "apache-2.0"),
        "private": case(run, "org/secret", "--private"),
        "no token": case(run, "org/new", token=None),
        "may only read": case(run, "org/new", token=READER),
        "may only read, there": case(run, "org/tiny", token=READER),
        "no org": case(run, "tiny"),
        "bad id": case(run, "org/a b"),
        "too deep": case(run, "a/b/c"),
        "public already": case(run, "org/tiny", "--private"),
        "no such licence": case(run, "org/new", "--license", "mine"),
        "into a full folder": case(run, "org/new", "--dry-run", ROOT),
        "dry run": case(run, "org/new", "--dry-run", root / "dry", token=None),
    }
    for name in ("no metrics", "no model", "no run", "torn weights", "other classes"):
        cases[name] = case(run.parent / name, "org/new")
    return elsewhere(PUSHES, cases)


DAMAGED = ("org/half", "org/odd", "org/less", "org/torn")


@pytest.fixture(scope="module")
def loaded(pushed, elsewhere, hub, root):
    """Load what was pushed, and damaged copies of it; return the folder, and what was refused."""
    (first, _), files = hub.repos["org/tiny"].commits[1], hub.repos["org/tiny"].files()
    config = json.loads(files["config.json"])
    weights = load(files["model.safetensors"])
    key = next(key for key, tensor in weights.items() if tensor.ndim == 4)
    save_file({other: tensor for other, tensor in weights.items() if other != key}, root / "less.safetensors")
    less = (root / "less.safetensors").read_bytes()
    damaged = {
        "org/half": {"config.json": json.dumps(config | {"classes": ["a"], "colors": [[0, 0, 0]]}).encode()},
        "org/odd": {"config.json": b"[]"},
        "org/less": {"model.safetensors": less},
        "org/torn": {"model.safetensors": files["model.safetensors"][:-9]},
    }
    assert tuple(damaged) == DAMAGED
    for repo, changes in damaged.items():
        hub.repos[repo] = Repository(private=False)
        hub.repos[repo].commit(files | changes)
    loads = {repo: (repo, {}) for repo in (*DAMAGED, "org/tiny", "org/secret", "org/nowhere")}
    loads |= {"before": ("org/tiny", {"revision": first}), "with token": ("org/secret", {"token": WRITER})}
    (root / "elsewhere" / "snippet.py").write_text(snippet(files["README.md"].decode()))
    return root / "elsewhere", elsewhere(LOADS, {"loads": loads, "token": WRITER})


def snippet(card):
    """The Python of a card, as a reader copies it."""
    return re.search(r"^```python\n(.*?)^```$", card, re.M | re.S)[1]


def test_a_push_is_one_commit_and_a_second_one_replaces_it(pushed, hub, run):
    assert pushed["first"] == [0, f"{hub.url}/org/tiny\n", ""]
    assert pushed["second"][:2] == [0, f"{hub.url}/org/tiny\n"]
    (_, empty), (_, first), (_, second) = hub.repos["org/tiny"].commits  # nothing new, nothing committed
    assert not empty and set(first) == set(second) == FILES
    assert first["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()
    assert first["config.json"] == (run / "model" / "config.json").read_bytes()
    assert first["overlays.png"] == second["overlays.png"] == (run / "overlays.png").read_bytes()
    assert second["model.safetensors"] == (run.parent / "second" / "model" / "model.safetensors").read_bytes()
    assert ModelCard(first["README.md"].decode()).data.license is None
    assert ModelCard(second["README.md"].decode()).data.license == "apache-2.0"


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_pushed_is_one_line(pushed, name):
    code, out, err = pushed[name]
    assert code == 2 and not out
    assert re.fullmatch(rf"error: .*{REFUSED[name]}.*\n", err), err


def test_what_cannot_be_pushed_leaves_nothing_behind(pushed, hub):
    assert {"org/tiny", "org/secret"} <= set(hub.repos) <= {"org/tiny", "org/secret", "org/plain", *DAMAGED}
    assert len(hub.repos["org/tiny"].commits) == 3 and not hub.repos["org/tiny"].private
    assert len(hub.repos["org/secret"].commits) == 2 and hub.repos["org/secret"].private


def test_no_hub_there(run, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match=r"^org/tiny: http://127.0.0.1:9 cannot be reached \(.*push again, or .*--dry-run$"
    ):
        push(run, "org/tiny")


def test_a_dry_run_writes_what_a_push_would_commit(pushed, hub, root):
    code, out, err = pushed["dry run"]
    assert (code, out, err) == (0, f"{root / 'dry'}: what would be pushed to org/new\n", "")
    first = hub.repos["org/tiny"].commits[1][1]
    for name in FILES:
        expected = first[name].replace(b"org/tiny", b"org/new").replace(b"# tiny", b"# new")
        expected = expected.replace(b"- name: tiny", b"- name: new") if name == "README.md" else expected
        assert (root / "dry" / name).read_bytes() == expected


def test_nothing_of_this_machine_is_pushed(pushed, hub, run):
    here = [str(run.parent), str(run.parents[2]), str(ROOT), str(Path.home()) + "/", WRITER]
    assert here[0] in (run / "recipe.toml").read_text() and here[1] in (run / "metrics.json").read_text()
    for repo in ("org/tiny", "org/secret"):
        for name, data in hub.repos[repo].commits[-1][1].items():
            assert not [place for place in here if place.encode() in data], name
    card = hub.repos["org/tiny"].commits[1][1]["README.md"].decode()
    assert "--recipe tiny.toml --set 'run.output=runs of mine' --set eval.flip=true\n" in card


def test_loaded_elsewhere_it_is_the_same_network(loaded, run):
    folder, refused = loaded
    image = torch.arange(3 * 40 * 56).view(1, 3, 40, 56).remainder(256).to(torch.uint8)
    logits = load_file(folder / "logits.safetensors")
    with torch.inference_mode():
        first = load_segmenter(run).eval()(image).logits
        second = load_segmenter(run.parent / "second").eval()(image).logits
    assert not torch.equal(first, second)
    for name, expected in (("before", first), ("tiny", second), ("plain", second), ("with token", first)):
        found = logits[name] if name in logits else logits[f"org/{name}"]
        assert torch.equal(found, expected), name
    assert set(refused) == {*DAMAGED, "org/secret", "org/nowhere"}


def test_what_was_tampered_with_is_refused(loaded):
    _, refused = loaded
    for repo, message in (
        ("org/half", "the weights do not fit config.json"),
        ("org/odd", "is no model's config.json"),
        ("org/less", "the weights do not fit config.json.*Missing key"),
        ("org/torn", "model.safetensors cannot be read"),
        ("org/secret", "^org/secret: neither a folder here nor a model that the hub gives us"),
        ("org/nowhere", "^org/nowhere: neither a folder here nor a model that the hub gives us"),
    ):
        assert re.search(message, refused[repo]), refused[repo]


def test_the_python_of_the_card_runs(loaded, hub):
    folder, _ = loaded
    drawn = np.asarray(PIL.Image.open(folder / "prediction.png"))
    files = hub.repos["org/tiny"].commits[-1][1]
    colors = {tuple(color) for color in json.loads(files["config.json"])["colors"]}
    seen = PIL.Image.fromarray(drawn).getcolors()
    assert seen and {color for _, color in seen} <= colors


def test_the_card_says_what_the_run_measured(pushed, hub, run):
    files = hub.repos["org/tiny"].commits[1][1]
    card = ModelCard(files["README.md"].decode())
    metrics = json.loads((run / "metrics.json").read_text())
    assert json.loads(files["metrics.json"]) | {"command": 0} == metrics | {"command": 0}
    (result,) = card.data.eval_results
    assert result.metric_value == pytest.approx(metrics["miou"], abs=0.005) and result.metric_type == "mean_iou"
    assert (result.dataset_name, result.dataset_split, result.task_type) == ("shapes", "val", "image-segmentation")
    assert (card.data.library_name, card.data.pipeline_tag) == ("mgd", "image-segmentation")
    assert card.data.tags == ["image-segmentation", "semantic-segmentation", "timm"]  # it had no teachers
    for name, iou in metrics["iou"].items():
        assert re.search(rf"\| {name} +\| `#[0-9a-f]{{6}}` +\| {iou:.2f} ", card.text), name
    for text in (
        "4 labelled / 8 unlabelled (not used by `supervised`), 5 val",
        "4 steps of 4",
        "scales 1, flipped too",
    ):
        assert text in card.text
    assert re.search(r"\| total +\| 0\.411 +\| 0\.005 ", card.text) and "GMACs at 32x32" in card.text


def test_the_card_of_a_student(run, tmp_path):
    teachers = {"deep": {"checkpoint": "/home/me/runs/deep-s0"}, "wide": {"checkpoint": "org/wide"}}
    data = {
        "name": "folder",
        "root": "/home/me/<b>",
        "classes": ["a|b", "/c", *"defgh"],
        "unlabeled": {"hub": "org/pool"},
    }
    changes = {"method": {"name": "kd", "distill_from": ["deep", "wide"]}, "teachers": teachers, "data": data}
    folder = altered(run, "student", {**changes, "optim": {"steps": 4}})
    table = tomllib.loads((folder / "recipe.toml").read_text())
    for key in ("num_train", "num_val", "size", "draw_seed"):
        del table["data"][key]
    (folder / "recipe.toml").write_text(tomli_w.dumps(table))
    config = json.loads((folder / "model" / "config.json").read_text()) | {"classes": data["classes"]}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics |= {"iou": dict.fromkeys(data["classes"]), "num_unlabeled": None}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    card = ModelCard(model_card(open_run(folder), "org/student", "mit"))
    assert {"semi-supervised", "knowledge-distillation"} <= set(card.data.tags)
    assert (card.data.license, card.data.datasets) == ("mit", ["org/pool"])
    for text in (
        "deep: `deep-s0`, wide: `org/wide`",
        "4 labelled / a stream of unknown length unlabelled, 5 val",
        "a\\|b",
    ):
        assert text in card.text
    assert "/home" not in str(card)
    write_folder(open_run(folder), "org/student", None, tmp_path / "out")
    shown = load_recipe(tmp_path / "out" / "recipe.toml")
    assert shown.data.classes == tuple(data["classes"]) and shown.data.root == "<b>"
    assert shown.teachers["deep"].checkpoint == "deep-s0" and shown.run.output == "runs of mine"


def test_the_card_names_teachers_that_were_trained_along(run):
    card = ModelCard(model_card(open_run(altered(run, "online", {"method": ONLINE})), "org/online"))
    assert "deep: `test_efficientnet`, trained along, wide: `test_byobnet`, trained along" in card.text
    assert "knowledge-distillation" in card.data.tags


def test_a_model_of_before_is_pushed_with_the_scale_of_its_recipe(run, tmp_path):
    folder = altered(run, "older", {"data": {"image_scale": 0.5}})
    config = json.loads((folder / "model" / "config.json").read_text())
    for key in ("image_scale", "crop", "mean", "std"):
        del config[key]
    (folder / "model" / "config.json").write_text(json.dumps(config))
    shutil.copyfile(folder / "recipe.toml", folder / "model" / "recipe.toml")
    write_folder(open_run(folder), "org/older", None, tmp_path / "out")
    again = Segmenter.from_pretrained(tmp_path / "out")
    assert (again.image_scale, again.crop) == (0.5, 32)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/data/me/camvid", "camvid"),
        ("/data/me/camvid/", "camvid"),
        ("~/camvid", "camvid"),
        ("~me", "local"),
        ("/", "local"),
        ("..", "local"),
        ("../../me/camvid", "camvid"),
        ("data/../../me/camvid", "camvid"),
        ("C:\\Users\\me\\camvid", "camvid"),
        ("C:/Users/me", "me"),
        ("\\\\server\\me\\camvid", "camvid"),
        ("file:///data/me/camvid", "camvid"),
        ("data/camvid", "data/camvid"),
        ("org/name", "org/name"),
        ("1/16", "1/16"),
        ("a..b", "a..b"),
        (["/x/a", 1, None], ["a", 1, None]),
        ({"classes": ["/x/a"], "root": "/x/a"}, {"classes": ["/x/a"], "root": "a"}),
    ],
)
def test_portable(value, expected):
    assert portable(value) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--recipe '/x y/r.toml'", "--recipe r.toml"),
        ("--recipe recipes/r.toml --set optim.lr=0.01", "--recipe recipes/r.toml --set optim.lr=0.01"),
        ("--set 'data.root=/x y/camvid'", "--set data.root=camvid"),
        ("""--set 'data.unlabeled={parquet="/x/pool", streaming=true}'""",)
        + ("""--set 'data.unlabeled={parquet="pool", streaming=true}'""",),
        ("""--set 'eval.baselines=["/x/a.toml", "b.toml"]'""", """--set 'eval.baselines=["a.toml", "b.toml"]'"""),
        (r"""--set 'data.root="C:\\x\\camvid"'""", "--set data.root=local"),
        ("""--set 'data.classes=["/", "leaf"]'""", """--set 'data.classes=["/", "leaf"]'"""),
    ],
)
def test_portable_command(words, expected):
    start = "accelerate launch stages/distill.py "
    assert portable_command(start + words) == start + expected


def test_save_pretrained_writes_a_card_of_ours(run, tmp_path, monkeypatch):
    load_segmenter(run).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("mgd", "image-segmentation")
    assert card.data.tags == ["image-segmentation", "semantic-segmentation", "timm"] and card.data.license is None
    assert "| 1 | disc | `#800000` |" in card.text and "`test_resnet`, 7 classes" in card.text
    monkeypatch.chdir(tmp_path)
    exec(snippet(card.text), {})
    assert PIL.Image.open("prediction.png").size == (320, 240)


def test_push_to_hub_of_a_network_alone(loaded, hub):
    (_, files) = hub.repos["org/plain"].commits[-1]
    assert set(files) == {"README.md", "config.json", "model.safetensors"}
    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, card.data.license) == ("mgd", "mit")
    assert 'Segmenter.from_pretrained("org/plain")' in snippet(card.text)
