import json
import shutil
import signal

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import call_stage
from safetensors.torch import load_file, save_file

from mgd.errors import Stopped, UserError
from mgd.inference import predict_logits
from mgd.models.segmenter import Segmenter, build_segmenter, load_segmenter
from mgd.pictures import rescale, to_tensor
from mgd.predictions import mark_predictions, save_prediction
from mgd.recipe import parse_model
from mgd.sections import Eval

COLORS = [(0, 0, 0), (255, 0, 0), (0, 255, 0)]


@pytest.fixture
def model(tmp_path):
    head = {"name": "deeplabv3plus", "channels": 16, "low_level_channels": 8, "aspp_rates": [1]}
    section = parse_model(
        {"backbone": "test_resnet", "pretrained": False, "output_stride": 16, "head": head}, source="test"
    )
    build_segmenter(section, list("abc"), COLORS, seed=0, image_scale=0.5, crop=32).save(tmp_path / "model")
    return tmp_path / "model"


def test_every_kind_of_image_and_what_cannot_be_read(tmp_path, model, run_here):
    source, random = tmp_path / "in", np.random.default_rng(0)
    (source / "deep").mkdir(parents=True)
    for name, size, mode in (
        ("a.png", (60, 40), "RGB"),
        ("b.jpg", (60, 40), "L"),
        ("deep/c.png", (33, 91), "RGBA"),
        ("deep/c.jpg", (60, 40), "RGB"),
        ("d.webp", (1, 1), "RGB"),
    ):
        pixels = random.integers(256, size=(size[1], size[0], 4), dtype=np.uint8)
        PIL.Image.fromarray(pixels).convert(mode).save(source / name)
    (source / "torn.png").write_bytes((source / "a.png").read_bytes()[:90])
    (source / "note.txt").write_text("no image")
    kinds = ("masks", "colors", "overlays", "probabilities")
    ran = run_here("predict.py", "--model", model, "--input", source, "--output", tmp_path / "out", "--save", *kinds)
    assert ran.returncode == 0, ran.stderr
    assert "of 5 images; 1 left out" in ran.stdout
    assert "note: " in ran.stderr and "torn.png cannot be read" in ran.stderr and "Traceback" not in ran.stderr
    network = load_segmenter(model)
    for name, file in (("a", "a.png"), ("deep/c.png", "deep/c.png"), ("deep/c.jpg", "deep/c.jpg"), ("d", "d.webp")):
        picture = PIL.Image.open(source / file)
        expected = network.predict(picture)
        mask = PIL.Image.open(tmp_path / "out" / "masks" / f"{name}.png")
        assert mask.mode == "P" and np.array_equal(np.asarray(mask), expected.label)
        assert np.array_equal(np.asarray(PIL.Image.open(tmp_path / "out" / "colors" / f"{name}.png")), expected.colors)
        overlay = np.asarray(PIL.Image.open(tmp_path / "out" / "overlays" / f"{name}.png"))
        assert overlay.shape == (picture.height, picture.width, 3)
        shares = load_file(tmp_path / "out" / "probabilities" / f"{name}.safetensors")["probabilities"].float()
        assert shares.shape == (3, picture.height, picture.width)
        assert torch.allclose(shares.sum(0), torch.ones(1), atol=2e-3)


def test_bad_input_is_one_line(tmp_path, model, capsys):
    (tmp_path / "torn.png").write_bytes(b"no")
    for arguments, message in (
        (("--input", tmp_path / "nowhere"), "no image there; give a file, a folder or a pattern"),
        (("--input", tmp_path / "torn.png"), "none of the 1 images can be used"),
        (("--input", tmp_path / "torn.png", "--set", "eval.flp=true"), "--set: [eval] flp"),
        (("--input", tmp_path / "torn.png", "--set", "data.crop=64"), "only eval.* matters for a prediction"),
    ):
        status, _, error = call_stage(capsys, "predict.py", "--model", model, "--output", tmp_path / "out", *arguments)
        assert status == 2 and message in error, error
        assert not (tmp_path / "out").exists()


def test_a_network_that_says_nothing(tmp_path, model, capsys):
    weights = load_file(model / "model.safetensors")
    save_file(
        {name: value * 1e30 if value.is_floating_point() else value for name, value in weights.items()},
        model / "model.safetensors",
    )
    PIL.Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    arguments = ("--model", model, "--input", tmp_path / "a.png", "--output", tmp_path / "out")
    status, _, error = call_stage(capsys, "predict.py", *arguments)
    assert status == 2 and "the network gives values that are no number" in error
    assert not (tmp_path / "out").exists()


def test_windows_with_and_without_a_recipe(tmp_path, model, write_recipe, capsys):
    pixels = np.random.default_rng(0).integers(256, size=(96, 80, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "a.png")
    kinds = ("--save", "probabilities")
    found = {}
    for mode in ("whole", "slide"):
        arguments = ("--input", tmp_path / "a.png", "--output", tmp_path / mode, "--set", f"eval.mode={mode}", *kinds)
        status, _, error = call_stage(capsys, "predict.py", "--model", model, *arguments)
        assert status == 0, error
        found[mode] = load_file(tmp_path / mode / "probabilities" / "a.safetensors")["probabilities"].float()
    network = load_segmenter(model).eval()
    small = to_tensor(rescale(PIL.Image.fromarray(pixels), 0.5))[None]
    for mode, logits in (
        ("whole", network(small).logits),
        ("slide", predict_logits(network, small, Eval(mode="slide"), 32)),
    ):
        expected = torch.nn.functional.interpolate(logits, size=(96, 80), mode="bilinear").softmax(dim=1)[0]
        assert torch.allclose(found[mode], expected, atol=2e-3)
    assert not torch.allclose(found["whole"], found["slide"], atol=2e-3)
    shutil.copy(write_recipe(eval={"mode": "slide"}), model / "recipe.toml")  # of a run, whose [eval] says how
    for output, overrides, mode in (("own", (), "slide"), ("other", ("--set", "eval.mode=whole"), "whole")):
        arguments = ("--input", tmp_path / "a.png", "--output", tmp_path / output, *overrides, *kinds)
        assert call_stage(capsys, "predict.py", "--model", model, *arguments)[0] == 0
        shares = load_file(tmp_path / output / "probabilities" / "a.safetensors")["probabilities"].float()
        assert shares.equal(found[mode])


def test_a_prediction_that_was_cut_short_is_done_again(tmp_path, model, capsys, monkeypatch):
    for name in ("a", "b"):
        PIL.Image.new("RGB", (40, 40), "red").save(tmp_path / f"{name}.png")
    arguments = ("--model", model, "--input", tmp_path / "*.png", "--output", tmp_path / "out", "--batch", 1)
    written = []

    def interrupted(*where):
        written.append(where)
        if len(written) == 2:
            raise Stopped(signal.SIGINT, "")
        return save_prediction(*where)

    with monkeypatch.context() as patched:
        patched.setattr("mgd.predictions.save_prediction", interrupted)
        assert call_stage(capsys, "predict.py", *arguments)[0] not in (0, 2)
    assert [path.name for path in (tmp_path / "out" / "masks").iterdir()] == ["a.png"]
    status, _, error = call_stage(capsys, "predict.py", *arguments)
    assert status == 0, error
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 2


def shift_weights(folder):
    network = load_segmenter(folder)
    with torch.no_grad():
        network.head.classifier.bias += 1
    network.save(folder)


def test_what_fails_together_is_predicted_one_by_one(tmp_path, model, capsys, monkeypatch):
    for index in range(3):
        (tmp_path / "in").mkdir(exist_ok=True)
        PIL.Image.new("RGB", (40, 30), (index * 90, 9, 9)).save(tmp_path / "in" / f"{index}.png")
    arguments = ("predict.py", "--model", model, "--input", tmp_path / "in", "--save", "masks", "probabilities")
    assert call_stage(capsys, *arguments, "--output", tmp_path / "whole")[0] == 0

    def small(segmenter, pixels):
        if len(pixels) > 1 or pixels.float().mean() > 60:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return forward(segmenter, pixels)

    forward = Segmenter.forward
    monkeypatch.setattr(Segmenter, "forward", small)
    status, out, error = call_stage(capsys, *arguments, "--output", tmp_path / "apart")
    assert status == 0 and "masks, probabilities of 2 images; 1 left out" in out
    assert "note: 2 cannot be predicted" in error and "can't allocate memory; --set eval.mode=slide" in error
    for name in ("0", "1"):
        masks = [(tmp_path / part / "masks" / f"{name}.png").read_bytes() for part in ("apart", "whole")]
        assert masks[0] == masks[1]
        found = [load_file(tmp_path / part / f"probabilities/{name}.safetensors") for part in ("apart", "whole")]
        torch.testing.assert_close(*found, atol=1e-3, rtol=0)  # a batch of another size rounds otherwise


def test_a_mark_that_another_process_is_writing_stops_no_one(tmp_path):
    mark = {"model": "m", "weights": "w", "images": "i", "settings": "s"}
    (tmp_path / ".predictions.json.123").write_text("{")  # written aside, and not yet in its place
    mark_predictions(tmp_path, mark, 3)
    mark_predictions(tmp_path, mark, 3)
    with pytest.raises(UserError, match="holds predictions of other images: i; name another folder"):
        mark_predictions(tmp_path, mark | {"images": "others"}, 3)


def test_earlier_predictions_are_no_photos(tmp_path, model, capsys):
    photos = tmp_path / "photos"
    (photos / "masks").mkdir(parents=True)  # a folder of this name may hold photos elsewhere
    for path in (photos / "a.png", photos / "masks" / "b.png"):
        PIL.Image.new("RGB", (40, 40), "red").save(path)
    for output in (photos / "first", photos / "second", tmp_path / "third"):
        status, out, error = call_stage(capsys, "predict.py", "--model", model, "--input", photos, "--output", output)
        assert status == 0 and "of 2 images" in out, error


def test_nothing_is_overwritten_or_segmented_twice(tmp_path, model, capsys):
    data = tmp_path / "data"
    for part in ("images", "masks"):
        (data / part).mkdir(parents=True)
    PIL.Image.new("RGB", (40, 40), "red").save(data / "images" / "a.png")
    painted = data / "masks" / "a.png"
    PIL.Image.new("L", (40, 40), 1).save(painted)
    before = painted.read_bytes()
    arguments = ("--model", model, "--input", data / "images", "--output")
    status, _, error = call_stage(capsys, "predict.py", *arguments, data)
    assert status == 2 and "holds files that are no predictions of ours" in error
    (data / "predictions.json").write_text('[{"image_id": 1}]')  # as COCO's tools call their results
    status, _, error = call_stage(capsys, "predict.py", *arguments, data)
    assert status == 2 and "holds files that are no predictions of ours" in error
    assert painted.read_bytes() == before
    inside = data / "images" / "out"
    for _ in range(2):
        assert call_stage(capsys, "predict.py", *arguments, inside)[0] == 0
    assert sorted(path.name for path in (inside / "masks").rglob("*")) == ["a.png"]
    other = shutil.copytree(model, tmp_path / "other")
    assert call_stage(capsys, "predict.py", "--model", other, *arguments[2:], inside)[0] == 0, "it has moved"
    shift_weights(other)
    status, _, error = call_stage(capsys, "predict.py", "--model", model, *arguments[2:], inside)
    assert status == 0, error
    status, _, error = call_stage(capsys, "predict.py", "--model", other, *arguments[2:], inside)
    assert status == 2 and f"{inside} holds predictions of another model: {model}; name another folder" in error
    status, _, error = call_stage(capsys, "predict.py", *arguments, inside, "--set", "eval.flip=true")
    assert status == 2 and "holds predictions of other settings: mode = whole, scales = (1.0,), flip = False" in error
    marked = json.loads((inside / "predictions.json").read_text())
    (inside / "predictions.json").write_text(json.dumps({key: marked[key] for key in marked if key != "settings"}))
    assert call_stage(capsys, "predict.py", *arguments, inside)[0] == 0, "as an earlier version marked it"
    status, _, error = call_stage(capsys, "predict.py", *arguments[:2], "--input", data / "masks", "--output", inside)
    assert status == 2 and f"holds predictions of other images: {data / 'images'}; name another folder" in error
    assert call_stage(capsys, "predict.py", "--model", f"{model}/", *arguments[2:], inside)[0] == 0
    shift_weights(model)
    status, _, error = call_stage(capsys, "predict.py", *arguments, inside)
    assert status == 2 and f"{inside} holds predictions of earlier weights of this model" in error


def test_links_are_followed_hidden_folders_are_not_and_names_may_be_long(tmp_path, model, capsys):
    source, elsewhere, long = tmp_path / "in", tmp_path / "elsewhere", "n" * 246
    for folder in (source / ".thumbs", elsewhere):
        folder.mkdir(parents=True)
    for path in (source / f"{long}.png", source / ".thumbs" / "small.png", elsewhere / "far.png"):
        PIL.Image.new("RGB", (40, 40), "red").save(path)
    (source / "link").symlink_to(elsewhere)
    status, said, error = call_stage(
        capsys, "predict.py", "--model", model, "--input", source, "--output", tmp_path / "out", "--save", "masks"
    )
    assert status == 0 and "masks of 2 images" in said, error
    found = {path.relative_to(tmp_path / "out" / "masks").as_posix() for path in tmp_path.glob("out/masks/**/*.png")}
    assert found == {f"{long}.png", "link/far.png"}


@pytest.mark.parametrize("flag", ["--model", "--input", "--output"])
def test_a_path_that_cannot_be_looked_at_is_one_line(tmp_path, model, run_here, flag):
    PIL.Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    flags = {"--model": model, "--input": tmp_path / "a.png", "--output": tmp_path / "out"} | {flag: "x" * 300}
    done = run_here("predict.py", *[part for pair in flags.items() for part in pair])
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert "File name too long" in done.stderr
