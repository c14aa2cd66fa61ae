"""The registries: what a recipe may name in `[data]`, `[student.head]` and `[method]`, and a file format."""

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from mgd.errors import UserError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to classes, filled by a decorator; packages from outside add theirs by entry point.

    Args:
        kind: what the entries are, for messages ("method").
        group: entry-point group that other packages fill ("mgd.methods"). It is loaded on the
            first name we do not know ourselves.
        builtin: our own modules whose import registers the built-in entries.
    """

    def __init__(self, kind: str, group: str, builtin: Sequence[str]) -> None:
        self.kind = kind
        self.group = group
        self._builtin = list(builtin)
        self._entries: dict[str, T] = {}
        self._plugins_loaded = False

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
            UserError: no such name, with the closest matches and the whole list; or a plug-in
                of our group fails to import, naming it.
        """
        self._load_builtin()
        if name not in self._entries:
            self._load_plugins()
        if name not in self._entries:
            raise UserError(f"unknown {self.kind} {name!r}; {did_you_mean(name, self.names())}")
        return self._entries[name]

    def names(self) -> list[str]:
        """Return the known names, sorted."""
        self._load_builtin()
        return sorted(self._entries)

    def _load_builtin(self) -> None:
        while self._builtin:
            importlib.import_module(self._builtin.pop())

    def _load_plugins(self) -> None:
        if self._plugins_loaded:
            return
        for point in importlib.metadata.entry_points(group=self.group):
            try:
                point.load()
            except Exception as error:
                raise UserError(
                    f"the {self.kind} plug-in {point.name!r} ({point.value}) fails to import: {error!r}; "
                    "repair it or uninstall its package"
                ) from error
        self._plugins_loaded = True


DATASETS: Registry[type] = Registry("data set", "mgd.datasets", ["mgd.data.datasets", "mgd.data.public"])
HEADS: Registry[type] = Registry("head", "mgd.heads", ["mgd.models.deeplabv3plus", "mgd.models.lraspp"])
EXPORTERS: Registry[type] = Registry(
    "format",
    "mgd.exporters",
    [f"mgd.export.{name}" for name in ("onnx", "openvino", "executorch", "litert", "coreml", "torch_export")],
)
METHODS: Registry[type] = Registry(
    "method",
    "mgd.methods",
    [f"mgd.methods.{name}" for name in ("supervised", "mean_teacher", "cps", "mgd", "mgd_online", "kd", "cwd")],
)
