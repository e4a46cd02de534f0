"""Whether parameters are to be sharded over processes, as it is known before anything is loaded."""

import os

from transformers import TrainingArguments

_LAUNCHED = {"fsdp": "ACCELERATE_USE_FSDP", "deepspeed": "ACCELERATE_USE_DEEPSPEED"}


def is_asked_for(engine: str, args: TrainingArguments) -> bool:
    """Whether `accelerate launch` (its configuration file) or the argument of that name asks for `fsdp` or `deepspeed`."""
    return os.environ.get(_LAUNCHED[engine], "false").lower() == "true" or bool(getattr(args, engine))
