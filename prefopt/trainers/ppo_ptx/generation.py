"""What PPO-ptx asks of TRL's ways to generate: transformers, continuous batching, vLLM."""

from typing import Any

from peft import PeftModel
from torch import nn

from prefopt.errors import UserError
from prefopt.trainers.ppo_ptx.config import PPOPtxConfig


def check_vllm(
    args: PPOPtxConfig, model: str | nn.Module, quantization_config: Any, suppressed_tokens: list[int]
) -> None:
    """Refuse the policies whose weights TRL would send to vLLM wrongly or under names that vLLM does not know.

    Raises ValueError; nothing happens without `use_vllm`.
    """
    if not args.use_vllm:
        return
    quantized = any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    to_quantize = quantization_config or (args.model_init_kwargs or {}).get("quantization_config")
    if quantized or to_quantize:
        raise UserError(
            "use_vllm with a 4-bit or 8-bit policy is not supported: TRL would send vLLM the packed weights; load "
            "the policy in 16 bit, or generate with transformers (use_vllm=False)"
        )
    if isinstance(model, PeftModel) and any(c.modules_to_save for c in model.peft_config.values()):
        raise UserError(
            "use_vllm with modules_to_save is not supported: TRL would send vLLM the copies of every adapter; leave "
            "modules_to_save out, or generate with transformers (use_vllm=False)"
        )
    if suppressed_tokens:
        raise UserError(
            f"use_vllm cannot keep the policy from sampling the reward token {suppressed_tokens}: vLLM has no "
            "suppress_tokens; train the reward model without a reward token, or set use_vllm=False"
        )
