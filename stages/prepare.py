"""Check the data of a recipe, file by file, before a week of training starts.

python stages/prepare.py --recipe recipes/voc_r18_1-8.toml
"""

import os
import signal
import sys

# This folder stands first on sys.path when a stage is started as a script, and would hide packages.
sys.path[:] = [p for p in sys.path if os.path.realpath(p) != os.path.dirname(os.path.realpath(__file__))]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads; spinning starves the workers
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until cli.run: Ctrl-C while torch loads is no traceback

from mgd import cli  # noqa: E402
from mgd.checks import check_data  # noqa: E402
from mgd.data.images import Images  # noqa: E402
from mgd.data.reading import load_splits  # noqa: E402
from mgd.data.scan import scan  # noqa: E402
from mgd.data.stream import Pool, scan_pool  # noqa: E402
from mgd.errors import UserError  # noqa: E402
from mgd.recipe import load  # noqa: E402


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
    shares = {name: 100 * counts / max(counts.sum(), 1) for name, counts in pixels.items()}
    names = [*enumerate(splits.classes), (255, "ignored")]
    cli.print_rows(
        [
            {"class": name, "train pixels %": shares["train, with mask"][index], "val pixels %": shares["val"][index]}
            for index, name in names
        ]
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


if __name__ == "__main__":
    cli.run(main)
