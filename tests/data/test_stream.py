"""Streams of unlabelled images: nothing twice, nothing lost, shuffled, and taken up exactly."""

import contextlib
import io
import itertools
import json
import re
import tarfile

import datasets
import numpy as np
import PIL.Image
import pytest
from accelerate import Accelerator
from conftest import forget_data

from mgd.checks import check_recipe
from mgd.data.reading import split_data
from mgd.data.stream import Place, Pool, scan_pool
from mgd.errors import Stopped, UserError
from mgd.experiment import run_recipe
from mgd.finished import finished
from mgd.methods.cps import CPS
from mgd.recipe import load
from mgd.sections import UnlabeledSection


def picture(number):
    buffer = io.BytesIO()
    values = np.full((40, 44, 3), number % 251, np.uint8)
    values[0, 0] = (number // 65536, number // 256 % 256, number % 256)
    PIL.Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def number_of(value):
    red, green, blue = PIL.Image.open(io.BytesIO(value["bytes"])).getpixel((0, 0))
    return red * 65536 + green * 256 + blue


def write_parquet(folder, sizes):
    """Write shards of these sizes; image i of the whole says i in its first pixel."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for shard, size in enumerate(sizes):
        rows = [{"bytes": picture(number), "path": None} for number in range(first, first + size)]
        table = datasets.Dataset.from_dict({"picture": rows}, features=datasets.Features({"picture": datasets.Image()}))
        table.to_parquet(folder / f"part-{shard:03d}.parquet")
        first += size
    return first


def section(folder, **changes):
    return UnlabeledSection(**{"parquet": str(folder), "image_column": "picture", "streaming": True, **changes})


@pytest.mark.parametrize(("sizes", "slots"), [((7, 20, 1, 12, 9), 2), ((30,), 3), ((5, 5), 4)])
def test_a_pass_shows_every_image_once_over_all_readers(tmp_path, sizes, slots):
    count = write_parquet(tmp_path, sizes)
    pool = Pool(section(tmp_path, buffer=8))
    assert pool.count == count
    seen = []
    for slot in range(slots):
        reader = pool.read(slot, slots, seed=3, place=Place())
        mine = list(itertools.takewhile(lambda item: item[2].epoch == 0, reader))
        seen += [number_of(value) for _, value, _ in mine]
    assert sorted(seen) == list(range(count)) and seen != sorted(seen)


def test_any_place_is_taken_up_exactly(tmp_path):
    write_parquet(tmp_path, (7, 20, 1, 12, 9))
    pool = Pool(section(tmp_path, buffer=8))
    whole = list(itertools.islice(pool.read(1, 2, 3, Place()), 60))
    assert {place.epoch for _, _, place in whole} >= {0, 1}
    for cut in (1, 5, 8, 9, 13, 30, 59):
        rest = itertools.islice(pool.read(1, 2, 3, whole[cut - 1][2]), 60 - cut)
        assert [(name, number_of(value), place) for name, value, place in rest] == [
            (name, number_of(value), place) for name, value, place in whole[cut:]
        ]
    other = [number_of(value) for _, value, _ in itertools.islice(pool.read(1, 2, 4, Place()), 20)]
    assert other != [number_of(value) for _, value, _ in whole[:20]]


def test_webdataset_and_what_is_wrong_with_a_pool(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for number in range(6):
            data = picture(number)
            info = tarfile.TarInfo(f"../{number:03d}.png")  # nothing is unpacked, so no path leads anywhere
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    web = {"parquet": None, "webdataset": str(tmp_path), "image_column": "png", "streaming": True}
    pool = Pool(UnlabeledSection(**web))
    found = [number_of(value) for _, value, _ in itertools.islice(pool.read(0, 1, 0, Place()), 6)]
    assert sorted(found) == list(range(6)) and pool.count is None
    assert [path.name for path in tmp_path.rglob("*")] == ["a.tar"]
    with pytest.raises(UserError, match="image_column = 'jpg': there is no such column; choices: .*png"):
        Pool(UnlabeledSection(**web | {"image_column": "jpg"}))
    with pytest.raises(UserError, match="no \\*.parquet there"):
        Pool(section(tmp_path))
    (tmp_path / "x.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(UserError, match=r"\[data.unlabeled\] .* cannot be read"):
        Pool(section(tmp_path))
    with pytest.raises(ValueError, match="give one of hub, parquet and webdataset"):
        UnlabeledSection(parquet="a", hub="b/c")
    write_parquet(tmp_path / "few", (2,))
    with pytest.raises(UserError, match="too few images for 5 readers"):
        next(Pool(section(tmp_path / "few")).read(4, 5, 0, Place()))


@contextlib.contextmanager
def stopped_at_step_4():
    step = CPS.step

    def stopping(self, batch, number):
        if number == 4:
            raise Stopped(15)
        return step(self, batch, number)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(CPS, "step", stopping)
        yield


def stream_recipe(write_recipe, tmp_path, name, workers=0, **changes):
    unlabeled = {"parquet": str(tmp_path / "pool"), "image_column": "picture", "streaming": True, "buffer": 8}
    data = {"unlabeled": unlabeled, "workers": workers} | changes
    run = {"name": name, "checkpoint_every": 3}
    return load(write_recipe(run=run, data=data, partition={"labeled": 12}, method={"name": "cps"}), ["optim.steps=9"])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_over_a_stream_is_resumed_with_the_same_images(write_recipe, tmp_path, monkeypatch, workers):
    write_parquet(tmp_path / "pool", (20, 11, 9))
    seen = []
    step = CPS.step

    def watching(self, batch, number):
        if number == stop_at:
            raise Stopped(15)
        seen.append((number, batch["unlabeled_id"], batch["mix_id"], int(batch["unlabeled"].sum())))
        return step(self, batch, number)

    monkeypatch.setattr(CPS, "step", watching)
    stop_at = None
    metrics = run_recipe(stream_recipe(write_recipe, tmp_path, "whole", workers), Accelerator())
    whole, seen[:] = list(seen), []
    assert metrics["num_unlabeled"] == 40 and len({name for row in whole for name in row[1] + row[2]}) > 30
    stop_at = 7
    recipe = stream_recipe(write_recipe, tmp_path, "cut", workers)
    with pytest.raises(Stopped):
        run_recipe(recipe, Accelerator())
    assert seen == whole[:7]
    stop_at, seen[:] = None, []
    run_recipe(recipe, Accelerator())
    assert seen == whole[6:]


def test_other_readers_begin_a_new_pass(write_recipe, tmp_path, capsys):
    write_parquet(tmp_path / "pool", (20, 11, 9))
    with stopped_at_step_4():
        run_recipe(stream_recipe(write_recipe, tmp_path, "cut", 0), Accelerator())
    run_recipe(stream_recipe(write_recipe, tmp_path, "cut", 2), Accelerator())
    assert "other readers than before; the stream begins a new pass" in capsys.readouterr().out


def test_bad_images_of_a_stream(write_recipe, tmp_path, capsys):
    rows = [{"bytes": picture(number) if number % 4 else b"cut", "path": None} for number in range(12)]
    (tmp_path / "pool").mkdir()
    features = datasets.Features({"picture": datasets.Image()})
    datasets.Dataset.from_dict({"picture": rows}, features=features).to_parquet(tmp_path / "pool" / "a.parquet")
    with pytest.raises(
        UserError, match=r"\[data.unlabeled\] .*: image a.parquet row \d+ cannot be read.*on_error = .skip."
    ):
        run_recipe(stream_recipe(write_recipe, tmp_path, "raise"), Accelerator())
    recipe = stream_recipe(write_recipe, tmp_path, "skip", on_error="skip")
    metrics = run_recipe(recipe, Accelerator())
    listed = [json.loads(line) for line in (recipe.run_dir / "skipped.jsonl").read_text().splitlines()]
    assert metrics["skipped_images"] == len(listed) > 10 and "cannot be read" in listed[0]["image"]


def test_epochs_over_a_stream_of_unknown_length(write_recipe, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        data = picture(1)
        info = tarfile.TarInfo("1.png")
        info.size = len(data)
        file.addfile(info, io.BytesIO(data))
    unlabeled = {"webdataset": str(tmp_path), "image_column": "png", "streaming": True}
    text = write_recipe(data={"unlabeled": unlabeled}, method={"name": "cps"}).read_text()
    path = tmp_path / "epochs.toml"
    path.write_text(text.replace("steps = 4", "epochs = 1"))
    with pytest.raises(UserError, match="the length of the unlabelled stream is not known; give steps instead"):
        check_recipe(load(path), Accelerator())  # before its teachers are trained, then


def test_a_pool_that_is_no_stream_joins_the_unlabelled_images(write_recipe, tmp_path):
    write_parquet(tmp_path / "pool", (20, 11))
    unlabeled = {"parquet": str(tmp_path / "pool"), "image_column": "picture"}
    recipe = load(write_recipe(data={"unlabeled": unlabeled}, method={"name": "cps"}))
    assert run_recipe(recipe, Accelerator())["num_unlabeled"] == 8 + 31
    manifest = json.loads((recipe.run_dir / "partition.json").read_text())
    assert "pool/00000030" in manifest["unlabeled"]
    lists = {"labeled_list": [0, 1, 2, 3], "unlabeled_list": [5, 6]}
    for key, numbers in lists.items():
        (tmp_path / key).write_text("".join(f"train-{number:06d}\n" for number in numbers))
    places = [f"partition.{key}={tmp_path / key}" for key in lists]
    listed = load(recipe.source, ["partition.protocol=files", *places])
    drawn = split_data(listed.data, listed.partition, listed.partition_seed)
    pool = tuple(f"pool/{number:08d}" for number in range(31))
    assert drawn.unlabeled == (*pool, "train-000005", "train-000006") and len(drawn.labeled) == 4


def test_rows_and_shards_without_an_image(write_recipe, tmp_path, run_here, capsys):
    pool, features = tmp_path / "pool", datasets.Features({"picture": datasets.Image()})
    pool.mkdir()
    rows = [{"bytes": picture(number), "path": None} if number % 3 else None for number in range(12)]
    datasets.Dataset.from_dict({"picture": rows}, features=features).to_parquet(pool / "a[1].parquet")
    datasets.Dataset.from_dict({"picture": []}, features=features).to_parquet(pool / "b.parquet")
    (pool / ".hidden.parquet").write_bytes(b"junk")
    assert Pool(section(pool)).count == 12
    count, problems = scan_pool(Pool(section(pool)))
    assert count == 12 and sorted(int(line.split("row ")[1].split()[0]) for line in problems) == [0, 3, 6, 9]
    with pytest.raises(UserError, match=r"image a\[1\].parquet row \d+ cannot be read: the table holds no image"):
        run_recipe(stream_recipe(write_recipe, tmp_path, "raise"), Accelerator())
    recipe = stream_recipe(write_recipe, tmp_path, "skip", on_error="skip")
    assert run_recipe(recipe, Accelerator())["skipped_images"] > 5
    capsys.readouterr()
    listed = run_here("prepare.py", "--recipe", recipe.source, "--set", "data.on_error=raise")
    assert listed.returncode == 2 and len(listed.stderr.splitlines()) == 4
    assert all("[data.unlabeled]: image a[1].parquet row" in line for line in listed.stderr.splitlines())
    assert "| [data.unlabeled]    | 12    | 4 " in listed.stdout


def test_a_shard_of_another_kind_is_one_line(write_recipe, tmp_path, run_here, capsys):
    write_parquet(tmp_path / "pool", (20,))
    datasets.Dataset.from_dict({"number": list(range(50))}).to_parquet(tmp_path / "pool" / "x.parquet")
    for on_error in ("raise", "skip"):
        with pytest.raises(UserError, match=r"\[data.unlabeled\] .* cannot be read: .*; mend it, and run the same"):
            run_recipe(stream_recipe(write_recipe, tmp_path, on_error, on_error=on_error), Accelerator())
    capsys.readouterr()
    listed = run_here("prepare.py", "--recipe", stream_recipe(write_recipe, tmp_path, "prepare").source)
    (line,) = listed.stderr.splitlines()
    assert listed.returncode == 2 and re.search(r"\[data.unlabeled\] .* cannot be read: .*; mend it", line)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_pool_that_changes_under_an_unfinished_run_is_refused(write_recipe, tmp_path, streaming):
    write_parquet(tmp_path / "pool", (20, 11))
    recipe = stream_recipe(write_recipe, tmp_path, "changes")
    recipe = load(recipe.source, [f"data.unlabeled.streaming={str(streaming).lower()}", "optim.steps=9"])
    with stopped_at_step_4():
        run_recipe(recipe, Accelerator())
    write_parquet(tmp_path / "pool", (20, 12))
    with pytest.raises(UserError, match=r"the files of \[data.unlabeled\] have changed since this run began"):
        forget_data()
        run_recipe(recipe, Accelerator())
    write_parquet(tmp_path / "pool", (20, 11))
    forget_data()
    run_recipe(recipe, Accelerator())
    assert finished(recipe)
    write_parquet(tmp_path / "pool", (20, 12))
    forget_data()
    with pytest.raises(UserError, match=r"was trained on other images .*another \[data.unlabeled\]"):
        finished(recipe)
