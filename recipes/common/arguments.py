"""Strict arguments for every recipe: YAML and command line, where an unknown key is an error."""

import difflib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from prefopt.recipes.common.errors import UserError, explain


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


@dataclass
class ComparisonArguments(DataArguments):
    """Where ranked rows come from, which can be read while training."""

    dataset_streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the training rows as they are needed, in shuffled order unless train_sampling_strategy is "
            "'sequential'; needs max_steps."
        },
    )


def parse(
    dataclass_types: Sequence[type], argv: list[str] | None, prog: str, description: str | None = None
) -> tuple[Any, ...]:
    """Parse `--config file.yaml --key value ...`; a key that no dataclass knows is an error.

    Keys given on the command line win over the file. A chat template that the file names may lie beside it. `--help`
    shows `description`, prefopt's own keys and the usual ones of TRL and transformers, `--help-all` all of them.
    """
    argv = [part for argument in (sys.argv[1:] if argv is None else argv) for part in _split_config(argument)]
    argv = [_with_underscores(argument) for argument in argv]
    known = {f.name for dataclass_type in dataclass_types for f in fields(dataclass_type) if f.init}
    if "--config" in argv:
        position = argv.index("--config") + 1
        if position == len(argv):
            raise UserError("--config needs a YAML file")
        keys = _read_config(argv[position])
        _refuse_unknown(set(keys) - {"env"}, known, argv[position])
        beside = Path(argv[position]).parent / str(keys.get("chat_template_path"))
        if beside.is_file() and not any(argument.startswith("--chat_template_path") for argument in argv):
            argv += ["--chat_template_path", str(beside)]
    options = {argument[2:].partition("=")[0] for argument in argv if argument.startswith("--")}
    options -= {"config", "help", "help_all"}
    _refuse_unknown(options, known | {f"no_{name}" for name in known}, "the command line")

    from prefopt.recipes.common.step_parser import StepParser  # a misspelt key is told before TRL is loaded

    show_all = "--help_all" in argv
    parser = StepParser(dataclass_types, prog, description, show_all)
    if show_all:
        parser.print_help()
        raise SystemExit(0)
    try:
        with warnings.catch_warnings():
            # TRL's own default is spelt the way that transformers warns of.
            warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated")
            parsed = parser.parse_args_and_config(argv)
    except (ValueError, TypeError) as error:
        raise UserError(explain(error) or error) from error
    for arguments in parsed:
        if hasattr(arguments, "report_to"):
            from prefopt.recipes.common.preflight import (
                check_reporting,  # loads torch, which few commands need
            )

            check_reporting(arguments.report_to)
    return parsed


def _with_underscores(argument: str) -> str:
    """--max-steps=3 -> --max_steps=3; values stay what they are."""
    if not argument.startswith("--"):
        return argument
    key, *value = argument[2:].split("=", 1)
    return "--" + "=".join([key.replace("-", "_"), *value])


def named(argv: Sequence[str], name: str) -> list[str]:
    """The arguments before the first option as values of `--name`.

    >>> named(["a.jsonl", "b.jsonl", "--out", "c.jsonl"], "answers")
    ['--answers', 'a.jsonl', 'b.jsonl', '--out', 'c.jsonl']
    """
    first = next((i for i, argument in enumerate(argv) if argument.startswith("-")), len(argv))
    return [*([f"--{name}", *argv[:first]] if first else []), *argv[first:]]


def config_folder(argv: list[str] | None) -> Path | None:
    """The folder of the `--config` file, where the other files of a recipe are.

    >>> config_folder(["--config", "tiny/pipeline.yaml", "--seed", "1"]).name
    'tiny'
    """
    argv = [part for argument in (sys.argv[1:] if argv is None else argv) for part in _split_config(argument)]
    return Path(argv[argv.index("--config") + 1]).parent if "--config" in argv[:-1] else None


def _split_config(argument: str) -> list[str]:
    return ["--config", argument[9:]] if argument.startswith("--config=") else [argument]


def _read_config(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise UserError(f"config file {path!r} does not exist")
    try:
        keys = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(keys, dict) or not all(isinstance(key, str) for key in keys):
        raise UserError(f"{path}: expected lines `key: value` whose keys are words")
    for key, value in keys.items():
        if value is None:
            raise UserError(f"{path}: key {key!r} has no value; give one or delete the line")
    return keys


def _refuse_unknown(keys: set[str], known: set[str], where: str) -> None:
    """Before anything is built from the keys, because a misspelt one may be the cause of another error."""
    hints = []
    for key in sorted(keys - known):
        near = difflib.get_close_matches(key, known, n=1)
        hints.append(repr(key) + (f" (did you mean {near[0]!r}?)" if near else ""))
    if hints:
        raise UserError(f"unknown key in {where}: {', '.join(hints)}")
