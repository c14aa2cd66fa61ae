"""Export a segmenter to a file for a device, verified on real images in the file's own runtime.

python stages/export.py --model runs/quickstart-s0 --format onnx --size 96x96
"""

import mgd.bootstrap  # noqa: F401

# isort: split

import argparse
import contextlib
import os
import platform
import re
import tempfile
from pathlib import Path

import torch

from mgd import cli
from mgd.errors import UserError
from mgd.export import samples
from mgd.export.base import GREATEST_SIDE, LEAST_SIDE, Target
from mgd.export.verify import verified_export
from mgd.files import write_json
from mgd.machine import device_name, versions
from mgd.models.saved import find_model
from mgd.models.segmenter import fingerprint, load_segmenter
from mgd.recipe import load
from mgd.registry import EXPORTERS

_READ = ("data.", "partition.", "run.seed=")
"""What of a recipe an export reads."""
MOST = 16384
"""Pixels a side."""


def main() -> None:
    """Write one file, try it, keep it if it does what the network does."""
    flags = cli.Flags(description=__doc__.splitlines()[0])
    flags.add_argument("--model", required=True, help="run folder, model folder or hub id")
    flags.add_argument("--format", required=True, help=", ".join(EXPORTERS.names()))
    flags.add_argument("--size", type=_size, help="of an image, HEIGHTxWIDTH; left out, the training crop")
    flags.add_argument(
        "--dynamic", action="store_true", help=f"take other sizes, too ({LEAST_SIDE} to {GREATEST_SIDE} a side)"
    )
    flags.add_argument("--bake", action="store_true", help="uint8 pixels in, uint8 class map out")
    flags.add_argument("--cpu", action="store_true", help="with --bake: faster on CPUs, and for them only (onnx)")
    flags.add_argument("--int8", action="store_true", help="quantise, calibrated on the unlabelled images")
    flags.add_argument("--max-drop", type=_points, default=1.0, help="points of mIoU that int8 may cost (1.0)")
    flags.add_argument("--recipe", help="recipe whose images are used; left out, the model's own")
    cli.set_flag(flags, "e.g. data.root=...")
    flags.add_argument(
        "--images", metavar="DIR", help="try, and calibrate with, these images instead; there is no mIoU then"
    )
    flags.add_argument("--samples", type=cli.at_least(1), default=100, help="images to try, and to calibrate with")
    flags.add_argument("--threads", type=cli.at_least(1, 1024), default=1, help="of the runtime, for the latency (1)")
    flags.add_argument("--output", type=cli.output_folder, help="folder; left out, export/ in the run")
    args = flags.parse_args()

    cli.refuse_sets(args.set, _READ, "an export reads the images alone, by data.*, partition.* and run.seed")
    exporter = EXPORTERS.get(args.format)()
    exporter.check()
    if args.int8 and not exporter.quantizes:
        able = [name for name, other in EXPORTERS.usable().items() if other.quantizes]
        raise UserError(f"--format {args.format} has no --int8 here; formats that have: {', '.join(able)}")
    if args.cpu and not (args.bake and exporter.has_cpu_layout):
        able = [name for name, other in EXPORTERS.usable().items() if other.has_cpu_layout]
        raise UserError(f"--cpu is for --bake with --format {' or '.join(able)}")
    folder = find_model(args.model)
    model = load_segmenter(folder)
    size = args.size or (model.crop, model.crop)
    if args.dynamic and not all(LEAST_SIDE <= side <= GREATEST_SIDE for side in size if side):
        raise UserError(f"--dynamic takes sides of {LEAST_SIDE} to {GREATEST_SIDE}, and so must be --size")
    if None in size:
        raise UserError(f"{args.model} does not say at what size it was trained; --size HEIGHTxWIDTH")
    target = Target(*size, args.dynamic, args.bake, args.cpu)

    # ---- images, read before anything is written ----
    if args.images and (args.recipe or args.set):
        raise UserError("--images takes the place of a recipe's images; leave out --recipe and --set, or --images")
    if args.images:
        tried, problems = samples.of_folder(args.images, model, args.samples)
        calibrated = tried if args.int8 else None
    else:
        source = args.recipe or folder / "recipe.toml"
        if not Path(source).exists():
            raise UserError(f"{source} is not there; name the data with --recipe, or give a folder with --images")
        tried, calibrated, problems = samples.of_recipe(load(source, args.set), model, folder, args.samples, args.int8)
    for problem in problems:
        print(f"note: left out: {problem}")

    # ---- the file: made aside, and put in its place once it has shown itself good ----
    torch.set_num_threads(args.threads)
    marks = {"dynamic": args.dynamic, "baked": args.bake, "cpu": args.cpu, "int8": args.int8}
    name = "-".join(["model", f"{size[0]}x{size[1]}", *(mark for mark in marks if marks[mark])]) + exporter.suffix
    output = Path(args.output or (Path(args.model) if Path(args.model).is_dir() else Path()) / "export")
    output = Path(_folder(output))
    made = [place for place in (output, *output.parents) if not place.exists()]
    output.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as undo:
        undo.callback(_remove_empty, made)
        aside = undo.enter_context(tempfile.TemporaryDirectory(dir=output, prefix=".export-"))
        row, notes = verified_export(
            exporter,
            args.format,
            model,
            target,
            Path(aside) / name,
            tried,
            calibrated,
            args.max_drop,
            args.threads,
        )
        facts = {"format": args.format, "backbone": model.section.backbone, "head": model.section.head.name}
        facts |= {"height": size[0], "width": size[1]} | marks
        facts |= {"classes": list(model.classes), "image_scale": model.image_scale, "fingerprint": fingerprint(model)}
        where = {"device": device_name(torch.device("cpu")), "platform": platform.machine()}
        where["versions"] = versions() | exporter.versions()
        described = f"{name}.json"
        write_json(Path(aside) / described, facts | row | {"threads": args.threads, "notes": notes} | where)
        final = output / name
        (output / described).unlink(missing_ok=True)  # it never stands beside a file that it does not describe
        if final.is_dir():  # which cannot be replaced in one go
            final.rename(Path(aside) / "old")
        os.replace(Path(aside) / name, final)
        os.replace(Path(aside) / described, output / described)
    off = row.get("logits off by")
    cli.print_rows([row | ({} if off is None else {"logits off by": f"{off:.1e}"})])
    for note in notes:
        print(note)
    pixels = str(target.dtype).removeprefix("torch.")
    timed = f"; timed on {args.threads} thread(s)" if row.get("p50 ms") else ""
    print(f"{final}: {target.output} of RGB pixels 0..255 ({pixels}, NCHW){timed}")


def _folder(path: Path) -> str:
    try:
        return cli.output_folder(str(path))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{error}; name another --output") from error


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # it holds something
            folder.rmdir()


def _points(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is no number of points, 0 to 100")
    return value


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or not all(LEAST_SIDE // 2 <= int(side) <= MOST for side in found.groups()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; HEIGHTxWIDTH, e.g. 512x512, each from 32 to {MOST}")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    cli.run(main)
