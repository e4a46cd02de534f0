"""One command at a time writes an output."""

from pathlib import Path

from filelock import FileLock, Timeout

from prefopt.errors import UserError

LOCK = "_lock"  # in the folder of a training step; not pushed to the Hub, for the underscore
_held: list[FileLock] = []


def lock(file: Path, key: str, output: Path) -> None:
    """Hold `file` until `release` or the end of this process, so that no other one writes `output`.

    Raises:
        UserError: another command is writing it; `key` is what names it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # A singleton: one process may go on with its own run.
    held = FileLock(file, is_singleton=True)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{key}: another command is writing {output} (it holds {file}); wait for its end, or choose another {key}"
        ) from None
    _held.append(held)


def release() -> None:
    """Give back what this process has locked."""
    while _held:
        _held.pop().release()
