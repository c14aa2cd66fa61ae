"""A finished run as a repository of the hub: its card, its files, and the one commit that puts them there."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from mgd.complexity import model_costs
from mgd.errors import UserError, one_line
from mgd.files import write_aside, write_json, write_text
from mgd.markdown import markdown
from mgd.metrics import FEW_IMAGES
from mgd.models.card import TAGS, assembled, front_matter, hex_color, plain, usage
from mgd.models.segmenter import Segmenter, load_segmenter
from mgd.portable import is_local, portable, portable_command
from mgd.recipe import Recipe, load
from mgd.registry import HEADS
from mgd.runs import read_metrics

_FILES = ("recipe.toml", "metrics.json", "overlays.png", "model/config.json", "model/model.safetensors")
_METRICS = ("name", "iou", "command", "versions", "device", "num_processes", "mixed_precision")


class Release(NamedTuple):
    """A finished run with its network, to be shown to others."""

    folder: Path
    recipe: Recipe
    metrics: Mapping[str, Any]
    network: Segmenter


def open_run(folder: Path) -> Release:
    """Read a run and load its weights strictly.

    Args:
        folder: of the run.

    Raises:
        UserError: it is no run, not finished, or damaged.
    """
    if not (folder / "recipe.toml").is_file():
        raise UserError(f"{folder}: no recipe.toml there; give the folder of a run, such as runs/quickstart-s0")
    if (folder / "config.json").is_file():
        raise UserError(f"{folder}: the folder of a model; give that of its run, {folder.resolve().parent}")
    if missing := [name for name in _FILES if not (folder / name).is_file()]:
        raise UserError(
            f"{folder}: a run that is not finished (it lacks {missing[0]}); the command that began it goes on with it"
        )
    recipe = load(folder / "recipe.toml")
    metrics = read_metrics(folder, recipe, _METRICS)
    network = load_segmenter(folder / "model")
    if not isinstance(metrics["iou"], Mapping) or set(metrics["iou"]) != set(network.classes):
        raise UserError(f"{folder}: metrics.json and model/config.json have other classes; they are of two runs")
    return Release(folder, recipe, metrics, network)


def push(folder: Path, repo: str, private: bool = False, license: str | None = None) -> str:
    """Upload a run in one commit, into a repository that is made if it is not there.

    Args:
        folder: of the run.
        repo: "org/name".
        private: keep the repository from others.
        license: the hub's name of a licence, such as "apache-2.0"; left out, the card states none.

    Returns:
        URL of the repository.

    Raises:
        UserError: what is wrong with the run, the name, the login or the way to the hub.
    """
    _check_repo(repo)
    run = open_run(folder)
    with tempfile.TemporaryDirectory() as assembled_there:
        write_folder(run, repo, license, Path(assembled_there))
        return _upload(Path(assembled_there), repo, private, f"Run {run.metrics['name']} of mgd")


def write_folder(run: Release, repo: str, license: str | None, output: Path) -> None:
    """Write what a repository holds: weights, configuration, recipe, metrics, picture and card.

    Args:
        run: what is shown.
        repo: "org/name", for the card.
        license: as of `push`.
        output: folder; must be empty, or not there yet.

    Raises:
        UserError: it holds something, or cannot be written.
    """
    _check_repo(repo)
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"{output} is not empty; give an empty folder, or one that is not there yet")
    card = model_card(run, repo, license)  # first: numbers that it cannot word leave nothing half-written
    run.network.save(output)  # what was just loaded strictly, and nothing else that lies beside it
    write_text(output / "recipe.toml", tomli_w.dumps(portable(run.recipe.to_dict())))
    write_json(output / "metrics.json", portable(run.metrics) | {"command": portable_command(run.metrics["command"])})
    write_aside(output / "overlays.png", lambda aside: shutil.copyfile(run.folder / "overlays.png", aside))
    write_text(output / "README.md", card)


# ---- the card ----


def model_card(run: Release, repo: str, license: str | None = None) -> str:
    """Return the card of a run: YAML front matter, then Markdown.

    Args:
        run: what it is about.
        repo: "org/name" that its usage example loads.
        license: as of `push`.
    """
    recipe, metrics = run.recipe, run.metrics
    costs = model_costs(recipe.student, len(run.network.classes), recipe.data.crop)
    facts = [{"": key, " ": value} for key, value in _facts(run).items()]
    picture = f'PIL.Image.open(hf_hub_download("{repo}", "overlays.png"))'
    parts = [
        f"# {repo.partition('/')[2]}",
        f"A small semantic segmentation network: timm's backbone `{recipe.student.backbone}` and the head "
        f"`{recipe.student.head.name}`, {costs['total'].params_m:.2f} M parameters, {len(run.network.classes)} "
        f"classes; {metrics['miou']:.2f} % mIoU on {metrics['num_val']} val images.",
        "![some val images, their truth and what the network predicts](overlays.png)",
        "## Use",
        usage(
            repo, picture, "from huggingface_hub import hf_hub_download\n\n", HEADS.package_of(recipe.student.head.name)
        ),
        "## Classes and results",
        markdown(_class_rows(run)),
        f"IoU on {metrics['num_val']} val images, of the last weights of the run. A dash: neither labelled nor "
        "predicted, and left out of the mean."
        + (" So few images make it a rough guide." * (metrics["num_val"] < FEW_IMAGES)),
        "## Training",
        markdown(facts),
        f"```sh\n{portable_command(metrics['command'])}\n```",
        "All settings are in [recipe.toml](recipe.toml), all numbers in [metrics.json](metrics.json).",
        "## Cost of one image",
        markdown(_cost_rows(costs, recipe.data.crop)),
        "GMACs: 10^9 multiply-accumulates of one forward pass, BatchNorm counted as two an element.",
        "## Licence",
        (f"Of these weights: {plain(license)}. " if license else "None has been chosen for these weights. ")
        + "The images, and the ImageNet weights that a backbone may have started from, have their own.",
    ]
    return str(assembled(_front_matter(run, repo, license), "\n\n".join(parts) + "\n"))


def _front_matter(run: Release, repo: str, license: str | None) -> ModelCardData:
    data = run.recipe.data
    tags = list(TAGS)
    if run.recipe.method_class.uses_unlabeled:
        tags.append("semi-supervised")
    if run.recipe.is_distilled:
        tags.append("knowledge-distillation")
    sources = (getattr(data, "hub", None), data.unlabeled.hub if data.unlabeled else None)
    hub_sets = [source for source in sources if source and not is_local(source)]
    result = EvalResult(
        task_type="image-segmentation",
        task_name="Semantic segmentation",
        dataset_type=sources[0] if sources[0] in hub_sets else data.name,
        dataset_name=data.name,
        dataset_split=getattr(data, "val_split", "val"),
        metric_type="mean_iou",
        metric_name="mIoU, %",
        metric_value=round(run.metrics["miou"], 2),
    )
    return front_matter(
        tags,
        license=license,
        datasets=hub_sets or None,
        model_name=repo.partition("/")[2],
        eval_results=[result],
    )


def _class_rows(run: Release) -> list[dict[str, Any]]:
    pairs = enumerate(zip(run.network.classes, run.network.colors, strict=True))
    rows = [
        {"index": i, "class": plain(name), "colour": f"`{hex_color(color)}`", "IoU %": run.metrics["iou"][name]}
        for i, (name, color) in pairs
    ]
    return [*rows, {"index": "", "class": "**mean**", "colour": "", "IoU %": run.metrics["miou"]}]


def _cost_rows(costs: Mapping[str, Any], crop: int) -> list[dict[str, Any]]:
    gmacs = f"GMACs at {crop}x{crop}"
    return [
        {"part": part, "M parameters": f"{cost.params_m:.3f}", gmacs: f"{cost.gmacs:.3f}"}
        for part, cost in costs.items()
    ]


def _facts(run: Release) -> dict[str, str]:
    """Say how a network came about, a line a fact."""
    recipe, metrics, network = run.recipe, run.metrics, run.network
    unlabeled, pool, tested = metrics["num_unlabeled"], recipe.data.unlabeled, recipe.eval
    seen = "a stream of unknown length" if unlabeled is None else str(unlabeled)
    unused = "" if recipe.method_class.uses_unlabeled else f" (not used by `{recipe.method.name}`)"
    wanted = "" if recipe.partition.labeled is None else f" {recipe.partition.labeled}"
    teachers = [
        f"{plain(name)}: `{portable(teacher.recipe or teacher.checkpoint)}`"
        for name, teacher in recipe.teachers.items()
    ]
    if recipe.method_class.trains_teachers:
        own = [(where, section) for where, section in recipe.networks.items() if where != "student"]
        teachers += [
            f"{plain(where.rpartition('.')[2])}: `{section.backbone}`, trained along" for where, section in own
        ]
    start = "timm's pretrained weights" if recipe.student.pretrained else "random weights"
    precision = "fp32" if metrics["mixed_precision"] == "no" else metrics["mixed_precision"]
    mean, std = (", ".join(f"{value:.2f}" for value in part.flatten().tolist()) for part in (network.mean, network.std))
    sources = [
        f"`{portable(source)}`" for source in (getattr(recipe.data, "hub", None), pool and pool.location) if source
    ]
    return {
        "data": f"`{recipe.data.name}`" + (f", from {' and '.join(sources)}" if sources else ""),
        "images": f"{metrics['num_labeled']} labelled / {seen} unlabelled{unused}, {metrics['num_val']} val",
        "partition": f"{recipe.partition.protocol}{wanted}, seed {recipe.partition_seed}",
        "method": f"`{recipe.method.name}`",
        "teachers": ", ".join(teachers) or "none",
        "backbone began from": start,
        "length": f"{metrics['steps']} steps of {recipe.optim.batch_size}, {recipe.optim.name}, lr {recipe.optim.lr:g}",
        "seed": str(metrics["seed"]),
        "input": f"images resized by {network.image_scale:g} (`predict` does it), crops of {network.crop}",
        "normalisation": f"inside the network: (pixel 0..255 - [{mean}]) / [{std}]",
        "evaluation": f"{tested.mode}, scales {', '.join(f'{scale:g}' for scale in tested.scales)}"
        + ", flipped too" * tested.flip,
        "trained on": f"{metrics['num_processes']} x {plain(metrics['device'])}, {precision}, "
        f"{metrics['seconds'] / 60:.1f} minutes",
        "versions": ", ".join(f"{name} {version}" for name, version in metrics["versions"].items()),
    }


# ---- the hub ----


def _check_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
        if repo.count("/") == 1:
            return
    except HFValidationError:
        pass
    raise UserError(
        f"{repo!r} is no name of a repository; expected org/name (or user/name) of letters, digits, '-', '_' and '.', "
        "without '--' or '..', at most 96"
    )


def _upload(folder: Path, repo: str, private: bool, message: str) -> str:
    api = HfApi()
    additions = [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())]
    try:
        ModelCard.load(folder / "README.md").validate()  # before anything is made there
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise UserError(f"{repo} is there already and public; make it private in its settings, or name another")
        # Not upload_folder, which may make several commits of one folder.
        api.create_commit(repo, additions, commit_message=message)
    except UserError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{repo}: {_reason(error, api.endpoint)}") from error
    return str(url)


def _reason(error: Exception, endpoint: str) -> str:
    """Word what the hub, its library or the network has against a push, with the way out."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    detail = one_line(error, 300)
    if status == 401:
        reason = f"{endpoint} does not know you; log in with `hf auth login`, or set HF_TOKEN to a token that may write"
    elif status == 403:
        reason = (
            "your token may not write there; log in with one that may (`hf auth login`), or name another repository"
        )
    elif status is not None:
        reason = f"{endpoint} answered {status}: {detail}"
    elif isinstance(error, ValueError):
        where = "https://hf.co/docs/hub/repositories-licenses"
        reason = f"the card is refused: {detail}; the names of licences are at {where}"
    else:  # the answer to the commit itself may have been lost
        return (
            f"{endpoint} cannot be reached ({type(error).__name__}: {detail}); a commit is there whole or not at all: "
            "push again, or write the files with --dry-run"
        )
    return f"{reason}; nothing was committed"
