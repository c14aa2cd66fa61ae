"""Write the families of near-equal recipes; `python recipes/generate.py` after a change here.

Each recipe is written whole, so that it reads alone; a constant that many share is changed once,
here. tests/test_recipes.py fails when a file is not what this script writes.
"""

import sys
from pathlib import Path

RECIPES = Path(__file__).resolve().parent
sys.path.insert(0, str(RECIPES))

import paper  # noqa: E402

CAMVID = """\
[data]
name = "camvid"
root = "data/camvid"
image_scale = {image_scale}
crop = {crop}
scales = [0.5, 0.75, 1.0, 1.5, 1.75, 2.0]

[partition]
labeled = "{share}"
"""

STUDENT = """\
[student]
backbone = "{backbone}"
pretrained = {pretrained}
output_stride = 16

[student.head]
name = "deeplabv3plus"
channels = {channels}
low_level_channels = 24
"""

CPS = """\
[method]
name = "cps"
weight = 1.0
"""

TEACHERS_OF_STUDENT = """\
[teachers.deep]
recipe = "{deep}"

[teachers.wide]
recipe = "{wide}"

"""

MGD = """\
[method]
name = "mgd"

[method.pixel]
teachers = ["deep", "wide"]

[method.image]
teachers = ["deep"]
weight = 0.002
reduction = "sum"

[method.region]
teachers = ["wide"]
weight = 100.0
grid = 7
"""

OPTIM = """\
[optim]
name = "sgd"
lr = {lr}
momentum = 0.9
weight_decay = 5e-4
batch_size = {batch_size}
steps = {steps}
"""

TEACHERS = {"lite2": "tf_efficientnet_lite2", "lite1": "tf_efficientnet_lite1"}
STUDENTS = {"mbv2": ("mobilenetv2_050", "false"), "lite0": ("tf_efficientnet_lite0", "true")}

BASELINES = {
    "supervised": "the student on the labelled images alone",
    "mean_teacher": "the student by Mean Teacher, a baseline",
    "cps": "the student by CPS, a baseline",
    "kd": "the student by pixel-wise distillation from both teachers, a baseline",
    "cwd": "the student by channel-wise distillation from both teachers, a baseline",
}

# size -> image_scale, crop, head width of teachers and students, batch, steps of teachers and students
SIZES = {
    "": {"image_scale": "1.0", "crop": 320, "channels": 128, "batch_size": 8, "steps": (3000, 4000)},
    "_half": {"image_scale": "0.5", "crop": 160, "channels": 64, "batch_size": 4, "steps": (300, 600)},
}
COSTS = {
    "": "not measured here; a GPU is meant",
    "_half": "see the README's CamVid table, measured on one CPU core",
}


def camvid() -> dict[str, str]:
    """Return file name -> text of all CamVid recipes."""
    files = {}
    for size, numbers in SIZES.items():
        for share in ("1/16", "1/8") if not size else ("1/16",):
            tail = share.replace("/", "-")
            names = {key: f"camvid{size}_{key}_{tail}" for key in (*TEACHERS, *STUDENTS)}
            data = CAMVID.format(share=share, **numbers)
            for key, backbone in TEACHERS.items():
                body = STUDENT.format(backbone=backbone, pretrained="true", **numbers)
                optim = OPTIM.format(lr=0.01, batch_size=numbers["batch_size"], steps=numbers["steps"][0])
                note = "a teacher, by CPS with CutMix"
                files[names[key]] = recipe(names[key], "teacher_cps", note, size, [data, body, CPS, optim])
            for key, (backbone, pretrained) in STUDENTS.items():
                body = STUDENT.format(backbone=backbone, pretrained=pretrained, **numbers)
                optim = OPTIM.format(lr=0.014, batch_size=numbers["batch_size"], steps=numbers["steps"][1])
                baseline = f"{names[key]}_supervised"
                deep, wide = (f"recipes/{names[teacher]}.toml" for teacher in TEACHERS)
                evaluation = f'[eval]\nbaselines = ["recipes/{baseline}.toml"]\n'
                teachers = TEACHERS_OF_STUDENT.format(deep=deep, wide=wide)
                files[names[key]] = recipe(
                    names[key],
                    "distill",
                    "the student, by MGD; trains its teachers and its baseline first",
                    size,
                    [data, body, teachers + MGD, optim, evaluation],
                )
                for method, note in BASELINES.items():
                    section = paper.METHOD[method].format(weight=1.0, cps_note="")
                    stage = "distill" if method in ("kd", "cwd") else "teacher_cps"
                    parts = [data, body, (teachers if stage == "distill" else "") + section, optim]
                    name = f"{names[key]}_{method}"
                    files[name] = recipe(name, stage, note, size, parts)
    return {f"{name}.toml": text for name, text in files.items()}


def recipe(name: str, stage: str, note: str, size: str, sections: list[str]) -> str:
    """Return one recipe: command, what it is, target and cost, then the sections."""
    head = (
        f"# accelerate launch stages/{stage}.py --recipe recipes/{name}.toml\n"
        f"# CamVid: {note}. Val mIoU and cost: {COSTS[size]}.\n"
        "# Written by recipes/generate.py.\n"
    )
    run = f'[run]\nname = "{name}-s{{seed}}"\n'
    return "\n".join([head, run, *sections])


def all_files() -> dict[str, str]:
    """Return file name -> text of every generated recipe."""
    return camvid() | {f"{name}.toml": text for name, text in paper.all_recipes()}


def main() -> None:
    """Write all files."""
    for name, text in all_files().items():
        (RECIPES / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
