"""Progress bars."""

from typing import Any

from tqdm import tqdm


def progress_bar(is_main: bool, **options: Any) -> tqdm:
    """Return a bar that is shown on a terminal alone, by one process.

    Args:
        is_main: whether this is that process.
        options: of tqdm.
    """
    return tqdm(leave=False, disable=None if is_main else True, **options)  # None: where there is no terminal
