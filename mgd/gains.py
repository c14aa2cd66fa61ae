"""How far a run is ahead of the same student trained on the same labels alone."""

from collections.abc import Iterable, Mapping
from typing import Any

from mgd.recipe import Recipe
from mgd.runs import shaping_keys

# What a supervised run has in common with those that are measured against it, by the beginning of a key.
_IN_COMMON = (
    *("student.", "data.", "partition.", "eval.", "method.class_balance", "method.ohem"),
    *("optim.steps", "optim.epochs", "optim.batch_size"),
)
_NOT_SEEN = ("data.unlabeled", "partition.seed")

Run = tuple[Recipe, Mapping[str, Any]]
"""Recipe and metrics."""


def gain(run: Run, runs: Iterable[Run], of: str = "miou") -> float | None:
    """Return by how many points of mIoU a run is ahead of the supervised one of the same seeds.

    Seeds are compared one by one, as they may draw the labelled images, which moves all methods alike.

    Args:
        run: whose gain.
        runs: where the supervised run is looked for: same student, data, labels, class balance, OHEM, evaluation,
            steps, batch and seed. Of several, that whose `[optim]` differs least.
        of: what is compared, `miou` or `unlabeled_miou`.

    Returns:
        None without such a run, and for a supervised run itself; of `unlabeled_miou` also where one of both has
        none, or of other images.
    """
    recipe, metrics = run
    if recipe.method.name == "supervised" or of not in metrics:
        return None
    wanted, budget = _common(run), _budget(recipe)
    alike = [other for other in runs if other[0].method.name == "supervised" and _common(other) == wanted]
    if not alike:
        return None
    nearest = min(alike, key=lambda other: sum(_budget(other[0])[key] != value for key, value in budget.items()))
    if of not in nearest[1] or (of != "miou" and nearest[1]["unlabeled_images"] != metrics["unlabeled_images"]):
        return None
    return metrics[of] - nearest[1][of]


def _common(run: Run) -> dict[str, Any]:
    recipe, metrics = run
    keys = {k: v for k, v in shaping_keys(recipe).items() if k.startswith(_IN_COMMON) and not k.startswith(_NOT_SEEN)}
    counts = (metrics["num_labeled"], metrics["num_val"])
    return keys | {"seeds": (recipe.run.seed, recipe.partition_seed), "counts": counts}


def _budget(recipe: Recipe) -> dict[str, Any]:
    return recipe.optim.model_dump()
