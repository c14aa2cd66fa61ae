"""The registries: what a recipe may name in `[data]`, `[student.head]` and `[method]`, and a file format."""

import functools
import importlib
import importlib.metadata
import pkgutil
import typing
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Generic, TypeVar

from mgd.errors import UserError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to classes, filled by a decorator; packages from outside add theirs by entry point.

    Args:
        kind: what the entries are, for messages ("method").
        group: entry-point group that other packages fill ("mgd.methods"). The name of a point is the name in recipes,
            its value the class ("package.module:Class"); it is loaded when that name is asked for, no other.
        builtin: our own modules whose import registers the built-in entries.
        base: "module:Class" that a class of another package must derive from.
        own: attributes that it must not leave as `base` has them.
        config: likewise, what its `Config` must derive from; left out, it has none, or is a section itself.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        builtin: Sequence[str],
        base: str = "builtins:object",
        own: Sequence[str] = (),
        config: str = "",
    ) -> None:
        self.kind, self.group, self.base, self.own, self.config = kind, group, base, tuple(own), config
        self._builtin = list(builtin)
        self._entries: dict[str, T] = {}
        self._loaded: dict[str, EntryPoint] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return the decorator that files a class under `name`; a second owner is a ValueError."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice: {self._entries[name]} and {entry}")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """Return the entry called `name`.

        Raises:
            UserError: no such name, with the closest matches and the whole list; or the plug-in of that name cannot be
                used: it fails to import, lacks something, or the name has another owner.
        """
        self._load_builtin()
        if name not in self._loaded and (points := self._points.get(name)):
            # A class of another package may be here already: its module may use the decorator, too.
            is_ours = name in self._entries and self._entries[name].__module__.startswith("mgd.")
            if is_ours or len(points) > 1:
                owners = ["mgd itself"] if is_ours else []
                owners += [f"{point.dist.name if point.dist else 'a package'} ({point.value})" for point in points]
                raise UserError(
                    f"{self.kind} {name!r} has several owners: {', '.join(owners)}; rename the entry point of one, or "
                    "uninstall its package"
                )
            self._entries[name] = self._load(points[0])
            self._loaded[name] = points[0]
        if name not in self._entries:
            raise UserError(
                f"unknown {self.kind} {name!r}; {did_you_mean(name, self.names())} (one of a plug-in needs its package "
                "installed)"
            )
        return self._entries[name]

    def names(self) -> list[str]:
        """Return the known names, sorted; those of plug-ins, too, which need not load."""
        self._load_builtin()
        return sorted({*self._entries, *self._points})

    def usable(self) -> dict[str, T]:
        """Return the entries by name, without plug-ins that cannot be used."""
        found = {}
        for name in self.names():
            try:
                found[name] = self.get(name)
            except UserError:  # said when it is asked for
                continue
        return found

    def packages(self) -> dict[str, str]:
        """Return the packages whose entries were used so far, and their versions."""
        return {point.dist.name: point.dist.version for point in self._loaded.values() if point.dist}

    def package_of(self, name: str) -> str | None:
        """Return the package that brings an entry that was used; None of our own."""
        point = self._loaded.get(name)
        return point.dist.name if point and point.dist else None

    def _load_builtin(self) -> None:
        while self._builtin:
            module = self._builtin.pop()  # first: it may ask for an entry itself
            try:
                importlib.import_module(module)
            except BaseException:
                self._builtin.append(module)  # or whoever asks next is told of an unknown name
                raise

    @functools.cached_property
    def _points(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for point in importlib.metadata.entry_points(group=self.group):
            found.setdefault(point.name, []).append(point)
        return found

    def _load(self, point: EntryPoint) -> T:
        plugin = f"the {self.kind} plug-in {point.name!r} ({point.value})"
        try:
            entry = point.load()
        except Exception as error:
            raise UserError(f"{plugin} fails to import: {error!r}; repair it or uninstall its package") from error
        if problem := self._problem(entry, point.name):
            raise UserError(f"{plugin} {problem}")
        return entry

    def _problem(self, entry: Any, name: str) -> str | None:
        """Say what a class from outside lacks."""
        base = pkgutil.resolve_name(self.base)
        if not _derives(entry, base):
            return f'is no class that derives from {_dotted(base)}; write {name} = "package.module:Class"'
        if lacking := [key for key in self.own if getattr(entry, key, None) is getattr(base, key, None)]:
            return f"lacks {', '.join(lacking)}, see {_dotted(base)}"
        section = entry.Config if self.config else entry
        if self.config and not _derives(section, wanted := pkgutil.resolve_name(self.config)):
            return f"has a Config that does not derive from {_dotted(wanted)}"
        fields = getattr(section, "model_fields", None)
        if fields is None:
            return None
        called = fields["name"].annotation if "name" in fields else None
        if called is not str and name not in typing.get_args(called):
            return f'has a Config that cannot be called so; it needs name: Literal["{name}"] = "{name}"'
        if odd := [key for key, field in fields.items() if _is_no_value(field.annotation)]:
            return f"has a key that no recipe can hold, {odd[0]}: a list is tuple[...] there, and a path str"
        return None


def _derives(entry: Any, base: type) -> bool:
    return isinstance(entry, type) and issubclass(entry, base)


def _dotted(entry: type) -> str:
    return f"{entry.__module__}.{entry.__qualname__}"


def _is_no_value(annotation: Any) -> bool:
    kinds = (list, set, Path)
    if annotation in kinds or typing.get_origin(annotation) in kinds:
        return True
    return any(_is_no_value(inner) for inner in typing.get_args(annotation))


def plugin_packages() -> dict[str, str]:
    """Return the packages from outside that were used so far, and their versions."""
    registries = (DATASETS, HEADS, METHODS, EXPORTERS)
    return {name: version for registry in registries for name, version in registry.packages().items()}


DATASETS: Registry[type] = Registry(
    "data set",
    "mgd.datasets",
    ["mgd.data.datasets", "mgd.data.public"],
    base="mgd.sections:DataSection",
    own=("load", "class_names"),
)
HEADS: Registry[type] = Registry(
    "head",
    "mgd.heads",
    ["mgd.models.deeplabv3plus", "mgd.models.lraspp"],
    base="torch.nn:Module",
    own=("forward", "Config"),
    config="mgd.sections:Section",
)
EXPORTERS: Registry[type] = Registry(
    "format",
    "mgd.exporters",
    [f"mgd.export.{name}" for name in ("onnx", "openvino", "executorch", "litert", "coreml", "torch_export")],
    base="mgd.export.base:Exporter",
    own=("suffix", "write", "open"),
)
METHODS: Registry[type] = Registry(
    "method",
    "mgd.methods",
    [f"mgd.methods.{name}" for name in ("supervised", "mean_teacher", "cps", "mgd", "mgd_online", "kd", "cwd")],
    base="mgd.methods.base:Method",
    own=("step", "Config"),
    config="mgd.methods.base:MethodSection",
)
