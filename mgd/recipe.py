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
from typing import Annotated, Any, ClassVar, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, create_model, model_validator

from mgd.errors import UserError, did_you_mean, pydantic_lines
from mgd.registry import DATASETS, HEADS, METHODS
from mgd.tables import as_lists, as_tuples, labeled_amount, override

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


PUBLIC_SHARES = ("1/16", "1/8", "1/4", "1/2")


class Section(BaseModel):
    """Base of every recipe section: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Run(Section):
    """`[run]`: name, seed and bookkeeping."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._{}-]*$")]
    """Folder of the run below `output`; `{seed}` in it stands for the seed."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Draws the partition, the initial weights, the order and augmentation of images, CutMix boxes."""
    output: str = "runs"
    """Folder that holds the runs, relative to the working directory."""
    log_every: Positive = 10
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: Positive = 200
    """Steps between two resume points."""
    threads: Annotated[int, Field(ge=0, le=4096)] = 0
    """CPU threads a process; 0 shares out the cores this machine lets us use."""
    compile: bool = False
    """Train through torch.compile: faster steps on a GPU, after minutes of compiling at the start."""
    tracker: Literal["trackio", "tensorboard", "wandb"] | None = None
    """Hand the lines of metrics.jsonl to this tracker too."""


class UnlabeledSection(Section):
    """`[data.unlabeled]`: a pool of unlabelled images beside the data set; give one of hub, parquet, webdataset."""

    hub: Annotated[str, Field(min_length=1)] | None = None
    """Data set on the hub ("org/name")."""
    parquet: Annotated[str, Field(min_length=1)] | None = None
    """Folder of *.parquet files, images as bytes."""
    webdataset: Annotated[str, Field(min_length=1)] | None = None
    """Folder of *.tar files; the image column is then the suffix, e.g. "jpg"."""
    split: str = "train"
    """Split of a hub data set."""
    image_column: str = "image"
    """Column of the image."""
    streaming: bool = False
    """Read it as an endless stream, of any length, in place of all other unlabelled images."""
    buffer: Annotated[int, Field(gt=0)] = 1000
    """Images that a reader of the stream holds in memory and shuffles."""

    @model_validator(mode="after")
    def _one_source(self) -> "UnlabeledSection":
        if sum(source is not None for source in (self.hub, self.parquet, self.webdataset)) != 1:
            raise ValueError("give one of hub, parquet and webdataset")
        return self

    @property
    def location(self) -> str:
        """Where it is, as the recipe says."""
        return self.hub or self.parquet or self.webdataset


class DataSection(Section):
    """Keys of `[data]` that every data set has; the readers in mgd/data/datasets.py add theirs."""

    same_everywhere: ClassVar[bool] = False
    """The images do not depend on where `root` is: a published data set."""
    name: str
    """Registered data set."""
    image_scale: Annotated[float, Field(ge=0.01, le=4)] = 1.0
    """Every image and mask is first resized by this factor (0.5 = half resolution)."""
    crop: Annotated[int, Field(ge=32)] = 512
    """Side of the square training crop, pixels."""
    scales: Annotated[tuple[Annotated[float, Field(gt=0, le=8)], ...], Field(min_length=1)] = (
        0.5,
        0.75,
        1.0,
        1.5,
        1.75,
        2.0,
    )
    """Random scale factors of the training augmentation."""
    flip: bool = True
    """Random horizontal flip."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Data loading processes a training process."""
    unlabeled: UnlabeledSection | None = None
    """`[data.unlabeled]`: more unlabelled images, as many as there are."""
    on_error: Literal["raise", "skip"] = "raise"
    """An image or mask that cannot be used ends the run before it starts, or is left out and listed."""


class Partition(Section):
    """`[partition]`: which training images are labelled."""

    protocol: Literal["random", "cps", "pseudoseg", "files"] = "random"
    """`random`: drawn by seed, the same on every machine. `cps`, `pseudoseg`: the public lists of VOC
    and Cityscapes. `files`: two lists of your own."""
    labeled: int | float | str | None = None
    """How many labelled images: a count (23), a share (0.0625) or a fraction ("1/16"); for the
    public lists a fraction; for `files` left out."""
    root: str | None = None
    """Folder that holds the public lists; left out, they are fetched once and checked by SHA-256."""
    labeled_list: str | None = None
    """`files`: text file with one labelled image a line, by id or path."""
    unlabeled_list: str | None = None
    """`files`: text file with one unlabelled image a line."""
    balanced: bool = False
    """Choose images so that every class is seen about as often (reads the masks of the pool)."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Seed of the draw; left out, the run's seed."""

    @model_validator(mode="after")
    def _fits_the_protocol(self) -> "Partition":
        lists = (self.labeled_list, self.unlabeled_list)
        if self.protocol == "files":
            if None in lists or self.labeled is not None:
                raise ValueError('protocol = "files" needs labeled_list and unlabeled_list, and no labeled')
        elif lists != (None, None):
            raise ValueError('labeled_list and unlabeled_list belong to protocol = "files"')
        elif self.labeled is None:
            raise ValueError("labeled: missing")
        elif self.protocol == "random":
            labeled_amount(self.labeled, pool=1)
        elif self.labeled not in PUBLIC_SHARES:
            raise ValueError(f"labeled = {self.labeled!r} has no public list; choices: {', '.join(PUBLIC_SHARES)}")
        return self


class ModelSection(Section):
    """`[student]`: the network that this run trains (in a teacher's recipe: the teacher)."""

    backbone: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """Any timm backbone that returns feature maps; a name, never an address that timm would fetch from."""
    pretrained: bool = True
    """Start from timm's ImageNet weights (fetched from the hub, or found in its cache)."""
    output_stride: Literal[8, 16, 32] = 16
    """Input pixels a cell of the deepest feature map."""
    multi_grid: tuple[Positive, ...] = ()
    """Dilations of the 3x3 convolutions in the blocks of a ResNet's last stage, e.g. [2, 4, 8]."""
    head: SerializeAsAny[Section]
    """Registered head by name, and its own keys."""


Networks = dict[str, SerializeAsAny[ModelSection]]
"""Type of a key of `[method]` that holds networks by name; each is a table like `[student]`, checked as that is."""


class Teacher(Section):
    """`[teachers.<name>]`: one frozen teacher, by the recipe that trains it or by its weights."""

    recipe: str | None = None
    """Recipe of the teacher; trained first when its run is not finished."""
    checkpoint: str | None = None
    """Folder with model.safetensors and config.json, or a hub id."""
    seed_offset: int = 0
    """Added to this run's seed, it is the seed of the teacher's run; the partition is always this run's."""

    @model_validator(mode="after")
    def _one_source(self) -> "Teacher":
        if (self.recipe is None) == (self.checkpoint is None):
            raise ValueError("give either recipe or checkpoint")
        return self


class TeacherCache(Section):
    """`[cache]`: the predictions that [teachers] mode = "cached" learns from; stages/cache_teachers.py makes them."""

    folder: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._{}-]*$")] = "teacher_cache-s{seed}"
    """Folder of the cache below [run] output; `{seed}` in it stands for the seed."""
    scales: Annotated[tuple[Annotated[float, Field(gt=0, le=8)], ...], Field(min_length=1)] = (1.0,)
    """Sizes at which the teachers see an image; of several, the mean of what they predict counts."""
    flip: bool = False
    """Let them see the mirrored image too."""
    cell: Annotated[int, Field(ge=4, le=256)] = 16
    """Pixels a side over which logits and features are averaged: smaller is closer to online, and larger on disk."""


class Optim(Section):
    """`[optim]`: optimiser, schedule, batch and length."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Optimiser; weight decay spares norms and biases in both."""
    lr: Annotated[float, Field(gt=0, le=1e30)]
    """Learning rate at step 0; it decays as (1 - step / steps) ** power."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD momentum."""
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] = 5e-4
    """Not applied to norms and biases."""
    power: Annotated[float, Field(ge=0)] = 0.9
    """Exponent of the poly schedule."""
    batch_size: Annotated[int, Field(gt=0, le=10**6)] = 8
    """Labelled images a step over all processes; as many mixed unlabelled ones come beside them."""
    epochs: Annotated[float, Field(gt=0, le=10**6)] | None = None
    """Length in passes over the larger of the labelled and unlabelled sets."""
    steps: Annotated[int, Field(gt=0, le=10**9)] | None = None
    """Length in optimiser steps, instead of epochs."""
    nonfinite: Literal["raise", "skip"] = "raise"
    """A loss that is not finite ends the run, or its step is skipped and counted."""
    sync_batchnorm: bool = False
    """On several GPUs: batch statistics over all processes' images."""

    @model_validator(mode="after")
    def _one_length(self) -> "Optim":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        return self


class Eval(Section):
    """`[eval]`: how val images are predicted, and what the result is compared with."""

    mode: Literal["whole", "slide"] = "whole"
    """Whole image at once, or a sliding window."""
    crop: Annotated[int, Field(ge=32)] | None = None
    """Side of the sliding window, pixels; left out, the training crop."""
    stride: Annotated[float, Field(ge=0.05, le=1)] = 2 / 3
    """Step of the window as a share of its side."""
    batch_size: Annotated[int, Field(gt=0, le=4096)] = 8
    """Images (or windows) predicted at once a process."""
    scales: Annotated[tuple[Annotated[float, Field(gt=0, le=8)], ...], Field(min_length=1)] = (1.0,)
    """Test-time scales; of several, and of flip, the mean of the class probabilities counts."""
    flip: bool = False
    """Predict the mirrored image too."""
    every: Annotated[int, Field(ge=0)] = 0
    """Steps between two evaluations while training, of which `best/` keeps the best; 0 = only at the end."""
    baselines: tuple[str, ...] = ()
    """Recipes whose results stand beside ours in the last table; trained first when missing."""


class Reference(Section):
    """`[reference]`: the result that this recipe is meant to reach; `stages/report.py` prints it beside ours."""

    miou: Annotated[float, Field(ge=0, le=100)]
    """Val mIoU, %."""
    source: str
    """Whose number it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One validated recipe; a component is handed its own section, never the whole."""

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
    def networks(self) -> dict[str, ModelSection]:
        """Sections of the networks that the method trains, by their place in the recipe; the first one ships."""
        return dict(METHODS.get(self.method.name).sections(self.method, self.student))

    @property
    def is_distilled(self) -> bool:
        """Whether its network learns from teachers, frozen or trained along with it."""
        return bool(self.teachers) or len(self.networks) > 1

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
# What may be overridden without becoming another experiment than the one that [reference] speaks of.
_KEEP_REFERENCE = (
    *("run.", "partition.seed=", "partition.root="),
    *("data.root=", "data.hub=", "data.parquet=", "data.id_column=", "data.image_column=", "data.label_column="),
    *("data.workers=", "eval.every=", "eval.batch_size=", "eval.baselines=", "reference."),
)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: TOML file.
        overrides: `section.key=value` strings (`--set`), value in TOML; bare words are text. A labeled_list takes the
            place of the file's `[partition] labeled`.

    Raises:
        UserError: every mistake at once, a line each, with file, section, key and choices.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}{_similar_files(path)}") from error
    except (ValueError, RecursionError) as error:  # TOML, UTF-8, a NUL in the path, a huge integer
        raise UserError(f"{path}: not valid TOML: {error}") from error
    listed = any(text.partition("=")[0].strip() == "partition.labeled_list" for text in overrides)
    if listed and isinstance(raw.get("partition"), dict):
        raw["partition"].pop("labeled", None)  # no --set could, and lists leave it out
    for text in overrides:
        override(raw, text)
    if not all(text.startswith(_KEEP_REFERENCE) for text in overrides):
        raw.pop("reference", None)
    return parse(raw, source=str(path), overrides=tuple(overrides))


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
    sections["teachers"], cached = _teachers(raw.get("teachers", {}), errors)
    cache = _validate(TeacherCache, raw.get("cache", {}), "cache", errors)
    if cached:
        sections["cache"] = cache
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


def _teachers(tables: Any, errors: list[str]) -> tuple[dict[str, Section | None], bool]:
    """Check `[teachers]`; return its tables by name, and whether they are cached."""
    if not isinstance(tables, Mapping):
        errors.append(f"[teachers]: must hold tables such as [teachers.deep], not {tables!r}")
        return {}, False
    mode = tables.get("mode", "online")
    if mode not in ("online", "cached"):
        errors.append(f'[teachers] mode: {mode!r}; choices: "online", "cached" (no teacher can be named mode)')
    found = {}
    for name, table in tables.items():
        if name != "mode":
            _check_name(name, "teachers", errors)
            found[name] = _validate(Teacher, table, f"teachers.{name}", errors)
    return found, mode == "cached"


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
        return f"; the folder {path.parent} does not exist"
    names = sorted(file.name for file in path.parent.glob("*.toml"))
    return f"; {did_you_mean(path.name, names)}" if names else ""
