"""Rows for every recipe: loaded from files, folders or the Hub, and checked before any model is loaded."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets import Dataset, load_dataset, load_from_disk
from transformers import PreTrainedTokenizerBase

from prefopt.comparisons import prepare_comparisons, validate_comparisons
from prefopt.evaluation.generate import read_jsonl
from prefopt.formats import needs_conversion
from prefopt.recipes.arguments import DataArguments, UserError
from prefopt.recipes.conversations import is_message, split_implicit_prompts
from prefopt.trainers.ranked_dpo_config import RankedDPOConfig
from prefopt.trainers.ranked_reward_config import RankedRewardConfig

Rows = Dataset | list[dict]
Check = Callable[[Rows, str], None]
Convert = Callable[[Rows, str], Rows]

_FILE_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(
    name: str | None,
    *,
    key: str,
    check: Check,
    split: str = "train",
    config: str | None = None,
    convert: Convert | None = None,
) -> Dataset:
    """Load the rows called `name` (a file, a folder written by `save_to_disk`, or a Hub dataset) and check them.

    `key` is the argument the name came from, so that an error can say which one to change. `check(rows, source)`
    raises ValueError; it sees the rows of a .jsonl file as written, before Arrow gives each column one type. Before it,
    `convert(rows, source)` may bring them into the format of the step (`prefopt.recipes.conversations`).
    """
    rows = _load(name, key, split, config)
    try:
        rows = rows if convert is None else convert(rows, str(name))
        check(rows, str(name))
    except ValueError as error:
        raise UserError(error) from error
    return rows if isinstance(rows, Dataset) else _as_dataset(rows, str(name))


def _as_dataset(rows: list[dict], source: str) -> Dataset:
    """One column per field of any row: `Dataset.from_list` would forget the fields that row 0 lacks."""
    columns = {
        name: [row.get(name) for row in rows] for name in dict.fromkeys(k for row in rows for k in row)
    }
    for name, values in columns.items():
        try:
            pyarrow.array(values)
        except (pyarrow.ArrowException, TypeError, ValueError) as error:
            raise UserError(
                f"{source}: field {name!r} has values of different types ({error}); write them alike in all rows, "
                "or leave the field out"
            ) from error
    return Dataset.from_dict(columns)


def _load(name: str | None, key: str, split: str, config: str | None) -> Rows:
    if not name:
        raise UserError(f"{key} is required: a .jsonl, .json, .csv or .parquet file, a folder or a Hub id")
    path = Path(name)
    try:
        if path.is_file():
            if path.suffix not in _FILE_BUILDERS:
                raise UserError(
                    f"{key}: {name} has suffix {path.suffix!r}; expected one of {sorted(_FILE_BUILDERS)}"
                )
            if path.suffix == ".jsonl":
                return read_jsonl(path)
            return load_dataset(_FILE_BUILDERS[path.suffix], data_files=str(path), split="train")
        if (path / "dataset_info.json").is_file():
            return load_from_disk(name)
        if (path / "dataset_dict.json").is_file():
            return load_from_disk(name)[split]
        if path.suffix in _FILE_BUILDERS:
            raise UserError(f"{key}: file {name} does not exist")
        return load_dataset(name, config, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{key}: cannot load {name!r} (split {split!r}): {error}") from error


def load_train_and_eval(
    data: DataArguments, wants_eval: bool, check: Check, convert: Convert | None = None
) -> tuple[Dataset, Dataset | None]:
    """The training rows and, if evaluation is on, the evaluation rows."""
    how: dict[str, Any] = {"check": check, "convert": convert}
    named: dict[str, Any] = {"config": data.dataset_config, "key": "dataset_name", **how}
    train = load_rows(data.dataset_name, split=data.dataset_train_split, **named)
    if not wants_eval:
        if data.eval_dataset_name:
            raise UserError(
                "eval_dataset_name is given but eval_strategy is 'no': set it to 'epoch' or 'steps'"
            )
        return train, None
    if data.eval_dataset_name:
        return train, load_rows(
            data.eval_dataset_name, split=data.dataset_test_split, key="eval_dataset_name", **how
        )
    if Path(data.dataset_name).is_file():
        raise UserError("eval_strategy is on: set eval_dataset_name (a file has no test split)")
    return train, load_rows(data.dataset_name, split=data.dataset_test_split, **named)


def load_comparisons(
    data: DataArguments, args: RankedRewardConfig | RankedDPOConfig
) -> tuple[Dataset, Dataset | None]:
    """Ranked rows for training and, if evaluation is on, for evaluation, checked for what the trainer will ask."""
    train, evaluation = load_train_and_eval(
        data, args.eval_strategy != "no", check_comparisons, split_implicit_prompts
    )
    options = {"ties": args.ties, "margins": args.margin_coef > 0}
    try:
        train = prepare_comparisons(train, source=data.dataset_name, **options)
        if evaluation is not None:
            source = data.eval_dataset_name or data.dataset_name
            evaluation = prepare_comparisons(evaluation, source=source, **options)
    except ValueError as error:
        raise UserError(error) from error
    return train, evaluation


def check_comparisons(rows: Rows, source: str) -> None:
    """`validate_comparisons`, which of rows in a public format says what converts them."""
    try:
        validate_comparisons(rows, source)
    except ValueError as error:
        first = rows[0] if len(rows) else None
        if isinstance(first, Mapping) and (name := needs_conversion(first)):
            told = f"these are rows in the format {name}: `prefopt data convert {source} --out rankings.jsonl` reads it"
            raise ValueError(f"{error}; {told}") from error
        raise


def check_fields(*names: str) -> Check:
    """A check that every row has the given fields, each a text or a list of chat messages, one kind throughout."""

    def check(rows: Rows, source: str) -> None:
        if isinstance(rows, Dataset):
            missing = [name for name in names if name not in rows.column_names]
            if missing:
                raise ValueError(f"{source}: missing field {missing[0]!r}; the rows have {rows.column_names}")
            rows = rows.select_columns(list(names))
        if len(rows) == 0:
            raise ValueError(f"{source}: no rows")
        kinds: dict[str, type] = {}
        for number, row in enumerate(rows):
            for name in names:
                value = row.get(name)
                is_chat = isinstance(value, list) and name != "text"
                if not value or not (isinstance(value, str) or (is_chat and all(map(is_message, value)))):
                    expected = "a text" if name == "text" else "a text or messages with 'role' and 'content'"
                    found = repr(value)[:80] if name in row else "nothing"
                    raise ValueError(
                        f"{source} row {number}: field {name!r}: expected {expected}, got {found}"
                    )
                if type(value) is not kinds.setdefault(name, type(value)):
                    raise ValueError(
                        f"{source} row {number}: field {name!r}: text in some rows and messages in others; "
                        "train on them separately"
                    )

    return check


def require_chat_template(tokenizer: PreTrainedTokenizerBase, *datasets: Dataset | None) -> None:
    """Chat rows need a tokenizer that can render them."""
    for rows in datasets:
        if rows is None:
            continue
        names = rows.column_names
        is_chat = isinstance(rows[0]["prompt"], list) if "prompt" in names else "messages" in names
        if is_chat and tokenizer.chat_template is None:
            raise UserError(
                "the rows are chat messages, but the tokenizer has no chat template; use the tokenizer of a chat "
                "model, set tokenizer.chat_template and save it beside the model, or give prompts as plain text"
            )
