"""A folder kept to one process."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from mgd.errors import Busy, UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def hold(
    folder: Path, instead: str = 'or give this run another name: --set "run.name=NAME-s{seed}"', kind: str = "lock"
) -> Iterator[None]:
    """Keep a folder to this process: two that write it at once would ruin each other's work.

    Args:
        folder: of a run, or a cache.
        instead: what else than waiting there is to do.
        kind: of the lock; locks of one kind exclude each other.

    Raises:
        Busy: another process holds it.
        UserError: its place cannot be written.
    """
    path = _lock_file(folder, kind)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror or error}") from error
    with file:
        try:
            if fcntl:
                _lock(file)
        except BlockingIOError as error:
            file.seek(0)
            raise Busy(
                f"{folder} is being written by another process (pid {file.read().strip() or 'unknown'}); wait for it, "
                f"stop it, {instead}"
            ) from error
        except OSError:
            pass  # a file system without locks
        with contextlib.suppress(OSError):  # for a message alone, which a full disk may go without
            file.truncate(0)
            os.write(file.fileno(), str(os.getpid()).encode())
        if fcntl:
            os.register_at_fork(after_in_child=file.close)  # or a data worker holds on when this process is killed
        yield


def claim(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Reserve a folder before the stage that will `hold` it has loaded: no other sweep starts that stage meanwhile.

    Raises:
        Busy: another process has reserved it.
        UserError: its place cannot be written.
    """
    return hold(folder, kind="next")


def is_taken(folder: Path) -> bool:
    """Whether another process `hold`s a folder, or has a `claim` to it."""
    return is_held(folder) or is_held(folder, "next")


def is_held(folder: Path, kind: str = "lock") -> bool:
    """Whether another process `hold`s a folder now; where files cannot be locked that is unknown, False."""
    path = _lock_file(folder, kind)
    if not fcntl or not path.exists():
        return False
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def _lock_file(folder: Path, kind: str) -> Path:
    folder = Path(os.path.realpath(folder))  # "." has no name, and a link is another's name
    return folder.parent / f".{folder.name}.{kind}"


def _lock(file: TextIO) -> None:
    for patience in (0.01, 0.05, 0.1, 0):  # `is_held` may be looking at this very moment
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not patience:
                raise
            time.sleep(patience)
