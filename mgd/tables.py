"""Tables and values of TOML: changed by `--set`, and read as what they stand for."""

import re
import tomllib
from collections.abc import Mapping
from typing import Any

from mgd.errors import UserError


def tidy(text: str) -> str:
    """Return `section.key=value` without spaces around its parts."""
    key, equals, right = text.partition("=")
    return f"{'.'.join(part.strip() for part in key.split('.'))}{equals}{right.strip()}"


def override(raw: dict[str, Any], text: str) -> None:
    """Change one value in place.

    Args:
        raw: tables of a recipe.
        text: `section.key=value`, value in TOML; bare words are text.

    Raises:
        UserError: it is something else.
    """
    key, equals, right = tidy(text).partition("=")
    parts = key.split(".")
    if not equals or not 2 <= len(parts) <= 8 or not all(parts):
        raise UserError(f"--set {text}: expected section.key=value, e.g. --set optim.lr=0.01")
    try:
        parsed = tomllib.loads(f"value = {right}")
        value = parsed["value"] if len(parsed) == 1 else right
    except (ValueError, RecursionError) as error:
        if right[:1] + right[-1:] in ("[]", "{}"):
            raise UserError(
                f"--set {text[:200]}: not valid TOML ({str(error)[:100]}); words in a list want quotes, and the whole "
                """those of the shell: --set 'data.classes=["a", "b"]'"""
            ) from error
        value = right
    table = raw
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {text}: {part} is a value, not a table")
    table[parts[-1]] = value


def as_tuples(value: Any) -> Any:
    """Return lists of TOML as tuples, which frozen models hold."""
    if isinstance(value, Mapping):
        return {key: as_tuples(item) for key, item in value.items()}
    return tuple(as_tuples(item) for item in value) if isinstance(value, list) else value


def as_lists(value: Any) -> Any:
    """Return tuples of frozen models as lists, which TOML has."""
    if isinstance(value, Mapping):
        return {key: as_lists(item) for key, item in value.items()}
    return [as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one, its keys `section.key`."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def labeled_amount(labeled: int | float | str, pool: int) -> int:
    """Turn `partition.labeled` into a number of images.

    Args:
        labeled: count (int), share in (0, 1] (float) or fraction as text ("1/16").
        pool: number of images that carry a mask.

    Raises:
        ValueError: not a positive count, a share outside (0, 1], or text that is no fraction.
    """
    share = labeled
    if isinstance(labeled, str):
        if len(labeled) > 20 or re.fullmatch(r"[0-9]+/[0-9]*[1-9][0-9]*", labeled) is None:
            raise ValueError(f'{labeled!r} is no fraction such as "1/16"')
        top, _, bottom = labeled.partition("/")
        share = int(top) / int(bottom)
    elif isinstance(labeled, int):
        if labeled < 1:
            raise ValueError(f"{labeled} is no count of images; at least 1")
        return labeled
    if not 0 < share <= 1:
        raise ValueError(f"{labeled!r} is no share; above 0 and at most 1.0")
    return max(1, round(share * pool))
