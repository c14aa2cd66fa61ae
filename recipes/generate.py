"""Write the families of near-equal recipes; `python recipes/generate.py` after a change here.

Each recipe is written whole, so that it reads alone; a constant that many share is changed once,
here. tests/test_recipes.py fails when a file is not what this script writes.
"""

import sys
from pathlib import Path

RECIPES = Path(__file__).resolve().parent
sys.path.insert(0, str(RECIPES))

import camvid_bench  # noqa: E402
import own_images  # noqa: E402
import paper  # noqa: E402


def all_files() -> dict[str, str]:
    """Return file name -> text of every generated recipe."""
    camvid = ((f"camvid/{name}", text) for name, text in camvid_bench.all_recipes())
    return {f"{name}.toml": text for name, text in (*paper.all_recipes(), *own_images.all_recipes(), *camvid)}


def main() -> None:
    """Write all files."""
    for name, text in all_files().items():
        (RECIPES / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
