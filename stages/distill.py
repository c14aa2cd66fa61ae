"""Train a student from frozen teachers: mgd. Teachers and baselines that are missing come first.

accelerate launch stages/distill.py --recipe recipes/quickstart.toml
"""

import os
import sys

# This folder stands first on sys.path when a stage is started as a script, and would hide packages.
sys.path[:] = [p for p in sys.path if os.path.realpath(p) != os.path.dirname(os.path.realpath(__file__))]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads; spinning starves the workers

from mgd import cli  # noqa: E402
from mgd.errors import UserError  # noqa: E402
from mgd.experiment import run_recipe  # noqa: E402
from mgd.models.segmenter import load_segmenter  # noqa: E402
from mgd.recipe import Recipe, load  # noqa: E402
from mgd.runs import check_same_labels, finished_metrics  # noqa: E402


def main() -> None:
    """Train what the recipe needs, then the student, and print them side by side."""
    flags = cli.parser(__doc__.splitlines()[0])
    flags.add_argument("--no-train-teachers", action="store_true", help="an unfinished teacher is an error")
    args = flags.parse_args()
    recipe = load(args.recipe, args.set)
    if not recipe.teachers:
        raise UserError(f"{args.recipe}: has no [teachers]; its stage is stages/teacher_cps.py")
    shared = [override for override in args.set if override.startswith(("data.", "partition."))]
    needed = needed_recipes(recipe, shared)
    accelerator = cli.start(recipe)

    # ---- teachers and baselines, by their own recipes ----
    rows = []
    for title, other in needed.items():
        if finished_metrics(other) is None:
            command = f"stages/teacher_cps.py --recipe {other.source}"
            if args.no_train_teachers and title in recipe.teachers:
                raise UserError(f"[teachers.{title}] is not trained; accelerate launch {command}")
            accelerator.print(f"{title}: {other.run_dir} is not finished; training it now ({command})")
        rows.append(run_recipe(other, accelerator))

    # ---- the student, under the frozen teachers ----
    sources = {
        name: needed[name].run_dir if teacher.recipe else teacher.checkpoint
        for name, teacher in recipe.teachers.items()
    }
    teachers = {name: load_segmenter(source) for name, source in sources.items()}
    rows.append(run_recipe(recipe, accelerator, teachers, restart=args.restart))
    cli.print_table(accelerator, [cli.result_row(row) for row in rows], args.json)


def needed_recipes(recipe: Recipe, shared: list[str]) -> dict[str, Recipe]:
    """Load the recipes of the teachers and baselines, with this run's seed and partition.

    `shared` are the `--set`s of data and partition, which hold for all runs of the comparison.
    """
    wanted = {name: (teacher.recipe, teacher.seed) for name, teacher in recipe.teachers.items() if teacher.recipe}
    wanted |= {f"baseline {path}": (path, None) for path in recipe.eval.baselines}
    needed = {}
    for title, (path, seed) in wanted.items():
        overrides = [
            *shared,
            f"run.seed={recipe.run.seed if seed is None else seed}",
            f"partition.seed={recipe.partition_seed}",
            f'run.output="{recipe.run.output}"',
        ]
        needed[title] = load(path, overrides)
        if needed[title].teachers:
            raise UserError(f"{recipe.source}: {title} ({path}) has [teachers] of its own; only one level is trained")
        check_same_labels(recipe, needed[title], title)
    return needed


if __name__ == "__main__":
    cli.run(main)
