"""Episodes, a prompt and a completion each: every forward pass of PPO's roles over them, and the loss."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from trl.trainer.utils import use_adapter

from prefopt.inference.generate import evaluating
from prefopt.losses import clipped_policy_loss, clipped_value_loss
from prefopt.losses.advantages import full_kl
from prefopt.models.heads import fp32_output, token_logps
from prefopt.models.passes import padded_inputs, unwrapped
from prefopt.models.prefix.layout import Rows, longest_first
from prefopt.models.prefix.sharing import PrefixSharing, pack_if_faster
from prefopt.models.reward import token_values
from prefopt.models.trunk import num_shared_layers, trunk
from prefopt.trainers.ppo_ptx.config import PPOPtxConfig
from prefopt.trainers.ppo_ptx.roles import ValueFunction

logger = get_logger(__name__)

# The exact KL needs all logits, of two models: of this many tokens at a time.
KL_POSITIONS = 1024


@dataclass(frozen=True)
class Episodes:
    """A prompt and a completion each, prepared once for the passes of all roles.

    Attributes:
        batches: rows that are forwarded together; `Rows.read` are their completions' tokens.
        where: the episode and the place in its completion of each token that is read, batch after batch.
        shape: number of episodes, and the width of what is said of their completions.
        trunks: what `trunk` has kept, of each batch as it is or packed.
    """

    batches: list[Rows]
    where: tuple[Tensor, Tensor]
    shape: tuple[int, int]
    trunks: defaultdict[tuple[int, bool], list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def of(
        cls,
        ids: Tensor,
        attention_mask: Tensor,
        length: int,
        size: int | None = None,
        pad_to_multiple_of: int | None = None,
        shares_prefixes: bool = False,
    ) -> "Episodes":
        """From TRL's `[B, T]`: prompts padded on the left, completions, the last `length` columns, on the right.

        Args:
            size: rows that are forwarded together; None for all. They are of about one length, padded at their end alone.
            pad_to_multiple_of: of their widths.
            shares_prefixes: pack rows of one prompt, which follow each other in `ids`, where that is faster.
        """
        is_real = attention_mask.bool()
        is_completion = is_real.clone()
        is_completion[:, : ids.size(1) - length] = False
        prompts = ids.masked_fill(~is_real | is_completion, -1)
        # Numbers of the prompts, by where another one begins.
        prompts = F.pad((prompts[1:] != prompts[:-1]).any(1).cumsum(0), (1, 0))
        # Rolled to the left, over the padding. No role reads pad tokens: one may have no embedding for the policy's.
        columns = torch.arange(ids.size(1), device=ids.device) + is_real.long().argmax(1, keepdim=True)
        ids, is_real, is_completion = (
            x.gather(1, columns % ids.size(1)) for x in (ids.masked_fill(~is_real, 0), is_real, is_completion)
        )
        starts, lengths = is_completion.long().argmax(1), is_real.sum(1)
        if size is None or size >= len(ids):
            order = torch.arange(len(ids), device=ids.device).split(len(ids))
        else:
            order = longest_first(lengths, prompts).split(size)
        batches, where = [], []
        for episode in order:
            width = int(lengths[episode].max())
            width = min(ids.size(1), width + -width % (pad_to_multiple_of or 1))
            # In the order of the batch.
            numbers = F.pad(prompts[episode].diff().ne(0).cumsum(0), (1, 0))
            tensors = (x[episode, :width] for x in (ids, is_real.long(), is_completion))
            rows = Rows(*tensors, prompts=numbers)
            if shares_prefixes and int(numbers[-1]) + 1 < len(episode):
                rows = replace(rows, packed=pack_if_faster(rows.input_ids, rows.attention_mask, numbers))
            batches.append(rows)
            where.append((episode[rows.read.row], rows.read.position + 1 - starts[episode][rows.read.row]))
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
        shares_prefixes: whether rows of one prompt are forwarded as one, where a model allows it (`PrefixSharing`).
        shares_trunk: whether layers that all adapters have alike are run once (`trunk`).
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
        shares_prefixes: bool = False,
        shares_trunk: bool = True,
    ) -> None:
        self.policy, self.value_function, self.accelerator = policy, value_function, accelerator
        self.temperature, self.cast_lm_head_to_fp32 = temperature, cast_lm_head_to_fp32
        self.pad_to_multiple_of, self.has_dropout = pad_to_multiple_of, has_dropout
        self._reference, self.shares_prefixes = reference, shares_prefixes
        # Dropout differs from pass to pass.
        self.num_shared_layers = num_shared_layers(policy) if shares_trunk and not has_dropout else 0
        self._logps_prefixes = self._prefixes(lambda model, rows: {"logps": token_logps(model, rows)[0]})
        self._value_prefixes = self._prefixes(lambda model, rows: {"values": token_values(model, rows)})

    def _prefixes(self, read: Callable[[nn.Module, Rows], dict[str, Tensor]]) -> PrefixSharing:
        return PrefixSharing(self.shares_prefixes, lambda model, *rows: rows, read, bool, logger.warning)

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
        return Episodes.of(ids, attention_mask, length, size, self.pad_to_multiple_of, self.shares_prefixes)

    @torch.no_grad()
    def read(
        self,
        ids: Tensor,
        attention_mask: Tensor,
        length: int,
        size: int | None = None,
        episodes: Episodes | None = None,
        of_policy: OfTokens | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities under policy and reference, and values, each `[B, length]`; `size` rows at a time.

        `episodes` and `of_policy`: these and the policy's pass, where there are any already.
        """
        episodes = episodes or self.episodes(ids, attention_mask, length, size)
        of_policy = self.logps(self.policy, episodes) if of_policy is None else of_policy
        values = of_policy.values if self.value_function.is_head else self.values(episodes)
        with self.reference() as reference:
            ref_logps = self.logps(reference, episodes).logps
        return of_policy.logps, ref_logps, values

    def logps(self, model: nn.Module, episodes: Episodes, compute_entropy: bool = False) -> OfTokens:
        """A pass of the policy or the reference, without the LM head's work on prompts."""
        results = []
        with self.accelerator.autocast(), self._without_dropout(model):
            for rows in self._shared(self._logps_prefixes, model, episodes):
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
            return episodes.in_rows(
                [token_values(module, rows) for rows in self._shared(self._value_prefixes, module, episodes)]
            )

    def _shared(self, prefixes: PrefixSharing, model: nn.Module, episodes: Episodes) -> Iterator[Rows]:
        """The batches as this model forwards them, and while each of them is at hand, the model on its trunk."""
        layers = self.num_shared_layers
        if layers and unwrapped(model) is not unwrapped(self.policy):
            layers = 0
        for number, rows in enumerate(episodes.batches):
            if rows.packed is not None:
                # The model inside data parallel is checked, as a process that has nothing to share does not take part.
                rows = prefixes.packed(getattr(model, "module", model), rows)
                self.shares_prefixes = self.shares_prefixes and prefixes.is_on
            if layers:
                with trunk(model, layers, episodes.trunks[number, rows.packed is not None]):
                    yield rows
            else:
                yield rows

    @torch.no_grad()
    def full_kl(self, ids: Tensor, attention_mask: Tensor, length: int) -> Tensor:
        """KL divergence `[B, length]` at each completion token, exact; the logits of few rows exist at a time."""
        # Of the longest on all processes: they forward equally often, which sharded weights need.
        longest = self.accelerator.gather(torch.tensor([length], device=ids.device)).max().item()
        rows, kl = max(1, KL_POSITIONS // longest), []
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
