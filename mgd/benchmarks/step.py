"""One MGD iteration: the reference step, written plainly, beside ours.

The reference does what one iteration of the authors' code does: fp32, NCHW, a forward pass of its own for
labelled, first, second and mixed images in the student (those of first and second unused) and in both
teachers, losses on logits at full resolution.
"""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from mgd.benchmarks.timing import alternate, peak_memory, precision, ratio_row
from mgd.cache import kept
from mgd.data.cutmix import box_masks
from mgd.errors import UserError
from mgd.methods.base import StepOutput
from mgd.methods.mgd import MGD, MGDConfig
from mgd.models.backbones import feature_maps
from mgd.models.segmenter import Segmenter, SegOutput, nameless_segmenter
from mgd.recipe import Recipe
from mgd.sections import ModelSection, TeacherCache


def suite(
    recipe: Recipe,
    teachers: Mapping[str, ModelSection],
    batch_size: int,
    precisions: Sequence[str],
    repetitions: int,
    device: torch.device,
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """Measure the step of an MGD recipe.

    Args:
        recipe: student, losses and crop.
        teachers: the sections of its teachers by name.
        batch_size: labelled images; as many mixed ones come beside them.
        precisions: of our step, fp32 or bf16; the reference is fp32.
        repetitions: rounds that count.
        device: where to run.
        compiled: our networks go through torch.compile.

    Returns:
        Rows `name, reference, ours, ratio`: milliseconds a step, and MiB of its peak memory. Of the exact step in the
        last precision, ours alone, also the milliseconds of its parts and the TFLOP/s of the whole.

    Raises:
        UserError: the recipe's method is another.
    """
    if not isinstance(recipe.method, MGDConfig):
        raise UserError(f"{recipe.source}: the step suite needs [method] name = 'mgd', not {recipe.method.name!r}")
    num_classes = len(recipe.data.class_names())
    student = _network(recipe.student, num_classes, 0, device)
    frozen = {
        name: _network(section, num_classes, 1 + index, device)
        for index, (name, section) in enumerate(teachers.items())
    }
    plain_student, plain_teachers = _nchw(student), {name: _nchw(teacher) for name, teacher in frozen.items()}
    batch = random_batch(batch_size, recipe.data.crop, num_classes, device)
    for network in [student, *frozen.values()] if compiled else ():
        network.compile(dynamic=False)

    steps = {"reference": (lambda: reference_step(plain_student, plain_teachers, recipe.method, batch), "fp32")}
    cell = (recipe.cache or TeacherCache()).cell
    exact, remix = (recipe.method.model_copy(update={"remix": remix}) for remix in ("images", "predictions"))
    ours = {
        "exact": (MGD(exact, [student], frozen), batch),
        "remix": (MGD(remix, [student], frozen), batch),
        "cached": (MGD(remix, [student]), batch | cached_views(frozen, recipe.method, batch, cell)),
    }
    for title, (method, seen) in ours.items():
        step = functools.partial(method.step, seen, 0)
        steps |= {f"{title}, {kind}": (step, kind) for kind in precisions}
    trained = {name: plain_student if name == "reference" else student for name in steps}
    trainers = {name: _trainer(step, trained[name], kind, device) for name, (step, kind) in steps.items()}
    seconds = alternate(trainers, repetitions, device)
    memory = {}
    for name, (step, kind) in steps.items():
        for network in trained.values():
            network.zero_grad()
        memory[name] = peak_memory(
            lambda step=step, kind=kind, name=name: _backward(step, trained[name], kind, device), device
        )
    own = [name for name in steps if name != "reference"]
    rows = [ratio_row(f"step: {name}, ms", 1e3 * seconds["reference"], 1e3 * seconds[name]) for name in own]
    rows += [ratio_row(f"memory: {name}, MiB", memory["reference"] / 2**20, memory[name] / 2**20) for name in own]
    kind = precisions[-1]
    return rows + _breakdown(
        steps[f"exact, {kind}"][0], steps[f"cached, {kind}"][0], student, kind, repetitions, device
    )


def _breakdown(
    exact: Callable[[], StepOutput],
    cached: Callable[[], StepOutput],
    student: nn.Module,
    kind: str,
    repetitions: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Where the time of the exact step goes: what is not the teachers' is the cached step."""

    def cleared(run: Callable[[], object]) -> Callable[[], None]:
        def of_one_round() -> None:
            run()
            student.zero_grad()

        return of_one_round

    parts = {
        "exact": _trainer(exact, student, kind, device),
        "cached": _trainer(cached, student, kind, device),
        "backward": cleared(lambda: _backward(cached, student, kind, device)),
        "forward": cleared(lambda: _forward_only(cached, student, kind, device)),
    }
    seconds = alternate(parts, repetitions, device)
    split = {
        "teachers": seconds["exact"] - seconds["cached"],
        "student and losses": seconds["forward"],
        "backward": seconds["backward"] - seconds["forward"],
        "optimiser": seconds["cached"] - seconds["backward"],
    }
    rows = [_ours_alone(f"exact, {kind}: {part}, ms", 1e3 * value) for part, value in split.items()]
    with flop_counter() as counter, torch.compiler.set_stance("force_eager"):
        _backward(exact, student, kind, device)
    return [*rows, _ours_alone(f"exact, {kind}: TFLOP/s", counter.get_total_flops() / seconds["exact"] / 1e12)]


def reference_step(
    student: Segmenter, teachers: Mapping[str, Segmenter], config: MGDConfig, batch: Mapping[str, Tensor]
) -> StepOutput:
    """Return the loss of one reference iteration, eq. 7, and its terms."""
    mask = batch["mask"]
    mixed_image = torch.where(mask, batch["mix"], batch["unlabeled"])
    views = {"labeled": batch["image"], "first": batch["unlabeled"], "second": batch["mix"], "mixed": mixed_image}
    with torch.no_grad():
        seen = {
            name: {view: _forward(teacher, image) for view, image in views.items()}
            for name, teacher in teachers.items()
        }
        for view in ("first", "second"):
            _forward(student, views[view])
    labeled, mixed = _forward(student, views["labeled"]), _forward(student, views["mixed"])

    log = {"loss_supervised": functional.cross_entropy(labeled.logits, batch["label"], ignore_index=255)}
    log |= {"loss_pixel_labeled": 0.0, "loss_pixel_unlabeled": 0.0, "loss_image": 0.0, "loss_region": 0.0}
    for name in config.pixel.teachers:
        found = seen[name]
        pseudo = torch.where(mask, found["second"].logits, found["first"].logits).argmax(dim=1)
        log["loss_pixel_labeled"] += functional.cross_entropy(labeled.logits, found["labeled"].logits.argmax(dim=1))
        log["loss_pixel_unlabeled"] += functional.cross_entropy(mixed.logits, pseudo)
    for name in config.image.teachers:
        distance = (mixed.logits.mean((2, 3)) - seen[name]["mixed"].logits.mean((2, 3))).abs()
        log["loss_image"] += distance.sum() if config.image.reduction == "sum" else distance.mean()
    for name in config.region.teachers:
        difference = _correlation(mixed.features, config.region.grid) - _correlation(
            seen[name]["mixed"].features, config.region.grid
        )
        log["loss_region"] += difference.square().mean()
    loss = log["loss_supervised"] + config.pixel.weight * (log["loss_pixel_labeled"] + log["loss_pixel_unlabeled"])
    return StepOutput(loss + config.image.weight * log["loss_image"] + config.region.weight * log["loss_region"], log)


def flop_counter() -> FlopCounterMode:
    """Return torch's counter of operations, forward and backward, that knows of grouped convolutions.

    Its own formula takes the gradient of the weights of G groups for G times as dear as it is.
    """
    return FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward_flops}
    )


def _convolution_backward_flops(
    grad_shape: list[int], x_shape: list[int], w_shape: list[int], *rest: Any, **_: Any
) -> int:
    """Each of the gradients that are asked for, of input and weights, takes what the forward pass took."""
    *_, transposed, _, _, output_mask = rest
    return conv_flop_count(x_shape, w_shape, grad_shape, transposed) * sum(output_mask[:2])


def training_gmacs(recipe: Recipe, teachers: Mapping[str, ModelSection]) -> float:
    """Count the 10^9 multiply-accumulates of one training step, forward and backward, without computing them.

    Args:
        recipe: its method, networks, crop and batch.
        teachers: the sections of its frozen teachers by name, which are asked in every step.
    """
    num_classes, method_class = len(recipe.data.class_names()), recipe.method_class
    batch = random_batch(recipe.optim.batch_size, recipe.data.crop, num_classes, torch.device("cpu"))
    config = recipe.method.model_copy(update={"ohem": None})  # hard pixels cannot be told without values
    with torch.device("meta"):
        sections = method_class.sections(config, recipe.student)
        networks = [nameless_segmenter(section, num_classes) for _, section in sections]
        frozen = {name: nameless_segmenter(section, num_classes) for name, section in teachers.items()}
    method = method_class(config, networks, frozen)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, flop_counter() as counter:
        for network in [*networks, *method.averages.values(), *frozen.values()]:
            network.to_empty(device="cpu")  # autocast, which the losses switch off, knows no meta device
        method.step({key: fake.from_tensor(value) for key, value in batch.items()}, 0).loss.backward()
    return counter.get_total_flops() / 2e9


@torch.inference_mode()
def cached_views(
    teachers: Mapping[str, Segmenter], config: MGDConfig, batch: Mapping[str, Tensor], cell: int
) -> dict[str, Tensor]:
    """Return what a cache would hold of the teachers' outputs for a batch, by `VIEW/TEACHER/KIND` and `VIEW/valid`.

    Args:
        teachers: frozen networks by name.
        config: what its losses need is kept.
        batch: `image`, `unlabeled` and `mix` `[B, 3, H, W]`.
        cell: pixels a side over which logits and features are averaged.
    """
    cached = {}
    for name, kinds in MGD.cached_kinds(config).items():
        for view in ("image", "unlabeled", "mix"):
            found = kept(kinds, *teachers[name](batch[view]), cell=cell)
            cached |= {f"{view}/{name}/{kind}": value.clone() for kind, value in found.items()}
            cached[f"{view}/valid"] = torch.ones_like(batch[view][:, 0], dtype=torch.bool)
    return cached


def random_batch(size: int, crop: int, num_classes: int, device: torch.device) -> dict[str, Tensor]:
    """Return noise in the shape of a batch.

    Args:
        size: B, labelled images.
        crop: C, side of a crop, pixels.
        num_classes: K.
        device: where it shall lie.

    Returns:
        `image`, `unlabeled`, `mix` `[B, 3, C, C]` uint8, `label` `[B, C, C]` int64, `mask` `[B, 1, C, C]` bool.
    """
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (3, size, 3, crop, crop), generator=generator, dtype=torch.uint8)
    batch = dict(zip(("image", "unlabeled", "mix"), pixels, strict=True))
    batch["label"] = torch.randint(num_classes, (size, crop, crop), generator=generator)
    batch["mask"] = box_masks(size, (crop, crop), generator)
    return {key: value.to(device) for key, value in batch.items()}


def _network(section: ModelSection, num_classes: int, seed: int, device: torch.device) -> Segmenter:
    torch.manual_seed(seed)
    network = nameless_segmenter(section, num_classes)
    return network.to(device, memory_format=torch.channels_last).eval()


def _nchw(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).to(memory_format=torch.contiguous_format)


def _forward(network: Segmenter, image: Tensor) -> SegOutput:
    low, high = feature_maps(network.backbone, (image.float() - network.mean) / network.std)
    logits, features = network.head(low, high)
    return SegOutput(
        functional.interpolate(logits, size=image.shape[-2:], mode="bilinear", align_corners=False), features
    )


def _correlation(features: Tensor, grid: int) -> Tensor:
    vectors = functional.adaptive_avg_pool2d(features, grid).flatten(2).transpose(1, 2)
    return functional.cosine_similarity(vectors[:, :, None], vectors[:, None], dim=-1)


def _forward_only(step: Callable[[], StepOutput], network: nn.Module, kind: str, device: torch.device) -> None:
    network.train()
    with precision(kind, device):
        step()


def _backward(step: Callable[[], StepOutput], network: nn.Module, kind: str, device: torch.device) -> None:
    network.train()
    with precision(kind, device):
        out = step()
    out.loss.backward()


def _trainer(step: Callable[[], StepOutput], network: nn.Module, kind: str, device: torch.device) -> Callable[[], None]:
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-6, momentum=0.9)

    def run() -> None:
        _backward(step, network, kind, device)
        optimizer.step()
        optimizer.zero_grad()

    return run


def _ours_alone(name: str, value: float) -> dict[str, Any]:
    return {"name": name, "reference": None, "ours": value, "ratio": None}
