"""Print what networks cost, how hard each term of a loss pulls, or how fast a part is beside its reference.

python stages/benchmark.py --recipe recipes/voc_r18_1-8.toml
python stages/benchmark.py --recipe recipes/voc_r18_1-8.toml --suite step --set data.crop=256
python stages/benchmark.py --recipe recipes/quickstart.toml --suite terms
"""

import mgd.bootstrap  # noqa: F401

# isort: split

import argparse
from pathlib import Path

from accelerate.utils import send_to_device

from mgd import cli
from mgd.benchmarks import data, evaluation, inference, step, terms
from mgd.checks import check_classes, check_recipe
from mgd.complexity import model_costs
from mgd.data.loaders import StepSampler, training_loader
from mgd.errors import UserError
from mgd.experiment import build_method, build_networks
from mgd.files import write_json
from mgd.machine import device_name, processor
from mgd.markdown import markdown
from mgd.models.saved import model_section
from mgd.models.segmenter import load_segmenter
from mgd.models.trial import check_trainable
from mgd.needed import trained_teachers
from mgd.recipe import Recipe, load
from mgd.run_images import training_pairs
from mgd.sections import ModelSection

FLAGS = {
    "costs": {"size"},
    "step": {"batch", "precision", "compile", "repetitions"},
    "terms": {"model", "repetitions"},
    "eval": {"repetitions"},
    "data": {"repetitions"},
    "infer": {"size", "threads", "repetitions"},
    "students": {"size", "threads", "repetitions", "target_ms", "backbones"},
}
"""What each suite reads of the command line, beside the recipe."""


def main() -> None:
    """Run one suite on a recipe, and print its table."""
    flags = cli.recipe_parser(__doc__.splitlines()[0])
    flags.add_argument("--suite", choices=FLAGS, default="costs", help="what is measured (costs)")
    flags.add_argument("--batch", type=cli.at_least(2), default=2, help="step: labelled images, at least 2")
    flags.add_argument(
        "--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32"], help="step: of ours (fp32)"
    )
    flags.add_argument("--compile", action="store_true", help="step: ours through torch.compile")
    flags.add_argument("--repetitions", type=cli.at_least(1), default=7, help="rounds that count; terms: batches")
    flags.add_argument("--model", help="terms: a run whose student is looked at; left out, one that is not trained yet")
    flags.add_argument(
        "--size",
        type=cli.at_least(32, 16384),
        nargs="+",
        help="sides of the image, pixels; left out, the recipe's crop",
    )
    flags.add_argument("--threads", type=cli.at_least(1, 1024), default=1, help="infer, students: of the runtime (1)")
    flags.add_argument("--target-ms", type=float, default=30.0, help="students: milliseconds an image may take (30)")
    flags.add_argument("--backbones", nargs="+", default=inference.BACKBONES, help="students: timm names")
    args = flags.parse_args()
    given = {key for key in set().union(*FLAGS.values()) if getattr(args, key) != flags.get_default(key)}
    if odd := sorted(given - FLAGS[args.suite]):
        raise UserError(f"--{odd[0].replace('_', '-')} does nothing for --suite {args.suite}; leave it out")
    recipe = load(args.recipe, args.set)
    if args.suite == "terms":
        return _terms(recipe, args)
    if args.suite in ("infer", "students"):
        return _latencies(recipe, args)
    if args.suite == "step":
        accelerator = cli.start(recipe)
        rows = step.suite(
            recipe, _teachers(recipe), args.batch, args.precision, args.repetitions, accelerator.device, args.compile
        )
        cli.print_rows(rows, args.json)
        where = device_name(accelerator.device)
        print(f"{where}; medians of {args.repetitions} rounds in turns; ratio: reference / ours")
        return
    if args.suite == "eval":
        rows = evaluation.suite(len(recipe.data.class_names()), num_images=20, repetitions=args.repetitions)
        cli.print_rows(rows, args.json)
        print(f"medians of {args.repetitions} rounds in turns; identical IoU a class; ratio: reference / ours")
        return
    if args.suite == "data":
        rows = data.suite(recipe.data, num_images=4, repetitions=args.repetitions)
        cli.print_rows(rows, args.json)
        print(f"one core; medians of {args.repetitions} rounds in turns; ratio: reference / ours")
        for row in rows:
            speed = 1000 / row["ours"]
            # A labelled image comes with two unlabelled ones, whose masks are not read.
            need = f"a GPU that trains N labelled images/s needs 3 N / {speed:.0f} workers"
            print(f"{row['name'].partition(',')[0]}: {speed:.0f} images/s a core; {need}")
        return
    _costs(recipe, args)


def _teachers(recipe: Recipe) -> dict[str, ModelSection]:
    """Return the sections of the frozen teachers, which need not be trained, by name."""
    return {
        name: load(teacher.recipe).student if teacher.recipe else model_section(teacher.checkpoint)
        for name, teacher in recipe.teachers.items()
    }


def _costs(recipe: Recipe, args: argparse.Namespace) -> None:
    """Print parameters and operations of all networks, and those of a training step."""
    num_classes, teachers = len(recipe.data.class_names()), _teachers(recipe)
    images = recipe.optim.batch_size * recipe.method_class.images_per_label
    for where, section in recipe.networks.items():
        bare = section.model_copy(update={"pretrained": False})
        check_trainable(where, bare, num_classes, images, recipe.data.crop, several_processes=False)
    rows = []
    for size in args.size or [recipe.data.crop]:
        frozen = {f"teachers.{name}": section for name, section in teachers.items()}
        for name, section in (recipe.networks | frozen).items():
            for part, cost in model_costs(section, num_classes, size).items():
                row = {"network": name, "part": part, "backbone": section.backbone, "size": size}
                row |= {"output_stride": section.output_stride, "params_m": cost.params_m, "gmacs": cost.gmacs}
                rows.append(row | {"conv_gmacs": cost.conv_gmacs})
    cli.print_rows(rows, args.json)
    print("gmacs: BatchNorm counted as in the paper; conv_gmacs: torch's own count. One image, one forward pass.")
    if recipe.cache is None:
        cost, steps = step.training_gmacs(recipe, teachers), recipe.optim.steps
        whole = f"; {steps} steps: {cost * steps:.1f}" if steps else ""
        print(f"training, conv_gmacs forward and backward: a step of {recipe.optim.batch_size}: {cost:.3f}{whole}")


def _latencies(recipe: Recipe, args: argparse.Namespace) -> None:
    """Print what networks take in ONNX Runtime."""
    if args.size and len(args.size) > 1:
        raise UserError(f"--suite {args.suite} takes one --size")
    classes, size = len(recipe.data.class_names()), args.size[0] if args.size else recipe.data.crop
    where = f"{size}x{size}, batch 1, {args.threads} thread(s), ONNX Runtime on {processor()}"
    if args.suite == "infer":
        cli.print_rows(inference.suite(recipe.student, classes, size, args.threads, args.repetitions), args.json)
        print(f"{where}; medians of {args.repetitions} rounds in turns; ratio: reference / ours")
        print("reference: DeepLabV3Plus of segmentation_models.pytorch with mobilenet_v2; of int8, ours in fp32")
        return
    cli.print_rows(
        inference.students(args.backbones, classes, size, args.threads, args.target_ms, args.repetitions), args.json
    )
    print(f"{where}; fits: p50 of at most {args.target_ms:g} ms")


def _terms(recipe: Recipe, args: argparse.Namespace) -> None:
    """Print how hard each term of the loss pulls, on batches of a run under the recipe's trained teachers."""
    if recipe.cache:
        raise UserError("the terms suite asks the teachers themselves; --set teachers.mode=online")
    accelerator = cli.start(recipe)
    if accelerator.num_processes > 1 or accelerator.mixed_precision != "no":
        raise UserError("the terms suite takes one process, in float32; start it by plain python")
    trained = recipe.method_class.sections(recipe.method, recipe.student)
    if args.model and len(trained) > 1:
        raise UserError(f"--model is one network, and {recipe.method.name} trains {len(trained)}; leave it out")
    student = load_segmenter(args.model) if args.model else None
    if student and student.section != recipe.student.model_copy(update={"pretrained": False}):
        raise UserError(f"--model {args.model} is another network than the [student] of {args.recipe}")
    device = accelerator.device
    frozen = {name: teacher.to(device) for name, teacher in trained_teachers(recipe).items()}
    splits, partition = check_recipe(recipe, accelerator, frozen)
    if partition.streamed:
        raise UserError(f"{args.recipe}: the terms suite does not take a stream; leave [data.unlabeled] out")
    networks = build_networks(recipe, splits)
    if student:
        check_classes(splits.classes, student, f"--model {args.model}")
        networks = [student]
    method = build_method(recipe, networks, frozen, partition)
    for module in [*networks, *method.layers.values()]:
        module.to(device).train()
    for average in method.averages.values():
        average.to(device)
    pairs = training_pairs(recipe, splits, partition)
    sampler = StepSampler(0, args.repetitions, recipe.optim.batch_size, 0, 1)
    loader = training_loader(pairs, sampler, 0, pin_memory=False)
    rows = terms.suite(method, (send_to_device(batch, device) for batch in loader))
    print(markdown([row | {"weight": f"{row['weight']:g}"} for row in rows]))
    if args.json:
        write_json(Path(args.json), rows)
    who = args.model or "a student that is not trained yet"
    print(f"{who}; gradient: norm of the weighted term's; means of {args.repetitions} batches")


if __name__ == "__main__":
    cli.run(main)
