"""Evaluate a run, a model folder or a hub model: mIoU and the per-class table.

accelerate launch stages/evaluate.py --model runs/quickstart-s0
"""

import mgd.bootstrap  # noqa: F401

# isort: split

import functools
from pathlib import Path

from mgd import cli
from mgd.checks import check_classes, usable_masked
from mgd.data.reading import load_splits
from mgd.errors import UserError
from mgd.experiment import evaluate_network
from mgd.files import absolute
from mgd.models.saved import find_model
from mgd.models.segmenter import fingerprint, load_segmenter
from mgd.needed import note_other_scale
from mgd.predictions import check_predictions, mark_of, mark_predictions, save_prediction
from mgd.recipe import load
from mgd.unseen import keep_unlabeled, note_learned, unseen_masks

_MATTERS = ("data.", "eval.", "run.")
"""What of a recipe an evaluation reads."""


def main() -> None:
    """Evaluate one model on images of a recipe."""
    flags = cli.Flags(description=__doc__.splitlines()[0])
    flags.add_argument("--model", required=True, help="run folder, model folder or hub id")
    flags.add_argument("--recipe", help="recipe whose images are used; left out, the model's own")
    flags.add_argument(
        "--split",
        choices=("val", "unlabeled"),
        default="val",
        help="unlabeled: the training images that the run had without their masks, where the data has these",
    )
    cli.set_flag(flags, "e.g. eval.mode=slide")
    flags.add_argument(
        "--save-predictions",
        metavar="DIR",
        type=cli.output_folder,
        help="write a palette PNG of class indices an image",
    )
    cli.json_flag(flags)
    args = flags.parse_args()

    folder = find_model(args.model)
    source = args.recipe or folder / "recipe.toml"
    if not args.recipe and not source.exists():
        raise UserError(f"{folder} has no recipe.toml; name the data with --recipe")
    matter = ", ".join(f"{key}*" for key in _MATTERS)
    cli.refuse_sets(args.set, _MATTERS, f"of a trained model only {matter} matter")
    recipe = load(source, args.set)
    split = getattr(recipe.data, "val_split", "val") if args.split == "val" else args.split
    accelerator = cli.start(recipe)
    network = load_segmenter(folder)
    if args.save_predictions:
        shown = " of ".join(filter(None, (split, absolute(getattr(recipe.data, "root", None)))))
        scale, precision = recipe.data.image_scale, accelerator.mixed_precision
        mark = mark_of(folder, fingerprint(network), shown, recipe.eval, recipe.data.crop, scale, precision)
        check_predictions(Path(args.save_predictions), mark)
        accelerator.wait_for_everyone()  # or one may look when another has begun to write
    network.to(accelerator.device)
    splits = load_splits(recipe.data)
    check_classes(splits.classes, network, args.model)
    note_other_scale(network, args.model, recipe, accelerator.print)
    what, chosen = "validation", splits.val
    if args.split == "unlabeled":
        what, chosen = "unlabelled training", unseen_masks(splits, folder, recipe, accelerator.print)
    images = usable_masked(chosen, splits.decoder, recipe.data, what, accelerator)
    if args.split == "val":
        note_learned(folder, images.ids, accelerator.print)
    keep = None
    if args.save_predictions:
        mark_predictions(Path(args.save_predictions), mark, len(images))
        keep = functools.partial(save_prediction, Path(args.save_predictions), splits.colors, splits.decoder.encode)
    result = evaluate_network(network, images, recipe, accelerator, keep)

    rows = [{"class": name, "IoU %": iou} for name, iou in zip(splits.classes, result.iou, strict=True)]
    absent = [name for name, iou in zip(splits.classes, result.iou, strict=True) if iou != iou]
    rows += [{"class": "mean", "IoU %": result.miou}, {"class": "pixel accuracy", "IoU %": result.pixel_accuracy}]
    cli.print_table(accelerator, rows, args.json)
    if absent:
        accelerator.print(f"neither labelled nor predicted, left out of the mean: {', '.join(absent)}")
    how = [f"scales {', '.join(f'{scale:g}' for scale in recipe.eval.scales)}"] if recipe.eval.scales != (1.0,) else []
    how += ["flip"] if recipe.eval.flip else []
    how.append(f"image_scale {recipe.data.image_scale}")
    accelerator.print(", ".join([f"{len(images)} {what} images", recipe.eval.mode, *how]))
    if args.split == "unlabeled" and accelerator.is_main_process:
        print(keep_unlabeled(folder, recipe, result, images))


if __name__ == "__main__":
    cli.run(main)
