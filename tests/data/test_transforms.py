import io
import struct
import zlib

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from mgd.data.stream import _decode as decode_row
from mgd.data.transforms import MEAN_COLOR, LabelDecoder, View, augment, draw_view
from mgd.errors import UserError
from mgd.pictures import decode, rescale, to_rgb, upright


def _coded(width, height):
    """Image whose red and green say the class of the pixel: image and label must stay aligned."""
    label = (np.add.outer(np.arange(height) // 16, np.arange(width) // 16) % 5).astype(np.uint8)
    image = np.stack([label * 40, 200 - label * 40, np.full_like(label, 9)], axis=-1)
    return PIL.Image.fromarray(image), label


def _noise(width, height):
    rng = np.random.default_rng(width)
    label = rng.integers(0, 5, (height, width)).astype(np.uint8)
    return PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)), label


def _drawn(image, crop, scales, flip, seed):
    return draw_view(*image.size, crop, scales, flip, np.random.default_rng(seed))


SIZES = [(64, 64), (100, 50), (33, 90), (1, 1), (7, 300)]


@pytest.mark.parametrize("size", SIZES[:3])
def test_image_and_label_move_together(size):
    image, label = _coded(*size)
    for seed in range(12):
        pixels, target = augment(image, label, 48, _drawn(image, 48, (0.5, 1.0, 1.5), True, seed))
        assert pixels.shape == (3, 48, 48) and pixels.dtype == torch.uint8
        assert target.shape == (48, 48) and target.dtype == torch.int64
        padded = target == 255
        assert (pixels[:, padded].T == torch.tensor(MEAN_COLOR, dtype=torch.uint8)).all()
        agree = (pixels[0][~padded].float() / 40).round() == target[~padded]
        assert agree.float().mean() > 0.9  # all but the interpolated edges


@pytest.mark.parametrize("size", SIZES)
def test_against_pil_and_plain_indexing(size):
    image, label = _noise(*size)
    for seed in range(40):
        view = _drawn(image, 48, (0.3, 0.5, 0.75, 1.0, 1.75, 2.0, 8.0), True, seed)
        (left, top, right, bottom), (width, height) = view.box, view.size
        pixels, target = augment(image, label, 48, view)
        expected = np.empty((48, 48, 3), np.uint8)
        expected[:] = MEAN_COLOR
        inside = (slice(view.offset[1], view.offset[1] + height), slice(view.offset[0], view.offset[0] + width))
        expected[inside] = image.crop(view.box).resize(view.size, PIL.Image.Resampling.BILINEAR)
        wanted = np.full((48, 48), 255)
        for y in range(height):  # the pixel under the centre of each
            for x in range(width):
                row, column = int((y + 0.5) * (bottom - top) / height), int((x + 0.5) * (right - left) / width)
                wanted[inside][y, x] = label[top + row, left + column]
        if view.mirrored:
            expected, wanted = expected[:, ::-1], wanted[:, ::-1]
        assert np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 2
        assert (target.numpy() == wanted).all()


@pytest.mark.parametrize("size", SIZES)
def test_views_lie_in_the_image_and_in_the_crop(size):
    image, _ = _noise(*size)
    mirrored, corners = [], set()
    for seed in range(300):
        view = _drawn(image, 48, (0.01, 0.5, 1.0, 8.0), True, seed)
        assert view == _drawn(image, 48, (0.01, 0.5, 1.0, 8.0), True, seed)
        assert not _drawn(image, 48, (0.5,), False, seed).mirrored
        mirrored.append(view.mirrored)
        corners.add(view.box[:2])
        for axis in (0, 1):
            first, last = view.box[axis::2]
            assert 0 <= first < last <= size[axis]
            assert 0 <= view.offset[axis] and 1 <= view.size[axis] <= 48 - view.offset[axis]
            assert abs(2 * view.offset[axis] + view.size[axis] - 48) <= 1
    assert 100 < sum(mirrored) < 200
    assert len(corners) > 50 or min(size) < 50


def test_corners_are_drawn_evenly():
    counts = np.zeros(33)
    for seed in range(3300):
        counts[draw_view(80, 48, 48, (1.0,), True, np.random.default_rng(seed)).box[0]] += 1
    assert 60 < counts.min() and counts.max() < 140


def test_without_scaling_a_view_is_an_exact_cut():
    image, label = _noise(80, 70)
    view = _drawn(image, 48, (1.0,), False, 3)
    pixels, target = augment(image, label, 48, view)
    left, top, right, bottom = view.box
    assert (right - left, bottom - top) == view.size == (48, 48)
    assert (pixels.permute(1, 2, 0).numpy() == np.asarray(image)[top:bottom, left:right]).all()
    assert (target.numpy() == label[top:bottom, left:right]).all()
    whole = View((0, 0, 70, 70), (70, 70), (0, 0), True)
    mirrored, turned = augment(image, label, 70, whole)
    assert (mirrored.permute(1, 2, 0).numpy() == np.asarray(image)[:, 69::-1]).all()
    assert (turned.numpy() == label[:, 69::-1]).all()


def test_unlabelled_image_gets_the_same_pixels():
    image, label = _noise(60, 60)
    view = _drawn(image, 32, (0.5,), True, 1)
    without = augment(image, None, 32, view)
    assert torch.equal(augment(image, label, 32, view)[0], without[0]) and without[1] is None


def _file(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.mark.parametrize(
    ("kind", "mode"),
    [*(("PNG", mode) for mode in ("RGB", "L", "P", "I;16", "1", "LA")), ("JPEG", "RGB"), ("WEBP", "RGB")],
)
def test_rows_that_are_needed_are_decoded_as_ever(kind, mode):
    image, label = _noise(40, 30)
    if mode == "I;16":
        image = PIL.Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    elif mode != "RGB":
        image = image.convert(mode)
    value = _file(image, kind)
    whole = to_rgb(datasets.Image().decode_example(value))
    for rows in (1, 12, 30):
        top = to_rgb(decode(value, lambda width, height, rows=rows: rows))
        assert top.size == (40, 30)
        assert (np.asarray(top)[:rows] == np.asarray(whole)[:rows]).all()
    if kind == "PNG" and mode == "RGB":  # the saving
        assert not np.asarray(decode(value, lambda width, height: 12))[12:].any()


@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 mean nothing
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_a_turned_image_is_decoded_upright_and_whole(kind, orientation):
    image, _ = _noise(40, 30)
    exif = image.getexif()
    exif[0x0112] = orientation
    value = _file(image, kind, exif=exif)
    reference = datasets.Image().decode_example(value)  # turns by PIL.ImageOps
    found = decode(value, lambda width, height: 30 if orientation in (0, 1, 9) else 5)
    assert found.size == reference.size and (np.asarray(found) == np.asarray(reference)).all()
    if orientation not in (0, 9):
        assert found.getexif().get(0x0112, 1) == 1  # not to be turned again
    opened = PIL.Image.open(io.BytesIO(value["bytes"]))  # not loaded yet
    assert (np.asarray(upright(opened)) == np.asarray(reference)).all()


@pytest.mark.parametrize(
    ("tag", "kind", "count", "data"),
    [(0x0128, 5, 1, struct.pack("<II", 2, 1)), (0x0128, 2, 2, b"2\0\0\0"), (0x011A, 2, 3, b"72\0\0")],
    ids=["unit as a ratio", "unit as text", "resolution as text"],
)
def test_an_odd_entry_of_exif_costs_no_image(tag, kind, count, data, tmp_path):
    """Such a one makes `PIL.ImageOps.exif_transpose` raise."""
    entries = [struct.pack("<HHI4s", 0x0112, 3, 1, b"\6\0\0\0")]
    entries.append(struct.pack("<HHI", tag, kind, count) + (data if len(data) == 4 else struct.pack("<I", 38)))
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + b"".join(entries) + bytes(4) + data
    image, _ = _noise(40, 30)
    value = _file(image, "JPEG", exif=exif)
    with pytest.raises((TypeError, struct.error)):
        datasets.Image().decode_example(value)
    turned = np.asarray(decode(_file(image, "JPEG")).transpose(PIL.Image.Transpose.ROTATE_270))
    (tmp_path / "x.jpg").write_bytes(value["bytes"])
    in_place = {"bytes": None, "path": str(tmp_path / "x.jpg")}  # as streams of image folders have it
    for found in (decode(value), decode_row("x", value), decode_row("x", in_place)):
        assert (np.asarray(found) == turned).all()


def test_an_interlaced_png_is_decoded_as_a_whole():
    values = np.random.default_rng(0).integers(0, 256, (16, 16)).astype(np.uint8)
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = b"".join(b"\0" + values[y, x::dx].tobytes() for x, top, dx, dy in passes for y in range(top, 16, dy))
    chunks = {b"IHDR": struct.pack(">IIBBBBB", 16, 16, 8, 0, 0, 0, 1), b"IDAT": zlib.compress(rows), b"IEND": b""}
    png = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks.items():
        png += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    assert (np.asarray(decode({"bytes": png, "path": None}, lambda width, height: 4)) == values).all()


def test_rescale():
    image, _ = _coded(64, 48)
    assert rescale(image, 1.0) is image and rescale(image, 0.001).size == (1, 1)
    assert (np.asarray(rescale(image, 0.5)) == np.asarray(image.resize((32, 24), PIL.Image.Resampling.BILINEAR))).all()


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


def test_label_decoder_with_as_many_classes_as_fit():
    values = np.array([[0, 253, 254, 255]], np.uint8)
    assert (LabelDecoder(255)(PIL.Image.fromarray(values), "a") == values).all()
    with pytest.raises(UserError, match="value 254 is no class"):
        LabelDecoder(254)(PIL.Image.fromarray(values), "a")


def test_label_decoder_names_what_is_wrong():
    with pytest.raises(UserError, match="mask of street/7: value 9 is no class; the data set has 3 classes"):
        LabelDecoder(3)(PIL.Image.new("L", (2, 2), 9), "street/7")
    with pytest.raises(UserError, match="values 3, 4, 5, .* more are no class.* make it anew, as PNG"):
        LabelDecoder(3)(PIL.Image.fromarray(np.arange(40, dtype=np.uint8)[None]), "x")
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
