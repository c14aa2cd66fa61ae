"""Recipes for images of your own: text built from the constants of the CamVid benchmark, see generate.py."""

from collections.abc import Iterator

import camvid_bench
import paper

# family -> size of the benchmark whose settings it has, and what its title adds
FAMILIES = {"folder": ("full", ""), "folder_cpu": ("half", " on a CPU")}
STEPS = 1200
# tail of the name -> network, method, run of the benchmark with these settings (of half resolution, of full), title
ROLES = {
    "": ("lite0", "cwd", ("long_cwd_1200", "long_cwd"), "student, by CWD; trains its teachers and its baseline first"),
    "_deep": ("lite2", "supervised", ("long", "long"), "first teacher, on the labelled images alone"),
    "_wide": ("lite1", "supervised", ("long", "long"), "second teacher, on the labelled images alone"),
    "_supervised": (
        "lite0",
        "supervised",
        ("supervised_1200", "supervised"),
        "student on the labelled images alone",
    ),
}
DATA = """\
[data]
name = "folder"
root = "mine"                                # images/, masks/ and, if you like, unlabeled/
classes = ["background", "leaf", "rust"]     # mask value 0, 1, 2, ...; 255 is ignored
crop = {crop}
scales = [0.5, 0.75, 1.0, 1.5, 1.75, 2.0]

[partition]
labeled = 1.0                                # every mask that is not held out; or 50, or "1/8"
"""
BALANCE = f"class_balance = {camvid_bench.CLASS_BALANCE}"
BALANCE_NOTE = f"{BALANCE:45}# rare classes count more; 0: all pixels alike"


def all_recipes() -> Iterator[tuple[str, str]]:
    """Yield name and text of every recipe."""
    for family in FAMILIES:
        for tail in ROLES:
            yield family + tail, _recipe(family, tail)


def _recipe(family: str, tail: str) -> str:
    size, where = FAMILIES[family]
    network, method, runs, title = ROLES[tail]
    measured = f"{size}_{network}_1-16_{runs[size == 'full']}"
    reached = camvid_bench.result(measured, STEPS)
    assert reached, f"no report in recipes/camvid has a run {measured} of {STEPS} steps"
    body = paper.METHOD[method]
    if method == "cwd":
        recipes = {key: f"recipes/{family}_{key}.toml" for key in ("deep", "wide")}
        body = "".join(paper.teacher(*named) for named in recipes.items()) + body
    stage = "distill" if method == "cwd" else "teacher_cps"
    baselines = [] if tail else [f'[eval]\nbaselines = ["recipes/{family}_supervised.toml"]\n']
    return "\n".join(
        [
            f"# accelerate launch stages/{stage}.py --recipe recipes/{family}{tail}.toml\n"
            f"# Your own images{where}: the {title}.\n"
            "# The settings of the CamVid benchmark; no target of its own. "
            f"There, at {camvid_bench.PIXELS[size]}, this run alone: {reached}.\n"
            "# Written by recipes/generate.py.\n",
            f'[run]\nname = "{family}{tail}-s{{seed}}"\n',
            DATA.format(crop=camvid_bench.SIZES[size]["crop"]),
            paper.replaced("\n".join(camvid_bench.trained(size, network, body, STEPS)), BALANCE, BALANCE_NOTE),
            *baselines,
        ]
    )
