import math

import numpy as np
import pytest
import torch

from mgd.data.cutmix import box_masks, mix


def test_expected_area_is_that_of_three_xored_boxes():
    generator = torch.Generator().manual_seed(0)
    masks = box_masks(4000, (60, 80), generator)
    assert masks.shape == (4000, 1, 60, 80) and masks.dtype == torch.bool
    # Three boxes of sides U(0.25, 0.5) / sqrt(3), XOR-ed, drawn plainly; OR would cover 0.130 of the area.
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(4000):
        area = np.zeros((60, 80), bool)
        for _ in range(3):
            height, width = (round(side * rng.uniform(0.25, 0.5) / math.sqrt(3)) for side in (60, 80))
            top, left = rng.integers(60 - height + 1), rng.integers(80 - width + 1)
            area[top : top + height, left : left + width] ^= True
        covered.append(area.mean())
    assert abs(np.mean(covered) - 0.1236) < 0.002
    assert masks.float().mean().item() == pytest.approx(np.mean(covered), rel=0.015)


def test_one_box_has_the_stated_extent_and_lies_inside():
    generator = torch.Generator().manual_seed(1)
    heights, widths, tops = [], [], []
    for mask in box_masks(500, (100, 200), generator, num_boxes=1)[:, 0]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert mask.sum() == len(rows) * len(columns)
        heights.append(len(rows))
        widths.append(len(columns))
        tops.append(rows[0].item() / max(1, 100 - len(rows)))
    assert min(heights) >= 25 and max(heights) <= 50 and min(widths) >= 50 and max(widths) <= 100
    assert abs(sum(heights) / 500 - 37.5) < 1.5 and abs(sum(tops) / 500 - 0.5) < 0.05


def test_same_generator_same_masks():
    first, second = (box_masks(3, (32, 32), torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)


def test_mix_lays_the_second_over_the_first_in_images_and_classes():
    mask = torch.tensor([[[[True, False]]]])
    mixed = mix(torch.zeros(1, 3, 1, 2), torch.ones(1, 3, 1, 2), mask)
    assert mixed[0, :, 0].tolist() == [[1.0, 0.0]] * 3
    assert mix(torch.tensor([[[1, 2]]]), torch.tensor([[[3, 4]]]), mask).tolist() == [[[3, 2]]]
