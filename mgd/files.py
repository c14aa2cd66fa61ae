"""Writing files so that a crash, a kill or a full disk never leaves a torn one."""

import contextlib
import json
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mgd.errors import UserError


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(aside)` on a neighbouring path, flush it to disk and rename it to `path`.

    Raises:
        UserError: it cannot be written; what stood at `path` before still stands.
    """
    path = path.resolve()  # through a link, to what it points to
    if path.exists() and not path.is_file():
        raise UserError(f"{path} cannot be written: it is not a regular file")
    short = path.name if len(path.name) <= 60 else f"{path.name[:40]}-{zlib.crc32(os.fsencode(path.name)):08x}"
    aside = path.with_name(f".{short}.{os.getpid()}")  # a name may be as long as names can be
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(aside, 0o666 & ~_umask())  # safetensors writes files that only their owner can read
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be written: {reason}; what stood there is intact") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file aside and rename it."""
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON: NaN, for which JSON has no word, becomes null."""
    write_text(path, json.dumps(_no_nan(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one line of strict JSON; a reader drops a line that was cut short.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(_no_nan(value), allow_nan=False, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}; the last resume point is kept"
        ) from error


def keep_lines(path: Path, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
    """Rewrite a file of `append_line`, if there is one, with the rows that are wanted; a cut line is none.

    Raises:
        UserError: it cannot be read or written.
    """
    try:
        # Not splitlines, which cuts at characters that a name may hold, too.
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    kept = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and wanted(row):
            kept.append(f"{line}\n")
    write_text(path, "".join(kept))


def absolute(value: Any) -> Any:
    """Return a path as text from the root of the file system, so that two of one place are equal; else the value."""
    return os.path.abspath(value) if isinstance(value, str) else value


def read_json(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Read a JSON object that has all `keys`.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there; start over with --restart") from error
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; open it to your user") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}; delete it, or start over with --restart") from error
    if not isinstance(value, dict) or (missing := [key for key in keys if key not in value]):
        what = f"it lacks {missing[0]!r}" if isinstance(value, dict) else "it is no object"
        raise UserError(f"{path} is damaged: {what}; delete it, or start over with --restart")
    return value


def _no_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _no_nan(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_no_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
