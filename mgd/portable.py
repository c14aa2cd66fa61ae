"""Recipes and commands without the places of the machine that they ran on, to be shown to others."""

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from mgd.errors import UserError
from mgd.tables import override

_LOCAL = re.compile(r"file:|/|~[\w.-]*([\\/]|$)|[A-Za-z]:[\\/]|\\\\|(.*[\\/])?\.\.([\\/]|$)")


def is_local(text: str) -> bool:
    """Tell whether a text is a path that means something on one machine only.

    That is an absolute one, or one relative to somebody's home or to what lies above the working directory.
    """
    return _LOCAL.match(text) is not None


def portable(value: Any) -> Any:
    """Return a value of a recipe in which a place on this machine is only its last part.

    Hub ids and paths relative to the working directory stay as they are, and so do class names.
    """
    if isinstance(value, Mapping):
        return {key: item if key == "classes" else portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    if not isinstance(value, str) or not is_local(value):
        return value
    last = re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return "local" if last.startswith(("~", ".")) or last.endswith(":") or not last else last


def portable_command(command: str) -> str:
    """Return a command in which a place on this machine is only its last part."""
    return shlex.join(_portable_word(word) for word in shlex.split(command))


def _portable_word(word: str) -> str:
    """Shorten a path, or those in the value of a `--set`."""
    tables: dict[str, Any] = {}
    try:
        override(tables, word)
    except UserError:  # no section.key=value
        return portable(word)
    for text in filter(is_local, _texts(tables)):
        if text not in word:  # written with escapes
            return word.partition("=")[0] + "=local"
        word = word.replace(text, portable(text))
    return word


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts of a table, but for class names."""
    if isinstance(value, Mapping):
        value = [item for key, item in value.items() if key != "classes"]
    if isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value
