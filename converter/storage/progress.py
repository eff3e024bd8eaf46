"""Progress callbacks of long operations."""

from __future__ import annotations

from collections.abc import Callable

# Called with a description, the bytes done and the total.
OnProgress = Callable[[str, int, int], None]


def progress_counter(on_progress: OnProgress, description: str, total: int) -> Callable[[int], None]:
    """Return a function that adds up byte counts and reports the sum to `on_progress`.

    Args:
        on_progress: Called with the description, the bytes counted so far and the total.
        description: Text shown next to the progress bar.
        total: Number of bytes at the end.
    """
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        on_progress(description, done, total)

    return count
