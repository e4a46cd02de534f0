"""The rollout of PPO-ptx: scores, log-probabilities, values, and from them KL, rewards and advantages of each token."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerState
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict, use_adapter

from prefopt.errors import UserError
from prefopt.losses.advantages import clip_scores, full_kl, gae, k1, k3, kl_shaped_rewards, masked_whiten
from prefopt.models.heads import fp32_output, last_mlp_at, token_logps
from prefopt.rankings.tokens import without_nulls_in_calls
from prefopt.trainers.ppo_ptx.config import PPOPtxConfig

logger = get_logger(__name__)

KL_POSITIONS = 1024  # the exact KL needs all logits, of two models; of this many tokens at a time


def check_prompts(train_dataset: Dataset | IterableDataset | None, args: PPOPtxConfig) -> None:
    """Refuse prompts that cannot fill a rollout, and count those that an epoch leaves out."""
    if isinstance(train_dataset, IterableDataset):
        raise UserError(
            "train_dataset: prompts cannot be a stream, because an epoch is divided into rollouts and a resumed run goes "
            "on in its order; load them without streaming (pretrain_dataset can be a stream)"
        )
    if not isinstance(train_dataset, Dataset):
        return
    if "prompt" not in train_dataset.column_names:
        raise UserError(f"train_dataset: expected a column 'prompt', got {train_dataset.column_names}")
    per_rollout = args.generation_batch_size // args.num_generations
    if len(train_dataset) < per_rollout:
        raise UserError(
            f"train_dataset has {len(train_dataset)} prompts, fewer than the {per_rollout} of one rollout "
            "(generation_batch_size / num_generations): lower the batch settings or add prompts"
        )
    if left := len(train_dataset) % per_rollout:
        logger.warning(
            "%d of %d prompts are left out of each epoch: a rollout takes %d, and no part of one is run",
            left,
            len(train_dataset),
            per_rollout,
        )


class PromptOrder(TrainerCallback):
    """Seeds the order of the prompts by epoch: TRL's sampler would begin a resumed run with its first order again."""

    sampler: Sampler | None = None

    def on_epoch_begin(self, args: PPOPtxConfig, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.sampler is not None and args.shuffle_dataset:
            self.sampler.generator.manual_seed(args.seed + int(state.epoch or 0))


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


class RolloutMixin:
    """The part of `PPOPtxTrainer` that turns prompts into episodes with an advantage and a return for each token."""

    # ---- forward passes ---------------------------------------------------------------------------------------
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
        """TRL's, for text, without the LM head's work on prompts and without the padding that ends all rows."""
        size, logps, entropies = batch_size or len(input_ids), [], []
        with self.value_function.reading(), self.accelerator.autocast():
            for batch in zip(input_ids.split(size), attention_mask.split(size), strict=True):
                padding = self._common_padding(batch[1])
                ids, mask = (x[:, : x.size(1) - padding] for x in batch)
                length = logits_to_keep - padding
                with last_mlp_at(model, ids.size(1) - length - 1, ids.size(1) - 1):
                    of_batch = token_logps(
                        model,
                        ids,
                        mask,
                        length,
                        temperature=self.temperature,
                        cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32,
                        compute_entropy=compute_entropy,
                    )
                logps.append(F.pad(of_batch[0], (0, padding)))
                if compute_entropy:
                    entropies.append(F.pad(of_batch[1], (0, padding)))
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None

    def _values(self, ids: Tensor, attention_mask: Tensor, length: int, size: int | None = None) -> Tensor:
        """Values `[B, length]`, with a head those of the last forward passes; else `size` rows are forwarded at a time."""
        if self.value_function.is_head:
            return self.value_function(ids, attention_mask, length)
        values = []
        with self.accelerator.autocast(), self.value_function.active():
            for batch in zip(
                ids.split(size or len(ids)), attention_mask.split(size or len(ids)), strict=True
            ):
                padding = self._common_padding(batch[1])
                x, mask = (x[:, : x.size(1) - padding] for x in batch)
                with last_mlp_at(self.value_function.module, x.size(1) - length + padding - 1, x.size(1) - 1):
                    of_batch = self.value_function(x, mask, length - padding)
                values.append(F.pad(of_batch, (0, padding)))
        return torch.cat(values)

    def _common_padding(self, attention_mask: Tensor) -> int:
        """Columns at the end that are padding in every row: a rollout is padded to its longest episode."""
        padding = attention_mask.size(1) - 1 - int(attention_mask.any(0).nonzero().max())
        return padding - padding % (self.pad_to_multiple_of or 1)

    @contextmanager
    def _reference(self) -> Iterator[nn.Module]:
        """The KL reference: a model of its own, or the policy with another adapter or none."""
        if self.ref_model is not None:
            yield self.ref_model
        else:
            with use_adapter(self.accelerator.unwrap_model(self.model), self._reference_adapter):
                yield self.model

    def _full_kl(self, ids: Tensor, attention_mask: Tensor, length: int) -> Tensor:
        """KL divergence `[B, length]` at each completion token, exact; the logits of few rows exist at a time."""
        rows, kl = max(1, KL_POSITIONS // length), []
        for batch in zip(ids.split(rows), attention_mask.split(rows), strict=True):
            logits = self._logits(self.model, *batch, length)
            with self._reference() as reference:
                kl.append(full_kl(logits, self._logits(reference, *batch, length)))
        return torch.cat(kl)

    def _logits(self, model: nn.Module, ids: Tensor, attention_mask: Tensor, length: int) -> Tensor:
        """Logits `[B, length, V]` that predict the last `length` tokens, at the temperature of the samples."""
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        with self.accelerator.autocast(), fp32_output(head, self.args.cast_lm_head_to_fp32):
            output = model(ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=length + 1)
        return output.logits[:, :-1] / self.temperature

    # ---- rollout ----------------------------------------------------------------------------------------------
    def _generate(self, prompts: list) -> tuple:
        was_training = self.model.training
        generated = super()._generate([without_nulls_in_calls(prompt) for prompt in prompts])
        self.model.train(was_training)  # TRL leaves training mode behind after continuous batching
        if len(generated[1]) != len(prompts):
            raise RuntimeError(f"generation gave {len(generated[1])} completions for {len(prompts)} prompts")
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
            values = self._values(ids, attention_mask, length, size)
            with self._reference() as reference:
                ref_logps = logps_of(reference)
            logps = rollout["old_per_token_logps"]
            if args.kl_estimator == "full":
                kl = self._full_kl(ids, attention_mask, length)
            else:
                kl = {"k1": k1, "k3": k3}[args.kl_estimator](logps, ref_logps)

        last = rollout["completion_ids"].gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)
        has_eos = torch.isin(last, torch.tensor(self.eos_token_ids, device=last.device))
        is_scored = self._scores.isfinite()
        scores = self._scores.masked_fill(~is_scored, 0.0)
        if args.normalize_scores:
            if mode == "train":
                self.score_statistics.update(scores, is_scored, self._sum_over_processes)
            scores = self.score_statistics.normalize(scores)
        scores = clip_scores(scores, args.score_clip) - args.missing_eos_penalty * ~has_eos
        counts = mask & is_scored.unsqueeze(1)
        rewards = kl_shaped_rewards(scores, kl, counts, self.kl_controller.kl_coef)
        advantages, returns = gae(rewards, values, counts, args.discount, args.gae_lambda)
        metrics = rollout_metrics(
            scores, is_scored, rewards, kl, logps, ref_logps, mask, values, returns, self._sum_over_processes
        )
        if metrics["objective/unscored"] == len(ids) * self.accelerator.num_processes:
            logger.warning(
                "No episode of this rollout has a finite reward, so nothing is learned from it: look at what the reward "
                "model and the reward functions return."
            )
        metrics["objective/kl_coef"] = self.kl_controller.kl_coef
        if mode == "train":
            self.kl_controller.update(metrics["objective/kl"], len(ids) * self.accelerator.num_processes)
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
        is_new_epoch = self.model.training and self._step % self.args.steps_per_generation == 0
        if is_new_epoch and self._is_inside_rollout and self._buffered_inputs is not None:
            self._shuffle_rollout()
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

    def _shuffle_rollout(self) -> None:
        """Divide the rollout into minibatches anew, as TRL does before the first inner epoch."""
        batches = self._buffered_inputs
        rollout = {
            name: torch.cat([batch[name] for batch in batches]) if torch.is_tensor(x) and x.ndim > 0 else x
            for name, x in batches[0].items()
            if name != "num_tokens"
        }
        self._buffered_inputs = split_tensor_dict(shuffle_sequence_dict(rollout), len(batches))

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


def rollout_metrics(
    scores: Tensor,
    is_scored: Tensor,
    rewards: Tensor,
    kl: Tensor,
    logps: Tensor,
    ref_logps: Tensor,
    mask: Tensor,
    values: Tensor,
    returns: Tensor,
    reduce: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """The keys `kl`, `objective/*` and `value/explained_variance` of PPOPtxTrainer's table.

    Args:
        scores: `[B]`, finite; those of unscored rows are not read.
        is_scored: `[B]`, True where the row has a usable reward.
        rewards, kl, logps, ref_logps, values, returns: `[B, T]`; `kl` is the estimate that the penalty uses.
        mask: `[B, T]`, True on the completions' tokens.
        reduce: sums a tensor over the processes.

    Returns:
        Means over tokens (`kl`) or episodes of all processes; NaN where nothing counts.
    """
    counts = mask & is_scored.unsqueeze(1)
    returns = torch.where(counts, returns, 0.0).double()
    errors = torch.where(counts, returns - values, 0.0)
    sums = {
        "rows": torch.ones_like(is_scored),
        "scored": is_scored,
        "scores": torch.where(is_scored, scores, 0.0),
        "rewards": torch.where(counts, rewards, 0.0),
        "tokens": mask,
        "kl": torch.where(mask, kl, 0.0),
        "k3": torch.where(mask, k3(logps.double(), ref_logps.double()), 0.0),
        "counts": counts,
        "returns": returns,
        "returns_squared": returns.square(),
        "errors": errors,
        "errors_squared": errors.square(),
    }
    totals = reduce(torch.stack([x.double().sum() for x in sums.values()])).tolist()
    total = dict(zip(sums, totals, strict=True))

    def per(name: str, count: str) -> float:
        return total[name] / total[count] if total[count] else math.nan

    variance = per("returns_squared", "counts") - per("returns", "counts") ** 2
    unexplained = per("errors_squared", "counts") - per("errors", "counts") ** 2
    return {
        "kl": per("k3", "tokens"),
        "objective/kl": per("kl", "rows"),
        "objective/scores": per("scores", "scored"),
        "objective/rewards": per("rewards", "scored"),
        "objective/unscored": total["rows"] - total["scored"],
        "value/explained_variance": 1 - unexplained / variance if variance > 0 else math.nan,
    }
