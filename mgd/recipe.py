"""Recipes: one TOML file a run, one frozen model a section, checked whole before anything starts.

`python -m mgd.schema FILE ...` checks recipes, `--schema` prints a JSON Schema for editors (mgd/schema.py).
"""

import dataclasses
import functools
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError, create_model

from mgd.errors import UserError, did_you_mean, pydantic_lines
from mgd.registry import DATASETS, HEADS, METHODS
from mgd.sections import (
    DataSection,
    Eval,
    ModelSection,
    Networks,
    Optim,
    Partition,
    Reference,
    Run,
    Section,
    Teacher,
    TeacherCache,
)
from mgd.tables import as_lists, as_tuples, override, tidy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One validated recipe; losses, methods, data and models are handed their own sections, never the whole."""

    source: str
    overrides: tuple[str, ...] = ()
    run: Run
    data: DataSection
    partition: Partition
    student: ModelSection
    method: Section
    optim: Optim
    eval: Eval = Eval()
    teachers: Mapping[str, Teacher] = dataclasses.field(default_factory=dict)
    cache: TeacherCache | None = None
    """Of [teachers] mode = "cached" only."""
    reference: Reference | None = None

    @property
    def run_dir(self) -> Path:
        """Folder of this run, with the seed filled in."""
        return Path(self.run.output) / self.run.name.replace("{seed}", str(self.run.seed))

    @property
    def cache_dir(self) -> Path:
        """Folder of the cached teachers, with the seed filled in."""
        return Path(self.run.output) / self.cache.folder.replace("{seed}", str(self.run.seed))

    @property
    def partition_seed(self) -> int:
        """Seed that draws the labelled images; lists need none."""
        if self.partition.protocol != "random":
            return 0
        return self.run.seed if self.partition.seed is None else self.partition.seed

    @property
    def seeds(self) -> tuple[int, int]:
        """The seed of the run, and that which draws the labelled images: what tells runs of one recipe apart."""
        return self.run.seed, self.partition_seed

    @property
    def method_class(self) -> type:
        """The `Method` that `[method] name` names."""
        return METHODS.get(self.method.name)

    @property
    def networks(self) -> dict[str, ModelSection]:
        """Sections of the networks that the method trains, by their place in the recipe; the first one ships."""
        return dict(self.method_class.sections(self.method, self.student))

    @property
    def depends_on_unlabeled(self) -> bool:
        """Whether the unlabelled images shape a run: its method sees them, or an epoch is a pass over them."""
        return self.method_class.uses_unlabeled or self.optim.epochs is not None

    @property
    def is_distilled(self) -> bool:
        """Whether its network learns from teachers, frozen or trained along with it."""
        return bool(self.teachers) or self.method_class.trains_teachers

    @property
    def stage(self) -> str:
        """Name of the stage that trains it."""
        return "distill" if self.teachers else "teacher_cps"

    @property
    def command(self) -> str:
        """The command that runs this recipe as it stands, overrides included."""
        return self.command_of(self.stage)

    def command_of(self, stage: str) -> str:
        """Return the command of another stage for this recipe as it stands."""
        sets = "".join(f" --set {shlex.quote(override)}" for override in self.overrides)
        return f"accelerate launch stages/{stage}.py --recipe {shlex.quote(self.source)}{sets}"

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved recipe as plain TOML values, defaults written out."""
        tables = {name: getattr(self, name).model_dump(exclude_none=True) for name in _SECTIONS}
        tables["partition"]["seed"] = self.partition_seed
        teachers = {name: teacher.model_dump(exclude_none=True) for name, teacher in self.teachers.items()}
        more = {"teachers": teachers} if teachers else {}
        if self.cache:
            more = {"teachers": {"mode": "cached"} | teachers, "cache": self.cache.model_dump()}
        if self.reference:
            more["reference"] = self.reference.model_dump()
        return as_lists(tables | more)

    def to_toml(self) -> str:
        """Return the resolved recipe as TOML text."""
        return tomli_w.dumps(self.to_dict())


_SECTIONS = ("run", "data", "partition", "student", "method", "optim", "eval")
FREE_KEYS = frozenset(
    {
        *("run.log_every", "run.checkpoint_every", "run.threads", "run.output", "run.compile", "run.tracker"),
        *("data.workers", "partition.root", "cache.folder", "eval.baselines", "eval.every", "eval.batch_size"),
        *("reference.miou", "reference.source"),
    }
)
"""Keys that change how a run is done, or where things lie, not what comes out."""
# What else may be overridden without becoming another experiment than the one that [reference] speaks of.
_KEEP_REFERENCE = FREE_KEYS | {
    *("run.name", "run.seed", "partition.seed"),
    *("data.root", "data.hub", "data.parquet", "data.id_column", "data.image_column", "data.label_column"),
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: TOML file.
        overrides: `section.key=value` strings (`--set`), value in TOML; bare words are text. A labeled_list takes the
            place of the file's `[partition] labeled` and `balanced`.

    Raises:
        UserError: every mistake at once, a line each, with file, section, key and choices.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        similar = _similar_files(path) if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"{path}: cannot be read: {error.strerror or error}{similar}") from error
    except (ValueError, RecursionError) as error:  # TOML, UTF-8, a NUL in the path, a huge integer
        raise UserError(f"{path}: not valid TOML: {error}") from error
    overrides = tuple(map(tidy, overrides))
    listed = any(text.startswith("partition.labeled_list=") for text in overrides)
    if listed and isinstance(raw.get("partition"), dict):
        for key in ("labeled", "balanced"):  # no --set could, and lists leave them out
            raw["partition"].pop(key, None)
    for text in overrides:
        override(raw, text)
    if not {text.partition("=")[0] for text in overrides} <= _KEEP_REFERENCE:
        raw.pop("reference", None)
    return parse(raw, source=str(path), overrides=overrides)


def parse(raw: Mapping[str, Any], source: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Check the tables of a recipe; see `load` for the errors. `source` names it in messages."""
    errors: list[str] = []
    known = (*_SECTIONS, "teachers", "cache", "reference")
    for name in sorted(raw.keys() - set(known)):
        errors.append(f"[{name}]: unknown section; {did_you_mean(name, known)}")
    sections: dict[str, Any] = {}
    for name in _SECTIONS:
        table = raw.get(name)
        model = _section_model(name, table, errors)
        if model is not None:
            table = _with_networks(model, table, name, errors) if name == "method" else raw.get(name, {})
            sections[name] = _validate(model, table, name, errors)
    sections["teachers"], mode = _teachers(raw.get("teachers", {}), errors)
    cached = mode == "cached"
    cache = _validate(TeacherCache, raw.get("cache", {}), "cache", errors)
    if cached:
        sections["cache"] = cache
    elif "cache" in raw and mode is None:
        errors.append('[cache]: nothing reads it without [teachers] mode = "cached"; set that, or leave it out')
    if "reference" in raw:
        sections["reference"] = _validate(Reference, raw["reference"], "reference", errors)
    if not errors:
        method = METHODS.get(sections["method"].name)
        try:
            method.check(sections["method"], tuple(sections["teachers"]))
            if cached:
                method.check_cached(sections["method"], sections["data"].crop, cache.cell)
        except UserError as error:
            errors.append(f"[method] {error}")
    _raise_all(errors, source)
    return Recipe(source=source, overrides=overrides, **sections)


def _raise_all(errors: Sequence[str], source: str) -> None:
    """Raise a line an error, if there are any."""
    if errors:
        raise UserError("\n".join(f"{source}: {' '.join(line.splitlines())}" for line in errors))


def _teachers(tables: Any, errors: list[str]) -> tuple[dict[str, Section | None], str | None]:
    """Check `[teachers]`; return its tables by name, and its mode, where one is given."""
    if not isinstance(tables, Mapping):
        errors.append(f"[teachers]: must hold tables such as [teachers.deep], not {tables!r}")
        return {}, None
    mode = tables.get("mode")
    if "mode" in tables and mode not in ("online", "cached"):
        errors.append(f'[teachers] mode: {mode!r}; choices: "online", "cached" (no teacher can be named mode)')
    found = {}
    for name, table in tables.items():
        if name != "mode":
            _check_name(name, "teachers", errors)
            found[name] = _validate(Teacher, table, f"teachers.{name}", errors)
    return found, mode


def _check_name(name: str, where: str, errors: list[str]) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        errors.append(f"[{where}] {name!r}: a name is letters, digits, - and _, which --set can reach")


def parse_model(table: Mapping[str, Any], source: str) -> ModelSection:
    """Check the `[student]` table alone, as a saved model's config.json holds it."""
    errors: list[str] = []
    model = _student_model(table, errors)
    section = None if model is None else _validate(model, table, "student", errors)
    _raise_all(errors, source)
    return section


def parse_eval(overrides: Sequence[str], source: str) -> Eval:
    """Return `[eval]` where there is no recipe: the defaults, with what `--set eval.key=value` changes.

    Raises:
        UserError: see `load`.
    """
    raw: dict[str, Any] = {"eval": {}}
    for text in overrides:
        override(raw, text)
    errors: list[str] = []
    section = _validate(Eval, raw["eval"], "eval", errors)
    _raise_all(errors, source)
    return section


def _section_model(name: str, table: Any, errors: list[str]) -> type[Section] | None:
    """Return the model of a section: fixed, or chosen by the name that its table gives."""
    if name == "student":
        return _student_model(table, errors)
    if name in ("data", "method"):
        registry = {"data": DATASETS, "method": METHODS}[name]
        entry = _plugin(registry, table, name, errors)
        return entry if entry is None or name == "data" else entry.Config
    return {"run": Run, "partition": Partition, "optim": Optim, "eval": Eval}[name]


def _student_model(table: Any, errors: list[str], where: str = "student") -> type[Section] | None:
    if not isinstance(table, Mapping):
        errors.append(f"[{where}]: missing" if table is None else f"[{where}]: must be a table, not {table!r}")
        return None
    if "head" not in table:
        errors.append(f"[{where}.head]: missing; give name = one of {', '.join(HEADS.names())}")
        return None
    head = _plugin(HEADS, table["head"], f"{where}.head", errors)
    return None if head is None else _with_head(head.Config)


def network_keys(model: type[Section]) -> list[str]:
    """Return the keys of a section that hold networks by name."""
    return [key for key, field in model.model_fields.items() if field.annotation == Networks]


def _with_networks(model: type[Section], table: Any, where: str, errors: list[str]) -> Any:
    """Return a table in which the networks that it holds, if its model has such keys, are checked sections."""
    for key in network_keys(model):
        if isinstance(tables := table.get(key), Mapping):
            checked = {}
            for name, inner in tables.items():
                _check_name(name, f"{where}.{key}", errors)
                place = f"{where}.{key}.{name}"
                head = _student_model(inner, errors, place)
                found = None if head is None else _validate(head, inner, place, errors)
                # Where one is wrong, which has been noted, an empty one lets the other keys be checked too.
                checked[name] = found or ModelSection.model_construct()
            table = {**table, key: checked}
    return table


@functools.cache
def _with_head(config: type[Section]) -> type[ModelSection]:
    return create_model("Student", __base__=ModelSection, head=(config, ...))


def _plugin(registry: Any, table: Any, where: str, errors: list[str]) -> Any:
    name = table.get("name") if isinstance(table, Mapping) else None
    if not isinstance(name, str):
        errors.append(f"[{where}] name: missing; choices: {', '.join(registry.names())}")
        return None
    try:
        return registry.get(name)
    except UserError as error:
        errors.append(f"[{where}] name: {error}")
        return None


def _validate(model: type[Section], table: Any, where: str, errors: list[str]) -> Section | None:
    if not isinstance(table, Mapping):
        errors.append(f"[{where}]: must be a table, not {table!r}")
        return None
    try:
        return model.model_validate(as_tuples(table))
    except ValidationError as error:
        errors.extend(pydantic_lines(error, model, where))
        return None


def _similar_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist" + ("" if path.is_absolute() else f" in {Path.cwd()}")
    names = sorted(file.name for file in path.parent.glob("*.toml"))
    return f"; {did_you_mean(path.name, names)}" if names else ""
