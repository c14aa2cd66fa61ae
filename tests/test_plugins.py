"""Packages from outside: what they may bring, and what is said of those that do not keep to it."""

import dataclasses
import json
import sys
import textwrap
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import tomli_w
import torch
from accelerate import Accelerator
from conftest import ROOT, TINY, Toy, log_rows, merged
from plugin_package import install
from safetensors.torch import load_file
from torch import nn

from mgd.data.datasets import Shapes
from mgd.data.reading import load_splits, read_splits
from mgd.errors import UserError
from mgd.experiment import run_recipe
from mgd.hub import open_run, write_folder
from mgd.methods.base import Method, MethodSection, StepOutput
from mgd.methods.contract import check_parts, checked_output
from mgd.models import trial
from mgd.models.trial import check_trainable
from mgd.recipe import load
from mgd.registry import DATASETS, EXPORTERS, HEADS, METHODS, Registry
from mgd.schema import json_schema
from mgd.sections import ModelSection, Section


@pytest.fixture
def segplus(tmp_path, monkeypatch):
    """The package, installed for the time of a test."""
    install(tmp_path / "site")
    for registry in (DATASETS, HEADS, METHODS, EXPORTERS):
        registry.names()  # what is there without it
    monkeypatch.syspath_prepend(tmp_path / "site")
    for registry in (DATASETS, HEADS, METHODS, EXPORTERS):
        monkeypatch.delitem(vars(registry), "_points")
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
        monkeypatch.setattr(registry, "_loaded", {})
    import segplus

    yield segplus
    del sys.modules["segplus"]


def write_plugged(write_recipe, tmp_path, name):
    changes = {"run": {"name": name, "output": str(tmp_path / "runs")}, "data": {"name": "drawn"}}
    table = merged(TINY, changes) | {"method": {"name": "adapted", "weights": [0.5]}}
    table["student"] = TINY["student"] | {"head": {"name": "flat"}}
    path = tmp_path / f"{name}.toml"
    path.write_text(tomli_w.dumps(table))
    return path


def test_a_package_brings_one_of_each(segplus, write_recipe, tmp_path, monkeypatch, run_here):
    whole, stopped = (load(write_plugged(write_recipe, tmp_path, name)) for name in ("whole", "stopped"))
    metrics = run_recipe(whole, Accelerator())
    assert metrics["versions"]["segplus"] == "1.2"
    monkeypatch.setattr(segplus.Adapted, "fails_at", 3)
    with pytest.raises(RuntimeError, match="power"):
        run_recipe(stopped, Accelerator())
    monkeypatch.setattr(segplus.Adapted, "fails_at", None)
    torch.manual_seed(99)  # a fresh process would be elsewhere, too
    run_recipe(stopped, Accelerator())
    states = [load_file(recipe.run_dir / "checkpoint" / "state.safetensors") for recipe in (whole, stopped)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert states[0]["seen/count"] == 4
    rows = log_rows(whole.run_dir)
    assert [row["seen"] for row in rows if "seen" in row] == [1, 2, 3, 4]
    assert rows[3]["loss_pull"] < rows[0]["loss_pull"]  # the layer learns

    write_folder(open_run(whole.run_dir), "me/net", None, tmp_path / "card")
    card = (tmp_path / "card" / "README.md").read_text()
    assert "needs the Python packages `mgd` and `segplus`" in " ".join(card.split())
    done = run_here("export.py", "--model", whole.run_dir, "--format", "again", "--samples", 2)
    assert done.returncode == 0 and list((whole.run_dir / "export").glob("*.again")), done.stderr
    schema = json.dumps(json_schema())
    assert '"AdaptedConfig"' in schema and '"FlatConfig"' in schema and '"Drawn"' in schema


def test_the_method_of_the_readme_learns(write_recipe, monkeypatch, run_here):
    text = (ROOT / "mgd" / "README.md").read_text(encoding="utf-8")
    example = next(part for part in text.split("```python\n") if "class MineConfig" in part).split("```")[0]
    names = {"__name__": "mypackage"}
    exec(compile(example, "<README>", "exec"), names)
    monkeypatch.setitem(METHODS._entries, "mine", names["Mine"])
    assert METHODS._problem(names["Mine"], "mine") is None
    run = run_recipe(load(write_recipe(run={"name": "teacher"})), Accelerator())
    teachers = {"deep": {"checkpoint": str(load(write_recipe(run={"name": "teacher"})).run_dir)}}
    path = write_recipe(method={"name": "mine", "weight": 2.0}, teachers=teachers)
    done = run_here("distill.py", "--recipe", path)
    assert done.returncode == 0, done.stderr
    rows = log_rows(load(path).run_dir)
    first, last = rows[0], rows[-2]
    assert first["loss"] == pytest.approx(first["loss_supervised"] + 2 * first["loss_mine"], rel=1e-5)
    assert last["loss_mine"] < first["loss_mine"] and run["steps"] == 4


def test_a_broken_plugin_stops_nobody_else(segplus):
    with pytest.raises(UserError, match=r"plug-in 'broken' \(segplus_that_is_not_there:A\) fails to import: Module"):
        METHODS.get("broken")
    assert METHODS.get("adapted") is segplus.Adapted and METHODS.get("kd") and "broken" in METHODS.names()
    with pytest.raises(UserError, match=r"'cwd' has several owners: mgd itself, segplus \(segplus:Adapted\); rename"):
        METHODS.get("cwd")
    assert "adapted" in METHODS.usable() and not {"broken", "cwd"} & METHODS.usable().keys()


def test_what_is_ours_keeps_to_the_contract_too():
    for registry in (DATASETS, HEADS, METHODS, EXPORTERS):
        assert registry.usable().keys() == set(registry.names())
        assert not {
            name: found for name, entry in registry.usable().items() if (found := registry._problem(entry, name))
        }


class MineConfig(MethodSection):
    name: Literal["mine"] = "mine"
    weight: float = 1.0


class Mine(Method):
    Config = MineConfig

    def step(self, batch, step):
        raise NotImplementedError


class ListConfig(MineConfig):
    weights: list[float] = [1.0]


class NamelessConfig(MethodSection):
    pass


class HeadConfig(Section):
    name: Literal["mine"] = "mine"


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (textwrap, r"is no class that derives from mgd.methods.base.Method; write mine = \"package"),
        (Toy, "is no class that derives from mgd.methods.base.Method"),
        (type("A", (Method,), {"Config": MineConfig}), "lacks step, see mgd.methods.base.Method"),
        (type("B", (Method,), {"step": Mine.step}), "lacks Config"),
        (type("C", (Mine,), {"Config": HeadConfig}), "Config that does not derive from mgd.methods.base.MethodSection"),
        (type("D", (Mine,), {"Config": NamelessConfig}), r"it needs name: Literal\[\"mine\"\] = \"mine\""),
        (type("E", (Mine,), {"Config": ListConfig}), r"no recipe can hold, weights: a list is tuple\[...\] there"),
    ],
)
def test_a_class_that_is_no_method_is_refused(entry, expected, monkeypatch):
    registry = Registry("method", "none", [], METHODS.base, METHODS.own, METHODS.config)
    point = type("Point", (), {"name": "mine", "value": "here:entry", "dist": None, "load": lambda self: entry})()
    monkeypatch.setitem(vars(registry), "_points", {"mine": [point]})
    with pytest.raises(UserError, match=rf"the method plug-in 'mine' \(here:entry\) .*{expected}"):
        registry.get("mine")
    if isinstance(entry, type):
        registry.register("mine")(entry)  # as its module does if it uses the decorator, too
    with pytest.raises(UserError, match=expected):
        registry.get("mine")
    assert registry.usable() == {}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda method: setattr(method, "projection", nn.Conv2d(3, 3, 1)), "self.projection holds a module that is"),
        (lambda method: setattr(method, "scale", nn.Parameter(torch.ones(1))), "self.scale holds a module"),
        (lambda method: setattr(method, "both", [nn.Conv2d(3, 3, 1)]), "self.both holds a module"),
        (
            lambda method: setattr(method, "student", method.networks[0]),
            "self.student .*as networks from self.networks",
        ),
        (lambda method: setattr(method, "seen", nn.BatchNorm2d(3, affine=False)), "self.seen holds a module"),
        (lambda method: method.averages.update(slow=nn.Conv2d(3, 3, 1)), r"averages\['slow'\] wants a gradient"),
        (lambda method: delattr(method, "layers"), None),
        (
            lambda method: method.averages.update(tau=torch.zeros(3)),
            r"averages\['tau'\] must be a torch.nn.Module",
        ),
        (lambda method: method.averages.update(network0=nn.Identity()), "averages cannot hold the name 'network0'"),
        (lambda method: method.layers.update({"a/b": nn.Identity()}), "layers cannot hold the name 'a/b'"),
        (
            lambda method: (method.layers.update(a=nn.Identity()), method.averages.update(a=nn.Identity())),
            "both hold 'a'",
        ),
        (lambda method: setattr(method, "deployed", lambda: nn.Identity()), r"deployed\(\) must return one of"),
    ],
)
def test_parts_that_would_be_lost_are_refused(change, expected):
    method = Mine(MineConfig(), [Toy(0)])
    check_parts(method)
    change(method)
    named = rf"\[method\] name = 'mine': .*{expected}" if expected else r"Mine: __init__ must call super\(\).__init__"
    with pytest.raises(UserError, match=named):
        check_parts(method)


def test_an_average_may_have_a_name_of_its_own():
    method = Mine(MineConfig(), [Toy(0)])
    method.averages["slow"] = method.slow = Toy(1).requires_grad_(False)
    method.deployed = lambda: method.slow
    check_parts(method)


LOSS = torch.ones((), requires_grad=True) * 2


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        (LOSS, r"must return StepOutput\(loss, log\), not Tensor"),
        (StepOutput(2.0, {}), "a scalar loss with a gradient, not of type float"),
        (StepOutput(LOSS.detach(), {}), r"not a tensor of shape \[\] without a gradient"),
        (StepOutput(LOSS[None], {}), r"not a tensor of shape \[1\]"),
        (StepOutput(LOSS, [LOSS]), "a dict of numbers as its log, not list"),
        (StepOutput(LOSS, {"step": LOSS}), "logs 'step', which the loop writes itself"),
        (StepOutput(LOSS, {"each": torch.zeros(2)}), r"logs 'each', which is a tensor of shape \[2\]"),
        (StepOutput(LOSS, {"note": "high"}), "logs 'note', which is of type str"),
        (StepOutput(LOSS, {3: LOSS}), "logs 3, which is no name"),
    ],
)
def test_steps_that_return_something_else_are_refused(out, expected):
    method = Mine(MineConfig(), [Toy(0)])
    assert checked_output(StepOutput(LOSS, {"a": 3, "b": LOSS}), method).log["a"].item() == 3
    with pytest.raises(UserError, match=rf"\[method\] name = 'mine': step .*{expected}"):
        checked_output(out, method)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda self, low, high: (low[:, :5], high), r"returns \[\[2, 5, 16, 16\], \[2, \d+, 4, 4\]\]"),
        (lambda self, low, high: low[:, :4], r"must return logits .* it returns \[\[2, 4, 16, 16\]\]"),
        (lambda self, low, high: (low[:, :4], None), "'NoneType'"),
        (lambda self, low, high: None, r"returns \['NoneType'\]"),
        (lambda self, low, high: (low[:, :4].detach(), high), "with a gradient"),
        (lambda self, low, high: (low[:, :4] / self.zero, high), r"cannot train on maps of \[2, .*: .*zero.*or head"),
    ],
)
def test_heads_that_return_something_else_are_refused(forward, expected, monkeypatch):
    """They are blamed themselves, before anything is trained, not the backbone and the crop."""
    head = type("Head", (nn.Module,), {"__init__": lambda self, *_: nn.Module.__init__(self), "forward": forward})
    monkeypatch.setitem(HEADS._entries, "mine", head)
    model = type("Model", (ModelSection,), {"__annotations__": {"head": HeadConfig}})
    section = model(backbone="test_resnet", pretrained=False, output_stride=16, head=HeadConfig())
    with pytest.raises(UserError, match=rf"\[student.head\] name = 'mine' .*{expected}"):
        check_trainable("student", section, 4, 2, 64, False)
    for needs_data in (
        lambda self, low, high: (low[:, :4] * low.mean().item(), high),
        lambda self, low, high: (low[:, :4] + torch.zeros(1, device="cpu")[:, None], high),
        lambda self, low, high: (low[:, :4] * (1.0 if self.training else low.mean().item()), high),
    ):
        monkeypatch.setattr(head, "forward", needs_data)
        trial._try.cache_clear()
        check_trainable("student", section, 4, 2, 64, False, (70, 80))  # cannot be tried, which is no mistake

    def looks_at_values(self, *_):
        nn.Module.__init__(self)
        torch.zeros(1).item()

    monkeypatch.setattr(head, "__init__", looks_at_values)
    assert trial.features_size("teachers.a", section, 4, 64) is None  # nor is it of a frozen one
    with pytest.raises(UserError, match="no such model"):
        check_trainable("student", section.model_copy(update={"backbone": "nothing"}), 4, 2, 64, False)


def _renamed(splits, name, ids):
    table = getattr(splits, name)
    return dataclasses.replace(splits, **{name: table.remove_columns("id").add_column("id", ids)})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda splits: None, "must return mgd.data.datasets.Splits, not NoneType"),
        (
            lambda splits: dataclasses.replace(splits, unlabeled=None),
            "unlabeled must be a datasets.Dataset",
        ),
        (lambda splits: dataclasses.replace(splits, val=splits.val.remove_columns("label")), "val must be .*label"),
        (lambda splits: _renamed(splits, "labeled", ["a", "a", "b"]), "of the training images several are called a$"),
        (lambda splits: _renamed(splits, "val", ["c", "c"]), "of the val images several are called c$"),
        (
            lambda splits: dataclasses.replace(splits, classes=("x", "y")),
            r"says background, .*load\(\) x, y; they must",
        ),
        (lambda splits: dataclasses.replace(splits, colors=splits.colors[:3]), "7 classes, but 3 colours"),
        (lambda splits: _renamed(splits, "labeled", [1, 2, 3]), "labeled must be .* id text and the others images"),
        (lambda splits: Path("/no/such/file").read_text(), "No such file or directory: '/no/such/file'"),
    ],
)
def test_readers_that_return_something_else_are_refused(change, expected):
    reader = type("Reader", (Shapes,), {"load": lambda self: change(Shapes.load(self))})
    section = reader(name="mine", num_train=3, num_val=2, size=32)
    read_splits(Shapes(name="shapes", num_train=3, num_val=2, size=32))
    with pytest.raises(UserError, match=rf"\[data\] name = 'mine': .*{expected}"):
        read_splits(section)


def test_a_reader_may_have_a_table_of_its_own(monkeypatch):
    class Weighed(Shapes):
        name: str = "weighed"
        weights: dict[str, float] = {}

    monkeypatch.setitem(DATASETS._entries, "weighed", Weighed)
    sections = [Weighed(num_train=3, num_val=2, size=32, weights={"a": weight}) for weight in (1.0, 1.0, 2.0)]
    first, again, other = map(load_splits, sections)
    assert first is again and other is not first


def test_an_array_is_logged_like_a_number():
    out = checked_output(StepOutput(LOSS, {"share": np.float32(0.5)}), Mine(MineConfig(), [Toy(0)]))
    assert out.log["share"].item() == 0.5
