"""Run the teachers of a recipe once over all its training images, for [teachers] mode = "cached".

python stages/cache_teachers.py --recipe recipes/quickstart.toml --set teachers.mode=cached \
    --set method.remix=predictions --set cache.cell=8
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
from mgd.cache import cached_targets  # noqa: E402
from mgd.cache_compare import compare  # noqa: E402
from mgd.checks import check_recipe  # noqa: E402
from mgd.errors import UserError  # noqa: E402
from mgd.methods.mgd import TermsSection  # noqa: E402
from mgd.needed import refuse_students, trained_teachers  # noqa: E402
from mgd.recipe import load  # noqa: E402
from mgd.run_images import training_images, training_pairs  # noqa: E402


def main() -> None:
    """Fill the cache, and print what it takes and how far it is from the teachers themselves."""
    flags = cli.recipe_parser(__doc__.splitlines()[0])
    flags.add_argument("--restart", action="store_true", help="predict everything anew")
    args = flags.parse_args()
    recipe = load(args.recipe, args.set)
    if recipe.cache is None:
        raise UserError(f"{args.recipe}: its teachers are online; --set teachers.mode=cached")
    refuse_students(recipe)
    accelerator = cli.start(recipe)
    teachers = trained_teachers(recipe)
    splits, partition = check_recipe(recipe, accelerator, teachers)
    images = training_images(recipe, splits, partition)
    targets = cached_targets(recipe, accelerator, teachers, images, args.restart)
    if accelerator.is_main_process:
        pairs = training_pairs(recipe, splits, partition, targets)
        terms = {"grid": recipe.method.region.grid} if isinstance(recipe.method, TermsSection) else {}
        cli.print_rows(compare(targets, teachers, pairs, accelerator, **terms), args.json)
        print(
            f"{recipe.cache_dir}: {len(images)} images, {targets.bytes_per_image() / 1024:.0f} KiB each. In the table, "
            "what was cached for whole images beside the teachers' view of 32 crops: pixels of the same class, pooled "
            "logits (for L_I), cosines between regions (for L_R)"
        )
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    cli.run(main)
