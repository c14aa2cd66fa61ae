"""The choice of what to label, and a run on the lists that it writes."""

import json
import re
import tomllib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tomli_w
import torch
from conftest import call_stage, forget_data, greedy, run_stage, torchrun

from mgd import plots
from mgd.data.candidates import Candidates
from mgd.data.lists import read_list
from mgd.data.partitions import split
from mgd.models.segmenter import build_segmenter
from mgd.pictures import to_tensor
from mgd.recipe import load
from mgd.sections import Partition

KINDS = ("labeled", "unlabeled")
TRAIN = [f"train-{index:06d}" for index in range(12)]


def lists(folder):
    return [read_list(folder / f"{kind}.txt") for kind in KINDS]


def on_lists(folder):
    """Flags of a recipe that takes the lists of a choice."""
    values = {"protocol": "files", **{f"{kind}_list": folder / f"{kind}.txt" for kind in KINDS}}
    return [part for key, value in values.items() for part in ("--set", f"partition.{key}={value}")]


@pytest.fixture
def choose(capsys, tmp_path):
    """Run the stage; return exit status and both outputs."""

    def run(recipe, output, budget, *args, strategy="coverage"):
        given = ("--strategy", strategy) if strategy else ()
        arguments = ("--recipe", recipe, "--output", tmp_path / output, "--budget", budget, *given, *args)
        return call_stage(capsys, "choose.py", *arguments)

    return run


@pytest.fixture
def train(capsys, tmp_path):
    """Train on the lists of a choice; return exit status and the last error up to where it explains."""

    def run(recipe, choice, *args):
        forget_data()
        status, _, error = call_stage(capsys, "teacher_cps.py", "--recipe", recipe, *on_lists(tmp_path / choice), *args)
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        return status, lines[-1].partition(" (")[0] if lines else ""

    return run


@pytest.fixture
def photos(write_recipe, tmp_path):
    """A recipe of a folder with photos of many sizes, and as yet no mask; and a painter of masks."""
    root, random = tmp_path / "mine", np.random.default_rng(0)
    for index in range(20):
        place = "unlabeled/film" if index % 4 == 0 else "images"
        path = root / place / f"photo {index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (20 + 3 * index, 33)
        PIL.Image.fromarray(random.integers(256, size=(*size, 3), dtype=np.uint8)).save(path)

    def write(**data):
        recipe = write_recipe(student={"output_stride": 32})
        data = {"name": "folder", "root": str(root), "classes": ["a", "b"], "crop": 32, "workers": 0} | data
        recipe.write_text(tomli_w.dumps(tomllib.loads(recipe.read_text()) | {"data": data}))
        return recipe

    return root, write


def paint(folder):
    """Paint the masks that selected.txt asks for."""
    for line in (folder / "selected.txt").read_text().splitlines():
        image, mask = map(Path, line.split("\t"))
        with PIL.Image.open(image) as picture:
            width, height = picture.size
        mask.parent.mkdir(parents=True, exist_ok=True)
        values = np.arange(width * height).reshape(height, width) % 2
        PIL.Image.fromarray(values.astype(np.uint8)).save(mask)


def test_random_is_the_draw_of_the_recipe(write_recipe, choose, tmp_path):
    recipe = write_recipe()
    status, out, error = choose(recipe, "third", "1/3", "--set", "run.seed=3", strategy=None)
    assert status == 0, error
    drawn = split(Partition(labeled=4), TRAIN, [], seed=3)
    assert lists(tmp_path / "third") == [list(drawn.labeled), list(drawn.unlabeled)]
    assert "| random   | 4      | 12 | 0          | 4        | 8          | 0        |" in out
    choose(recipe, "other", 4, "--strategy", "random", "--set", "run.seed=3", "--set", "partition.seed=1")
    assert lists(tmp_path / "other")[0] == list(split(Partition(labeled=4), TRAIN, [], seed=1).labeled)
    balanced = ("--set", "partition.balanced=true")
    _, out, _ = choose(recipe, "less", 2, "--strategy", "random", "--set", "run.seed=3", *balanced)
    assert "note: [partition] balanced looks at masks" in out
    more, less = ((tmp_path / name / "selected.txt").read_text() for name in ("third", "less"))
    assert more.startswith(less), "the first half of a draw is a draw"


def described(network, rows):
    """What a network's backbone sees in each image, squeezed into the training crop."""
    vectors = {}
    for row in rows:
        with torch.no_grad():
            seen = network.describe(to_tensor(row["image"].convert("RGB").resize((32, 32)))[None])[0]
        vectors[row["id"]] = seen.double().numpy()
    return vectors


def covering(vectors, names, count, known=()):
    """The names that coverage chooses among some."""
    places = greedy([vectors[name] for name in names], count, [vectors[name] for name in known])
    return [names[place] for place in places]


def test_coverage_is_of_what_the_model_sees_and_counts_what_is_labeled(write_recipe, choose, tmp_path):
    recipe = write_recipe()
    loaded = load(recipe)
    splits = loaded.data.load()
    network = build_segmenter(loaded.student, splits.classes, splits.colors, seed=5).eval()
    network.save(tmp_path / "model")
    vectors = described(network, splits.labeled)
    assert choose(recipe, "alone", 4, "--model", tmp_path / "model")[0] == 0
    assert (tmp_path / "alone" / "selected.txt").read_text().split() == covering(vectors, TRAIN, 4)
    assert choose(recipe, "first", 3, strategy="random")[0] == 0
    labeled, rest = lists(tmp_path / "first")
    assert choose(recipe, "more", 3, "--model", tmp_path / "model", *on_lists(tmp_path / "first"))[0] == 0
    wanted = covering(vectors, rest, 3, labeled)
    assert (tmp_path / "more" / "selected.txt").read_text().split() == wanted != covering(vectors, rest, 3)


def test_coverage_is_repeatable_and_its_lists_train(write_recipe, choose, train, tmp_path):
    recipe = write_recipe()
    status, out, error = choose(recipe, "picks", 4, "--json", tmp_path / "row.json")
    assert status == 0, error
    assert "a backbone of random weights sees little" in out
    labeled, unlabeled = lists(tmp_path / "picks")
    assert len(labeled) == 4 and sorted(labeled + unlabeled) == TRAIN
    order = (tmp_path / "picks" / "selected.txt").read_text().split()
    assert sorted(order) == labeled
    with PIL.Image.open(tmp_path / "picks" / "selected.png") as sheet:
        assert sheet.width > 300 and np.asarray(sheet).std() > 20
    assert json.loads((tmp_path / "row.json").read_text())[0]["chosen"] == 4

    assert choose(recipe, "again", 2)[0] == 0  # a smaller budget takes the first ones of the larger
    assert (tmp_path / "again" / "selected.txt").read_text().split() == order[:2]
    before = (tmp_path / "picks" / "labeled.txt").read_bytes()
    status, _, error = choose(recipe, "picks", 5)
    assert status == 2 and "an earlier choice; name another --output" in error
    assert (tmp_path / "picks" / "labeled.txt").read_bytes() == before

    command = out.strip().splitlines()[-1]
    assert all(part in command for part in ("teacher_cps.py", "protocol=files", str(tmp_path / "picks")))
    assert train(recipe, "picks") == (0, "")
    manifest = json.loads((tmp_path / "runs" / "tiny" / "partition.json").read_text())
    assert (manifest["protocol"], manifest["labeled"], manifest["unlabeled"]) == ("files", labeled, unlabeled)

    assert choose(recipe, "seen", 4, "--model", tmp_path / "runs" / "tiny")[0] == 0
    assert len(lists(tmp_path / "seen")[0]) == 4


def test_disagreement_chooses_among_the_most_disputed(write_recipe, choose, tmp_path):
    recipe = load(write_recipe())
    splits = recipe.data.load()
    networks = [
        build_segmenter(recipe.student, classes, splits.colors, seed).eval()
        for seed, classes in ((0, splits.classes), (1, splits.classes), (0, splits.classes[::-1]))
    ]
    for index, network in enumerate(networks):
        network.save(tmp_path / str(index))
    disputed = {}
    for row in splits.labeled:
        first, second = (network.predict(row["image"]).label for network in networks[:2])
        disputed[row["id"]] = (first != second).mean()
    ranked = sorted(disputed, key=disputed.get, reverse=True)
    assert disputed[ranked[3]] > disputed[ranked[4]] and disputed[ranked[7]] > disputed[ranked[8]]
    options = ("--strategy", "disagreement", "--model", tmp_path / "0")
    status, _, error = choose(recipe.source, "one", 1, *options, tmp_path / "1")
    assert status == 0, error
    assert set(lists(tmp_path / "one")[0]) < set(ranked[:4])
    assert choose(recipe.source, "two", 2, *options, tmp_path / "1")[0] == 0
    vectors = described(networks[0], splits.labeled)
    assert (tmp_path / "two" / "selected.txt").read_text().split() == covering(vectors, sorted(ranked[:8]), 2)
    status, _, error = choose(recipe.source, "other", 1, *options, tmp_path / "2")
    assert status == 2 and "they must be the same" in error


@pytest.mark.parametrize("strategy", ["random", "coverage"])
def test_a_second_choice_goes_on_from_the_lists_of_the_first(write_recipe, choose, tmp_path, strategy):
    recipe = write_recipe()
    assert choose(recipe, "first", 3, "--strategy", "random")[0] == 0
    before = lists(tmp_path / "first")
    status, out, error = choose(recipe, "second", 4, *on_lists(tmp_path / "first"), strategy=strategy)
    assert status == 0, error
    labeled, unlabeled = lists(tmp_path / "second")
    chosen = (tmp_path / "second" / "selected.txt").read_text().split()
    assert len(chosen) == 4 and set(chosen) <= set(before[1])
    assert labeled == sorted([*before[0], *chosen]) and sorted(labeled + unlabeled) == TRAIN
    assert out.strip().splitlines()[-1].count("labeled_list") == 2, "the command names the new lists alone"


@pytest.mark.parametrize("written", [("selected.txt",), ("selected.txt", "selected.png", "unlabeled.txt")])
def test_a_choice_that_was_cut_off_is_made_again(write_recipe, choose, tmp_path, written):
    recipe = write_recipe()
    assert choose(recipe, "whole", 3)[0] == 0
    (tmp_path / "cut").mkdir()
    for name in written:
        (tmp_path / "cut" / name).write_text("torn")
    status, _, error = choose(recipe, "cut", 3)
    assert status == 0, error
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()
    (tmp_path / "cut" / "labeled.txt").unlink()
    (tmp_path / "cut" / ".labeled.txt.4711").write_text("to")  # it was killed while it wrote
    assert choose(recipe, "cut", 3)[0] == 0
    (tmp_path / "cut" / "labeled.txt").unlink()
    (tmp_path / "cut" / "mine.txt").write_text("years of work")
    assert "holds other files; name another" in choose(recipe, "cut", 3)[2]


def test_two_choices_at_once_do_not_mix(write_recipe, choose, tmp_path, monkeypatch):
    def slowly(found, *args):
        if not (tmp_path / "picks").exists():  # the first is about to write when the second begins, and ends
            monkeypatch.undo()
            assert choose(recipe, "picks", 3, "--set", "run.seed=1", strategy="random")[0] == 0
        return lists_of(found, *args)

    recipe, lists_of = write_recipe(), Candidates.lists
    monkeypatch.setattr(Candidates, "lists", slowly)
    status, _, error = choose(recipe, "picks", 3, strategy="random")
    assert status == 2 and "another choice has been written there meanwhile; name another --output" in error
    chosen = (tmp_path / "picks" / "selected.txt").read_text().split()
    assert set(chosen) <= set(lists(tmp_path / "picks")[0])


def test_a_choice_that_is_being_written_is_not_one_that_was_cut_off(write_recipe, choose, tmp_path, monkeypatch):
    refused = []

    def slowly(*args):
        monkeypatch.undo()
        refused.append(choose(recipe, "picks", 3, "--set", "run.seed=1"))
        return sheet(*args)

    recipe, sheet = write_recipe(), plots.save_contact_sheet
    monkeypatch.setattr(plots, "save_contact_sheet", slowly)
    assert choose(recipe, "picks", 2)[0] == 0
    ((status, _, error),) = refused
    assert status == 75 and "picks is being written by another process" in error
    assert len((tmp_path / "picks" / "selected.txt").read_text().split()) == 2


@pytest.mark.slow
@pytest.mark.xdist_group("ports")  # of fixed numbers
@pytest.mark.parametrize("strategy", ["random", "coverage"])
def test_two_processes_choose_as_one(write_recipe, choose, tmp_path, strategy):
    recipe = write_recipe()
    assert choose(recipe, "one", 5, strategy=strategy)[0] == 0
    arguments = ("--recipe", recipe, "--budget", 5, "--strategy", strategy, "--output", tmp_path / "two")
    done = run_stage("choose.py", *arguments, launcher=torchrun(2, 29547), env={"ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr
    for name in ("selected.txt", "labeled.txt", "unlabeled.txt"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()


def count_held_out(out):
    return int(re.search(r"(\d+) of all masks will be held out", out)[1])


def test_photos_without_a_mask_then_with_some(photos, choose, train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root, write = photos
    recipe = write(root="mine", val_share=0.3)
    status, out, error = choose(recipe, "first", 6)
    assert status == 0, error
    held_out = count_held_out(out)
    assert 0 < held_out < 6 and "before all are there" in out
    chosen = (tmp_path / "first" / "selected.txt").read_text().splitlines()
    assert len(chosen) == 6 and not (root / "masks").exists()
    told = re.search(r"\(of the chosen: (.*)\)", out)[1].split(", ")
    assert len(told) == held_out and not set(told) & set(lists(tmp_path / "first")[0])
    for image, mask in (line.split("\t") for line in chosen):
        assert (tmp_path / image).is_file() and mask.startswith("mine/masks/") and mask.endswith(".png")
    assert any("unlabeled/film/" in line for line in chosen) and any("mine/images/" in line for line in chosen)

    assert train(recipe, "first") == (
        2,
        "error: the folder mine/masks does not exist; stages/choose.py says which images to paint masks for",
    )
    paint(tmp_path / "first")
    labeled, unlabeled = lists(tmp_path / "first")
    assert train(recipe, "first") == (0, "")
    manifest = json.loads((tmp_path / "runs" / "tiny" / "partition.json").read_text())
    assert (manifest["labeled"], manifest["unlabeled"]) == (labeled, unlabeled)
    assert (len(labeled), len(unlabeled)) == (6 - held_out, 14)

    status, out, error = choose(recipe, "second", 3)  # goes on where the first left off
    assert status == 0, error
    more = (tmp_path / "second" / "selected.txt").read_text().splitlines()
    assert len(more) == 3 and not set(more) & set(chosen)
    labeled, unlabeled = lists(tmp_path / "second")
    assert held_out <= count_held_out(out) < 9
    assert (len(labeled), len(unlabeled)) == (9 - count_held_out(out), 11)
    paint(tmp_path / "second")
    assert train(recipe, "second", "--restart") == (0, "")


def test_what_cannot_be_read_is_named_or_left_out(photos, choose, tmp_path):
    root, write = photos
    (root / "images" / "photo 01.png").write_bytes(b"\x89PNG cut short")
    status, _, error = choose(write(), "picks", 5)
    assert status == 2 and "1 image(s) cannot be used: image photo 01 cannot be read" in error
    assert not (tmp_path / "picks").exists()
    status, out, error = choose(write(on_error="skip"), "picks", 17)
    assert status == 0, error
    assert "note: 1 image(s) skipped" in out and "photo 01" not in "".join(map(str, lists(tmp_path / "picks")))


def test_what_has_a_mask_but_cannot_be_read_counts_when_some_are_held_out(photos, choose, train, tmp_path):
    root, write = photos
    (tmp_path / "before").mkdir()
    names = [path for path in sorted((root / "images").glob("*.png"))][:7]
    lines = [f"{path}\t{root / 'masks' / path.name}\n" for path in names]
    (tmp_path / "before" / "selected.txt").write_text("".join(lines))
    paint(tmp_path / "before")
    names[0].write_bytes(b"\x89PNG cut short")
    recipe = write(on_error="skip", val_share=0.2)
    status, out, error = choose(recipe, "picks", 6)
    assert status == 0 and 0 < count_held_out(out) < 12, error
    paint(tmp_path / "picks")
    assert train(recipe, "picks") == (0, "")


def test_bad_input_is_one_line(write_recipe, photos, choose, tmp_path):
    recipe = write_recipe()
    for arguments, message in (
        (("12",), "--budget 12: 12 images can be chosen from; give at most 11"),
        (("1.0",), "--budget 1.0: 12 images can be chosen from; give at most 11"),
        (("4", "--strategy", "disagreement"), "--strategy disagreement takes 2 --model, not 0"),
        (("4", "--strategy", "random", "--model", "x"), "--strategy random takes 0 --model, not 1"),
        (("4", "--model", tmp_path), "expected a run, a model folder or a hub id"),
        (("0",), "0 is no count of images"),
        (("1/0",), "no fraction"),
        (("many",), "'many' is no count, share or fraction: 50, 0.05 or 1/16"),
    ):
        status, _, error = choose(recipe, "out", *arguments)
        assert status == 2 and message in error and "Traceback" not in error, error
    section = load(recipe).student
    classes = load(recipe).data.class_names()
    build_segmenter(section, classes, [(0, 0, 0)] * len(classes), seed=0).save(tmp_path / "model")
    status, _, error = choose(
        recipe, "out", "4", "--model", tmp_path / "model", tmp_path / "model", strategy="disagreement"
    )
    assert status == 2 and "the same weights twice do not disagree" in error
    root, write = photos
    status, _, error = choose(write(), "out", "1", strategy="random")
    assert status == 2 and "--budget 1: a run needs two masks, one to learn from and one to evaluate" in error
    status, _, error = choose(write(), root / "unlabeled" / "out", "4", strategy="random")
    assert status == 2 and "lies among the images of [data]" in error
    assert not (tmp_path / "out").exists() and not (root / "unlabeled" / "out").exists()
