"""PPO and PPO-ptx (InstructGPT, arXiv:2203.02155, section 3.5 and Eq. 2) on TRL's rollouts."""

import json
import logging
import os
import textwrap
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils.data import Sampler
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl import GRPOTrainer
from trl.trainer.utils import disable_dropout_in_model, use_adapter

from prefopt.advantages import gae, kl_shaped_rewards, masked_whiten
from prefopt.losses import clipped_policy_loss, clipped_value_loss, lm_loss
from prefopt.reward_checkpoints import load_reward_model
from prefopt.shared_base import keep_4bit_gradients, value_model_from
from prefopt.trainers.ppo_ptx_config import PPOPtxConfig
from prefopt.trainers.ppo_ptx_metrics import rollout_metrics
from prefopt.trainers.ppo_ptx_prompts import PromptOrder, check_prompts
from prefopt.trainers.ppo_ptx_roles import (
    ValueFunction,
    add_reference_adapter,
    check_same_tokenizer,
    frozen_copy,
    score_ids,
    suppress_reward_tokens,
)
from prefopt.trainers.pretraining_data import PretrainingStream, pack_documents, share_of_process

logger = logging.getLogger(__name__)

STATE_FILE = "ppo_ptx_state.json"

RewardModel = PreTrainedModel | PeftModel


class PPOPtxTrainer(GRPOTrainer):
    """PPO with a value function, the KL penalty in the reward, and pretraining gradients in the same step.

    Each optimizer step minimises, over one minibatch of episodes and its share of pretraining text,

        L = policy + vf_coef * value + ptx_coef * LM                                     (InstructGPT Eq. 2)

    Each term is a mean over all tokens of the step, whatever the micro-batches and processes. The KL penalty against
    the SFT model is part of the reward of each token. Generation, buffering, logging and checkpoints are TRL's.

    Args:
        model: the SFT model: path, model or `PeftModel`. It is also the KL reference: a frozen copy of the model or
            of the adapter `default`; with `peft_config` (a new adapter), the model without the adapter.
        reward_funcs: one or a list of: Python function (TRL's signature), reward model (sequence classifier with one
            label or a `PeftModel` of it, same tokenizer as the policy), path of either. Reward models are frozen and
            score the sampled token ids.
        args: [`PPOPtxConfig`].
        train_dataset, eval_dataset: rows `{"prompt"}`, text or messages; other columns go to Python reward functions.
        processing_class: the tokenizer.
        pretrain_dataset: rows `{"text"}` or `{"input_ids"}`; required unless `ptx_coef=0`.
        value_model: a trainable reward model or path; `"head"`, a linear head on the policy's trunk. Default: a copy
            of the (first) reward model, bias included; without a reward model, `"head"`.
        callbacks, optimizers, quantization_config, peft_config: as in `GRPOTrainer`.

    Log keys (means over the steps between two logs; TRL's key where TRL logs the quantity):

    | key | quantity |
    |---|---|
    | `reward`, `reward_std`, `rewards/<name>/mean` | scores as the reward functions give them |
    | `completions/mean_length`, `completions/clipped_ratio`, ... | length in tokens; share without EOS |
    | `kl` | KL to the reference per token, TRL's estimator (k3), at the rollout |
    | `entropy` | of the policy, per token |
    | `clip_ratio/low_mean`, `high_mean`, `region_mean` | share of tokens whose ratio is clipped |
    | `objective/scores` | score per episode, missing-EOS penalty included, before KL |
    | `objective/kl` | KL per episode in nats: sum over its tokens of the log-ratio (k1) |
    | `objective/rewards` | scores - kl_coef * KL per episode: what PPO maximises |
    | `objective/unscored` | episodes of a rollout without a usable reward: in no loss, in no whitening |
    | `value/explained_variance` | 1 - Var(returns - values) / Var(returns), at the rollout |
    | `loss/policy`, `loss/value`, `loss/ptx` | terms of L before their coefficients |
    | `grad_norm` | gradient of the policy before clipping (PPO + ptx) |
    | `grad_norm/ppo`, `grad_norm/ptx` | its two parts: policy (with a value head, + vf_coef * value); ptx_coef * LM |
    | `grad_norm/value` | gradient of vf_coef * value in the value function, before clipping |
    """

    _tag_names = ["trl", "prefopt", "ppo-ptx"]  # noqa: RUF012  (TRL's class attribute)
    _name = "PPO-ptx"
    _paper = {  # noqa: RUF012
        "title": "Training language models to follow instructions with human feedback",
        "id": "2203.02155",
        "citation": textwrap.dedent("""\
            @inproceedings{ouyang2022training,
                title        = {{Training language models to follow instructions with human feedback}},
                author       = {Long Ouyang and Jeffrey Wu and Xu Jiang and Diogo Almeida and Carroll Wainwright and Pamela Mishkin and Chong Zhang and Sandhini Agarwal and Katarina Slama and Alex Ray and others},
                booktitle    = {Advances in Neural Information Processing Systems},
                year         = 2022,
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: str | RewardModel | Callable[..., list] | list,
        args: PPOPtxConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        pretrain_dataset: Dataset | None = None,
        value_model: RewardModel | str | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = PPOPtxConfig(f"{os.path.basename(name) or 'model'}-PPO-ptx")
        if not isinstance(args, PPOPtxConfig):
            raise TypeError(f"args: expected PPOPtxConfig, got {type(args).__name__}")
        if args.ptx_coef > 0 and pretrain_dataset is None:
            raise ValueError("ptx_coef > 0 needs pretrain_dataset; for plain PPO set ptx_coef=0")
        check_prompts(train_dataset, args)
        _check_policy(model)
        self.reward_models: list[RewardModel] = []
        self._prompt_ids: list[list[int]] = []  # of the rollout being scored
        self._scores: Tensor | None = None  # of the rollout being scored
        reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        functions = [self._as_function(reward) for reward in reward_funcs]
        suppressed = suppress_reward_tokens(args, self.reward_models)

        super().__init__(
            model,
            functions,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "DeepSpeed and FSDP are not supported: a step has a backward pass each for policy, value function and "
                "pretraining, and DeepSpeed steps on every one of them; use DDP (accelerate launch --multi_gpu)"
            )
        if self._is_vlm:
            raise ValueError("only text models are supported")
        if self.aux_loss_enabled:
            raise ValueError(
                "mixture-of-experts load balancing is not supported: set router_aux_loss_coef=0.0"
            )

        keep_4bit_gradients(self.model)
        if suppressed:  # the saved policy shall not sample it either
            self.model.config.reward_token_id = suppressed[0]
            self.model.generation_config.suppress_tokens = args.generation_kwargs["suppress_tokens"]
        self._prompt_order = PromptOrder()
        self.add_callback(self._prompt_order)
        for reward_model in self.reward_models:
            check_same_tokenizer(reward_model, self.model, self._tokenizer, "reward model")
            keep_4bit_gradients(reward_model)  # the value function may be a copy of it
            reward_model.to(self.accelerator.device).eval().requires_grad_(False)
        # The KL reference: a copy of the full model, adapter `ref`, or (None) no adapter where a new one is trained.
        self._reference_adapter = None
        if not isinstance(self.model, PeftModel):
            reference = frozen_copy(self.model, self.temperature, args.cast_lm_head_to_fp32)
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        elif peft_config is None:
            self._reference_adapter = add_reference_adapter(self.model)
        self.value_function = self._make_value_function(value_model)
        self.pretraining = None
        if args.ptx_coef > 0:
            longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
            if longest is not None and args.ptx_max_length > longest:
                raise ValueError(
                    f"ptx_max_length={args.ptx_max_length} exceeds the model's {longest} positions"
                )
            with self.accelerator.main_process_first():
                blocks = pack_documents(pretrain_dataset, self._tokenizer, args.ptx_max_length)
            self.pretraining = PretrainingStream(blocks, args.seed)

    # ---- roles ------------------------------------------------------------------------------------------------
    def _as_function(self, reward: Any) -> Callable[..., list]:
        """A reward model becomes a reward function of token ids, so that TRL neither decodes nor wraps it."""
        if isinstance(reward, (str, os.PathLike)):
            reward = load_reward_model(reward)
        if not isinstance(reward, (PreTrainedModel, PeftModel)):
            if not callable(reward):
                raise TypeError(f"reward_funcs: expected functions, reward models or paths, got {reward!r}")
            return reward

        def score(completion_ids: list[list[int]], **columns: Any) -> list[float]:
            return self._score(reward, completion_ids)

        self.reward_models.append(reward)
        count = len(self.reward_models)
        score.__name__ = "reward_model" if count == 1 else f"reward_model_{count}"
        return score

    def _score(self, model: RewardModel, completion_ids: list[list[int]]) -> list[float]:
        """Scores of the rollout's prompts + completions, as sampled: never decoded and tokenised again."""
        sequences = [p + c for p, c in zip(self._prompt_ids, completion_ids, strict=True)]
        size, pad_id = self.args.per_device_train_batch_size, self._tokenizer.pad_token_id
        with self.accelerator.autocast():
            return score_ids(model, sequences, size, pad_id, self.accelerator.device)

    def _make_value_function(self, value_model: RewardModel | str | None) -> ValueFunction:
        if value_model is None:
            value_model = value_model_from(self.reward_models[0]) if self.reward_models else "head"
        if value_model == "head":
            value_function = ValueFunction.on_trunk_of(self.model)
        else:
            if isinstance(value_model, (str, os.PathLike)):
                value_model = value_model_from(load_reward_model(value_model))
            check_same_tokenizer(value_model, self.model, self._tokenizer, "value model")
            value_function = ValueFunction(value_model.train())
            if self.args.disable_dropout:
                disable_dropout_in_model(value_model)
            if self.args.activation_checkpointing:
                value_model.activation_checkpointing_enable(self.args.activation_checkpointing_kwargs)
                if isinstance(value_model, PeftModel):
                    value_model.enable_input_require_grads()
        value_function.module.to(self.accelerator.device)
        return value_function

    # ---- forward passes ---------------------------------------------------------------------------------------
    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple:
        with self.value_function.reading():
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _values(self, ids: Tensor, attention_mask: Tensor, length: int) -> Tensor:
        with self.accelerator.autocast():
            return self.value_function(ids, attention_mask, length)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        self._prompt_order.sampler = super()._get_train_sampler(dataset)
        return self._prompt_order.sampler

    # ---- rollout ----------------------------------------------------------------------------------------------
    def _generate(self, prompts: list) -> tuple:
        generated = super()._generate(prompts)
        self._prompt_ids = generated[0]
        return generated

    def _calculate_rewards(self, inputs: list, *args: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, *args)  # all processes, one column per function
        scores = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        scores[rewards.isnan().all(1)] = torch.nan
        start = self.accelerator.process_index * len(inputs)
        self._scores = scores[start : start + len(inputs)]
        return rewards

    def _generate_and_score_completions(self, inputs: list) -> dict[str, Any]:
        rollout = super()._generate_and_score_completions(inputs)
        mode, args = "train" if self.model.training else "eval", self.args
        ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], 1)
        attention_mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], 1)
        mask = rollout["completion_mask"].bool()
        length = mask.size(1)
        size = args.per_device_train_batch_size if mode == "train" else args.per_device_eval_batch_size

        def logps_of(model: nn.Module) -> Tensor:
            return self._get_per_token_logps_and_entropies(model, ids, attention_mask, length, size)[0]

        with torch.no_grad():
            if "old_per_token_logps" not in rollout:
                rollout["old_per_token_logps"] = logps_of(self.model)
            if self.value_function.is_head:
                values = self._values(ids, attention_mask, length)
            else:
                batches = zip(ids.split(size), attention_mask.split(size), strict=True)
                values = torch.cat([self._values(*batch, length) for batch in batches])
            if self.ref_model is not None:
                ref_logps = logps_of(self.ref_model)
            else:
                with use_adapter(self.accelerator.unwrap_model(self.model), self._reference_adapter):
                    ref_logps = logps_of(self.model)
        logps = rollout["old_per_token_logps"]

        last = rollout["completion_ids"].gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)
        has_eos = torch.isin(last, torch.tensor(self.eos_token_ids, device=last.device))
        is_scored = self._scores.isfinite()
        scores = self._scores.masked_fill(~is_scored, 0.0) - args.missing_eos_penalty * ~has_eos
        counts = mask & is_scored.unsqueeze(1)
        rewards = kl_shaped_rewards(scores, logps, ref_logps, counts, args.kl_coef)
        advantages, returns = gae(rewards, values, counts, args.discount, args.gae_lambda)
        metrics = rollout_metrics(
            scores, is_scored, rewards, logps, ref_logps, mask, values, returns, self._sum_over_processes
        )
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)
        if (self.num_generations if mode == "train" else self.num_generations_eval) == 1:
            self._metrics[mode].pop("frac_reward_zero_std", None)  # of groups of one: always 1
        if args.whiten_advantages:
            advantages = masked_whiten(advantages, counts, self._sum_over_processes)
        self._log_advantages(advantages, counts)
        rollout.update(loss_mask=counts, old_values=values, returns=returns, advantages=advantages)
        return rollout

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs = super()._prepare_inputs(generation_batch)
        if "num_tokens" not in inputs:  # a new rollout, or a batch of evaluation
            size = self.args.gradient_accumulation_steps if self.model.training else 1
            batches = self._buffered_inputs if self.model.training else [inputs]
            for start in range(0, len(batches), size):
                minibatch = batches[start : start + size]
                tokens = self._sum_over_processes(sum(batch["loss_mask"].sum() for batch in minibatch))
                for batch in minibatch:
                    batch["num_tokens"] = tokens
        return inputs

    # ---- optimisation -----------------------------------------------------------------------------------------
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
            value_loss = value_loss_of(self._values(ids, attention_mask, length))
            if value_loss.requires_grad:
                self.accelerator.backward(args.vf_coef * value_loss)
            value_loss = value_loss.detach()
        logps, entropies, _ = self._get_per_token_logps_and_entropies(
            model, ids, attention_mask, length, compute_entropy=True
        )
        if self.value_function.is_head:
            value_loss = value_loss_of(self._values(ids, attention_mask, length))
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
            self.value_function.module.zero_grad()  # Trainer zeroes the policy's alone
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:  # the last micro-batch: the minibatch's gradient is complete
            start = time.perf_counter()
            for parameter in self.value_function.parameters:
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
            metrics = self._metrics["train"]
            metrics["grad_norm/value"].append(_norm(self.value_function.parameters))
            policy_parameters = [p for p in self.model.parameters() if p.requires_grad]
            metrics["grad_norm/ppo"].append(_norm(policy_parameters))
            if self.pretraining is not None:
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
            labels = batch.pop("labels")
            with nullcontext() if number == len(batches) else self.accelerator.no_sync(model):
                loss = lm_loss(model(**batch, use_cache=False).logits, labels, num_tokens / processes)
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
            decayed = self.get_decay_parameter_names(self.value_function.module)
            for is_decayed in (True, False):
                named = self.value_function.module.named_parameters()
                group = {
                    "params": [p for n, p in named if p.requires_grad and (n in decayed) == is_decayed],
                    "lr": self.args.value_learning_rate,
                    "weight_decay": self.args.weight_decay if is_decayed else 0.0,
                }
                optimizer.add_param_group(group)
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        self.accelerator.clip_grad_norm_(self.value_function.parameters, self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    # ---- logging ----------------------------------------------------------------------------------------------
    def _sum_over_processes(self, x: Tensor) -> Tensor:
        return self.accelerator.reduce(x, "sum")

    def _log_advantages(self, advantages: Tensor, counts: Tensor) -> None:
        """Replace TRL's group advantages in its table of completions by the mean over each completion's tokens."""
        rows = advantages.sum(1) / counts.sum(1).clamp(min=1)
        logged = self._logs["advantages"]
        rows = self.accelerator.gather(rows).tolist()
        for _ in range(min(len(rows), len(logged))):
            logged.pop()
        logged.extend(rows)

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

    # ---- checkpoints ------------------------------------------------------------------------------------------
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            folder = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            os.makedirs(folder, exist_ok=True)
            position = self.pretraining.position if self.pretraining else 0
            with open(os.path.join(folder, STATE_FILE), "w") as file:
                json.dump({"pretraining_sequences": position}, file)
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy as a plain model or adapter, and the value function's trained weights beside it."""
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            os.makedirs(folder, exist_ok=True)
            self.value_function.save(folder)
        super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.value_function.load(resume_from_checkpoint)
        if self.pretraining is not None:
            with open(os.path.join(resume_from_checkpoint, STATE_FILE)) as file:
                self.pretraining.position = json.load(file)["pretraining_sequences"]

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.value_function.load(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        # TRL restarts at 0, which would put rollouts out of phase with the prompts
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        steps_per_rollout = self.args.steps_per_generation * self.num_iterations
        if self._step % steps_per_rollout:
            logger.warning(
                "%s lies inside a rollout, which is not saved: it is drawn anew by the current policy, so this run will "
                "differ from one without a break; a multiple of %d for save_steps resumes exactly",
                checkpoint,
                steps_per_rollout // self.args.gradient_accumulation_steps,
            )


def _check_policy(model: str | PreTrainedModel | PeftModel) -> None:
    if isinstance(model, str):
        if os.path.isfile(os.path.join(model, "adapter_config.json")):
            raise ValueError(
                f"{model} is an adapter: pass peft.AutoPeftModelForCausalLM.from_pretrained(..., is_trainable=True)"
            )
        return
    if isinstance(model, PeftModel) and model.active_adapters != ["default"]:
        raise ValueError(f"the policy adapter must be called 'default', got {model.active_adapters}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the policy has no trainable parameter; load a PEFT model with is_trainable=True")


def _norm(parameters: list[nn.Parameter]) -> float:
    return get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
