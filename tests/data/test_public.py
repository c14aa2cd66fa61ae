"""VOC and Cityscapes on small trees laid out like the originals; the public lists."""

import numpy as np
import PIL.Image
import pytest
from conftest import ROOT

from mgd.data.datasets import default_colors
from mgd.data.lists import match, public_lists, read_list
from mgd.data.loaders import Images
from mgd.data.partitions import split
from mgd.data.public import CITYSCAPES, VOC, Cityscapes
from mgd.errors import UserError
from mgd.recipe import Partition

LISTS = ROOT.parent / "shared" / "partitions"
needs_lists = pytest.mark.skipif(not LISTS.is_dir(), reason="the public partition lists are not beside the project")


def _palette(values, path):
    image = PIL.Image.fromarray(values).convert("P")
    image.putdata(values.flatten().tolist())
    palette = [channel for color in default_colors(21) for channel in color] + [0] * (3 * (255 - 21)) + [224, 224, 192]
    image.putpalette(palette)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOC2012"
    values = np.array([[0, 15], [255, 20]], np.uint8)
    for name in ("2007_000032", "2007_000039", "2008_000001", "2007_000033"):
        (root / "JPEGImages").mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (2, 2)).save(root / "JPEGImages" / f"{name}.jpg")
    _palette(values, root / "SegmentationClass" / "2007_000032.png")
    _palette(values, root / "SegmentationClass" / "2007_000033.png")
    (root / "SegmentationClassAug").mkdir()
    for name in ("2007_000032", "2007_000039", "2007_000033"):
        PIL.Image.fromarray(values).save(root / "SegmentationClassAug" / f"{name}.png")
    rgb = np.array([[[0, 0, 0], [192, 128, 128]], [[224, 224, 192], [0, 64, 128]]], np.uint8)
    PIL.Image.fromarray(rgb).save(root / "SegmentationClassAug" / "2008_000001.png")
    sets = root / "ImageSets" / "Segmentation"
    sets.mkdir(parents=True)
    (sets / "train.txt").write_bytes(b"2007_000032\r\n")
    (sets / "val.txt").write_text("2007_000033")
    return root


def test_voc_reads_palette_index_and_colour_masks(voc):
    splits = VOC(name="voc", root=str(voc)).load()
    assert splits.labeled["id"][:] == ["2007_000032", "2007_000039", "2008_000001"]
    assert splits.val["id"][:] == ["2007_000033"] and len(splits.classes) == 21
    for source in (splits.labeled, splits.val):
        images = Images(source, splits.decoder)
        for index in range(len(images)):
            assert images.read(index, True)[1].tolist() == [[0, 15], [255, 20]]
    official = VOC(name="voc", root=str(voc), masks="SegmentationClass").load()
    assert official.labeled["id"][:] == ["2007_000032"]


def test_voc_with_a_missing_image(voc):
    (voc / "JPEGImages" / "2007_000039.jpg").unlink()
    with pytest.raises(UserError, match="1 of 3 have no image: 2007_000039"):
        VOC(name="voc", root=str(voc)).load()


@pytest.fixture
def city(tmp_path):
    root = tmp_path / "cityscapes"
    for split_name, town, number in (("train", "jena", 1), ("train", "ulm", 2), ("val", "lindau", 3)):
        name = f"{town}_00000{number}_000019"
        images, masks = root / "leftImg8bit" / split_name / town, root / "gtFine" / split_name / town
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        PIL.Image.new("RGB", (4, 2)).save(images / f"{name}_leftImg8bit.png")
        ids = np.array([[7, 8, 0, 33], [26, 29, 4, 7]], np.uint8)
        train_ids = np.array([[0, 1, 255, 18], [13, 255, 255, 0]], np.uint8)
        PIL.Image.fromarray(ids).save(masks / f"{name}_gtFine_labelIds.png")
        PIL.Image.fromarray(train_ids).save(masks / f"{name}_gtFine_labelTrainIds.png")
        PIL.Image.new("RGBA", (4, 2)).save(masks / f"{name}_gtFine_color.png")
    return root


@pytest.mark.parametrize("label_ids", ["labelIds", "labelTrainIds"])
def test_cityscapes_maps_to_the_19_train_ids(city, label_ids):
    splits = Cityscapes(name="cityscapes", root=str(city), label_ids=label_ids).load()
    assert splits.labeled["id"][:] == ["jena_000001_000019", "ulm_000002_000019"] and len(splits.val) == 1
    label = Images(splits.val, splits.decoder).read(0, True)[1]
    assert label.tolist() == [[0, 1, 255, 18], [13, 255, 255, 0]]
    assert splits.classes[13] == "car" and splits.colors[18] == (119, 11, 32) and len(CITYSCAPES) == 19


def test_parquet_with_columns_of_ones_own(voc, tmp_path):
    source = VOC(name="voc", root=str(voc)).load()
    for name, rows in (("train", source.labeled), ("val", source.val)):
        embedded = rows.map(lambda row: row, features=rows.features)
        embedded = embedded.rename_columns({"image": "picture", "label": "mask", "id": "file"})
        (tmp_path / "pq").mkdir(exist_ok=True)
        table = embedded.with_format("arrow")[:]
        import datasets.table
        import pyarrow.parquet

        pyarrow.parquet.write_table(datasets.table.embed_table_storage(table), tmp_path / "pq" / f"{name}-0.parquet")
    section = VOC(
        name="voc", parquet=str(tmp_path / "pq"), id_column="file", image_column="picture", label_column="mask"
    )
    splits = section.load()
    assert splits.labeled["id"][:] == source.labeled["id"][:]
    assert Images(splits.labeled, splits.decoder).read(0, True)[1].tolist() == [[0, 15], [255, 20]]
    with pytest.raises(UserError, match="no column 'id'; it has file, picture, mask"):
        VOC(name="voc", parquet=str(tmp_path / "pq")).load()


def test_one_source_of_data():
    with pytest.raises(ValueError, match="give one of root"):
        VOC(name="voc", root="a", hub="b/c")


def test_lists_of_ones_own(tmp_path):
    (tmp_path / "l.txt").write_bytes(b"\xef\xbb\xbf/some/where/a.png\t/masks/a.png\r\n\r\nb")
    (tmp_path / "u.txt").write_text("c\nsub/d\n")
    assert read_list(tmp_path / "l.txt") == ["/some/where/a.png", "b"]
    section = Partition(protocol="files", labeled_list=str(tmp_path / "l.txt"), unlabeled_list=str(tmp_path / "u.txt"))
    assert split(section, ["a", "b", "c"], ["sub/d", "e"], 0).unlabeled == ("c", "sub/d")
    with pytest.raises(UserError, match="l.txt .labelled.: 1 of 2 entries are no image of .data.: b"):
        split(section, ["a", "c"], ["sub/d"], 0)
    with pytest.raises(UserError, match="x: names a twice"):
        match(["a", "q/a.png"], ["a"], "x")
    (tmp_path / "u.txt").write_text("a")
    with pytest.raises(UserError, match="a stands in both lists"):
        split(section, ["a", "b"], [], 0)


@needs_lists
@pytest.mark.parametrize(
    ("data", "protocol", "counts", "whole"),
    [
        ("voc", "cps", (662, 1323, 2646, 5291), "train_aug.txt"),
        ("voc", "pseudoseg", (92, 183, 366, 732), "train.txt"),
        ("cityscapes", "cps", (186, 372, 744, 1488), "train.txt"),
    ],
)
def test_public_lists(data, protocol, counts, whole):
    everything = {entry.rpartition("/")[2].removesuffix(".png") for entry in read_list(LISTS / data / whole)}
    val = {entry.rpartition("/")[2].removesuffix(".png") for entry in read_list(LISTS / data / "val.txt")}
    for share, count in zip(("1/16", "1/8", "1/4", "1/2"), counts, strict=True):
        section = Partition(protocol=protocol, labeled=share, root=str(LISTS))
        done = split(section, sorted(everything), [], 0, data_name=data)
        assert len(done.labeled) == count
        assert set(done.labeled) | set(done.unlabeled) == everything
        assert not set(done.labeled) & set(done.unlabeled) and not everything & val
        assert len(done.unlabeled) == len(everything) - count


@needs_lists
def test_a_list_that_does_not_fit_the_data():
    section = Partition(protocol="cps", labeled="1/8", root=str(LISTS))
    with pytest.raises(UserError, match=r"the cps list 1/8 \(labelled\): 1323 of 1323 entries are no image"):
        split(section, ["2099_000001"], [], 0, data_name="voc")


def test_lists_that_cannot_be_had(tmp_path, monkeypatch):
    section = Partition(protocol="pseudoseg", labeled="1/8")
    with pytest.raises(UserError, match="no public list for .data. 'cityscapes'; there is for voc"):
        public_lists(section, "cityscapes")
    (tmp_path / "train_aug_labeled_1-8.txt").write_text("2007_000032\n")
    with pytest.raises(UserError, match="not the published list"):
        public_lists(Partition(protocol="cps", labeled="1/8", root=str(tmp_path)), "voc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def offline(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("pooch.retrieve", offline)
    with pytest.raises(UserError, match=r"no route to host\); fetch it by hand and name its folder in \[partition\]"):
        public_lists(Partition(protocol="cps", labeled="1/8"), "voc")
    with pytest.raises(ValueError, match="labeled = 0.5 has no public list; choices: 1/16, 1/8"):
        Partition(protocol="cps", labeled=0.5)
