"""A run whose numbers are no longer finite stops at once: it would save weights of NaN and call them trained."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import sort_checkpoints

from prefopt.errors import UserError
from prefopt.models.passes import loaded_from


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity.

    Example:
        >>> all_finite([torch.ones(2), torch.zeros(3, dtype=torch.bfloat16)])
        True
        >>> all_finite([torch.ones(2), torch.tensor([0.0, float("nan")])])
        False
    """
    # One number per tensor, so that each device is asked once.
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        by_device.setdefault(part.device, []).append(torch.isfinite(part).all())
    return all(bool(torch.stack(finite).all()) for finite in by_device.values())


class StopAtNonFinite(TrainerCallback):
    """Before each optimizer step the gradients are looked at, and before each checkpoint and at the end the weights.

    Raises:
        UserError: they hold NaN or infinity; step, learning rate and the newest checkpoint are named.
    """

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Under fp16 an overflow is a step that the scaler skips.
        if args.fp16:
            return
        parameters = _trained(kwargs["optimizer"])
        if not all_finite(p.grad for p in parameters if p.grad is not None):
            raise UserError(_sentence(args, state.global_step + 1, "gradients", **kwargs))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        is_kept = control.should_save or control.should_training_stop
        if is_kept and not all_finite(p.detach() for p in _trained(kwargs["optimizer"])):
            raise UserError(_sentence(args, state.global_step, "weights", **kwargs))


def _trained(optimizer: Any) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def _sentence(args: TrainingArguments, step: int, what: str, *, model: Any, optimizer: Any, **kwargs: Any) -> str:
    rate = max(group["lr"] for group in optimizer.param_groups)
    checkpoints = sort_checkpoints(args.output_dir)
    kept = f"the newest checkpoint before is {checkpoints[-1]}" if checkpoints else "no checkpoint was saved before"
    return (
        f"step {step}: the {what} are not finite (NaN or infinity; learning rate {rate:g}), so training has stopped and "
        f"nothing more was saved; {kept}. Lower learning_rate or set max_grad_norm; at the first step, look at the "
        f"model that training starts from{loaded_from(model)}"
    )
