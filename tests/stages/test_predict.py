import numpy as np
import PIL.Image
import pytest
import torch
from conftest import call_stage
from safetensors.torch import load_file

from mgd.models.segmenter import build_segmenter, load_segmenter
from mgd.recipe import parse_model

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
    assert "of 5 images; 1 could not be read" in ran.stdout
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
        (("--input", tmp_path / "torn.png"), "none of the 1 images can be read"),
        (("--input", tmp_path / "torn.png", "--set", "eval.flip=true"), "has no recipe.toml that --set could change"),
    ):
        status, _, error = call_stage(capsys, "predict.py", "--model", model, "--output", tmp_path / "out", *arguments)
        assert status == 2 and message in error, error
        assert not (tmp_path / "out").exists()


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
    assert status == 2 and "holds files that are no predictions; name another --output" in error
    assert painted.read_bytes() == before
    inside = data / "images" / "out"
    for _ in range(2):
        assert call_stage(capsys, "predict.py", *arguments, inside)[0] == 0
    assert sorted(path.name for path in (inside / "masks").rglob("*")) == ["a.png"]
