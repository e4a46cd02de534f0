"""PPO and PPO-ptx (InstructGPT, arXiv:2203.02155, section 3.5 and Eq. 2) on TRL's rollouts."""

from prefopt.trainers.shared.trl_contract import require_seams

# Before anything of TRL's inside is imported, so that a name that has moved is refused in a sentence.
require_seams("PPOPtxTrainer")

# isort: split
import functools
import inspect
import json
import os
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from numbers import Real
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import Sampler
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl import GRPOTrainer

from prefopt.errors import UserError, UserTypeError
from prefopt.inference.generate import plain_generation, prompt_ids
from prefopt.inference.scoring import score_ids
from prefopt.losses.kl_control import KLController, RunningStatistics
from prefopt.models.checkpoints import check_reward_model, leave_pad_unread, load_reward_model
from prefopt.models.loading import check_policy
from prefopt.models.passes import check_rows, loaded_from, max_positions, stop_randomness
from prefopt.models.reward import checkpoint_activations, keep_4bit_gradients, value_model_from
from prefopt.models.roles import AdapterScorer, trainable_copy
from prefopt.rankings.tokens import prompts_as_read, template_kwargs
from prefopt.trainers.ppo_ptx.config import ELSEWHERE, PAGE, PPOPtxConfig
from prefopt.trainers.ppo_ptx.engine import policy_engine, sends_adapter
from prefopt.trainers.ppo_ptx.episodes import Roles, ppo_loss
from prefopt.trainers.ppo_ptx.roles import (
    ValueFunction,
    add_reference_adapter,
    add_untempered_head,
    check_same_tokenizer,
    frozen_copy,
    load_reward_role,
    suppress_reward_tokens,
)
from prefopt.trainers.ppo_ptx.rollout import (
    OF_REWARD_FUNCTIONS,
    PromptOrder,
    Rollouts,
    Sampled,
    base_kept,
    check_prompts,
    check_vllm,
    divided_anew,
    merged,
)
from prefopt.trainers.ppo_ptx.sharding import (
    check_fsdp,
    loaded_apart,
    look_up_again,
    prepared_reference,
    saved_apart,
)
from prefopt.trainers.ppo_ptx.step import add_value_groups, clip_gradient, complete_gradient, warm_up_from
from prefopt.trainers.ppo_ptx.watch import TrainingWatch
from prefopt.trainers.shared.arguments import arguments_of, refuse_unknown, set_in
from prefopt.trainers.shared.averaging import WeightAverage
from prefopt.trainers.shared.cards import PublishingMixin
from prefopt.trainers.shared.checkpoints import CompleteCheckpointsMixin
from prefopt.trainers.shared.learning_rates import DefaultRates
from prefopt.trainers.shared.precision import refuse_several_devices, trainable_weights, undo_rounding
from prefopt.trainers.shared.pretraining import Pretraining

logger = get_logger(__name__)

STATE_FILE = "ppo_ptx_state.json"
ROLLOUT_FILE = "rollout_{process}.pt"
AVERAGE_FOLDER = "ema"

# Attributes of the trainer that change while it trains and are neither weights nor Trainer's own.
STATEFUL = ("kl_controller", "score_statistics")

RewardModel = PreTrainedModel | PeftModel


class PPOPtxTrainer(CompleteCheckpointsMixin, PublishingMixin, GRPOTrainer):
    """PPO with a value function, the KL penalty in the reward, and pretraining gradients in the same step.

    Each optimizer step minimizes, over one minibatch of episodes and its share of pretraining text,

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
        pretrain_dataset: rows `{"text"}` or `{"input_ids"}`; required unless `ptx_coef=0`. A stream is read as needed.
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
    | `objective/kl` | KL per episode in nats: sum over its tokens of what `kl_estimator` estimates |
    | `objective/rewards` | scores - kl_coef * KL per episode: what PPO maximizes |
    | `objective/kl_coef` | coefficient of the KL in this rollout; adapted between rollouts with `kl_target` |
    | `objective/unscored` | episodes of a rollout without a usable reward: in no loss, in no whitening |
    | `value/explained_variance` | 1 - Var(returns - values) / Var(returns), at the rollout |
    | `loss/policy`, `loss/value`, `loss/ptx` | terms of L before their coefficients |
    | `grad_norm` | gradient of the policy before clipping (PPO + ptx) |
    | `grad_norm/ppo`, `grad_norm/ptx` | its two parts: policy (with a value head, + vf_coef * value); ptx_coef * LM |
    | `grad_norm/value` | gradient of vf_coef * value in the value function, before clipping |

    Beside Trainer's files (policy, optimizer, schedule, state, random numbers of every process) a checkpoint holds

    | file | content |
    |---|---|
    | `value_function.safetensors` | the value function's trained weights |
    | `weight_average.safetensors` | the average of the policy's, with `ema_decay` |
    | `ppo_ptx_state.json` | position in the pretraining text, KL coefficient, score statistics, metrics not yet logged |
    | `rollout_P.pt` | the episodes of process P, if the checkpoint lies inside a rollout: they are not drawn again |
    """

    _tag_names = ["trl", "prefopt", "ppo-ptx"]  # noqa: RUF012  (TRL's class attribute)
    _name = "PPO-ptx"
    _builds_on = ("Proximal Policy Optimization Algorithms", "1707.06347")
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
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        pretrain_dataset: Dataset | IterableDataset | None = None,
        value_model: RewardModel | str | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        **unknown: Any,
    ) -> None:
        elsewhere = {**set_in(PPOPtxConfig), **ELSEWHERE}
        refuse_unknown(type(self).__name__, unknown, arguments_of(PPOPtxTrainer), elsewhere, PAGE)
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = PPOPtxConfig(f"{os.path.basename(name) or 'model'}-PPO-ptx")
        if not isinstance(args, PPOPtxConfig):
            raise UserTypeError(f"args: expected PPOPtxConfig, got {type(args).__name__}")
        if args.ptx_coef > 0 and pretrain_dataset is None:
            raise UserError("ptx_coef > 0 needs pretrain_dataset; for plain PPO set ptx_coef=0")
        check_prompts(train_dataset, args)
        _check_policy(model)
        # Paths until the policy, whose base they may share, is there.
        self.reward_models: list[Any] = []
        self._sampled = Sampled()
        # What the rows of this rollout give the chat template.
        self._of_rows: list[dict[str, Any]] = []
        reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        functions = [self._as_function(reward) for reward in reward_funcs]
        suppressed = suppress_reward_tokens(args, self.reward_models)
        original = trainable_weights(model)
        by_adapter = sends_adapter(model, args.vllm_enable_sleep_mode, peft_config)
        check_vllm(args, model, quantization_config, suppressed, by_adapter)

        with policy_engine(args.output_dir):
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
        if self.is_deepspeed_enabled:
            raise UserError(
                "DeepSpeed is not supported: a step has a backward pass each for policy, value function and "
                "pretraining, and DeepSpeed steps on every one of them; use DDP or FSDP2"
            )
        if self.is_fsdp_enabled:
            check_fsdp(self.accelerator.state.fsdp_plugin, args)
        if self._is_vlm:
            raise UserError("only text models are supported")
        refuse_several_devices(self.model)
        if self.aux_loss_enabled:
            raise UserError("mixture-of-experts load balancing is not supported: set router_aux_loss_coef=0.0")

        # Again, for a policy that was a path.
        check_vllm(args, self.model, None, [], by_adapter)
        if args.use_vllm:
            self.vllm_generation.end_at(self.eos_token_ids)
        keep_4bit_gradients(self.model)
        undo_rounding(self.model, original)
        check_rows(self.model)
        self._positions = max_positions(self.model.config)
        if args.disable_dropout:
            stop_randomness(self.model)
        # The saved policy shall not sample it either.
        if suppressed:
            self.model.config.reward_token_id = suppressed[0]
            self.model.generation_config.suppress_tokens = args.generation_kwargs["suppress_tokens"]
        self.kl_controller = KLController(args.kl_coef, args.kl_target, args.kl_horizon)
        self.score_statistics = RunningStatistics()
        self._prompt_order = PromptOrder()
        self.add_callback(self._prompt_order)
        self.add_callback(TrainingWatch())
        self.add_callback(DefaultRates())
        for number, reward_model in enumerate(self.reward_models, start=1):
            if isinstance(reward_model, str):
                adapter = "reward" if number == 1 else f"reward_{number}"
                reward_model = load_reward_role(reward_model, self.model, adapter)
                self.reward_models[number - 1] = reward_model
            else:
                check_rows(reward_model)
                if not hasattr(reward_model.config, "unread_token_id"):
                    # Neither loaded nor trained by prefopt.
                    leave_pad_unread(reward_model)
            check_same_tokenizer(reward_model, self.model, self._tokenizer, "reward model")
            # The value function may be a copy of it.
            keep_4bit_gradients(reward_model)
            reward_model.to(self.accelerator.device).eval().requires_grad_(False)
        # The KL reference: a copy of the full model, adapter `ref`, or (None) no adapter where a new one is trained.
        reference = None
        if not isinstance(self.model, PeftModel):
            reference = frozen_copy(self.model, self.temperature, args.cast_lm_head_to_fp32)
            reference = self.ref_model = prepared_reference(reference, self.accelerator)
        elif peft_config is None:
            reference = add_reference_adapter(self.model)
        self.value_function = self._make_value_function(value_model)
        self.roles = Roles(
            self.model,
            reference,
            self.value_function,
            self.accelerator,
            self.temperature,
            args.cast_lm_head_to_fp32,
            self.pad_to_multiple_of,
            has_dropout=not args.disable_dropout,
            # Continuous batching has an attention of its own.
            shares_prefixes=args.prefix_sharing
            and args.num_generations > 1
            and not args.use_transformers_continuous_batching
            and not self.is_fsdp_enabled,
            shares_trunk=not self.is_fsdp_enabled,
        )
        self._rollouts = Rollouts(
            self.roles,
            args,
            self.accelerator,
            self.eos_token_ids,
            self.kl_controller,
            self.score_statistics,
        )
        self._rollouts.fits_values = args.fit_value_head and value_model is None
        self.weight_average = None
        if args.ema_decay is not None:
            values = {id(p) for p in self.value_function.parameters}
            policy = {n: p for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in values}
            self.weight_average = WeightAverage(policy, args.ema_decay)
            self.add_callback(self.weight_average)
        self.pretraining = None
        if args.ptx_coef > 0:
            has_temperature = self.temperature != 1
            self.pretraining = Pretraining(
                pretrain_dataset, self.model, self._tokenizer, args, self.accelerator, has_temperature
            )
            if has_temperature:
                add_untempered_head(self.model, args.cast_lm_head_to_fp32)

    # ---- roles ------------------------------------------------------------------------------------------------
    def _as_function(self, reward: Any) -> Callable[..., list]:
        """A reward model becomes a reward function of token ids, so that TRL neither decodes nor wraps it."""
        if isinstance(reward, (str, os.PathLike)):
            reward = os.fspath(reward)
            check_reward_model(reward)
        elif not isinstance(reward, (PreTrainedModel, PeftModel)):
            if not callable(reward):
                raise UserTypeError(f"reward_funcs: expected functions, reward models or paths, got {reward!r}")
            return _returning_scores(reward)

        number = len(self.reward_models)

        def score(completion_ids: list[list[int]], **columns: Any) -> list[float]:
            return self._score(self.reward_models[number], completion_ids)

        self.reward_models.append(reward)
        count = len(self.reward_models)
        score.__name__ = "reward_model" if count == 1 else f"reward_model_{count}"
        return score

    def _score(self, model: RewardModel, completion_ids: list[list[int]]) -> list[float]:
        """Scores of the rollout's prompts + completions, as sampled: never decoded and tokenized again."""
        sequences = [p + c for p, c in zip(self._sampled.prompt_ids, completion_ids, strict=True)]
        size, prompts = self.args.per_device_train_batch_size, None
        if self.roles.shares_prefixes:
            prompts = [number for number, (_, same) in enumerate(groupby(self._sampled.prompt_ids)) for _ in same]
        # A reward model may share the policy's base, whose dropout is not its own.
        was_training = self.model.training
        self.model.eval()
        try:
            with self.accelerator.autocast():
                return score_ids(model, sequences, size, prompts, device=self.accelerator.device)
        finally:
            self.model.train(was_training)

    def _make_value_function(self, value_model: RewardModel | str | None) -> ValueFunction:
        if value_model is None:
            value_model = self._value_model_from_reward() if self.reward_models else "head"
        elif isinstance(value_model, nn.Module):
            check_rows(value_model)
        if value_model == "head":
            value_function = ValueFunction.on_trunk_of(self.model)
        else:
            if isinstance(value_model, (str, os.PathLike)):
                value_model = value_model_from(load_reward_model(value_model))
            check_same_tokenizer(value_model, self.model, self._tokenizer, "value model")
            value_function = ValueFunction(value_model.train())
            # The settings of a shared base are the policy's.
            if isinstance(value_model, AdapterScorer):
                value_function.module.to(self.accelerator.device)
                return value_function
            if self.args.disable_dropout:
                stop_randomness(value_model)
            if self.args.gradient_checkpointing:
                checkpoint_activations(value_model, self.args.gradient_checkpointing_kwargs)
                if isinstance(value_model, PeftModel):
                    value_model.enable_input_require_grads()
        value_function.module.to(self.accelerator.device)
        return value_function

    def _value_model_from_reward(self) -> nn.Module:
        reward_model = self.reward_models[0]
        if isinstance(reward_model, AdapterScorer):
            return trainable_copy(reward_model)
        return value_model_from(reward_model)

    # ---- the rollout ------------------------------------------------------------------------------------------
    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        self._prompt_order.sampler = super()._get_train_sampler(dataset)
        return self._prompt_order.sampler

    def _generate(self, prompts: list) -> tuple:
        was_training = self.model.training
        is_sent = self.use_vllm and self.state.global_step != self._last_loaded_step
        kept = base_kept(self.model) if is_sent and not self.vllm_generation.by_adapter else nullcontext()
        if isinstance(self.model, PeftModel) and not self.use_vllm:
            kept = merged(self.model)
        # Of the settings of TRL's own config, which names the end tokens, and of none in the checkpoint's.
        with plain_generation(self.model), kept:
            try:
                generated = super()._generate(prompts_as_read(self.processing_class, prompts))
            except RuntimeError as error:
                if "probability tensor contains" not in str(error):
                    raise
                place = (
                    f"step {self.state.global_step + 1}: the policy's logits are not finite{loaded_from(self.model)}"
                )
                raise UserError(f"{place}: its weights are broken (NaN), or temperature is too small") from error
        # TRL leaves the model in training mode after continuous batching.
        self.model.train(was_training)
        if len(generated[1]) != len(prompts):
            raise RuntimeError(f"generation gave {len(generated[1])} completions for {len(prompts)} prompts")
        self._sampled = Sampled(prompt_ids=generated[0])
        return generated

    def _calculate_rewards(self, inputs: list, *args: Any) -> Tensor:
        inputs = [{name: value for name, value in row.items() if name not in OF_REWARD_FUNCTIONS} for row in inputs]
        # Of all processes, one column per function.
        rewards = super()._calculate_rewards(inputs, *args)
        scores = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        scores[rewards.isnan().all(1)] = torch.nan
        start = self.accelerator.process_index * len(inputs)
        self._sampled.scores = scores[start : start + len(inputs)]
        return rewards

    def _tokenize_prompts(self, prompts: list) -> tuple:
        """Each prompt with the `tools` and `chat_template_kwargs` of its row, as reward models and DPO read it."""
        if any(self._of_rows):
            settings = [{**self.chat_template_kwargs, **of_row} for of_row in self._of_rows]
            pairs = zip(prompts, settings, strict=True)
            tokenized = [prompt_ids(self.processing_class, prompt, **kwargs) for prompt, kwargs in pairs], None, {}
        else:
            tokenized = super()._tokenize_prompts(prompts)
        positions, room = self._positions, self.args.max_completion_length or 0
        longest = max(map(len, tokenized[0]))
        if positions is not None and longest + room > positions:
            raise UserError(
                f"a prompt of {longest} tokens and max_completion_length={room} are more than the {positions} tokens that "
                "the model reads; lower max_completion_length or leave out the longest prompts"
            )
        return tokenized

    def _generate_and_score_completions(self, inputs: list) -> dict[str, Any]:
        self._of_rows = [{} if isinstance(row["prompt"], str) else template_kwargs(row) for row in inputs]
        rollout = super()._generate_and_score_completions(inputs)
        is_training = self.model.training
        logged = self._metrics["train" if is_training else "eval"]
        for name, value in self._rollouts.complete(rollout, self._sampled, is_training).items():
            logged[name].append(value)
        if self.use_vllm:
            drawn_by, mask = rollout["sampling_per_token_logps"], rollout["completion_mask"].bool()
            self.vllm_generation.check_base(rollout["old_per_token_logps"], drawn_by, mask)
        # With what it keeps of the trunk.
        self._sampled.episodes = None
        # Of groups of one it is always 1.
        if (self.num_generations if is_training else self.num_generations_eval) == 1:
            logged.pop("frac_reward_zero_std", None)
        self._log_advantages(rollout["advantages"], rollout["loss_mask"])
        return rollout

    def _log_advantages(self, advantages: Tensor, counts: Tensor) -> None:
        """Replace TRL's group advantages in its table of completions by the mean over each completion's tokens."""
        rows = advantages.sum(1) / counts.sum(1).clamp(min=1)
        table = self._logs["advantages"]
        rows = self.accelerator.gather(rows).tolist()
        for _ in range(min(len(rows), len(table))):
            table.pop()
        table.extend(rows)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **not_of_text: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        sampled = self._sampled
        sampled.episodes = self.roles.episodes(input_ids, attention_mask, logits_to_keep, batch_size)
        sampled.of_policy = self.roles.logps(model, sampled.episodes, compute_entropy)
        return sampled.of_policy.logps, sampled.of_policy.entropies, None

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        is_training, minibatch = self.model.training, self.args.gradient_accumulation_steps
        has_groups = self.num_generations > 1
        is_new_epoch = is_training and self._step % self.args.steps_per_generation == 0
        if is_new_epoch and self._is_inside_rollout and self._buffered_inputs is not None:
            self._buffered_inputs = divided_anew(self._buffered_inputs, minibatch, has_groups=has_groups)
        inputs = super()._prepare_inputs(generation_batch)
        # A new rollout, whose rows TRL has shuffled one by one, or a batch of evaluation.
        if "num_tokens" not in inputs:
            batches = self._buffered_inputs if is_training else [inputs]
            if is_training and (has_groups or minibatch > 1):
                batches = divided_anew(batches, minibatch, is_shuffled=has_groups, has_groups=has_groups)
                self._buffered_inputs, inputs = batches, batches[self._step % self.args.steps_per_generation]
            self._rollouts.count_tokens(batches, minibatch if is_training else 1)
        return inputs

    # ---- the step ---------------------------------------------------------------------------------------------
    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        loss, parts = ppo_loss(model, inputs, self.roles, self.args, self.accelerator)
        is_training = self.model.training
        means = self.accelerator.reduce(torch.stack([x.float() for x in parts.values()]), "mean")
        # TRL averages what the micro-batches append; these are parts of a sum.
        scale = self.args.gradient_accumulation_steps if is_training else 1
        for name, value in zip(parts, means.tolist(), strict=True):
            self._metrics["train" if is_training else "eval"][name].append(value * scale)
        return loss

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        # Trainer zeroes the gradients of the policy alone.
        if self._step % self.args.gradient_accumulation_steps == 0:
            for parameter in self.value_function.parameters:
                parameter.grad = None
        loss = super().training_step(model, inputs, num_items_in_batch)
        # Synchronized with the last micro-batch: PPO's part of the minibatch's gradient is complete.
        if self.accelerator.sync_gradients:
            start = time.perf_counter()
            add_text = None
            if self.pretraining is not None:
                add_text = functools.partial(self.pretraining.add_to_gradient, model)
            ptx_loss, metrics = complete_gradient(
                [p for p in self.model.parameters() if p.requires_grad],
                self.value_function.parameters,
                add_text,
                self.state.global_step < self.args.value_warmup_steps,
                self.accelerator,
            )
            for name, value in metrics.items():
                self._metrics["train"][name].append(value)
            self._metrics["train"]["step_time"][-1] += time.perf_counter() - start
            if ptx_loss is not None:
                loss = loss + ptx_loss
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        values = self.value_function.parameters
        clip_gradient(values, self.args.max_grad_norm)
        # Set aside: the value adapter on the policy's base is among the model's parameters, but clipped by itself.
        gradients = [parameter.grad for parameter in values]
        for parameter in values:
            parameter.grad = None
        norm = super()._clip_grad_norm(model)
        for parameter, gradient in zip(values, gradients, strict=True):
            parameter.grad = gradient
        return norm

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Trainer's schedule, whose warm-up starts at `warmup_start_ratio` of the peak instead of 0, for all groups.

        Those of the value function, at `value_learning_rate`, join Trainer's groups here: accelerate has sharded the policy.
        """
        look_up_again(self.model, self.value_function, self.weight_average)
        values, args = self.value_function.parameters, self.args
        add_value_groups(self.optimizer, values, args.value_learning_rate, args.weight_decay)
        is_given = self.lr_scheduler is not None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if not is_given and isinstance(scheduler, LambdaLR):
            warmup_steps = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = warm_up_from(scheduler, self.args.warmup_start_ratio, warmup_steps)
        return self.lr_scheduler

    # ---- checkpoints ------------------------------------------------------------------------------------------
    def _add_to_checkpoint(self, folder: str) -> None:
        if self.args.should_save:
            state = {
                "pretraining_sequences": self.pretraining.position if self.pretraining else 0,
                "rollout": self._rollout_layout,
            }
            state |= {name: getattr(self, name).state_dict() for name in STATEFUL}
            with open(os.path.join(folder, STATE_FILE), "w") as file:
                json.dump(state, file)
        if self._is_inside_rollout and not self.args.save_only_model:
            torch.save(self._buffered_inputs, os.path.join(folder, self._rollout_file))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        values = self.value_function.named_parameters
        with saved_apart(self.model, self.optimizer, values, output_dir, self.args.should_save):
            super()._save_optimizer_and_scheduler(output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy as a plain model or adapter, and the value function's trained weights next to it.

        With `ema_decay`, the policy with averaged weights is saved to the subfolder `ema/`, to be loaded by itself.
        """
        folder = output_dir or self.args.output_dir
        is_writer = self.args.should_save
        if is_writer:
            os.makedirs(folder, exist_ok=True)
        self.value_function.save(folder, is_writer)
        if self.weight_average is not None:
            if not _internal_call:
                with self.averaged_weights():
                    super().save_model(os.path.join(folder, AVERAGE_FOLDER), _internal_call=True)
            else:
                self.weight_average.save(folder, is_writer)
        super().save_model(output_dir, _internal_call)
        # Next to the adapter: the policy must never sample that token.
        config = self.model.config
        if is_writer and is_peft_model(self.model) and getattr(config, "reward_token_id", None) is not None:
            config.save_pretrained(folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        roles = [*self.reward_models, self.value_function.module]
        for role in roles if self.args.should_save else ():
            # With its head, over what PEFT has written of the adapter.
            if isinstance(role, AdapterScorer):
                role.save_pretrained(os.path.join(output_dir or self.args.output_dir, role.adapter), state_dict)

    def _card_data(self) -> dict[str, Any]:
        data = super()._card_data()
        names = [os.path.basename(model.config.name_or_path.rstrip("/")) for model in self.reward_models]
        functions = [name for name in self.reward_func_names if not name.startswith("reward_model")]
        data["reward"] = ", ".join(name for name in [*names, *functions] if name)
        data["episodes per optimizer step"] = data.pop("rows per optimizer step")
        return data

    def _card_facts(self) -> dict[str, Any]:
        facts = super()._card_facts()
        if self.args.ptx_coef == 0:
            facts["method"] = "PPO"
            facts["summary"] = "PPO with a value function and the KL penalty in the reward."
            facts["tags"] = ["ppo" if tag == "ppo-ptx" else tag for tag in facts["tags"]]
        if len(self.reward_funcs) == 1:
            facts["hyperparameters"].pop("reward_weights", None)
        return facts

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Inside this context the policy has its averaged weights: `with trainer.averaged_weights(): ...evaluate()`.

        Raises ValueError without `ema_decay`.
        """
        if self.weight_average is None:
            raise UserError("there are no averaged weights: set ema_decay (InstructGPT: 0.992)")
        return self._averaged()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        try:
            with self.weight_average.swapped_in():
                # TRL sends vLLM the weights once for each step: these are others.
                self._last_loaded_step = -1
                yield
        finally:
            self._last_loaded_step = -1

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_own_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_own_weights(self.state.best_model_checkpoint)

    def _load_own_weights(self, checkpoint: str) -> None:
        self.value_function.load(checkpoint)
        if self.weight_average is not None:
            self.weight_average.load(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with loaded_apart(self.model, self.optimizer, self.value_function.named_parameters, checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, STATE_FILE)
        try:
            with open(path) as file:
                state = json.load(file)
            missing = {"pretraining_sequences", "rollout", *STATEFUL} - state.keys()
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"resume_from_checkpoint: {path} is damaged ({error}); name another checkpoint") from error
        if missing:
            raise UserError(f"resume_from_checkpoint: {path} lacks {min(missing)}; name another checkpoint")
        if self.pretraining is not None:
            self.pretraining.go_to(state["pretraining_sequences"], checkpoint)
        self._rollouts.fits_values = False
        for name in STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        # TRL restarts at 0, which would put rollouts out of phase with the prompts.
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        self._buffered_inputs = None
        if not self._is_inside_rollout:
            return
        path = os.path.join(checkpoint, self._rollout_file)
        if state["rollout"] == self._rollout_layout and os.path.isfile(path):
            # With several processes "cpu:0", which torch.load does not know.
            device = self.accelerator.device
            device = "cpu" if device.type == "cpu" else device
            self._buffered_inputs = torch.load(path, map_location=device, weights_only=True)
        else:
            logger.warning(
                "%s lies inside a rollout that was divided otherwise (%s; now %s): it is drawn anew by the current "
                "policy, so this run will differ from one without a break",
                checkpoint,
                state["rollout"],
                self._rollout_layout,
            )

    @property
    def _rollout_file(self) -> str:
        return ROLLOUT_FILE.format(process=self.accelerator.process_index)

    @property
    def _rollout_layout(self) -> dict[str, int]:
        return {
            "processes": self.accelerator.num_processes,
            "per_device_train_batch_size": self.args.per_device_train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "steps_per_generation": self.args.steps_per_generation,
            "num_iterations": self.num_iterations,
        }

    @property
    def _is_inside_rollout(self) -> bool:
        steps_per_rollout = self.args.steps_per_generation * self.num_iterations
        return self._step % steps_per_rollout != 0


def _returning_scores(reward: Callable) -> Callable:
    """The reward function, named where it returns no score per completion; one that is awaited is left to TRL."""
    if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__):
        return reward

    @functools.wraps(reward)
    def scores(completions: list, **columns: Any) -> list:
        name = f"reward function {getattr(reward, '__name__', reward)!r}"
        try:
            inspect.signature(reward).bind(completions=completions, **columns)
        except TypeError as error:
            raise UserTypeError(
                f"{name} is called with lists completions=, {'=, '.join(columns)}=, which it does not take ({error}); "
                "end its arguments with **kwargs"
            ) from error
        returned = reward(completions=completions, **columns)
        if returned is None:
            raise UserError(
                f"{name} returned None; expected a list with a score, or None, for each completion: does it end without "
                "`return`?"
            )
        is_list = (
            isinstance(returned, Iterable) and not isinstance(returned, str) and getattr(returned, "ndim", 1) == 1
        )
        of_each = list(returned) if is_list else [returned]
        if not is_list or not all(one is None or isinstance(one, Real | Tensor) for one in of_each):
            raise UserTypeError(
                f"{name} returned {returned!r:.80}; expected a list with a number, or None, for each completion"
            )
        if len(of_each) != len(completions):
            raise UserError(f"{name} returned {len(of_each)} scores for {len(completions)} completions")
        return of_each

    return scores


def _check_policy(model: str | PreTrainedModel | PeftModel) -> None:
    if isinstance(model, str) and os.path.isfile(os.path.join(model, "adapter_config.json")):
        raise UserError(
            f"{model} is an adapter: pass peft.AutoPeftModelForCausalLM.from_pretrained(..., is_trainable=True)"
        )
    check_policy(model)
    if isinstance(model, str):
        return
    if isinstance(model, PeftModel) and model.active_adapters != ["default"]:
        raise UserError(f"the policy adapter must be called 'default', got {model.active_adapters}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("the policy has no trainable parameter; load a PEFT model with is_trainable=True")
