"""Default learning rates are those of full fine-tuning: a run of an adapter at them says so when it starts."""

from dataclasses import fields
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from transformers import TrainerCallback, TrainerState, TrainingArguments

logger = get_logger(__name__)

RATES = ("learning_rate", "value_learning_rate")


class DefaultRates(TrainerCallback):
    """Warns at the start of a run that trains an adapter at a learning rate that was left at its default."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if not is_peft_model(model):
            return
        defaults = {field.name: field.default for field in fields(args) if field.name in RATES}
        left = [f"{name}={value:g}" for name, value in defaults.items() if getattr(args, name) == value]
        if left:
            logger.warning(
                "An adapter is trained at the default %s, which %s meant for full fine-tuning: LoRA usually wants about ten "
                "times as much, and at this rate may learn little.",
                " and ".join(left),
                "is" if len(left) == 1 else "are",
            )
