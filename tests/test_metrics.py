"""mIoU against torchmetrics, against evaluate's definition, and by hand."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index

from mgd.mean_iou import MeanIoU
from mgd.metrics import confusion_matrix, scores


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(1)
    prediction = torch.randint(6, (4, 20, 30), generator=generator)
    label = torch.where(
        torch.rand(4, 20, 30, generator=generator) < 0.6, prediction, torch.randint(6, (4, 20, 30), generator=generator)
    )
    label[torch.rand(4, 20, 30, generator=generator) < 0.1] = 255
    return prediction, label


def test_against_torchmetrics(maps):
    prediction, label = maps
    confusion = confusion_matrix(prediction, label, 6)
    assert torch.equal(confusion, multiclass_confusion_matrix(prediction, label, 6, ignore_index=255))
    theirs = multiclass_jaccard_index(prediction, label, 6, average="none", ignore_index=255)
    assert scores(confusion).iou == pytest.approx((100 * theirs.double()).tolist(), rel=1e-6)
    assert scores(confusion).miou == pytest.approx(100 * theirs.mean().item(), rel=1e-6)


def _upstream(predictions, references, num_labels, ignore_index):
    """The definition of `evaluate`'s mean_iou, restated: histograms over the pixels that count."""
    intersect, union = np.zeros(num_labels), np.zeros(num_labels)
    for prediction, reference in zip(predictions, references, strict=True):
        counted = reference != ignore_index
        prediction, reference = prediction[counted], reference[counted]
        for k in range(num_labels):
            intersect[k] += ((prediction == k) & (reference == k)).sum()
            union[k] += ((prediction == k) | (reference == k)).sum()
    with np.errstate(invalid="ignore"):
        return intersect / union


def test_evaluate_module(maps):
    prediction, label = maps
    metric = MeanIoU(num_classes=7)  # class 6 is nowhere
    metric.add_batch(predictions=prediction[:3], references=label[:3])
    metric.add(prediction=prediction[3].numpy(), reference=label[3].tolist())
    result = metric.compute()
    expected = _upstream(prediction.numpy(), label.numpy(), 7, 255)
    np.testing.assert_allclose(result["per_category_iou"], expected, rtol=1e-12)
    assert math.isnan(result["per_category_iou"][6])
    assert result["mean_iou"] == pytest.approx(np.nanmean(expected))
    agree = (prediction == label)[label != 255].double().mean().item()
    assert result["overall_accuracy"] == pytest.approx(agree)


def test_known_confusion():
    result = scores(torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]]))
    assert result.iou[:2] == pytest.approx([100 * 3 / 6, 100 * 4 / 7]) and math.isnan(result.iou[2])
    assert result.miou == pytest.approx((50 + 400 / 7) / 2) and result.pixel_accuracy == pytest.approx(70)


def test_predictions_on_ignored_pixels_do_not_count():
    prediction = torch.tensor([[1, 0]])
    assert confusion_matrix(prediction, torch.tensor([[255, 0]]), 2).tolist() == [[1, 0], [0, 0]]


def test_values_outside_the_classes_are_refused():
    with pytest.raises(ValueError, match="prediction 3 is no class; they are 0 to 2"):
        confusion_matrix(torch.tensor([3]), torch.tensor([0]), 3)
    with pytest.raises(ValueError, match="label 7 is no class"):
        confusion_matrix(torch.tensor([0]), torch.tensor([7]), 3)
