"""The paper's Params and FLOPs columns (Tables 1 and 3), all four backbones, within 1 %."""

import pytest
import torch
from torch import nn

from mgd.complexity import count, model_costs
from mgd.recipe import parse_model

PAPER = {  # backbone: output stride, millions of parameters, GMACs at 512 and at 800
    "resnet101s": (16, 42.63, 59.13, 144.32),
    "wide_resnet50_2": (16, 66.83, 91.12, 222.45),
    "resnet18d": (16, 11.19, 17.20, 42.01),
    "mobilenetv2_100": (32, 1.81, 1.52, 3.73),
}


@pytest.mark.parametrize("backbone", PAPER)
def test_the_papers_columns(backbone):
    output_stride, params, at_512, at_800 = PAPER[backbone]
    table = {"backbone": backbone, "pretrained": False, "output_stride": output_stride}
    section = parse_model(table | {"head": {"name": "deeplabv3plus"}}, source="test")
    for size, gmacs in ((512, at_512), (800, at_800)):
        costs = model_costs(section, 21, size)
        assert costs["backbone"].params_m == pytest.approx(params, rel=0.01)
        assert costs["backbone"].gmacs == pytest.approx(gmacs, rel=0.01)
        assert costs["total"].gmacs == pytest.approx(costs["backbone"].gmacs + costs["head"].gmacs)


def test_a_convolution_by_hand():
    conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
    cost = count(conv, torch.zeros(1, 3, 10, 10))
    assert cost.conv_gmacs == pytest.approx(3 * 9 * 8 * 100 / 1e9)
    assert cost.gmacs - cost.conv_gmacs == pytest.approx(2 * 8 * 100 / 1e9)
    assert cost.params_m == pytest.approx((3 * 9 * 8 + 16) / 1e6)
