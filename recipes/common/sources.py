"""Data sets by name: a file, a folder written by `save_to_disk`, or a Hub id."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prefopt.recipes.common.arguments import UserError

if TYPE_CHECKING:  # its import takes seconds, which JSONL files do without
    from datasets import Dataset, IterableDataset

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def keep_inputs(out: Path, inputs: Sequence[str | Path], key: str = "out") -> None:
    """Data are people's work: what a command reads is never what it writes over."""
    for name in inputs:
        if out.resolve() == Path(name).resolve():
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

    `config`, `data_dir` and `revision` are those of a Hub dataset. A file is the split `train` of itself.

    Raises:
        UserError: it is not there, or cannot be read.
    """
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    path = Path(name)
    try:
        if path.is_file():
            if path.suffix not in _BUILDERS:
                raise UserError(
                    f"{key}: {name} has suffix {path.suffix!r}; expected one of {sorted(_BUILDERS)}"
                )
            return load_dataset(_BUILDERS[path.suffix], data_files=name, split="train", streaming=streaming)
        if (path / "dataset_info.json").is_file():
            return load_from_disk(name)
        if (path / "dataset_dict.json").is_file():
            return load_from_disk(name)[split]
        if path.suffix in _BUILDERS:
            raise UserError(f"{key}: file {name} does not exist")
        return load_dataset(
            name, config, data_dir=data_dir, revision=revision, split=split, streaming=streaming
        )
    except (OSError, ValueError, KeyError, RuntimeError, DatasetsError) as error:
        reason = str(error)
        if isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
            reason = f"{error.__cause__}".strip()  # which line, where the error itself says nothing
        remedy = ""
        if "scripts are no longer supported" in str(error):
            remedy = (
                "; the Hub keeps a copy of its rows: revision refs/convert/parquet, and the configuration as data_dir "
                f"(`prefopt data convert {name} --revision refs/convert/parquet --data_dir {config or 'default'}`)"
            )
        raise UserError(f"{key}: cannot load {name!r} (split {split!r}): {reason}{remedy}") from error
