"""What the stages share around their `main`: flags, the accelerator, errors as one line."""

import argparse
import errno
import io
import logging
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import datasets
import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from mgd.data.images import available_cpus
from mgd.errors import Busy, Stopped, UserError
from mgd.files import write_json
from mgd.markdown import markdown
from mgd.recipe import Recipe
from mgd.tables import tidy


class Flags(argparse.ArgumentParser):
    """The flags of a stage, which says what to do where the shell has cut a value into words."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and exit with status 2."""
        if message.startswith("unrecognized arguments") and any("=[" in word for word in sys.argv):
            message += """; a value with blanks or quotes wants quotes of the shell: --set 'data.classes=["a", "b"]'"""
        super().error(message)


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the flags of every stage that trains."""
    flags = recipe_parser(description)
    flags.add_argument("--restart", action="store_true", help="delete what the run folder holds and start over")
    return flags


def recipe_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the flags of every stage that takes one recipe and prints a table."""
    flags = Flags(description=description)
    flags.add_argument("--recipe", required=True, help="TOML file, e.g. recipes/quickstart.toml")
    set_flag(flags, "change one key of the recipe")
    json_flag(flags)
    return flags


def set_flag(flags: argparse.ArgumentParser, text: str, section: str = "SECTION") -> None:
    """Add --set, of every stage that reads a recipe, with its help and the section that it is for."""
    flags.add_argument("--set", action="append", type=tidy, default=[], metavar=f"{section}.KEY=VALUE", help=text)


def refuse_sets(overrides: Sequence[str], matters: Sequence[str], why: str) -> None:
    """Refuse overrides that would do nothing.

    Args:
        overrides: of --set.
        matters: what keys begin with that the stage reads.
        why: says which do matter.

    Raises:
        UserError: naming the first.
    """
    if odd := [text for text in overrides if "=" in text and not text.startswith(tuple(matters))]:
        raise UserError(f"--set {odd[0]}: {why}")


def json_flag(flags: argparse.ArgumentParser) -> None:
    """Add --json, of every stage that prints a table."""
    flags.add_argument("--json", metavar="FILE", type=output_file, help="also write the last table as JSON")


def at_least(least: int, most: int | None = None) -> Callable[[str], int]:
    """Argparse type: a whole number from `least` on, up to `most`."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is too small; at least {least}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"{text} is too large; at most {most}")
        return value

    return number


def output_file(text: str) -> str:
    """Argparse type: a file that can be written later, checked before hours are spent."""
    path = Path(text).resolve()
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"{text} is not a regular file")
    return _writable(text, path.parent)


def output_folder(text: str) -> str:
    """Argparse type: a folder that is there or can be made, checked before hours are spent."""
    if not text:
        raise argparse.ArgumentTypeError("the name of the folder is empty")
    path = Path(text).resolve()
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    return _writable(text, path)


def _writable(text: str, folder: Path) -> str:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: {there} is no folder that can be written to")
    return text


def start(recipe: Recipe) -> Accelerator:
    """Return the accelerator of a recipe, its seed set; see `new_accelerator`."""
    accelerator = new_accelerator(recipe.run.threads)
    set_seed(recipe.run.seed)
    return accelerator


def new_accelerator(threads: int = 0) -> Accelerator:
    """Return the accelerator, with CPU threads set and the libraries' chatter off.

    Args:
        threads: of the CPU; 0: as many as there are cores for each process.

    Raises:
        UserError: the launcher asks for what runs here do not do.
    """
    accelerator = Accelerator()
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError("--gradient_accumulation_steps is not used here; [optim] batch_size is the whole batch")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(f"--mixed_precision {accelerator.mixed_precision}: choices: no, bf16")
    if accelerator.device.type == "cpu":
        # `accelerate launch` sets OMP_NUM_THREADS=1 for a single CPU process; it means us to choose.
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(threads or max(1, available_cpus() // local_processes))
    datasets.disable_progress_bars()
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # our own error says what it cannot read
    logging.getLogger("timm").setLevel(logging.ERROR)  # it warns of the classifier that we do not want
    warnings.filterwarnings("ignore", message=".*pin_memory.*|This DataLoader will create")
    warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)  # large, yet within PIL's limit
    return accelerator


def print_table(accelerator: Accelerator, rows: Sequence[Mapping[str, Any]], output: str | None = None) -> None:
    """Print rows as a Markdown table (numbers to two decimals), and write them as JSON if asked."""
    if accelerator.is_main_process:
        print_rows(rows, output)


def print_rows(rows: Sequence[Mapping[str, Any]], output: str | None = None) -> None:
    """Print rows of one process; see `print_table`."""
    print(markdown(rows))
    if output:
        write_json(Path(output), rows)


def result_row(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of one run for the last table of a stage."""
    return {
        "run": metrics["name"],
        "method": metrics["method"],
        "backbone": metrics["backbone"],
        "labelled": metrics["num_labeled"],
        "unlabelled": metrics["num_unlabeled"],
        "val mIoU %": metrics["miou"],
        "best on val %": (metrics.get("best_on_val") or {}).get("miou"),
        "minutes": metrics["seconds"] / 60,
    }


_NO_WAY_IN = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)  # asking whether a path is there may raise


def run(main: Callable[[], None]) -> None:
    """Call a stage's `main`; a UserError becomes one line on stderr and exit status 2 (75: another process is at it).

    So does the OSError of a path that may not be looked at, or that is too long: any of those that a user names.

    SIGTERM and Ctrl-C end it with one line and 128 + the number of the signal.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows no "±" shows "?"
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        sys.exit(128 + signal.SIGPIPE)
    except UserError as error:
        # A data worker hands its exception over with its traceback as text before the message.
        message = str(error).rpartition("UserError: ")[2] if str(error).startswith("Caught ") else str(error)
        sys.exit(_fail(message.strip(), Busy.STATUS if isinstance(error, Busy) else 2))
    except OSError as error:
        if error.filename is None or error.errno not in _NO_WAY_IN:
            raise
        sys.exit(_fail(f"{error.filename}: {error.strerror}; name another place, or open this one to your user"))
    except Stopped as stop:
        sys.exit(_fail(f"stopped by {signal.Signals(stop.number).name}; {stop}", status=128 + stop.number))
    finally:
        _end_workers()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _end_workers() -> None:
    """Kill data workers that are left: Python would send them SIGTERM, which they do not heed, and wait."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes it for an accident
    for worker in multiprocessing.active_children():
        worker.kill()


def _stop(number: int, _: FrameType | None) -> None:
    raise Stopped(number)


def _fail(message: str, status: int = 2) -> int:
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr, flush=True)
    return status
