import builtins

import numpy as np
import pytest
import torch

from mgd.benchmarks.data import MEAN, STD, Case, opencv, reference_sample, suite, write_case
from mgd.data.datasets import Shapes
from mgd.data.loaders import LABELED
from mgd.errors import UserError

CASES = (Case(90, 60, "jpg", 6, 40), Case(80, 100, "png", 1, 70))


@pytest.fixture
def section():
    pytest.importorskip("cv2")
    return Shapes(name="shapes", scales=(0.5, 0.75, 1.0, 1.5, 2.0))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind)
# Its nearest is half a pixel off, and its bilinear does not smooth what it shrinks.
@pytest.mark.parametrize(("factor", "least", "levels"), [(1.0, 1.0, 0.1), (2.0, 0.9, 4), (0.5, 0.7, 10)])
def test_reference_and_ours_show_the_same(section, case, factor, least, levels, tmp_path):
    pairs, files = write_case(tmp_path, case, section.model_copy(update={"scales": (factor,)}), num_images=1)
    for position in range(8):
        view = pairs.view(case.width, case.height, LABELED, position)
        image, label = reference_sample(*files[0], case.crop, view)
        ours = pairs[position]
        assert ours["image"].shape == image.shape and ours["label"].dtype == label.dtype == torch.int64
        assert (ours["label"] == label).float().mean() >= least
        restored = 255 * (image.permute(1, 2, 0).numpy() * STD + MEAN)
        assert np.abs(restored - ours["image"].permute(1, 2, 0).numpy()).mean() < levels


def test_rows_and_ratios(section):
    threads = torch.get_num_threads()
    rows = suite(section, num_images=1, repetitions=1, cases=CASES)
    assert [row["name"] for row in rows] == [
        "data: 90x60 jpg to 40, ms an image",
        "data: 80x100 png to 70, ms an image",
    ]
    assert all(row["ratio"] == row["reference"] / row["ours"] > 0 for row in rows)
    assert torch.get_num_threads() == threads


def test_without_opencv_one_line_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **options):
        if name == "cv2":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"compares with OpenCV; pip install -e"):
        opencv()
