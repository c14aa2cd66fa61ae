"""Run many recipes with several seeds, one after the other; what is finished already is only listed.

Two sweeps side by side, say one a GPU, share the work: neither starts what the other is at.

python stages/sweep.py recipes/camvid/half_lite0_1-16*.toml --seeds 0 1 2
"""

import mgd.bootstrap  # noqa: F401

# isort: split

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mgd import cli
from mgd.errors import Busy, Stopped, UserError
from mgd.finished import all_finished
from mgd.locks import claim, is_held, is_taken
from mgd.needed import check_folders, folders_of, needed_recipes, refuse_students
from mgd.recipe import Recipe, load
from mgd.runs import finished_metrics

STAGES = Path(__file__).resolve().parent


class Job(NamedTuple):
    """One recipe with one seed."""

    recipe: Recipe
    overrides: list[str]
    """What it was read with."""
    folders: list[Path]
    """What no other process may be writing when it starts."""


Jobs = dict[Path, Job]
"""By the folder of the run."""


def main() -> None:
    """Run every job that is not finished, each in a process of its own, and print what came out of all."""
    flags = cli.Flags(description=__doc__.splitlines()[0])
    flags.add_argument("recipes", nargs="+", help="TOML files; runs they need (teachers) come first, once")
    flags.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="run.seed of each (0)")
    cli.set_flag(flags, "for all recipes")
    flags.add_argument(
        "--launch",
        default=shlex.quote(sys.executable),
        type=_words,
        metavar="COMMAND",
        help='what starts a stage, e.g. "accelerate launch --num_processes 4"; left out, one process',
    )
    cli.json_flag(flags)
    args = flags.parse_args()

    jobs = read_jobs(args.recipes, args.seeds, args.set)
    found = run_jobs(jobs, args.launch)
    rows = [cli.result_row(found[folder]) if found[folder] else _empty_row(jobs[folder].recipe) for folder in jobs]
    cli.print_rows(rows, args.json)
    if failed := [folder.name for folder in jobs if not found[folder]]:
        raise UserError(
            f"{len(failed)} of {len(jobs)} did not finish: {', '.join(failed)}; the same command tries them again"
        )


def read_jobs(paths: Sequence[str], seeds: Sequence[int], overrides: Sequence[str]) -> Jobs:
    """Read every recipe with every seed, and check that they fit together, before hours are spent.

    Raises:
        UserError: a recipe is wrong, or two different ones would write one folder.
    """
    if seeded := [text for text in overrides if text.startswith("run.seed=")]:
        raise UserError(f"--set {seeded[0]}: the seeds of a sweep are given by --seeds")
    jobs: Jobs = {}
    writers: dict[str, Recipe] = {}
    for seed in seeds:
        for path in paths:
            sets = [*overrides, f"run.seed={seed}"]
            recipe = load(path, sets)
            if there := jobs.get(recipe.run_dir.resolve()):
                same = there.recipe
                if (Path(path).resolve(), seed) == (Path(same.source).resolve(), same.run.seed):
                    continue  # named twice
                raise UserError(
                    f"{path}, seed {seed}, and {same.source}, seed {same.run.seed}, both write "
                    f"{recipe.run_dir}; give each a [run] name of its own, with {{seed}}"
                )
            needed = needed_recipes(recipe)
            for title, other in {"the run": recipe, **needed}.items():
                writers[f"{title} of {path}, seed {seed},"] = other
            jobs[recipe.run_dir.resolve()] = Job(recipe, sets, folders_of(recipe, needed))
    check_folders(writers)
    recipes = {recipe.run_dir.resolve(): recipe for recipe in writers.values()}
    for folder, done in all_finished(recipes).items():
        if not done:
            refuse_students(recipes[folder])
    return jobs


def run_jobs(jobs: Jobs, launch: Sequence[str]) -> dict[Path, dict[str, Any] | None]:
    """Run one job after the other; one that fails does not stop the others.

    Returns:
        folder -> metrics.json, or None of a job that failed.
    """
    found: dict[Path, dict[str, Any] | None] = {}
    waiting_for = 0
    while left := [folder for folder in jobs if folder not in found]:
        folder = next((folder for folder in left if not any(map(is_taken, jobs[folder].folders))), None)
        if folder is None:
            if len(left) != waiting_for:
                waiting_for = len(left)
                print(f"waiting: all of the {waiting_for} left are in work elsewhere, or need what is", flush=True)
            time.sleep(2)
            continue
        job = jobs[folder]
        try:
            if not (metrics := finished_metrics(job.recipe)):
                with claim(folder):
                    print(f"[{len(found) + 1}/{len(jobs)}] {job.recipe.source}, seed {job.recipe.run.seed}", flush=True)
                    status = run_stage(launch, job.recipe, job.overrides)
                if status == Busy.STATUS or (status and any(map(is_held, job.folders))):
                    time.sleep(2)
                    continue  # another process was quicker; a launcher's status does not say so
                if not (metrics := finished_metrics(job.recipe)):
                    raise UserError(f"{job.recipe.run_dir}: ended with status {status} and left no result")
            found[folder] = metrics
        except Busy:
            continue  # another sweep claimed it, by a moment
        except UserError as error:
            print(f"note: {error}", flush=True)
            found[folder] = None
    return found


def _words(text: str) -> list[str]:
    """Argparse type: a command that can be started."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    if not words or not shutil.which(words[0]):
        raise argparse.ArgumentTypeError(f"{text!r}: no such program")
    return words


def run_stage(launch: Sequence[str], recipe: Recipe, overrides: Sequence[str]) -> int:
    """Run one recipe by its stage and return its exit status.

    Raises:
        Stopped: a signal came; the stage has been told and has ended.
    """
    sets = [part for override in overrides for part in ("--set", override)]
    command = [*launch, str(STAGES / f"{recipe.stage}.py"), "--recipe", recipe.source, *sets]
    with signals_for(child := Child()):
        child.start(command)
        status = child.wait()
    if child.received:
        kept = f"what {recipe.run_dir} holds is kept; " if recipe.run_dir.exists() else ""
        raise Stopped(child.received, f"{kept}the same command goes on from there")
    return status


class Child:
    """A process in a session of its own, so that it gets a signal once: from us."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.process: subprocess.Popen | None = None

    def start(self, command: Sequence[str]) -> None:
        """Start it."""
        self.process = subprocess.Popen(command, start_new_session=True)
        if self.received:  # while it was being started
            self._pass_on(self.received)

    def tell(self, number: int, _: object = None) -> None:
        """Pass a signal on to it and all that it started."""
        self.received = number
        if self.process:
            self._pass_on(number)

    def wait(self) -> int:
        """Return its exit status, once it has ended; after a signal, with all that it started."""
        status = self.process.wait()
        while self.received and self._pass_on(0):  # a launcher may end before its stage has kept a resume point
            time.sleep(0.1)
        return status

    def _pass_on(self, number: int) -> bool:
        if number == getattr(signal, "SIGHUP", None):
            number = signal.SIGTERM  # upon which a stage keeps a resume point
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return False
        return True


@contextlib.contextmanager
def signals_for(child: Child) -> Iterator[None]:
    """Hand the signals that end a program to a child instead; one that is ignored (nohup) stays ignored."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, child.tell) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _empty_row(recipe: Recipe) -> dict[str, Any]:
    """The row of a job that did not finish."""
    unknown = dict.fromkeys(("num_labeled", "num_unlabeled", "miou"))
    known = {"name": recipe.run_dir.name, "method": recipe.method.name, "backbone": recipe.student.backbone}
    return cli.result_row({**unknown, **known, "seconds": 0}) | {"minutes": None}


if __name__ == "__main__":
    cli.run(main)
