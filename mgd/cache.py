"""The frozen teachers run once over all training images; what they predict is kept for any number of students."""

import contextlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mgd.data.loaders import Images, TrainingPairs, available_cpus, start_worker
from mgd.data.targets import CONFIDENCE_STRIDE, FORMAT, IMAGES_PER_SHARD, CachedTargets, shard_path, write_shard
from mgd.data.transforms import IGNORE_INDEX, to_tensor
from mgd.errors import UserError
from mgd.files import read_json, write_json
from mgd.losses.mgd import self_correlation
from mgd.models.segmenter import fingerprint
from mgd.recipe import Recipe, TeacherCache
from mgd.registry import METHODS
from mgd.runs import hold


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
    kinds = METHODS.get(recipe.method.name).cached_kinds(recipe.method)
    grid, parts = recipe.method.region.grid, -(-recipe.data.crop // recipe.cache.cell)
    if parts < grid and any("features" in of_one for of_one in kinds.values()):
        raise UserError(
            f"[cache] cell = {recipe.cache.cell} divides a crop of {recipe.data.crop} into {parts} parts a side, and "
            f"[method.region] grid = {grid}; cell must be at most {max(4, recipe.data.crop // grid)}"
        )
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
    whole = not restart and _is_whole(folder)
    # One that is whole is only read, by any number of runs at once.
    with hold(folder) if accelerator.is_main_process and not whole else contextlib.nullcontext():
        manifest = _open_folder(folder, wanted, recipe, restart) if accelerator.is_main_process else wanted
        manifest = gather_object([manifest])[0]
        if not whole:
            _fill(folder, manifest, teachers, images, recipe.cache, recipe.data.workers, accelerator)
    return CachedTargets(folder, manifest, kinds)


def _is_whole(folder: Path) -> bool:
    """Whether every shard is there."""
    path = folder / "manifest.json"
    if not path.exists():
        return False
    count = len(read_json(path, ("ids",))["ids"])
    return all(shard_path(folder, number).exists() for number in range(-(-count // IMAGES_PER_SHARD)))


def compare(
    targets: CachedTargets,
    teachers: Mapping[str, nn.Module],
    pairs: TrainingPairs,
    grid: int,
    accelerator: Accelerator,
    count: int = 32,
) -> list[dict[str, Any]]:
    """Compare what was cached with what the teachers see in the crops themselves.

    Args:
        targets: the cache.
        teachers: loaded networks by name.
        pairs: the samples of the run, with the cache's targets.
        grid: regions a side of the region loss.
        accelerator: device and precision.
        count: unlabelled crops that are compared.

    Returns:
        A row a teacher: the share of pixels with the same class (%), the mean absolute difference of the pooled
        logits, with their mean size, and that of the self-correlations (cosines).
    """
    rows = []
    for name, kinds in targets.kinds.items():
        network, sums = (
            teachers[name].to(accelerator.device).eval(),
            dict.fromkeys(("same", "logits", "size", "cosine"), 0.0),
        )
        for position in range(count):
            sample = pairs[position]
            with accelerator.autocast(), torch.inference_mode(), torch.compiler.set_stance("force_eager"):
                logits, features = (
                    value.float().cpu() for value in network(sample["unlabeled"][None].to(accelerator.device))
                )
            found = {kind: sample[f"unlabeled/{name}/{kind}"][None] for kind in kinds}
            if "labels" in found:
                counted = found["labels"] != IGNORE_INDEX
                sums["same"] += (found["labels"] == logits.argmax(dim=1))[counted].double().mean().item() * 100
            if "logits" in found:
                sums["logits"] += (found["logits"].mean((2, 3)) - logits.mean((2, 3))).abs().mean().item()
                sums["size"] += logits.mean((2, 3)).abs().mean().item()
            if "features" in found:
                online, cached = (self_correlation(value, grid) for value in (features, found["features"]))
                sums["cosine"] += (online - cached).abs().mean().item()
        network.cpu()
        rows.append(
            {
                "teacher": name,
                "same class %": sums["same"] / count if "labels" in kinds else None,
                "pooled logits off by": sums["logits"] / count if "logits" in kinds else None,
                "of": sums["size"] / count if "logits" in kinds else None,
                "cosines off by": sums["cosine"] / count if "features" in kinds else None,
            }
        )
    return rows


def _open_folder(folder: Path, wanted: Mapping[str, Any], recipe: Recipe, restart: bool) -> Mapping[str, Any]:
    """Return the manifest of the cache that is there, if it serves; else begin one."""
    path = folder / "manifest.json"
    if restart:
        for old in [*folder.glob("shard-*.safetensors"), path]:
            old.unlink(missing_ok=True)
    if path.exists():
        there = read_json(path, tuple(wanted))
        if not (problems := _unfit(there, wanted)):
            return there
        raise UserError(
            f"{folder} does not fit this run: {'; '.join(problems)}. Write it anew: python stages/cache_teachers.py "
            f"--recipe {recipe.source} --restart, or keep both: --set cache.folder=..."
        )
    if any(not other.name.startswith(".") for other in folder.glob("*")):  # but for torn writes
        raise UserError(f"{folder} holds files and no manifest.json; name another: --set cache.folder=...")
    write_json(path, wanted)
    return wanted


def _unfit(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Say why a cache does not serve; more images, teachers or kinds than are wanted do no harm."""
    settings = ("format", "image_scale", "scales", "flip", "cell")
    problems = [f"{key} is {there[key]!r}, not {wanted[key]!r}" for key in settings if there[key] != wanted[key]]
    known = dict(zip(there["ids"], there["checksums"], strict=True))
    pairs = list(zip(wanted["ids"], wanted["checksums"], strict=True))
    if missing := [name for name, _ in pairs if name not in known]:
        problems.append(f"it lacks {len(missing)} images ({missing[0]}, ...)")
    if changed := [name for name, checksum in pairs if known.get(name, checksum) != checksum]:
        problems.append(f"{len(changed)} images have changed ({changed[0]}, ...)")
    for name, teacher in wanted["teachers"].items():
        other = there["teachers"].get(name)
        if other is None or other["weights"] != teacher["weights"]:
            problems.append(f"[teachers.{name}] has other weights than the cached one")
        elif lacking := sorted(set(teacher["kinds"]) - set(other["kinds"])):
            problems.append(f"it lacks {', '.join(lacking)} of [teachers.{name}]")
    return problems


def _fill(
    folder: Path,
    manifest: Mapping[str, Any],
    teachers: Mapping[str, nn.Module],
    images: Images,
    section: TeacherCache,
    workers: int,
    accelerator: Accelerator,
) -> None:
    """Write the shards that are not there yet, each process its share."""
    place = {name: index for index, name in enumerate(images.ids)}
    numbers = range(-(-len(manifest["ids"]) // IMAGES_PER_SHARD))
    accelerator.wait_for_everyone()  # before one has written a shard that another would count as there
    missing = [number for number in numbers if not shard_path(folder, number).exists()]
    accelerator.wait_for_everyone()
    if not missing:
        return
    kinds = {name: teacher["kinds"] for name, teacher in manifest["teachers"].items()}
    if [name for name in manifest["ids"] if name not in place] or kinds.keys() - teachers.keys():
        raise UserError(
            f"{folder} is not complete, and was begun for more images or teachers than this run has; let "
            "stages/cache_teachers.py with the recipe that began it end it, or --set cache.folder=..."
        )
    networks = {name: teachers[name].to(accelerator.device).eval() for name in kinds}
    shards = {
        number: range(number * IMAGES_PER_SHARD, min((number + 1) * IMAGES_PER_SHARD, len(manifest["ids"])))
        for number in missing[accelerator.process_index :: accelerator.num_processes]
    }
    order = [index for shard in shards.values() for index in shard]
    decoded = _decoded(images, [place[manifest["ids"][index]] for index in order], _pixels, workers)
    total = sum(min(IMAGES_PER_SHARD, len(manifest["ids"]) - number * IMAGES_PER_SHARD) for number in missing)
    bar = tqdm(
        total=total,
        desc=f"{folder.name}: teachers",
        unit="img",
        leave=False,
        disable=None if accelerator.is_main_process else True,
    )
    with bar, accelerator.autocast(), torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        for number, shard in shards.items():
            tensors = {}
            for index in shard:
                image = next(decoded)[None].to(accelerator.device)
                for name, network in networks.items():
                    for kind, tensor in _targets(network, image, section, name).items():
                        if kind in kinds[name] or (kind == "confidence" and "labels" in kinds[name]):
                            tensors[f"{index}/{name}/{kind}"] = tensor.cpu().contiguous()
                bar.update(accelerator.num_processes)
            write_shard(folder, number, tensors)
    for network in networks.values():
        network.cpu()
    accelerator.wait_for_everyone()


def _targets(network: nn.Module, image: Tensor, section: TeacherCache, name: str) -> dict[str, Tensor]:
    """Predict one image `[1, 3, H, W]`; see mgd/data/targets.py for what is returned."""
    size = image.shape[-2:]
    coarse = [-(-side // section.cell) for side in size]
    logits, features, count = 0.0, 0.0, 0
    for scale in section.scales:
        scaled = image.float()
        if scale != 1.0:
            scaled = functional.interpolate(
                scaled, size=[max(1, round(side * scale)) for side in size], mode="bilinear", align_corners=False
            )
        for mirrored in (False, True) if section.flip else (False,):
            try:
                seen = network(scaled.flip(-1) if mirrored else scaled)
            except (RuntimeError, AssertionError, ValueError) as error:
                reason = " ".join(str(error).split())[:160]
                raise UserError(
                    f"[teachers.{name}] cannot see whole images of {scaled.shape[-1]}x{scaled.shape[-2]}: {reason}; "
                    'use [teachers] mode = "online"'
                ) from error
            maps = [value.flip(-1) if mirrored else value for value in seen]
            logits = logits + functional.interpolate(maps[0].float(), size=size, mode="bilinear", align_corners=False)
            features = features + functional.interpolate(maps[1].float(), size=coarse, mode="area")
            count += 1
    logits = logits / count
    fine = [-(-side // CONFIDENCE_STRIDE) for side in size]
    confidence = functional.interpolate(logits.softmax(dim=1).amax(dim=1, keepdim=True), size=fine, mode="area")
    return {
        "labels": logits.argmax(dim=1)[0].to(torch.uint8),
        "confidence": (confidence[0, 0] * 255).round().to(torch.uint8),
        "logits": functional.interpolate(logits, size=coarse, mode="area")[0].half(),
        "features": (features / count)[0].half(),
    }


class _Each(Dataset):
    def __init__(self, images: Images, order: list[int], what: Callable[[Images, int], Any]) -> None:
        self.images, self.order, self.what = images, order, what

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> Any:
        return self.what(self.images, self.order[place])


def _decoded(images: Images, order: list[int], what: Callable[[Images, int], Any], workers: int) -> Iterator[Any]:
    workers = min(workers, available_cpus()) if len(order) > 100 else 0  # processes take seconds to start
    return iter(
        DataLoader(_Each(images, order, what), batch_size=None, num_workers=workers, worker_init_fn=start_worker)
    )


def _pixels(images: Images, index: int) -> Tensor:
    return to_tensor(images.read(index, with_label=False)[0])


def _checksum(images: Images, index: int) -> int:
    return zlib.crc32(images.encoded(index))


def _checksums(images: Images, workers: int, accelerator: Accelerator) -> list[int]:
    """CRC-32 of every image's file, each process its share."""
    rank, world_size = accelerator.process_index, accelerator.num_processes
    share = list(range(rank, len(images), world_size))
    found = gather_object(list(zip(share, map(int, _decoded(images, share, _checksum, workers)), strict=True)))
    return [checksum for _, checksum in sorted(found)]
