"""Teachers and student in one run: a step against a plain restatement; what is refused; what it costs."""

import json
import re

import pytest
import torch
from conftest import ONLINE, ROOT, Toy, call_stage
from torch.nn import functional

from mgd.benchmarks.step import training_gmacs
from mgd.errors import UserError
from mgd.methods.mgd import ImageTerm, PixelTerm, RegionTerm
from mgd.methods.mgd_online import MGDOnline, MGDOnlineConfig
from mgd.recipe import load
from mgd.schema import json_schema
from mgd.sections import ModelSection

TERMS = {
    "pixel": PixelTerm(teachers=("deep", "wide"), weight=0.7),
    "image": ImageTerm(teachers=("deep",), weight=0.02),
    "region": RegionTerm(teachers=("wide",), weight=30.0, grid=3),
}


def config_of(names, **changes):
    teachers = {name: ModelSection.model_construct(backbone=name) for name in names}
    return MGDOnlineConfig(teachers=teachers, **(TERMS | changes))


def restated(student, teachers, batch, cps_weight):
    """Return the student's and the teachers' loss; each view is a part of one pass in train mode."""
    image = torch.where(batch["mask"], batch["mix"], batch["unlabeled"])
    views = torch.cat([batch["image"], image])
    pseudo, outputs = {}, {}
    for name, teacher in teachers.items():
        first, second = teacher(torch.cat([batch["unlabeled"], batch["mix"]])).logits.split(2)
        pseudo[name] = torch.where(batch["mask"], second, first).argmax(1)
        outputs[name] = teacher(views)
    names = list(teachers)
    taught = 0.0
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        labeled, mixed = outputs[name].logits.split(2)
        taught = taught + functional.cross_entropy(labeled, batch["label"], ignore_index=255)
        taught = taught + cps_weight * functional.cross_entropy(mixed, pseudo[other])
    labeled, mixed = student(views).logits.split(2)
    loss = functional.cross_entropy(labeled, batch["label"], ignore_index=255)
    for name in ("deep", "wide"):
        loss = loss + 0.7 * functional.cross_entropy(labeled, outputs[name].logits[:2].argmax(1))
        loss = loss + 0.7 * functional.cross_entropy(mixed, pseudo[name])
    pooled = mixed.mean((2, 3)) - outputs["deep"].logits[2:].mean((2, 3)).detach()

    def correlation(features):
        vectors = functional.adaptive_avg_pool2d(features[2:], 3).flatten(2).transpose(1, 2)
        return functional.cosine_similarity(vectors[:, :, None], vectors[:, None], dim=-1)

    region = (correlation(student(views).features) - correlation(outputs["wide"].features).detach()).square().mean()
    return loss + 0.02 * pooled.abs().sum() + 30.0 * region, taught


@pytest.mark.parametrize("names", [("deep", "wide"), ("deep", "third", "wide")], ids=len)
def test_a_step_is_the_students_mgd_and_the_teachers_cps(batch, names):
    student = Toy(0, norm=True)
    teachers = {name: Toy(1 + index, 8 + index, norm=True) for index, name in enumerate(names)}
    method = MGDOnline(config_of(names, cps_weight=1.5), [student, *teachers.values()])
    out = method.step(batch, 0)
    assert method.deployed() is student
    of_student, of_teachers = restated(student, teachers, batch, 1.5)
    assert out.loss.item() == pytest.approx((of_student + of_teachers).item(), rel=1e-10)
    assert set(out.log) == {
        *("loss_supervised", "loss_pixel_labeled", "loss_pixel_unlabeled", "loss_image", "loss_region"),
        *("loss_teachers_supervised", "loss_teachers_cps"),
    }
    out.loss.backward()
    # Each learns from its own loss and from nothing else: the gradient of the sum is that of the part.
    for networks, loss in (([student], of_student), (teachers.values(), of_teachers)):
        parameters = [parameter for network in networks for parameter in network.parameters()]
        for parameter, expected in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            assert torch.allclose(parameter.grad, expected, rtol=1e-8, atol=1e-12)
    for teacher in teachers.values():
        assert all(parameter.grad.any() for parameter in (teacher.body.weight, teacher.classifier.weight))
        assert teacher.norm.num_batches_tracked == 4  # two passes here, two in the restatement


def test_regions_finer_than_a_teachers_features_are_refused(batch):
    coarse = Toy(2, 9)
    coarse.body.stride = (4, 4)
    with pytest.raises(UserError, match=r"grid = 5 is finer than the 4 x 4 cells .* of \[method.teachers.wide\]"):
        config = config_of(("deep", "wide"), region=RegionTerm(teachers=("wide",), grid=5))
        MGDOnline(config, [Toy(0), Toy(1, 8), coarse]).step(batch, 0)


def test_teachers_learn_the_same_whatever_the_student_learns(batch):
    gradients = []
    for weight in (0.0, 1000.0):
        networks = [Toy(0, norm=True), Toy(1, 8, norm=True), Toy(2, 9, norm=True)]
        terms = {key: term.model_copy(update={"weight": weight}) for key, term in TERMS.items()}
        MGDOnline(config_of(("deep", "wide"), **terms), networks).step(batch, 0).loss.backward()
        gradients.append([[parameter.grad for parameter in network.parameters()] for network in networks])
    assert not all(map(torch.equal, gradients[0][0], gradients[1][0]))
    for index in (1, 2):
        assert all(map(torch.equal, gradients[0][index], gradients[1][index]))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("method.teachers={}", "[method] name = 'mgd_online' needs two [method.teachers.<name>] or more"),
        ("method.teachers=3", "[method] teachers = 3: should be a table"),
        ("method.teachers.deep=3", "[method.teachers.deep]: must be a table, not 3"),
        ("method.teachers.deep.backbon=x", "[method.teachers.deep] backbon: unknown key; did you mean 'backbone'"),
        ("method.teachers.deep.head.name=deeplab", "[method.teachers.deep.head] name: unknown head 'deeplab'"),
        ("method.teachers.deep.head.chanels=3", "[method.teachers.deep.head] chanels: unknown key"),
        ('method.teachers.deep={backbone="resnet18d"}', "[method.teachers.deep.head]: missing; give name = one of"),
        ('method.image.teachers=["deap"]', "[method] image.teachers = 'deap': no such teacher; did you mean 'deep'"),
        ("method.remix=images", "[method] remix: unknown key"),
        ("teachers.deep.recipe=x", "trains its teachers along with the student; give their networks as"),
        ("teachers.mode=cached", "[method] name = 'mgd_online' needs [teachers] mode"),
    ],
)
def test_one_clear_line_a_mistake_in_the_teachers(write_recipe, change, expected):
    path = write_recipe(method=ONLINE)
    with pytest.raises(UserError) as error:
        load(path, [change])
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{path}: [") and expected in line


def test_a_student_that_nothing_teaches_is_refused(write_recipe):
    empty = [f"method.{term}.teachers=[]" for term in ("pixel", "image", "region")]
    with pytest.raises(UserError, match="the student learns from no teacher; name some in pixel.teachers"):
        load(write_recipe(method=ONLINE), empty)


def test_networks_that_cannot_train_are_named_before_training(write_recipe, tmp_path, capsys):
    path = write_recipe(method=ONLINE)
    for change, expected in {
        "method.teachers.wide.backbone=test_byobnett": "[method.teachers.wide] backbone = 'test_byobnett': timm",
        "method.teachers.deep.multi_grid=[2]": "[method.teachers.deep] multi_grid needs a ResNet backbone",
    }.items():
        status, _, errors = call_stage(capsys, "teacher_cps.py", "--recipe", path, "--set", change)
        assert status == 2 and errors.startswith(f"error: {path}: {expected}") and len(errors.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_quickstart_in_one_stage_costs_what_its_stages_cost():
    def spent(name):
        recipe = load(ROOT / "recipes" / f"{name}.toml")
        teachers = {name: load(ROOT / teacher.recipe).student for name, teacher in recipe.teachers.items()}
        return training_gmacs(recipe, teachers) * recipe.optim.steps

    stages = sum(map(spent, ("quickstart_deep", "quickstart_wide", "quickstart")))
    assert spent("quickstart_online") == pytest.approx(stages, rel=0.01)
    one, two = (load(ROOT / "recipes" / f"quickstart{tail}.toml") for tail in ("", "_online"))
    assert one.student == two.student and one.data == two.data and one.partition == two.partition
    for name, teacher in one.teachers.items():
        assert load(ROOT / teacher.recipe).student == two.method.teachers[name]
    for term in ("pixel", "image", "region"):
        assert getattr(one.method, term) == getattr(two.method, term)


def test_the_costs_of_all_its_networks_are_listed(write_recipe, tmp_path, capsys):
    recipe, table = write_recipe(method=ONLINE), tmp_path / "costs.json"
    status, printed, _ = call_stage(capsys, "benchmark.py", "--recipe", recipe, "--json", table)
    assert status == 0 and re.search(r"a step of 4: 0\.\d+; 4 steps: \d\.\d$", printed.splitlines()[-1])
    whole = {row["network"]: row for row in json.loads(table.read_text()) if row["part"] == "total"}
    assert list(whole) == ["student", "method.teachers.deep", "method.teachers.wide"]
    assert whole["method.teachers.wide"]["backbone"] == "test_byobnet"


def test_the_schema_describes_the_teachers_heads():
    described = json_schema()["$defs"]
    teachers = described["MGDOnlineConfig"]["properties"]["teachers"]["additionalProperties"]
    head = described[teachers["$ref"].rpartition("/")[2]]["properties"]["head"]
    assert len(head["anyOf"]) >= 3
