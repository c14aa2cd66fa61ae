"""How far a run is ahead of the same student trained on the same labels alone."""

from collections.abc import Iterable, Mapping
from typing import Any

from mgd.data.partitions import same_data
from mgd.runs import FinishedRun, comparable_keys


class SupervisedRuns:
    """The supervised runs among some, by what a run that is measured against them has in common with them.

    Args:
        runs: finished ones, of any method.
    """

    def __init__(self, runs: Iterable[FinishedRun]) -> None:
        self.alike: dict[str, list[FinishedRun]] = {}
        for run in runs:
            if run.recipe.method.name == "supervised":
                self.alike.setdefault(_common(run), []).append(run)

    def gain(self, run: FinishedRun, of: str) -> float | None:
        """Return by how many points of mIoU a run is ahead of the supervised one of the same seeds.

        Seeds are compared one by one, as they may draw the labelled images, which moves all methods alike. The
        supervised run has the same student, data, labels, class balance, OHEM, evaluation, steps, batch and seed; of
        several it is that whose `[optim]` differs least. Both learned from the same masks and saw the same val images.

        Args:
            run: whose gain.
            of: what is compared, `miou` or `unlabeled_miou`.

        Returns:
            None without such a run, and for a supervised run itself; of `unlabeled_miou` also where one of both has
            none, or of other images.
        """
        if run.recipe.method.name == "supervised" or of not in run.metrics:
            return None
        alike = [other for other in self.alike.get(_common(run), ()) if _same_data(run, other)]
        if not alike:
            return None
        budget = run.recipe.optim.model_dump()
        nearest = min(
            alike, key=lambda other: sum(budget[key] != value for key, value in other.recipe.optim.model_dump().items())
        ).metrics
        if of not in nearest or (of != "miou" and not _same_unlabeled(run.metrics, nearest)):
            return None
        return run.metrics[of] - nearest[of]


def _common(run: FinishedRun) -> str:
    counts = (run.metrics["num_labeled"], run.metrics["num_val"])
    return repr((sorted(comparable_keys(run.recipe).items()), *run.recipe.seeds, counts))


def _same_data(one: FinishedRun, other: FinishedRun) -> bool:
    if one.seen and other.seen and one.seen.labeled != other.seen.labeled:
        return False
    return same_data(one.seen, other.seen)


def _same_unlabeled(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether both were scored on the same unlabelled images and masks, as far as their files say."""
    sums = {metrics["unlabeled_sum"] for metrics in (one, other)} - {None}
    return one["unlabeled_images"] == other["unlabeled_images"] and len(sums) < 2
