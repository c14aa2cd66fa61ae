"""Choose which images to label when there are masks for a few only.

python stages/choose.py --recipe recipes/folder_cpu.toml --budget 50 --output picks
"""

import mgd.bootstrap  # noqa: F401

# isort: split

import argparse
import dataclasses
import shlex
from pathlib import Path

from mgd import cli
from mgd.checks import check_classes, usable_images
from mgd.data.candidates import Candidates, find_candidates
from mgd.data.images import Images
from mgd.data.lists import check_ids, write_list
from mgd.data.partitions import draw
from mgd.errors import UserError, some
from mgd.files import write_text
from mgd.locks import hold
from mgd.models.segmenter import fingerprint, load_segmenter
from mgd.plots import save_contact_sheet
from mgd.pool import descriptions, disagreements, untrained
from mgd.recipe import Recipe, load
from mgd.selection import cover, most_uncertain
from mgd.tables import labeled_amount

MODELS = {"random": (0,), "coverage": (0, 1), "disagreement": (2,)}  # strategy -> how many it can use
ON_SHEET = 100
BEFORE_LABELED = ("selected.txt", "selected.png", "unlabeled.txt")
"""What is written before labeled.txt: alone, an earlier choice was cut off among them."""


def main() -> None:
    """Choose, and write what is chosen as lists that a recipe can name."""
    flags = cli.recipe_parser(__doc__.splitlines()[0])
    flags.add_argument("--budget", required=True, type=_amount, help="images to label: 50, 0.05 or 1/16")
    flags.add_argument(
        "--strategy",
        choices=list(MODELS),
        default="random",
        help="what the recipe would draw (default); what stands for the others; that, of what two models disagree on",
    )
    flags.add_argument(
        "--model",
        nargs="+",
        default=[],
        metavar="RUN",
        help="disagreement: the two trained models; coverage: one to see with, in place of the recipe's backbone",
    )
    flags.add_argument("--output", required=True, type=cli.output_folder, help="folder for the lists")
    args = flags.parse_args()
    recipe = load(args.recipe, args.set)
    output = Path(args.output)
    if len(args.model) not in MODELS[args.strategy]:
        fitting = " or ".join(map(str, MODELS[args.strategy]))
        raise UserError(f"--strategy {args.strategy} takes {fitting} --model, not {len(args.model)}")
    if (output / "labeled.txt").exists():
        raise UserError(f"{output / 'labeled.txt'} is there: an earlier choice; name another --output, or delete it")
    there = _visible(output)
    if not there <= {*BEFORE_LABELED}:
        raise UserError(f"{output} holds other files; name another, or an empty, --output")
    if any(output.resolve().is_relative_to(place) for place in _places(recipe)):
        raise UserError(f"{output} lies among the images of [data], its pictures would be some; name another --output")

    accelerator = cli.start(recipe)
    found = usable_images(find_candidates(recipe.data, recipe.partition), accelerator)
    images, labeled = Images(found.images), Images(found.labeled)
    check_ids([*images.ids, *labeled.ids])
    budget = labeled_amount(args.budget, len(images))
    if budget >= len(images):
        raise UserError(
            f"--budget {args.budget}: {len(images)} images can be chosen from; give at most {len(images) - 1}, so that "
            "one stays unlabelled"
        )
    if found.masks and recipe.data.val_root is None and len(found.painted) + budget < 2:
        raise UserError(f"--budget {args.budget}: a run needs two masks, one to learn from and one to evaluate; give 2")
    networks = [load_segmenter(name).eval().to(accelerator.device) for name in args.model]
    for name, network in zip(args.model, networks, strict=True):
        check_classes(recipe.data.class_names(), network, name)
    if len(networks) > 1 and len(set(map(fingerprint, networks))) == 1:
        raise UserError(f"--model {' '.join(args.model)}: the same weights twice do not disagree; name another run")
    if args.strategy == "random":
        if recipe.partition.balanced:
            accelerator.print("note: [partition] balanced looks at masks, which are not there yet; this draw does not")
        chosen = _draw(recipe, images, budget)
    else:
        pool = list(range(len(images)))
        if args.strategy == "disagreement":
            pool = most_uncertain(disagreements(networks, images, recipe, accelerator), budget)
        eye = networks[0] if networks else untrained(recipe, accelerator)
        features = descriptions(eye, images, pool, recipe, accelerator)
        known = descriptions(eye, labeled, range(len(labeled)), recipe, accelerator)
        chosen = [pool[index] for index in cover(features, budget, known)]
    if accelerator.is_main_process:
        lists = found.lists([images.ids[index] for index in chosen])
        with hold(output, "or name another --output"):
            if _visible(output) != there:
                raise UserError(f"{output}: another choice has been written there meanwhile; name another --output")
            _write(output, found, images, chosen, lists)
        row = {"strategy": args.strategy, "chosen": len(chosen), "of": len(images), "had a mask": len(labeled)}
        row |= {"labelled": len(lists[0]), "unlabelled": len(lists[1]), "held out": len(lists[2])}
        cli.print_rows([row], args.json)
        picked = [images.ids[index] for index in chosen if images.ids[index] in lists[2]]
        print(_advice(recipe, output, found, len(lists[2]), picked))


def _visible(folder: Path) -> set[str]:
    """Names of the files in a folder, without those of a process that was killed while it wrote."""
    return {path.name for path in folder.glob("*") if not path.name.startswith(".")}


def _places(recipe: Recipe) -> list[Path]:
    """Return the folders whose pictures are those of the data."""
    roots = [root for key in ("root", "val_root") if (root := getattr(recipe.data, key, None))]
    return [(Path(root) / part).resolve() for root in roots for part in ("images", "masks", "unlabeled")]


def _amount(text: str) -> int | float | str:
    try:
        value = text if "/" in text else float(text) if "." in text else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no count, share or fraction: 50, 0.05 or 1/16") from error
    try:
        labeled_amount(value, pool=1)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return value


def _draw(recipe: Recipe, images: Images, budget: int) -> list[int]:
    """Return what `[partition] protocol = "random"` would draw with the recipe's seed, in its order."""
    seed = recipe.run.seed if recipe.partition.seed is None else recipe.partition.seed
    places = {name: index for index, name in enumerate(images.ids)}
    return [places[name] for name in draw(images.ids, seed)[:budget]]


def _write(output: Path, found: Candidates, images: Images, chosen: list[int], lists: tuple) -> None:
    """Write the chosen images, their thumbnails and the two lists; labeled.txt last, which marks a whole choice."""
    lines = []
    for index in chosen:
        name = images.ids[index]
        mask = f"\t{found.masks / name}.png" if found.masks else ""
        lines.append(f"{images.path(index) or name}{mask}\n")
    selected, sheet, unlabeled = (output / name for name in BEFORE_LABELED)
    write_text(selected, "".join(lines))
    shown = [(images.ids[index], images.picture(index)) for index in chosen[:ON_SHEET]]
    save_contact_sheet(shown, sheet)
    write_list(unlabeled, lists[1])
    write_list(output / "labeled.txt", lists[0])


def _advice(recipe: Recipe, output: Path, found: Candidates, held_out: int, picked: list[str]) -> str:
    """Say what to do with the choice; `held_out`: masks that no training will see, `picked`: which of them it chose."""
    lines = [f"{output / 'selected.txt'}: the images to label; selected.png shows them"]
    if held_out:
        which = f" (of the chosen: {some(picked)})" if picked else ""
        lines.append(
            f"{held_out} of all masks will be held out for evaluation ([data] val_share), in neither list{which}"
        )
    if found.masks:
        lines.append("paint their masks at the second path of each line")
        lines.append(
            "before all are there, [partition] labeled = 1.0 trains on those that are; with all, the two lists:"
        )
    elif len(found.labeled):
        lines.append("their masks must be there, where the data set has its masks, before the two lists can be used:")
    lists = {"protocol": "files", "labeled_list": output / "labeled.txt", "unlabeled_list": output / "unlabeled.txt"}
    sets = " ".join(f"--set {shlex.quote(f'partition.{key}={value}')}" for key, value in lists.items())
    # Runs with other labels may stand under the recipe's own names, the models that chose among them.
    recipe = dataclasses.replace(
        recipe, overrides=tuple(text for text in recipe.overrides if not text.startswith("partition."))
    )
    sets += f" --set {shlex.quote(f'run.output={recipe.run.output}/{output.name}')}"
    return "\n".join([*lines, f"{recipe.command} {sets}"])


if __name__ == "__main__":
    cli.run(main)
