"""Rows by name (a file, a folder written by `save_to_disk`, or a Hub id): loaded, or read as they come and checked as what
they are.

Libraries that take seconds to import (datasets, transformers) are imported where the rows need them.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.progress import track

from prefopt.errors import UserError
from prefopt.inference.jsonl import iter_jsonl
from prefopt.rankings.checks import row_problem
from prefopt.rankings.formats import fields, needs_conversion, pairs
from prefopt.rankings.formats.unpaired import with_own_names
from prefopt.rankings.prompts import with_prompt
from prefopt.recipes.common.arguments import setting
from prefopt.recipes.common.errors import explain

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Row = Mapping[str, Any]
Kind = Literal["comparisons", "demonstrations", "prompts", "conversations", "texts"]

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_FORMATS = {str: "text", list: "messages", tuple: "messages"}


def check_output(out: Path, inputs: Sequence[str | Path], key: str = "out") -> None:
    """Data are people's work: what a command reads is never what it writes over. Nor is a name a promise that is not kept.

    Raises:
        UserError: `out` is one of `inputs`, or named as a table, as which nothing is written.
    """
    if out.suffix.lower() in (".csv", ".tsv", ".parquet", ".arrow"):
        raise UserError(f"{key} {str(out)!r}: nothing is written as a table; name a .jsonl or .json file")
    for name in inputs:
        # Not `resolve`, which a loop of links ends with an error.
        is_same = os.path.realpath(out) == os.path.realpath(name)
        if is_same or (out.exists() and os.path.exists(name) and os.path.samefile(out, name)):
            raise UserError(f"{key} {str(out)!r} is also read; choose another name")


def load_source(
    name: str,
    key: str,
    split: str = "train",
    config: str | None = None,
    *,
    data_dir: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """The rows called `name`; `key` is the argument the name came from, so that an error can say which one to change.

    `config`, `data_dir` and `revision` are those of a Hub dataset. A file is the split `train` of itself. Cells of a CSV are
    texts (an answer may be "null", "NA" or "06"), empty ones nothing; where the first of a column is JSON of messages, all are.
    """
    import pandas
    from datasets import Features, Value, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError

    path = Path(name)
    if problem := _no_file(name):
        raise UserError(f"{key}: {problem}")
    try:
        if path.is_file():
            if path.suffix not in _BUILDERS:
                raise UserError(f"{key}: {name} has suffix {path.suffix!r}; expected one of {sorted(_BUILDERS)}")
            how: dict[str, Any] = {"split": _split_of_file(split), "streaming": streaming}
            if path.suffix == ".csv":
                cells = Features(dict.fromkeys(pandas.read_csv(name, nrows=0).columns, Value("string")))
                how |= {"features": cells, "keep_default_na": False, "na_values": [""]}
            rows = load_dataset(_BUILDERS[path.suffix], data_files=name, **how)
            return _typed_cells(rows) if path.suffix == ".csv" else rows
        if (path / "dataset_info.json").is_file():
            return part_of(load_from_disk(name), _split_of_file(split))
        if (path / "dataset_dict.json").is_file():
            return part_of(load_from_disk(name)[split.partition("[")[0]], split)
        return load_dataset(name, config, data_dir=data_dir, revision=revision, split=split, streaming=streaming)
    except UserError:
        raise
    # Whatever a broken file meets in the library that reads it.
    except Exception as error:
        reason = explain(error) or str(error) or type(error).__name__
        if isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
            # It names the line, where the error itself says nothing.
            reason = f"{error.__cause__}".strip()
        remedy = "; it is damaged, cut off or of another kind: copy or write it again" if path.exists() else ""
        if "scripts are no longer supported" in str(error):
            remedy = (
                "; the Hub keeps a copy of its rows: revision refs/convert/parquet, and the configuration as data_dir "
                f"(`prefopt data convert {name} --revision refs/convert/parquet --data_dir {config or 'default'}`)"
            )
        raise UserError(f"{key}: cannot load {name!r} (split {split!r}): {reason}{remedy}") from error


# Columns of a row that may be messages.
_MAY_BE_CHATS = ("prompt", "completion", "chosen", "rejected", "messages", "conversations")


def _typed_cells(rows: Any) -> Any:
    """The rows of a CSV with what its texts stand for: margins are numbers, JSON of messages is messages."""
    first = next(iter(rows), {})
    chats = [name for name in _MAY_BE_CHATS if pairs.as_messages(first.get(name)) is not first.get(name)]

    def typed(row: dict[str, Any]) -> dict[str, Any]:
        cells = {name: pairs.as_messages(row[name]) for name in chats}
        return cells | ({"margin": fields.number(row["margin"], "margin")} if "margin" in row else {})

    return rows.map(typed) if chats or "margin" in first else rows


def _no_file(name: str) -> str | None:
    """What stands where a file of rows is named, if none does."""
    path = Path(name)
    is_named_as_file = path.suffix in _BUILDERS or path.name.endswith(".jsonl.gz")
    if path.is_symlink() and not path.exists():
        return f"{path} is a link that leads nowhere; name the file itself"
    if is_named_as_file and not path.exists():
        return f"file {path} does not exist"
    if is_named_as_file and path.is_dir() and not any(path.glob("dataset_*.json")):
        return f"{path} is a folder; name a file"
    # Not what a data set on the Hub can be called.
    if not path.exists() and (name.startswith((".", "/", "~")) or len(path.parts) > 2):
        return f"there is no file or folder {name}"
    if path.is_file() and not os.access(path, os.R_OK):
        return f"{path} may not be read: change its rights (chmod, chown)"
    return None


def _split_of_file(split: str) -> str:
    """`train`, or a part of it as `datasets` has them (`train[:75%]`): a file has no other split."""
    if not re.fullmatch(r"train(\[.*\])?", split):
        raise UserError(
            f"split {split!r}: a file is one split, train; write train, or a part of it such as train[:75%]"
        )
    return split


def part_of(rows: Any, split: str) -> Any:
    """The rows of a split such as `train[:75%]`, of a list or a Dataset with all rows of `train`.

    >>> part_of(["a", "b", "c", "d"], "train[75%:]"), part_of(["a", "b"], "train")
    (['d'], ['a', 'b'])
    """
    if "[" not in split:
        return rows
    from datasets import ReadInstruction

    (part,) = ReadInstruction.from_spec(split).to_absolute({split.partition("[")[0]: len(rows)})
    return rows[part.from_ : part.to] if isinstance(rows, list) else rows.select(range(part.from_, part.to))


def rows_of_jsonl(name: str, split: str) -> Iterator[Row]:
    """The rows of a split of a .jsonl file, as they are read where that is all of them."""
    if problem := _no_file(name):
        raise UserError(problem)
    _split_of_file(split)
    rows = iter_jsonl(name)
    yield from part_of(list(rows), split) if "[" in split else rows


@dataclass
class SourceArguments:
    """Where the rows come from."""

    data: str | None = setting(None, "File, folder or Hub id.")
    split: str = setting("train", "Split of a folder or Hub dataset.")
    config_name: str | None = setting(None, "Configuration of a Hub dataset.")
    data_dir: str | None = setting(None, "Folder in a Hub dataset.")
    revision: str | None = setting(None, "Branch, tag or commit of a Hub dataset.")
    streaming: bool = setting(False, "Read rows as they come, without a copy on disk (jsonl always).")
    max_rows: int | None = setting(None, "Read no more rows than this.")

    def __post_init__(self) -> None:
        if not self.data:
            raise UserError("data is required: a .jsonl, .json, .csv or .parquet file, a folder or a Hub id")
        if self.max_rows is not None and self.max_rows < 1:
            raise UserError(f"max_rows is {self.max_rows}; expected 1 or more")


def read_rows(source: SourceArguments) -> Iterable[Row]:
    """The rows as they come, with progress on a terminal."""
    rows = islice(_read(source), source.max_rows)
    return track(rows, str(source.data), console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def _read(source: SourceArguments) -> Iterator[Row]:
    name = str(source.data)
    if name.endswith((".jsonl", ".jsonl.gz")):
        yield from rows_of_jsonl(name, source.split)
        return
    hub = {"data_dir": source.data_dir, "revision": source.revision, "streaming": source.streaming}
    try:
        yield from load_source(name, "data", source.split, source.config_name, **hub)
    # The rows of a stream are parsed as they come.
    except ValueError as error:
        raise UserError(error) from error


def good_rows(rows: Iterable[Row], source: str) -> Iterator[tuple[Kind, Row]]:
    """Rows with their kind, up to the first bad one, which a UserError names."""
    for number, (kind, row, problem) in enumerate(checked_rows(rows, source)):
        if problem:
            raise UserError(
                f"{source} row {number}: {problem}; `prefopt data validate {source} --all` counts all of them"
            )
        yield kind, row


def checked_rows(rows: Iterable[Row], source: str, kind: Kind | None = None) -> Iterator[tuple[Kind, Row, str | None]]:
    """Each row with its kind and what is wrong with it; all rows are to be of one kind, by default the first one's.

    A UserError for rows that need converting, or of no kind.

    >>> rows = [{"prompt": "p", "completions": ["a", "b"], "ranks": ranks} for ranks in ([1, 2], [1, 3])]
    >>> [problem for _, _, problem in checked_rows(rows, "my.jsonl")]
    [None, "field 'ranks': expected dense ranks, got [1, 3]; write [1, 2] for the same order"]
    """
    check: Callable[[Row], str | None] | None = None
    layout: tuple[str, ...] | None = None
    for row in rows:
        kind = kind or _kind(row, source)
        row = row if kind == "comparisons" else with_own_names(row)
        check = check or _check_of(kind, row)
        problem = check(row)
        if problem is None:
            row = with_prompt(row) if kind == "comparisons" and "completions" not in row else row
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
        raise UserError(
            f"{source}: rows in the format {name}; `prefopt data convert {source} --out rankings.jsonl` reads it"
        )
    row = with_own_names(row)
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
    raise UserError(f"{source}: expected a column {', '.join(columns)}, got {', '.join(row) or 'none'}; rename them")


def _check_of(kind: Kind, first: Row) -> Callable[[Row], str | None]:
    if kind == "comparisons":
        is_pairs = "chosen" in first and "completions" not in first
        required = ("chosen", "rejected") if is_pairs else ("completions", "ranks")
        if not is_pairs or "prompt" in first:
            required = ("prompt", *required)
        return lambda row: row_problem(row, required)
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
        except UserError as error:
            return str(error).removeprefix("rows row 0: ")
        return None

    return problem


def _texts(row: Row) -> list[Any]:
    """The texts whose format must be one throughout: the prompt, and one completion."""
    completions = row.get("completions") or [row[name] for name in ("completion", "chosen") if row.get(name)]
    return [value for value in (row.get("prompt"), *completions[:1]) if value is not None]
