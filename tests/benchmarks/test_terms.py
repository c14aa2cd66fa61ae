"""Gradients of the terms of a loss."""

import json

import pytest
import torch
from conftest import TINY, Toy, call_stage

from mgd.benchmarks.terms import suite
from mgd.methods.mgd import MGD, ImageTerm, MGDConfig, PixelTerm, RegionTerm
from mgd.methods.supervised import Supervised

TEACHER = TINY["student"] | {"backbone": "test_byobnet"}


def test_each_gradient_is_the_part_of_the_whole_that_its_weight_adds(batch):
    pixel = PixelTerm(teachers=("a",), weight=0.7)
    image, region = ImageTerm(teachers=("a",), weight=0.05), RegionTerm(teachers=("a",), weight=30.0, grid=2)
    teachers = {"a": Toy(1)}

    def gradient(**changes):
        config = MGDConfig(pixel=pixel, image=image, region=region).model_copy(update=changes)
        student = Toy(0)
        out = MGD(config, [student], teachers).step(batch, 0)
        return torch.cat([part.flatten() for part in torch.autograd.grad(out.loss, list(student.parameters()))])

    rows = suite(MGD(MGDConfig(pixel=pixel, image=image, region=region), [Toy(0)], teachers), [batch])
    found = {row["term"]: row for row in rows}
    assert {name: row["weight"] for name, row in found.items()} == {
        "loss_supervised": "1",
        "loss_pixel_labeled": "0.7",
        "loss_pixel_unlabeled": "0.7",
        "loss_image": "0.05",
        "loss_region": "30",
    }
    alone = gradient(pixel=PixelTerm(), image=ImageTerm(), region=RegionTerm())
    for name, changes in (("loss_image", {"image": ImageTerm()}), ("loss_region", {"region": RegionTerm()})):
        added = gradient() - gradient(**changes)
        assert found[name]["gradient"] == pytest.approx(added.norm().item(), rel=1e-9)
        assert found[name]["beside the first"] == pytest.approx((added.norm() / alone.norm()).item(), rel=1e-9)
        assert found[name]["cosine"] == pytest.approx((added @ alone / added.norm() / alone.norm()).item(), abs=1e-9)


def test_values_are_means_over_the_batches(batch):
    other = {name: value.flip(0) for name, value in batch.items()} | {"label": torch.zeros_like(batch["label"])}
    method = Supervised(Supervised.Config(), [Toy(0)])
    values = [method.step(seen, 0).loss.item() for seen in (batch, other)]
    (row,) = suite(method, [batch, other])
    assert row["value"] == pytest.approx(sum(values) / 2) and row["weight"] == "1" and row["cosine"] == 1


def test_the_stage(write_recipe, tmp_path, capsys):
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
        assert [row["weight"] for row in rows] == ["1", "1", "1", "7"]
        assert all(row["gradient"] > 0 for row in rows)
        values.append(rows[0]["value"])
    assert values[0] != values[1]
    assert before == {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    status, _, error = call_stage(capsys, *asked, "--model", tmp_path / "runs" / "teacher")
    assert status and "is another network than the [student] of" in error
