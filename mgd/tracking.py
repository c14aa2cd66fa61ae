"""Trackers: what metrics.jsonl gets also goes to `[run] tracker`, through accelerate. None of them can end a run."""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from mgd.errors import UserError, one_line
from mgd.files import write_text
from mgd.recipe import Recipe
from mgd.tables import flatten

PROJECT = "mgd"


def check_tracker(name: str | None) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        UserError: naming the package.
    """
    if name is not None and name not in map(str, get_available_trackers()):
        raise UserError(f'[run] tracker = "{name}": not installed; pip install {name}')


@contextlib.contextmanager
def tracked(accelerator: Accelerator) -> Iterator[None]:
    """Close the tracker of one run when it ends, however it does."""
    try:
        yield
    finally:
        # Not accelerator.end_training(), which would take the process group away from the next run.
        with _harmless(accelerator):
            for tracker in accelerator.trackers:
                tracker.finish()
            accelerator.trackers.clear()


def open_tracker(recipe: Recipe, accelerator: Accelerator, start: int) -> None:
    """Open the tracker that the recipe names, if any, for a run that begins or goes on at step `start`.

    Args:
        recipe: the run; `[run] tracker` is used, and all of it shown.
        accelerator: its main process tracks.
        start: steps done before this sitting.
    """
    name, folder = recipe.run.tracker, recipe.run_dir
    if name is None or not accelerator.is_main_process:
        return
    with _harmless(accelerator):
        config = _plain(recipe.to_dict())
        project, settings = PROJECT, {"name": folder.name}
        if name == "tensorboard":
            project = name  # accelerate names the folder below logging_dir so
            settings = {"purge_step": start + 1}  # hides what a killed sitting wrote past its resume point
            config = None if (folder / name).exists() else config  # each time it makes two folders of it
        elif name == "trackio":
            # Read when it is imported, so one place for all runs of the process; a folder set by the user wins.
            os.environ.setdefault("TRACKIO_DIR", str(Path(recipe.run.output).resolve() / ".trackio"))
            settings |= {"resume": "allow" if start else "never", "auto_log_cpu": False, "auto_log_gpu": False}
        else:
            settings |= {"dir": str(folder), "id": _kept_id(folder / name / "id"), "resume": "allow"}
        accelerator.log_with = [name]
        accelerator.project_configuration.logging_dir = str(folder)
        accelerator.init_trackers(project, config, {name: settings})


def track(accelerator: Accelerator, row: Mapping[str, float]) -> None:
    """Hand one line of metrics.jsonl to the tracker, if one is open."""
    if accelerator.trackers:
        with _harmless(accelerator):
            accelerator.log({key: value for key, value in row.items() if key != "step"}, step=int(row["step"]))


@contextlib.contextmanager
def _harmless(accelerator: Accelerator) -> Iterator[None]:
    """Go on without the tracker when it raises: hours of training are worth more."""
    try:
        yield
    except Exception as error:
        accelerator.trackers.clear()
        reason = one_line(f"{type(error).__name__}: {error}")
        accelerator.print(f"note: the tracker failed ({reason}); the run goes on without it", flush=True)


def _plain(tables: Mapping[str, Any]) -> dict[str, int | float | str | bool]:
    """Flatten a recipe into what every tracker takes."""
    flat = flatten(tables)
    return {key: value if isinstance(value, (int, float, str)) else json.dumps(value) for key, value in flat.items()}


def _kept_id(path: Path) -> str:
    """Return the id by which a run is taken up again; made the first time, gone with the run folder."""
    if not path.exists():
        write_text(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8")
