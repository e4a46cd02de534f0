"""A second fused LM head for the policy, at temperature 1."""

import functools
import types
from typing import Any

from peft import PeftModel
from torch import nn
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
