import itertools

import numpy as np
import pytest
import torch
from conftest import greedy, worth

from mgd.errors import UserError
from mgd.selection import CANDIDATES_PER_PICK, cover, disagreement, most_uncertain


@pytest.mark.parametrize("labeled", [0, 3])
@pytest.mark.parametrize("seed", range(5))
def test_each_pick_adds_the_most(seed, labeled):
    random = np.random.default_rng(seed)
    vectors, known = random.normal(size=(25, 4)), list(random.normal(size=(labeled, 4)))
    chosen = greedy(vectors, 8, known)
    found = cover(torch.from_numpy(vectors), 8, torch.from_numpy(np.array(known).reshape(-1, 4)))
    assert found == chosen
    assert cover(torch.from_numpy(vectors), 5, torch.from_numpy(np.array(known).reshape(-1, 4))) == chosen[:5]


def test_near_the_best_of_all_choices():
    vectors = np.random.default_rng(7).normal(size=(12, 3))
    best = max(worth(vectors, list(vectors[list(some)])) for some in itertools.combinations(range(12), 3))
    reached = worth(vectors, list(vectors[cover(torch.from_numpy(vectors), 3)]))
    assert reached + 12 >= (1 - 1 / np.e) * (best + 12)  # counted from the empty choice, which is worth -1 an image


def test_one_of_each_group_and_no_outlier_first():
    groups = [torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])]
    noise = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)) * 0.05
    features = torch.stack([groups[index % 3] for index in range(30)]) + noise
    features = torch.cat([features, torch.tensor([[-1.0, -1.0, -1.0]])])
    assert {index % 3 for index in cover(features, 3)} == {0, 1, 2} and 30 not in cover(features, 3)
    # What is labelled already needs no second one.
    assert {index % 3 for index in cover(features, 2, features[:1])} == {1, 2}
    assert cover(features * 100, 5) == cover(features, 5)


def test_duplicates_and_the_ends_of_the_budget():
    features = torch.eye(3).repeat_interleave(4, dim=0)
    first = cover(features, 3)
    assert first == [0, 4, 8] == cover(features, 3)
    assert sorted(cover(features, 12)) == list(range(12)) and cover(features, 0) == []
    assert cover(torch.zeros(3, 2), 2) == [0, 1]
    with pytest.raises(UserError, match="13 images cannot be chosen among 12"):
        cover(features, 13)


def test_many_blocks_are_one():
    features = torch.randn(2500, 8, generator=torch.Generator().manual_seed(1))
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    similarity, best, expected = unit @ unit.T, torch.full((2500,), -1.0, dtype=torch.float64), []
    for _ in range(6):
        expected.append(int((similarity - best[:, None]).clamp(min=0).sum(dim=0).argmax()))
        best = torch.maximum(best, similarity[:, expected[-1]])
    assert cover(features, 6) == expected


def test_disagreement_by_hand():
    first = torch.tensor([[0, 1], [2, 2]])
    assert disagreement(first, first) == 0
    assert disagreement(first, torch.tensor([[0, 1], [0, 1]])) == 0.5
    large = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 2], [2, 2, 2, 2]])
    assert disagreement(large, first) == 0 and disagreement(first, large) == 0


def test_the_highest_scores_come_several_for_each_that_is_wanted():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.5, 0.5, 0.7, 0.2])
    assert CANDIDATES_PER_PICK == 4
    assert most_uncertain(scores, 1) == [1, 2, 3, 5]  # of three equals the first two
    assert most_uncertain(scores, 5) == list(range(7))
