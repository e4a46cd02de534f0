"""What numbers the options of a training step may be; transformers and TRL check few of theirs before the first step."""

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

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
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "logging_steps": POSITIVE,
    "eval_steps": Range(is_open=True, also=(None,)),
    "save_steps": POSITIVE,
    "save_total_limit": Range(1, is_whole=True, also=(None,)),
    "seed": Range(is_whole=True),
}


def check_ranges(args: Any, ranges: Mapping[str, Range] = TRAINING) -> None:
    """Raise for the first option that is outside its range, or in training for no step.

    Example:
        >>> from types import SimpleNamespace
        >>> check_ranges(SimpleNamespace(beta=0.0), {"beta": Range(is_open=True)})
        Traceback (most recent call last):
        prefopt.errors.UserError: beta=0.0: expected a finite number above 0
    """
    for name, allowed in ranges.items():
        if getattr(args, name) not in allowed:
            raise UserError(f"{name}={getattr(args, name)!r}: expected {allowed}")
    if ranges is TRAINING and args.max_steps not in COUNT and args.num_train_epochs not in POSITIVE:
        raise UserError(f"num_train_epochs={args.num_train_epochs!r}: expected {POSITIVE}, or max_steps from 1")


def is_number(value: Any) -> bool:
    """Whether it is a finite number; true and false, "0.1" and None are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
