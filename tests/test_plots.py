import numpy as np
import PIL.Image
import pytest
import torch

from mgd.data.public import Cityscapes
from mgd.errors import UserError
from mgd.pictures import colorize, evenly
from mgd.plots import plot_partitions
from mgd.predictions import save_prediction


def test_predictions_are_palette_pngs_in_the_data_sets_own_values(tmp_path):
    classes, colors, decoder = Cityscapes(name="cityscapes", root="x")._coding()
    prediction = torch.tensor([[0, 13], [18, 1]])
    save_prediction(tmp_path, colors, decoder.encode, "ulm/a", prediction)
    with PIL.Image.open(tmp_path / "ulm" / "a.png") as picture:
        assert picture.mode == "P" and np.asarray(picture).tolist() == [[7, 26], [33, 8]]  # official labelIds
        assert picture.convert("RGB").getpixel((1, 0)) == (0, 0, 142)
        assert (decoder(picture, "a") == prediction.numpy()).all()
    with pytest.raises(UserError, match="would be written outside"):
        save_prediction(tmp_path / "in", colors, decoder.encode, "../out", prediction)


@pytest.mark.filterwarnings("error")  # matplotlib warns, and squeezes the axes to nothing
def test_a_figure_has_room_for_the_names_of_many_lines(tmp_path):
    lines = {f"half_lite0_long_{index}": [(11, 40.0, 1.0), (23, 45.0, None)] for index in range(60)}
    plot_partitions({"many": lines, "one": {"x": [(11, 2.0, None)]}}, tmp_path / "a.png")
    with PIL.Image.open(tmp_path / "a.png") as picture:
        assert picture.height > 900


def test_ignored_pixels_are_white():
    colors = colorize(np.array([[0, 255]]), [(1, 2, 3)])
    assert colors.tolist() == [[[1, 2, 3], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("count", "wanted", "places"),
    [(3, 4, [0, 1, 2]), (4, 20, [0, 1, 2, 3]), (101, 5, [0, 25, 50, 75, 100]), (7, 1, [0]), (0, 4, [])],
)
def test_places_spread_evenly(count, wanted, places):
    assert evenly(count, wanted) == places
