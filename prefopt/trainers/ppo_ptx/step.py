"""The optimizer step of PPO-ptx: the terms of InstructGPT's Eq. 2, their gradients, and what is logged of them."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from prefopt.losses import clipped_policy_loss, clipped_value_loss
from prefopt.models.heads import pretraining_loss
from prefopt.trainers.ppo_ptx.pretraining import share_of_process


class OptimizationMixin:
    """The part of `PPOPtxTrainer` that turns a rollout into optimizer steps."""

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """This micro-batch's part of policy + vf_coef * value; a value network runs its own backward here."""
        args, mask, advantages = self.args, inputs["loss_mask"], inputs["advantages"]
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        length = mask.size(1)
        # Summed over micro-batches and averaged over processes, sum / num_tokens is the mean over the minibatch.
        num_tokens = inputs["num_tokens"] / self.accelerator.num_processes

        def value_loss_of(values: Tensor) -> Tensor:
            return clipped_value_loss(
                values, inputs["old_values"], inputs["returns"], mask, args.value_clip_range, num_tokens
            )

        if not self.value_function.is_head:
            with self.value_function.active():
                value_loss = value_loss_of(self._values(ids, attention_mask, length))
                if value_loss.requires_grad:
                    self.accelerator.backward(args.vf_coef * value_loss)
            value_loss = value_loss.detach()
        logps, entropies, _ = self._get_per_token_logps_and_entropies(
            model, ids, attention_mask, length, compute_entropy=True
        )
        if self.value_function.is_head:
            value_loss = value_loss_of(self._values(ids, attention_mask, length))
        if "importance_sampling_ratio" in inputs:  # of the policy to vLLM, never negative
            advantages = advantages * inputs["importance_sampling_ratio"]
        policy_loss = clipped_policy_loss(
            logps, inputs["old_per_token_logps"], advantages, mask, args.epsilon, num_tokens
        )

        ratio = (logps.detach() - inputs["old_per_token_logps"]).exp()
        is_low = (ratio < 1 - args.epsilon) & (advantages < 0)
        is_high = (ratio > 1 + args.epsilon) & (advantages > 0)
        self._log_minibatch(
            {"loss/policy": policy_loss.detach(), "loss/value": value_loss.detach()},
            {
                "entropy": entropies,
                "clip_ratio/low_mean": is_low,
                "clip_ratio/high_mean": is_high,
                "clip_ratio/region_mean": is_low | is_high,
            },
            mask,
            num_tokens,
        )
        return policy_loss + args.vf_coef * value_loss

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self._step % self.args.gradient_accumulation_steps == 0:
            self.value_function.zero_grad()  # Trainer zeroes the policy's alone
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:  # the last micro-batch: the minibatch's gradient is complete
            start = time.perf_counter()
            for parameter in self.value_function.parameters:
                # alone there is nothing to average, and `reduce` would copy the gradient all the same
                if parameter.grad is not None and self.accelerator.num_processes > 1:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
            metrics = self._metrics["train"]
            metrics["grad_norm/value"].append(_norm(self.value_function.parameters))
            policy_parameters = [p for p in self.model.parameters() if p.requires_grad]
            is_warming_up = self.state.global_step < self.args.value_warmup_steps
            if is_warming_up:
                for parameter in policy_parameters:
                    parameter.grad = None
            metrics["grad_norm/ppo"].append(_norm(policy_parameters))
            if self.pretraining is not None and not is_warming_up:
                loss = loss + self._add_pretraining_gradient(model, policy_parameters)
            metrics["step_time"][-1] += time.perf_counter() - start
        return loss

    def _add_pretraining_gradient(self, model: nn.Module, parameters: list[nn.Parameter]) -> Tensor:
        """Backward of ptx_coef * LM over the step's pretraining text, added to the gradients (appendix C.4).

        PPO's gradients are set aside meanwhile, so that the norm of each part can be told: one more copy of the
        trainable parameters in memory. Under DDP the last backward averages over the processes, as PPO's did.
        """
        args, processes = self.args, self.accelerator.num_processes
        episodes = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
        blocks = self.pretraining.take(max(1, round(args.ptx_batch_ratio * episodes)))
        batches, num_tokens = share_of_process(
            blocks,
            self.accelerator.process_index,
            processes,
            args.ptx_per_device_batch_size,
            self._tokenizer.pad_token_id,
        )
        ppo_gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        total = torch.zeros((), device=self.accelerator.device)
        for number, batch in enumerate(batches, start=1):
            batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
            with nullcontext() if number == len(batches) else self.accelerator.no_sync(model):
                loss = pretraining_loss(model, batch, num_tokens / processes, self.temperature != 1)
                self.accelerator.backward(args.ptx_coef * loss)
            total += loss.detach()
        metrics = self._metrics["train"]
        metrics["loss/ptx"].append(self.accelerator.reduce(total, "mean").item())
        metrics["grad_norm/ptx"].append(_norm(parameters))
        for parameter, gradient in zip(parameters, ppo_gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient
            elif gradient is not None:
                parameter.grad += gradient
        return args.ptx_coef * total

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's parameter groups for the policy, and with `value_learning_rate` the value function's."""
        optimizer = super().create_optimizer(model)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not known & {id(p) for p in self.value_function.parameters}:
            for is_decayed in (True, False):  # norms and biases are not, as in Trainer
                group = {
                    "params": [p for p in self.value_function.parameters if (p.ndim > 1) == is_decayed],
                    "lr": self.args.value_learning_rate,
                    "weight_decay": self.args.weight_decay if is_decayed else 0.0,
                }
                optimizer.add_param_group(group)
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        """Trainer's schedule, whose warm-up starts at `warmup_start_ratio` of the peak instead of 0, for all groups."""
        is_given = self.lr_scheduler is not None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if not is_given and isinstance(scheduler, LambdaLR):
            start, warmup = self.args.warmup_start_ratio, self.args.get_warmup_steps(num_training_steps)

            def from_start(factor: Callable[[int], float]) -> Callable[[int], float]:
                return lambda step: start + (1 - start) * factor(step) if step < warmup else factor(step)

            self.lr_scheduler = LambdaLR(scheduler.optimizer, [from_start(f) for f in scheduler.lr_lambdas])
        return self.lr_scheduler

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        values = self.value_function.parameters
        self.accelerator.clip_grad_norm_(values, self.args.max_grad_norm)
        # Set aside: the value adapter on the policy's base is among the model's parameters, but clipped by itself.
        gradients = [parameter.grad for parameter in values]
        for parameter in values:
            parameter.grad = None
        norm = super()._clip_grad_norm(model)
        for parameter, gradient in zip(values, gradients, strict=True):
            parameter.grad = gradient
        return norm

    def _log_minibatch(
        self, losses: dict[str, Tensor], per_token: dict[str, Tensor], mask: Tensor, num_tokens: Tensor
    ) -> None:
        is_training = self.model.training
        parts = dict(losses)
        for name, x in per_token.items():
            parts[name] = torch.where(mask, x.detach().float(), 0.0).sum() / num_tokens.clamp(min=1e-8)
        means = self.accelerator.reduce(torch.stack([x.float() for x in parts.values()]), "mean")
        # TRL averages what the micro-batches append; these are parts of a sum.
        scale = self.args.gradient_accumulation_steps if is_training else 1
        for name, value in zip(parts, means.tolist(), strict=True):
            self._metrics["train" if is_training else "eval"][name].append(value * scale)


def _norm(parameters: list[nn.Parameter]) -> float:
    return get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
