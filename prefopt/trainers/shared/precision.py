"""How weights are held: adapters on a quantized base in fp32, and whether parameters are to be sharded.

Adapters stay in fp32, as PEFT reloads them; TRL's trainers round them to bf16.
"""

import os

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainingArguments

from prefopt.errors import UserError

_LAUNCHED = {"fsdp": "ACCELERATE_USE_FSDP", "deepspeed": "ACCELERATE_USE_DEEPSPEED"}


def trainable_weights(model: object) -> dict[str, Tensor]:
    """Copies of a `PeftModel`'s trainable weights, to be taken before TRL sees it; nothing of other models."""
    if not isinstance(model, PeftModel):
        return {}
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def undo_rounding(model: nn.Module, original: dict[str, Tensor]) -> None:
    """Make the trainable weights of an adapter on a quantized base fp32 again, with their original values.

    bf16 would swallow small updates, and the saved adapter would score differently from the one reloaded in fp32.
    `original`, from `trainable_weights`, is emptied: later calls leave trained weights alone.
    """
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.dtype == torch.bfloat16:
                parameter.data = original.get(name, parameter.data).to(parameter.device).float()
    original.clear()


def is_asked_for(engine: str, args: TrainingArguments) -> bool:
    """Whether `accelerate launch` (its configuration file) or the argument of that name asks for `fsdp` or `deepspeed`.

    It is known before anything is loaded.
    """
    return os.environ.get(_LAUNCHED[engine], "false").lower() == "true" or bool(getattr(args, engine))


def shards_before_loading(args: TrainingArguments) -> bool:
    """Whether DeepSpeed gives a process a part of each weight as soon as it is loaded (`zero.Init`).

    With the argument `deepspeed` transformers does so wherever its file has stage 3.
    """
    return bool(args.deepspeed) or os.environ.get("ACCELERATE_DEEPSPEED_ZERO3_INIT", "false").lower() == "true"


def refuse_several_devices(model: nn.Module) -> None:
    """Raise where one process has spread a model over several GPUs, as TRL does with a path and no launcher.

    Heads and the positions that are read would be on different ones.
    """
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(devices) > 1:
        raise UserError(
            f"the model is spread over the devices {', '.join(sorted(devices))}: start one process for each GPU with "
            "`accelerate launch`, or set CUDA_VISIBLE_DEVICES to one of them"
        )
