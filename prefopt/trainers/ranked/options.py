"""Checks of arguments that name the field, what it may be and what it was."""

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments

from prefopt.errors import UserError, UserTypeError


def refuse_options(args: TrainingArguments, refused: Mapping[str, tuple[Any, str]]) -> None:
    """Raise for every inherited option that is not at the only value a ranked trainer can honor."""
    for name, (allowed, reason) in refused.items():
        value = getattr(args, name)
        if value != allowed:
            raise UserError(
                f"{type(args).__name__}: {name}={value!r} is not supported: {reason} (leave it at {allowed!r})"
            )


def is_number(value: Any) -> bool:
    """Whether it is a finite number; true and false, "0.1" and None are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_number(args: Any, name: str, expected: str, *, above: float | None = None) -> None:
    """Raise unless the option is a finite number from 0, or with `above` greater than that."""
    value = getattr(args, name)
    if not (is_number(value) and (value >= 0 if above is None else value > above)):
        raise UserError(f"{name}={value!r}: expected {expected}")


def check_count(args: Any, name: str, expected: str) -> None:
    """Raise unless the option is None or a whole number from 1."""
    value = getattr(args, name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
        raise UserError(f"{name}={value!r}: expected {expected}")


def check_switch(args: Any, name: str) -> None:
    """Raise unless the option is true or false: the text 'no' would count as true."""
    value = getattr(args, name)
    if not isinstance(value, bool):
        raise UserError(f"{name}={value!r}: expected True or False")


def check_model(model: Any, processing_class: Any) -> None:
    """Raise for what is no model, or has no tokenizer."""
    if not isinstance(model, str | PreTrainedModel | PeftModel):
        raise UserTypeError(f"`model` is {model!r}: expected a path, a PreTrainedModel or a PeftModel")
    if processing_class is None and not isinstance(model, str) and not model.config.name_or_path:
        raise UserError(
            "`model` was not loaded from a path, where its tokenizer would be: pass `processing_class`"
        )
