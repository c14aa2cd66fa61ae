"""Partitions: which training images are labelled, and which only seen."""

import dataclasses
import hashlib
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from mgd.data.lists import match, own_lists, public_lists
from mgd.errors import UserError, some
from mgd.files import read_json
from mgd.sections import Partition
from mgd.tables import labeled_amount


@dataclasses.dataclass(frozen=True)
class ResolvedPartition:
    """Which images a run reads as what, and what was found when they were read."""

    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Images that cannot be used -> why; they stand in neither list."""
    streamed: bool = False
    """The unlabelled images are a stream; `num_streamed` of them, where that is known."""
    num_streamed: int | None = None
    pool: str = ""
    """Identity of the files of [data.unlabeled]."""
    val: tuple[str, ...] = ()
    """Ids of the images to evaluate on, once they have been read."""
    class_pixels: tuple[int, ...] = ()
    """Labelled pixels of each class, likewise."""
    masks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """CRC-32 of the masks that are files: id (of `val`: `val_key`) -> sum."""

    @property
    def num_unlabeled(self) -> int | None:
        """Unlabelled images; None for a stream of unknown length."""
        return self.num_streamed if self.streamed else len(self.unlabeled)

    @property
    def unlabeled_text(self) -> str:
        """How many unlabelled images there are, for a message."""
        if not self.streamed:
            return str(len(self.unlabeled))
        return "a stream of " + ("unknown length" if self.num_streamed is None else str(self.num_streamed))

    def manifest(self, section: Partition, seed: int) -> dict:
        """Return what `partition.json` holds: how it was drawn, both counts, both lists."""
        return {
            "protocol": section.protocol,
            "labeled_wanted": section.labeled,
            "balanced": section.balanced,
            "seed": seed,
            "num_labeled": len(self.labeled),
            "num_unlabeled": self.num_unlabeled,
            "labeled": list(self.labeled),
            "unlabeled": list(self.unlabeled),
            "skipped": dict(self.skipped),
            "pool": self.pool,
            "val": list(self.val),
            "masks": dict(self.masks),
        }


def val_key(name: str) -> str:
    """Return how a validation image is named among others, as training images may have the same ids."""
    return f"validation: {name}"


class Manifest(BaseModel):
    """What is read again of `partition.json`, see `ResolvedPartition`; what an older run did not write has defaults."""

    model_config = ConfigDict(strict=True)
    labeled: list[str]
    unlabeled: list[str]
    skipped: dict[str, str] = {}
    pool: str = ""
    val: list[str] | None = None
    masks: dict[str, int] = {}
    teachers: dict[str, str] = {}
    """Fingerprints of the teachers' weights by name."""

    def seen(self) -> "Seen":
        """Return what tells its data from others'."""
        return Seen(_sum(self.labeled), None if self.val is None else _sum(self.val), self.masks)

    def differs(self, now: Mapping[str, Collection[str]], counts_unlabeled: bool) -> str:
        """Say how the images of a run differ from what they would be now; nothing if they do not.

        Args:
            now: `labeled`, `unlabeled` and `val`: ids.
            counts_unlabeled: whether other unlabelled images make another run.

        Returns:
            Counts then and now, and the first names; of `val` nothing if an older run did not keep it.
        """
        named = {
            "labelled": (self.labeled, now["labeled"]),
            "unlabelled": (self.unlabeled if counts_unlabeled else None, now["unlabeled"]),
            "to evaluate on": (self.val, now["val"]),
        }
        lists = {words: (set(then), set(here)) for words, (then, here) in named.items() if then is not None}
        other = sorted(set().union(*(then ^ here for then, here in lists.values())))
        if not other:
            return ""
        before, after = (" / ".join(str(len(pair[side])) for pair in lists.values()) for side in (0, 1))
        return f"{' / '.join(lists)}: {before} then, {after} now; differing: {some(other)}"


def read_manifest(path: Path) -> Manifest:
    """Read the `partition.json` of a run.

    Raises:
        UserError: it cannot be read, or is not as a run wrote it.
    """
    try:
        return Manifest.model_validate(read_json(path, ()))
    except ValidationError as error:
        wrong = error.errors()[0]
        what = f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}"
        raise UserError(f"{path} is damaged: {what}; delete it, or start over with --restart") from error


def repainted(then: Mapping[str, int], now: Mapping[str, int]) -> list[str]:
    """Return which masks, of those known then (`ResolvedPartition.masks`), are others now."""
    return [name for name, found in now.items() if then.get(name, found) != found]


class Seen(NamedTuple):
    """What a run was shown: sums of the names of its labelled and val images, and of the masks that are files."""

    labeled: int
    val: int | None
    """None: an older run did not keep it."""
    masks: Mapping[str, int]
    """See `ResolvedPartition.masks`."""


def same_data(one: Seen | None, other: Seen | None) -> bool:
    """Whether two runs were evaluated on the same images, and every mask that both know is the same.

    Args:
        one: what the one was shown; None: nothing is known of it.
        other: likewise.
    """
    if one is None or other is None:
        return True
    if one.val is not None and other.val is not None and one.val != other.val:
        return False
    return not repainted(one.masks, other.masks)


def _sum(names: Iterable[str]) -> int:
    return zlib.crc32("\n".join(sorted(names)).encode())


def split(
    section: Partition,
    with_mask: Sequence[str],
    without_mask: Sequence[str],
    seed: int,
    presence: Mapping[str, np.ndarray] | None = None,
    data_name: str = "",
    pool: Sequence[str] = (),
    held_out: Collection[str] = (),
) -> ResolvedPartition:
    """Divide the training images, by lists or by a draw.

    Args:
        section: the recipe's `[partition]`.
        with_mask: ids that could be labelled.
        without_mask: ids that cannot; unlabelled, or with lists only where they name them.
        seed: seed of the draw.
        presence: id -> `[K]` bool, the classes an image shows; needed for a balanced choice.
        data_name: the data set, which chooses among the public lists.
        pool: those of `without_mask` that are unlabelled whatever the lists say.
        held_out: ids of the images to evaluate on, which no list may name.

    Raises:
        UserError: more labels wanted than there are masks, no masks at all, or lists that do not
            fit the data.
    """
    if not with_mask:
        raise UserError("no training image has a mask; a run needs at least one labelled image")
    if section.protocol != "random":
        listed = _by_lists(section, with_mask, without_mask, data_name, held_out)
        return dataclasses.replace(listed, unlabeled=tuple(sorted({*listed.unlabeled, *pool})))
    wanted = labeled_amount(section.labeled, len(with_mask))
    if wanted > len(with_mask):
        raise UserError(
            f"[partition] labeled = {section.labeled}: the training set has only {len(with_mask)} images with a mask"
        )
    order = draw(with_mask, seed)
    chosen = _balanced(order, wanted, presence) if section.balanced else order[:wanted]
    rest = set(with_mask) - set(chosen)
    return ResolvedPartition(labeled=tuple(sorted(chosen)), unlabeled=tuple(sorted(rest | set(without_mask))))


def draw(names: Iterable[str], seed: int) -> list[str]:
    """Order ids by SHA-256 of seed and id: the same on every machine and version; a share is the first of them."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())


def _by_lists(
    section: Partition,
    with_mask: Sequence[str],
    without_mask: Sequence[str],
    data_name: str,
    held_out: Collection[str],
) -> ResolvedPartition:
    lists = own_lists(section) if section.protocol == "files" else public_lists(section, data_name)
    where = section.labeled_list or f"the {section.protocol} list {section.labeled}"
    everything = {*with_mask, *without_mask}
    labeled = match(lists[0], everything, f"{where} (labelled)", held_out)
    if bare := sorted(set(labeled) - set(with_mask)):
        raise UserError(
            f"{where} (labelled): {len(bare)} of {len(labeled)} images have no mask: {some(bare)}; give them "
            "one, or take them off the list"
        )
    unlabeled = match(lists[1], everything, f"{section.unlabeled_list or where} (unlabelled)", held_out)
    both = sorted(set(labeled) & set(unlabeled))
    if both and section.protocol == "files":
        raise UserError(f"{where}: {both[0]} stands in both lists")
    # One public list (PseudoSeg, 1/16) names a labelled image among the unlabelled; it is labelled.
    return ResolvedPartition(labeled=tuple(sorted(labeled)), unlabeled=tuple(sorted(set(unlabeled) - set(both))))


def _balanced(drawn: Sequence[str], wanted: int, presence: Mapping[str, np.ndarray]) -> list[str]:
    """Take, again and again, the first drawn image that shows the class seen least so far."""
    shows = np.stack([presence[name] for name in drawn])  # [N, K]
    left, remaining, seen = np.ones(len(drawn), bool), shows.sum(axis=0), np.zeros(shows.shape[1], np.int64)
    chosen: list[str] = []
    while len(chosen) < wanted:
        if not remaining.any():
            chosen += [drawn[index] for index in np.flatnonzero(left)[: wanted - len(chosen)]]
            break
        rarest = int(np.argmin(np.where(remaining, seen, np.iinfo(np.int64).max)))
        pick = int(np.argmax(left & shows[:, rarest]))
        left[pick] = False
        chosen.append(drawn[pick])
        seen += shows[pick]
        remaining -= shows[pick]
    return chosen
