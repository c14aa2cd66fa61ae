"""Whether a run is finished, and still stands for the images and masks that it was trained on."""

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

from mgd.data.images import Images, mask_sums
from mgd.data.partitions import read_manifest, repainted, val_key
from mgd.data.reading import load_splits, select_ids, split_data, without_augmentation
from mgd.data.stream import identity
from mgd.errors import UserError, some
from mgd.recipe import Recipe
from mgd.runs import finished_metrics, is_here
from mgd.sections import DataSection


def all_finished(recipes: Mapping[str, Recipe]) -> dict[str, dict[str, Any] | None]:
    """Return what `finished` does of several recipes, by their names.

    Raises:
        UserError: of all that cannot be taken as they are, a line each: every one takes a command, and time.
    """
    found, stale = {}, []
    for name, recipe in recipes.items():
        try:
            found[name] = finished(recipe)
        except UserError as error:
            stale.append(str(error))
    if stale:
        raise UserError("\n".join(dict.fromkeys(stale)))  # several may share a run
    return found


def finished(recipe: Recipe) -> dict[str, Any] | None:
    """Return metrics.json of a finished run of this very recipe on its images as they are now, or None.

    Raises:
        UserError: the folder holds a run of another recipe, or of other images, or these are there and wrong.
    """
    done = finished_metrics(recipe)
    path = recipe.run_dir / "partition.json"
    if done is None or not path.exists():
        return done
    there, pool = read_manifest(path), recipe.data.unlabeled
    try:
        splits = load_splits(recipe.data)
        drawn = split_data(recipe.data, recipe.partition, recipe.partition_seed)
        same_pool = pool is None or identity(pool) == there.pool
    except UserError as error:
        if is_here(recipe):
            raise UserError(
                f"{recipe.run_dir} is finished, but what it learned from cannot be read: {error}"
            ) from error
        return done  # a result outlives its images; whoever needs them is told so
    counts_unlabeled = recipe.depends_on_unlabeled
    pool_ids = drawn.unlabeled if counts_unlabeled else ()
    skipped = _still_unusable(without_augmentation(recipe.data), drawn.labeled, pool_ids, left_out=tuple(there.skipped))
    labeled, unlabeled = set(drawn.labeled) - skipped, set(drawn.unlabeled) - skipped
    val = {name for name in splits.val["id"] if val_key(name) not in skipped}
    now = {"labeled": labeled, "unlabeled": set() if pool and pool.streaming else unlabeled, "val": val}
    differing = [there.differs(now, counts_unlabeled)]
    differing += ["another [data.unlabeled]"] if counts_unlabeled and not same_pool else []
    if any(differing):
        raise UserError(
            f"{recipe.run_dir} was trained on other images than [data] and [partition] name now "
            f"({', '.join(filter(None, differing))}); {_ways_out(recipe)}"
        )
    if not there.masks:  # none is a file, or an older run: no need to read them
        return done
    with contextlib.suppress(OSError):
        masks = mask_sums(select_ids(splits.labeled, labeled), select_ids(splits.val, val))
        if painted := repainted(there.masks, masks):
            raise UserError(
                f"{recipe.run_dir} learned from other masks than there are now: {some(painted)}; {_ways_out(recipe)}"
            )
    return done


@functools.lru_cache(maxsize=32)  # a finished run is asked about again and again
def _still_unusable(
    section: DataSection, labeled: tuple[str, ...], unlabeled: tuple[str, ...], left_out: tuple[str, ...]
) -> frozenset[str]:
    """Return which of the images that a run left out, as `ResolvedPartition.skipped` names them, are unusable now, too.

    Args:
        section: the data.
        labeled: training images whose masks a run would read now.
        unlabeled: those that it would read without.
        left_out: then.
    """
    splits, found = load_splits(section), set()
    val = [name for name in splits.val["id"] if val_key(name) in left_out]
    for source, ids, with_label, key in (
        (splits.labeled, set(labeled).intersection(left_out), True, str),
        (splits.without_masks(), set(unlabeled).intersection(left_out), False, str),
        (splits.val, val, True, val_key),
    ):
        images = Images(select_ids(source, ids), splits.decoder, section.image_scale)
        for index, name in enumerate(images.ids):
            try:
                images.read(index, with_label)
            except UserError:
                found.add(key(name))
    return frozenset(found)


def _ways_out(recipe: Recipe) -> str:
    """What to do with a finished run whose images or masks are others now."""
    needs = recipe.eval.baselines or any(teacher.recipe for teacher in recipe.teachers.values())
    after = ", after its teachers and baselines" if needs else ""
    return (
        "keep it and write elsewhere (--set run.output=..., where teachers and baselines follow), or train it "
        f"anew{after}: {recipe.command} --restart"
    )
