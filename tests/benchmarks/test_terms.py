"""Gradients of the terms of a loss."""

import json

import pytest
import torch
from accelerate import Accelerator
from conftest import TINY, Toy, call_stage

from mgd.benchmarks.terms import suite
from mgd.errors import UserError
from mgd.methods.base import StepOutput
from mgd.methods.cps import CPS
from mgd.methods.mgd import MGD, ImageTerm, MGDConfig, PixelTerm, RegionTerm
from mgd.methods.supervised import Supervised

TEACHER = TINY["student"] | {"backbone": "test_byobnet"}


def flat(parts):
    return torch.cat([part.flatten() for part in parts if part is not None])


def test_each_gradient_is_what_its_weight_adds_to_the_whole(batch):
    terms = {
        "pixel": PixelTerm(teachers=("a",), weight=0.7),
        "image": ImageTerm(teachers=("a",), weight=0.05),
        "region": RegionTerm(teachers=("a",), weight=30.0, grid=2),
    }
    batches = [batch, {name: value.flip(0) for name, value in batch.items()} | {"mix": batch["unlabeled"]}]

    def gradients(**changes):
        student = Toy(0)
        method = MGD(MGDConfig(**terms).model_copy(update=changes), [student], {"a": Toy(1)})
        return [flat(torch.autograd.grad(method.step(seen, 0).loss, list(student.parameters()))) for seen in batches]

    rows = suite(MGD(MGDConfig(**terms), [Toy(0)], {"a": Toy(1)}), batches)
    found = {row["term"]: row for row in rows}
    weights = {"loss_supervised": 1, "loss_pixel_labeled": 0.7, "loss_pixel_unlabeled": 0.7}
    weights |= {"loss_image": 0.05, "loss_region": 30}
    assert {name: row["weight"] for name, row in found.items()} == pytest.approx(weights)
    nothing = {"pixel": PixelTerm(), "image": ImageTerm(), "region": RegionTerm()}
    alone = sum(gradient.norm().item() for gradient in gradients(**nothing)) / 2
    assert found["loss_supervised"]["gradient"] == pytest.approx(alone, rel=1e-6)
    for name, without in (
        ("loss_image", {"image": ImageTerm()}),
        ("loss_region", {"region": RegionTerm()}),
        ("loss_pixel_labeled", {"pixel": terms["pixel"].model_copy(update={"on": ("unlabeled",)})}),
        ("loss_pixel_unlabeled", {"pixel": terms["pixel"].model_copy(update={"on": ("labeled",)})}),
    ):
        pairs = zip(gradients(), gradients(**without), strict=True)
        added = sum((whole - rest).norm().item() for whole, rest in pairs) / 2
        assert found[name]["gradient"] == pytest.approx(added, rel=1e-6), name
        assert found[name]["beside the first"] == pytest.approx(added / alone, rel=1e-6), name


def test_all_networks_of_a_method_count(batch):
    first, second = Toy(0), Toy(1)
    rows = suite(CPS(CPS.Config(weight=2.0), [first, second]), [batch])
    method = CPS(CPS.Config(weight=0.0), [first, second])
    gradient = torch.autograd.grad(method.step(batch, 0).loss, [*first.parameters(), *second.parameters()])
    assert rows[0]["gradient"] == pytest.approx(flat(gradient).norm().item(), rel=1e-6)
    assert [row["weight"] for row in rows] == [1, 2]


class Talkative(Supervised):
    """Logs more than the terms of its loss."""

    def step(self, batch, step):
        out = super().step(batch, step)
        logits = self.networks[0](batch["image"]).logits
        return StepOutput(out.loss, out.log | {"entropy": logits.detach().mean(), "mean_logit": logits.mean()})


def test_what_is_logged_only_pulls_at_nothing(batch):
    batches = [batch, {name: value.flip(0) for name, value in batch.items()} | {"label": torch.zeros(2, 16, 16).long()}]
    method = Talkative(Supervised.Config(), [Toy(0)])
    values = [method.step(seen, 0).loss.item() for seen in batches]
    supervised, logged = suite(method, batches)
    assert supervised["value"] == pytest.approx(sum(values) / 2) and supervised["weight"] == 1
    assert logged["term"] == "mean_logit" and logged["weight"] == logged["gradient"] == 0


def test_a_method_that_logs_no_term_is_told_so(batch):
    class Silent(Supervised):
        def step(self, batch, step):
            return StepOutput(super().step(batch, step).loss, {})

    with pytest.raises(UserError, match="logs no term of its loss"):
        suite(Silent(Supervised.Config(), [Toy(0)]), [batch])


def test_one_size_where_one_is_measured(write_recipe, capsys):
    arguments = ("--recipe", write_recipe(), "--suite", "students", "--size", "64", "96")
    status, _, error = call_stage(capsys, "benchmark.py", *arguments)
    assert status == 2 and "--suite students takes one --size" in error


def test_the_stage(write_recipe, tmp_path, capsys, monkeypatch):
    teacher = write_recipe("teacher.toml", run={"name": "teacher"}, student=TEACHER, method={"name": "cps"})
    terms = {"pixel": {"teachers": ["a"]}, "region": {"teachers": ["a"], "weight": 7.0, "grid": 3}}
    recipe = write_recipe(method={"name": "mgd", **terms}, teachers={"a": {"recipe": str(teacher)}})
    table = tmp_path / "terms.json"
    asked = ("benchmark.py", "--recipe", recipe, "--suite", "terms", "--repetitions", 2, "--json", table)
    status, _, error = call_stage(capsys, *asked)
    assert status and "[teachers.a] is not trained: accelerate launch stages/teacher_cps.py" in error
    for stage, path in (("teacher_cps.py", teacher), ("distill.py", recipe)):
        assert call_stage(capsys, stage, "--recipe", path)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    begun, trained = (), ("--model", tmp_path / "runs" / "tiny")
    values = []
    for more in (begun, trained):
        assert call_stage(capsys, *asked, *more)[0] == 0
        rows = json.loads(table.read_text())
        assert [row["weight"] for row in rows] == [1, 1, 1, 7]
        assert all(row["gradient"] > 0 for row in rows)
        values.append(rows[0]["value"])
    assert values[0] != values[1]
    assert before == {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    status, _, error = call_stage(capsys, *asked, "--model", tmp_path / "runs" / "teacher")
    assert status and "is another network than the [student] of" in error
    status, _, error = call_stage(capsys, "benchmark.py", "--recipe", teacher, "--suite", "terms", *trained)
    assert status and "--model is one network, and cps trains 2" in error
    cached = ("--set", "teachers.mode=cached", "--set", "method.remix=predictions", "--set", "cache.cell=8")
    status, _, error = call_stage(capsys, *asked, *cached)
    assert status and "--set teachers.mode=online" in error
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    status, _, error = call_stage(capsys, *asked)
    assert status and "one process, in float32" in error
