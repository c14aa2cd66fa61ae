"""Train a student from frozen teachers: mgd | kd | cwd. Teachers and baselines that are missing come first.

accelerate launch stages/distill.py --recipe recipes/quickstart.toml
"""

import mgd.bootstrap  # noqa: F401

# isort: split

from mgd import cli
from mgd.checks import check_recipe, check_teachers
from mgd.errors import UserError
from mgd.experiment import finished_rows, run_needed, run_recipe
from mgd.models.segmenter import load_segmenter
from mgd.needed import needed_recipes, note_other_data, refuse_students, refuse_untrained
from mgd.recipe import load


def main() -> None:
    """Train what the recipe needs, then the student, and print them side by side."""
    flags = cli.parser(__doc__.splitlines()[0])
    flags.add_argument("--no-train-teachers", action="store_true", help="an unfinished teacher is an error")
    args = flags.parse_args()
    recipe = load(args.recipe, args.set)
    if not recipe.teachers:
        raise UserError(f"{args.recipe}: has no [teachers]; its stage is stages/teacher_cps.py")
    needed = needed_recipes(recipe)
    accelerator = cli.start(recipe)

    # ---- everything is checked before hours are spent ----
    if not args.restart and (rows := finished_rows(recipe, needed, accelerator)):
        return cli.print_table(accelerator, [cli.result_row(row) for row in rows], args.json)
    refuse_students(recipe)
    if args.no_train_teachers:
        refuse_untrained({name: other for name, other in needed.items() if name in recipe.teachers})
    given = {name: load_segmenter(t.checkpoint) for name, t in recipe.teachers.items() if t.checkpoint}
    splits, partition = check_recipe(recipe, accelerator, given)
    sections = {name: needed[name].student if name in needed else given[name].section for name in recipe.teachers}
    check_teachers(recipe, sections, len(splits.classes))
    note_other_data(recipe, given, partition.labeled, splits.val["id"], accelerator.print)

    # ---- teachers and baselines, by their own recipes ----
    rows = run_needed(needed, accelerator)

    # ---- the student, under the frozen teachers ----
    teachers = {
        name: load_segmenter(needed[name].run_dir) if teacher.recipe else given[name]
        for name, teacher in recipe.teachers.items()
    }
    rows.append(run_recipe(recipe, accelerator, teachers, restart=args.restart))
    cli.print_table(accelerator, [cli.result_row(row) for row in rows], args.json)


if __name__ == "__main__":
    cli.run(main)
