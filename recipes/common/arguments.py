"""Strict arguments for every command: YAML and command line, where an unknown key is an error, and a help that is short."""

import argparse
import copy
import difflib
import inspect
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from itertools import pairwise, takewhile
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from prefopt.errors import UserError
from prefopt.recipes.common.errors import collecting, explain, raise_all

# Of the hundreds of keys that steps inherit, those that people set.
USUAL = """
    output_dir num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps
    generation_batch_size num_iterations learning_rate lr_scheduler_type warmup_steps max_grad_norm max_length
    max_completion_length temperature packing beta loss_type bf16 gradient_checkpointing use_vllm vllm_mode
    logging_steps eval_strategy eval_steps per_device_eval_batch_size save_strategy save_steps save_total_limit
    resume_from_checkpoint report_to push_to_hub hub_model_id seed use_cpu
    model_name_or_path model_revision dtype attn_implementation use_peft lora_r lora_alpha lora_dropout
    lora_target_modules load_in_4bit load_in_8bit
"""
KINDS = {"str": "TEXT", "int": "N", "float": "X", "string_to_bool": "true|false"}
# What these keys do in prefopt's steps, where the inherited help says something else.
HELP = {
    "bf16": "Mixed precision in bf16; unset: where the hardware has it.",
    "resume_from_checkpoint": "true: go on from the newest complete checkpoint of output_dir; or a checkpoint's folder.",
}
# Keys in configs of TRL's scripts and of alignment-handbook that no spelling leads to from here.
RENAMED = {"torch_dtype": "dtype"}
NOT_TAKEN = {
    "dataset_mixture": "mixtures of data sets are not taken: write their rows into one file and name it in `dataset_name`",
    "max_prompt_length": "prompts are not cut; rows that are too long are left out, with a count",
}
MODEL, STEP, TRAINING, MORE = "model", "settings of this step", "training", "more of TRL and transformers"


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """A key of a command with its default, which a function makes anew for each use, and its text in the help."""
    kind = "default_factory" if callable(default) else "default"
    return field(**{kind: default}, metadata={"help": help, **metadata})


@dataclass
class DataArguments:
    """Where the rows come from. A name is a file (.jsonl, .json, .csv, .parquet), a folder or a Hub id."""

    dataset_name: str | None = setting(None, "Training rows: file, folder or Hub id.")
    dataset_config: str | None = setting(None, "Configuration of a Hub dataset.")
    dataset_train_split: str = setting("train", "Split used for training.")
    eval_dataset_name: str | None = setting(
        None, "Evaluation rows; default: `dataset_test_split` of the training data."
    )
    dataset_test_split: str = setting("test", "Split used for evaluation.")


@dataclass
class ComparisonArguments(DataArguments):
    """Where ranked rows come from, which can be read while training."""

    dataset_streaming: bool = setting(
        False,
        "Read the training rows as they are needed, in shuffled order unless train_sampling_strategy is "
        "'sequential'; needs max_steps.",
    )


@dataclass
class PretrainingArguments:
    """Where the text of the pretraining term comes from."""

    pretrain_dataset_name: str | None = setting(None, 'Pretraining text, rows {"text"}; needed if ptx_coef > 0.')
    pretrain_streaming: bool = setting(False, "Read the pretraining text as it is needed, from a Hub id or a file.")


# ---- keys and values --------------------------------------------------------------------------------------------
def parse(
    dataclass_types: Sequence[type],
    argv: list[str] | None,
    prog: str,
    description: str | None = None,
    positional: Sequence[str] = (),
) -> tuple[Any, ...]:
    """Parse `--config file.yaml --key value ...`; a key that no dataclass knows is an error.

    Keys given on the command line win over the file. A chat template that the file names may lie next to it. The
    arguments before the first option are values of the keys `positional`, one each; a last key that is a list takes
    all the others. `--help` shows `description`, prefopt's own keys and the usual ones of TRL and transformers,
    `--help-all` all of them.
    """
    known = {f.name: f for dataclass_type in dataclass_types for f in fields(dataclass_type) if f.init}
    argv = _split_config(argv)
    argv = _named(argv, positional, {name for name, f in known.items() if f.default_factory is list})
    argv = [_with_underscores(argument) for argument in argv]
    mistakes: list[str] = []
    keys: dict[str, Any] = {}
    if "--config" in argv:
        position = argv.index("--config") + 1
        if position == len(argv):
            raise UserError("--config needs a YAML file")
        keys = read_config(argv[position])
        mistakes += _unknown(set(keys) - {"env"}, set(known), argv[position], dataclass_types)
        mistakes += _of_another_type(keys, dataclass_types, argv[position])
        template = Path(argv[position]).parent / str(keys.get("chat_template_path"))
        if template.is_file() and not any(argument.startswith("--chat_template_path") for argument in argv):
            argv += ["--chat_template_path", str(template)]
    options = {argument[2:].partition("=")[0] for argument in argv if argument.startswith("--")}
    options -= {"config", "help", "help_all"}
    negated = {f"no_{name}" for name in known}
    mistakes += _unknown(options, {*known, *negated}, "the command line", dataclass_types)
    raise_all(mistakes)

    # Not above: a misspelt key is answered before TRL is loaded, which takes seconds.
    from trl import TrlParser

    parser = TrlParser(dataclass_types, prog=prog, usage=_usage(prog), allow_abbrev=False)
    # argparse looks at those of the command line.
    raise_all([f"{argv[position]}: {mistake}" for mistake in _not_chosen(keys, parser._actions)])
    if not {"-h", "--help", "--help_all"}.isdisjoint(argv):
        print(_help(parser, description, show_all="--help_all" in argv), end="")
        raise SystemExit(0)
    try:
        with warnings.catch_warnings():
            # TRL's own default is spelt the way that transformers warns of.
            warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated")
            parsed = parser.parse_args_and_config(argv)
    except json.JSONDecodeError as error:
        raise UserError(f"{_key_of(error.doc, argv, keys)}: not valid JSON ({error})") from error
    except (ValueError, TypeError) as error:
        raise UserError(explain(error) or error) from error
    mistakes = [mistake for arguments in parsed for mistake in _out_of_range(arguments)]
    for arguments in parsed:
        if hasattr(arguments, "report_to"):
            # Loads torch, which few commands need.
            from prefopt.recipes.common.preflight import check_reporting

            with collecting(mistakes):
                check_reporting(arguments.report_to)
        if hasattr(arguments, "lora_r"):
            from prefopt.trainers.shared.ranges import LORA, check_ranges

            with collecting(mistakes):
                check_ranges(arguments, LORA)
    raise_all(mistakes)
    return parsed


# What a value in YAML is called.
TYPES = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "`name: value` pairs",
}


def _of_another_type(keys: Mapping[str, Any], dataclass_types: Sequence[type], path: str) -> Iterator[str]:
    """A text may stand for anything, as it does on the command line; YAML's other types are what they are."""
    hints = {name: hint for kind in dataclass_types for name, hint in get_type_hints(kind).items()}
    for name, value in keys.items():
        allowed = _types(hints.get(name, Any))
        if name == "resume_from_checkpoint":
            # true means the newest checkpoint.
            allowed.add(bool)
        if not allowed or isinstance(value, str):
            continue
        kinds = {int, float} if isinstance(value, int) and not isinstance(value, bool) else {type(value)}
        if not kinds & allowed:
            expected = " or ".join(text for kind, text in TYPES.items() if kind in allowed)
            quotes = "; put it in quotes" if str in allowed and not isinstance(value, list | dict) else ""
            yield f"{path}: {name} is {value!r:.80}; expected {expected}{quotes}"


def _not_chosen(keys: Mapping[str, Any], actions: Sequence[argparse.Action]) -> Iterator[str]:
    """Of the keys whose values are a fixed set, those of a YAML file with another value."""
    for action in actions:
        value = keys.get(action.dest)
        if action.choices is None or value is None or action.nargs == 0:
            continue
        for one in value if isinstance(value, list) else [value]:
            if str(one) not in map(str, action.choices):
                yield f"{action.dest} is {one!r}; expected one of {', '.join(map(str, action.choices))}"


def _key_of(text: str, argv: Sequence[str], keys: Mapping[str, Any]) -> str:
    """The key with this text as its value, of the command line or of the file."""
    after = {argument[2:]: value for argument, value in pairwise(argv)}
    after |= dict(argument[2:].split("=", 1) for argument in argv if "=" in argument)
    return next((key for key, value in {**keys, **after}.items() if value == text), text)


def _types(hint: Any) -> set[type]:
    """The types of YAML that a key's annotation allows; none where it allows what is not known here."""
    if get_origin(hint) is Literal:
        return {type(value) for value in get_args(hint)}
    if get_origin(hint) in (Union, UnionType):
        members = [_types(member) for member in get_args(hint) if member is not NoneType]
        return set().union(*members) if all(members) else set()
    kind = get_origin(hint) or hint
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {str}
    return {kind} & set(TYPES) if isinstance(kind, type) else set()


def _out_of_range(arguments: Any) -> Iterator[str]:
    """Of a command's own numbers, those that are not finite or below what `LEAST` of their dataclass says."""
    # Trainers check theirs, some of which may be infinite.
    if hasattr(arguments, "output_dir") and hasattr(arguments, "learning_rate"):
        return
    for key in fields(arguments):
        value, least = getattr(arguments, key.name), getattr(arguments, "LEAST", {}).get(key.name)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                yield f"{key.name} is {number}; expected a finite number"
            elif least is not None and isinstance(number, int | float) and number < least:
                yield f"{key.name} is {number}; expected at least {least}"


def config_folder(argv: list[str] | None) -> Path | None:
    """The folder of the `--config` file, where the other files of a recipe are.

    >>> config_folder(["--config", "tiny/pipeline.yaml", "--seed", "1"]).name
    'tiny'
    """
    argv = _split_config(argv)
    return Path(argv[argv.index("--config") + 1]).parent if "--config" in argv[:-1] else None


def _split_config(argv: list[str] | None) -> list[str]:
    """TrlParser knows `--config FILE` only, not `--config=FILE`."""
    argv = sys.argv[1:] if argv is None else argv
    return [
        part
        for argument in argv
        for part in (["--config", argument[9:]] if argument.startswith("--config=") else [argument])
    ]


def _named(argv: Sequence[str], names: Sequence[str], lists: set[str]) -> list[str]:
    """The arguments before the first option as values of the keys `names`.

    >>> _named(["rm", "me/rm", "--merge", "true"], ["folder", "repo_id"], set())
    ['--folder', 'rm', '--repo_id', 'me/rm', '--merge', 'true']
    >>> _named(["a.jsonl", "b.jsonl", "--out", "c.jsonl"], ["answers"], {"answers"})
    ['--answers', 'a.jsonl', 'b.jsonl', '--out', 'c.jsonl']
    """
    values = list(takewhile(lambda argument: not argument.startswith("-"), argv))
    rest, options = values, []
    for name in names:
        values_of_it, rest = (rest, []) if name in lists else (rest[:1], rest[1:])
        options += [f"--{name}", *values_of_it] if values_of_it else []
    if rest:
        raise UserError(f"too many arguments: {' '.join(rest)}; options begin with --")
    return [*options, *argv[len(values) :]]


def _with_underscores(argument: str) -> str:
    """--max-steps=3 -> --max_steps=3; values stay what they are."""
    if not argument.startswith("--"):
        return argument
    key, *value = argument[2:].split("=", 1)
    return "--" + "=".join([key.replace("-", "_"), *value])


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error: the first of the two would be forgotten."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_config(path: str) -> dict[str, Any]:
    """The keys of a YAML file, each with a value."""
    if not Path(path).is_file():
        raise UserError(f"config file {path!r} does not exist")
    try:
        keys = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be read") from None
    if not isinstance(keys, dict) or not all(isinstance(key, str) for key in keys):
        raise UserError(f"{path}: expected lines `key: value` whose keys are words")
    empty = ", ".join(repr(key) for key, value in keys.items() if value is None)
    if empty:
        raise UserError(f"{path}: key {empty} has no value; give one or delete the line")
    return keys


def _unknown(keys: set[str], known: set[str], where: str, dataclass_types: Sequence[type]) -> list[str]:
    """Asked before anything is built from the keys, because a misspelt one may be the cause of another error."""
    elsewhere = dict(NOT_TAKEN)
    for dataclass_type in dataclass_types:
        elsewhere |= getattr(sys.modules[dataclass_type.__module__], "ELSEWHERE", {})
    hints = []
    for key in sorted(keys - known):
        near = [RENAMED[key]] if RENAMED.get(key) in known else difflib.get_close_matches(key, known, n=1)
        hint = f" ({elsewhere[key]})" if key in elsewhere else f" (did you mean {near[0]!r}?)" if near else ""
        hints.append(repr(key) + hint)
    return [f"unknown key in {where}: {', '.join(hints)}"] if hints else []


# ---- commands of a command --------------------------------------------------------------------------------------
def dispatch(prog: str, commands: Mapping[str, Callable[..., None]], argv: list[str] | None, values: str) -> None:
    """Run the command that the first argument names, with the others; `values` stands for those in the usage.

    A command is a function of dataclasses of keys, the first of which is that of the arguments before the first option.
    Its docstring is its line in the help.
    """
    usage = f"{prog} <command> {values}"
    name, rest = choose("command", {name: str(run.__doc__).rstrip(".") for name, run in commands.items()}, argv, usage)
    run = commands[name]
    kinds = [kind for argument, kind in get_type_hints(run).items() if argument != "return"]
    try:
        run(*parse(kinds, rest, f"{prog} {name}", positional=(fields(kinds[0])[0].name,)))
    except FileNotFoundError as error:
        raise UserError(f"there is no file {error.filename}") from error
    except OSError as error:
        raise UserError(explain(error) or error) from error


def choose(kind: str, texts: Mapping[str, str], argv: list[str] | None, usage: str) -> tuple[str, list[str]]:
    """The first argument, which is one of the names of `texts`, and the others; `--help` shows name and text of each."""
    argv = sys.argv[1:] if argv is None else argv
    width = max(map(len, texts)) + 2
    shown = "\n".join([usage, *(f"  {name:<{width}}{text}" for name, text in texts.items())])
    if argv and argv[0] in ("-h", "--help"):
        print(shown)
        raise SystemExit(0)
    if not argv or argv[0] not in texts:
        raise UserError(f"expected a {kind}{f', got {argv[0]!r}' if argv else ''}: {shown}")
    return argv[0], argv[1:]


# ---- help -------------------------------------------------------------------------------------------------------
def _usage(prog: str) -> str:
    return f"{prog} [--config step.yaml] [--key value ...]"


def _help(parser: Any, description: str | None, show_all: bool) -> str:
    """The keys of a TrlParser in groups, each in one spelling; without `show_all` prefopt's own and the usual ones."""
    titles = {f.name: _title(kind, f.name) for kind in parser.dataclass_types for f in fields(kind)}
    own = [title for title in dict.fromkeys(titles.values()) if title not in (MODEL, STEP, TRAINING, MORE)]
    groups: dict[str, list[argparse.Action]] = {name: [] for name in (*own, MODEL, STEP, TRAINING, MORE)}
    hidden = 0
    for action in parser._actions[1:]:
        # `--no_KEY` stores false without a value.
        is_negation, title = action.nargs == 0, titles[action.dest]
        if show_all or not (is_negation or title == MORE):
            groups[title].append(_shown(action, title, is_negation, show_all))
        elif not is_negation:
            hidden += 1
    formatter = argparse.RawDescriptionHelpFormatter(parser.prog, max_help_position=34)
    formatter.add_usage(_usage(parser.prog), [], [])
    formatter.add_text(description)
    for title, actions in {"options": parser._actions[:1], **groups}.items():
        formatter.start_section(title)
        formatter.add_arguments(actions)
        formatter.end_section()
    if hidden:
        formatter.add_text(f"{hidden} more keys of TRL and transformers: {parser.prog} --help-all")
    return formatter.format_help()


def _shown(action: argparse.Action, title: str, is_negation: bool, show_all: bool) -> argparse.Action:
    """A key as the help shows it: in one spelling, with the kind of its value, its text and its default."""
    action = copy.copy(action)
    action.option_strings = action.option_strings[:1]
    if not is_negation and action.choices is None:
        action.metavar = KINDS.get(getattr(action.type, "__name__", ""), "VALUE")
    elif len(action.choices or ()) > 5 and not show_all:
        action.metavar = "NAME"
    text = HELP.get(action.dest, action.help or "")
    if title in (MODEL, TRAINING) and not show_all:
        text = re.split(r"(?<=\.) ", text)[0]
    shows_default = not is_negation and action.default not in (None, "", [], {}) and "default" not in text
    action.help = f"{text} [%(default)s]" if shows_default else text
    return action


def _title(dataclass_type: type, key: str) -> str:
    """The group of a key; MORE for one that the short help leaves out."""
    module = sys.modules[dataclass_type.__module__]
    if key in getattr(module, "REFUSED", ()) or key in getattr(module, "FIXED", ()):
        return MORE
    # By name: importing transformers' own takes seconds that `prefopt data` does without.
    trains = any(c.__name__ == "TrainingArguments" for c in dataclass_type.__mro__)
    owner = next(c for c in dataclass_type.__mro__ if key in inspect.get_annotations(c))
    if owner.__module__.startswith("prefopt."):
        return STEP if trains else (dataclass_type.__doc__ or "").strip().splitlines()[0].rstrip(".")
    if key not in USUAL.split():
        return MORE
    return TRAINING if trains else MODEL
