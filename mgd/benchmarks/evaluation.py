"""The confusion matrix of a data set beside Hugging Face `evaluate`'s mean_iou on the same predictions.

The reference is that metric restated, for its script cannot be had offline: label maps are stored by
`evaluate`, then three histograms an image.
"""

import tempfile
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from mgd.benchmarks.timing import alternate, ratio_row
from mgd.mean_iou import MeanIoU


def suite(num_classes: int, num_images: int, repetitions: int) -> list[dict[str, Any]]:
    """Measure both on random label maps of 375x500 pixels, with a border to ignore.

    Args:
        num_classes: K.
        num_images: label maps.
        repetitions: rounds that count.

    Returns:
        One row `name, reference, ours, ratio`, milliseconds an image.

    Raises:
        AssertionError: the results differ.
    """
    rng = np.random.default_rng(0)
    labels = rng.integers(num_classes, size=(num_images, 375, 500)).astype(np.uint8)
    predictions = np.where(rng.random(labels.shape) < 0.5, labels, rng.integers(num_classes, size=labels.shape))
    labels[:, :10] = 255
    pairs = {"predictions": list(predictions.astype(np.uint8)), "references": list(labels)}
    results: dict[str, dict] = {}

    def run(metric_class: type[evaluate.Metric]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            metric = metric_class(num_classes=num_classes, cache_dir=folder)
            metric.add_batch(**pairs)
            results[metric_class.__name__] = metric.compute()

    variants = {"reference": lambda: run(_HistogramMeanIoU), "ours": lambda: run(MeanIoU)}
    seconds = alternate(variants, repetitions, torch.device("cpu"))
    reference, ours = results["_HistogramMeanIoU"], results["MeanIoU"]
    assert np.allclose(reference["per_category_iou"], ours["per_category_iou"], rtol=1e-12, equal_nan=True)
    milliseconds = {name: 1000 * value / num_images for name, value in seconds.items()}
    return [ratio_row("metric: mean IoU, ms an image", **milliseconds)]


class _HistogramMeanIoU(evaluate.Metric):
    def __init__(self, num_classes: int, **options) -> None:
        self.num_classes = num_classes
        super().__init__(**options)

    def _info(self) -> evaluate.MetricInfo:
        label_map = datasets.List(datasets.List(datasets.Value("uint16")))
        return evaluate.MetricInfo(
            description="Mean IoU by histograms.",
            citation="",
            inputs_description="",
            features=datasets.Features({"predictions": label_map, "references": label_map}),
        )

    def _compute(self, predictions, references) -> dict[str, Any]:
        intersection, union = np.zeros(self.num_classes), np.zeros(self.num_classes)
        bins = {"bins": self.num_classes, "range": (0, self.num_classes - 1)}
        for prediction, label in zip(predictions, references, strict=True):
            prediction, label = np.array(prediction), np.array(label)
            counted = label != 255
            prediction, label = prediction[counted], label[counted]
            hit = np.histogram(prediction[prediction == label], **bins)[0]
            intersection += hit
            union += np.histogram(prediction, **bins)[0] + np.histogram(label, **bins)[0] - hit
        return {"per_category_iou": intersection / union}
