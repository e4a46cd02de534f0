"""One command at a time in a folder."""

import os
from pathlib import Path

from filelock import FileLock, Timeout

from prefopt.errors import UserError

LOCK = "_lock"  # not pushed to the Hub, for the underscore
_held: list[FileLock] = []


def lock(folder: str | os.PathLike) -> None:
    """Keep other processes out of `folder` until `release`, or until this one ends, however it ends.

    Raises:
        UserError: another command is at work there.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    # A singleton: one process may go on with its own run.
    file = FileLock(os.path.join(folder, LOCK), is_singleton=True)
    try:
        file.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"output_dir: another command is writing into {folder} (it holds {LOCK} there); wait for its end, or choose "
            "another output_dir"
        ) from None
    _held.append(file)


def release() -> None:
    """Give back what this process has locked."""
    while _held:
        _held.pop().release()
