import math

import pytest
import torch
from torch.nn import functional

from mgd.losses.supervised import class_weights, cross_entropies, cross_entropy


def test_hand_worked_value():
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]]).view(1, 2, 1, 2)  # pixel 0: 1:1, pixel 1: 3:1
    label = torch.tensor([[[1, 0]]])
    assert cross_entropy(logits, label).item() == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)


def test_ignored_pixels_do_not_count():
    torch.manual_seed(0)
    logits, label = torch.randn(2, 5, 4, 3, dtype=torch.float64), torch.randint(5, (2, 4, 3))
    label[0, 0] = 255
    plain = -torch.stack(
        [
            logits[b, :, y, x].log_softmax(0)[label[b, y, x]]
            for b in range(2)
            for y in range(4)
            for x in range(3)
            if label[b, y, x] != 255
        ]
    ).mean()
    assert torch.allclose(cross_entropy(logits, label), plain, rtol=1e-12)
    assert torch.allclose(plain, functional.cross_entropy(logits, label, ignore_index=255))


def test_nothing_but_ignore_is_zero_with_zero_gradient():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = cross_entropy(logits, torch.full((1, 2, 2), 255))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_gradient():
    logits = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    label = torch.tensor([[[0, 255], [2, 1]]])
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, label), logits)


def test_several_label_maps_agree_with_torch():
    torch.manual_seed(1)
    logits = torch.randn(2, 6, 5, 4, dtype=torch.float64, requires_grad=True)
    labels = [torch.randint(6, (2, 5, 4)) for _ in range(3)]
    labels[0][:, 1] = 255
    weights = torch.tensor([1.0, 0.5, 3.0], dtype=torch.float64)
    ours = cross_entropies(logits, labels)
    plain = torch.stack([functional.cross_entropy(logits, label, ignore_index=255) for label in labels])
    assert torch.allclose(ours, plain, rtol=1e-12)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), logits)
    (expected,) = torch.autograd.grad((plain * weights).sum(), logits)
    assert torch.allclose(gradient, expected, rtol=1e-12, atol=1e-15)


def test_class_weights_by_hand():
    pixels = torch.tensor([800, 100, 0, 400, 1])  # the median of the classes seen is 250
    assert class_weights(pixels, 1.0).tolist() == pytest.approx([0.3125, 2.5, 1.0, 0.625, 20.0])
    assert class_weights(pixels, 0.5).tolist() == pytest.approx([0.3125**0.5, 2.5**0.5, 1.0, 0.625**0.5, 250**0.5])
    assert class_weights(pixels, 0.0).tolist() == [1.0] * 5


def test_weighted_classes_agree_with_torch():
    torch.manual_seed(2)
    logits = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    labels = [torch.randint(4, (2, 5, 6)) for _ in range(2)]
    labels[0][:, 1], labels[1][:] = 255, 255
    classes = torch.tensor([0.2, 3.0, 1.0, 0.7], dtype=torch.float64) * 1e-3  # the pixels' weights sum to less than 1
    ours = cross_entropies(logits, labels, weights=classes)
    plain = functional.cross_entropy(logits, labels[0], weight=classes, ignore_index=255)
    assert ours[0].item() == pytest.approx(plain.item(), rel=1e-12) and ours[1].item() == 0
    (gradient,) = torch.autograd.grad(ours.sum(), logits)
    (expected,) = torch.autograd.grad(plain, logits)
    assert torch.allclose(gradient, expected, rtol=1e-12, atol=1e-15)
