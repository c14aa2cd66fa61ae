"""VOC and Cityscapes on small trees laid out like the originals; the public lists."""

import unicodedata

import numpy as np
import PIL.Image
import pytest
from conftest import ROOT

from mgd.data.datasets import default_colors
from mgd.data.images import Images
from mgd.data.lists import match, public_lists, read_list, write_list
from mgd.data.partitions import split
from mgd.data.public import CITYSCAPES, VOC, Cityscapes
from mgd.data.reading import read_splits
from mgd.errors import UserError
from mgd.recipe import load
from mgd.sections import Partition

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
        coarse = values * 0 if name == "2007_000033" else values  # val is scored on the official mask
        PIL.Image.fromarray(coarse).save(root / "SegmentationClassAug" / f"{name}.png")
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
        (folder := tmp_path / "voc[1]").mkdir(exist_ok=True)
        table = embedded.with_format("arrow")[:]
        import datasets.table
        import pyarrow.parquet

        pyarrow.parquet.write_table(datasets.table.embed_table_storage(table), folder / f"{name}-0.parquet")
    section = VOC(name="voc", parquet=str(folder), id_column="file", image_column="picture", label_column="mask")
    splits = section.load()
    assert splits.labeled["id"][:] == source.labeled["id"][:]
    assert Images(splits.labeled, splits.decoder).read(0, True)[1].tolist() == [[0, 15], [255, 20]]
    with pytest.raises(UserError, match="no column 'id'; it has file, picture, mask"):
        VOC(name="voc", parquet=str(folder)).load()


def test_tables_that_do_not_fit_are_one_line(voc, tmp_path):
    import datasets

    def load(**columns):
        for name in ("train", "val"):
            datasets.Dataset.from_dict(columns).to_parquet(tmp_path / f"{name}.parquet")
        return read_splits(VOC(name="voc", parquet=str(tmp_path)))

    image = {"bytes": (voc / "JPEGImages" / "2007_000032.jpg").read_bytes(), "path": None}
    with pytest.raises(UserError, match="id must be text, image and label images; they are .*label Value"):
        load(id=["a", "b"], image=[image, image], label=[1, 2])
    with pytest.raises(UserError, match="name = 'voc': ids must be unique, .* training images several are called a$"):
        load(id=["a", "a"], image=[image, image], label=[image, image])
    splits = load(id=["a", "b"], image=[image, image], label=[image, None])
    with pytest.raises(UserError, match="image b cannot be read: the table holds no image or no mask"):
        Images(splits.labeled, splits.decoder).read(1, True)
    empty = load(id=["a", "b"], image=[image, {"bytes": None, "path": None}], label=[image, image])
    with pytest.raises(UserError, match="image b cannot be read: the table holds no image$"):
        Images(empty.labeled, empty.decoder).read(1, True)


def test_a_hub_data_set_takes_the_place_of_root(voc, monkeypatch):
    import datasets

    source = VOC(name="voc", root=str(voc)).load()
    asked = []

    def load_dataset(name, **options):
        asked.append((name, options))
        return datasets.DatasetDict({"train": source.labeled, "validation": source.val})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    recipe = load(ROOT / "recipes" / "voc_r18_1-8.toml", ["data.hub=org/voc"])
    assert recipe.reference.miou == 68.29
    splits = recipe.data.load()
    assert asked == [("org/voc", {})] and splits.val["id"][:] == ["2007_000033"]
    assert splits.labeled["id"][:] == source.labeled["id"][:]


def test_one_source_of_data():
    with pytest.raises(ValueError, match="give root"):
        VOC(name="voc", parquet="a", hub="b/c")
    with pytest.raises(ValueError, match="give root"):
        VOC(name="voc")


def test_lists_name_images_by_id_or_path():
    ids = ["ulm_000002_000019", "sub/d", "unlabeled/x", "x", "a.b"]
    entries = ["leftImg8bit/train/ulm/ulm_000002_000019_leftImg8bit.png", "/data/sub/d.png", "unlabeled/x.jpg", "a.b"]
    assert match(entries, ids, "list") == ["ulm_000002_000019", "sub/d", "unlabeled/x", "a.b"]
    assert match(["images/x.png"], ids, "list") == ["x"]
    with pytest.raises(UserError, match="1 of 1 entries are no training image of .*: x.3"):
        match(["x.3"], ids, "list")  # an id with a dot, which is not here


def test_a_list_is_fetched_by_url_and_checked(tmp_path, monkeypatch):
    """From a server on loopback that serves the right bytes once and others after."""
    import hashlib
    import http.server
    import threading

    from mgd.data import lists

    answers = [b"2007_000032\n", b"2007_000039\n", b"something else\n"]
    paths = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers.pop(0))

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = [f"voc/train_aug_{kind}_1-8.txt" for kind in ("labeled", "unlabeled")]
    sums = {name: hashlib.sha256(text).hexdigest() for name, text in zip(names, answers[:2], strict=True)}
    monkeypatch.setattr(lists, "_SHA256", sums)
    monkeypatch.setattr(lists, "_BASE", f"http://127.0.0.1:{server.server_port}")
    section = Partition(protocol="cps", labeled="1/8")
    for cache in ("one", "two"):
        monkeypatch.setattr("pooch.os_cache", lambda _, cache=cache: tmp_path / cache)
        if cache == "one":
            assert public_lists(section, "voc") == (["2007_000032"], ["2007_000039"])
            assert public_lists(section, "voc") == (["2007_000032"], ["2007_000039"])  # from the cache
        else:
            with pytest.raises(UserError, match="SHA256 hash of downloaded file .* does not match"):
                public_lists(section, "voc")
    server.shutdown()
    assert paths[:2] == [f"/pascal_voc/subset_train_aug/{name[4:]}" for name in names] and len(paths) == 3


def test_lists_of_ones_own(tmp_path):
    (tmp_path / "l.txt").write_bytes(b"\xef\xbb\xbf/some/where/a.png\t/masks/a.png\r\n\r\nb")
    (tmp_path / "u.txt").write_text("c\nsub/d\n")
    assert read_list(tmp_path / "l.txt") == ["/some/where/a.png", "b"]
    section = Partition(protocol="files", labeled_list=str(tmp_path / "l.txt"), unlabeled_list=str(tmp_path / "u.txt"))
    assert split(section, ["a", "b", "c"], ["sub/d", "e"], 0).unlabeled == ("c", "sub/d")
    with pytest.raises(UserError, match="l.txt .labelled.: 1 of 2 entries are no training image of .data.: b"):
        split(section, ["a", "c"], ["sub/d"], 0)
    with pytest.raises(UserError, match="l.txt .labelled.: 1 of 2 images have no mask: b"):
        split(section, ["a", "c"], ["sub/d", "b"], 0)
    with pytest.raises(UserError, match="x: names a twice"):
        match(["a", "q/a.png"], ["a"], "x")
    decomposed = unicodedata.normalize("NFD", "sub/feuillé")  # as a Mac lists its files
    for known in ("sub/feuillé", decomposed):  # of a folder, and as another data set may have it
        assert match([f"/x/{decomposed}.png"], ["sub/rest", known], "x") == [known]
    (tmp_path / "u.txt").write_text("a")
    with pytest.raises(UserError, match="a stands in both lists"):
        split(section, ["a", "b"], [], 0)


def test_a_written_list_reads_as_its_ids(tmp_path):
    ids = ["a", "sub/b c", "unlabeled/ü.v2"]
    write_list(tmp_path / "l.txt", ids)
    assert read_list(tmp_path / "l.txt") == ids
    for odd in ("a\tb", "a\nb", " a", "a\u2028b"):
        with pytest.raises(UserError, match="cannot stand on a line of a list; rename the image"):
            write_list(tmp_path / "odd.txt", ["a", odd])
    assert not (tmp_path / "odd.txt").exists()


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
    with pytest.raises(UserError, match=r"the cps list 1/8 \(labelled\): 1323 of 1323 entries are no training image"):
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
