"""prepare.py lists every unusable file of a folder, and finds nothing wrong with good data."""

import importlib.util
import sys
import tomllib

import numpy as np
import PIL.Image
import pytest
import tomli_w
from conftest import ROOT, forget_data

from mgd.data.datasets import Folder
from mgd.errors import UserError


@pytest.fixture
def prepare(monkeypatch):
    spec = importlib.util.spec_from_file_location("prepare_stage", ROOT / "stages" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, args)])
        module.main()

    return run


def test_every_unusable_file_is_listed(prepare, write_recipe, tmp_path, capsys):
    root = tmp_path / "mine"
    for index in range(10):
        for folder, value in (("images", 9), ("masks", index % 2), ("unlabeled", 5)):
            path = root / folder / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(np.full((20, 30), value, np.uint8)).save(path)
    recipe = write_recipe()
    data = {"name": "folder", "root": str(root), "classes": ["a", "b"], "crop": 32}
    table = tomllib.loads(recipe.read_text()) | {"data": data}
    recipe.write_text(tomli_w.dumps(table))
    prepare("--recipe", recipe)
    out = capsys.readouterr().out
    assert "| train, with mask    | 8     | 0        | 30x20 |" in out
    assert "partition: 4 labelled / 14 unlabelled; nothing is wrong" in out

    training = Folder(**{**data, "classes": ("a", "b")}).load().labeled["id"][:]
    odd = 100 * sum(int(name) % 2 for name in training) / 8
    assert [line.split("|")[2].strip() for line in out.splitlines() if line.startswith("| b ")] == [f"{odd:.2f}"]
    (root / "images" / f"{training[0]}.png").write_bytes(b"\x89PNG cut short")
    PIL.Image.new("L", (5, 5)).save(root / "masks" / f"{training[1]}.png")
    PIL.Image.new("L", (30, 20), 7).save(root / "masks" / f"{training[2]}.png")
    (root / "unlabeled" / "3.png").write_bytes(b"")
    forget_data()
    with pytest.raises(UserError) as error:
        prepare("--recipe", recipe, "--json", tmp_path / "counts.json")
    lines = str(error.value).splitlines()
    assert len(lines) == 4 and (tmp_path / "counts.json").exists()
    for line, part in zip(
        lines, ("cannot be read", "is 5x5 pixels", "value 7 is no class", "unlabeled/3"), strict=True
    ):
        assert part in line
