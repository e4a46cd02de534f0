"""Episodes, a prompt and a completion each: every forward pass of PPO's roles over them, and the loss."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.utils import use_adapter

from prefopt.inference.generate import evaluating
from prefopt.losses import clipped_policy_loss, clipped_value_loss
from prefopt.losses.advantages import full_kl
from prefopt.models.heads import fp32_output, token_logps
from prefopt.models.passes import padded_inputs
from prefopt.models.prefix.layout import Rows
from prefopt.models.reward import token_values
from prefopt.trainers.ppo_ptx.config import PPOPtxConfig
from prefopt.trainers.ppo_ptx.roles import ValueFunction

# The exact KL needs all logits, of two models: of this many tokens at a time.
KL_POSITIONS = 1024


@dataclass(frozen=True)
class Episodes:
    """A prompt and a completion each, prepared once for the passes of all roles.

    Attributes:
        batches: rows that are forwarded together; `Rows.read` are their completions' tokens.
        where: the episode and the place in its completion of each token that is read, batch after batch.
        shape: number of episodes, and the width of what is said of their completions.
    """

    batches: list[Rows]
    where: tuple[Tensor, Tensor]
    shape: tuple[int, int]

    @classmethod
    def of(
        cls,
        ids: Tensor,
        attention_mask: Tensor,
        length: int,
        size: int | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> "Episodes":
        """From TRL's `[B, T]`: prompts padded on the left, completions, the last `length` columns, on the right.

        `size` rows are forwarded together (all, if None), without the columns at their end that are padding in each: a
        rollout is padded to its longest episode.
        """
        # Pad tokens, which no role reads: one may have no embedding for the policy's.
        ids = ids.masked_fill(attention_mask == 0, 0)
        is_completion = attention_mask.bool()
        is_completion[:, : ids.size(1) - length] = False
        batches, where, size = [], [], size or len(ids)
        for start in range(0, len(ids), size):
            batch = slice(start, start + size)
            padding = ids.size(1) - 1 - int(is_completion[batch].any(0).nonzero().max())
            width = ids.size(1) - padding + padding % (pad_to_multiple_of or 1)
            rows = (x[batch, :width] for x in (ids, attention_mask, is_completion))
            batches.append(Rows(*rows, prompts=torch.arange(start, start + len(ids[batch]))))
            read = batches[-1].read
            where.append((start + read.row, read.position + 1 - (ids.size(1) - length)))
        episode, place = zip(*where, strict=True)
        return cls(batches, (torch.cat(episode), torch.cat(place)), (len(ids), length))

    def in_rows(self, per_token: list[Tensor]) -> Tensor:
        """`[B, length]` from what each batch gave of its tokens, 0 at padding."""
        values = torch.cat(per_token)
        return values.new_zeros(self.shape).index_put(self.where, values)


class OfTokens(NamedTuple):
    """What a pass of a language model gives of the completions' tokens, `[B, length]` each.

    `entropies` where they were asked for, `values` where a head on its trunk is the value function.
    """

    logps: Tensor
    entropies: Tensor | None
    values: Tensor | None


class Roles:
    """Policy, KL reference and value function, and what PPO asks of them about episodes (`Episodes.of`).

    Args:
        policy: the model that trains, not wrapped.
        reference: a frozen copy of it, or the name of the policy's frozen adapter, or None: the policy without adapter.
        value_function: V.
        accelerator: for autocast.
        temperature: of the samples: every log-probability is the one at it.
        cast_lm_head_to_fp32: as the policy's fused head was added with.
        pad_to_multiple_of: widths that forwards are cut to; None for any.
        has_dropout: whether some is left in training mode; passes without gradients, which are compared, go without it.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        reference: nn.Module | str | None,
        value_function: "ValueFunction",
        accelerator: Accelerator,
        temperature: float,
        cast_lm_head_to_fp32: bool,
        pad_to_multiple_of: int | None,
        has_dropout: bool = False,
    ) -> None:
        self.policy, self.value_function, self.accelerator = policy, value_function, accelerator
        self.temperature, self.cast_lm_head_to_fp32 = temperature, cast_lm_head_to_fp32
        self.pad_to_multiple_of, self.has_dropout = pad_to_multiple_of, has_dropout
        self._reference = reference

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The KL reference: a model of its own, or the policy with another adapter or none."""
        if isinstance(self._reference, nn.Module):
            yield self._reference
        else:
            with use_adapter(self.accelerator.unwrap_model(self.policy), self._reference):
                yield self.policy

    def episodes(self, ids: Tensor, attention_mask: Tensor, length: int, size: int | None = None) -> Episodes:
        """`Episodes.of` as these roles read them."""
        return Episodes.of(ids, attention_mask, length, size, self.pad_to_multiple_of)

    @torch.no_grad()
    def read(
        self,
        ids: Tensor,
        attention_mask: Tensor,
        length: int,
        size: int | None = None,
        of_policy: OfTokens | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities under policy and reference, and values, each `[B, length]`; `size` rows at a time.

        `of_policy`: the policy's pass, where it was already made.
        """
        episodes = self.episodes(ids, attention_mask, length, size)
        of_policy = self.logps(self.policy, episodes) if of_policy is None else of_policy
        values = of_policy.values if self.value_function.is_head else self.values(episodes)
        with self.reference() as reference:
            ref_logps = self.logps(reference, episodes).logps
        return of_policy.logps, ref_logps, values

    def logps(self, model: nn.Module, episodes: Episodes, compute_entropy: bool = False) -> OfTokens:
        """A pass of the policy or the reference, without the LM head's work on prompts."""
        results = []
        with self.accelerator.autocast(), self._without_dropout(model):
            for rows in episodes.batches:
                logps, entropies, states = token_logps(
                    model,
                    rows,
                    temperature=self.temperature,
                    cast_lm_head_to_fp32=self.cast_lm_head_to_fp32,
                    compute_entropy=compute_entropy,
                )
                values = self.value_function.of_states(states) if self.value_function.is_head else None
                results.append((logps, entropies, values))
        return OfTokens(*(None if x[0] is None else episodes.in_rows(x) for x in zip(*results, strict=True)))

    def values(self, episodes: Episodes) -> Tensor:
        """Values `[B, length]` of the states before the completions' tokens, by a network of its own."""
        module = self.value_function.module
        with self.accelerator.autocast(), self.value_function.active(), self._without_dropout(module):
            return episodes.in_rows([token_values(module, rows) for rows in episodes.batches])

    @torch.no_grad()
    def full_kl(self, ids: Tensor, attention_mask: Tensor, length: int) -> Tensor:
        """KL divergence `[B, length]` at each completion token, exact; the logits of few rows exist at a time."""
        rows, kl = max(1, KL_POSITIONS // length), []
        for batch in zip(ids.split(rows), attention_mask.split(rows), strict=True):
            logits = self.logits(self.policy, *batch, length)
            with self.reference() as reference:
                kl.append(full_kl(logits, self.logits(reference, *batch, length)))
        return torch.cat(kl)

    def logits(self, model: nn.Module, ids: Tensor, attention_mask: Tensor, length: int) -> Tensor:
        """Logits `[B, length, V]` that predict the completions."""
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        in_fp32 = fp32_output(head, self.cast_lm_head_to_fp32)
        with self.accelerator.autocast(), in_fp32, self._without_dropout(model):
            inputs = padded_inputs(model, ids, attention_mask)
            output = model(**inputs, use_cache=False, logits_to_keep=length + 1)
        return output.logits[:, :-1] / self.temperature

    def _without_dropout(self, model: nn.Module) -> AbstractContextManager:
        return nullcontext() if torch.is_grad_enabled() or not self.has_dropout else evaluating(model)


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
    value_function = roles.value_function
    batch = roles.episodes(ids, attention_mask, mask.size(1))
    # Summed over micro-batches and averaged over processes, sum / num_tokens is the mean over the minibatch.
    num_tokens = episodes["num_tokens"] / accelerator.num_processes

    def value_loss_of(values: Tensor) -> Tensor:
        return clipped_value_loss(
            values, episodes["old_values"], episodes["returns"], mask, args.value_clip_range, num_tokens
        )

    if not value_function.is_head:
        with value_function.active():
            value_loss = value_loss_of(roles.values(batch))
            if value_loss.requires_grad:
                accelerator.backward(args.vf_coef * value_loss)
        value_loss = value_loss.detach()
    logps, entropies, values = roles.logps(model, batch, compute_entropy=True)
    if value_function.is_head:
        value_loss = value_loss_of(values)
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
