"""Run the teachers of a recipe once over all its training images, for [teachers] mode = "cached".

python stages/cache_teachers.py --recipe recipes/quickstart.toml --set teachers.mode=cached \
    --set method.remix=predictions --set cache.cell=8
"""

import mgd.bootstrap  # noqa: F401

# isort: split

from mgd import cli
from mgd.cache import cached_targets
from mgd.cache_compare import compare
from mgd.checks import check_recipe
from mgd.errors import UserError
from mgd.methods.mgd import TermsSection
from mgd.needed import refuse_students, trained_teachers
from mgd.recipe import load
from mgd.run_images import training_images, training_pairs


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
