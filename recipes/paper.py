"""Recipes of the paper's tables (VOC and Cityscapes): text built from constants, see generate.py.

The target numbers are the paper's own mIoU in % (Qin et al., ECCV 2022, Tables 1 to 6).
"""

from collections.abc import Iterator, Mapping

SHARES = ("1/16", "1/8", "1/4", "1/2")

DATA = {
    "voc": '[data]\nname = "voc"\nroot = "data/VOCdevkit/VOC2012"\nmasks = "{masks}"\ncrop = 512\n',
    "city": '[data]\nname = "cityscapes"\nroot = "data/cityscapes"\ncrop = 800\n',
}
AUGMENTATION = "scales = [0.5, 0.75, 1.0, 1.5, 1.75, 2.0]\nflip = true\n"
EPOCHS = {"voc": (32, 34, 40, 60), "city": (128, 137, 160, 240)}  # over the unlabelled set, by share
BACKBONES = {  # name: backbone, output stride, width of the low-level branch
    "r101": ("resnet101s", 16, 48),
    "wrn50": ("wide_resnet50_2", 16, 48),
    "r18": ("resnet18d", 16, 48),
    "mbv2": ("mobilenetv2_100", 32, 24),
}
LEARNING_RATES = {
    "voc": {"r101": 0.01, "wrn50": 0.004, "r18": 0.01, "mbv2": 0.014},
    "city": {"r101": 0.02, "wrn50": 0.02, "r18": 0.02, "mbv2": 0.02},
}
# Ours, not the paper's: light backbones under a narrow head. name: backbone, GMACs of the whole network at 512x512
COMPACT = {
    "mbv2": ("mobilenetv2_100", 2.5),
    "mnv4s": ("mobilenetv4_conv_small", 2.2),
    "efficientvit": ("efficientvit_b0", 1.4),
    "hgnetv2": ("hgnetv2_b0", 2.9),
}
COMPACT_WIDTH = 48
CODE_LAMBDAS = {("voc", "mbv2"): (0.0005, 50), ("city", "r18"): (0.001, 100)}
CPS_WEIGHTS = {
    "voc": {"weight": 1.0, "cps_note": "  # the authors of CPS: 1.5"},
    "city": {"weight": 5.0, "cps_note": "  # the authors of CPS: 6"},
}
METHODS = ("supervised", "mean_teacher", "cps", "kd", "cwd", "mgd")

PAPER = {  # (data, network, method) -> mIoU at 1/16, 1/8, 1/4, 1/2; Tables 1 and 3
    ("voc", "r101", "cps"): (73.98, 76.43, 77.61, 78.64),
    ("voc", "wrn50", "cps"): (68.17, 71.38, 74.78, 75.85),
    ("voc", "r18", "supervised"): (42.17, 55.65, 62.52, 65.39),
    ("voc", "r18", "mean_teacher"): (44.61, 56.62, 61.79, 66.48),
    ("voc", "r18", "cps"): (47.13, 60.05, 65.89, 68.69),
    ("voc", "r18", "kd"): (56.37, 62.01, 66.23, 68.55),
    ("voc", "r18", "cwd"): (50.45, 58.71, 63.96, 65.82),
    ("voc", "r18", "mgd"): (66.86, 68.29, 69.71, 71.59),
    ("voc", "mbv2", "supervised"): (46.02, 46.66, 48.19, 49.61),
    ("voc", "mbv2", "mean_teacher"): (45.11, 47.20, 49.15, 49.63),
    ("voc", "mbv2", "cps"): (46.57, 48.75, 49.94, 50.52),
    ("voc", "mbv2", "kd"): (47.99, 49.30, 50.07, 50.68),
    ("voc", "mbv2", "cwd"): (46.13, 47.45, 48.89, 49.70),
    ("voc", "mbv2", "mgd"): (50.95, 52.27, 53.92, 55.88),
    ("city", "r101", "cps"): (74.72, 77.62, 78.85, 79.58),
    ("city", "wrn50", "cps"): (72.56, 75.41, 77.68, 78.37),
    ("city", "r18", "supervised"): (55.39, 60.71, 67.51, 69.83),
    ("city", "r18", "mean_teacher"): (56.92, 63.61, 67.46, 70.38),
    ("city", "r18", "cps"): (59.43, 67.35, 70.64, 73.81),
    ("city", "r18", "kd"): (58.10, 64.62, 69.35, 71.76),
    ("city", "r18", "cwd"): (55.88, 61.47, 67.80, 70.02),
    ("city", "r18", "mgd"): (70.91, 72.65, 74.42, 75.40),
    ("city", "mbv2", "supervised"): (50.06, 51.97, 54.03, 56.86),
    ("city", "mbv2", "mean_teacher"): (51.10, 53.85, 56.21, 57.25),
    ("city", "mbv2", "cps"): (53.34, 55.61, 57.98, 59.20),
    ("city", "mbv2", "kd"): (53.45, 54.89, 55.28, 57.90),
    ("city", "mbv2", "cwd"): (51.52, 52.64, 54.37, 57.01),
    ("city", "mbv2", "mgd"): (58.00, 59.27, 61.36, 62.55),
}
PSEUDOSEG = {  # (network, method) -> the same on the splits of PseudoSeg (VOC); Table 2
    ("r101", "cps"): (64.07, 67.42, 71.71, 75.88),
    ("wrn50", "cps"): (60.01, 63.32, 67.84, 72.03),
    ("r18", "supervised"): (15.54, 22.43, 35.78, 51.47),
    ("r18", "mean_teacher"): (12.58, 18.15, 33.71, 50.02),
    ("r18", "cps"): (24.53, 36.19, 47.61, 56.85),
    ("r18", "mgd"): (58.03, 61.94, 64.97, 67.40),
}
BOTH, DEEP, WIDE = '["deep", "wide"]', '["deep"]', '["wide"]'
# name -> teachers of pixel, image and region terms, images of the pixel term, grid, target on VOC and
# on Cityscapes (None: not reported), table. "twin" is the same teacher trained with another seed.
ABLATIONS = {
    "teachers_deep": (DEEP, DEEP, DEEP, "both", 7, 64.85, 69.63, "4"),
    "teachers_wide": (WIDE, WIDE, WIDE, "both", 7, 64.36, 68.98, "4"),
    "teachers_deep_deep": ('["deep", "twin"]', DEEP, '["twin"]', "both", 7, 66.14, 71.19, "4"),
    "teachers_wide_wide": ('["wide", "twin"]', WIDE, '["twin"]', "both", 7, 65.78, 70.92, "4"),
    "losses_p": (BOTH, "[]", "[]", "both", 7, 63.61, 69.05, "5a"),
    "losses_p_i": (BOTH, DEEP, "[]", "both", 7, 66.01, 71.03, "5a"),
    "losses_p_r": (BOTH, "[]", WIDE, "both", 7, 66.02, 71.15, "5a"),
    "losses_p_i_r_of_both": (BOTH, BOTH, BOTH, "both", 7, 67.51, 71.96, "5a"),
    "losses_labeled": (BOTH, "[]", "[]", "labeled", 7, 58.24, 63.98, "5b"),
    **{
        f"grid_{grid}": (BOTH, DEEP, WIDE, "both", grid, target, None, "6")
        for grid, target in ((3, 66.83), (5, 67.01), (9, 67.75), (11, 67.38))
    },
}


def all_recipes() -> Iterator[tuple[str, str]]:
    """Yield name and text of every recipe."""
    for data in DATA:
        for share in SHARES:
            for teacher in ("r101", "wrn50"):
                yield _plain(data, teacher, share, "cps")
            for student in ("r18", "mbv2"):
                for method in METHODS:
                    yield _plain(data, student, share, method)
        for ablation, row in ABLATIONS.items():
            target = row[5] if data == "voc" else row[6]
            if target is not None:
                yield _ablation(data, ablation, row, target)
        for network in COMPACT:
            yield _compact(data, network)
    for share in SHARES:
        for network, method in (*PSEUDOSEG, ("r18", "kd"), ("r18", "cwd")):
            yield _plain("voc", network, share, method, protocol="pseudoseg")


def _plain(data: str, network: str, share: str, method: str, protocol: str = "cps") -> tuple[str, str]:
    place = SHARES.index(share)
    infix = "_pseudoseg" if protocol == "pseudoseg" else ""
    stem = f"{data}{infix}_{network}_{share.replace('/', '-')}"
    is_teacher = network in ("r101", "wrn50")
    name = stem if method == "mgd" or is_teacher else f"{stem}_{method}"
    targets = PSEUDOSEG.get((network, method)) if infix else PAPER[data, network, method]
    table = "2" if infix else {"voc": "1", "city": "3"}[data]
    teachers = {key: f"recipes/{data}{infix}_{net}_{share.replace('/', '-')}.toml" for key, net in _TEACHERS.items()}
    body = METHOD[method].format(**CPS_WEIGHTS[data], **mgd_values(data, network))
    if method in ("mgd", "kd", "cwd"):
        body = "".join(teacher(key, recipe) for key, recipe in teachers.items()) + body
    return _recipe(name, data, network, share, protocol, body, (targets[place], table) if targets else None)


def replaced(text: str, old: str, new: str) -> str:
    """Return `text` with `new` for `old`, which must be there, once."""
    assert text.count(old) == 1, f"{old!r} comes {text.count(old)} times in\n{text}"
    return text.replace(old, new)


def _compact(data: str, network: str) -> tuple[str, str]:
    """Return the MGD recipe of mbv2 at 1/8 with a light network in its place."""
    backbone, gmacs = COMPACT[network]
    _, text = _plain(data, "mbv2", "1/8", "mgd")
    name, size = f"{data}_{network}_1-8_compact", f"{gmacs} GMACs at 512x512, head and all"
    body = replaced(text[text.index("\n[run]") :], f"{data}_mbv2_1-8-s", f"{name}-s")
    body = replaced(body, 'backbone = "mobilenetv2_100"', f'backbone = "{backbone}"')
    body = replaced(body, "channels = 256\n", f"channels = {COMPACT_WIDTH}\n")
    return name, (
        f"# accelerate launch stages/distill.py --recipe recipes/{name}.toml\n"
        f"# For devices: {size}. No target: the paper has no such student. Cost: GPU hours, not measured here.\n"
        f"# Written by recipes/generate.py.\n{body[: body.index('[reference]')].rstrip()}\n"
    )


def _ablation(data: str, ablation: str, row: tuple, target: float) -> tuple[str, str]:
    name = f"{data}_r18_1-8_{ablation}"
    recipes = {key: f"recipes/{data}_{network}_1-8.toml" for key, network in _TEACHERS.items()}
    body = ablated(row, recipes, mgd_values(data, "r18"))
    return _recipe(name, data, "r18", "1/8", "cps", body, (target, row[-1]))


def ablated(row: tuple, recipes: Mapping[str, str], values: Mapping[str, object]) -> str:
    """Return the text of [teachers] and [method] of a row of `ABLATIONS`; `recipes`: of deep and wide."""
    pixel, image, region, on, grid = row[:5]
    used = sorted({key for key in ("deep", "twin", "wide") if f'"{key}"' in pixel + image + region})
    sources = {**recipes, "twin": recipes["deep" if "deep" in used else "wide"]}
    tables = [teacher(key, sources[key], "seed_offset = 1000\n" if key == "twin" else "") for key in used]
    where = '["labeled", "unlabeled"]' if on == "both" else '["labeled"]'
    changed = {"pixel": pixel, "image": image, "region": region, "on": where, "grid": grid}
    return "".join(tables) + METHOD["mgd"].format(**{**values, **changed})


_TEACHERS = {"deep": "r101", "wide": "wrn50"}


def mgd_values(data: str, network: str) -> dict[str, object]:
    """Return what `METHOD["mgd"]` is filled with."""
    code = CODE_LAMBDAS.get((data, network))
    note = f"  # paper; the authors' code: {code[0]} here, {code[1]} below" if code else ""
    on = '["labeled", "unlabeled"]'
    return {"pixel": BOTH, "image": DEEP, "region": WIDE, "on": on, "lambda2": "100.0", "grid": 7, "note": note}


def teacher(key: str, recipe: str, more: str = "") -> str:
    """Return the text of one table of [teachers]."""
    return f'[teachers.{key}]\nrecipe = "{recipe}"\n{more}\n'


METHOD = {
    "supervised": '[method]\nname = "supervised"\n',
    "mean_teacher": """\
[method]
name = "mean_teacher"
decay = 0.99
weight = 100.0  # ours, of the mean squared distance of probabilities; the paper does not name one
""",
    "cps": """\
[method]
name = "cps"
weight = {weight}{cps_note}
""",
    "kd": """\
[method]
name = "kd"
distill_from = ["deep", "wide"]
on = ["labeled", "unlabeled"]
temperature = 1.0  # ours, as the weight; the paper does not name them
weight = 1.0
""",
    "cwd": """\
[method]
name = "cwd"
distill_from = ["deep", "wide"]
on = ["labeled", "unlabeled"]
temperature = 4.0
weight = 3.0
""",
    "mgd": """\
[method]
name = "mgd"

[method.pixel]
teachers = {pixel}
on = {on}

[method.image]
teachers = {image}
weight = 0.002{note}
reduction = "sum"  # the authors' code, which 0.002 belongs to; "mean" is the paper's equation

[method.region]
teachers = {region}
weight = {lambda2}
grid = {grid}
""",
}
OHEM = """\
# The authors' code, not the paper, counts hard pixels only; to do so:
# [method.ohem]
# threshold = 0.7
# min_kept_per_image = 50000
"""


def _recipe(
    name: str, data: str, network: str, share: str, protocol: str, body: str, target: tuple[float, str] | None
) -> tuple[str, str]:
    backbone, output_stride, low_level = BACKBONES[network]
    is_teacher = network in ("r101", "wrn50")
    stage = "distill" if "[teachers" in body else "teacher_cps"
    batch = 16 if data == "city" and not is_teacher else 8
    # As many steps on the splits of PseudoSeg, whose unlabelled set is small, as on those of CPS.
    length = (
        "steps = 40000  # ours: about as many as on the splits of CPS"
        if protocol == "pseudoseg"
        else f"epochs = {EPOCHS[data][SHARES.index(share)]}"
    )
    masks = "SegmentationClass" if protocol == "pseudoseg" else "SegmentationClassAug"
    goal = f"val mIoU {target[0]:.2f} (paper, Table {target[1]})" if target else "not reported by the paper"
    sections = [
        f"# accelerate launch stages/{stage}.py --recipe recipes/{name}.toml\n"
        f"# Target: {goal}. Cost: GPU hours, not measured here.\n"
        "# Written by recipes/generate.py.\n",
        f'[run]\nname = "{name}-s{{seed}}"\n',
        DATA[data].format(masks=masks) + AUGMENTATION,
        f'[partition]\nprotocol = "{protocol}"\nlabeled = "{share}"\n',
        f'[student]\nbackbone = "{backbone}"\npretrained = true\noutput_stride = {output_stride}\n'
        + (
            "# multi_grid = [2, 4, 8]  in the authors' code; the paper does not speak of it\n"
            if output_stride == 16
            else ""
        )
        + f'\n[student.head]\nname = "deeplabv3plus"\nchannels = 256\nlow_level_channels = {low_level}\n'
        "aspp_rates = [6, 12, 18]\n",
        body + ("\n" + OHEM if data == "city" else ""),
        f'[optim]\nname = "sgd"\nlr = {LEARNING_RATES[data][network]}\nmomentum = 0.9\n'
        f"weight_decay = 5e-4  # paper; 1e-4 in the authors' code\npower = 0.9\nbatch_size = {batch}\n{length}\n",
        '[eval]\nmode = "slide"\nevery = 4000  # best/ keeps the best of these\n',
    ]
    if target:
        sections.append(f'[reference]\nmiou = {target[0]:.2f}\nsource = "paper, Table {target[1]}"\n')
    return name, "\n".join(sections)
