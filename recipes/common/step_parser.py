"""The parser of a command, whose help shows prefopt's own keys and the usual ones of TRL and transformers first."""

import argparse
import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Sequence
from typing import Any

from trl import TrlParser

# Of the hundreds of keys that steps inherit, those that people set.
USUAL = {
    "output_dir",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "generation_batch_size",
    "num_iterations",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "max_grad_norm",
    "max_length",
    "max_completion_length",
    "temperature",
    "packing",
    "beta",
    "loss_type",
    "bf16",
    "gradient_checkpointing",
    "use_vllm",
    "vllm_mode",
    "logging_steps",
    "eval_strategy",
    "eval_steps",
    "per_device_eval_batch_size",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "report_to",
    "push_to_hub",
    "hub_model_id",
    "seed",
    "use_cpu",
    "model_name_or_path",
    "model_revision",
    "dtype",
    "attn_implementation",
    "use_peft",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "load_in_4bit",
    "load_in_8bit",
}
KINDS = {"str": "TEXT", "int": "N", "float": "X", "string_to_bool": "true|false"}
# What these keys do in prefopt's steps, where the inherited help says something else.
HELP = {
    "bf16": "Mixed precision in bf16; unset: where the hardware has it.",
    "resume_from_checkpoint": "true: go on from the newest complete checkpoint of output_dir; or a checkpoint's folder.",
}
MODEL, STEP, TRAINING = "model", "settings of this step", "training"


class StepParser(TrlParser):
    """TRL's parser with keys in groups: prefopt's own and the usual ones; all of them with `show_all`.

    A key is spelt with underscores here; `parse` (recipes/arguments.py) turns dashes into them.
    """

    def __init__(
        self,
        dataclass_types: Sequence[type],
        prog: str,
        description: str | None = None,
        show_all: bool = False,
    ) -> None:
        self.show_all = show_all
        self.hidden = 0
        self._titles = {
            field.name: _title(dataclass_type, field.name)
            for dataclass_type in dataclass_types
            for field in dataclasses.fields(dataclass_type)
        }
        self._groups_of_keys: dict[str | None, Any] = {}
        super().__init__(
            dataclass_types,
            prog=prog,
            usage=f"{prog} [--config step.yaml] [--key value ...]",
            description=description,
            formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=34),
            allow_abbrev=False,
        )
        if self.hidden:
            self.epilog = f"{self.hidden} more keys of TRL and transformers: {prog} --help-all"

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """Into the group of the key, in one spelling; out of the help if it is none of the usual ones."""
        is_negation = names[0].startswith("--no_")
        key = names[0].removeprefix("--no_" if is_negation else "--")
        if key not in self._titles:
            return super().add_argument(*names, **settings)
        title, names = self._titles[key], names[:1]
        if not is_negation and "choices" not in settings:
            settings["metavar"] = KINDS.get(getattr(settings.get("type"), "__name__", ""), "VALUE")
        elif len(settings.get("choices", ())) > 5 and not self.show_all:
            settings["metavar"] = "NAME"
        if not self.show_all and (title is None or is_negation):
            self.hidden += not is_negation
            return super().add_argument(*names, **{**settings, "help": argparse.SUPPRESS})
        text = HELP.get(key, settings.get("help") or "")
        if title in (MODEL, TRAINING) and not self.show_all:
            text = re.split(r"(?<=\.) ", text)[0]
        is_told = settings.get("default") in (None, "", [], {}) or "default" in text
        settings["help"] = text if is_told or is_negation else f"{text} [%(default)s]"
        return self._group(title).add_argument(*names, **settings)

    def _group(self, title: str | None) -> Any:
        if not self._groups_of_keys:
            own = [t for t in dict.fromkeys(self._titles.values()) if t not in (MODEL, STEP, TRAINING, None)]
            for name in (*own, MODEL, STEP, TRAINING, None):  # the help shows them in this order
                self._groups_of_keys[name] = self.add_argument_group(name or "more of TRL and transformers")
        return self._groups_of_keys[title]


def _title(dataclass_type: type, key: str) -> str | None:
    """The group of a key; None for one that the short help leaves out."""
    module = sys.modules[dataclass_type.__module__]
    if key in getattr(module, "REFUSED", ()) or key in getattr(module, "FIXED", ()):
        return None
    owner = next(c for c in dataclass_type.__mro__ if key in inspect.get_annotations(c))
    if owner.__module__.startswith("prefopt."):
        if _trains(dataclass_type):
            return STEP
        return (dataclass_type.__doc__ or dataclass_type.__name__).strip().splitlines()[0].rstrip(".")
    if key not in USUAL:
        return None
    return TRAINING if _trains(dataclass_type) else MODEL


def _trains(dataclass_type: type) -> bool:
    """Whether these are training arguments, told by name: importing theirs takes seconds that `prefopt data` has not."""
    return any(c.__name__ == "TrainingArguments" for c in dataclass_type.__mro__)
