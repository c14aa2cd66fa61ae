"""How far cached predictions are from what the teachers see in the crops themselves."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from mgd.data.loaders import TrainingPairs
from mgd.data.targets import FINE, OF_LABELED, CachedTargets
from mgd.data.transforms import IGNORE_INDEX
from mgd.losses.mgd import self_correlation
from mgd.models.segmenter import enlarge


def compare(
    targets: CachedTargets,
    teachers: Mapping[str, nn.Module],
    pairs: TrainingPairs,
    accelerator: Accelerator,
    grid: int = 7,
    count: int = 32,
) -> list[dict[str, Any]]:
    """Compare what was cached with what the teachers see in the crops themselves.

    Args:
        targets: the cache.
        teachers: loaded networks by name.
        pairs: the samples of the run, with the cache's targets.
        accelerator: device and precision.
        grid: regions a side whose correlations are compared.
        count: unlabelled crops that are compared.

    Returns:
        A row a teacher: the share of pixels with the same class (%), the mean absolute difference of the pooled
        logits, with their mean size, and that of the self-correlations (cosines).
    """
    rows = []
    for name, kinds in targets.kinds.items():
        network = teachers[name].to(accelerator.device).eval()
        sums = dict.fromkeys(("same", "logits", "size", "cosine"), 0.0)
        for position in range(count):
            sample = pairs[position]
            with accelerator.autocast(), torch.inference_mode():
                logits, features = (
                    value.float().cpu() for value in network(sample["unlabeled"][None].to(accelerator.device))
                )
            found = {kind: sample[f"unlabeled/{name}/{kind}"][None] for kind in kinds}
            for kind in found.keys() & {*FINE}:
                classes = enlarge(found[kind], logits.shape[2:]).argmax(dim=1)
                found["labels"] = classes.where(sample["unlabeled/valid"], IGNORE_INDEX)
            if "labels" in found:
                counted = found["labels"] != IGNORE_INDEX
                sums["same"] += (found["labels"] == logits.argmax(dim=1))[counted].double().mean().item() * 100
            if "logits" in found:
                sums["logits"] += (found["logits"].mean((2, 3)) - logits.mean((2, 3))).abs().mean().item()
                sums["size"] += logits.mean((2, 3)).abs().mean().item()
            if "features" in found:
                online, cached = (self_correlation(value, grid) for value in (features, found["features"]))
                sums["cosine"] += (online - cached).abs().mean().item()
        network.cpu()
        rows.append(
            {
                "teacher": name,
                "same class %": sums["same"] / count if {*OF_LABELED} & {*kinds} else None,
                "pooled logits off by": sums["logits"] / count if "logits" in kinds else None,
                "of a mean size of": sums["size"] / count if "logits" in kinds else None,
                "cosines off by": sums["cosine"] / count if "features" in kinds else None,
            }
        )
    return rows
