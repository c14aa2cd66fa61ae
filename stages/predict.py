"""Segment images with a trained model: masks, colours and overlays.

python stages/predict.py --model runs/quickstart-s0 --input photos --output predictions
"""

import mgd.bootstrap  # noqa: F401

# isort: split

import functools
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file

from mgd import cli
from mgd.errors import CANNOT_TAKE, UserError, one_line
from mgd.files import write_aside
from mgd.inference import predict_scores
from mgd.models.saved import find_model
from mgd.models.segmenter import Segmenter, enlarge, fingerprint, load_segmenter
from mgd.pictures import KINDS, colorize, list_pictures, read_picture, rescale, to_tensor
from mgd.plots import overlay
from mgd.predictions import check_predictions, mark_of, mark_predictions, save_prediction
from mgd.progress import progress_bar
from mgd.recipe import load, parse_eval
from mgd.sections import Eval


class Prediction(NamedTuple):
    """What is predicted of one image."""

    name: str
    picture: np.ndarray
    """`[H, W, 3]` uint8."""
    classes: torch.Tensor
    """`[H, W]` uint8."""
    probabilities: torch.Tensor | None
    """`[K, H, W]` float16, if they are wanted."""


def main() -> None:
    """Segment every image that can be read, and name those that cannot."""
    flags = cli.Flags(description=__doc__.splitlines()[0])
    flags.add_argument("--model", required=True, help="run folder, model folder or hub id")
    flags.add_argument("--input", required=True, help="an image, a folder, or a quoted pattern like 'shots/*.jpg'")
    flags.add_argument("--output", required=True, type=cli.output_folder, help="folder for the results")
    flags.add_argument(
        "--save", nargs="+", choices=KINDS, default=list(KINDS[:3]), help="what to write (all but probabilities)"
    )
    flags.add_argument("--batch", type=cli.at_least(1), default=8, help="images of one size at once")
    cli.set_flag(flags, "e.g. eval.mode=slide", "EVAL")
    args = flags.parse_args()

    accelerator = cli.new_accelerator()
    folder = find_model(args.model)
    model = load_segmenter(folder).eval().to(accelerator.device)
    section, crop = _how(folder, args.set, model.crop)
    output = Path(args.output)
    place, precision = str(Path(args.input).resolve()), accelerator.mixed_precision
    mark = mark_of(folder, fingerprint(model), place, section, crop, model.image_scale, precision)
    check_predictions(output, mark, KINDS)
    ours = [(output / kind).resolve() for kind in KINDS]
    files = [file for file in list_pictures(args.input) if not set(ours) & set(file.resolve().parents)]
    if not files:
        raise UserError(f"{args.input}: no image there but what lies in --output")
    names = _names(files, Path(args.input))
    share = list(zip(files, names, strict=True))[accelerator.process_index :: accelerator.num_processes]

    unreadable, done = [], 0
    predict = functools.partial(_predict, model=model, section=section, crop=crop, kinds=args.save)
    bar = progress_bar(accelerator.is_main_process, total=len(share), unit="img")
    with bar, accelerator.autocast(), torch.inference_mode():
        for group in _batches(share, args.batch, unreadable):
            for one in _predicted(group, predict, unreadable):
                if not done:
                    mark_predictions(output, mark, len(files))
                _save(output, one, model.colors, args.save)
                done += 1
            bar.update(done + len(unreadable) - bar.n)
    results = gather_object([(done, unreadable)])
    done = sum(number for number, _ in results)
    unreadable = [problem for _, problems in results for problem in problems]
    if accelerator.is_main_process:
        for problem in unreadable:
            print(f"note: {problem}", file=sys.stderr)
    if not done:
        raise UserError(f"{args.input}: none of the {len(files)} images can be used")
    left_out = f"; {len(unreadable)} left out" if unreadable else ""
    accelerator.print(f"{args.output}: {', '.join(args.save)} of {done} images{left_out}")


def _how(folder: Path, overrides: list[str], crop: int | None) -> tuple[Eval, int]:
    """Return how images are predicted: as the model's own recipe evaluates, with what `--set` changes."""
    cli.refuse_sets(overrides, ["eval."], "only eval.* matters for a prediction")
    if not (folder / "recipe.toml").exists():
        return parse_eval(overrides, source="--set"), crop or 512
    recipe = load(folder / "recipe.toml", overrides)
    return recipe.eval, recipe.data.crop


def _names(files: list[Path], source: Path) -> list[str]:
    """Name the results after the images: by place below the folder, without suffix where that is enough."""
    root = source if source.is_dir() else None
    paths = [path.relative_to(root) if root else Path(path.name) for path in files]
    stems = Counter(path.with_suffix("") for path in paths)
    names = [str(path.with_suffix("") if stems[path.with_suffix("")] == 1 else path) for path in paths]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        remedy = "rename one of them" if root else "give their folder instead of a pattern"
        raise UserError(f"{source}: several images are called {twice[0]}; {remedy}")
    return names


def _batches(
    share: list[tuple[Path, str]], size: int, unreadable: list[str]
) -> Iterator[list[tuple[str, PIL.Image.Image]]]:
    """Yield lists of (name, picture), all of one size."""
    for _, group in itertools.groupby(_read(share, unreadable), key=lambda item: item[1].size):
        while chunk := list(itertools.islice(group, size)):
            yield chunk


def _read(share: list[tuple[Path, str]], unreadable: list[str]) -> Iterator[tuple[str, PIL.Image.Image]]:
    for path, name in share:
        try:
            yield name, read_picture(path)
        except UserError as error:
            unreadable.append(str(error))


def _predicted(
    group: Sequence[tuple[str, PIL.Image.Image]], predict: Callable[..., list[Prediction]], unreadable: list[str]
) -> Iterator[Prediction]:
    """Yield predictions of pictures of one size; what fails together, say for want of memory, is tried one by one."""
    try:
        found = predict(group)
    except CANNOT_TAKE as error:
        if len(group) == 1:
            unreadable.append(f"{group[0][0]} cannot be predicted: {one_line(error)}")
            return
        found = None  # tried again below, where the error no longer holds what was in memory
    if found is None:
        for one in group:
            yield from _predicted([one], predict, unreadable)
    else:
        yield from found


def _predict(
    group: Sequence[tuple[str, PIL.Image.Image]], model: Segmenter, section: Eval, crop: int, kinds: Sequence[str]
) -> list[Prediction]:
    """Predict pictures of one size at once."""
    try:
        small = torch.stack([to_tensor(rescale(picture, model.image_scale)) for _, picture in group])
        scores = predict_scores(model, small.to(model.mean.device), section, crop)
        scores = enlarge(scores, group[0][1].size[::-1])
        classes = scores.argmax(dim=1).to(torch.uint8).cpu()
        wanted = "probabilities" in kinds
        shares = [one.softmax(dim=0).half().cpu() if wanted else None for one in scores]
    except CANNOT_TAKE as error:
        if section.mode == "whole" and not isinstance(error, UserError):  # ours has its own remedy
            raise UserError(f"{one_line(error)}; --set eval.mode=slide predicts in windows") from error
        raise
    pictures = [(name, np.asarray(picture)) for name, picture in group]
    return [Prediction(*one, *rest) for one, *rest in zip(pictures, classes, shares, strict=True)]


def _save(output: Path, one: Prediction, colors: tuple, kinds: list[str]) -> None:
    """Write what was asked for of one image."""
    if "masks" in kinds:
        save_prediction(output / "masks", colors, lambda label: label.astype(np.uint8), one.name, one.classes)
    label = one.classes.numpy()
    pictures = {"colors": colorize(label, colors), "overlays": overlay(one.picture, label, colors)}
    for kind in pictures.keys() & set(kinds):
        image = PIL.Image.fromarray(pictures[kind])
        write_aside(output / kind / f"{one.name}.png", lambda path, image=image: image.save(path, format="PNG"))
    if "probabilities" in kinds:
        tensors = {"probabilities": one.probabilities.contiguous()}
        write_aside(output / "probabilities" / f"{one.name}.safetensors", lambda path: save_file(tensors, path))


if __name__ == "__main__":
    cli.run(main)
