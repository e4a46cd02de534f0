"""The rollout of PPO-ptx: which prompts, and from scores, log-probabilities and values the advantage of each token."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerState
from trl.trainer.utils import split_tensor_dict

from prefopt.errors import UserError
from prefopt.losses.advantages import clip_scores, gae, k1, k3, kl_shaped_rewards, masked_whiten
from prefopt.losses.kl_control import KLController, RunningStatistics
from prefopt.models.passes import is_sharded
from prefopt.models.prefix.layout import longest_first
from prefopt.trainers.ppo_ptx.config import PPOPtxConfig
from prefopt.trainers.ppo_ptx.episodes import Episodes, OfTokens, Roles
from prefopt.trainers.ppo_ptx.value_start import fitted_values

logger = get_logger(__name__)


# What TRL gives reward functions beside the columns of the prompts; a file of rankings has `completions` of its own.
OF_REWARD_FUNCTIONS = ("prompts", "completions", "trainer_state", "log_extra", "log_metric", "environments")


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
    if taken := [name for name in OF_REWARD_FUNCTIONS if name in train_dataset.column_names]:
        logger.warning(
            "the columns %s of the prompts do not reach reward functions, whose own arguments they are", taken
        )
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
    args: PPOPtxConfig,
    model: str | nn.Module,
    quantization_config: Any,
    suppressed_tokens: list[int],
    by_adapter: bool,
) -> None:
    """Refuse the policies whose weights TRL would send to vLLM wrongly or under names that vLLM does not know.

    `by_adapter`: these stay where they are (`prefopt.trainers.ppo_ptx.engine`), and may be in 4 bit.

    Raises ValueError; nothing happens without `use_vllm`.
    """
    if not args.use_vllm:
        return
    quantized = any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    to_quantize = quantization_config or (args.model_init_kwargs or {}).get("quantization_config")
    in_8bit = getattr(model, "is_loaded_in_8bit", False) or getattr(to_quantize, "load_in_8bit", False)
    if (quantized or to_quantize) and (in_8bit or not by_adapter):
        raise UserError(
            "use_vllm with a 4-bit or 8-bit policy is not supported, as TRL would send vLLM the packed weights, unless 4 "
            "bits stay where they are: train LoRA factors of one rank, without vllm_enable_sleep_mode. Or load the policy "
            "in 16 bit, or generate with transformers (use_vllm=False)"
        )
    for config in model.peft_config.values() if isinstance(model, PeftModel) else ():
        if getattr(config, "modules_to_save", None):
            raise UserError(
                "use_vllm with modules_to_save is not supported: TRL would send vLLM the copies of every adapter; leave "
                "modules_to_save out, or generate with transformers (use_vllm=False)"
            )
        if getattr(config, "trainable_token_indices", None):
            raise UserError(
                "use_vllm with trainable_token_indices is not supported: TRL would send vLLM the embeddings under a name "
                "that it does not know; leave them out, or generate with transformers (use_vllm=False)"
            )
    if suppressed_tokens:
        raise UserError(
            f"use_vllm cannot keep the policy from sampling the reward token {suppressed_tokens}: vLLM has no "
            "suppress_tokens; train the reward model without a reward token, or set use_vllm=False"
        )


@contextmanager
def base_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards the base below a model's adapters is what it was, bit for bit.

    TRL merges the policy's adapter into it for vLLM and takes it out again: W + BA - BA, which in 16 bit is not W, and
    reference, value function and reward model may stand on that base. The copy is in the memory of the host.
    """
    layers = [module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer)]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    copies = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    try:
        yield
    finally:
        for parameter, kept in zip(parameters, copies, strict=True):
            parameter.data.copy_(kept)


@contextmanager
def merged(model: PeftModel) -> Iterator[None]:
    """Inside, a LoRA policy is one model: its adapter stands in the weights of the base, which are kept (`base_kept`).

    Decoding a token is little work in many steps, of which an adapter takes several beside each layer of the base.
    Quantized and sharded models, and adapters that are more than factors of a layer, stay as they are.
    """
    config = model.peft_config["default"]
    has_more = not isinstance(config, LoraConfig) or config.use_dora or config.modules_to_save
    if (
        is_sharded(model)
        or has_more
        or config.trainable_token_indices
        or getattr(model.config, "quantization_config", None)
    ):
        yield
        return
    with base_kept(model):
        model.merge_adapter(["default"])
        try:
            yield
        finally:
            model.unmerge_adapter()


@dataclass
class Sampled:
    """What TRL's rollout computes on its way and does not return.

    `prompt_ids` are the token ids of the prompts, not padded; `episodes` are prompts and completions, and
    `of_policy` its pass over them, if TRL asked for that; `scores` `[B]` the weighted sum of the rewards, NaN where no
    reward function gave one.
    """

    prompt_ids: list[list[int]] = field(default_factory=list)
    episodes: Episodes | None = None
    of_policy: OfTokens | None = None
    scores: Tensor | None = None


class Rollouts:
    """Gives sampled episodes a reward, an advantage and a return for each token.

    Args:
        roles: the models, for log-probabilities and values.
        args: coefficients of the rewards and of GAE.
        accelerator: for sums over the processes.
        eos_token_ids: tokens that end a completion.
        kl_controller: the coefficient of the KL penalty, adapted after each rollout.
        score_statistics: of the scores of all training episodes so far.
    """

    def __init__(
        self,
        roles: Roles,
        args: PPOPtxConfig,
        accelerator: Accelerator,
        eos_token_ids: list[int],
        kl_controller: KLController,
        score_statistics: RunningStatistics,
    ) -> None:
        self.roles, self.args, self.accelerator, self.eos_token_ids = roles, args, accelerator, eos_token_ids
        self.kl_controller, self.score_statistics = kl_controller, score_statistics
        self.sum_over_processes = partial(accelerator.reduce, reduction="sum")
        # At the first rollout of a run, where the value function is a copy of a reward model.
        self.fits_values = False

    def complete(self, rollout: dict[str, Any], sampled: Sampled, is_training: bool) -> dict[str, float]:
        """Add to TRL's batch what a PPO step needs; evaluation moves neither coefficient nor statistics.

        Added are `loss_mask` (the tokens of episodes with a usable reward), `old_values`, `returns`, `advantages`, and
        `old_per_token_logps`.

        Args:
            rollout: TRL's `prompt_ids`, `prompt_mask`, `completion_ids`, `completion_mask`.
            sampled: with scores; one that is not finite is unscored.

        Returns:
            What is logged of the rollout, by log key.
        """
        args, roles = self.args, self.roles
        ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], 1)
        attention_mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], 1)
        mask = rollout["completion_mask"].bool()
        length, num_episodes = mask.size(1), len(ids) * self.accelerator.num_processes
        size = args.per_device_train_batch_size if is_training else args.per_device_eval_batch_size
        known = sampled.episodes, sampled.of_policy
        logps, ref_logps, values = roles.read(ids, attention_mask, length, size, *known)
        if args.kl_estimator == "full":
            kl = roles.full_kl(ids, attention_mask, length)
        else:
            kl = {"k1": k1, "k3": k3}[args.kl_estimator](logps, ref_logps)

        last = rollout["completion_ids"].gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)
        has_eos = torch.isin(last, torch.tensor(self.eos_token_ids, device=last.device))
        is_scored = sampled.scores.isfinite()
        scores = sampled.scores.masked_fill(~is_scored, 0.0)
        if args.normalize_scores:
            if is_training:
                self.score_statistics.update(scores, is_scored, self.sum_over_processes)
            scores = self.score_statistics.normalize(scores)
        scores = clip_scores(scores, args.score_clip) - args.missing_eos_penalty * ~has_eos
        counts = mask & is_scored.unsqueeze(1)
        kl_coef = self.kl_controller.kl_coef
        rewards = kl_shaped_rewards(scores, kl, counts, kl_coef)
        baseline = values
        if is_training and self.fits_values:
            self.fits_values = False
            _, targets = gae(rewards, values, counts, args.discount, 1.0)
            values, baseline = fitted_values(
                roles.value_function, ids, attention_mask, values, targets, counts, size, self.accelerator.autocast,
                self.sum_over_processes, args.num_generations,
            )  # fmt: skip
        advantages, returns = gae(rewards, baseline, counts, args.discount, args.gae_lambda)
        metrics = rollout_metrics(
            scores, is_scored, rewards, kl, logps, ref_logps, mask, baseline, returns, self.sum_over_processes
        )
        metrics["objective/kl_coef"] = kl_coef
        if metrics["objective/unscored"] == num_episodes:
            logger.warning(
                "No episode of this rollout has a finite reward, so nothing is learned from it: look at what the reward "
                "model and the reward functions return."
            )
        if is_training:
            self.kl_controller.update(metrics["objective/kl"], num_episodes)
        if args.whiten_advantages:
            advantages = masked_whiten(advantages, counts, self.sum_over_processes)
        rollout.update(
            old_per_token_logps=logps,
            loss_mask=counts,
            old_values=values,
            returns=returns,
            advantages=advantages,
        )
        return metrics

    def count_tokens(self, batches: list[dict[str, Any]], size: int) -> None:
        """Tell each micro-batch the tokens of its minibatch, `num_tokens`: `size` micro-batches on all processes."""
        for start in range(0, len(batches), size):
            minibatch = batches[start : start + size]
            tokens = self.sum_over_processes(sum(batch["loss_mask"].sum() for batch in minibatch))
            for batch in minibatch:
                batch["num_tokens"] = tokens


def divided_anew(
    batches: list[dict[str, Any]], size: int, is_shuffled: bool = True, has_groups: bool = False
) -> list[dict[str, Any]]:
    """A rollout in other minibatches of `size` micro-batches, as TRL divides it before the first inner epoch.

    Args:
        is_shuffled: else every minibatch keeps its episodes.
        has_groups: prompts have several completions, which stay together.

    Inside a minibatch, whose gradient is a sum, the longest come first, so that little of a micro-batch is padding.
    """

    def permuted(rollout: dict[str, Any], order: Tensor) -> dict[str, Any]:
        return {name: x[order] if torch.is_tensor(x) and x.ndim > 0 else x for name, x in rollout.items()}

    rollout = {
        name: torch.cat([batch[name] for batch in batches]) if torch.is_tensor(x) and x.ndim > 0 else x
        for name, x in batches[0].items()
        if name != "num_tokens"
    }
    prompts, device = torch.arange(len(rollout["prompt_ids"])), rollout["prompt_ids"].device
    if has_groups:
        ids = rollout["prompt_ids"].masked_fill(rollout["prompt_mask"] == 0, -1)
        prompts = ids.unique(dim=0, return_inverse=True)[1].cpu()
    if is_shuffled:
        order = torch.randperm(int(prompts.max()) + 1)[prompts].argsort(stable=True)
        rollout, prompts = permuted(rollout, order.to(device)), prompts[order]
    if size > 1:
        lengths = (rollout["prompt_mask"].sum(1) + rollout["completion_mask"].sum(1)).cpu()
        places = torch.arange(len(prompts)).split(len(prompts) // (len(batches) // size))
        order = torch.cat([place[longest_first(lengths[place], prompts[place])] for place in places])
        rollout = permuted(rollout, order.to(device))
    return split_tensor_dict(rollout, len(batches))


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
