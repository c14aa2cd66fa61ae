"""Train without frozen teachers: cps | mean_teacher | supervised | mgd_online (teachers and student in one run).

accelerate launch stages/teacher_cps.py --recipe recipes/quickstart_deep.toml
"""

import mgd.bootstrap  # noqa: F401

# isort: split

from mgd import cli
from mgd.checks import check_recipe
from mgd.errors import UserError
from mgd.experiment import finished_rows, run_needed, run_recipe
from mgd.needed import needed_recipes
from mgd.recipe import load


def main() -> None:
    """Train and evaluate one recipe, after its baselines."""
    args = cli.parser(__doc__.splitlines()[0]).parse_args()
    recipe = load(args.recipe, args.set)
    if recipe.teachers:
        raise UserError(f"{args.recipe}: has [teachers]; its stage is stages/distill.py")
    baselines = needed_recipes(recipe)
    accelerator = cli.start(recipe)
    rows = None if args.restart else finished_rows(recipe, baselines, accelerator)
    if rows is None:
        check_recipe(recipe, accelerator)
        rows = [*run_needed(baselines, accelerator), run_recipe(recipe, accelerator, restart=args.restart)]
    cli.print_table(accelerator, [cli.result_row(row) for row in rows], args.json)


if __name__ == "__main__":
    cli.run(main)
