import numpy as np
import PIL.Image
import pytest
import torch

from mgd.data.transforms import MEAN_COLOR, LabelDecoder, augment, rescale, to_rgb
from mgd.errors import UserError


def _coded(width, height):
    """Image whose red and green say the class of the pixel: image and label must stay aligned."""
    label = (np.add.outer(np.arange(height) // 16, np.arange(width) // 16) % 5).astype(np.uint8)
    image = np.stack([label * 40, 200 - label * 40, np.full_like(label, 9)], axis=-1)
    return PIL.Image.fromarray(image), label


@pytest.mark.parametrize("size", [(64, 64), (100, 50), (33, 90)])
def test_image_and_label_move_together(size):
    image, label = _coded(*size)
    for seed in range(12):
        pixels, target = augment(image, label, 48, (0.5, 1.0, 1.5), True, np.random.default_rng(seed))
        assert pixels.shape == (3, 48, 48) and pixels.dtype == torch.uint8
        assert target.shape == (48, 48) and target.dtype == torch.int64
        padded = target == 255
        assert (pixels[:, padded].T == torch.tensor(MEAN_COLOR, dtype=torch.uint8)).all()
        agree = (pixels[0][~padded].float() / 40).round() == target[~padded]
        assert agree.float().mean() > 0.9  # all but the interpolated edges


def test_without_scaling_a_crop_is_an_exact_cut():
    image, label = _coded(80, 70)
    pixels, target = augment(image, label, 48, (1.0,), False, np.random.default_rng(3))
    assert torch.equal(pixels[0].long(), target * 40)
    assert set(target.unique().tolist()) <= set(range(5))


def test_flip_happens_half_of_the_time():
    image, label = _coded(32, 32)
    flips = [
        not torch.equal(
            augment(image, label, 32, (1.0,), True, np.random.default_rng(s))[1], torch.tensor(label).long()
        )
        for s in range(200)
    ]
    assert 70 < sum(flips) < 130


def test_unlabelled_image_gets_the_same_pixels():
    image, label = _coded(60, 60)
    with_label = augment(image, label, 32, (0.5, 1.0), True, np.random.default_rng(1))[0]
    without = augment(image, None, 32, (0.5, 1.0), True, np.random.default_rng(1))
    assert torch.equal(with_label, without[0]) and without[1] is None


def test_rescale():
    image, label = _coded(64, 48)
    small, small_label = rescale(image, label, 0.5)
    assert small.size == (32, 24) and small_label.shape == (24, 32) and set(np.unique(small_label)) <= set(range(5))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "I;16", "F"])
def test_every_mode_becomes_rgb(mode):
    if mode == "I;16":
        image = PIL.Image.fromarray(np.array([[0, 65535]], np.uint16))
    elif mode == "F":
        image = PIL.Image.fromarray(np.array([[0.0, 1.0]], np.float32))
    else:
        image = PIL.Image.new("RGB", (2, 1), "white").convert(mode)
        if mode != "RGBA":
            image.putpixel((0, 0), PIL.Image.new("RGB", (1, 1)).convert(mode).getpixel((0, 0)))
    rgb = np.asarray(to_rgb(image))
    assert rgb.shape == (1, 2, 3) and (rgb[0, 1] >= 250).all()


def test_transparent_pixels_are_white():
    assert to_rgb(PIL.Image.new("RGBA", (1, 1), (10, 20, 30, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_label_decoder_reads_indices_palettes_and_colours():
    values = np.array([[0, 2], [255, 1]], np.uint8)
    decoder = LabelDecoder(3)
    palette = PIL.Image.fromarray(values).convert("P")
    palette.putdata(values.flatten().tolist())
    assert (decoder(PIL.Image.fromarray(values), "a") == values).all()
    assert (decoder(palette, "a") == values).all()
    assert (decoder(PIL.Image.fromarray(np.stack([values] * 3, -1)), "a") == values).all()
    colored = LabelDecoder(2, colors=((255, 0, 0), (0, 0, 9)), ignore_color=(1, 1, 1))
    rgb = np.array([[[255, 0, 0], [0, 0, 9]], [[1, 1, 1], [255, 0, 0]]], np.uint8)
    assert colored(PIL.Image.fromarray(rgb), "a").tolist() == [[0, 1], [255, 0]]
    assert LabelDecoder(11, remap=((11, 255),))(PIL.Image.new("L", (1, 1), 11), "a").tolist() == [[255]]


def test_label_decoder_names_what_is_wrong():
    with pytest.raises(UserError, match="mask of street/7: value 9 is no class; the data set has 3 classes"):
        LabelDecoder(3)(PIL.Image.new("L", (2, 2), 9), "street/7")
    for value in (-9999, -256, 300):
        with pytest.raises(UserError, match=f"mask of x: value {value} is no class"):
            LabelDecoder(3)(PIL.Image.fromarray(np.full((1, 1), value, np.int32)), "x")
        with pytest.raises(UserError, match=f"value {value} is no class"):
            LabelDecoder(3, remap=((7, 0),))(PIL.Image.fromarray(np.full((1, 1), value, np.int32)), "x")
    with pytest.raises(UserError, match="mask of x holds fractions"):
        LabelDecoder(3)(PIL.Image.fromarray(np.full((1, 1), 0.5, np.float32)), "x")
    with pytest.raises(UserError, match=r"mask of x: colour \[4, 5, 6\] is not in \[data\] colors"):
        LabelDecoder(1, colors=((0, 0, 0),))(PIL.Image.new("RGB", (1, 1), (4, 5, 6)), "x")
    with pytest.raises(UserError, match=r"mask of x is a colour image; give \[data\] colors"):
        LabelDecoder(3)(PIL.Image.new("RGB", (1, 1), (4, 5, 6)), "x")
