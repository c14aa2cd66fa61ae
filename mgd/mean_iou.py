"""Mean IoU as a Hugging Face `evaluate` metric that needs no network.

    from mgd.mean_iou import MeanIoU
    metric = MeanIoU(num_classes=11)
    metric.add_batch(predictions=[...], references=[...])
    metric.compute()  # {"mean_iou": ..., "per_category_iou": [...], "overall_accuracy": ...}

What is stored for an image is one flattened K x K confusion row, not its pixels.
"""

import datasets
import evaluate
import numpy as np
import torch

from mgd.metrics import confusion_matrix, scores


class MeanIoU(evaluate.Metric):
    """Mean IoU over label maps, gathered over processes by `evaluate` itself.

    Args:
        num_classes: K.
        ignore_index: label of pixels that do not count.
        **options: passed to `evaluate.Metric` (`num_process`, `process_id`, `experiment_id`, ...).
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, **options) -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        super().__init__(**options)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean intersection over union of label maps.",
            citation="",
            inputs_description="predictions, references: label maps [H, W] of integers.",
            features=datasets.Features({"confusion": datasets.List(datasets.Value("int64"))}),
        )

    def add(self, *, prediction, reference) -> None:
        """Add one image: two `[H, W]` label maps (arrays, tensors or nested lists)."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions, references) -> None:
        """Add images: two equally long sequences of `[H, W]` label maps of any sizes."""
        pairs = zip(predictions, references, strict=True)
        super().add_batch(confusion=[self._row(prediction, reference) for prediction, reference in pairs])

    def _row(self, prediction, reference) -> list[int]:
        prediction, reference = torch.as_tensor(np.asarray(prediction)), torch.as_tensor(np.asarray(reference))
        return confusion_matrix(prediction, reference, self.num_classes, self.ignore_index).flatten().tolist()

    def compute(self, *, predictions=None, references=None):
        """Return mean_iou, per_category_iou (NaN for absent classes) and overall_accuracy, 0..1."""
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        return super().compute()

    def _compute(self, confusion):
        total = torch.as_tensor(np.asarray(confusion)).sum(dim=0).view(self.num_classes, self.num_classes)
        result = scores(total)
        return {
            "mean_iou": result.miou / 100,
            "per_category_iou": [value / 100 for value in result.iou],
            "overall_accuracy": result.pixel_accuracy / 100,
        }
