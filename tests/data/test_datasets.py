import shutil

import numpy as np
import PIL.Image
import pytest
from conftest import ROOT

from mgd.data import shapes
from mgd.data.datasets import CamVid, Folder, Shapes, default_colors
from mgd.data.images import Images
from mgd.errors import UserError

CAMVID = ROOT.parent / "shared" / "camvid"


def _save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.asarray(array, np.uint8)).save(path, **options)


def test_shapes_are_a_function_of_seed_and_index():
    image, label = shapes.draw(0, 3, 64)
    again, same_label = shapes.draw(0, 3, 64)
    assert image.shape == (64, 64, 3) and np.array_equal(image, again) and np.array_equal(label, same_label)
    assert not np.array_equal(image, shapes.draw(1, 3, 64)[0]) and not np.array_equal(image, shapes.draw(0, 4, 64)[0])
    seen = np.unique(np.concatenate([shapes.draw(0, index, 64)[1].ravel() for index in range(40)]))
    assert seen.tolist() == list(range(7)) and len(shapes.CLASSES) == 7


def test_shapes_reader():
    splits = Shapes(name="shapes", num_train=6, num_val=3, size=32).load()
    assert (len(splits.labeled), len(splits.unlabeled), len(splits.val)) == (6, 0, 3)
    image, label = Images(splits.labeled, splits.decoder).read(2, with_label=True)
    drawn_image, drawn_label = shapes.draw(0, 2, 32)
    assert np.array_equal(np.asarray(image), drawn_image) and np.array_equal(label, drawn_label)
    assert not np.array_equal(drawn_image, shapes.draw(0, 1_000_002, 32)[0])


def test_camvid_layout(tmp_path):
    for split, suffix, count in (("train", ".png", 3), ("val", ".jpg", 2)):
        for index in range(count):
            _save(tmp_path / split / f"0001_{index}{suffix}", np.full((6, 8, 3), 90))
            _save(tmp_path / f"{split}annot" / f"0001_{index}.png", np.full((6, 8), 11 if index else 3))
    splits = CamVid(name="camvid", root=str(tmp_path)).load()
    assert (len(splits.labeled), len(splits.val), len(splits.classes)) == (3, 2, 11)
    images = Images(splits.labeled, splits.decoder)
    assert np.unique(images.read(0, True)[1]).tolist() == [3] and np.unique(images.read(1, True)[1]).tolist() == [255]
    (tmp_path / "trainannot" / "0001_1.png").unlink()
    with pytest.raises(UserError, match=r"train/ and trainannot/ differ: 0001_1 in one of them only"):
        CamVid(name="camvid", root=str(tmp_path)).load()


@pytest.mark.skipif(not CAMVID.is_dir(), reason="CamVid is not beside the project")
def test_real_camvid():
    splits = CamVid(name="camvid", root=str(CAMVID)).load()
    assert (len(splits.labeled), len(splits.val)) == (367, 101)
    image, label = Images(splits.val, splits.decoder, image_scale=0.5).read(7, with_label=True)
    assert image.size == (240, 180) and label.shape == (180, 240)
    assert {3, 8} <= set(np.unique(label).tolist()) <= {*range(11), 255}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "mine"
    rng = np.random.default_rng(0)
    for index in range(10):
        size = (20 + index, 30)
        _save(root / "images" / f"street {index}.jpg", rng.integers(0, 255, (*size, 3)))
        if index < 8:
            _save(root / "masks" / f"street {index}.png", rng.integers(0, 2, size))
    PIL.Image.new("CMYK", (12, 9)).save(root / "images" / "press.jpg")
    (root / "unlabeled").mkdir()
    PIL.Image.new("RGBA", (7, 5), (1, 2, 3, 255)).save(root / "unlabeled" / "sketch.png")
    PIL.Image.new("L", (7, 5), 77).save(root / "unlabeled" / "grey.png")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    PIL.Image.new("RGB", (40, 20), "red").save(root / "unlabeled" / "phone.jpg", exif=exif)
    (root / "unlabeled" / "notes.txt").write_text("no image")
    return root


def test_masks_that_are_added_move_no_image_between_training_and_evaluation():
    section = Folder(name="folder", root="mine", classes=("a", "b"), val_share=0.3)
    names = [f"photo {index}" for index in range(400)]
    held_out = set(section.held_out(names))
    assert 90 <= len(held_out) <= 150
    for count in (20, 50, 300):
        assert set(section.held_out(reversed(names[:count]))) == held_out & set(names[:count])
    assert [len(section.held_out(names[:count])) for count in (2, 3)] == [1, 1]
    every = section.model_copy(update={"val_share": 0.999})
    assert len(every.held_out(names[:5])) == 4, "one is left to learn from"


def test_masks_are_resized_with_their_images(folder):
    splits = Folder(name="folder", root=str(folder), classes=("road", "rest")).load()
    for index, name in enumerate(splits.labeled["id"]):
        image, label = Images(splits.labeled, splits.decoder, image_scale=0.5).read(index, with_label=True)
        mask = PIL.Image.open(folder / "masks" / f"{name}.png")
        assert image.size == (round(mask.width / 2), round(mask.height / 2)) and label.dtype == np.uint8
        assert (label == np.asarray(mask.resize(image.size, PIL.Image.Resampling.NEAREST))).all()


def test_folder_of_ones_own(folder):
    section = Folder(name="folder", root=str(folder), classes=("road", "rest"))
    splits = section.load()
    assert (len(splits.labeled), len(splits.val)) == (7, 1)
    assert set(splits.unlabeled["id"]) == {
        "street 8",
        "street 9",
        "press",
        "unlabeled/sketch",
        "unlabeled/grey",
        "unlabeled/phone",
    }
    assert not set(splits.labeled["id"]) & set(splits.val["id"])
    assert section.load().val["id"][:] == splits.val["id"][:]
    images = Images(splits.unlabeled, splits.decoder)
    sizes = {name: images.read(index, False)[0].size for index, name in enumerate(images.ids)}
    assert sizes["unlabeled/phone"] == (20, 40) and sizes["unlabeled/sketch"] == (7, 5)
    assert all(images.read(index, False)[0].mode == "RGB" for index in range(len(images)))


def test_folder_with_colours_and_a_val_folder(folder, tmp_path):
    for index in range(8):
        mask = folder / "masks" / f"street {index}.png"
        values = np.asarray(PIL.Image.open(mask))
        _save(mask, np.array([[9, 9, 9], [200, 0, 0]], np.uint8)[values])
    other = shutil.copytree(folder, tmp_path / "other")
    section = Folder(
        name="folder", root=str(folder), classes=("a", "b"), colors=((9, 9, 9), (200, 0, 0)), val_root=str(other)
    )
    splits = section.load()
    assert (len(splits.labeled), len(splits.val)) == (8, 8) and splits.colors[1] == (200, 0, 0)
    assert set(np.unique(Images(splits.labeled, splits.decoder).read(0, True)[1])) == {0, 1}


def test_folder_whose_masks_count_from_one(folder):
    for path in (folder / "masks").iterdir():
        values = np.asarray(PIL.Image.open(path)) + 1
        values[0] = 0
        _save(path, values)
    section = Folder(
        name="folder", root=str(folder), classes=("a", "b"), colors=((1, 1, 1), (2, 2, 2)), ignore_color=(0, 0, 0)
    )
    splits = section.load()
    assert splits.colors == default_colors(2)  # two greys that no eye tells apart are no colours for a picture
    images = Images(splits.labeled, splits.decoder)
    _, label = images.read(0, True)
    assert (label == np.array([255, 0, 1])[np.asarray(PIL.Image.open(folder / f"masks/{images.ids[0]}.png"))]).all()
    assert set(np.unique(label)) == {0, 1, 255}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "masks" / "lost.png").write_bytes(b""), "masks without an image of the same stem: lost"),
        (
            lambda root: (root / "images" / "street 1.png").write_bytes(b""),
            "street 1.jpg and street 1.png share a stem",
        ),
        (lambda root: [p.unlink() for p in (root / "masks").iterdir()], "no mask files"),
        (lambda root: (root / "images").rename(root / "img"), "images: the folder .*images does not exist"),
    ],
)
def test_folder_that_does_not_fit(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        Folder(name="folder", root=str(folder), classes=("a", "b")).load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ("a", "a")}, "classes: a name comes twice"),
        ({"classes": ("a", " ")}, "classes: a name is empty, or not one line"),
        ({"classes": ("a", "b\n")}, "classes: a name is empty, or not one line"),
        ({"colors": ((0, 0, 0), (0, 0, 0))}, "a colour comes twice"),
        ({"colors": ((0, 0, 0), (1, 1, 1)), "ignore_color": (1, 1, 1)}, "a colour comes twice"),
        ({"ignore_color": (1, 1, 1)}, "ignore_color is for colour-coded masks"),
        ({"colors": ((0, 0, 0),)}, "colors has 1 entries, classes 2"),
    ],
)
def test_settings_that_contradict_themselves(folder, changes, message):
    with pytest.raises(UserError, match=message):
        Folder(**{"name": "folder", "root": str(folder), "classes": ("a", "b"), **changes}).load()
    with pytest.raises(UserError, match="val_root is root"):
        Folder(name="folder", root=str(folder), classes=("a", "b"), val_root=f"{folder}/.").load()


def test_hidden_copies_and_folders_are_no_images(folder):
    _save(folder / "images" / ".ipynb_checkpoints" / "street 0-checkpoint.png", np.zeros((4, 4, 3)))
    (folder / "images" / "folder.png").mkdir()
    ids = Folder(name="folder", root=str(folder), classes=("a", "b")).load().unlabeled["id"][:]
    assert not [name for name in ids if "checkpoint" in name or name == "folder"]


def test_bad_files_are_named(folder):
    splits = Folder(name="folder", root=str(folder), classes=("a", "b")).load()
    images = Images(splits.labeled, splits.decoder)
    name = images.ids[0]
    (folder / "images" / f"{name}.jpg").write_bytes(b"\xff\xd8 cut short")
    with pytest.raises(UserError, match=f"image {name} cannot be read"):
        images.read(0, with_label=False)
    _save(folder / "masks" / f"{images.ids[1]}.png", np.zeros((5, 5)))
    with pytest.raises(UserError, match=f"mask of {images.ids[1]} is 5x5 pixels, its image 30x"):
        images.read(1, with_label=True)


def test_default_colours_are_the_voc_palette():
    assert default_colors(4) == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert default_colors(21)[15] == (192, 128, 128) and default_colors(21)[20] == (0, 64, 128)
