import io

import numpy as np
import PIL.Image
import pytest
import torch

from mgd.data.datasets import Shapes, table
from mgd.data.images import Images
from mgd.data.loaders import StepSampler, TrainingPairs, evaluation_loader, per_process, training_loader
from mgd.data.transforms import LabelDecoder
from mgd.errors import UserError


@pytest.fixture(scope="module")
def section():
    return Shapes(name="shapes", num_train=10, num_val=5, size=32, crop=32)


@pytest.fixture(scope="module")
def pairs(section):
    splits = section.load()
    labeled = Images(splits.labeled.select(range(3)), splits.decoder)
    unlabeled = Images(splits.labeled.select(range(3, 10)), splits.decoder)
    return TrainingPairs(labeled, unlabeled, section, seed=0)


def _run(pairs, start, stop, batch_size=4, world_size=1, workers=0):
    loaders = [
        training_loader(pairs, StepSampler(start, stop, batch_size, rank, world_size), workers, False)
        for rank in range(world_size)
    ]
    return [
        {
            key: torch.cat([part[key] for part in parts])
            if torch.is_tensor(parts[0][key])
            else sum([list(part[key]) for part in parts], [])
            for key in parts[0]
        }
        for parts in zip(*loaders, strict=True)
    ]


def _equal(first, second):
    return all(
        torch.equal(first[key], second[key]) if torch.is_tensor(first[key]) else list(first[key]) == list(second[key])
        for key in first
    )


def test_shapes_of_a_batch(pairs):
    (batch,) = _run(pairs, 0, 1)
    assert batch["image"].shape == batch["unlabeled"].shape == batch["mix"].shape == (4, 3, 32, 32)
    assert batch["image"].dtype == torch.uint8 and batch["label"].shape == (4, 32, 32)
    assert batch["mask"].shape == (4, 1, 32, 32) and batch["mask"].dtype == torch.bool


def test_each_pass_sees_every_image_once_in_a_new_order(pairs):
    batches = _run(pairs, 0, 21, batch_size=1)
    labeled = [batch["id"][0] for batch in batches]
    unlabeled = [batch["unlabeled_id"][0] for batch in batches]
    assert [len(set(labeled[i : i + 3])) for i in range(0, 21, 3)] == [3] * 7
    assert [len(set(unlabeled[i : i + 7])) for i in range(0, 21, 7)] == [7] * 3
    assert unlabeled[:7] != unlabeled[7:14] and unlabeled[:7] != [batch["mix_id"][0] for batch in batches[:7]]


def test_two_processes_see_what_one_sees(pairs):
    for one, two in zip(_run(pairs, 0, 5), _run(pairs, 0, 5, world_size=2), strict=True):
        assert _equal(one, two)


def test_rows_that_no_crop_shows_are_not_looked_at(section):
    """Black, as undecoded rows are, is no colour of this mask."""
    values = np.random.default_rng(0).integers(0, 2, (90, 40))
    files = []
    for colors in ([[9, 9, 9], [200, 0, 0]], [[1, 2, 3], [200, 100, 50]]):
        buffer = io.BytesIO()
        PIL.Image.fromarray(np.array(colors, np.uint8)[values]).save(buffer, "PNG")
        files.append([{"bytes": buffer.getvalue(), "path": None}])
    decoder = LabelDecoder(2, colors=((1, 2, 3), (200, 100, 50)))
    images = Images(table(["a"], *files), decoder)
    pairs = TrainingPairs(images, None, section.model_copy(update={"scales": (1.0,)}), seed=0)
    for position in range(20):
        sample = pairs[position]
        assert torch.equal(sample["label"], (sample["image"][0] == 200).long())


def test_a_later_start_continues_exactly(pairs):
    whole, rest = _run(pairs, 0, 6), _run(pairs, 4, 6, workers=1)
    assert _equal(whole[4], rest[0]) and _equal(whole[5], rest[1])


def test_another_seed_is_another_run(pairs, section):
    other = TrainingPairs(pairs.labeled, pairs.unlabeled, section, seed=1)
    assert not _equal(_run(pairs, 0, 1)[0], _run(other, 0, 1)[0])


def test_without_unlabelled_images(pairs, section):
    (batch,) = _run(TrainingPairs(pairs.labeled, None, section, seed=0), 0, 1)
    assert set(batch) == {"id", "image", "label"}
    assert torch.equal(batch["image"], _run(pairs, 0, 1)[0]["image"])


def test_evaluation_shares_are_disjoint_and_complete(section):
    splits = section.load()
    images = Images(splits.val, splits.decoder)
    names = [name for rank in range(2) for items in evaluation_loader(images, 2, 0, rank, 2) for name, _, _ in items]
    assert sorted(names) == sorted(splits.val["id"]) and len(names) == 5


def test_a_batch_that_does_not_divide_says_what_would():
    assert per_process(8, 4) == 2
    with pytest.raises(UserError, match="batch_size = 8 does not divide over 3 processes; use 6 or 9, or 1, 2, 4, 8"):
        per_process(8, 3)
