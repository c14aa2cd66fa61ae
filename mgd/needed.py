"""What else a recipe needs: its teachers and baselines, by recipes of their own or by their weights."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import nn

from mgd.data.partitions import read_manifest
from mgd.errors import UserError
from mgd.finished import all_finished
from mgd.models.saved import find_model
from mgd.models.segmenter import Segmenter, load_segmenter
from mgd.recipe import FREE_KEYS, Recipe, load
from mgd.runs import OF_ALL, comparable_keys, find_partition, recipe_differences, with_places
from mgd.sections import Partition

# More overrides of a student that its teachers and baselines take over, and those that its baselines alone do.
_HOW_RUN = ("run.checkpoint_every", "run.log_every", "run.threads", "run.compile")
_OF_BASELINES = ("student.", "optim.", "eval.", "method.ohem", "method.class_balance")


def needed_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """Load the recipes of the teachers and baselines of a student.

    They take over its seed, partition, output folder and tracker, and its `--set`s of data, partition and of how
    a run is done; a baseline, being the same student, those of student, optim, eval, OHEM and class balance too.

    Returns:
        Teachers by their name, baselines as "baseline FILE".

    Raises:
        UserError: one of them sees other labels, is evaluated otherwise as a baseline, or has teachers itself.
    """
    wanted = {name: (given.recipe, given.seed_offset) for name, given in recipe.teachers.items() if given.recipe}
    wanted |= {f"baseline {path}": (path, 0) for path in recipe.eval.baselines}
    needed = {}
    for title, (path, seed_offset) in wanted.items():
        is_baseline = title not in recipe.teachers
        seed = recipe.run.seed + seed_offset
        if seed < 0:
            raise UserError(
                f"[teachers.{title}] seed_offset = {seed_offset}: run.seed = {recipe.run.seed} is too small"
            )
        shared = (*OF_ALL, *_HOW_RUN, *(_OF_BASELINES if is_baseline else ()))
        overrides = [override for override in recipe.overrides if override.startswith(shared)]
        overrides.append(f"run.seed={seed}")
        overrides.append(f"partition.seed={recipe.partition_seed}")
        overrides.append(f"run.output={json.dumps(recipe.run.output, ensure_ascii=False)}")
        if recipe.run.tracker:
            overrides.append(f"run.tracker={recipe.run.tracker}")
        if is_baseline and any(override.startswith("run.name=") for override in recipe.overrides):
            overrides.append(f"run.name={recipe.run.name}-{Path(path).stem}")
        needed[title] = load(path, overrides)
        if needed[title].teachers or (needed[title].is_distilled and not is_baseline):
            raise UserError(f"{recipe.source}: {title} ({path}) has teachers of its own; only one level is trained")
        check_comparable(recipe, needed[title], title, is_baseline)
    check_folders({"this run": recipe, **needed})
    return needed


def check_folders(recipes: Mapping[str, Recipe]) -> None:
    """Check that no two different recipes would write one folder.

    Args:
        recipes: by what a message shall call them.

    Raises:
        UserError: naming both, in what they differ, and the folder.
    """
    owners: dict[Path, tuple[str, Recipe]] = {}
    for title, recipe in recipes.items():
        other, owner = owners.setdefault(recipe.run_dir.resolve(), (title, recipe))
        if owner is not recipe and (differences := recipe_differences(owner.to_dict(), recipe)):
            raise UserError(
                f"{other} ({owner.source}) and {title} ({recipe.source}) would share the folder {recipe.run_dir} "
                f"({'; '.join(differences[:4])}); give each its own [run] name, with {{seed}} in it if only the seed "
                "differs"
            )


def check_comparable(recipe: Recipe, other: Recipe, title: str, is_baseline: bool) -> None:
    """Refuse to distil from a run that sees other labels, and a baseline that is another student.

    Args:
        recipe: of the student.
        other: of the teacher or baseline.
        title: what to call it in messages.
        is_baseline: which of the two it is.

    Raises:
        UserError: a key that must agree does not, naming it and both values.
    """
    if is_baseline:
        keys = comparable_keys(recipe).keys() | comparable_keys(other).keys()
        agree = {tuple(key.split(".")[:2]) for key in keys}
        way_out = """, or leave it out: --set 'eval.baselines=[]'"""
    else:
        agree = {("partition", key) for key in Partition.model_fields if f"partition.{key}" not in FREE_KEYS}
        agree |= {("data", key) for key in ("name", "image_scale", *type(recipe.data).image_keys())}
        way_out = ", or name the teacher by checkpoint = its folder"
    if other.method_class.uses_unlabeled:
        agree.add(("data", "unlabeled"))
    mine, theirs = with_places(recipe.to_dict()), with_places(other.to_dict())
    for section, key in sorted(agree):
        here, there = mine[section].get(key), theirs[section].get(key)
        if here != there:
            here, there = ("nothing" if value is None else repr(value) for value in (here, there))
            raise UserError(
                f"{recipe.source}: {title} ({other.source}) must agree in [{section}] {key}, but has {there}, "
                f"here {here}; make them equal{way_out}"
            )


def folders_of(recipe: Recipe, needed: Mapping[str, Recipe]) -> list[Path]:
    """Return the folders that another process must not be writing when a run starts.

    Args:
        recipe: of the run.
        needed: its teachers and baselines, see `needed_recipes`.
    """
    given = [Path(teacher.checkpoint) for teacher in recipe.teachers.values() if teacher.checkpoint]
    given = [path.parent if (path := find_partition(folder)) else folder for folder in given]  # of a run its folder
    own = [recipe.run_dir, *([recipe.cache_dir] if recipe.cache else [])]
    return [*own, *(other.run_dir for other in needed.values()), *given]


def refuse_students(recipe: Recipe) -> None:
    """Refuse a teacher, given by its weights, that is itself a distilled student.

    Raises:
        UserError: naming the teacher and what it is.
    """
    for name, teacher in recipe.teachers.items():
        if teacher.checkpoint is None:
            continue
        path = find_model(teacher.checkpoint, weights=False) / "recipe.toml"
        if path.is_file() and _is_distilled(path):
            raise UserError(
                f"[teachers.{name}] checkpoint = {teacher.checkpoint!r} is itself a student of teachers; name one "
                "that was trained without (to distil from it on purpose, copy its model.safetensors and "
                "config.json alone to another folder)"
            )


def _is_distilled(path: Path) -> bool:
    """Whether a recipe is a student's; not known of one that cannot be read here, as of a plug-in that is missing."""
    try:
        return load(path).is_distilled
    except UserError:
        return False


def refuse_untrained(teachers: Mapping[str, Recipe]) -> None:
    """Refuse teachers that are not trained.

    Raises:
        UserError: one line a teacher, with its command.
    """
    done = all_finished(teachers)
    if missing := {name: other for name, other in teachers.items() if not done[name]}:
        raise UserError(
            "\n".join(f"[teachers.{name}] is not trained: {other.command}" for name, other in missing.items())
        )


def trained_teachers(recipe: Recipe) -> dict[str, Segmenter]:
    """Load the teachers of a student, all of which must be trained.

    Raises:
        UserError: one is not trained, or cannot be read; see also `needed_recipes`.
    """
    needed = {name: other for name, other in needed_recipes(recipe).items() if name in recipe.teachers}
    refuse_untrained(needed)
    return {
        name: load_segmenter(teacher.checkpoint or needed[name].run_dir) for name, teacher in recipe.teachers.items()
    }


def note_other_scale(network: nn.Module, title: str, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Say that a network sees images at another scale than it was trained at.

    Args:
        network: segmenter.
        title: what to call it.
        recipe: whose images it sees.
        say: prints a line.
    """
    if network.image_scale != recipe.data.image_scale:
        say(
            f"note: {title} learned from images at {network.image_scale:g} of their size and sees these "
            f"at {recipe.data.image_scale:g} ([data] image_scale)"
        )


def note_other_data(
    recipe: Recipe,
    given: Mapping[str, nn.Module],
    labeled: Iterable[str],
    val: Iterable[str],
    say: Callable[[str], None],
) -> None:
    """Say what a teacher that is given by its weights saw otherwise than this run does.

    Args:
        recipe: of the student.
        given: the loaded networks of those teachers, by name.
        labeled: ids of the labelled images of this run.
        val: ids of the images that it is evaluated on.
        say: prints a line.
    """
    for name, network in given.items():
        note_other_scale(network, f"[teachers.{name}]", recipe, say)
        path = find_partition(recipe.teachers[name].checkpoint)
        if path is None:
            continue
        known = set(read_manifest(path).labeled)
        if hidden := known.difference(labeled, val):
            say(f"note: [teachers.{name}] learned from {len(hidden)} labels that this run does not see")
        if leaked := known.intersection(val):
            say(
                f"note: [teachers.{name}] learned from the labels of {len(leaked)} of the validation images; a student "
                "of it cannot be judged on them"
            )
