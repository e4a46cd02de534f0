"""Rows for every recipe: loaded from files, folders or the Hub, and checked before any model is loaded."""

import logging
from bisect import bisect_left
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase

from prefopt.errors import UserError
from prefopt.rankings.checks import half_a_character, shorten, validate_comparisons
from prefopt.rankings.dataset import prepare_comparisons
from prefopt.rankings.formats import needs_conversion
from prefopt.rankings.prompts import PARTS, columns_of, unread_parts
from prefopt.recipes.common.arguments import ComparisonArguments, DataArguments, PretrainingArguments
from prefopt.recipes.common.conversations import is_message
from prefopt.recipes.common.errors import explain
from prefopt.recipes.common.sources import load_source, rows_of_jsonl
from prefopt.trainers.dpo.config import RankedDPOConfig
from prefopt.trainers.ranked.options import check_stream_options
from prefopt.trainers.reward.config import RankedRewardConfig

logger = logging.getLogger(__name__)

Rows = Dataset | list[dict]
Check = Callable[[Rows, str], None]
Convert = Callable[[Rows, str], Rows]

# Of a stream: checked before any model is loaded, the others as they come.
FIRST_ROWS = 100
# Rows of a stream that are shuffled among each other.
SHUFFLE_BUFFER = 1000


def load_rows(
    name: str | None,
    *,
    key: str,
    check: Check,
    split: str = "train",
    config: str | None = None,
    convert: Convert | None = None,
    stream: bool = False,
) -> Dataset:
    """Load the rows called `name` (a file, a folder written by `save_to_disk`, or a Hub dataset) and check them.

    `key` is the argument the name came from, so that an error can say which one to change. `check(rows, source)`
    raises ValueError; it sees the rows of a .jsonl file as written, before Arrow gives each column one type. Before it,
    `convert(rows, source)` may bring them into the format of the step (`prefopt.recipes.common.conversations`). With `stream`
    no more is downloaded than the rows of this split.
    """
    rows = _load(name, key, split, config, stream)
    if isinstance(rows, IterableDataset):
        try:
            rows = list(rows)
        except ValueError as error:
            raise UserError(error) from error
    rows = rows if convert is None else convert(rows, str(name))
    check(rows, str(name))
    # Of comparisons `prepare_comparisons` says it.
    if check is not check_comparisons and (unread := unread_parts(columns_of(rows, PARTS))):
        logger.warning("%s: %s", name, unread)
    return rows if isinstance(rows, Dataset) else _as_dataset(rows, str(name))


def stream_rows(
    name: str | None,
    *,
    key: str,
    check: Check,
    split: str = "train",
    config: str | None = None,
    convert: Convert | None = None,
) -> IterableDataset:
    """The rows that `load_rows` loads, read while they are needed. `FIRST_ROWS` are checked now, all as they come."""
    rows, source = _load(name, key, split, config, stream=True), str(name)
    try:
        first = list(rows.take(FIRST_ROWS))
        check(first if convert is None else convert(first, source), source)
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(error) from error

    def checked(row: Mapping[str, Any], number: int) -> Mapping[str, Any]:
        try:
            one = [row] if convert is None else convert([row], source)
            check(one, source)
        # The check saw a list of one row.
        except UserError as error:
            raise UserError(str(error).replace(f"{source} row 0:", f"{source} row {number}:", 1)) from error
        return one[0]

    return rows.map(checked, with_indices=True)


def _as_dataset(rows: list[dict], source: str) -> Dataset:
    """One column per field of any row: `Dataset.from_list` would forget the fields that row 0 lacks."""
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(k for row in rows for k in row)}
    for name, values in columns.items():
        if error := _arrow_error(values):
            for number, value in enumerate(values):
                if problem := half_a_character(name, value) or _arrow_problem(name, value):
                    raise UserError(f"{source} row {number}: {problem}") from error
            rows_so_far = range(1, len(values) + 1)
            first = bisect_left(rows_so_far, True, key=lambda n: _arrow_error(values[:n]) is not None)
            raise UserError(
                f"{source} row {first}: field {name!r} has values of different types ({error}); write them alike in all rows, "
                "or leave the field out"
            ) from error
    return Dataset.from_dict(columns)


def _arrow_error(values: list) -> Exception | None:
    """What keeps values from being a column."""
    try:
        pyarrow.array(values)
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
        return error
    return None


def _arrow_problem(name: str, value: Any) -> str | None:
    """What keeps a value from standing in a column, whatever stands in the others."""
    if error := _arrow_error([value]):
        return f"field {name!r}: no column can hold {shorten(value)} ({error}); write it as a text, or leave the field out"
    return None


def _load(name: str | None, key: str, split: str, config: str | None, stream: bool = False) -> Rows | IterableDataset:
    if not name:
        raise UserError(f"{key} is required: a .jsonl, .json, .csv or .parquet file, a folder or a Hub id")
    if name.endswith((".jsonl", ".jsonl.gz")) and Path(name).is_file():
        if stream:
            return IterableDataset.from_generator(rows_of_jsonl, gen_kwargs={"name": name, "split": split})
        try:
            return list(rows_of_jsonl(name, split))
        except (OSError, ValueError) as error:
            raise UserError(f"{key}: cannot load {name!r}: {explain(error) or error}") from error
    rows = load_source(name, key, split, config, streaming=stream)
    return rows.to_iterable_dataset() if stream and isinstance(rows, Dataset) else rows


def load_train_and_eval(
    data: DataArguments, wants_eval: bool, check: Check, convert: Convert | None = None
) -> tuple[Dataset, Dataset | None]:
    """The training rows and, if evaluation is on, the evaluation rows."""
    how: dict[str, Any] = {"check": check, "convert": convert}
    named: dict[str, Any] = {"config": data.dataset_config, "key": "dataset_name", **how}
    train = load_rows(data.dataset_name, split=data.dataset_train_split, **named)
    return train, load_evaluation(data, wants_eval, **how)


def load_evaluation(data: DataArguments, wants_eval: bool, **how: Any) -> Dataset | None:
    """The evaluation rows, if evaluation is on."""
    if not wants_eval:
        if data.eval_dataset_name:
            raise UserError("eval_dataset_name is given but eval_strategy is 'no': set it to 'epoch' or 'steps'")
        return None
    # All rows of what has no splits.
    how["split"] = evaluation_split(data) or "train"
    if data.eval_dataset_name:
        return load_rows(data.eval_dataset_name, key="eval_dataset_name", **how)
    if Path(data.dataset_name).is_file():
        raise UserError("eval_strategy is on: set eval_dataset_name (a file has no test split)")
    return load_rows(data.dataset_name, config=data.dataset_config, key="dataset_name", **how)


def evaluation_split(data: DataArguments) -> str | None:
    """The split that evaluation rows are of; None, by default, of an `eval_dataset_name` that has no splits."""
    place = Path(data.eval_dataset_name) if data.eval_dataset_name else None
    has_none = place is not None and place.exists() and not (place / "dataset_dict.json").is_file()
    return None if has_none and data.dataset_test_split == "test" else data.dataset_test_split


def load_comparisons(
    data: ComparisonArguments, args: RankedRewardConfig | RankedDPOConfig
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """Ranked rows for training and, if evaluation is on, for evaluation, checked for what the trainer will ask."""
    wants_eval = args.eval_strategy != "no"
    how: dict[str, Any] = {"check": check_comparisons}
    options = {"ties": args.ties, "margins": args.margin_coef > 0}
    if data.dataset_streaming:
        check_stream_options(args)
        place = {"split": data.dataset_train_split, "config": data.dataset_config}
        train = stream_rows(data.dataset_name, key="dataset_name", **place, **how)
        if args.train_sampling_strategy == "random":
            train = train.shuffle(seed=args.seed, buffer_size=SHUFFLE_BUFFER)
        evaluation = load_evaluation(data, wants_eval, stream=True, **how)
    else:
        train, evaluation = load_train_and_eval(data, wants_eval, **how)
        train = prepare_comparisons(train, source=data.dataset_name, **options)
    if evaluation is not None:
        source = data.eval_dataset_name or data.dataset_name
        evaluation = prepare_comparisons(evaluation, source=source, **options)
    return train, evaluation


def load_pretraining(name: str, streaming: bool) -> Dataset | IterableDataset:
    """Pretraining text, rows {"text"}, of `pretrain_dataset_name`."""
    load = stream_rows if streaming else load_rows
    return load(name, check=check_fields("text"), key="pretrain_dataset_name")


def load_pretraining_term(data: PretrainingArguments, ptx_coef: float) -> Dataset | IterableDataset | None:
    """The text of a loss with `ptx_coef`; None without."""
    if (ptx_coef > 0) != (data.pretrain_dataset_name is not None):
        raise UserError("ptx_coef > 0 needs pretrain_dataset_name, and ptx_coef 0 (no pretraining term) takes none")
    return load_pretraining(data.pretrain_dataset_name, data.pretrain_streaming) if ptx_coef > 0 else None


def check_comparisons(rows: Rows, source: str) -> None:
    """`validate_comparisons`, which of rows in a public format says what converts them."""
    first = rows[0] if len(rows) else None
    name = needs_conversion(first) if isinstance(first, Mapping) else None
    remedy = f"these are rows in the format {name}: `prefopt data convert {source} --out rankings.jsonl` reads it"
    if name == "hh-rlhf":
        raise UserError(f"{source}: expected dialogues as messages, got texts; {remedy}")
    try:
        validate_comparisons(rows, source)
    except UserError as error:
        if name:
            raise UserError(f"{error}; {remedy}") from error
        raise


def check_fields(*names: str) -> Check:
    """A check that every row has the given fields, each a text or a list of chat messages, one kind throughout."""

    def check(rows: Rows, source: str) -> None:
        if isinstance(rows, Dataset):
            missing = [name for name in names if name not in rows.column_names]
            if missing:
                raise UserError(f"{source}: missing field {missing[0]!r}; the rows have {rows.column_names}")
            rows = rows.select_columns(list(names))
        if len(rows) == 0:
            raise UserError(f"{source}: no rows")
        kinds: dict[str, type] = {}
        for number, row in enumerate(rows):
            for name in names:
                value = row.get(name)
                is_chat = isinstance(value, list) and name != "text" and all(map(is_message, value))
                if not value or not (isinstance(value, str) or is_chat):
                    expected = "a text" if name == "text" else "a text or messages with 'role' and 'content'"
                    actual = repr(value)[:80] if name in row else "nothing"
                    raise UserError(f"{source} row {number}: field {name!r}: expected {expected}, got {actual}")
                if problem := half_a_character(name, value):
                    raise UserError(f"{source} row {number}: {problem}")
                if type(value) is not kinds.setdefault(name, type(value)):
                    raise UserError(
                        f"{source} row {number}: field {name!r}: text in some rows and messages in others; "
                        "train on them separately"
                    )

    return check


def require_chat_template(tokenizer: PreTrainedTokenizerBase, *datasets: Dataset | IterableDataset | None) -> None:
    """Chat rows need a tokenizer that can render them."""
    for rows in datasets:
        if rows is None:
            continue
        first = next(iter(rows))
        is_chat = isinstance(first["prompt"], list) if "prompt" in first else "messages" in first
        if is_chat and tokenizer.chat_template is None:
            raise UserError(
                "the rows are chat messages, but the tokenizer has no chat template; use the tokenizer of a chat "
                "model, give `prefopt sft` one as chat_template_path, which the later steps find beside the model, or "
                "give prompts as plain text"
            )
