import hashlib

import numpy as np
import pytest

from mgd.data.partitions import read_manifest, split
from mgd.errors import UserError
from mgd.sections import Partition

IDS = [f"image-{index:03d}" for index in range(100)]


def test_disjoint_complete_and_seeded():
    first = split(Partition(labeled="1/8"), IDS, ["extra"], seed=0)
    assert len(first.labeled) == 12 and len(first.unlabeled) == 89 and "extra" in first.unlabeled
    assert not set(first.labeled) & set(first.unlabeled)
    assert set(first.labeled) | set(first.unlabeled) == {*IDS, "extra"}
    assert first == split(Partition(labeled=0.12), list(reversed(IDS)), ["extra"], seed=0)
    assert first.labeled != split(Partition(labeled=12), IDS, [], seed=1).labeled


def test_the_same_on_every_machine():
    # The three smallest of `printf "0:image-NNN" | sha256sum`, by coreutils.
    assert split(Partition(labeled=3), IDS, [], seed=0).labeled == ("image-037", "image-044", "image-080")


def test_a_larger_share_contains_the_smaller():
    small, large = (set(split(Partition(labeled=n), IDS, [], seed=4).labeled) for n in (5, 20))
    assert small < large


def test_balanced_choice_sees_the_rare_class():
    presence = {name: np.array([True, index % 2 == 0, index == 57]) for index, name in enumerate(IDS)}
    chosen = split(Partition(labeled=4, balanced=True), IDS, [], seed=0, presence=presence).labeled
    assert "image-057" in chosen
    assert sum(presence[name][1] for name in chosen) >= 1


def test_balanced_choice_takes_the_first_drawn_image_of_the_class_seen_least():
    rng = np.random.default_rng(0)
    presence = {name: rng.random(6) < 0.3 * np.array([3, 1, 1, 0.3, 0.1, 0.0]) for name in IDS}
    for wanted in (1, 7, 40, 99):
        left = sorted(IDS, key=lambda name: hashlib.sha256(f"5:{name}".encode()).digest())
        expected = []
        while len(expected) < wanted:
            seen = [sum(bool(presence[name][index]) for name in expected) for index in range(6)]
            shown = [index for index in range(6) if any(presence[name][index] for name in left)]
            rarest = min(shown, key=lambda index: seen[index]) if shown else None
            pick = next(name for name in left if rarest is None or presence[name][rarest])
            left.remove(pick)
            expected.append(pick)
        found = split(Partition(labeled=wanted, balanced=True), IDS, [], seed=5, presence=presence).labeled
        assert found == tuple(sorted(expected))


def test_more_than_there_are():
    with pytest.raises(UserError, match=r"labeled = 101: the training set has only 100 images with a mask"):
        split(Partition(labeled=101), IDS, [], seed=0)
    with pytest.raises(UserError, match="no training image has a mask"):
        split(Partition(labeled=1), [], IDS, seed=0)


def test_manifest_states_both_counts():
    section = Partition(labeled="1/4")
    manifest = split(section, IDS, [], seed=0).manifest(section, 0)
    assert (manifest["num_labeled"], manifest["num_unlabeled"]) == (25, 75)
    assert len(manifest["labeled"]) == 25 and manifest["labeled_wanted"] == "1/4"


def test_lists_that_name_validation_images(tmp_path):
    (tmp_path / "labeled.txt").write_text("images/val-1.png\nimage-001\n")
    (tmp_path / "unlabeled.txt").write_text("image-002\n")
    section = Partition(
        protocol="files", labeled_list=str(tmp_path / "labeled.txt"), unlabeled_list=str(tmp_path / "unlabeled.txt")
    )
    with pytest.raises(UserError, match=r"1 of 2 entries are validation images: val-1; take them off the list"):
        split(section, IDS, [], seed=0, held_out=["val-0", "val-1"])
    with pytest.raises(UserError, match="1 of 2 entries are no training image"):
        split(section, IDS, [], seed=0)


@pytest.mark.parametrize(
    "text", ['{"labeled": 5, "unlabeled": []}', '{"labeled": [["a"]], "unlabeled": []}', '{"labeled": []}', "[]"]
)
def test_a_damaged_manifest_is_one_line(tmp_path, text):
    path = tmp_path / "partition.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"partition.json is damaged: .*delete it, or start over with --restart"):
        read_manifest(path)


def test_a_balanced_choice_is_refused_where_lists_choose():
    with pytest.raises(ValueError, match="balanced is a way to draw"):
        Partition(protocol="cps", labeled="1/8", balanced=True)
