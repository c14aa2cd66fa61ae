import numpy as np
import PIL.Image
import pytest
import torch

import mgd.plots
from mgd.data.public import Cityscapes
from mgd.errors import UserError
from mgd.pictures import colorize, evenly
from mgd.plots import plot_costs, plot_partitions
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


def test_no_point_covers_another(tmp_path, monkeypatch):
    drawn, panels = [], mgd.plots._panels
    monkeypatch.setattr(mgd.plots, "_panels", lambda *args: drawn.append(panels(*args)) or drawn[-1])
    points = [("kd", "a", 2.0, 55.0, 3.0), ("cwd", "b", 2.0, 55.0, 4.0), ("kd", "c", 2.0, 57.0, None)]
    plot_costs({"one": [*points, ("cps", "d", 4.5, 56.0, 1.0)]}, tmp_path / "a.png")
    plot_partitions({"one": {name: [(11, 40.0, 1.0), (23, 45.0, None)] for name in "ab"}}, tmp_path / "b.png")
    (_, (cost_axis,)), (_, (partition_axis,)) = drawn
    costs, partitions = ([bar.lines[0].get_xdata() for bar in axis.containers] for axis in (cost_axis, partition_axis))
    assert len({float(x[0]) for x in costs}) == 4
    assert sorted(round(float(x[0]) / 0.5) * 0.5 for x in costs) == [2.0, 2.0, 2.0, 4.5]
    names = [text.get_text() for text in cost_axis.get_legend().get_texts()]
    assert names == ["1 c (kd)", "2 d (cps)", "3 a (kd)", "4 b (cwd)"], "best first, as they are numbered"
    assert len({float(x) for xs in partitions for x in xs}) == 4
    assert {round(float(x)) for xs in partitions for x in xs} <= {10, 11, 12, 22, 23, 24}


def test_ignored_pixels_are_white():
    colors = colorize(np.array([[0, 255]]), [(1, 2, 3)])
    assert colors.tolist() == [[[1, 2, 3], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("count", "wanted", "places"),
    [(3, 4, [0, 1, 2]), (4, 20, [0, 1, 2, 3]), (101, 5, [0, 25, 50, 75, 100]), (7, 1, [0]), (0, 4, [])],
)
def test_places_spread_evenly(count, wanted, places):
    assert evenly(count, wanted) == places
