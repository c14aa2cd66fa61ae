"""The light heads against functional restatements on the same weights."""

import pytest
import torch
from torch.nn import functional

from mgd.complexity import model_costs
from mgd.models.segmenter import build_segmenter, load_segmenter
from mgd.recipe import parse_model

CLASSES, COLORS = list("abc"), [(0, 0, 0)] * 3


def section(name, backbone="test_resnet", **head):
    table = {"backbone": backbone, "pretrained": False, "output_stride": 16, "head": {"name": name, **head}}
    return parse_model(table, source="test")


def maps_of(model):
    image = torch.randint(256, (2, 3, 48, 64), dtype=torch.uint8)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return image, model.backbone((image.float() - model.mean) / model.std)


def normed(layers, x):
    return functional.batch_norm(x, layers.running_mean, layers.running_var, layers.weight, layers.bias).relu()


def test_separable_blocks():
    torch.manual_seed(0)
    head = {"channels": 16, "low_level_channels": 8, "aspp_rates": [2]}
    model = build_segmenter(section("deeplabv3plus_separable", **head), CLASSES, COLORS, seed=0).eval()
    image, (low, high) = maps_of(model)

    def separable(block, x, dilation=1):
        x = functional.conv2d(x, block[0].weight, padding=dilation, dilation=dilation, groups=x.shape[1])
        return normed(block[4], functional.conv2d(normed(block[1], x), block[3].weight))

    def pointwise(block, x):
        return normed(block[1], functional.conv2d(x, block[0].weight))

    parts = model.head
    branches = [pointwise(parts.aspp[0], high), separable(parts.aspp[1], high, 2)]
    branches.append(pointwise(parts.pooled, high.mean((2, 3), keepdim=True)).expand_as(branches[0]))
    context = pointwise(parts.project, torch.cat(branches, 1))
    context = functional.interpolate(context, low.shape[-2:], mode="bilinear", align_corners=False)
    features = torch.cat([context, pointwise(parts.low_level, low)], 1)
    features = separable(parts.decoder[1], separable(parts.decoder[0], features))
    logits = functional.conv2d(features, parts.classifier.weight, parts.classifier.bias)
    logits = functional.interpolate(logits, (48, 64), mode="bilinear", align_corners=False)
    out = model(image)
    assert torch.allclose(out.logits, logits, atol=1e-5) and torch.allclose(out.features, features, atol=1e-5)


def test_lraspp_in_the_order_of_the_paper():
    torch.manual_seed(0)
    model = build_segmenter(section("lraspp", channels=16), CLASSES, COLORS, seed=0).eval()
    image, (low, high) = maps_of(model)
    parts = model.head
    features = normed(parts.branch[1], functional.conv2d(high, parts.branch[0].weight))
    features = features * functional.conv2d(high.mean((2, 3), keepdim=True), parts.gate.weight).sigmoid()
    enlarged = functional.interpolate(features, low.shape[-2:], mode="bilinear", align_corners=False)
    logits = functional.conv2d(enlarged, parts.high_classifier.weight, parts.high_classifier.bias)
    logits = logits + functional.conv2d(low, parts.low_classifier.weight, parts.low_classifier.bias)
    logits = functional.interpolate(logits, (48, 64), mode="bilinear", align_corners=False)
    out = model(image)
    assert torch.allclose(out.logits, logits, atol=1e-4) and torch.allclose(out.features, features, atol=1e-5)


@pytest.mark.parametrize("name", ["deeplabv3plus_separable", "lraspp"])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_train_save_and_load(tmp_path, name, norm):
    model = build_segmenter(section(name, norm=norm, channels=16), CLASSES, COLORS, seed=0).train()
    image = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    model(image).logits.square().mean().backward()
    idle = [key for key, value in model.named_parameters() if value.grad is None]
    assert not [key for key in idle if key.startswith("head.")]
    model.save(tmp_path)
    assert torch.equal(load_segmenter(tmp_path).eval()(image).logits, model.eval()(image).logits)


def test_what_they_cost_beside_the_dense_head():
    dense = model_costs(section("deeplabv3plus", "mobilenetv2_100"), 21, 512)["total"].gmacs
    separable = model_costs(section("deeplabv3plus_separable", "mobilenetv2_100"), 21, 512)["total"].gmacs
    lraspp = model_costs(section("lraspp", "mobilenetv2_100"), 21, 512)["total"].gmacs
    assert dense > 7 * separable and separable > lraspp
