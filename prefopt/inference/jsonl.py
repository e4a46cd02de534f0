"""JSONL files: read with errors that name the line, written whole or not at all. Light to import, without torch."""

import base64
import filecmp
import glob
import gzip
import json
import math
import os
import platform
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, TextIO

from prefopt.errors import UserError, UserTypeError

# A process is known by its number on its own machine alone.
HOST = f"{zlib.crc32(platform.node().encode()):08x}"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` for `json.loads`: a key that stands twice is an error, the first would be forgotten.

    >>> json.loads('{"a": 1, "a": 2}', object_pairs_hook=unique_keys)
    Traceback (most recent call last):
    json.decoder.JSONDecodeError: the key 'a' stands twice: line 1 column 1 (char 0)
    """
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise json.JSONDecodeError(f"the key {twice!r} stands twice", "", 0)
    return result


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read one JSON object per line; a line that is none is an error that names it."""
    return list(iter_jsonl(path))


def iter_jsonl(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The rows of `read_jsonl` one after the other, also of a file ending in .gz."""
    opened = gzip.open if str(path).endswith(".gz") else open
    # newline="\n": lines end there alone, not at U+2028 and the like, which may stand inside a JSON string.
    with opened(path, "rt", encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(_utf8(lines, path), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=unique_keys)
            except (json.JSONDecodeError, RecursionError) as error:
                what = f"not valid JSON ({getattr(error, 'msg', 'nested too deeply')})"
                remedy = "the file was cut off or edited: mend or remove that line"
                raise UserError(f"{path} line {number}: {what}; {remedy}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path} line {number}: expected a JSON object, got {type(row).__name__}")
            yield row


def _utf8(lines: Iterable[str], path: str | os.PathLike) -> Iterator[str]:
    try:
        yield from lines
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}); compress or copy it again") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{path}: not UTF-8 text (it has the byte 0x{byte:02x}); save it as UTF-8") from None


def read_json(path: str | os.PathLike, *keys: str) -> dict[str, Any]:
    """The JSON object in a file that has these keys; anything else is a UserError that names the file.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "results.json"
    >>> write_whole(path, '{"measures": []}')
    >>> read_json(path, "measures")
    {'measures': []}
    >>> read_json(path, "settings")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    prefopt.errors.UserError: .../results.json: 'settings' is missing
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=unique_keys)
    except OSError as error:
        raise UserError(f"{path}: {os.strerror(error.errno or 0)}") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path}: not valid JSON ({reason}); it was cut off or edited") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}")
    missing = [key for key in keys if key not in content]
    if missing:
        raise UserError(f"{path}: {missing[0]!r} is missing")
    return content


def write_jsonl(path: str | os.PathLike, rows: Iterable[dict[str, Any]], *, replace: bool = True) -> int:
    """Write one JSON object per line, as the rows come; the file appears whole or not at all. Returns their number.

    What Parquet has and JSON has not: dates and times are written in ISO's form, durations in seconds, decimals as numbers,
    bytes in base64.

    Args:
        replace: whether a file of other content may be there; without, it stays and is an error.

    Raises:
        TypeError: a value without a form in JSON, naming row and field.
    """
    number = 0
    with _whole(path, replace) as file:
        for row in rows:
            try:
                line = _json_line(row)
            except TypeError as error:
                field = next(name for name in row if not _has_json(row[name]))
                raise UserTypeError(f"{path} row {number}: field {field!r}: {error}; leave the field out") from None
            file.write(line + "\n")
            number += 1
    return number


def _json_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=_as_json)


def _has_json(value: Any) -> bool:
    try:
        _json_line(value)
    except TypeError:
        return False
    return True


def _as_json(value: Any) -> str | float:
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    raise UserTypeError(f"{type(value).__name__} has no form in JSON")


def write_whole(path: str | os.PathLike, text: str, *, replace: bool = True) -> None:
    """Write to a temporary neighbor and rename it: readers never see half a file. `replace` as for `write_jsonl`."""
    with _whole(path, replace) as file:
        file.write(text)


def write_json(path: str | os.PathLike, value: Any, *, replace: bool = True) -> None:
    """Write indented JSON as `write_whole`; numbers that it does not have (an interval of one prompt) are null."""
    write_whole(path, json.dumps(finite(value), indent=1, ensure_ascii=False) + "\n", replace=replace)


def finite(value: Any) -> Any:
    """The value with null for numbers that JSON does not have.

    >>> finite({"ratings": [1.0, float("nan")]})
    {'ratings': [1.0, None]}
    """
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, PermissionError):
        pass
    return True


@contextmanager
def _whole(path: str | os.PathLike, replace: bool) -> Iterator[TextIO]:
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file")
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path} is a link that leads nowhere; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    ours = f".{path.name}.{HOST}-"
    temporary = path.with_name(f"{ours}{os.getpid()}.tmp")
    # What kills have left of earlier tries.
    for left in path.parent.glob(f"{glob.escape(ours)}*.tmp"):
        if not _is_alive(left.name.removeprefix(ours).removesuffix(".tmp")):
            left.unlink(missing_ok=True)
    try:
        # A lone surrogate has no UTF-8 form: written as \udXXX, which JSON reads back as the same character.
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
        if not replace and path.exists() and not filecmp.cmp(temporary, path, shallow=False):
            raise UserError(
                f"{path} is there already and holds something else, perhaps somebody's work; name another file, or "
                "replace it with --overwrite"
            )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
