import math

import numpy as np
import pytest
import torch

from mgd.data.cutmix import box_masks, mix


def plain_box(rng, height, width, boxes):
    """One box as the authors of CPS draw it: by area and aspect ratio, one number after the other."""
    area = rng.uniform(0.25, 0.5)
    share = math.exp(rng.uniform() * math.log(area))
    box = round(share / math.sqrt(boxes) * height), round(area / share / math.sqrt(boxes) * width)
    return *box, round((height - box[0]) * rng.uniform()), round((width - box[1]) * rng.uniform())


def test_mixed_area_is_that_of_three_xored_boxes():
    generator = torch.Generator().manual_seed(0)
    masks = box_masks(4000, (60, 80), generator)
    assert masks.shape == (4000, 1, 60, 80) and masks.dtype == torch.bool
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(4000):
        area = np.zeros((60, 80), bool)
        for _ in range(3):
            height, width, top, left = plain_box(rng, 60, 80, 3)
            area[top : top + height, left : left + width] ^= True
        covered.append(area.mean())
    assert abs(np.mean(covered) - 0.25) < 0.005
    shares = masks.float().mean(dim=(1, 2, 3)).numpy()
    assert shares.mean() == pytest.approx(np.mean(covered), rel=0.015)
    for percent in (5, 50, 95):
        assert np.percentile(shares, percent) == pytest.approx(np.percentile(covered, percent), rel=0.04)


def test_one_box_has_the_stated_area_and_lies_inside():
    generator = torch.Generator().manual_seed(1)
    areas, heights, tops = [], [], []
    for mask in box_masks(500, (100, 200), generator, num_boxes=1)[:, 0]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert mask.sum() == len(rows) * len(columns)
        areas.append(len(rows) * len(columns) / 20000)
        heights.append(len(rows) / 100)
        tops.append(rows[0].item() / max(1, 100 - len(rows)))
    assert 0.24 < min(areas) < 0.26 and 0.49 < max(areas) < 0.51 and abs(sum(areas) / 500 - 0.375) < 0.01
    assert 0.24 <= min(heights) < 0.35 and 0.9 < max(heights) <= 1  # any aspect ratio that fits
    rng = np.random.default_rng(1)
    plain = [plain_box(rng, 100, 200, 1)[0] / 100 for _ in range(4000)]
    assert sum(heights) / 500 == pytest.approx(np.mean(plain), abs=0.03)
    assert abs(np.mean([top for top, height in zip(tops, heights, strict=True) if height < 0.9]) - 0.5) < 0.05


def test_same_generator_same_masks():
    first, second = (box_masks(3, (32, 32), torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)


def test_mix_lays_the_second_over_the_first_in_images_and_classes():
    mask = torch.tensor([[[[True, False]]]])
    mixed = mix(torch.zeros(1, 3, 1, 2), torch.ones(1, 3, 1, 2), mask)
    assert mixed[0, :, 0].tolist() == [[1.0, 0.0]] * 3
    assert mix(torch.tensor([[[1, 2]]]), torch.tensor([[[3, 4]]]), mask).tolist() == [[[3, 2]]]
