"""Cached teachers: what is kept, that training with it is the same step, and what is refused."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.nn import functional
from torch.utils.data import default_collate

from mgd.cache import cached_targets
from mgd.cache_compare import compare
from mgd.checks import check_recipe
from mgd.data.targets import CachedTargets, shard_path
from mgd.data.transforms import View
from mgd.errors import Stopped, UserError
from mgd.experiment import run_recipe
from mgd.losses.cwd import channel_wise
from mgd.losses.kd import pixel_kl
from mgd.methods.mgd import MGD, _cached
from mgd.models.segmenter import build_segmenter, load_segmenter
from mgd.recipe import load, parse_model
from mgd.registry import METHODS
from mgd.run_images import training_images, training_pairs

TERMS = {"pixel": {"teachers": ["a", "b"]}, "image": {"teachers": ["a"]}, "region": {"teachers": ["b"], "grid": 3}}

VIEW = View((0, 0, 32, 32), (32, 32), (0, 0), False)


@pytest.fixture
def cached(write_recipe, tmp_path):
    """Write a recipe of cached teachers with random weights; returns a function of more changes."""
    base = load(write_recipe())
    torch.manual_seed(0)
    for index, (name, backbone) in enumerate({"a": "test_resnet", "b": "test_efficientnet"}.items()):
        section = parse_model(base.student.model_dump(mode="json") | {"backbone": backbone}, "test")
        classes = base.data.class_names()
        teacher = build_segmenter(section, classes, [(0, 0, 0)] * len(classes), index)
        for module in teacher.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
        teacher.save(tmp_path / name)

    def write(*overrides, data=None, method=None, cache=None):
        terms = {} if "name" in (method or {}) else {"name": "mgd", "remix": "predictions", **TERMS}
        teachers = {"mode": "cached", **{name: {"checkpoint": str(tmp_path / name)} for name in ("a", "b")}}
        changes = {
            "teachers": teachers,
            "method": terms | (method or {}),
            "cache": {"cell": 8} | (cache or {}),
        }
        return load(write_recipe(data=data or {}, **changes), overrides)

    return write


def teachers_of(recipe):
    return {name: load_segmenter(teacher.checkpoint) for name, teacher in recipe.teachers.items()}


def made(recipe, restart=False):
    """Make the cache; returns teachers, images and targets."""
    teachers, accelerator = teachers_of(recipe), Accelerator()
    splits, partition = check_recipe(recipe, accelerator, teachers)
    images = training_images(recipe, splits, partition)
    targets = cached_targets(recipe, accelerator, teachers, images, restart)
    return teachers, images, targets, training_pairs(recipe, splits, partition, targets)


def test_what_is_kept_is_what_the_teacher_says_of_the_whole_image(cached):
    recipe = cached(cache={"scales": [1.0, 1.5], "flip": True})
    teachers, images, _, _ = made(recipe)
    tensors = load_file(shard_path(recipe.cache_dir, 0))
    assert sorted(name.split("/", 1)[1] for name in tensors if name.startswith("3/")) == [
        *("a/labels", "a/logits"),
        *("b/features", "b/labels"),
    ]
    pixels = torch.from_numpy(np.array(images.read(3, False)[0])).permute(2, 0, 1)[None].float()
    for name, teacher in teachers.items():
        logits, features = [], []
        with torch.no_grad():
            for side in (48, 72):
                view = functional.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False)
                for turned in (False, True):
                    seen = teacher.eval()(view.flip(-1) if turned else view)
                    maps = [value.flip(-1) if turned else value for value in seen]
                    logits.append(functional.interpolate(maps[0], size=(48, 48), mode="bilinear", align_corners=False))
                    features.append(functional.adaptive_avg_pool2d(maps[1], 6))
        mean = torch.stack(logits).mean(0)
        assert (tensors[f"3/{name}/labels"] == mean.argmax(1)[0]).float().mean() > 0.999
        if name == "a":
            assert torch.allclose(
                tensors["3/a/logits"].float(), functional.avg_pool2d(mean, 8)[0], rtol=2e-3, atol=2e-3
            )
        else:
            assert torch.allclose(
                tensors["3/b/features"].float(), torch.stack(features).mean(0)[0], rtol=2e-3, atol=2e-3
            )


def test_probabilities_are_kept_for_soft_labels(cached):
    recipe = cached("method.pixel.labels=soft")
    teachers, images, targets, _ = made(recipe)
    tensors = load_file(shard_path(recipe.cache_dir, 0))
    assert [name for name in sorted(tensors) if name.startswith("3/a")] == ["3/a/logits", "3/a/probabilities"]
    pixels = torch.from_numpy(np.array(images.read(3, False)[0])).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        logits = teachers["b"].eval()(pixels).logits
    wanted = functional.avg_pool2d(logits.softmax(1), 4)[0]
    assert (tensors["3/b/probabilities"] / 255 - wanted).abs().max() < 2.1e-3
    view = View((0, 0, 20, 20), (30, 30), (2, 2), False)  # its last 4 x 4 pixels show the image's fifth cell
    found, flipped = (targets.cut(images.ids[3], (48, 48), view._replace(mirrored=m), 32) for m in (False, True))
    assert torch.allclose(found["b/probabilities"][:, 7, 7], wanted[:, 4, 4], atol=3e-3)
    assert found["valid"].sum() == 900 and found["valid"][2:, 2:].all()
    for key in ("b/probabilities", "valid"):
        assert torch.equal(flipped[key], found[key].flip(-1)), key


def test_probabilities_are_those_of_online_teachers_where_the_crop_is_the_image(cached, tmp_path):
    for name in ("a", "b"):  # sure of what they say, so that what is mixed up shows
        network = load_segmenter(tmp_path / name)
        with torch.no_grad():
            network.head.classifier.weight *= 10
        network.save(tmp_path / name)
    whole = {"crop": 48, "scales": [1.0], "flip": False}
    recipe = cached("method.pixel.labels=soft", data=whole, cache={"cell": 4})
    teachers, _, _, pairs = made(recipe)
    batch = default_collate([pairs[position] for position in range(24)])
    views = {"labeled": batch["image"], "first": batch["unlabeled"], "second": batch["mix"]}
    method = MGD(recipe.method, [], teachers)
    for name, kinds in MGD.cached_kinds(recipe.method).items():
        online, ours = method._online(name, views, batch["mask"]), _cached(batch, name, kinds)
        for what in ("labeled", "unlabeled"):
            wanted = getattr(online, what)
            assert wanted.std(dim=(2, 3)).max() > 0.2
            assert (getattr(ours, what) - wanted).abs().mean() < 0.4 * (wanted.flip(-1) - wanted).abs().mean(), what


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_the_losses_are_those_of_online_teachers_where_the_crop_is_the_image(cached, labels):
    recipe = cached(
        f"method.pixel.labels={labels}", data={"crop": 48, "scales": [1.0], "flip": False}, cache={"cell": 4}
    )
    teachers, _, _, pairs = made(recipe)
    classes = recipe.data.class_names()
    student = build_segmenter(recipe.student, classes, [(0, 0, 0)] * len(classes), 5)
    batch = default_collate([pairs[position] for position in range(4)])
    online = MGD(recipe.method, [student], teachers).step(batch, 0).log
    ours = MGD(recipe.method, [student]).step(batch, 0).log
    assert online.keys() == ours.keys() and len(ours) == 5
    for key, value in online.items():
        assert ours[key].item() == pytest.approx(value.item(), rel=2e-3), key


@pytest.mark.parametrize(("method", "loss"), [("kd", pixel_kl), ("cwd", channel_wise)])
def test_kd_and_cwd_learn_from_logits_that_are_kept(cached, tmp_path, method, loss):
    for name in ("a", "b"):  # sure of what they say, so that what is mixed up shows
        network = load_segmenter(tmp_path / name)
        with torch.no_grad():
            network.head.classifier.weight *= 10
        network.save(tmp_path / name)
    chosen = {"name": method, "distill_from": ["a", "b"], "temperature": 2.0}
    recipe = cached(data={"crop": 48, "scales": [1.0], "flip": False}, method=chosen)
    teachers, images, targets, pairs = made(recipe)
    tensors = load_file(shard_path(recipe.cache_dir, 0))
    pixels = torch.from_numpy(np.array(images.read(3, False)[0])).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        seen = teachers["b"].eval()(pixels).logits
    wanted = functional.avg_pool2d(seen[..., 1:-1, 1:-1], 2, 4)[0]  # the middle of each 4 x 4 pixels
    assert [name for name in sorted(tensors) if name.startswith("3/")] == ["3/a/fine_logits", "3/b/fine_logits"]
    assert torch.allclose(tensors["3/b/fine_logits"].float(), wanted, rtol=2e-3, atol=2e-3)

    classes = recipe.data.class_names()
    student = build_segmenter(recipe.student, classes, [(0, 0, 0)] * len(classes), 5).eval()
    batch = default_collate([pairs[position] for position in range(4)])
    ours = METHODS.get(method)(recipe.method, [student]).step(batch, 0).log
    said = {name: METHODS.get(method)(recipe.method, [student])._cached(name, batch) for name in teachers}
    for name, teacher in teachers.items():
        with torch.no_grad():
            first, second, labeled = (teacher(batch[key].float()).logits for key in ("unlabeled", "mix", "image"))
        mixed, swapped = (torch.where(batch["mask"], *order) for order in ((second, first), (first, second)))
        for view, wanted, other in (("labeled", labeled, labeled.flip(-1)), ("unlabeled", mixed, swapped)):
            assert (said[name][view].logits - wanted).abs().mean() < 0.4 * (other - wanted).abs().mean()
            assert said[name][view].valid.all()
    views = {"labeled": batch["image"], "unlabeled": torch.where(batch["mask"], batch["mix"], batch["unlabeled"])}
    for view, images in views.items():
        wanted = sum(loss(student(images).logits, said[name][view].logits, 2.0).item() for name in teachers) / 2
        assert ours[f"loss_{method}_{view}"].item() == pytest.approx(wanted, rel=1e-5)
    assert compare(targets, teachers, pairs, Accelerator(), count=4)[0]["same class %"] > 90
    odd = {"crop": 50, "scales": [0.5, 1.0]}  # padding, and a side that cells do not divide
    for on in (["labeled"], ["unlabeled"], ["labeled", "unlabeled"]):
        recipe = cached(f"run.name=odd{len(on)}{on[0]}", data=odd, method={**chosen, "on": on})
        assert run_recipe(recipe, Accelerator(), teachers)["steps"] == 4


@pytest.mark.parametrize("labels, same", [("hard", 100), ("soft", 95)])
def test_compare_says_how_far_the_crops_own_predictions_are(cached, labels, same):
    set_labels = f"method.pixel.labels={labels}"
    near = cached(set_labels, data={"crop": 48, "scales": [1.0], "flip": False}, cache={"cell": 4})
    teachers, _, targets, pairs = made(near)
    first, second = compare(targets, teachers, pairs, Accelerator(), count=4)
    assert (
        same <= first["same class %"] <= 100
        and first["pooled logits off by"] < 1e-3 * first["of a mean size of"] + 1e-3
    )
    assert second["cosines off by"] < 1e-3 and first["cosines off by"] is None
    coarse = compare(targets, teachers, pairs, Accelerator(), grid=1, count=4)[1]
    assert coarse["cosines off by"] < 1e-6, "a single region is like itself"
    assert 0 < targets.bytes_per_image() < 20_000
    far = cached(set_labels, "cache.folder=far")
    teachers, _, targets, pairs = made(far)
    assert compare(targets, teachers, pairs, Accelerator(), count=4)[0]["same class %"] < 100


def test_a_run_with_cached_teachers_is_taken_up_to_the_bit(cached, tmp_path, monkeypatch):
    whole = cached("run.name=whole", "optim.steps=6")
    run_recipe(whole, Accelerator(), teachers_of(whole))
    step = MGD.step

    def stopping(self, batch, number):
        if number == 3:
            raise Stopped(15)
        return step(self, batch, number)

    cut = cached("run.name=cut", "optim.steps=6")
    shards = {path: path.stat().st_mtime_ns for path in whole.cache_dir.glob("shard-*")}
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(MGD, "step", stopping)
        run_recipe(cut, Accelerator(), teachers_of(cut))
    run_recipe(cut, Accelerator(), teachers_of(cut))
    first, second = (load_file(tmp_path / "runs" / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert shards == {path: path.stat().st_mtime_ns for path in whole.cache_dir.glob("shard-*")}, (
        "one cache serves both"
    )


def test_only_what_is_missing_is_written_again(cached, monkeypatch):
    monkeypatch.setattr("mgd.cache.IMAGES_PER_SHARD", 5)
    monkeypatch.setattr("mgd.data.targets.IMAGES_PER_SHARD", 5)
    recipe = cached()
    made(recipe)
    paths = [shard_path(recipe.cache_dir, number) for number in range(3)]
    before = [path.read_bytes() for path in paths]
    times = [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    torn = recipe.cache_dir / ".shard-00001.safetensors.99"
    torn.write_bytes(b"x")
    with pytest.raises(UserError, match="it was begun for more images or teachers, and is not complete"):
        made(cached("data.num_train=8"))
    made(recipe)
    assert not torn.exists()
    paths[2].write_bytes(before[2][:-7])  # cut short: it would end a run hours later
    made(recipe)
    assert [path.read_bytes() for path in paths] == before
    assert [path.stat().st_mtime_ns == time for path, time in zip(paths, times, strict=True)] == [True, False, False]
    made(recipe, restart=True)
    assert [path.read_bytes() for path in paths] == before and paths[0].stat().st_mtime_ns != times[0]


def test_another_cell_matters_only_where_cells_are_read_or_to_be_written(cached, monkeypatch):
    monkeypatch.setattr("mgd.cache.IMAGES_PER_SHARD", 5)
    monkeypatch.setattr("mgd.data.targets.IMAGES_PER_SHARD", 5)
    without = {"image": {"teachers": []}, "region": {"teachers": []}}
    made(recipe := cached())
    before = [shard_path(recipe.cache_dir, number).read_bytes() for number in range(3)]
    made(cached("cache.cell=4", method=without))
    assert [shard_path(recipe.cache_dir, number).read_bytes() for number in range(3)] == before
    shard_path(recipe.cache_dir, 1).unlink()
    with pytest.raises(UserError, match="cell is 8, not 4"):  # else its features would be of two sizes
        made(cached("cache.cell=4", method=without))


def test_a_stale_cache_is_refused(cached, tmp_path):
    recipe = cached()
    made(recipe)
    with pytest.raises(
        UserError, match=r"does not fit this run: cell is 8, not 4\. Keep both: .*, or write it anew: .*--restart"
    ):
        made(cached("cache.cell=4"))
    with pytest.raises(UserError, match=r"flip is False, not True; scales is \[1.0\], not \[1.0, 2.0\]"):
        made(cached("cache.scales=[1.0, 2.0]", "cache.flip=true"))
    with pytest.raises(UserError, match=r"it lacks features of \[teachers.a\]"):
        made(cached(method={"region": {"teachers": ["a"], "grid": 3}}))
    with pytest.raises(UserError, match="12 images have changed"):
        made(cached("data.draw_seed=1"))
    made(cached("partition.labeled=6"))  # the same images, labelled or not
    network = load_segmenter(tmp_path / "a")
    with torch.no_grad():
        network.head.classifier.bias += 1
    network.save(tmp_path / "a")
    with pytest.raises(UserError, match=r"\[teachers.a\] is another network than the cached one"):
        made(recipe)


def test_what_cannot_be_cached_is_said_at_once(cached, tmp_path, write_recipe):
    with pytest.raises(UserError, match=r'\[teachers\] mode: .often.; choices: "online", "cached"'):
        load(write_recipe(teachers={"mode": "often"}))
    with pytest.raises(
        UserError,
        match=r"grid = 3 is finer than the 2 x 2 cells of \[cache\] cell = 16 in a crop of 32; cell may be at most 10",
    ):
        cached("cache.cell=16")
    with pytest.raises(UserError, match=r"set \[method\] remix = .predictions"):
        cached("method.remix=images")
    with pytest.raises(UserError, match="folder = 'tiny' is the folder of the run"):
        made(cached("cache.folder=tiny"))
    stream = {"parquet": str(tmp_path), "streaming": True}
    with pytest.raises(UserError, match="a stream needs mode = .online"):
        made(cached(data={"unlabeled": stream}))
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="mine holds files and no manifest.json"):
        made(cached("cache.folder=mine"), restart=True)
    assert (tmp_path / "runs" / "mine" / "thesis.txt").exists()


def test_a_teacher_of_the_same_weights_and_another_architecture_is_another(cached, tmp_path):
    recipe = cached()
    made(recipe)
    path = tmp_path / "a" / "config.json"
    config = json.loads(path.read_text())
    config["model"]["head"]["aspp_rates"] = [3, 5]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"\[teachers.a\] is another network"):
        made(recipe)


def test_a_damaged_manifest_and_shards_of_another_cache(cached):
    recipe = cached()
    _, _, targets, pairs = made(recipe)
    manifest = recipe.cache_dir / "manifest.json"
    whole = manifest.read_text()
    nonsense = [{"ids": 5}, {"ids": ["a"]}, {"checksums": [None]}, {"teachers": {"a": {}}}, {"teachers": [1]}]
    for text in [whole[:-40], "[]", *(json.dumps(json.loads(whole) | change) for change in nonsense)]:
        manifest.write_text(text)
        with pytest.raises(UserError, match=r"manifest.json cannot be used.*cache_teachers.py --recipe .* --restart"):
            made(recipe)
    manifest.write_text(whole)
    made(cached("cache.scales=[2.0]"), restart=True)  # while a run still reads the old one
    with pytest.raises(UserError, match="is of another cache than the run began with"):
        CachedTargets(targets.folder, json.loads(whole), targets.kinds, "").cut(
            pairs.labeled.ids[0], (48, 48), VIEW, 32
        )


def test_a_teacher_that_says_no_number_is_named(cached, tmp_path):
    recipe = cached()
    network = load_segmenter(tmp_path / "a")
    with torch.no_grad():
        network.head.classifier.bias += 1e6  # beyond half precision
    network.save(tmp_path / "a")
    with pytest.raises(
        UserError, match=r"\[teachers.a\] predicts values for train-0000.. that are no number, or too large"
    ):
        made(recipe)
    (tmp_path / "runs" / "teacher_cache-s0" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"\[teachers.a\] predicts values for train-0000.. that are no number"):
        made(cached(method={"name": "cwd", "distill_from": ["a", "b"]}))


def test_scaled_images(cached):
    recipe = cached("data.image_scale=0.75", data={"crop": 32, "scales": [1.0, 1.5]})
    _, _, targets, pairs = made(recipe)
    assert load_file(shard_path(recipe.cache_dir, 0))["0/a/labels"].shape == (36, 36)
    assert pairs[0]["unlabeled/a/labels"].shape == (32, 32)


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_padding_counts_on_no_process(cached, monkeypatch, labels):
    """The mean over all processes is that over all pixels, however padding is spread."""
    recipe = cached(f"method.pixel.labels={labels}", data={"scales": [0.5, 1.0, 1.5]})
    _, _, _, pairs = made(recipe)
    classes = recipe.data.class_names()
    student = build_segmenter(recipe.student, classes, [(0, 0, 0)] * len(classes), 5).eval()
    samples = [pairs[position] for position in range(4)]
    whole = MGD(recipe.method, [student]).step(default_collate(samples), 0).log
    halves = [default_collate(samples[:2]), default_collate(samples[2:])]
    totals = {}  # what all_reduce would bring: first pass notes the counts, second pass sums them

    def local(mean, count):
        totals.setdefault(len(totals), count.double())
        return mean

    monkeypatch.setattr("mgd.methods.mgd.balance_processes", local)
    monkeypatch.setattr("mgd.methods.base.balance_processes", lambda mean, count: mean)
    for half in halves:
        MGD(recipe.method, [student]).step(half, 0)
    assert len(totals) == 4
    turn = iter(range(4))

    def balanced(mean, count):
        place = next(turn)
        return mean * (count * 2 / (totals[place % 2] + totals[place % 2 + 2]))

    monkeypatch.setattr("mgd.methods.mgd.balance_processes", balanced)
    parts = [MGD(recipe.method, [student]).step(half, 0).log for half in halves]
    for key in ("loss_pixel_labeled", "loss_pixel_unlabeled"):
        mean = (parts[0][key] + parts[1][key]).item() / 2
        assert mean == pytest.approx(whole[key].item(), rel=1e-5), key


def test_restart_deletes_nothing_that_is_no_cache(cached):
    recipe = cached()
    made(recipe)
    (recipe.cache_dir / "shard-00009.safetensors").mkdir()
    with pytest.raises(UserError, match="shard-00009.safetensors is no part of a cache; move it away"):
        made(recipe, restart=True)
    assert shard_path(recipe.cache_dir, 0).exists()
