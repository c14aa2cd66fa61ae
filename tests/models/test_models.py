import copy
import json
from pathlib import Path

import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from mgd.errors import UserError
from mgd.models.backbones import build_backbone
from mgd.models.saved import find_model
from mgd.models.segmenter import Segmenter, build_segmenter, load_segmenter
from mgd.recipe import parse_model

CLASSES, COLORS = ("sky", "road", "rest"), ((0, 0, 0), (9, 9, 9), (1, 2, 3))
HEAD = {"name": "deeplabv3plus", "channels": 16, "low_level_channels": 8, "aspp_rates": [1, 2]}


def _section(backbone="test_resnet", **changes):
    head = {**HEAD, **changes.pop("head", {})}
    table = {"backbone": backbone, "pretrained": False, "output_stride": 16, "head": head, **changes}
    return parse_model(table, source="test")


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_strides(output_stride):
    low, high = build_backbone("resnet18d", output_stride)(torch.zeros(1, 3, 64, 96))
    assert low.shape[-2:] == (16, 24) and high.shape[-2:] == (64 // output_stride, 96 // output_stride)


def test_backbone_is_timms():
    torch.manual_seed(0)
    ours = build_backbone("resnet18d", 32).eval()
    torch.manual_seed(0)
    theirs = timm.create_model("resnet18d", features_only=True).eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    image = torch.randn(1, 3, 64, 64)
    maps = theirs(image)
    assert all(torch.equal(a, b) for a, b in zip(ours(image), (maps[1], maps[4]), strict=True))


@pytest.mark.parametrize(
    ("name", "output_stride", "message"),
    [
        ("resnet18e", 16, r"timm .* has no such model; closest: resnet18, resnet18d"),
        ("qqqqqqqq", 16, "timm.list_models"),
        ("efficientvit_b0", 16, "cannot return feature maps at output_stride = 16 .*use output_stride = 32"),
        ("vit_tiny_patch16_224", 16, "feature strides|cannot return feature maps"),
    ],
)
def test_backbones_that_do_not_fit(name, output_stride, message):
    with pytest.raises(UserError, match=message):
        build_backbone(name, output_stride)


def test_missing_weights_name_the_way_out(monkeypatch):
    create = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("we are offline")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match="'resnet18d': its ImageNet weights cannot be loaded .*pretrained = false"):
        build_backbone("resnet18d", 16, pretrained=True)


def test_multi_grid():
    plain, grid = build_backbone("resnet18d", 16), build_backbone("resnet18d", 16, multi_grid=(2, 4))
    dilations = [c.dilation[0] for c in grid.layer4.modules() if isinstance(c, nn.Conv2d) and c.kernel_size == (3, 3)]
    assert dilations == [2, 2, 4, 4]
    assert grid(torch.zeros(1, 3, 64, 64))[1].shape == plain(torch.zeros(1, 3, 64, 64))[1].shape
    bottleneck = build_backbone("resnet50", 16, multi_grid=(2, 4, 8))
    assert [block.conv2.dilation[0] for block in bottleneck.layer4] == [2, 4, 8]
    with pytest.raises(UserError, match="multi_grid needs a ResNet backbone, not 'mobilenetv2_050'"):
        build_backbone("mobilenetv2_050", 16, multi_grid=(2, 4))


def test_head_against_a_plain_restatement():
    """DeepLabv3+ written out with functional calls on the same weights."""
    model = build_segmenter(_section(), CLASSES, COLORS, seed=0).eval()
    head, image = model.head, torch.randint(256, (2, 3, 48, 64), dtype=torch.uint8)
    low, high = model.backbone((image.float() - model.mean) / model.std)

    def conv(layer, x, dilation=1):
        weight = layer[0].weight
        x = functional.conv2d(x, weight, padding=dilation * (weight.shape[-1] // 2), dilation=dilation)
        x = functional.batch_norm(x, layer[1].running_mean, layer[1].running_var, layer[1].weight, layer[1].bias)
        return x.relu()

    branches = [conv(head.aspp[0], high), conv(head.aspp[1], high, 1), conv(head.aspp[2], high, 2)]
    branches.append(conv(head.pooled, high.mean((2, 3), keepdim=True)).repeat(1, 1, *high.shape[-2:]))
    x = conv(head.project, torch.cat(branches, 1))
    x = functional.interpolate(x, low.shape[-2:], mode="bilinear", align_corners=False)
    x = conv(head.decoder[1], conv(head.decoder[0], torch.cat([x, conv(head.low_level, low)], 1)))
    logits = functional.conv2d(x, head.classifier.weight, head.classifier.bias)
    logits = functional.interpolate(logits, (48, 64), mode="bilinear", align_corners=False)
    out = model(image)
    assert torch.allclose(out.features, x, atol=1e-5) and torch.allclose(out.logits, logits, atol=1e-5)
    assert out.logits.shape == (2, 3, 48, 64) and out.features.shape == (2, 16, 12, 16)


def test_decoder_trains_in_another_layout_with_the_same_gradients():
    model = build_segmenter(_section(), list("abc"), [(0, 0, 0)] * 3, 0).train()
    plain = copy.deepcopy(model)
    for block in plain.head.decoder:
        block[0].__class__ = nn.Conv2d
    image, layouts = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8), []
    for network in (model, plain):
        network.head.decoder[1][0].register_forward_hook(lambda *args: layouts.append(args[2].is_contiguous()))
        logits, features = network(image)
        (logits.square().mean() + features.mean()).backward()
    assert layouts == [True, False]
    assert model.head.decoder[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6), name


def test_heads_start_from_kaiming_normal_fan_in():
    weight = build_segmenter(_section(head={"channels": 64}), CLASSES, COLORS, seed=0).head.decoder[1][0].weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.03)


def test_each_model_normalises_by_its_own_statistics():
    image = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    for name in ("test_resnet", "tf_efficientnet_lite0"):
        model = build_segmenter(_section(name), CLASSES, COLORS, seed=0).eval()
        cfg = timm.get_pretrained_cfg(name)
        seen = []
        model.backbone.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        model(image)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (cfg.mean, cfg.std))
        assert torch.allclose(seen[0], (image / 255 - mean) / std, atol=1e-5)


def test_same_seed_same_weights():
    first, same, other = (build_segmenter(_section(), CLASSES, COLORS, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_group_norm_head_has_no_batch_statistics():
    model = build_segmenter(_section(head={"norm": "group"}), CLASSES, COLORS, seed=0)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.head.modules())
    model.train()(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("backbone", "stride", "head"), [("mobilenetv2_050", 16, "deeplabv3plus"), ("resnet18d", 32, "lraspp")]
)
def test_cells_are_as_large_in_images_that_do_not_fill_the_last_ones(backbone, stride, head):
    table = {"backbone": backbone, "pretrained": False, "output_stride": stride, "head": {"name": head, "channels": 16}}
    section = parse_model(table, source="test")
    model = build_segmenter(section, CLASSES, COLORS, seed=0).eval()
    pixels = 255 * torch.rand(1, 3, 70, 97, generator=torch.Generator().manual_seed(0))
    filled = model.mean.repeat(1, 1, 70 + -70 % stride, 97 + -97 % stride)
    filled[..., :70, :97] = pixels
    with torch.no_grad():
        seen, whole = model(pixels), model(filled)
    assert seen.logits.shape[-2:] == (70, 97)
    assert torch.allclose(seen.logits, whole.logits[..., :70, :97], atol=1e-5)
    cell = whole.logits.shape[-2] // whole.features.shape[-2]
    assert seen.features.shape[-2:] == (-(-70 // cell), -(-97 // cell))
    assert torch.allclose(seen.features, whole.features[..., : -(-70 // cell), : -(-97 // cell)], atol=1e-5)


def test_save_and_load(tmp_path):
    model = build_segmenter(_section("mobilenetv2_050"), CLASSES, COLORS, seed=0).eval()
    model.save(tmp_path / "model")
    image = torch.randint(256, (1, 3, 40, 56), dtype=torch.uint8)
    for source in (tmp_path / "model", tmp_path):
        again = load_segmenter(source).eval()
        assert torch.equal(model(image).logits, again(image).logits)
        assert again.classes == CLASSES and again.colors == COLORS
    assert not Segmenter.from_pretrained(tmp_path).training


def test_config_says_what_pixels_it_wants(tmp_path):
    model = build_segmenter(_section(), CLASSES, COLORS, seed=0, image_scale=0.5, crop=320).eval()
    with torch.no_grad():
        model.mean.add_(3), model.std.mul_(2)  # timm may change its mind
    model.save_pretrained(tmp_path)
    again = load_segmenter(tmp_path).eval()
    image = torch.randint(256, (1, 3, 40, 56), dtype=torch.uint8)
    assert torch.equal(model(image).logits, again(image).logits)
    assert (again.image_scale, again.crop) == (0.5, 320)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("image_scale", "crop", "mean", "std"):
        del config[key]  # as models were written before
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_segmenter(tmp_path).image_scale == 1.0


def test_a_backbone_whose_maps_have_their_channels_last():
    model = build_segmenter(_section(backbone="mambaout_femto", output_stride=32), CLASSES, COLORS, seed=0).eval()
    image = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        deepest = model.backbone((image - model.mean) / model.std)[-1]
        found = model.describe(image)
        assert deepest.shape[:3] == (2, 2, 3) and torch.allclose(found, deepest.mean(dim=(1, 2)), atol=1e-5)
        assert model(image).logits.shape == (2, len(CLASSES), 64, 96)


def test_predict_a_picture():
    model = build_segmenter(_section(), CLASSES, COLORS, seed=0, image_scale=0.5)
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(256, size=(90, 61, 3), dtype=np.uint8))
    exif = picture.getexif()
    exif[PIL.ExifTags.Base.Orientation] = 6  # to be turned right by 90 degrees
    found = model.predict(picture)
    assert found.label.shape == (61, 90) and found.label.dtype == np.uint8 and model.training
    small = picture.transpose(PIL.Image.Transpose.ROTATE_270).resize((45, 30), PIL.Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = functional.interpolate(model.eval()(pixels).logits, (61, 90), mode="bilinear", align_corners=False)
    assert np.array_equal(found.label, logits[0].argmax(0).numpy())
    assert np.array_equal(found.colors, np.array(COLORS, np.uint8)[found.label])
    assert sum(np.asarray(segment["mask"], bool).sum() for segment in found.segments) == 61 * 90
    assert model.predict(PIL.Image.new("L", (1, 1))).label.shape == (1, 1)
    with pytest.raises(UserError, match=r"takes a PIL image, as PIL\.Image\.open gives it, not str"):
        model.predict("photo.jpg")
    with pytest.raises(UserError, match="the image cannot be read: it holds pixels that are no number"):
        model.predict(PIL.Image.fromarray(np.full((8, 8), np.nan, np.float32)))
    with torch.no_grad():
        model.head.classifier.bias.fill_(torch.nan)
    with pytest.raises(UserError, match="the network gives values that are no number; its weights are of no use"):
        model.predict(picture)


def test_loading_is_strict(tmp_path):
    build_segmenter(_section(), CLASSES, COLORS, seed=0).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (
        ({"classes": ["a", "b"], "colors": [[0, 0, 0]] * 2}, "the weights do not fit config.json"),
        ({"classes": ["a", "b"]}, "classes must be names and colors as many"),
        ({"colors": None}, "classes must be names and colors as many"),
        ({"model": {**config["model"], "backbone": "test_resnet2"}}, "no such model"),
        ({"model": {**config["model"], "os": 1}}, r"config.json: \[student\] os: unknown key"),
        (
            {"model": {**config["model"], "backbone": "x"}},
            r"config.json: \[student\] backbone = 'x': timm .* has no such",
        ),
        ({"format": 99}, "format 99, ours 1"),
        ({"image_scale": 0}, "config.json: image_scale = 0: "),
        ({"std": [1.0, 2.0]}, r"config.json: std = "),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(UserError, match=message):
            load_segmenter(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="model.safetensors cannot be read"):
        load_segmenter(tmp_path)
    with pytest.raises(UserError, match="no config.json there"):
        load_segmenter(tmp_path.parent)


def test_a_mistyped_run_is_told_from_those_that_are_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", _unreachable)
    for folder in ("runs/quickstart-s0/model", "runs/plain", "runs/other"):
        Path(folder).mkdir(parents=True)
    for folder in ("runs/quickstart-s0/model", "runs/plain"):
        Path(folder, "config.json").write_text("{}")
    with pytest.raises(UserError, match="did you mean 'runs/quickstart-s0'. choices: runs/plain, runs/quickstart-s0$"):
        find_model("runs/quickstart")
    with pytest.raises(UserError, match="a hub id; did you mean 'runs/plain'"):
        find_model("./runs/plain-s0")
    with pytest.raises(UserError, match=r"gives us \(OSError\)$"):
        find_model("org/name")


def _unreachable(*args, **kwargs):
    raise OSError("no network")
