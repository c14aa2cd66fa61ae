"""Shared fixtures: a tiny recipe, and the stages started as a user starts them."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the same bits are promised on a CPU; hides CUDA devices only

import json
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from torch import nn
from torch.nn import functional

from mgd import checks, finished
from mgd.data import reading
from mgd.models.segmenter import SegOutput

ROOT = Path(__file__).resolve().parents[1]
torch.backends.cudnn.allow_tf32 = False  # in this process, where results are compared with references to 1e-3 and finer

TINY = {
    "run": {"name": "tiny", "threads": 1, "log_every": 1, "checkpoint_every": 2},
    "data": {
        "name": "shapes",
        "num_train": 12,
        "num_val": 5,
        "size": 48,
        "crop": 32,
        "scales": [0.75, 1.0, 1.5],
        "workers": 0,
    },
    "partition": {"labeled": 4},
    "student": {
        "backbone": "test_resnet",
        "pretrained": False,
        "output_stride": 16,
        "head": {"name": "deeplabv3plus", "channels": 16, "low_level_channels": 8, "aspp_rates": [1, 2]},
    },
    "method": {"name": "supervised"},
    "optim": {"lr": 0.01, "batch_size": 4, "steps": 4},
}

TEACHER = TINY["student"] | {"head": {"name": "lraspp", "channels": 16}}
ONLINE = {
    "name": "mgd_online",
    "teachers": {
        "deep": TEACHER | {"backbone": "test_efficientnet"},
        "wide": TEACHER | {"backbone": "test_byobnet"},
    },
    "pixel": {"teachers": ["deep", "wide"]},
    "image": {"teachers": ["deep"]},
    "region": {"teachers": ["wide"], "grid": 2},  # as many cells as features of stride 16 have in a crop of 32
}


class Toy(nn.Module):
    """A float64 segmenter of 4 classes; with `norm` it has BatchNorm statistics that could drift."""

    def __init__(self, seed, channels=6, norm=False):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Conv2d(3, channels, 3, padding=1, stride=2).double()
        self.norm = nn.BatchNorm2d(channels).double() if norm else nn.Identity()
        self.classifier = nn.Conv2d(channels, 4, 1).double()

    def forward(self, image):
        features = self.norm(self.body(image.double() / 255)).tanh()
        logits = functional.interpolate(self.classifier(features), size=image.shape[-2:], mode="bilinear")
        return SegOutput(logits, features)


@pytest.fixture
def batch():
    """Two images of each kind in 16 x 16 pixels, 4 classes, some pixels ignored."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(256, (3, 2, 3, 16, 16), generator=generator, dtype=torch.uint8)
    label = torch.randint(4, (2, 16, 16), generator=generator)
    label[0, :3] = 255
    mask = torch.rand(2, 1, 16, 16, generator=generator) < 0.4
    return {"image": pixels[0], "label": label, "unlabeled": pixels[1], "mix": pixels[2], "mask": mask}


def merged(base: dict, changes: dict) -> dict:
    """Return `base` with nested `changes` laid over it."""
    result = dict(base)
    for key, value in changes.items():
        both_tables = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both_tables else value
    return result


@pytest.fixture
def write_recipe(tmp_path):
    """Write a tiny recipe with changes; return its path. Runs go below tmp_path/runs."""

    def write(file: str = "tiny.toml", **changes) -> Path:
        table = merged(merged(TINY, {"run": {"output": str(tmp_path / "runs")}}), changes)
        path = tmp_path / file
        path.write_text(tomli_w.dumps(table))
        return path

    return write


def stage_command(stage: str, *args: object, launcher: tuple[str, ...] = ()) -> list[str]:
    """Return the command line of a stage."""
    return [*(launcher or (sys.executable,)), str(ROOT / "stages" / stage), *map(str, args)]


def run_stage(stage: str, *args: object, launcher: tuple[str, ...] = (), cwd=None, env=None):
    """Run a stage to its end; returns the completed process with its output as text."""
    return subprocess.run(
        stage_command(stage, *args, launcher=launcher),
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        timeout=280,
    )


def call_stage(capsys, stage: str, *args: object) -> tuple[int, str, str]:
    """Run a stage in this process, which saves the imports; returns exit status, stdout and stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [stage, *map(str, args)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)}
        try:
            runpy.run_path(str(ROOT / "stages" / stage), run_name="__main__")
            status = 0
        except SystemExit as ended:
            status = ended.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def run_here(capsys):
    """Run a stage like `run_stage`, but in this process: for tests that need no process of their own."""
    return lambda stage, *args: subprocess.CompletedProcess([stage, *args], *call_stage(capsys, stage, *args))


def log_rows(folder: Path) -> list[dict]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def torchrun(processes: int, port: int) -> tuple[str, ...]:
    """Return a launcher of several processes on one machine; tests with fixed ports are of the xdist group "ports"."""
    return (
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)),
        *("--master_port", str(port)),
    )


def worth(vectors, members) -> float:
    """What a set of images is worth to `mgd.selection.cover`, as its definition reads, over plain numbers."""
    total = 0.0
    for one in vectors:
        cosines = [-1.0] + [float(one @ other / np.linalg.norm(one) / np.linalg.norm(other)) for other in members]
        total += max(cosines)
    return total


def greedy(vectors, count: int, known=()) -> list[int]:
    """Pick what adds the most, again and again; of equals the first."""
    picked: list[int] = []
    for _ in range(count):
        members = [*known, *(vectors[index] for index in picked)]
        left = [index for index in range(len(vectors)) if index not in picked]
        reached = {index: round(worth(vectors, [*members, vectors[index]]), 8) for index in left}
        picked.append(max(reached, key=reached.get))
    return picked


def steps_done(folder: Path) -> int:
    """Steps that a run's log has, also while it is written."""
    try:
        return sum('"loss"' in line for line in (folder / "metrics.jsonl").read_text().splitlines())
    except FileNotFoundError:
        return 0


@pytest.fixture(autouse=True)
def _single_thread():
    torch.set_num_threads(1)


def forget_data():
    """Let the next run look at its files anew, as another process would."""
    for cached in (
        reading._load_splits,
        reading._presence,
        checks._check_images,
        checks._say_once,
        finished._still_unusable,
    ):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def _nothing_cached():
    forget_data()
