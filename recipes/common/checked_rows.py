"""Rows of any kind for `prefopt data`: read as they come, each checked as its kind.

Libraries that take seconds to import (datasets, transformers) are imported where the rows need them.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from rich.console import Console
from rich.progress import track

from prefopt.inference.jsonl import iter_jsonl
from prefopt.rankings.checks import row_problem
from prefopt.rankings.formats import needs_conversion
from prefopt.recipes.common.sources import load_source

Row = Mapping[str, Any]
Kind = Literal["comparisons", "demonstrations", "prompts", "conversations", "texts"]

_FORMATS = {str: "text", list: "messages", tuple: "messages"}


@dataclass
class SourceArguments:
    """Where the rows come from."""

    data: str | None = field(default=None, metadata={"help": "File, folder or Hub id."})
    split: str = field(default="train", metadata={"help": "Split of a folder or Hub dataset."})
    config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder in a Hub dataset."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."})
    streaming: bool = field(
        default=False, metadata={"help": "Read rows as they come, without a copy on disk (jsonl always)."}
    )
    max_rows: int | None = field(default=None, metadata={"help": "Read no more rows than this."})


def read_rows(source: SourceArguments) -> Iterable[Row]:
    """The rows as they come, with progress on a terminal."""
    rows = islice(_read(source), source.max_rows)
    return track(
        rows, str(source.data), console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    )


def _read(source: SourceArguments) -> Iterable[Row]:
    name = str(source.data)
    if name.endswith((".jsonl", ".jsonl.gz")):
        return iter_jsonl(name)
    hub = {"data_dir": source.data_dir, "revision": source.revision, "streaming": source.streaming}
    return load_source(name, "data", source.split, source.config_name, **hub)


def good_rows(rows: Iterable[Row], source: str) -> Iterator[tuple[Kind, Row]]:
    """Rows with their kind, up to the first bad one.

    Raises:
        ValueError: at that, naming it.
    """
    for number, (kind, row, problem) in enumerate(checked_rows(rows, source)):
        if problem:
            raise ValueError(
                f"{source} row {number}: {problem}; `prefopt data validate {source} --all` counts all of them"
            )
        yield kind, row


def checked_rows(
    rows: Iterable[Row], source: str, kind: Kind | None = None
) -> Iterator[tuple[Kind, Row, str | None]]:
    """Each row with its kind and what is wrong with it; all rows are to be of one kind, by default the first one's.

    Raises:
        ValueError: rows that need converting, or of no kind.

    >>> rows = [{"prompt": "p", "completions": ["a", "b"], "ranks": ranks} for ranks in ([1, 2], [1, 3])]
    >>> [problem for _, _, problem in checked_rows(rows, "my.jsonl")]
    [None, "field 'ranks': expected dense ranks, got [1, 3]; write [1, 2] for the same order"]
    """
    check: Callable[[Row], str | None] | None = None
    layout: tuple[str, ...] | None = None
    for row in rows:
        if check is None:
            kind = kind or _kind(row, source)
            check = _check_of(kind, row)
        problem = check(row)
        if problem is None:
            types = tuple(_FORMATS[type(value)] for value in _texts(row))
            layout = layout or types
            if types != layout:
                problem = (
                    f"expected {' with '.join(layout)} as in the first rows, got {' with '.join(types)}; "
                    "train on chat rows and plain rows separately"
                )
        yield kind, row, problem


def _kind(row: Row, source: str) -> Kind:
    if name := needs_conversion(row):
        raise ValueError(
            f"{source}: rows in the format {name}; `prefopt data convert {source} --out rankings.jsonl` reads it"
        )
    columns: dict[str, Kind] = {
        "completions": "comparisons",
        "chosen": "comparisons",
        "completion": "demonstrations",
        "messages": "conversations",
        "prompt": "prompts",
        "text": "texts",
    }
    for column, kind in columns.items():
        if column in row:
            return kind
    raise ValueError(
        f"{source}: expected a column {', '.join(columns)}, got {', '.join(row) or 'none'}; rename them"
    )


def _check_of(kind: Kind, first: Row) -> Callable[[Row], str | None]:
    if kind == "comparisons":
        answers = (
            ("chosen", "rejected")
            if "chosen" in first and "completions" not in first
            else ("completions", "ranks")
        )
        return lambda row: row_problem(row, ("prompt", *answers))
    if kind == "demonstrations":
        from prefopt.rankings.checks import validate_demonstrations as check
    elif kind == "conversations":
        from prefopt.recipes.common.conversations import check_conversations as check
    else:
        from prefopt.recipes.common.rows import check_fields

        check = check_fields("prompt" if kind == "prompts" else "text")

    def problem(row: Row) -> str | None:
        try:
            check([row], "rows")
        except ValueError as error:
            return str(error).removeprefix("rows row 0: ")
        return None

    return problem


def _texts(row: Row) -> list[Any]:
    """The texts whose format must be one throughout: the prompt, and one completion."""
    completions = row.get("completions") or [row[name] for name in ("completion", "chosen") if row.get(name)]
    return [value for value in (row.get("prompt"), *completions[:1]) if value is not None]
