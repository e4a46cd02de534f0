"""What numbers the options of a training step may be; transformers and TRL check few of theirs before the first step."""

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from torch.utils.checkpoint import checkpoint
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from prefopt.errors import UserError


class Range(NamedTuple):
    """A range of finite numbers.

    Args:
        least: the smallest; with `is_open` only what is above it.
        most: the largest.
        is_whole: whole numbers only.
        also: values outside it that have a meaning.
    """

    least: float = 0
    is_open: bool = False
    most: float = math.inf
    is_whole: bool = False
    also: tuple[Any, ...] = ()

    def __contains__(self, value: object) -> bool:
        if any(value is one or (value == one and not isinstance(value, bool)) for one in self.also):
            return True
        if not is_number(value) or (self.is_whole and not isinstance(value, Integral)):
            return False
        return (value > self.least if self.is_open else value >= self.least) and value <= self.most

    def __str__(self) -> str:
        kind = "a whole number" if self.is_whole else "a finite number"
        low = f"above {self.least:g}" if self.is_open else f"from {self.least:g}"
        high = f" to {self.most:g}" if self.most < math.inf else ""
        return f"{kind} {low}{high}" + "".join(f", or {one}" for one in self.also)


COUNT = Range(1, is_whole=True)
POSITIVE = Range(is_open=True)
SHARE = Range(most=1)

# Of transformers' TrainingArguments; those of a trainer's own options stand in its config.
TRAINING: dict[str, Range] = {
    "learning_rate": Range(),
    "weight_decay": Range(),
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": Range(),
    "max_grad_norm": Range(also=(None, math.inf)),
    "warmup_steps": Range(also=(None,)),
    "dataloader_num_workers": Range(is_whole=True),
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "logging_steps": POSITIVE,
    "eval_steps": Range(is_open=True, also=(None,)),
    "save_steps": POSITIVE,
    "save_total_limit": Range(1, is_whole=True, also=(None,)),
    "seed": Range(is_whole=True),
}
# Of TRL's ModelConfig.
LORA: dict[str, Range] = {"lora_r": COUNT, "lora_alpha": POSITIVE, "lora_dropout": SHARE}

# What Trainer itself gives a schedule and a checkpointed function.
OF_TRAINER = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "function")
# A text names the file in which the mapping is.
FILES = ("accelerator_config", "deepspeed", "fsdp_config")


def check_ranges(args: Any, ranges: Mapping[str, Range] = TRAINING) -> None:
    """Raise for all options that are outside their range; in training also for no step, and for switches and mappings that are
    none.

    Example:
        >>> from types import SimpleNamespace
        >>> check_ranges(SimpleNamespace(beta=0.0), {"beta": Range(is_open=True)})
        Traceback (most recent call last):
        prefopt.errors.UserError: beta=0.0: expected a finite number above 0
    """
    values = {name: getattr(args, name) for name in ranges}
    problems = [
        f"{name}={values[name]!r}: expected {allowed}"
        for name, allowed in ranges.items()
        if values[name] not in allowed
    ]
    if ranges is TRAINING:
        # -1: as many as the epochs have.
        if args.max_steps not in Range(-1, is_whole=True):
            problems.append(f"max_steps={args.max_steps!r}: expected a whole number")
        elif args.max_steps not in COUNT and args.num_train_epochs not in POSITIVE:
            problems.append(f"num_train_epochs={args.num_train_epochs!r}: expected {POSITIVE}, or max_steps from 1")
        for name in _switches(type(args)):
            if getattr(args, name) not in (True, False, None):
                problems.append(f"{name}={getattr(args, name)!r}: expected true or false")
        for name in _mappings(type(args)):
            if isinstance(value := getattr(args, name), str) and not value.startswith("{"):
                problems.append(f"{name}={value!r}: expected pairs of a name and a value")
        for name in FILES:
            value = getattr(args, name)
            if isinstance(value, str) and not value.startswith("{") and not Path(value).is_file():
                problems.append(f"{name}={value!r}: there is no such file")
        problems += _unknown_names(args)
        if args.optim_args and not all("=" in part for part in args.optim_args.split(",")):
            problems.append(f"optim_args={args.optim_args!r}: expected name=value, separated by commas")
        if args.output_dir == "":
            problems.append("output_dir='': expected a folder")
    if problems:
        raise UserError("; ".join(problems))


def _unknown_names(args: Any) -> Iterator[str]:
    """Names in mappings that torch or transformers would refuse after the model is loaded."""
    kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    schedule = {one.value: function for one, function in TYPE_TO_SCHEDULER_FUNCTION.items()}.get(kind)
    # The names that only torch's **kwargs shows.
    for name, function, others in (
        ("gradient_checkpointing_kwargs", checkpoint, ["preserve_rng_state"]),
        ("lr_scheduler_kwargs", schedule, []),
    ):
        given = getattr(args, name)
        if function is None or not isinstance(given, Mapping):
            continue
        parameters = inspect.signature(function).parameters.values()
        if any(one.kind is one.VAR_KEYWORD for one in parameters) and not others:
            continue
        named = [one.name for one in parameters if one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)]
        known = [*others, *(one for one in named if one not in OF_TRAINER)]
        for unknown in sorted(given.keys() - {*known}):
            yield f"{name}: unknown name {unknown!r}; expected some of {', '.join(known) or 'none'}"


@cache
def _switches(config: type) -> list[str]:
    hints = get_type_hints(config)
    return [
        field.name
        for field in fields(config)
        if {*(get_args(hints[field.name]) or [hints[field.name]])} - {NoneType} == {bool}
    ]


@cache
def _mappings(config: type) -> list[str]:
    """Options that are a mapping; transformers reads the JSON of a text that begins with a brace, and no other."""
    hints = get_type_hints(config)
    of_each = {name: {get_origin(one) or one for one in get_args(hint)} for name, hint in hints.items()}
    return [name for name, kinds in of_each.items() if {dict, str} <= kinds and name not in FILES]


def is_number(value: Any) -> bool:
    """Whether it is a finite number; true and false, "0.1" and None are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
