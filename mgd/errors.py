"""User-facing errors: exception types and the wording that goes with a wrong name."""

import contextlib
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError


class UserError(ValueError):
    """Bad input: the message names the file, key or value at fault and the way out.

    A stage prints it as one line and exits with status 2; any other exception but that of a path that may not be
    looked at (`mgd.cli.run`) is a defect of ours and keeps its traceback.
    """


class Busy(UserError):
    """Another process is at it; a stage exits with `STATUS` instead of 2, and the same command may do later."""

    STATUS = 75  # EX_TEMPFAIL of sysexits.h


class Stopped(BaseException):
    """A signal asked the run to end. Like KeyboardInterrupt it is not an Exception, lest it be swallowed.

    Args:
        number: of the signal.
        message: what is kept, and how to go on.
    """

    def __init__(
        self, number: int, message: str = "the same command does it again, or goes on from a resume point"
    ) -> None:
        super().__init__(message)
        self.number = number


def one_line(error: object, limit: int = 200) -> str:
    """Return what another library's error says as one line of at most `limit` characters; its type if it is silent."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


CANNOT_TAKE = (RuntimeError, AssertionError, ValueError, MemoryError)
"""What torch and timm raise of an image whose size a network cannot take."""


@contextlib.contextmanager
def explained(problem: str, remedy: str = "") -> Iterator[None]:
    """Word as a `UserError` what a network inside raises of an image that it cannot take.

    Args:
        problem: what cannot be done.
        remedy: the way out.

    Raises:
        UserError: `problem: what was raised; remedy`; one that is raised inside stays as it is.
    """
    try:
        yield
    except UserError:
        raise
    except CANNOT_TAKE as error:
        raise UserError(f"{problem}: {one_line(error)}{remedy and '; '}{remedy}") from error


def some(names: Sequence[str]) -> str:
    """Return the first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def did_you_mean(value: object, choices: Iterable[str]) -> str:
    """Return "did you mean 'x'? choices: a, b, c" (the first part only when something is close)."""
    choices = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(value), choices, n=3, cutoff=0.6)
    shown = choices if len(choices) <= 30 else [*choices[:30], "..."]
    hint = f"did you mean {' or '.join(repr(name) for name in near)}? " if near else ""
    return f"{hint}choices: {', '.join(shown)}"


def pydantic_lines(error: ValidationError, model: type[BaseModel], where: str) -> list[str]:
    """Word each mistake of a section as `[section] key: what is wrong; the choices`.

    Args:
        error: what `model.model_validate` raised.
        model: the model of the section.
        where: name of the section.
    """
    return list(dict.fromkeys(_pydantic_line(model, detail, where) for detail in error.errors(include_url=False)))


def _pydantic_line(model: type[BaseModel], detail: Mapping[str, Any], where: str) -> str:
    """Word one pydantic error as `[section] key: what is wrong; the choices`."""
    location = [part for part in detail["loc"] if isinstance(part, str)]
    names, section, fields = [], where, model.model_fields
    for part in location:
        if part not in fields and detail["type"] != "extra_forbidden":
            break  # the rest of the location is the member of a union that was tried
        names.append(part)
        inner = fields[part].annotation if part in fields else None
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            section, names, fields = f"{section}.{part}", [], inner.model_fields
    key = f" {'.'.join(names)}" if names else ""
    if detail["type"] == "extra_forbidden":
        return f"[{section}]{key}: unknown key; {did_you_mean(names[-1], fields)}"
    if detail["type"] == "missing":
        return f"[{section}]{key or ' ' + location[-1]}: missing"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    message = message.replace("valid tuple", "list").replace("valid dictionary", "table")
    message = message.replace("Tuple should have", "a list of").replace(" after validation", "")
    if detail["type"] == "string_pattern_mismatch" and detail["ctx"]["pattern"].startswith("^[A-Za-z0-9]"):  # a name
        seeded = ", and {seed}" if "seed" in detail["ctx"]["pattern"] else ""
        message = f"may hold letters, digits, '.', '_' and '-'{seeded}, and begins with a letter or a digit"
    if detail["type"] == "literal_error":
        choices = detail["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        message = f"is not a choice; {did_you_mean(detail['input'], choices)}"
    return f"[{section}]{key} = {_shown(detail['input'])}: {message}" if names else f"[{section}]: {message}"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
