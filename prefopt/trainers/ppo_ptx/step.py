"""The optimizer step of PPO-ptx: the terms of InstructGPT's Eq. 2, their gradients, and the groups that learn."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from prefopt.losses import clipped_policy_loss, clipped_value_loss
from prefopt.trainers.ppo_ptx.config import PPOPtxConfig
from prefopt.trainers.ppo_ptx.roles import Roles, ValueFunction


def ppo_loss(
    model: nn.Module, episodes: dict[str, Any], roles: Roles, args: PPOPtxConfig, accelerator: Accelerator
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's part of policy + vf_coef * value; a value network runs its own backward here.

    The two parts cannot share a backward pass: which adapter of the base is active decides where gradients go, and
    gradient checkpointing runs the forward once more.

    Args:
        model: the policy as it trains, wrapped or not.
        episodes: TRL's batch with what `Rollouts` adds.

    Returns:
        The loss, whose sum over the micro-batches of a step is the mean over its tokens; and this micro-batch's parts
        of what is logged, on this process, by log key.
    """
    mask, advantages, old_logps = (episodes[k] for k in ("loss_mask", "advantages", "old_per_token_logps"))
    ids = torch.cat([episodes["prompt_ids"], episodes["completion_ids"]], 1)
    attention_mask = torch.cat([episodes["prompt_mask"], episodes["completion_mask"]], 1)
    length, value_function = mask.size(1), roles.value_function
    # Summed over micro-batches and averaged over processes, sum / num_tokens is the mean over the minibatch.
    num_tokens = episodes["num_tokens"] / accelerator.num_processes

    def value_loss_now() -> Tensor:
        values = roles.values(ids, attention_mask, length)
        return clipped_value_loss(
            values, episodes["old_values"], episodes["returns"], mask, args.value_clip_range, num_tokens
        )

    if not value_function.is_head:
        with value_function.active():
            value_loss = value_loss_now()
            if value_loss.requires_grad:
                accelerator.backward(args.vf_coef * value_loss)
        value_loss = value_loss.detach()
    logps, entropies = roles.logps(model, ids, attention_mask, length, compute_entropy=True)
    if value_function.is_head:
        value_loss = value_loss_now()
    # Of the policy to vLLM, never negative.
    if "importance_sampling_ratio" in episodes:
        advantages = advantages * episodes["importance_sampling_ratio"]
    policy_loss = clipped_policy_loss(logps, old_logps, advantages, mask, args.epsilon, num_tokens)

    ratio = (logps.detach() - old_logps).exp()
    is_low = (ratio < 1 - args.epsilon) & (advantages < 0)
    is_high = (ratio > 1 + args.epsilon) & (advantages > 0)
    per_token = {
        "entropy": entropies,
        "clip_ratio/low_mean": is_low,
        "clip_ratio/high_mean": is_high,
        "clip_ratio/region_mean": is_low | is_high,
    }
    parts = {"loss/policy": policy_loss.detach(), "loss/value": value_loss.detach()}
    for name, x in per_token.items():
        parts[name] = torch.where(mask, x.detach().float(), 0.0).sum() / num_tokens.clamp(min=1e-8)
    return policy_loss + args.vf_coef * value_loss, parts


def complete_gradient(
    policy: list[nn.Parameter],
    value_function: ValueFunction,
    backward_on_text: Callable[[], tuple[Tensor, float]] | None,
    is_warming_up: bool,
    accelerator: Accelerator,
) -> tuple[Tensor | None, dict[str, float]]:
    """What a step's gradient lacks after PPO's micro-batches: the value function's average, and the pretraining part.

    PPO's gradients are set aside while the pretraining text runs, so that the norm of each part can be logged: one more
    copy of the trainable parameters in memory.

    Args:
        policy: its trainable parameters.
        backward_on_text: `pretraining.backward_on_text` of this step; None with `ptx_coef=0`.
        is_warming_up: whether the value function learns alone: then the policy gets no gradient.

    Returns:
        ptx_coef * LM of this process, if it was run; the numbers to log by their keys.
    """
    values = value_function.parameters
    for parameter in values:
        # Alone there is nothing to average, and `reduce` would copy the gradient all the same.
        if parameter.grad is not None and accelerator.num_processes > 1:
            parameter.grad = accelerator.reduce(parameter.grad, "mean")
    metrics = {"grad_norm/value": _norm(values)}
    if is_warming_up:
        for parameter in policy:
            parameter.grad = None
    metrics["grad_norm/ppo"] = _norm(policy)
    if backward_on_text is None or is_warming_up:
        return None, metrics
    ppo_gradients = [parameter.grad for parameter in policy]
    for parameter in policy:
        parameter.grad = None
    loss, metrics["loss/ptx"] = backward_on_text()
    metrics["grad_norm/ptx"] = _norm(policy)
    for parameter, gradient in zip(policy, ppo_gradients, strict=True):
        if parameter.grad is None:
            parameter.grad = gradient
        elif gradient is not None:
            parameter.grad += gradient
    return loss, metrics


def _norm(parameters: list[nn.Parameter]) -> float:
    return get_total_norm([p.grad for p in parameters if p.grad is not None]).item()


def add_value_groups(
    optimizer: Optimizer, parameters: list[nn.Parameter], learning_rate: float, weight_decay: float
) -> None:
    """Let the optimizer train the value function at its own learning rate, unless it does so already."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if known & {id(p) for p in parameters}:
        return
    # Norms and biases do not decay, as in Trainer.
    for is_decayed in (True, False):
        group = {
            "params": [p for p in parameters if (p.ndim > 1) == is_decayed],
            "lr": learning_rate,
            "weight_decay": weight_decay if is_decayed else 0.0,
        }
        optimizer.add_param_group(group)


def warm_up_from(scheduler: LambdaLR, start: float, warmup_steps: int) -> LambdaLR:
    """A schedule whose warm-up starts at the share `start` of the peak instead of 0, for all groups."""

    def from_start(factor: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: start + (1 - start) * factor(step) if step < warmup_steps else factor(step)

    return LambdaLR(scheduler.optimizer, [from_start(factor) for factor in scheduler.lr_lambdas])
