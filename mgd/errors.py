"""User-facing errors: one exception type and the wording that goes with a wrong name."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: the message names the file, key or value at fault and the way out.

    A stage prints it as one line and exits with status 2; any other exception is a defect of
    ours and keeps its traceback.
    """


def did_you_mean(value: object, choices: Iterable[str]) -> str:
    """Return "did you mean 'x'? choices: a, b, c" (the first part only when something is close)."""
    choices = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(value), choices, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(repr(name) for name in near)}? " if near else ""
    return f"{hint}choices: {', '.join(choices)}"
