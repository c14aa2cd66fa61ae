"""Each loss against hand-worked values and against a plain, slow float64 restatement of its equation."""

import itertools
import math

import pytest
import torch

from mgd.losses import mgd

torch.manual_seed(0)


def test_pixel_level_by_hand():
    student = torch.zeros(1, 2, 1, 1)  # 1:1, so log 2 against any hard label
    means, totals = mgd.pixel_level(student, [torch.tensor([[[0]]]), torch.tensor([[[1]]])])
    assert means.tolist() == pytest.approx([math.log(2)] * 2) and totals.tolist() == [1, 1]
    nothing = [torch.full((1, 1, 1), 255)]
    assert [part.tolist() for part in mgd.pixel_level(student, nothing)] == [[0], [0]]


def test_pixel_level_equation_2():
    student, *teachers = torch.randn(3, 2, 4, 3, 5, dtype=torch.float64)
    expected = 0.0
    for teacher in teachers:
        for b in range(2):
            for y in range(3):
                for x in range(5):
                    hard = teacher[b, :, y, x].argmax()
                    expected -= student[b, :, y, x].log_softmax(0)[hard].item() / (2 * 3 * 5)
    means, totals = mgd.pixel_level(student, [teacher.argmax(1) for teacher in teachers])
    assert means.sum().item() == pytest.approx(expected, rel=1e-12) and totals.tolist() == [2 * 3 * 5] * 2


def test_pixel_level_of_probabilities_by_hand_and_plainly():
    student = torch.tensor([math.log(3.0), 0.0]).view(1, 2, 1, 1)  # probabilities 3/4, 1/4
    teacher = torch.tensor([0.5, 0.5]).view(1, 2, 1, 1)
    expected = 0.5 * math.log(4 / 3) + 0.5 * math.log(4)
    assert mgd.pixel_level(student, [teacher])[0].item() == pytest.approx(expected)
    student, *teachers = torch.randn(3, 2, 4, 3, 5, dtype=torch.float64)
    probabilities = [teacher.softmax(dim=1) for teacher in teachers]
    expected = 0.0
    for target in probabilities:
        for b, y, x in itertools.product(range(2), range(3), range(5)):
            expected -= (target[b, :, y, x] * student[b, :, y, x].log_softmax(0)).sum().item() / (2 * 3 * 5)
    means, totals = mgd.pixel_level(student, probabilities)
    assert means.sum().item() == pytest.approx(expected, rel=1e-12)
    assert totals.tolist() == pytest.approx([2 * 3 * 5] * 2)
    halved = [torch.cat([target[..., :3], target[..., 3:] * 0.5], dim=-1) for target in probabilities]
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    for target, value in zip(halved, mgd.pixel_level(student, halved)[0], strict=True):
        wanted = -(target * student.log_softmax(1)).sum().item() / (2 * 3 * 3 + 2 * 3 * 2 * 0.5)
        assert value.item() == pytest.approx(wanted, rel=1e-12)
    for target, value in zip(halved, mgd.pixel_level(student, halved, weights)[0], strict=True):
        weighted = target * weights.view(4, 1, 1)
        wanted = -(weighted * student.log_softmax(1)).sum().item() / weighted.sum().item()
        assert value.item() == pytest.approx(wanted, rel=1e-12)
    assert [part.item() for part in mgd.pixel_level(student, [torch.zeros_like(student)])] == [0, 0]
    labels = [teacher.argmax(1) for teacher in teachers]
    hard = [torch.nn.functional.one_hot(label, 4).permute(0, 3, 1, 2).double() for label in labels]
    for given in (None, weights):
        found, same = mgd.pixel_level(student, hard, given), mgd.pixel_level(student, labels, given)
        assert all(first.tolist() == pytest.approx(second.tolist()) for first, second in zip(found, same, strict=True))


def test_image_level_by_hand():
    student = torch.tensor([[1.0, 3.0], [0.0, 0.0]]).view(1, 2, 1, 2)  # class means 2, 0
    teacher = torch.tensor([[0.0, 0.0], [5.0, 1.0]]).view(1, 2, 1, 2)  # class means 0, 3
    assert mgd.image_level(student, teacher, "mean").item() == pytest.approx((2 + 3) / 2)
    assert mgd.image_level(student, teacher, "sum").item() == pytest.approx(5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_image_level_equations_3_4(reduction):
    student, teacher = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    terms = [
        abs(sum(student[b, k].flatten().tolist()) - sum(teacher[b, k].flatten().tolist())) / 30
        for b in range(3)
        for k in range(4)
    ]
    expected = sum(terms) / (len(terms) if reduction == "mean" else 1)
    assert mgd.image_level(student, teacher, reduction).item() == pytest.approx(expected, rel=1e-12)


def test_image_level_refuses_other_reductions():
    with pytest.raises(ValueError, match="reduction = 'max'; choices: mean, sum"):
        mgd.image_level(torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1), "max")


def test_self_correlation_by_hand():
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).view(1, 2, 1, 2)  # vectors (1, 0) and (0, 2)
    features = features.expand(1, 2, 2, 2)
    expected = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]])
    assert torch.allclose(mgd.self_correlation(features, grid=2)[0], expected)


@pytest.mark.parametrize("grid", [3, 7])
def test_region_level_equations_5_6(grid):
    student = torch.randn(2, 6, 14, 14).double()
    teacher = torch.randn(2, 9, 21, 17).double()

    def correlation(features):
        height, width = features.shape[-2:]
        vectors = []
        for i in range(grid):
            for j in range(grid):
                rows = slice(i * height // grid, math.ceil((i + 1) * height / grid))
                columns = slice(j * width // grid, math.ceil((j + 1) * width / grid))
                vectors.append(features[:, rows, columns].mean(dim=(1, 2)))
        return [[(a @ b / a.norm() / b.norm()).item() for b in vectors] for a in vectors]

    total = 0.0
    for b in range(2):
        first, second = correlation(student[b]), correlation(teacher[b])
        total += sum((first[i][j] - second[i][j]) ** 2 for i in range(grid**2) for j in range(grid**2)) / grid**4
    assert mgd.region_level(student, teacher, grid).item() == pytest.approx(total / 2, rel=1e-10)


def test_no_gradient_into_the_teacher_and_a_right_one_into_the_student():
    student = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    total = (
        mgd.pixel_level(student, [teacher.softmax(1)])[0].sum()
        + mgd.image_level(student, teacher, "sum")
        + mgd.region_level(student, teacher, grid=2)
    )
    total.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    fixed = teacher.detach()
    assert torch.autograd.gradcheck(lambda x: mgd.image_level(x, fixed, "mean"), student)
    assert torch.autograd.gradcheck(lambda x: mgd.region_level(x, fixed, grid=2), student)
    assert torch.autograd.gradcheck(lambda x: mgd.pixel_level(x, [fixed.argmax(1)])[0].sum(), student)
    assert torch.autograd.gradcheck(lambda x: mgd.pixel_level(x, [fixed.softmax(1)])[0].sum(), student)
