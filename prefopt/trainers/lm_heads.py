"""Three ways to read a policy's LM head beside TRL's: at temperature 1, in fp32, and as the pretraining loss."""

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head


def add_untempered_head(policy: PreTrainedModel | PeftModel, cast_lm_head_to_fp32: bool) -> None:
    """Give a policy, whose fused LM head has the sampling temperature in it, a second one at temperature 1.

    It answers `model(..., fused_lm_head=True, untempered=True)`; every other call is as before.
    """
    model = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    tempered = model.forward
    add_fused_lm_head(model, temperature=1.0, cast_lm_head_to_fp32=cast_lm_head_to_fp32)
    at_one = model.forward

    @functools.wraps(tempered)  # `generate` checks its arguments against the signature
    def forward(self: nn.Module, *args: Any, untempered: bool = False, **kwargs: Any) -> Any:
        return (at_one if untempered else tempered)(*args, **kwargs)

    model.forward = types.MethodType(forward, model)


def pretraining_loss(
    model: nn.Module, batch: dict[str, Tensor], num_tokens: float, has_untempered_head: bool
) -> Tensor:
    """`losses.lm_loss` of a batch, without its logits `[B, T, V]`.

    The fused LM head computes tiles of 4096 positions x 32768 words, and computes them again in the backward pass.

    Args:
        model: the policy, wrapped or not, with TRL's fused LM head.
        batch: `input_ids`, `attention_mask` and `labels` `[B, T]`, -100 = ignored.
        num_tokens: divides the summed loss.
        has_untempered_head: whether the policy has been given one; without, its temperature must be 1.

    Returns:
        A scalar.
    """
    options = {"untempered": True} if has_untempered_head else {}
    return model(**batch, fused_lm_head=True, num_items_in_batch=num_tokens, **options).loss


@contextmanager
def fp32_output(head: nn.Linear, enabled: bool) -> Iterator[None]:
    """Inside, an LM head computes in fp32 whatever autocast and its own dtype are: TRL's `cast_lm_head_to_fp32`."""

    def in_fp32(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        bias = None if module.bias is None else module.bias.float()
        with torch.autocast(output.device.type, enabled=False):
            return F.linear(args[0].float(), module.weight.float(), bias)

    handle = head.register_forward_hook(in_fp32) if enabled else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
