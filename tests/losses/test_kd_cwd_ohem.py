"""KD, CWD and OHEM against hand-worked values and float64 restatements."""

import math

import pytest
import torch

from mgd.losses.cwd import channel_wise
from mgd.losses.kd import pixel_kl
from mgd.losses.supervised import cross_entropy, ohem_cross_entropy

torch.manual_seed(0)


def test_pixel_kl_by_hand():
    student, teacher = torch.zeros(1, 2, 1, 1), torch.tensor([math.log(3), 0.0]).view(1, 2, 1, 1)  # 1:1 and 3:1
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert pixel_kl(student, teacher).item() == pytest.approx(expected)
    assert pixel_kl(student, 2 * teacher, temperature=2.0).item() == pytest.approx(4 * expected)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_pixel_kl_restated(temperature):
    student, teacher = torch.randn(2, 2, 5, 3, 4, dtype=torch.float64)
    total = 0.0
    for b in range(2):
        for y in range(3):
            for x in range(4):
                p = [math.exp(v / temperature) for v in teacher[b, :, y, x].tolist()]
                q = [math.exp(v / temperature) for v in student[b, :, y, x].tolist()]
                p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
                total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert pixel_kl(student, teacher, temperature).item() == pytest.approx(total / 24 * temperature**2, rel=1e-10)


def test_channel_wise_by_hand():
    student = torch.zeros(1, 2, 1, 2)
    teacher = torch.tensor([[math.log(3), 0.0], [5.0, 5.0]]).view(1, 2, 1, 2)  # channel 0: 3:1, channel 1: equal
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert channel_wise(student, teacher, temperature=1.0).item() == pytest.approx(expected)


def test_channel_wise_restated():
    student, teacher = torch.randn(2, 3, 4, 2, 5, dtype=torch.float64)
    total = 0.0
    for b in range(3):
        for k in range(4):
            p = [math.exp(v / 4) for v in teacher[b, k].flatten().tolist()]
            q = [math.exp(v / 4) for v in student[b, k].flatten().tolist()]
            p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert channel_wise(student, teacher, 4.0).item() == pytest.approx(total * 16 / (4 * 3), rel=1e-10)


def test_what_is_not_shown_does_not_count():
    student, teacher = torch.randn(2, 2, 5, 3, 4, dtype=torch.float64)
    valid = torch.zeros(2, 3, 4, dtype=torch.bool)
    valid[0, :2, 1:], valid[1] = True, True
    for logits in (student, teacher):  # whatever stands there
        logits[:] = logits.where(valid[:, None], 50.0 * torch.randn_like(logits))
    parts = [(student[0, :, :2, 1:], teacher[0, :, :2, 1:]), (student[1], teacher[1])]
    by_image = [[values[None] for values in part] for part in parts]
    wanted = sum(channel_wise(*part, 4.0) for part in by_image) / 2
    assert channel_wise(student, teacher, 4.0, valid).item() == pytest.approx(wanted.item(), rel=1e-5)
    wanted = sum(pixel_kl(*part, 2.0) * part[0][0, 0].numel() for part in by_image) / 24
    assert pixel_kl(student, teacher, 2.0, valid).item() == pytest.approx(wanted.item(), rel=1e-10)
    student.requires_grad_()
    (channel_wise(student, teacher, 4.0, valid) + pixel_kl(student, teacher, 2.0, valid)).backward()
    assert not student.grad[0, :, 2].any() and not student.grad[0, :, :, 0].any() and student.grad[0, :, :2, 1:].all()


@pytest.mark.parametrize("loss", [pixel_kl, channel_wise])
def test_gradients(loss):
    student = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher.detach(), 2.0), student)
    loss(student, teacher, 2.0).backward()
    assert teacher.grad is None
    assert loss(teacher, teacher, 2.0).item() == pytest.approx(0, abs=1e-12)


def _ohem_restated(logits, label, threshold, min_kept, weights):
    probability = logits.softmax(1)
    pixels = [
        (probability[b, c := label[b, y, x], y, x].item(), -probability[b, c, y, x].log().item(), weights[c].item())
        for b in range(label.shape[0])
        for y in range(label.shape[1])
        for x in range(label.shape[2])
        if label[b, y, x] != 255
    ]
    if not pixels:
        return 0.0
    if len(pixels) > min_kept:
        kth = sorted(p for p, *_ in pixels)[min_kept - 1] if min_kept else 0
        pixels = [pixel for pixel in pixels if pixel[0] <= max(threshold, kth) + 1e-12]
    return sum(loss * weight for _, loss, weight in pixels) / sum(weight for *_, weight in pixels)


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("min_kept", [1, 10, 30, 1000])
def test_ohem_restated(threshold, min_kept):
    logits, label = torch.randn(2, 4, 5, 6, dtype=torch.float64), torch.randint(4, (2, 5, 6))
    label[0, :2] = 255
    expected = _ohem_restated(logits, label, threshold, min_kept, torch.ones(4))
    assert ohem_cross_entropy(logits, label, threshold, min_kept)[0].item() == pytest.approx(expected, rel=1e-6)
    classes = torch.tensor([0.25, 4.0, 1.0, 0.5]) * 1e-3  # they may sum to less than 1
    expected = _ohem_restated(logits, label, threshold, min_kept, classes)
    found = ohem_cross_entropy(logits, label, threshold, min_kept, weights=classes)[0]
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_ohem_corner_cases():
    logits = torch.tensor([0.0, 0.0, 2.0, 9.0]).view(1, 1, 1, 4)
    logits = torch.cat([logits, torch.zeros_like(logits)], dim=1).requires_grad_()  # p of class 0: .5 .5 .88 1.0
    label = torch.zeros(1, 1, 4, dtype=torch.long)
    by_pixel = [cross_entropy(logits[..., i : i + 1], label[..., i : i + 1]).item() for i in range(4)]
    # Fewer valid pixels than min_kept: all of them.
    assert ohem_cross_entropy(logits, label, 0.7, 10)[0].item() == pytest.approx(sum(by_pixel) / 4)
    # Enough hard ones: exactly those at or under the threshold.
    assert ohem_cross_entropy(logits, label, 0.7, 1)[0].item() == pytest.approx(by_pixel[0])
    # Too few: the threshold rises to the third hardest.
    loss, count = ohem_cross_entropy(logits, label, 0.7, 3)
    assert loss.item() == pytest.approx(sum(by_pixel[:3]) / 3) and count == 3
    # Ties with the last one kept are kept.
    assert ohem_cross_entropy(logits, label, 0.1, 1)[0].item() == pytest.approx(sum(by_pixel[:2]) / 2)
    # Nothing labelled: zero, and no gradient.
    loss, count = ohem_cross_entropy(logits, torch.full_like(label, 255), 0.7, 2)
    assert count == 0
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()
