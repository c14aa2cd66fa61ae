"""The reference step and ours are the same step."""

import pytest
import torch
from conftest import TINY
from torch import nn

from mgd.benchmarks.step import _network, flop_counter, random_batch, reference_step, suite
from mgd.benchmarks.timing import peak_memory
from mgd.errors import UserError
from mgd.methods.mgd import MGD
from mgd.recipe import load, parse_model

CPU = torch.device("cpu")
TERMS = {"pixel": {"teachers": ["a", "b"]}, "image": {"teachers": ["a"]}, "region": {"teachers": ["b"], "grid": 3}}


@pytest.fixture
def recipe(write_recipe):
    teachers = {name: {"checkpoint": "x"} for name in ("a", "b")}
    return load(write_recipe(method={"name": "mgd", **TERMS}, teachers=teachers))


@pytest.fixture
def sections():
    return {
        name: parse_model(TINY["student"] | {"backbone": f"test_{name}"}, "t") for name in ("efficientnet", "byobnet")
    }


def test_same_losses_and_gradients(recipe, sections):
    num_classes = len(recipe.data.class_names())
    student = _network(recipe.student, num_classes, 0, CPU)
    teachers = {
        key: _network(section, num_classes, 1, CPU) for key, section in zip("ab", sections.values(), strict=True)
    }
    batch = random_batch(2, 64, num_classes, CPU)
    reference = reference_step(student, teachers, recipe.method, batch)
    ours = MGD(recipe.method, [student], teachers).step(batch, 0)
    assert reference.log.keys() == ours.log.keys()
    for key, value in reference.log.items():
        assert ours.log[key].item() == pytest.approx(value.item(), rel=1e-4), key
    assert ours.loss.item() == pytest.approx(reference.loss.item(), rel=1e-4)
    gradients = [torch.autograd.grad(out.loss, student.parameters(), allow_unused=True) for out in (reference, ours)]
    for first, second in zip(*gradients, strict=True):
        assert first is None and second is None or torch.allclose(first, second, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("groups", "weights"), [(1, 8 * 8 * 9), (8, 8 * 9)])
def test_a_convolution_and_its_gradients_by_hand(groups, weights):
    first, second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=groups)
    with flop_counter() as counter:
        second(first(torch.rand(2, 3, 5, 7))).sum().backward()
    pixels = 2 * 5 * 7
    # forward, gradient of the weights and, but for the image, of the input
    assert counter.get_total_flops() == 2 * pixels * (2 * 3 * 8 + 3 * weights)


def test_rows_of_the_suite(recipe, sections, monkeypatch):
    def timed(variants, *rest):
        for run in variants.values():
            run()
        whole = dict.fromkeys(variants, 10.0)
        return {"exact": 10.0, "cached": 4.0, "backward": 3.0, "forward": 1.0} if "forward" in variants else whole

    monkeypatch.setattr("mgd.benchmarks.step.alternate", timed)
    rows = suite(recipe, dict(zip("ab", sections.values(), strict=True)), 2, ["fp32"], 1, CPU)
    assert [row["name"].split(",")[0] for row in rows] == [
        "step: exact",
        "step: remix",
        "step: cached",
        "memory: exact",
        "memory: remix",
        "memory: cached",
        "exact",
        "exact",
        "exact",
        "exact",
        "exact",
    ]
    assert [row["name"].partition(": ")[2] for row in rows[6:]] == [
        *("teachers, ms", "student and losses, ms", "backward, ms", "optimiser, ms", "TFLOP/s"),
    ]
    assert [row["ours"] for row in rows[:3]] == [10_000.0] * 3
    # Of the 10 s of a whole step 6 are the teachers'; of the other 4 s 1 goes forward, 2 backward, 1 to the optimiser.
    assert [row["ours"] for row in rows[6:-1]] == [6000.0, 1000.0, 2000.0, 1000.0] and rows[-1]["ours"] > 0
    for row in rows[:6]:
        assert row["ratio"] == pytest.approx(row["reference"] / row["ours"]) and row["ours"] > 0


def test_another_method_is_refused(write_recipe, sections):
    with pytest.raises(UserError, match="the step suite needs .* 'mgd', not 'supervised'"):
        suite(load(write_recipe()), sections, 2, ["fp32"], 1, CPU)


def test_peak_memory_by_hand():
    def run():
        first = torch.ones(1000)  # 4000 bytes
        second = first + 1  # 8000 at once
        del first
        third = second + 1  # 8000 again
        del second, third
        torch.ones(1500)  # 6000

    assert peak_memory(run, CPU) == 8000
