"""What every recipe shares: strict arguments, data loading with early errors, and model loading."""

import difflib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
import transformers
import yaml
from datasets import Dataset, load_dataset, load_from_disk
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from prefopt.evaluation.generate import read_jsonl

logger = logging.getLogger(__name__)

Rows = Dataset | list[dict]

_FILE_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class DataArguments:
    """Where the rows come from. A name is a file (.jsonl, .json, .csv, .parquet), a folder or a Hub id."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Training rows: file, folder or Hub id."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split used for training."})
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Evaluation rows; default: `dataset_test_split` of the training data."},
    )
    dataset_test_split: str = field(default="test", metadata={"help": "Split used for evaluation."})


class UserError(SystemExit):
    """A mistake in the input, reported as one line without a traceback."""

    def __init__(self, message: object) -> None:
        super().__init__(f"error: {message}")


def parse(dataclass_types: Sequence[type], argv: list[str] | None, prog: str) -> tuple[Any, ...]:
    """Parse `--config file.yaml --key value ...`; a key that no dataclass knows is an error.

    Keys given on the command line win over the file.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    known = {f.name for dataclass_type in dataclass_types for f in fields(dataclass_type) if f.init}
    if "--config" in argv[:-1]:
        config = Path(argv[argv.index("--config") + 1])
        if not config.is_file():
            raise UserError(f"config file {str(config)!r} does not exist")
        keys = yaml.safe_load(config.read_text(encoding="utf-8"))
        if not isinstance(keys, dict):
            raise UserError(f"{config}: expected `key: value` lines, got {type(keys).__name__}")
        _refuse_unknown(set(keys) - known - {"env"}, known, str(config))
    options = {argument[2:].partition("=")[0] for argument in argv if argument.startswith("--")}
    _refuse_unknown(
        {key for key in options if key.replace("-", "_") not in known} - {"config", "help"},
        known | {f"no_{name}" for name in known},
        "the command line",
    )
    try:
        return TrlParser(dataclass_types, prog=prog, allow_abbrev=False).parse_args_and_config(argv)
    except (ValueError, TypeError) as error:
        raise UserError(error) from error


def _refuse_unknown(unknown: set[str], known: set[str], where: str) -> None:
    """Before anything is built from the keys, because a misspelt one may be the cause of another error."""
    hints = []
    for key in sorted(unknown - known):
        near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
        hints.append(repr(key) + (f" (did you mean {near[0]!r}?)" if near else ""))
    if hints:
        raise UserError(f"unknown key in {where}: {', '.join(hints)}")


def load_rows(
    name: str | None,
    *,
    key: str,
    check: Callable[[Rows, str], None],
    split: str = "train",
    config: str | None = None,
) -> Dataset:
    """Load the rows called `name` (a file, a folder written by `save_to_disk`, or a Hub dataset) and check them.

    `key` is the argument the name came from, so that an error can say which one to change. `check(rows, source)`
    raises ValueError; it sees the rows of a .jsonl file as written, before Arrow gives each column one type.
    """
    rows = _load(name, key, split, config)
    try:
        check(rows, str(name))
        return rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    except ValueError as error:
        raise UserError(error) from error


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
    data: DataArguments, wants_eval: bool, check: Callable[[Rows, str], None]
) -> tuple[Dataset, Dataset | None]:
    """The training rows and, if evaluation is on, the evaluation rows."""
    named = {"config": data.dataset_config, "check": check, "key": "dataset_name"}
    train = load_rows(data.dataset_name, split=data.dataset_train_split, **named)
    if not wants_eval:
        return train, None
    if data.eval_dataset_name:
        return train, load_rows(
            data.eval_dataset_name, split=data.dataset_test_split, check=check, key="eval_dataset_name"
        )
    if Path(data.dataset_name).is_file():
        raise UserError("eval_strategy is on: set eval_dataset_name (a file has no test split)")
    return train, load_rows(data.dataset_name, split=data.dataset_test_split, **named)


def check_fields(*fields: str) -> Callable[[Rows, str], None]:
    """A check that every row has the given fields and that none of them is empty."""

    def check(rows: Rows, source: str) -> None:
        if isinstance(rows, Dataset):
            missing = [name for name in fields if name not in rows.column_names]
            if missing:
                raise ValueError(f"{source}: missing field {missing[0]!r}; the rows have {rows.column_names}")
            rows = rows.select_columns(list(fields))
        if len(rows) == 0:
            raise ValueError(f"{source}: no rows")
        for number, row in enumerate(rows):
            for name in fields:
                if not row.get(name):
                    found = repr(row[name]) if name in row else "nothing"
                    raise ValueError(
                        f"{source} row {number}: field {name!r}: expected text or messages, got {found}"
                    )

    return check


def model_init_kwargs(model_args: ModelConfig) -> dict[str, Any]:
    """`from_pretrained` arguments of a `ModelConfig`, as TRL's own scripts build them."""
    if not model_args.model_name_or_path:
        raise UserError("model_name_or_path is required: a local folder or a Hub id")
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }


def load_tokenizer(model_args: ModelConfig) -> transformers.PreTrainedTokenizerBase:
    """The model's tokenizer; a missing padding token is replaced by EOS, as TRL does."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(model_args: ModelConfig, init_kwargs: dict[str, Any]) -> str | PeftModel:
    """The policy to train: a path for the trainer to load, or the trained LoRA adapter, to be trained further.

    Continuing an adapter makes its starting point the KL reference, which is what SFT with LoRA leaves behind.
    """
    path = model_args.model_name_or_path
    if not (Path(path) / "adapter_config.json").is_file():
        return path
    if model_args.use_peft:
        raise UserError(
            f"{path} is a LoRA adapter and will be trained further: leave use_peft unset, or merge it first"
        )
    return AutoPeftModelForCausalLM.from_pretrained(
        path, is_trainable=True, quantization_config=get_quantization_config(model_args), **init_kwargs
    )


def peft_config(
    model_args: ModelConfig, task_type: str, modules_to_save: Sequence[str] = ()
) -> PeftConfig | None:
    """TRL's LoRA configuration for this task, or None without `use_peft`."""
    model_args.lora_task_type = task_type
    config = get_peft_config(model_args)
    if config is not None and modules_to_save:
        config.modules_to_save = sorted({*(config.modules_to_save or ()), *modules_to_save})
    return config
