"""Rows on disk that are computed once: a second run with the same inputs reads them."""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from prefopt.evaluation.generate import read_jsonl, write_jsonl, write_whole


def kept_rows(
    path: Path, inputs: Any, compute: Callable[[], Iterable[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """The rows of `path` if they were made from `inputs`; else `compute()`, kept there.

    `path` + ".inputs" holds the fingerprint and appears behind the rows, so that an interrupted run leaves nothing
    that looks finished.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "squares.jsonl"
        >>> kept_rows(path, {"up to": 2}, lambda: [{"x": x * x} for x in range(2)])
        [{'x': 0}, {'x': 1}]
        >>> kept_rows(path, {"up to": 2}, lambda: 1 / 0)  # not computed again
        [{'x': 0}, {'x': 1}]
    """
    mark = path.with_name(path.name + ".inputs")
    fingerprint = fingerprint_of(inputs)
    if path.is_file() and mark.is_file() and mark.read_text(encoding="utf-8") == fingerprint:
        return read_jsonl(path)
    mark.unlink(missing_ok=True)
    write_jsonl(path, [dict(row) for row in compute()])
    write_whole(mark, fingerprint)
    return read_jsonl(path)


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
    base = (
        json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if adapter.is_file()
        else None
    )
    return state if base is None else [*state, source_state(base)]


def function_state(name: str) -> list[Any]:
    """A function `package.module:name` by its module's file, whose edit may change what it says; else as a model."""
    module = name.partition(":")[0]
    try:
        found = importlib.util.find_spec(module) if ":" in name else None
    except (ImportError, ValueError):
        found = None
    return [name, source_state(found.origin if found is not None and found.origin else name)]
