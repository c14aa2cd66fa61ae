"""Finished runs, read and grouped into cells: one recipe, several seeds."""

import collections
import dataclasses
import json
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mgd.complexity import Cost, model_costs
from mgd.data.partitions import Seen, read_manifest, same_data
from mgd.errors import UserError
from mgd.files import absolute, read_json
from mgd.recipe import Recipe, load
from mgd.runs import FinishedRun, read_metrics, shaping_keys
from mgd.unseen import read_unlabeled

# What may differ between two runs of one cell: the seed, and what follows from it.
_OF_ONE_RUN = ("run.name", "run.seed", "partition.seed")


@dataclasses.dataclass
class Cell:
    """All runs of one recipe; they differ in their seed only."""

    label: str
    """Name of the run without its seed."""
    recipe: Recipe
    cost: Mapping[str, Cost]
    """Of `backbone`, `head` and `total`, at the recipe's crop."""
    runs: list[FinishedRun]
    """By seed; each has a recipe of its own, as partition seeds may differ."""
    place: str = ""
    """Of a data set of one's own, its folder: the last part of the name, or all of it where that is ambiguous."""
    origin: str = ""
    """The folder of its first run, where several cells have one label."""

    @property
    def name(self) -> str:
        """What no other cell is called."""
        return self.label + self._origin

    @property
    def title(self) -> str:
        """Table that the cell belongs to: data set (one of your own: its folder, too), variant, partition protocol."""
        data = self.recipe.data
        scale = "" if data.image_scale == 1 else f" at {data.image_scale:g} of full resolution"
        split = f" ({data.val_split})" if hasattr(data, "val_split") else ""
        place = f" {self.place}" if self.place else ""
        return f"{data.name}{place}{split}{scale}, partitions: {self.recipe.partition.protocol}"

    @property
    def partition(self) -> str:
        """Name of the partition: what the recipe says, with both counts."""
        metrics, labeled = self.runs[0].metrics, self.recipe.partition.labeled
        name = "" if labeled is None else f"{labeled}: "
        unlabeled = metrics["num_unlabeled"]
        return f"{name}{metrics['num_labeled']} / {'stream' if unlabeled is None else unlabeled}"

    @property
    def row_name(self) -> str:
        """The name without its partition, so that one method's partitions stand in one row."""
        partition = re.escape(str(self.recipe.partition.labeled).replace("/", "-"))
        return re.sub(rf"_{partition}(?=_|$)", "", self.label) + self._origin

    @property
    def _origin(self) -> str:
        return f" ({self.origin})" if self.origin else ""

    @property
    def num_labeled(self) -> int:
        """Labelled images."""
        return self.runs[0].metrics["num_labeled"]

    @property
    def mious(self) -> list[float]:
        """Val mIoU of the last weights, %, by seed."""
        return [run.metrics["miou"] for run in self.runs]

    @property
    def mean(self) -> float:
        """Mean val mIoU over the seeds, %."""
        return statistics.mean(self.mious)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the seeds; None of a single one."""
        return spread(self.mious)

    @property
    def of_teacher(self) -> float | None:
        """Mean over the seeds of the share of the better teacher's mIoU that ours is, %."""
        teachers = [better_teacher(run) for run in self.runs]
        if not all(teachers):  # one has no run beside it, or knows nothing
            return None
        return statistics.mean(100 * ours / theirs for ours, theirs in zip(self.mious, teachers, strict=True))


def better_teacher(run: FinishedRun) -> float | None:
    """Return the val mIoU (%) of a run's better teacher, if all are runs that can be found: by recipe, beside it."""
    found = []
    for teacher in run.recipe.teachers.values():
        place = Path(teacher.checkpoint or "")
        try:
            if teacher.recipe:
                trained = load(teacher.recipe, [f"run.seed={run.recipe.run.seed + teacher.seed_offset}"])
                place = run.folder.parent / trained.run_dir.name
            found.append(float(read_json(place / "metrics.json", ("miou",))["miou"]))
            if not same_data(run.seen, _seen(place)):
                return None
        except (UserError, TypeError, ValueError):  # nothing there, or not as a run wrote it
            return None
    return max(found, default=None)


def collect(sources: Iterable[str | Path]) -> tuple[list[Cell], list[str]]:
    """Read the finished runs below some folders.

    Args:
        sources: run folders, or folders that hold runs.

    Returns:
        Cells, and a line on each run that was left out.

    Raises:
        UserError: a source is no folder, or there is no finished run.
    """
    alike: dict[str, list[Cell]] = {}
    left_out: list[str] = []
    costs: dict[tuple, Mapping[str, Cost]] = {}
    folders, shut = _run_folders(sources)
    left_out += [f"{folder}: it may not be read" for folder in shut]
    for folder in folders:
        try:
            run, cost = _read_run(folder, costs)
        except UserError as error:
            left_out.append(f"{folder}: {str(error).splitlines()[0]}")
            continue
        try:
            run.metrics.update(read_unlabeled(folder))
        except UserError as error:
            left_out.append(str(error))
        label = run.recipe.run.name.replace("-s{seed}", "").replace("{seed}", "").strip("-_.")
        shape = {key: value for key, value in shaping_keys(run.recipe).items() if not _of_one_run(key)}
        # The same recipe may have met other images.
        counts = [run.metrics[f"num_{kind}"] for kind in ("labeled", "unlabeled", "val")]
        group = alike.setdefault(json.dumps([label, shape, counts], sort_keys=True), [])
        cell = next((cell for cell in group if all(same_data(run.seen, one.seen) for one in cell.runs)), None)
        if cell is None:
            group.append(cell := Cell(label, run.recipe, cost, []))
        twin = next((other.folder for other in cell.runs if other.recipe.seeds == run.recipe.seeds), None)
        if twin is None:
            cell.runs.append(run)
        else:
            left_out.append(f"{folder}: the same recipe and seeds as {twin}")
    cells = [cell for group in alike.values() for cell in group]
    if not cells:
        raise UserError("no finished run in " + ", ".join(map(str, sources)) + "".join(f"\n{x}" for x in left_out))
    for cell in cells:
        cell.runs.sort(key=lambda run: run.recipe.seeds)
    _name_places(cells)
    ordered = sorted(cells, key=lambda cell: (cell.title, cell.recipe.student.backbone, cell.label))
    _tell_apart(ordered)
    return ordered, left_out


def by_title(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Return the cells by the table that they belong to."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.title, []).append(cell)
    return groups


def _read_run(folder: Path, counted: dict[tuple, Mapping[str, Cost]]) -> tuple[FinishedRun, Mapping[str, Cost]]:
    """Read a finished run and count what its network costs, unless it is among what was `counted` before."""
    if not (folder / "metrics.json").exists():
        is_model = (folder / "config.json").exists()
        raise UserError("the folder of a model; name that of its run" if is_model else "not finished")
    recipe = load(folder / "recipe.toml")
    metrics = read_metrics(folder, recipe)
    num_classes, crop = len(recipe.data.class_names()), recipe.data.crop
    network = (recipe.student.model_dump_json(), num_classes, crop)
    if network not in counted:
        counted[network] = model_costs(recipe.student, num_classes, crop)
    return FinishedRun(folder, recipe, metrics, _seen(folder)), counted[network]


def _seen(run: Path) -> Seen | None:
    path = run / "partition.json"
    return read_manifest(path).seen() if path.exists() else None


def spread(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation; None of less than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def _run_folders(sources: Iterable[str | Path]) -> tuple[list[Path], list[Path]]:
    """Return the folders of runs, and those that may not be read."""
    folders, shut = [], []
    for source in map(Path, sources):
        if not source.is_dir():
            raise UserError(f"{source}: no such folder; give run folders, or a folder that holds runs")
        folders += _runs_below(source, 2, shut)
    found: dict[Path, Path] = {}  # one that is reached in two ways, say by a link, counts once
    for folder in sorted(folders, key=lambda folder: len(folder.parts)):
        found.setdefault(folder.resolve(), folder)
    once = set(found.values())
    return [folder for folder in dict.fromkeys(folders) if folder in once], shut


def _runs_below(folder: Path, depth: int, shut: list[Path]) -> list[Path]:
    try:
        if (folder / "recipe.toml").exists():
            return [folder]
        # Hidden: what `--restart` was deleting when it was killed.
        inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except PermissionError:
        shut.append(folder)
        return []
    return [run for path in inside if depth for run in _runs_below(path, depth - 1, shut)]


def _of_one_run(key: str) -> bool:
    return key in _OF_ONE_RUN or (key.startswith("teachers.") and key.endswith(".checkpoint"))


def _name_places(cells: Sequence[Cell]) -> None:
    own = [cell for cell in cells if not type(cell.recipe.data).same_everywhere]
    placed = [cell for cell in own if getattr(cell.recipe.data, "root", None)]
    names = collections.Counter(Path(root).name for root in {absolute(cell.recipe.data.root) for cell in placed})
    for cell in placed:
        root = absolute(cell.recipe.data.root)
        cell.place = Path(root).name if names[Path(root).name] == 1 else os.path.relpath(root)


def _tell_apart(cells: Sequence[Cell]) -> None:
    labels = [cell.label for cell in cells]
    for cell in cells:
        if labels.count(cell.label) > 1:
            cell.origin = str(cell.runs[0].folder)
