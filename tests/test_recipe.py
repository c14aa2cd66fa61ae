import json
import re
import subprocess
import sys
import tomllib

import pytest
from conftest import ONLINE, ROOT, TEACHER

from mgd.errors import UserError
from mgd.recipe import load
from mgd.schema import json_schema, main
from mgd.tables import labeled_amount


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.toml")), ids=lambda path: path.name)
def test_every_recipe_loads_and_opens_with_its_command(path):
    recipe = load(path)
    first = path.read_text().splitlines()[0]
    stage = "distill" if recipe.teachers else "teacher_cps"
    assert first == f"# accelerate launch stages/{stage}.py --recipe {path.relative_to(ROOT)}"


def test_a_recipe_of_cached_teachers_can_have_them_online(tmp_path):
    sets = ["teachers.mode=cached", "method.remix=predictions", "cache.cell=8"]
    path = tmp_path / "recipe.toml"
    path.write_text(load(ROOT / "recipes" / "quickstart.toml", sets).to_toml())  # as a run keeps it
    assert load(path).cache.cell == 8
    assert load(path, ["teachers.mode=online"]).cache is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("optim.momentun=0.9", "[optim] momentun: unknown key; did you mean 'momentum'"),
        ("optin.lr=0.1", "[optin]: unknown section; did you mean 'optim'"),
        ("cache.cell=8", '[cache]: nothing reads it without [teachers] mode = "cached"; set that, or leave it out'),
        ("optim.lr=-1", "[optim] lr = -1: should be greater than 0"),
        ('optim.lr="fast"', '[optim] lr = "fast": should be a valid number'),
        ("optim.lr=nan", "[optim] lr = NaN: should be a finite number"),
        ("optim.batch_size=true", "[optim] batch_size = true: should be a valid integer"),
        ("optim.name=sdg", "[optim] name = \"sdg\": is not a choice; did you mean 'sgd'"),
        ("optim.epochs=3", "[optim]: give either epochs or steps"),
        ("student.output_stride=12", "[student] output_stride = 12: is not a choice"),
        ("student.head.chanels=3", "[student.head] chanels: unknown key; did you mean 'channels'"),
        ("student.head.name=deeplab", "[student.head] name: unknown head 'deeplab'; did you mean 'deeplabv3plus'"),
        ("method.name=suprvised", "[method] name: unknown method 'suprvised'; did you mean 'supervised'"),
        ("method.weight=1", "[method] weight: unknown key"),
        ("data.name=camvit", "[data] name: unknown data set 'camvit'; did you mean 'camvid'"),
        ("data.name=camvid", "[data] root: missing"),
        ("data.scales=[1.0, 0.0]", "[data] scales = 0.0: should be greater than or equal to 0.01"),
        ("data.scales=[]", "[data] scales = []: "),
        ("partition.labeled=1/0", "[partition]: '1/0' is no fraction"),
        ("partition.labeled=0", "[partition]: 0 is no count"),
        ("partition.labeled=1.5", "[partition]: 1.5 is no share"),
        ("run.name=../../etc", '[run] name = "../../etc": may hold letters, digits'),
        ("run.name=x{sed}", "[run] name = \"x{sed}\": may hold letters, digits, '.', '_' and '-', and {seed}"),
        ("run.output=", '[run] output = "": '),
        ("method.name=mgd", "[method] name = 'mgd' needs at least one [teachers.<name>]"),
        ("teachers.deep=3", "[teachers.deep]: must be a table"),
        ("student=3", "--set student=3: expected section.key=value"),
        ("data.classes=[a, b]", "--set data.classes=[a, b]: not valid TOML (Invalid value"),
        ("student.backbone.x=3", "--set student.backbone.x=3: backbone is a value, not a table"),
    ],
)
def test_one_clear_line_a_mistake(write_recipe, change, expected):
    path = write_recipe()
    with pytest.raises(UserError) as error:
        load(path, [change])
    lines = str(error.value).splitlines()
    assert any(expected in line for line in lines), lines
    if not expected.startswith("--set"):
        assert all(line.startswith(f"{path}: [") for line in lines)


def test_adamw_has_no_momentum(write_recipe):
    path = write_recipe()
    assert load(path, ["optim.momentum=0.8"]).optim.momentum == 0.8
    path.write_text(load(path, ["optim.name=adamw"]).to_toml())  # as a run keeps it, with all keys
    with pytest.raises(UserError, match="momentum is of name = 'sgd', 'adamw' has none"):
        load(path, ["optim.momentum=0.8"])


def test_lists_take_the_place_of_a_draw(write_recipe):
    path = write_recipe(partition={"labeled": 4, "balanced": True})
    lists = ["partition.protocol=files", "partition.labeled_list=a", " partition.unlabeled_list = b "]
    partition = load(path, lists).partition
    assert (partition.labeled, partition.balanced, partition.unlabeled_list) == (None, False, "b")
    with pytest.raises(UserError, match="balanced is a way to draw"):
        load(path, [*lists, "partition.balanced=true"])


def test_all_mistakes_at_once(write_recipe):
    with pytest.raises(UserError) as error:
        load(write_recipe(), ["optim.lr=0", "run.seed=-1", "eval.mode=tile"])
    assert len(str(error.value).splitlines()) == 3


def test_mgd_terms_must_name_the_teachers(write_recipe):
    path = write_recipe(method={"name": "mgd", "pixel": {"teachers": ["deep"]}}, teachers={"deep": {"recipe": "x"}})
    assert load(path).method.image.weight == 0.002
    with pytest.raises(UserError, match="image.teachers = 'deap': no such teacher; did you mean 'deep'"):
        load(path, ['method.image.teachers=["deap"]'])
    with pytest.raises(UserError, match="pixel.teachers names 'deep' twice"):
        load(path, ['method.pixel.teachers=["deep", "deep"]'])
    with pytest.raises(UserError, match=r"\[method.pixel\] on = \[\]: a list of at least 1 item"):
        load(path, ["method.pixel.on=[]"])
    with pytest.raises(UserError, match="nothing uses the teacher 'wide'"):
        load(path, ["teachers.wide.recipe=y"])
    with pytest.raises(UserError, match="pixel.class_balance does nothing without pixel.teachers"):
        load(path, ["method.pixel={class_balance=0.5}", 'method.image.teachers=["deep"]'])
    with pytest.raises(UserError, match=r"\[teachers.deep\]: give either recipe or checkpoint"):
        load(path, ["teachers.deep.checkpoint=y"])


@pytest.mark.parametrize("name", ["a.b", "", "deep/wide", "tief ü"])
def test_names_of_teachers_can_be_reached(write_recipe, name):
    method = {"name": "kd", "distill_from": [name]}
    path = write_recipe(method=method, teachers={name: {"recipe": "x"}})
    with pytest.raises(UserError, match=re.escape(f"[teachers] {name!r}: a name is letters, digits, - and _")):
        load(path)
    path = write_recipe(method=ONLINE | {"teachers": {name: TEACHER}})
    with pytest.raises(UserError, match=re.escape(f"[method.teachers] {name!r}: a name is letters")):
        load(path)


def test_missing_and_broken_files(tmp_path, write_recipe):
    write_recipe("voc_r18.toml")
    with pytest.raises(UserError, match=r"voc_r19.toml: cannot be read.*did you mean 'voc_r18.toml'"):
        load(tmp_path / "voc_r19.toml")
    with pytest.raises(UserError, match=r"the folder .*nowhere does not exist$"):
        load(tmp_path / "nowhere" / "a.toml")
    with pytest.raises(UserError, match=r"the folder nowhere does not exist in /"):
        load("nowhere/a.toml")
    (tmp_path / "broken.toml").write_text("[run\n")
    with pytest.raises(UserError, match="broken.toml: not valid TOML"):
        load(tmp_path / "broken.toml")


def test_resolved_recipe_reads_back_the_same(write_recipe, tmp_path):
    recipe = load(write_recipe(), ["run.seed=3", "student.backbone=resnet18d"])
    assert recipe.run.seed == 3 and recipe.student.backbone == "resnet18d"
    again = tmp_path / "again.toml"
    again.write_text(recipe.to_toml())
    assert load(again).to_dict() == recipe.to_dict() == tomllib.loads(recipe.to_toml())
    assert recipe.to_dict()["partition"]["seed"] == 3


def test_labeled_amount():
    assert [labeled_amount(share, 367) for share in ("1/32", "1/16", "1/8", "1/4", 1.0)] == [11, 23, 46, 92, 367]
    assert labeled_amount(5, 367) == 5 and labeled_amount(0.001, 367) == 1


def test_schema_for_editors():
    done = subprocess.run([sys.executable, "-m", "mgd.schema", "--schema"], capture_output=True, text=True)
    schema = json.loads(done.stdout)
    assert schema == json.loads(json.dumps(json_schema()))
    assert {"run", "data", "partition", "student", "method", "optim"} <= set(schema["required"])
    assert "MGDConfig" in schema["$defs"] and "description" in schema["$defs"]["Optim"]["properties"]["lr"]


def test_recipes_are_checked_by_command(write_recipe, tmp_path, capsys):
    good = write_recipe("good.toml")
    bad = write_recipe("bad.toml", optim={"lr": -1.0})
    lost = write_recipe(
        "lost.toml",
        method={"name": "kd", "distill_from": ["a"]},
        teachers={"a": {"recipe": str(tmp_path / "nowhere.toml")}},
    )
    for arguments, status in (([good], 0), ([bad, lost, good], 2), ([good, "--set", "optim.step=3"], 2), ([], 2)):
        with pytest.raises(SystemExit) as done:
            main([str(argument) for argument in arguments])
        assert done.value.code == status
    with pytest.raises(SystemExit):  # what the run itself would be refused for
        main([str(ROOT / "recipes" / "quickstart.toml"), "--set", "run.name=quickstart_deep-s0"])
    out, err = capsys.readouterr()
    assert out.count("good.toml: ok") == 2
    for wanted in (
        "would share the folder",
        *("bad.toml: [optim] lr", "nowhere.toml: cannot be read", "step: unknown key", "name a recipe"),
    ):
        assert wanted in err
