"""Check the data of a recipe, file by file, before a week of training starts.

python stages/prepare.py --recipe recipes/voc_r18_1-8.toml
"""

import mgd.bootstrap  # noqa: F401

# isort: split

import numpy as np

from mgd import cli
from mgd.checks import check_data
from mgd.data.images import Images
from mgd.data.reading import load_splits
from mgd.data.scan import scan
from mgd.data.stream import Pool, scan_pool
from mgd.errors import UserError
from mgd.recipe import load


def main() -> None:
    """List what is wrong with any image or mask, print the counts, and check the partition as a run does."""
    flags = cli.recipe_parser(__doc__.splitlines()[0])
    args = flags.parse_args()
    recipe = load(args.recipe, args.set)
    accelerator = cli.start(recipe)
    splits = load_splits(recipe.data)

    problems, rows, pixels = [], [], {}
    for name, source, with_label in (
        ("train, with mask", splits.labeled, True),
        ("train, without mask", splits.unlabeled, False),
        ("val", splits.val, True),
    ):
        found = scan(Images(source, splits.decoder), with_label, recipe.data.workers, name)
        problems += [f"{name}: {problem}" for problem in found.problems.values()]
        pixels[name] = found.pixels
        ends = sorted({min(found.sizes), max(found.sizes)}) if found.sizes else []
        sizes = " to ".join(f"{width}x{height}" for width, height in ends)
        rows.append({"images": name, "count": len(source), "unusable": len(found.problems), "sizes": sizes})
    pool = recipe.data.unlabeled
    if pool and pool.streaming:
        count, bad = scan_pool(Pool(pool))
        problems += [f"[data.unlabeled]: {problem}" for problem in bad]
        rows.append({"images": "[data.unlabeled]", "count": count, "unusable": len(bad), "sizes": ""})
    cli.print_rows(rows, args.json)
    print()
    names = [*enumerate(splits.classes), (255, "ignored")]
    columns = {"train pixels %": pixels["train, with mask"], "val pixels %": pixels["val"]}
    cli.print_rows(
        [{"class": name} | {key: _share(counts, index) for key, counts in columns.items()} for index, name in names]
    )
    if problems and recipe.data.on_error == "raise":
        raise UserError("\n".join(problems))
    for problem in problems:
        print(f"note: skipped: {problem}")
    _, partition, _ = check_data(recipe, accelerator)
    print(
        f"partition: {len(partition.labeled)} labelled / {partition.unlabeled_text} unlabelled; nothing is wrong"
        + (" with the others" if problems else "")
    )


def _share(counts: np.ndarray, index: int) -> float | None:
    """Return how many of the pixels have a value, %; None where no mask could be read."""
    return 100 * counts[index] / total if (total := counts.sum()) else None


if __name__ == "__main__":
    cli.run(main)
