"""The frozen teachers run once over all training images; what they predict is kept for any number of students."""

import contextlib
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from mgd.data.images import Images, read_each
from mgd.data.targets import (
    FINE_CELL,
    FORMAT,
    IMAGES_PER_SHARD,
    OF_CELLS,
    CachedTargets,
    digest,
    serves,
    shard_path,
    write_shard,
)
from mgd.errors import UserError, explained
from mgd.files import read_json, write_json
from mgd.inference import views
from mgd.locks import hold
from mgd.models.segmenter import fingerprint
from mgd.pictures import to_tensor
from mgd.progress import progress_bar
from mgd.recipe import Recipe
from mgd.sections import TeacherCache


def cached_targets(
    recipe: Recipe, accelerator: Accelerator, teachers: Mapping[str, nn.Module], images: Images, restart: bool = False
) -> CachedTargets:
    """Return the cache of a recipe, with what it lacks predicted first; called on all processes.

    Args:
        recipe: its `[cache]`, and which teachers its losses ask for what.
        accelerator: device, processes and precision.
        teachers: loaded networks by name.
        images: every image that the run may read.
        restart: write it anew.

    Raises:
        UserError: the folder holds the predictions of other teachers, for other images or by other settings; or
            a teacher cannot see whole images.
    """
    folder = recipe.cache_dir
    kinds = recipe.method_class.cached_kinds(recipe.method)
    sums = _checksums(images, recipe.data.workers, accelerator)
    wanted = {
        "format": FORMAT,
        "ids": list(images.ids),
        "checksums": sums,
        "image_scale": recipe.data.image_scale,
        **recipe.cache.model_dump(mode="json", exclude={"folder"}),
        "precision": accelerator.mixed_precision,
        "teachers": {name: {"weights": fingerprint(teachers[name]), "kinds": sorted(kinds[name])} for name in kinds},
    }
    manifest, missing = wanted, []
    with contextlib.ExitStack() as held:
        if accelerator.is_main_process:
            if not restart and (whole := _whole(folder, recipe)):  # is only read, by any number of runs at once
                manifest = whole
                _refuse_unfit(folder, whole, wanted, False, recipe)
            else:
                held.enter_context(hold(folder, "or give the cache another folder: --set cache.folder=..."))
                manifest, missing = _open_folder(folder, wanted, recipe, restart)
        manifest, missing = gather_object([(manifest, missing)])[0]  # as the main process saw it
        if missing:
            _fill(folder, manifest, missing, teachers, images, recipe, accelerator)
    return CachedTargets(folder, manifest, kinds, recipe.command_of("cache_teachers"))


class _Teacher(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    weights: str
    kinds: list[str]


class _Manifest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    ids: Annotated[list[str], Field(min_length=1)]
    checksums: list[int]
    teachers: dict[str, _Teacher]


def _read_manifest(path: Path, recipe: Recipe) -> dict[str, Any]:
    try:
        found = read_json(path, ("format",))
        checked = _Manifest.model_validate(found)
        if len(checked.ids) != len(checked.checksums):
            raise ValueError("as many checksums as ids")
    except (UserError, ValueError) as error:
        remedy = f"write the cache anew: {recipe.command_of('cache_teachers')} --restart"
        raise UserError(f"{path} cannot be used, it is damaged or no manifest of a cache; {remedy}") from error
    return found


def _missing(folder: Path, manifest: Mapping[str, Any]) -> list[int]:
    """Numbers of the shards that are not there, or cannot serve."""
    numbers, sought = range(-(-len(manifest["ids"]) // IMAGES_PER_SHARD)), digest(manifest)
    return [number for number in numbers if not serves(shard_path(folder, number), sought)]


def _whole(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """Return the manifest of a cache that lacks nothing, or None."""
    path = folder / "manifest.json"
    there = _read_manifest(path, recipe) if path.exists() else None
    return None if there is None or _missing(folder, there) else there


def _open_folder(
    folder: Path, wanted: Mapping[str, Any], recipe: Recipe, restart: bool
) -> tuple[Mapping[str, Any], list[int]]:
    """Return the manifest of the cache that is there, if it serves, else begin one; and the shards that it lacks."""
    path = folder / "manifest.json"
    if restart:
        _clear(folder)
    if not path.exists():
        if folder.exists() and any(not other.name.startswith(".") for other in folder.glob("*")):
            raise UserError(f"{folder} holds files and no manifest.json; name another: --set cache.folder=...")
        write_json(path, wanted)
        return wanted, _missing(folder, wanted)
    there = _read_manifest(path, recipe)
    missing = _missing(folder, there)
    _refuse_unfit(folder, there, wanted, bool(missing), recipe)
    for torn in folder.glob(".shard-*") if missing else ():
        torn.unlink()
    return there, missing


def _refuse_unfit(
    folder: Path, there: Mapping[str, Any], wanted: Mapping[str, Any], is_to_be_filled: bool, recipe: Recipe
) -> None:
    if problems := _unfit(there, wanted, is_to_be_filled):
        raise UserError(
            f"{folder} does not fit this run: {'; '.join(problems)}. Keep both: "
            f'--set "cache.folder=NAME-s{{seed}}", or write it anew: {recipe.command_of("cache_teachers")} --restart'
        )


def _clear(folder: Path) -> None:
    """Delete the files of a cache; none of them if something else lies in their place.

    Raises:
        UserError: something else lies in their place.
    """
    old = [*folder.glob("shard-*.safetensors"), *folder.glob(".shard-*"), *folder.glob("manifest.json")]
    if odd := [path for path in [folder, *old] if path.exists() and path.is_dir() != (path == folder)]:
        raise UserError(f"{odd[0]} is no part of a cache; move it away, or name another: --set cache.folder=...")
    try:
        for path in old:  # the manifest last: what is there can still be told
            path.unlink()
    except OSError as error:
        raise UserError(f"{error.filename} cannot be deleted: {error.strerror}") from error


def _unfit(there: Mapping[str, Any], wanted: Mapping[str, Any], is_to_be_filled: bool) -> list[str]:
    """Say why a cache does not serve. Once whole, what nobody reads does no harm: more images, teachers, kinds."""
    of_cells = any({*OF_CELLS} & {*teacher["kinds"]} for teacher in wanted["teachers"].values())
    unread = {"precision"} if of_cells else {"precision", "cell"}
    apart = {"ids", "checksums", "teachers"} | (set() if is_to_be_filled else unread)
    differing = [key for key in wanted.keys() - apart if there.get(key) != wanted[key]]
    problems = [f"{key} is {str(there.get(key))[:40]}, not {wanted[key]!r}" for key in differing]
    known = dict(zip(there["ids"], there["checksums"], strict=True))
    pairs = list(zip(wanted["ids"], wanted["checksums"], strict=True))
    if missing := [name for name, _ in pairs if name not in known]:
        problems.append(f"it lacks {len(missing)} images ({missing[0]}, ...)")
    if changed := [name for name, checksum in pairs if known.get(name, checksum) != checksum]:
        problems.append(f"{len(changed)} images have changed ({changed[0]}, ...)")
    for name, teacher in wanted["teachers"].items():
        other = there["teachers"].get(name)
        if other is None or other["weights"] != teacher["weights"]:
            problems.append(f"[teachers.{name}] is another network than the cached one")
        elif lacking := sorted(set(teacher["kinds"]) - set(other["kinds"])):
            problems.append(f"it lacks {', '.join(lacking)} of [teachers.{name}]")
    if is_to_be_filled and (there["teachers"].keys() - wanted["teachers"].keys() or known.keys() - set(wanted["ids"])):
        problems.append("it was begun for more images or teachers, and is not complete")
    return sorted(problems)


def _fill(
    folder: Path,
    manifest: Mapping[str, Any],
    missing: list[int],
    teachers: Mapping[str, nn.Module],
    images: Images,
    recipe: Recipe,
    accelerator: Accelerator,
) -> None:
    """Write the shards that are missing, each process its share."""
    kinds = {name: {*teacher["kinds"]} for name, teacher in manifest["teachers"].items()}
    networks = {name: teachers[name].to(accelerator.device).eval() for name in kinds}
    sought, ids, place = digest(manifest), manifest["ids"], {name: index for index, name in enumerate(images.ids)}
    lacking = {
        number: range(number * IMAGES_PER_SHARD, min((number + 1) * IMAGES_PER_SHARD, len(ids))) for number in missing
    }
    shards = {number: lacking[number] for number in missing[accelerator.process_index :: accelerator.num_processes]}
    order = [place[ids[index]] for shard in shards.values() for index in shard]
    count = sum(map(len, lacking.values()))
    accelerator.print(f"{folder}: asking {', '.join(kinds)} about {count} images", flush=True)
    decoded = read_each(images, order, _pixels, recipe.data.workers)
    bar = progress_bar(accelerator.is_main_process, total=len(order), desc=f"{folder.name}: teachers", unit="img")
    with bar, accelerator.autocast(), torch.inference_mode():
        for number, shard in shards.items():
            tensors = {}
            for index in shard:
                image = next(decoded)[None].to(accelerator.device)
                for name, network in networks.items():
                    seen = _targets(network, image, recipe.cache, kinds[name], f"[teachers.{name}]", ids[index])
                    tensors |= {f"{index}/{name}/{kind}": tensor.cpu().contiguous() for kind, tensor in seen.items()}
                bar.update()
            write_shard(folder, number, sought, tensors)
    for network in networks.values():
        network.cpu()
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)  # the memory of the run that follows is its own
    accelerator.wait_for_everyone()


def _targets(
    network: nn.Module, image: Tensor, section: TeacherCache, kinds: set[str], title: str, name: str
) -> dict[str, Tensor]:
    """Predict the `kinds` of one image `[1, 3, H, W]`; see mgd/data/targets.py for what they are."""
    size = image.shape[-2:]
    coarse = [-(-side // section.cell) for side in size]
    sums, count = dict.fromkeys({"logits", *kinds & {"features"}}, 0.0), 0
    for view, mirrored in views(image, section.scales, section.flip):
        problem = f"{title} cannot see the whole of {name}, {view.shape[-1]}x{view.shape[-2]} pixels"
        with explained(problem, 'use [teachers] mode = "online" (or, where memory is short, smaller [cache] scales)'):
            seen = network(view)
        maps = [value.flip(-1) if mirrored else value for value in seen]
        sums["logits"] += functional.interpolate(maps[0].float(), size=size, mode="bilinear", align_corners=False)
        if "features" in sums:
            sums["features"] += functional.interpolate(maps[1].float(), size=coarse, mode="area")
        count += 1
    means = {what: total / count for what, total in sums.items()}
    found = {kind: _stored(kind, value[0]) for kind, value in kept(kinds, **means, cell=section.cell).items()}
    if not all(value.isfinite().all() for value in (means["logits"], *found.values())):
        raise UserError(f"{title} predicts values for {name} that are no number, or too large; train it anew")
    return found


def kept(kinds: Collection[str], logits: Tensor, features: Tensor | None = None, *, cell: int) -> dict[str, Tensor]:
    """Return what a cache keeps of a teacher's outputs, before it is rounded.

    Args:
        kinds: what is wanted; see mgd/data/targets.py.
        logits: `[B, K, H, W]`.
        features: `[B, C, h, w]`, if they are wanted.
        cell: side of the cells over which `logits` and `features` are averaged, pixels of the image.

    Returns:
        A tensor of B images a kind.
    """
    size = logits.shape[-2:]
    coarse, fine = ([-(-side // divisor) for side in size] for divisor in (cell, FINE_CELL))
    makes = {
        "labels": lambda: logits.argmax(dim=1),
        # In the middle of each cell: a head of stride 4 is smoothed half as much as by means.
        "fine_logits": lambda: functional.interpolate(logits, size=fine, mode="bilinear", align_corners=False),
        "probabilities": lambda: functional.interpolate(logits.softmax(dim=1), size=fine, mode="area"),
        "logits": lambda: functional.interpolate(logits, size=coarse, mode="area"),
        "features": lambda: functional.interpolate(features.float(), size=coarse, mode="area"),
    }
    return {kind: makes[kind]() for kind in kinds}


def _stored(kind: str, value: Tensor) -> Tensor:
    """Round what is kept to the type in which it is stored."""
    if kind == "labels":
        return value.to(torch.uint8)
    return (value * 255).round().to(torch.uint8) if kind == "probabilities" else value.half()


def _pixels(images: Images, index: int) -> Tensor:
    return to_tensor(images.picture(index))


def _checksum(images: Images, index: int) -> int:
    return zlib.crc32(images.encoded(index))


def _checksums(images: Images, workers: int, accelerator: Accelerator) -> list[int]:
    """CRC-32 of every image's file, each process its share."""
    rank, world_size = accelerator.process_index, accelerator.num_processes
    share = list(range(rank, len(images), world_size))
    found = gather_object(list(zip(share, map(int, read_each(images, share, _checksum, workers)), strict=True)))
    return [checksum for _, checksum in sorted(found)]
