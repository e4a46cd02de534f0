"""Rows on disk that are computed once: a second run with the same inputs reads them, a killed run goes on."""

import hashlib
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prefopt.inference import processes
from prefopt.inference.jsonl import read_jsonl, write_jsonl, write_whole
from prefopt.inference.processes import from_main, is_main, spread

logger = logging.getLogger(__name__)
Rows = Iterable[Mapping[str, Any]]


def kept_rows(path: Path, inputs: Any, compute: Callable[[], Rows]) -> list[dict[str, Any]]:
    """The rows of `path` if they were made from `inputs`; else `compute()`, kept there.

    `path` + ".inputs" holds the fingerprint and appears behind the rows, so that an interrupted run leaves nothing
    that looks finished. Rows of other inputs stay until those in their place are computed.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "squares.jsonl"
    >>> kept_rows(path, {"up to": 2}, lambda: [{"x": x * x} for x in range(2)])
    [{'x': 0}, {'x': 1}]
    >>> kept_rows(path, {"up to": 2}, lambda: 1 / 0)  # not computed again
    [{'x': 0}, {'x': 1}]
    """
    if not is_kept(path, inputs):
        rows = [dict(row) for row in compute()]
        mark = _mark(path)
        mark.unlink(missing_ok=True)
        write_jsonl(path, rows)
        write_whole(mark, fingerprint_of(inputs))
    return read_jsonl(path)


def is_kept(path: Path, inputs: Any) -> bool:
    """Whether `path` has the finished rows that were made from `inputs`."""
    mark = _mark(path)
    return path.is_file() and mark.is_file() and mark.read_bytes() == fingerprint_of(inputs).encode()


def is_finished(path: Path) -> bool:
    """Whether `path` has finished rows, of whatever inputs."""
    return path.is_file() and _mark(path).is_file()


def is_foreign(path: Path) -> bool:
    """Whether `path` is a file that `continued_rows` did not write: it has neither a fingerprint nor a journal beside it."""
    # Also a link that leads nowhere.
    return os.path.lexists(path) and not _mark(path).is_file() and not _journal(path).is_file()


def set_aside(path: Path) -> None:
    """Put a file and its fingerprint, or a folder, out of the readers' sight: it no longer holds, and may hold again.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "squares.jsonl"
        >>> rows = kept_rows(path, "squares", lambda: [{"x": 1}])
        >>> set_aside(path)
        >>> path.exists(), is_kept(path, "squares")
        (False, False)
        >>> take_back(path)
        >>> is_kept(path, "squares")
        True
    """
    for shown in (path, _mark(path)):
        if shown.exists():
            if _aside(shown).is_dir():
                shutil.rmtree(_aside(shown))
            os.replace(shown, _aside(shown))


def take_back(path: Path) -> None:
    """Undo `set_aside`, unless something newer stands there."""
    for shown in (path, _mark(path)):
        if _aside(shown).exists() and not shown.exists():
            os.replace(_aside(shown), shown)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.aside")


def _mark(path: Path) -> Path:
    return path.with_name(path.name + ".inputs")


def _journal(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def continued_rows(path: Path, inputs: Any, compute: Callable[["Journal"], Rows]) -> list[dict[str, Any]]:
    """`kept_rows` of a long computation: what it writes into the journal, a hidden file beside `path`, outlives a kill.

    Every process of `accelerate launch` calls it; the first one writes.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "squares.jsonl"
    >>> def squares(journal, numbers):
    ...     return [{"x": square} for square in journal.entries(3, lambda i: numbers[i] ** 2)]
    >>> continued_rows(path, "squares", lambda journal: squares(journal, [0, 1]))
    Traceback (most recent call last):
    IndexError: list index out of range
    >>> continued_rows(path, "squares", lambda journal: squares(journal, [None, None, 2]))  # the first two are read
    [{'x': 0}, {'x': 1}, {'x': 4}]
    """
    if not from_main(lambda: is_kept(path, inputs)):
        rows = compute(Journal(_journal(path), inputs))
        from_main(lambda: len(kept_rows(path, inputs, lambda: rows)))
    if is_main():
        # Also one that a kill between the two has left; of other inputs, it may be gone on with.
        journal = _journal(path)
        if journal.is_file() and journal.open("rb").readline().strip() == fingerprint_of(inputs).encode():
            journal.unlink()
    return from_main(lambda: read_jsonl(path))


class Journal:
    """Entries of a long computation in a file, written one by one as they are found, in an order that is always the same.

    The first line is the fingerprint of `inputs`, every other one `[number, entry]`. A file of other inputs is begun
    anew, which is told; so is an end that a kill left half written, and only that entry is computed again.

    An entry may depend on its number and on `inputs` alone; random numbers are seeded for each.
    """

    def __init__(self, path: Path, inputs: Any) -> None:
        self.path = path
        self._head = fingerprint_of(inputs).encode()
        self._known = from_main(self._read)
        self._asked = 0

    def entries(self, count: int, compute: Callable[[int], Any]) -> Iterator[Any]:
        """The next `count` entries as JSON gives them back: of an earlier run, or else number i is `compute(i)`, on disk when
        it is given. The processes of `accelerate launch` share what is to be computed.

        As many as there are processes are computed at a time and then written, so that the file is that of one process.
        """
        first = self._asked
        self._asked += count
        known = self._known[first : first + count]
        yield from known
        for start in range(len(known), count, processes.count()):
            numbers = range(start, min(start + processes.count(), count))
            # Plain ASCII, which cannot be cut inside a character.
            lines = spread(numbers, lambda i: json.dumps([first + i, compute(i)]))
            if is_main():
                for number, line in zip(numbers, lines, strict=True):
                    self._write(first + number, line)
            for line in lines:
                yield json.loads(line)[1]

    def _write(self, number: int, line: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # What other inputs gave is written over only now: a run that stops before its first entry costs nothing.
        with self.path.open("ab" if number else "wb") as file:
            file.write((b"" if number else self._head + b"\n") + line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> list[Any]:
        """The whole entries in their order, behind which the file is cut."""
        head, *lines = self.path.read_bytes().split(b"\n") if self.path.is_file() else [b""]
        if head != self._head:
            if len(lines) > 1:
                logger.warning(
                    "%s: %d parts were made from other data, models or settings; begun anew", self.path, len(lines) - 1
                )
            return []
        entries: list[Any] = []
        for line in lines[:-1]:  # behind the last line break stands nothing, or what a kill left half written
            try:
                number, entry = json.loads(line)
            except (ValueError, TypeError, RecursionError):
                break
            if number != len(entries):
                break
            entries.append(entry)
        end = sum(len(line) + 1 for line in [head, *lines[: len(entries)]])
        if end < self.path.stat().st_size:
            logger.warning("%s: the end is half written; that part is made again", self.path)
            os.truncate(self.path, end)
        return entries


def fingerprint_of(inputs: Any) -> str:
    """A short name for anything that JSON can write (paths and the like by their text)."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:16]


def source_state(source: str) -> list[Any]:
    """A model by what would change if it were trained again: its name, and the size and time of its files; those of its
    base too if it is an adapter."""
    folder = Path(source)
    if folder.is_file():
        return [source, folder.stat().st_size, folder.stat().st_mtime_ns]
    suffixes = (".safetensors", ".bin", ".json", ".model", ".jinja", ".txt", ".tiktoken")
    files = sorted(f for f in folder.glob("*") if f.suffix in suffixes and f.name != "trainer_state.json")
    state = [source, *([f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files)]
    adapter = folder / "adapter_config.json"
    try:
        base = (
            json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"] if adapter.is_file() else None
        )
    # What loads the model says what is wrong with it.
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        base = None
    # An adapter cannot be its own base, which would never end.
    return [*state, source_state(base)] if isinstance(base, str) and Path(base) != folder else state


def function_state(name: str) -> list[Any]:
    """A function `package.module:name` by its module's file, whose edit may change what it says; else as a model."""
    module = name.partition(":")[0]
    try:
        found = importlib.util.find_spec(module) if ":" in name else None
    except (ImportError, ValueError):
        found = None
    return [name, source_state(found.origin if found is not None and found.origin else name)]
