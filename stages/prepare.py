"""Check the data of a recipe, file by file, before a week of training starts.

python stages/prepare.py --recipe recipes/voc_r18_1-8.toml
"""

import os
import sys

# This folder stands first on sys.path when a stage is started as a script, and would hide packages.
sys.path[:] = [p for p in sys.path if os.path.realpath(p) != os.path.dirname(os.path.realpath(__file__))]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads; spinning starves the workers

from mgd import cli  # noqa: E402
from mgd.checks import load_splits, split_data  # noqa: E402
from mgd.data.loaders import Images  # noqa: E402
from mgd.data.scan import scan  # noqa: E402
from mgd.errors import UserError  # noqa: E402
from mgd.recipe import load  # noqa: E402


def main() -> None:
    """Read every image and every mask once; list what is wrong and print the counts."""
    flags = cli.recipe_parser(__doc__.splitlines()[0])
    args = flags.parse_args()
    recipe = load(args.recipe, args.set)
    splits = load_splits(recipe.data)

    problems, rows = [], []
    for name, source, with_label in (
        ("train, with mask", splits.labeled, True),
        ("train, without mask", splits.unlabeled, False),
        ("val", splits.val, True),
    ):
        found = scan(Images(source, splits.decoder), with_label, recipe.data.workers, name)
        problems += [f"{name}: {problem}" for problem in found.problems.values()]
        sizes = found.sizes
        sides = " to ".join(f"{width}x{height}" for width, height in sorted({min(sizes), max(sizes)})) if sizes else ""
        rows.append({"images": name, "count": len(source), "unusable": len(found.problems), "sizes": sides})
    cli.print_rows(rows, args.json)
    if problems:
        raise UserError("\n".join(problems))
    partition = split_data(recipe, splits)
    print(f"partition: {len(partition.labeled)} labelled / {len(partition.unlabeled)} unlabelled; nothing is wrong")


if __name__ == "__main__":
    cli.run(main)
