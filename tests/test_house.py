"""Imports run one way; see the README's map of the code."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

BASE = {"mgd.errors"}
PLUGIN = BASE | {"mgd.registry", "mgd.sections", "mgd.files", "mgd.pictures"}
ALLOWED = {  # module prefix -> what of ours it may import
    "mgd.bootstrap": set(),
    "mgd.errors": set(),
    "mgd.files": BASE,
    "mgd.pictures": BASE,
    "mgd.progress": set(),
    "mgd.registry": BASE,
    "mgd.selection": BASE,
    "mgd.tables": BASE,
    "mgd.sections": {"mgd.tables"},
    "mgd.recipe": BASE | {"mgd.registry", "mgd.sections", "mgd.tables"},
    "mgd.losses": {"mgd.losses"},
    "mgd.data": PLUGIN | {"mgd.data", "mgd.progress", "mgd.tables"},
    "mgd.models": PLUGIN | {"mgd.models", "mgd.recipe"},
    "mgd.methods": PLUGIN | {"mgd.methods", "mgd.losses", "mgd.data.cutmix"},
}

DOCUMENTS = [
    ROOT / "README.md",
    *(p for folder in ("stages", "mgd", "recipes") for p in sorted((ROOT / folder).rglob("*.md"))),
]


def _modules():
    return sorted([*(ROOT / "mgd").rglob("*.py"), *(ROOT / "stages").glob("*.py")])


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    imports = _imports(path)
    assert not {name for name in imports if name.split(".")[0] in ("stages", "pickle", "dill", "joblib")}
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    rule = next((prefix for prefix in ALLOWED if module == prefix or module.startswith(prefix + ".")), None)
    if rule is None:
        return
    ours = {name for name in imports if name.startswith("mgd.")}
    allowed = ALLOWED[rule]
    strangers = {n for n in ours if not any(n == a or n.startswith(a + ".") for a in allowed)}
    strangers -= {a.rpartition(".")[0] for a in ours}  # `from mgd.losses import mgd` also lists its package
    assert not strangers, f"{module} imports {strangers}"
    if rule == "mgd.losses":
        outside = {name.split(".")[0] for name in imports} - {"mgd"} - set(sys.stdlib_module_names)
        assert outside <= {"torch", "einops"}


def test_nothing_but_the_plan_at_top_level():
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in tracked.stdout.split()}
    expected = {"stages", "mgd", "recipes", "tests", "pyproject.toml", "README.md", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} <= expected


def _prose(path):
    """A Markdown file without its code blocks."""
    return re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)


def _anchors(text):
    """The anchors that GitHub gives to the headings of a Markdown text."""
    headings = re.findall(r"^#+ (.*)", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_the_documents_lead_somewhere(path):
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", _prose(path)):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path}: {link}"
        assert not anchor or anchor in _anchors(_prose(target)), f"{path}: {link}"


def test_no_stage_is_called_as_a_standard_module():
    # `python -m torch.distributed.run` from inside stages/ would import it in its place before any of ours runs.
    assert not {path.stem for path in (ROOT / "stages").glob("*.py")} & set(sys.stdlib_module_names)


def test_stages_open_and_end_alike():
    for path in (ROOT / "stages").glob("*.py"):
        body = ast.parse(path.read_text()).body
        assert ast.unparse(body[1]) == "import mgd.bootstrap", f"{path}: what follows its docstring"
        assert ast.unparse(body[-1]) == "if __name__ == '__main__':\n    cli.run(main)"
