import csv
import json
import shutil
import tomllib

import numpy as np
import PIL.Image
import pytest
import tomli_w
from accelerate import Accelerator
from conftest import ROOT, log_rows

from mgd.cells import collect
from mgd.data.images import Images
from mgd.data.reading import load_splits
from mgd.errors import UserError
from mgd.experiment import evaluate_network, run_recipe
from mgd.markdown import markdown
from mgd.models.segmenter import load_segmenter
from mgd.needed import needed_recipes
from mgd.recipe import load
from mgd.report import as_csv, notes, result_rows, tables

REFERENCE = {"miou": 55.0, "source": "paper, Table 9"}


@pytest.fixture
def fake_run(write_recipe, tmp_path):
    """Make a run folder with a given result."""

    def make(name, seed, miou, folder="runs", **changes):
        run = changes.pop("run", {})
        path = write_recipe(f"{name}.toml", run={"name": f"{name}-s{{seed}}", "seed": seed, **run}, **changes)
        recipe = load(path)
        place = tmp_path / folder / f"{name}-s{seed}"
        place.mkdir(parents=True)
        (place / "recipe.toml").write_text(recipe.to_toml())
        counts = {
            "num_labeled": recipe.partition.labeled,
            "num_unlabeled": 12 - recipe.partition.labeled,
            "num_val": 25,
        }
        metrics = {"miou": miou, **counts, "seed": seed, "seconds": 60.0, "steps": 4}
        (place / "metrics.json").write_text(json.dumps(metrics))
        return place

    return make


def test_mean_spread_reference_and_difference_of_three_seeds(fake_run, tmp_path):
    for seed, miou in ((0, 50.0), (1, 60.0), (2, 70.0)):
        fake_run("a_4", seed, miou, reference=REFERENCE)
    fake_run("a_2", 0, 40.0, partition={"labeled": 2})
    fake_run("b_4", 0, 61.0, method={"name": "cps"})
    (tmp_path / "runs" / "no_run").mkdir()
    cells, left_out = collect([tmp_path / "runs"])
    assert left_out == []
    (table,) = tables(cells).values()
    assert [list(row.values()) for row in table] == [
        ["a", "supervised", "test_resnet", "40.00 (n=1)", "60.00 ± 10.00 (n=3; paper, Table 9 55.00, +5.00)"],
        ["b", "cps", "test_resnet", "", "61.00 (n=1)"],
    ]
    assert list(table[0])[3:] == ["2: 2 / 10", "4: 4 / 8"]
    row = next(row for row in result_rows(cells) if row["run"] == "a_4")
    assert (row["miou"], row["spread"], row["difference"], row["seeds"]) == (60.0, 10.0, 5.0, "0 1 2")
    read = list(csv.DictReader(as_csv(result_rows(cells)).splitlines()))
    assert [float(line["miou"]) for line in read] == [40.0, 60.0, 61.0]
    assert markdown([{"x": 1.234, "y": None}]) == "| x    | y |\n| ---- | - |\n| 1.23 | - |"


def keep_partition(run, **found):
    manifest = {"labeled": ["a", "b"], "unlabeled": ["c"], "val": ["v"], "masks": {"a": 1, "validation: v": 2}}
    (run / "partition.json").write_text(json.dumps(manifest | found))


def test_runs_of_other_images_or_masks_are_not_averaged_nor_compared(fake_run, tmp_path):
    kd = {"method": {"name": "kd", "distill_from": ["big"]}, "teachers": {"big": {"checkpoint": "runs/big"}}}
    for seed in (0, 1):
        keep_partition(fake_run("base", seed, 40.0 + seed))
        keep_partition(fake_run("student", seed, 50.0 + seed, **kd))
    rows = {row["run"]: row for row in result_rows(collect([tmp_path / "runs"])[0])}
    assert rows["student"]["seeds"] == "0 1" and rows["student"]["gain"] == 10.0

    mended = fake_run("student", 0, 70.0, folder="mended", **kd)
    for found in ({"masks": {"a": 3, "validation: v": 2}}, {"val": ["w"]}, {"masks": {"validation: v": 4}}):
        keep_partition(mended, **found)
        cells, left_out = collect([tmp_path / "runs", tmp_path / "mended"])
        assert left_out == []
        rows = {row["run"]: row for row in result_rows(cells)}
        (other,) = (row for name, row in rows.items() if name == f"student ({mended})")
        assert (other["seeds"], other["miou"], other["gain"]) == ("0", 70.0, None)
        (before,) = (row for name, row in rows.items() if name == f"student ({tmp_path / 'runs' / 'student-s0'})")
        assert (before["seeds"], before["miou"], before["gain"]) == ("0 1", 50.5, 10.0)
        assert any("not one set of images and masks: student" in line for line in notes(cells))
    keep_partition(mended)
    assert "the same recipe and seeds as" in collect([tmp_path / "runs", tmp_path / "mended"])[1][0]
    drawn = fake_run("student", 0, 60.0, folder="drawn", partition={"seed": 1}, **kd)  # another draw is another run
    keep_partition(drawn)
    (cell,) = (cell for cell in collect([tmp_path / "runs", drawn])[0] if cell.label == "student")
    assert cell.mious == [50.0, 60.0, 51.0] and result_rows([cell])[0]["seeds"] == "0 0/1 1"
    keep_partition(tmp_path / "runs" / "student-s1", labeled=["a", "c"])
    rows = {row["run"]: row for row in result_rows(collect([tmp_path / "runs"])[0])}
    assert rows["student"]["seeds"] == "0 1" and rows["student"]["gain"] is None, "seed 1 learned from other labels"


def test_a_run_that_a_link_leads_back_to_counts_once(fake_run, tmp_path):
    fake_run("a_4", 0, 50.0)
    (tmp_path / "runs" / "again").symlink_to(tmp_path / "runs")
    cells, left_out = collect([tmp_path / "runs"])
    assert [run.folder for run in cells[0].runs] == [tmp_path / "runs" / "a_4-s0"] and left_out == []


def test_data_sets_in_folders_of_one_name_stand_apart(fake_run, tmp_path):
    for name, root in (("cats", "cats/mine"), ("more", "./cats/mine"), ("dogs", "dogs/mine"), ("rust", "photos")):
        path = fake_run(name, 0, 50.0) / "recipe.toml"
        own = {"name": "folder", "root": root, "classes": ["no", "yes"], "crop": 32}
        path.write_text(tomli_w.dumps(tomllib.loads(path.read_text()) | {"data": own}))
    cells, _ = collect([tmp_path / "runs"])
    assert sorted(tables(cells)) == [
        f"folder {place}, partitions: random" for place in ("cats/mine", "dogs/mine", "photos")
    ]


def test_a_stream_of_unknown_length_and_few_validation_images_are_called_so(fake_run, tmp_path):
    path = fake_run("a", 0, 50.0) / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_unlabeled": None}))
    (cell,), _ = collect([tmp_path / "runs"])
    assert cell.partition == "4: 4 / stream"
    assert notes([cell]) == []
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_val": 5}))
    (cell,), _ = collect([tmp_path / "runs"])
    assert notes([cell]) == [f"{cell.title}: 5 validation image(s); below 20 the mIoU is a rough guide"]


def test_gains_are_differences_of_the_same_seed(fake_run, tmp_path):
    for seed, plain, better in ((0, 50.0, 53.0), (1, 60.0, 61.0), (2, 40.0, 43.5)):
        fake_run("plain", seed, plain)
        fake_run("plain_long", seed, 99.0, optim={"steps": 8})
        fake_run("cps", seed, better, method={"name": "cps"})
    fake_run("cps_2", 0, 45.0, method={"name": "cps"}, partition={"labeled": 2})
    rows = {row["run"]: row for row in result_rows(collect([tmp_path / "runs"])[0])}
    assert rows["cps"]["gain"] == pytest.approx(2.5) and rows["cps"]["miou_by_seed"] == "53.00 61.00 43.50"
    assert rows["cps"]["gain_spread"] == pytest.approx(np.std([3.0, 1.0, 3.5], ddof=1))
    assert [rows[name]["gain"] for name in ("plain", "plain_long", "cps_2")] == [None] * 3
    shutil.rmtree(tmp_path / "runs" / "plain-s1")
    shutil.rmtree(tmp_path / "runs" / "plain_long-s1")
    assert result_rows(collect([tmp_path / "runs"])[0])[0]["gain"] is None  # it would not be of the seeds of the mIoU


def test_scores_on_unlabelled_images_have_columns_of_their_own(fake_run, tmp_path):
    for seed, plain, better in ((0, 30.0, 31.5), (1, 34.0, 35.0)):
        for name, unseen, method in (("plain", plain, "supervised"), ("cps", better, "cps")):
            place = fake_run(name, seed, 50.0, method={"name": method})
            (place / "unlabeled.json").write_text(json.dumps({"miou": unseen, "num_images": 8}))
    fake_run("other", 0, 60.0, method={"name": "cps", "weight": 2.0})
    rows = {row["run"]: row for row in result_rows(collect([tmp_path / "runs"])[0])}
    assert (rows["cps"]["unlabeled_miou"], rows["cps"]["unlabeled_gain"], rows["cps"]["gain"]) == (33.25, 1.25, 0.0)
    assert rows["cps"]["unlabeled_gain_spread"] == pytest.approx(np.std([1.5, 1.0], ddof=1))
    assert rows["cps"]["unlabeled_spread"] == pytest.approx(np.std([31.5, 35.0], ddof=1))
    assert rows["plain"]["unlabeled_miou"] == 32.0 and rows["plain"]["unlabeled_gain"] is None
    assert rows["plain"]["unlabeled_by_seed"] == "30.00 34.00" and rows["other"]["unlabeled_by_seed"] is None
    assert rows["other"]["unlabeled_miou"] is None and rows["other"]["unlabeled_gain"] is None
    for seed, miou in ((0, 50.0), (1, 50.0)):  # nearer, but not scored: no gain is better than that over a farther one
        fake_run("near", seed, miou, optim={"momentum": 0.5})
        fake_run("cps_near", seed, 51.0, method={"name": "cps"}, optim={"momentum": 0.5})
        (tmp_path / "runs" / f"cps_near-s{seed}" / "unlabeled.json").write_text('{"miou": 40.0, "num_images": 8}')
    row = next(row for row in result_rows(collect([tmp_path / "runs"])[0]) if row["run"] == "cps_near")
    assert (row["gain"], row["unlabeled_miou"], row["unlabeled_gain"]) == (1.0, 40.0, None)
    (tmp_path / "runs" / "cps-s1" / "unlabeled.json").unlink()
    rows = {row["run"]: row for row in result_rows(collect([tmp_path / "runs"])[0])}
    assert rows["cps"]["unlabeled_miou"] is None and rows["cps"]["unlabeled_gain"] is None  # of fewer seeds than miou


def test_scores_of_other_unlabelled_images_are_not_compared(fake_run, tmp_path):
    for seed in (0, 1):
        for name, method in (("plain", "supervised"), ("cps", "cps")):
            place = fake_run(name, seed, 50.0, method={"name": method})
            (place / "unlabeled.json").write_text(json.dumps({"miou": 30.0, "num_images": 8}))
    changed = tmp_path / "runs" / "plain-s1" / "unlabeled.json"
    changed.write_text(json.dumps({"miou": 30.0, "num_images": 7}))
    rows = {row["run"]: row for row in result_rows(collect([tmp_path / "runs"])[0])}
    assert rows["plain"]["unlabeled_miou"] is None
    assert rows["cps"]["unlabeled_miou"] == 30.0 and rows["cps"]["unlabeled_gain"] is None


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[1]",
        '{"num_images": 8}',
        '{"miou": 50, "num_images": 8, "sum": [1]}',
        *(f'{{"miou": {x}, "num_images": 8}}' for x in ('"50"', "null", "NaN", "101")),
    ],
)
def test_a_damaged_score_of_unlabelled_images_costs_no_run(fake_run, tmp_path, damage):
    place = fake_run("plain", 0, 50.0)
    (place / "unlabeled.json").write_text(damage)
    cells, left_out = collect([tmp_path / "runs"])
    assert result_rows(cells)[0]["miou"] == 50.0 and result_rows(cells)[0]["unlabeled_miou"] is None
    assert len(left_out) == 1 and "is damaged; score the run again" in left_out[0]


def test_own_data_sets_stand_in_tables_of_their_own(fake_run, tmp_path):
    for name in ("leaves", "roads"):
        path = fake_run(name, 0, 50.0) / "recipe.toml"
        raw = tomllib.loads(path.read_text())
        raw["data"] = {"name": "folder", "root": str(tmp_path / name), "classes": ["a", "b"], "crop": 64}
        path.write_text(tomli_w.dumps(raw))
    assert [title.partition(",")[0] for title in tables(collect([tmp_path / "runs"])[0])] == [
        "folder leaves",
        "folder roads",
    ]


@pytest.mark.parametrize("miou", [0.0, None, "x"])
def test_a_teacher_of_no_use_has_no_share(fake_run, tmp_path, miou):
    teacher = fake_run("teacher", 0, 50.0)
    (teacher / "metrics.json").write_text(json.dumps({"miou": miou}))
    method = {"name": "kd", "distill_from": ["deep"]}
    fake_run("student", 0, 40.0, method=method, teachers={"deep": {"checkpoint": str(teacher)}})
    (row,) = result_rows(collect([tmp_path / "runs"])[0])
    assert row["run"] == "student" and row["of_teacher"] is None


def test_a_gain_is_over_what_the_method_alone_changes(fake_run, tmp_path):
    fake_run("plain", 0, 40.0)
    fake_run("weighted", 0, 46.0, method={"class_balance": 0.5})
    fake_run("other_images", 0, 44.0, partition={"seed": 7})
    pool = {"unlabeled": {"parquet": "pool", "streaming": True}}
    changes = {
        "cps": {"method": {"name": "cps"}},
        "cps_weighted": {"method": {"name": "cps", "class_balance": 0.5}},
        "cps_other": {"method": {"name": "cps"}, "partition": {"seed": 7}},
        "cps_pool": {"method": {"name": "cps"}, "data": pool},
        "cps_long": {"method": {"name": "cps"}, "optim": {"steps": 8}},
        "cps_third": {"method": {"name": "cps"}, "partition": {"seed": 8}},
        "cps_flip": {"method": {"name": "cps"}, "eval": {"flip": True}},
    }
    for name, changed in changes.items():
        fake_run(name, 0, 47.0, **changed)
    rows = {row["run"]: row["gain"] for row in result_rows(collect([tmp_path / "runs"])[0])}
    found = {name: rows[name] for name in changes}
    assert found == {
        **{"cps": 7.0, "cps_weighted": 1.0, "cps_other": 3.0, "cps_pool": 7.0},
        **{"cps_long": None, "cps_third": None, "cps_flip": None},
    }


def test_the_share_of_the_better_teacher(fake_run, tmp_path):
    for seed, student, first, second in ((0, 45.0, 50.0, 40.0), (1, 44.0, 50.0, 55.0)):
        fake_run("deep", seed, first)
        given = fake_run("wide", seed, second, folder="elsewhere")
        teachers = {"d": {"recipe": str(tmp_path / "deep.toml")}, "w": {"checkpoint": str(given)}}
        fake_run("kd", seed, student, teachers=teachers, method={"name": "kd", "distill_from": ["d", "w"]})
    rows = {row["run"]: row for row in result_rows(collect([tmp_path / "runs"])[0])}
    assert rows["kd"]["of_teacher"] == pytest.approx((90 + 80) / 2) and rows["deep"]["of_teacher"] is None
    keep_partition(given)
    keep_partition(tmp_path / "runs" / "kd-s1", masks={"validation: v": 3})
    rows = {row["run"]: row for row in result_rows(collect([tmp_path / "runs"])[0])}
    assert rows["kd"]["of_teacher"] is None, "scored on another mask"
    (given / "partition.json").unlink()
    (given / "metrics.json").unlink()
    rows = {row["run"]: row for row in result_rows(collect([tmp_path / "runs"])[0])}
    assert rows["kd"]["of_teacher"] is None


def test_variants_stand_beside_their_run_in_a_table_of_their_own(fake_run, tmp_path):
    table_6 = {"miou": 51.0, "source": "Table 6"}
    term = {"name": "mgd", "pixel": {"teachers": ["t"]}}
    changes = {"teachers": {"t": {"checkpoint": "x"}}, "method": term}
    fake_run("m_4", 0, 50.0, **changes)
    fake_run("m_4_grid_3", 0, 52.0, reference=table_6, optim={"lr": 0.02}, **changes)
    fake_run("m_4_supervised", 0, 40.0)
    cells, _ = collect([tmp_path / "runs"])
    main, extra = tables(cells).items()
    assert [row["run"] for row in main[1]] == ["m_supervised", "m"]
    assert "Table 6: m_4 and its variants" in extra[0]
    assert [row["run"] for row in extra[1]] == ["m", "m_grid_3"]


def test_variants_stand_beside_the_run_of_their_own_folder(fake_run, tmp_path):
    for steps, folder in ((4, "short"), (8, "long")):
        fake_run("m_4", 0, 50.0 + steps, folder=folder, optim={"steps": steps})
        fake_run("m_4_grid_3", 0, 60.0 + steps, folder=folder, optim={"steps": steps})
    cells, _ = collect([tmp_path / "short", tmp_path / "long"])
    main, *extra = tables(cells).values()
    assert [row["run"] for row in main] == [f"m ({tmp_path}/{folder}/m_4-s0)" for folder in ("short", "long")]
    assert [[list(row.values())[-1] for row in table] for table in extra] == [
        ["54.00 (n=1)", "64.00 (n=1)"],
        ["58.00 (n=1)", "68.00 (n=1)"],
    ]


def test_what_is_left_out_is_said(fake_run, tmp_path):
    fake_run("a", 0, 50.0)
    twin = fake_run("a", 0, 51.0, folder="again")
    unfinished = fake_run("b", 0, 50.0)
    (unfinished / "metrics.json").unlink()
    broken = fake_run("c", 0, 50.0)
    (broken / "recipe.toml").write_text("[run\n")
    for number, (key, value) in enumerate({"miou": None, "seed": 7, "seconds": "1", "best_on_val": 5}.items()):
        edited = fake_run(f"d{number}", 0, 50.0) / "metrics.json"
        edited.write_text(json.dumps(json.loads(edited.read_text()) | {key: value}))
    shutil.copytree(twin, tmp_path / "runs" / ".a-s0.deleted")
    cells, left_out = collect([tmp_path / "runs", tmp_path / "again"])
    changed = [line for line in left_out if "metrics.json is not as a run wrote it" in line]
    assert [line.split(": ")[2].split(" =")[0] for line in changed] == ["miou", "seed", "seconds", "best_on_val"]
    left_out = [line for line in left_out if line not in changed]
    assert [(cell.label, cell.mean) for cell in cells] == [("a", 50.0)]
    assert [line.split(":")[0] for line in left_out] == [str(unfinished), str(broken), str(twin)]
    with pytest.raises(UserError, match="no such folder"):
        collect([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="no finished run"):
        collect([unfinished])


def test_another_setting_is_another_cell_and_another_budget_is_announced(fake_run, tmp_path):
    fake_run("a", 0, 50.0)
    fake_run("a", 1, 60.0, folder="long", optim={"steps": 8})
    cells, _ = collect([tmp_path / "runs", tmp_path / "long"])
    assert len(cells) == 2 and len({cell.name for cell in cells}) == 2
    (line,) = notes(cells)
    assert "not one budget, optim.steps" in line
    fake_run("b", 0, 50.0, eval={"flip": True})
    cells, _ = collect([tmp_path / "runs"])
    assert any("not one budget, eval.flip" in line for line in notes(cells))


def test_seeds_of_other_images_are_not_averaged(fake_run, tmp_path):
    data = {"name": "folder", "classes": ["a", "b"]}
    for seed, root in enumerate(("here", "there")):
        place = fake_run("a", seed, 50.0)
        recipe = tomllib.loads((place / "recipe.toml").read_text()) | {"data": data | {"root": root}}
        (place / "recipe.toml").write_text(tomli_w.dumps(recipe))
    assert len(collect([tmp_path / "runs"])[0]) == 2
    for seed in (0, 1):
        place = tmp_path / "runs" / f"a-s{seed}"
        recipe = tomllib.loads((place / "recipe.toml").read_text())
        recipe["data"] = {"name": "camvid", "root": str(seed)}
        (place / "recipe.toml").write_text(tomli_w.dumps(recipe))
    (cell,) = collect([tmp_path / "runs"])[0]
    assert len(cell.runs) == 2 and cell.title == "camvid (val), partitions: random"


def test_runs_that_met_other_images_are_not_averaged(fake_run, tmp_path):
    fake_run("a", 0, 50.0)
    later = [fake_run("a", seed, 60.0, folder="runs/more") for seed in (0, 1)]
    for place in later:  # the same recipe, after more masks had been painted
        metrics = json.loads((place / "metrics.json").read_text()) | {"num_labeled": 6, "num_val": 7}
        (place / "metrics.json").write_text(json.dumps(metrics))
    cells, left_out = collect([tmp_path / "runs"])
    assert left_out == [] and sorted((cell.mean, len(cell.runs)) for cell in cells) == [(50.0, 1), (60.0, 2)]


@pytest.mark.parametrize(
    ("override", "stays"),
    [("run.seed=3", True), ("data.workers=1", True), ("optim.lr=0.1", False), ("partition.labeled=2", False)],
)
def test_a_changed_recipe_loses_its_reference(write_recipe, override, stays):
    recipe = load(write_recipe(reference=REFERENCE), [override])
    assert (recipe.reference is not None) is stays
    assert ("reference" in recipe.to_dict()) is stays


def test_teachers_and_baselines_keep_their_reference():
    student = load(ROOT / "recipes" / "voc_r18_1-8.toml", ["run.seed=1", "data.root=elsewhere"])
    needed = needed_recipes(student)
    assert [recipe.reference.miou for recipe in needed.values()] == [76.43, 71.38]
    changed = load(ROOT / "recipes" / "voc_r18_1-8.toml", ["partition.labeled=1/4"])
    assert [recipe.reference for recipe in needed_recipes(changed).values()] == [None, None]


def test_report_stage_and_best_beside_last(write_recipe, tmp_path, run_here):
    for name in ("supervised", "cps"):
        path = write_recipe(
            run={"name": f"{name}-s{{seed}}"}, method={"name": name}, eval={"every": 1}, optim={"lr": 0.05}
        )
        metrics = run_recipe(load(path), Accelerator())
        folder = tmp_path / "runs" / f"{name}-s0"
        curve = log_rows(folder)
        scores = {row["step"]: row["val_miou"] for row in curve if "val_miou" in row}
        assert set(scores) == {1, 2, 3, 4} and scores[4] == metrics["miou"]
        assert metrics["best_on_val"]["miou"] == max(scores.values()) == scores[metrics["best_on_val"]["step"]]
        recipe = load(folder / "best" / "recipe.toml")
        splits = load_splits(recipe.data)
        images = Images(splits.val, splits.decoder, 1.0)
        again = evaluate_network(load_segmenter(folder / "best"), images, recipe, Accelerator())
        assert again.miou == metrics["best_on_val"]["miou"]
    done = run_here("report.py", tmp_path / "runs", "--output", tmp_path / "out", "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())
    assert {row["run"] for row in rows} == {"supervised", "cps"}
    row = next(row for row in rows if row["run"] == "cps")
    assert row["best_on_val"] == pytest.approx(metrics["best_on_val"]["miou"])
    assert next(row["miou"] for row in rows if row["run"] == "cps") == pytest.approx(metrics["miou"])
    assert (tmp_path / "out" / "report.md").read_text() in done.stdout
    for name, columns in (("cost.png", None), ("partitions.png", None), ("samples_0.png", 4)):
        with PIL.Image.open(tmp_path / "out" / name) as picture:
            assert columns is None or picture.width == columns * 224 - 4
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


def test_no_result_hides_another(fake_run, tmp_path):
    fake_run("net_128_12", 0, 50.0, partition={"labeled": 12})
    fake_run("net_128", 0, 60.0, partition={"labeled": 12})
    fake_run("net_128_4", 0, 40.0)
    (table, *more) = tables(collect([tmp_path / "runs"])[0]).values()
    shown = [value for rows in (table, *more) for row in rows for value in row.values()]
    assert {"40.00 (n=1)", "50.00 (n=1)", "60.00 (n=1)"} <= set(shown)
    assert "net8" not in shown


def test_pictures_of_images_that_can_be_read_and_folders_that_hold_no_run(write_recipe, tmp_path, run_here):
    root = tmp_path / "mine"
    for part, names in (("", "abcd"), ("val", "xyz")):
        for kind in ("images", "masks"):
            (root / part / kind).mkdir(parents=True, exist_ok=True)
        for index, name in enumerate(names):
            PIL.Image.new("RGB", (40, 40), (60 * index, 0, 0)).save(root / part / "images" / f"{name}.png")
            PIL.Image.new("L", (40, 40), index % 2).save(root / part / "masks" / f"{name}.png")
    (root / "val" / "images" / "x.png").write_bytes(b"\x89PNG cut short")
    path = write_recipe()
    data = {"name": "folder", "root": str(root), "val_root": str(root / "val"), "classes": ["a", "b"], "crop": 32}
    data |= {"workers": 0, "on_error": "skip"}
    path.write_text(tomli_w.dumps(tomllib.loads(path.read_text()) | {"data": data}))
    recipe = load(path)
    run_recipe(recipe, Accelerator())
    done = run_here("report.py", recipe.run_dir, recipe.run_dir / "model", "--output", tmp_path / "out")
    assert done.returncode == 0 and (tmp_path / "out" / "samples_0.png").exists(), done.stdout + done.stderr
    assert "1 image(s) skipped by [data] on_error" in done.stdout
    assert f"{recipe.run_dir / 'model'}: the folder of a model; name that of its run" in done.stdout
