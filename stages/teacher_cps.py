"""Train without frozen teachers: cps | mean_teacher | supervised | mgd_online (teachers and student in one run).

accelerate launch stages/teacher_cps.py --recipe recipes/quickstart_deep.toml
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
from mgd.checks import check_recipe  # noqa: E402
from mgd.errors import UserError  # noqa: E402
from mgd.experiment import finished_rows, run_needed, run_recipe  # noqa: E402
from mgd.needed import needed_recipes  # noqa: E402
from mgd.recipe import load  # noqa: E402


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
