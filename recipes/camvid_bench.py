"""Recipes of the CamVid benchmark: text built from constants, see generate.py."""

import csv
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import paper

SHARES = ("1/32", "1/16", "1/8", "1/4", "1/1")
TEACHERS = {"lite2": "tf_efficientnet_lite2", "lite1": "tf_efficientnet_lite1"}
STUDENTS = {"mbv2": ("mobilenetv2_050", "false"), "lite0": ("tf_efficientnet_lite0", "true")}
METHODS = {
    "mgd": "the student, by MGD; trains its teachers and its baseline first",
    "supervised": "the student on the labelled images alone, a baseline",
    "mean_teacher": "the student by Mean Teacher, a baseline",
    "cps": "the student by CPS, a baseline",
    "kd": "the student by pixel-wise distillation from both teachers, a baseline",
    "cwd": "the student by channel-wise distillation from both teachers, a baseline",
}
# Optimiser, rate and OHEM were chosen once, for the supervised lite0 student with 300 steps and a seed that no table
# shows (10; val mIoU: SGD 0.014 38.4, AdamW 1e-3 41.5, 3e-3 42.3, 2e-3 with OHEM 43.5); all methods have the same.
LEARNING_RATE = 2e-3
# Chosen for the same student by the val mIoU of the images of seed 0 (trials.md: 0 43.4, 0.5 45.6, 1 42.8).
CLASS_BALANCE = 0.5
LONG_TEACHERS = "under teachers that learnt from labels alone"
UNDER_LONG = {
    "mgd": "the student by MGD at the paper's weights",
    "kd": "the student by pixel-wise distillation from both teachers",
    "cwd": "the student by channel-wise distillation from both teachers",
    "pixel": "the student by the pixel term alone, rare classes weighted",
    "weighted": "the student by MGD with a tenth of the paper's lambda2, rare classes weighted in the pixel term",
}
PIXEL_BALANCE = f"class_balance = {CLASS_BALANCE}  # rare classes count more in the teachers' labels, too\n"
# L_P alone, in which rare classes count as much more as in the supervised loss.
PIXEL = (
    f'[method]\nname = "mgd"\n\n[method.pixel]\nteachers = {paper.BOTH}\non = ["labeled", "unlabeled"]\n{PIXEL_BALANCE}'
)
# size -> constants of all its recipes; width: of the teachers' head and of the students'; steps: of teachers, of the
# student with ImageNet weights, of the student without; long: steps of a teacher that learns from labels alone, 19 and
# 56 % of the operations that CPS takes; online: steps of one run for all three networks, which has as
# many multiply-accumulates as they have apart (stages/benchmark.py: 918496 and 48159 G)
SIZES = {
    "full": {
        "image_scale": "1.0",
        "crop": 320,
        "width": (128, 48),
        "batch_size": 4,
        "steps": (1200, 1200, 3600),
        "long": 1200,
        "online": 2755,
    },
    "half": {
        "image_scale": "0.5",
        "crop": 160,
        "width": (64, 48),
        "batch_size": 4,
        "steps": (400, 400, 1200),
        "long": 1200,
        "online": 876,
    },
}
PIXELS = {"full": "480x360", "half": "240x180"}
MACHINE = {"full": "a GPU is meant", "half": "others of its kind: recipes/camvid/report*.md"}
CAMVID = Path(__file__).resolve().parent / "camvid"


class Results(NamedTuple):
    """What stages/report.py made of the runs of one machine."""

    table: Path
    size: str
    minutes: str
    boxes: str = ""
    """What is to be said of runs that mix images."""


# Those to prefer first; a row counts while the recipe still has its steps.
RESULTS = (
    Results(CAMVID / "report.csv", "half", "{:.0f} minutes of one CPU core"),
    Results(CAMVID / "report_full.csv", "full", "{:.1f} minutes, in bf16, of an H200 that up to fourteen runs shared"),
    Results(
        CAMVID / "report_small_boxes.csv",
        "half",
        "{:.0f} minutes of one CPU core",
        "; CutMix boxes were half as large",
    ),
)
DATA = """\
[data]
name = "camvid"
root = "data/camvid"
image_scale = {image_scale}
crop = {crop}
scales = [0.5, 0.75, 1.0, 1.5, 1.75, 2.0]

[partition]
labeled = "{share}"
"""

NETWORK = """\
[student]
backbone = "{backbone}"
pretrained = {pretrained}
output_stride = 16

[student.head]
name = "deeplabv3plus"
channels = {width}
low_level_channels = 24
"""

# The authors' threshold on Cityscapes; about their share of a crop's pixels is kept at the least.
OHEM = """\
[method.ohem]
threshold = 0.7
min_kept_per_image = {min_kept}
"""

OPTIM = """\
[optim]
name = "adamw"
lr = {lr}
weight_decay = 0.01
batch_size = {batch_size}
steps = {steps}
"""


def all_recipes() -> Iterator[tuple[str, str]]:
    """Yield name (below camvid/) and text of every recipe."""
    for size in SIZES:
        for share in SHARES:
            for network in TEACHERS:
                body = paper.METHOD["cps"].format(weight=1.0, cps_note="")
                yield _recipe(size, share, network, "", "a teacher, by CPS with CutMix", body)
            for network in STUDENTS:
                values = paper.mgd_values("camvid", network)
                for method, note in METHODS.items():
                    body = paper.METHOD[method].format(weight=1.0, cps_note="", **values)
                    if method in ("mgd", "kd", "cwd"):
                        body = "".join(paper.teacher(*named) for named in _teachers(size, share).items()) + body
                    yield _recipe(size, share, network, "" if method == "mgd" else f"_{method}", note, body)
        yield _online(size)
        yield from _long(size)


def _long(size: str) -> Iterator[tuple[str, str]]:
    """Yield teachers that learn from the labels alone, at half resolution for longer, and students under them."""
    values = paper.mgd_values("camvid", "lite0")
    for share in SHARES[:-1]:
        for network in TEACHERS:
            times = SIZES[size]["long"] // SIZES[size]["steps"][0]
            compared = f"{times} times as long as" if times > 1 else "for as many steps as"
            note = f"a teacher, on the labelled images alone and {compared} by CPS"
            yield _recipe(size, share, network, "_long", note, paper.METHOD["supervised"], SIZES[size]["long"])
        recipes = _teachers(size, share, "_long")
        bodies = {method: paper.METHOD[method].format(**values) for method in ("mgd", "kd", "cwd")} | {"pixel": PIXEL}
        # At the paper's lambda2 of 100 L_R outweighs the labels (camvid/results.md).
        light = {"lambda2": "10.0  # the paper has 100", "on": f"{values['on']}\n{PIXEL_BALANCE.rstrip()}"}
        bodies["weighted"] = paper.METHOD["mgd"].format(**values | light)
        teachers = "".join(paper.teacher(*named) for named in recipes.items())
        for network in STUDENTS if share == "1/16" else ("lite0",):
            for method, body in bodies.items():
                tail = "_long" if method == "mgd" else f"_long_{method}"
                yield _recipe(size, share, network, tail, f"{UNDER_LONG[method]}, {LONG_TEACHERS}", teachers + body)
    recipes = _teachers(size, "1/16", "_long")
    for ablation, row in paper.ABLATIONS.items():
        note = f"MGD changed as in Table {row[-1]} of the paper, {LONG_TEACHERS}"
        yield _recipe(size, "1/16", "lite0", f"_long_{ablation}", note, paper.ablated(row, recipes, values))
    for key, recipe in recipes.items():
        body = paper.replaced(paper.METHOD["cwd"], paper.BOTH, f'["{key}"]')
        note = f"the student by channel-wise distillation from one teacher, {key}, that learnt from labels alone"
        yield _recipe(size, "1/16", "lite0", f"_long_cwd_{key}", note, paper.teacher(key, recipe) + body)


def _online(size: str) -> tuple[str, str]:
    numbers, body = SIZES[size], '[method]\nname = "mgd_online"\ncps_weight = 1.0\n'
    for key, network in zip(("deep", "wide"), TEACHERS, strict=True):
        table = NETWORK.format(backbone=TEACHERS[network], pretrained="true", width=numbers["width"][0])
        body += "\n" + table.replace("[student", f"[method.teachers.{key}")
    terms = paper.METHOD["mgd"].format(**paper.mgd_values("camvid", "lite0"))
    note = "teachers and student in one run, at the operations of the three runs"
    return _recipe(
        size, "1/16", "lite0", "_online", note, body + terms.partition('name = "mgd"\n')[2], numbers["online"]
    )


def _teachers(size: str, share: str, tail: str = "") -> dict[str, str]:
    names = dict(zip(("deep", "wide"), TEACHERS, strict=True))
    return {key: f"recipes/camvid/{_name(size, network, share)}{tail}.toml" for key, network in names.items()}


def _name(size: str, network: str, share: str) -> str:
    return f"{size}_{network}_{share.replace('/', '-')}"


@functools.cache
def _results(table: Path) -> dict[str, dict[str, str]]:
    with table.open(encoding="utf-8", newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def result(name: str, steps: int) -> str | None:
    """Word what a recipe reached and what it took, if it has been run as it stands."""
    for results in RESULTS:
        row = _results(results.table).get(f"camvid_{name}")
        if not name.startswith(results.size) or row is None or int(row["steps"]) != steps:
            continue
        spread = f" ± {float(row['spread']):.1f}" if row["spread"] else ""
        counts = f"{row['labeled']} / {row['unlabeled']} images"
        note = "" if row["method"] == "supervised" else results.boxes
        return (
            f"val mIoU {float(row['miou']):.1f}{spread} (seeds {row['seeds']}; {counts}{note}), "
            f"{results.minutes.format(float(row['minutes']))}"
        )
    return None


def _recipe(size: str, share: str, network: str, tail: str, note: str, body: str, steps: int = 0) -> tuple[str, str]:
    """Return name and text of one recipe; `body`: its [teachers] and [method]; `steps`: other than its network's."""
    is_teacher = network in TEACHERS
    steps = steps or SIZES[size]["steps"][0 if is_teacher else 1 if STUDENTS[network][1] == "true" else 2]
    name = _name(size, network, share) + tail
    stage = "distill" if "[teachers" in body else "teacher_cps"
    reached = result(name, steps)
    sections = [
        f"# accelerate launch stages/{stage}.py --recipe recipes/camvid/{name}.toml\n"
        f"# CamVid: {note}. {f'Ours: {reached}' if reached else f'Not measured; {MACHINE[size]}'}.\n"
        "# Written by recipes/generate.py.\n",
        f'[run]\nname = "camvid_{name}-s{{seed}}"\n',
        DATA.format(share=share, **SIZES[size]),
        *trained(size, network, body, steps),
    ]
    if not tail and not is_teacher:
        sections.append(f'[eval]\nbaselines = ["recipes/camvid/{name}_supervised.toml"]\n')
    return name, "\n".join(sections)


def trained(size: str, network: str, body: str, steps: int) -> list[str]:
    """Return the sections from [student] to [optim]; `body`: the text of [teachers] and [method]."""
    is_teacher, numbers = network in TEACHERS, SIZES[size]
    backbone, pretrained = (TEACHERS[network], "true") if is_teacher else STUDENTS[network]
    method = "[method]\n" + body.partition("[method]\n")[2].partition("\n")[0] + "\n"
    return [
        NETWORK.format(backbone=backbone, pretrained=pretrained, width=numbers["width"][not is_teacher]),
        paper.replaced(body, method, f"{method}class_balance = {CLASS_BALANCE}\n"),
        OHEM.format(min_kept=numbers["crop"] ** 2 * 2 // 25),
        OPTIM.format(lr=LEARNING_RATE, batch_size=numbers["batch_size"], steps=steps),
    ]
