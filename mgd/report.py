"""Cells of finished runs laid out as tables: a row a method, a column a partition."""

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mgd.cells import Cell, by_title, spread
from mgd.data.partitions import same_data
from mgd.errors import some
from mgd.gains import SupervisedRuns
from mgd.metrics import few_images
from mgd.recipe import Recipe
from mgd.runs import shaping_keys


def result_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return a row a cell: what ran, our mean and spread, the recipe's reference and the difference."""
    supervised = SupervisedRuns(run for cell in cells for run in cell.runs)
    rows = []
    for cell in cells:
        recipe, cost, of_runs = cell.recipe, cell.cost, [run.metrics for run in cell.runs]
        first = of_runs[0]
        best = _of_all((metrics.get("best_on_val") or {}).get("miou") for metrics in of_runs)
        # Of all seeds or none, or they would be of others than the mIoU.
        ahead, unseen_ahead = (
            _of_all(supervised.gain(run, of) for run in cell.runs) for of in ("miou", "unlabeled_miou")
        )
        one_set = len({metrics.get("unlabeled_images") for metrics in of_runs}) == 1
        unseen = _of_all(metrics.get("unlabeled_miou") if one_set else None for metrics in of_runs)
        rows.append(
            {
                "run": cell.name,
                "data": cell.title,
                "method": recipe.method.name,
                "backbone": recipe.student.backbone,
                "params_m": cost["total"].params_m,
                "gmacs": cost["total"].gmacs,
                "backbone_gmacs": cost["backbone"].gmacs,
                "crop": recipe.data.crop,
                "labeled": first["num_labeled"],
                "unlabeled": first["num_unlabeled"],
                "val_images": first["num_val"],
                "seeds": " ".join(_seed(run.recipe) for run in cell.runs),
                "miou": cell.mean,
                "spread": cell.spread,
                "miou_by_seed": " ".join(f"{miou:.2f}" for miou in cell.mious),
                "gain": _mean(ahead),
                "gain_spread": spread(ahead),
                "unlabeled_miou": _mean(unseen),
                "unlabeled_spread": spread(unseen),
                "unlabeled_by_seed": " ".join(f"{miou:.2f}" for miou in unseen) or None,
                "unlabeled_gain": _mean(unseen_ahead) if unseen else None,
                "unlabeled_gain_spread": spread(unseen_ahead) if unseen else None,
                "best_on_val": _mean(best),
                "reference": recipe.reference.miou if recipe.reference else None,
                "reference_source": recipe.reference.source if recipe.reference else None,
                "difference": cell.mean - recipe.reference.miou if recipe.reference else None,
                "of_teacher": cell.of_teacher,
                "steps": first["steps"],
                "batch_size": recipe.optim.batch_size,
                "minutes": statistics.mean(metrics["seconds"] for metrics in of_runs) / 60,
            }
        )
    return rows


def _of_all(found: Iterable[float | None]) -> list[float]:
    values = list(found)
    return [] if None in values else values


def _seed(recipe: Recipe) -> str:
    """Return the seed of a run; of another draw of the labelled images RUN/DRAW."""
    seed, draw = recipe.seeds
    return str(seed) if draw == seed else f"{seed}/{draw}"


def _mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None


def tables(cells: Sequence[Cell]) -> dict[str, list[dict[str, str]]]:
    """Lay the cells out as the paper does: a table a data set, a row a method, a column a partition.

    Variants of a run (`voc_r18_1-8_grid_9` of `voc_r18_1-8`: one method, one partition, a longer
    name) stand in tables of their own, by the source of their reference, beside the run itself.

    Returns:
        Rows by title of the table. A value reads `mean ± spread (seeds; reference, difference)`.
    """
    found: dict[str, list[dict[str, str]]] = {}
    base = _bases(cells)
    groups = by_title([cell for cell in cells if cell.name not in base])
    for cell in cells:
        if original := base.get(cell.name):
            source = cell.recipe.reference.source if cell.recipe.reference else "variants"
            group = groups.setdefault(f"{cell.title}; {source}: {original.name} and its variants", [original])
            group.append(cell)
    for title, members in groups.items():
        columns = list(dict.fromkeys(cell.partition for cell in sorted(members, key=lambda cell: cell.num_labeled)))
        rows: dict[str, dict[str, str]] = {}
        best = {}
        for cell in members:
            taken = rows.get(cell.row_name, {}).get(cell.partition)
            name = cell.name if taken else cell.row_name
            empty = {"run": name, "method": cell.recipe.method.name, "backbone": cell.recipe.student.backbone}
            row = rows.setdefault(name, empty | dict.fromkeys(columns, ""))
            row[cell.partition] = _value(cell)
            best[name] = max(best.get(name, 0), cell.mean)
        found[title] = sorted(rows.values(), key=lambda row: (row["backbone"], best[row["run"]]))
    return found


def _bases(cells: Sequence[Cell]) -> dict[str, Cell]:
    """Return name of a variant -> the run that it varies: of several that of the longest name, or beside it."""

    def varies(cell: Cell, other: Cell) -> bool:
        return (
            other.title == cell.title
            and other.partition == cell.partition
            and other.recipe.method.name == cell.recipe.method.name
            and cell.label.startswith(f"{other.label}_")
        )

    bases = {}
    for cell in cells:
        found = [other for other in cells if varies(cell, other)]
        if found:
            beside = cell.runs[0].folder.parent
            bases[cell.name] = max(found, key=lambda one: (len(one.label), one.runs[0].folder.parent == beside))
    return bases


def notes(cells: Sequence[Cell]) -> list[str]:
    """Say where runs side by side had other budgets, images or masks, are of several versions, or of few val images."""
    lines = []
    for cell in cells:
        versions = {str(run.metrics.get("versions", {}).get("mgd")) for run in cell.runs}
        if len(versions) > 1:
            lines.append(f"{cell.name}: runs of mgd {', '.join(sorted(versions))}, whose results may differ")
    for title, members in by_title(cells).items():
        if few := few_images(min(cell.runs[0].metrics["num_val"] for cell in members)):
            lines.append(f"{title}: {few}")
        first = next((cell for cell in members if cell.runs[0].seen), members[0])
        others = [cell for cell in members if not same_data(first.runs[0].seen, cell.runs[0].seen)]
        if others:
            lines.append(
                f"{title}: not one set of images and masks: {some([cell.name for cell in others])} "
                f"have others than {first.name}"
            )
        groups: dict[tuple[str, str], list[Cell]] = {}
        for cell in members:
            groups.setdefault((cell.recipe.student.backbone, cell.partition), []).append(cell)
        for (backbone, partition), group in groups.items():
            keys = {cell.name: shaping_keys(cell.recipe) for cell in group}
            same = {key for found in keys.values() for key in found if key.startswith("eval.")}
            for key in sorted(same | {"optim.steps", "optim.epochs", "optim.batch_size", "data.crop"}):
                values = {name: found.get(key) for name, found in keys.items()}
                if len(set(map(str, values.values()))) > 1:
                    listed = ", ".join(f"{name} {value}" for name, value in values.items())
                    lines.append(f"{title}, {backbone}, {partition}: not one budget, {key}: {listed}")
    return lines


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV, numbers in full."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _value(cell: Cell) -> str:
    text = f"{cell.mean:.2f}" if cell.spread is None else f"{cell.mean:.2f} ± {cell.spread:.2f}"
    more = [f"n={len(cell.runs)}"]
    if reference := cell.recipe.reference:
        more.append(f"{reference.source} {reference.miou:.2f}, {cell.mean - reference.miou:+.2f}")
    return f"{text} ({'; '.join(more)})"
