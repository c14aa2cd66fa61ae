"""Run many recipes with several seeds, one after the other; what is finished already is only listed.

python stages/sweep.py recipes/camvid/half_lite0_1-16*.toml --seeds 0 1 2
"""

import argparse
import os
import sys

# This folder stands first on sys.path when a stage is started as a script, and would hide packages.
sys.path[:] = [p for p in sys.path if os.path.realpath(p) != os.path.dirname(os.path.realpath(__file__))]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads; spinning starves the workers

import contextlib  # noqa: E402
import shlex  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
from collections.abc import Iterator, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402

from mgd import cli  # noqa: E402
from mgd.errors import Stopped, UserError  # noqa: E402
from mgd.recipe import Recipe, load  # noqa: E402
from mgd.runs import finished_metrics  # noqa: E402

STAGES = Path(__file__).resolve().parent


def main() -> None:
    """Run every cell that is not finished, each in a process of its own, and print what came out of all."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("recipes", nargs="+", help="TOML files; runs they need (teachers) come first, once")
    flags.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="run.seed of each (0)")
    flags.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for all recipes")
    flags.add_argument(
        "--launch",
        default=shlex.quote(sys.executable),
        metavar="COMMAND",
        help='what starts a stage, e.g. "accelerate launch --num_processes 4"; left out, one process',
    )
    flags.add_argument("--json", metavar="FILE", type=cli.output_file, help="also write the last table as JSON")
    args = flags.parse_args()

    # ---- everything is read before hours are spent ----
    cells: dict[Path, tuple[Recipe, list[str]]] = {}
    for seed in args.seeds:
        for path in args.recipes:
            overrides = [*args.set, f"run.seed={seed}"]
            recipe = load(path, overrides)
            if recipe.run_dir in cells:
                other = cells[recipe.run_dir][0].source
                raise UserError(
                    f"{path} and {other} both write {recipe.run_dir}; give each a [run] name of its own, with {{seed}}"
                )
            finished_metrics(recipe)
            cells[recipe.run_dir] = (recipe, overrides)

    # ---- one cell after the other ----
    failed: dict[Path, int] = {}
    for number, (folder, (recipe, overrides)) in enumerate(cells.items(), 1):
        if finished_metrics(recipe):
            continue
        print(f"[{number}/{len(cells)}] {recipe.source}, seed {recipe.run.seed}", flush=True)
        status = run_stage(shlex.split(args.launch), recipe, overrides)
        if status:
            failed[folder] = status
            print(f"note: {folder}: ended with status {status}; the others go on", flush=True)

    # ---- what came out ----
    rows = []
    for folder, (recipe, _) in cells.items():
        done = None if folder in failed else finished_metrics(recipe)
        rows.append(cli.result_row(done) if done else {"run": folder.name, "method": recipe.method.name})
    cli.print_rows(rows, args.json)
    if failed:
        names = ", ".join(folder.name for folder in failed)
        raise UserError(f"{len(failed)} of {len(cells)} did not finish: {names}; the same command tries them again")


def run_stage(launch: Sequence[str], recipe: Recipe, overrides: Sequence[str]) -> int:
    """Run one recipe by its stage and return its exit status.

    Raises:
        Stopped: a signal came; the stage has been told and has ended.
    """
    stage = "distill" if recipe.teachers else "teacher_cps"
    sets = [part for override in overrides for part in ("--set", override)]
    command = [*launch, str(STAGES / f"{stage}.py"), "--recipe", recipe.source, *sets]
    try:
        # In a session of its own it gets a Ctrl-C once, from us.
        process = subprocess.Popen(command, start_new_session=True)
    except OSError as error:
        raise UserError(f"--launch {command[0]}: cannot be started: {error.strerror}") from error
    with passed_on(process) as received:
        status = process.wait()
    if received:
        raise Stopped(received[0], f"{recipe.run_dir} is kept; the same command goes on from there")
    return status


@contextlib.contextmanager
def passed_on(process: subprocess.Popen) -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM on to a process and all that it started; yields the list of those that came."""
    received: list[int] = []

    def tell(number: int, frame: object) -> None:
        received.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    before = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    cli.run(main)
