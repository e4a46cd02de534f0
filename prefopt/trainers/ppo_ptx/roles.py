"""The models of PPO: reward models, KL reference, value function, and `Roles`: every forward pass over episodes."""

import copy
import functools
import logging
import os
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import add_fused_lm_head, use_adapter

from prefopt.errors import UserError
from prefopt.inference.generate import evaluating
from prefopt.losses.advantages import full_kl
from prefopt.models.checkpoints import load_reward_model
from prefopt.models.heads import fp32_output, last_mlp_at, token_logps
from prefopt.models.loading import is_adapter, saved_config
from prefopt.models.passes import backbone, padded_inputs
from prefopt.models.reward import token_scores
from prefopt.models.roles import (
    AdapterScorer,
    active,
    adapter_weights,
    copy_adapter,
    load_scorer,
    why_not_shared,
    without_dropout,
)
from prefopt.trainers.ppo_ptx.config import PPOPtxConfig

logger = logging.getLogger(__name__)

VALUE_FILE = "value_function.safetensors"

# The exact KL needs all logits, of two models: of this many tokens at a time.
KL_POSITIONS = 1024


def check_same_tokenizer(
    model: PreTrainedModel | PeftModel,
    policy: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    role: str,
) -> None:
    """Refuse a reward or value model of another tokenizer: it reads the policy's token ids.

    The tokenizer saved beside the model decides; without one, the sizes of the two vocabularies. A reward token, which
    the policy need not know, makes no difference, nor does a pad token, which is in no text.
    """
    path = model.config._name_or_path
    token = getattr(model.config, "reward_token_id", None)
    if os.path.isfile(os.path.join(path, "tokenizer_config.json")):
        own = AutoTokenizer.from_pretrained(path)
        ours, theirs = tokenizer.get_vocab(), own.get_vocab()
        pads = {tokenizer.pad_token, own.pad_token}
        words = ours.keys() | theirs.keys()
        differing = {word for word in words if ours.get(word) != theirs.get(word)}
        is_same = all(word in pads or (word not in ours and theirs[word] == token) for word in differing)
    else:
        sizes = [m.config.get_text_config().vocab_size for m in (model, policy)]
        is_same = sizes[0] == sizes[1] or (token == sizes[1] == sizes[0] - 1)
        is_same = is_same or (tokenizer.pad_token_id == sizes[0] == sizes[1] - 1)
    if not is_same:
        raise UserError(
            f"the {role} {path!r} has another tokenizer than the policy, whose token ids it is to read: train it "
            "with the policy's tokenizer, or call it from a Python reward function on the text"
        )


def load_reward_role(path: str, policy: PreTrainedModel | PeftModel, adapter: str) -> nn.Module:
    """A reward model for PPO: on the policy's base where that is its own, else loaded by itself, with a word of why."""
    if is_adapter(path):
        reason = why_not_shared(policy, path)
        if reason is None:
            return load_scorer(policy, path, adapter)
        if isinstance(policy, PeftModel):
            logger.warning("The reward model %s is loaded with a base of its own: %s.", path, reason)
    return load_reward_model(path)


def suppress_reward_tokens(args: PPOPtxConfig, models: list[str | PreTrainedModel | PeftModel]) -> list[int]:
    """Keep rollouts from sampling a token at which a reward model reads its score; returns the ids."""
    ids = {
        saved_config(model).get("reward_token_id")
        if isinstance(model, str)
        else getattr(model.config, "reward_token_id", None)
        for model in models
    } - {None}
    if ids:
        options = args.generation_kwargs or {}
        suppressed = sorted({*(options.get("suppress_tokens") or ()), *ids})
        args.generation_kwargs = {**options, "suppress_tokens": suppressed}
    return sorted(ids)


def frozen_copy(policy: PreTrainedModel, temperature: float, cast_lm_head_to_fp32: bool) -> PreTrainedModel:
    """The full model as it is now, with a fused LM head of its own. In-memory models work: nothing is reloaded."""
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    # TRL's fused forward is bound to the policy.
    del reference.forward
    add_fused_lm_head(reference, temperature, cast_lm_head_to_fp32)
    return reference


def add_untempered_head(policy: PreTrainedModel | PeftModel, cast_lm_head_to_fp32: bool) -> None:
    """Give a policy, whose fused LM head has the sampling temperature in it, a second one at temperature 1.

    It answers `model(..., fused_lm_head=True, untempered=True)`; every other call is as before.
    """
    model = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    tempered = model.forward
    add_fused_lm_head(model, temperature=1.0, cast_lm_head_to_fp32=cast_lm_head_to_fp32)
    at_one = model.forward

    # `generate` checks its arguments against the signature.
    @functools.wraps(tempered)
    def forward(self: nn.Module, *args: Any, untempered: bool = False, **kwargs: Any) -> Any:
        return (at_one if untempered else tempered)(*args, **kwargs)

    model.forward = types.MethodType(forward, model)


def add_reference_adapter(policy: PeftModel) -> str:
    """Copy the trained adapter `default` to a frozen adapter `ref`; returns that name. An existing `ref` is kept."""
    if "ref" not in policy.peft_config:
        # The reference is the weights, also while the policy trains.
        policy.add_adapter("ref", without_dropout(policy.peft_config["default"]))
        copy_adapter(policy, "default", "ref")
    for weight in adapter_weights(policy, "ref").values():
        weight.requires_grad_(False)
    return "ref"


class ValueFunction:
    """V(state before each completion token), kept apart from the policy's modules.

    DDP, generation and the saved policy therefore know nothing of it; its gradients are averaged, clipped and zeroed,
    and its weights saved, by the PPO trainer.

    Attributes:
        module: what is trained: a one-label sequence classifier (full, `PeftModel`, or an adapter on the policy's base),
            or an `nn.Linear`.
        is_head: the last case; the values then come with the policy's own forward passes, and their gradient
            reaches the trunk.
        named_parameters: the trainable ones by name, in fp32.
    """

    def __init__(self, module: nn.Module, trunk: nn.Module | None = None) -> None:
        self.module, self.is_head = module, trunk is not None
        named = dict(module.named_parameters())
        # An adapter's weights are trainable while it is the active one.
        with active(module):
            if isinstance(module, AdapterScorer):
                named |= module.adapter_parameters()
            self.named_parameters = {name: p for name, p in named.items() if p.requires_grad}
        if not self.named_parameters:
            raise UserError("value_model has no trainable parameter; make one with `value_model_from`")
        # 16-bit weights would swallow small updates.
        for parameter in self.parameters:
            parameter.data = parameter.data.float()
        self._reads_trunk = False
        self._trunk_values: list[Tensor] = []
        if trunk is not None:
            trunk.register_forward_hook(self._read_trunk)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters."""
        return list(self.named_parameters.values())

    def active(self) -> AbstractContextManager:
        """To be entered around forward and backward: an adapter must stay the active one until both are over."""
        return active(self.module)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @classmethod
    def on_trunk_of(cls, policy: PreTrainedModel | PeftModel) -> "ValueFunction":
        """A linear head on the backbone's last hidden states; it starts at 0 for every state."""
        head = nn.Linear(policy.config.get_text_config().hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return cls(head, trunk=backbone(policy))

    def _read_trunk(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._reads_trunk:
            hidden_states = output.last_hidden_state
            with torch.autocast(hidden_states.device.type, enabled=False):
                self._trunk_values.append(self.module(hidden_states.float()).squeeze(-1))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Policy forwards inside this context keep the head's values for `__call__`; nothing happens without a head."""
        self._trunk_values, self._reads_trunk = [], self.is_head
        try:
            yield
        finally:
            self._reads_trunk = False

    def __call__(self, ids: Tensor, attention_mask: Tensor, length: int) -> Tensor:
        """Values `[B, length]` of the states before the last `length` tokens of `ids` (`[B, T]`).

        With a head they are those of the policy forwards in the last `reading()`, which must have been of these ids, up to
        padding at the end of the rows.
        """
        if self.is_head:
            width = ids.size(1)
            values = torch.cat([F.pad(v, (0, width - v.size(1))) for v in self._trunk_values])
            self._trunk_values = []
        else:
            # The policy's pad token may be one that this model has no embedding for.
            values = token_scores(self.module, ids.masked_fill(attention_mask == 0, 0), attention_mask)
        return values[:, -length - 1 : -1]

    def save(self, folder: str) -> None:
        """Write the trained weights to `folder`."""
        weights = {name: p.detach().cpu().contiguous() for name, p in self.named_parameters.items()}
        save_file(weights, os.path.join(folder, VALUE_FILE))

    def load(self, folder: str) -> None:
        """Read what `save` wrote; raises ValueError if it is missing or of another value function."""
        path = os.path.join(folder, VALUE_FILE)
        if not os.path.isfile(path):
            raise UserError(f"{folder} has no {VALUE_FILE}: it is no checkpoint of PPOPtxTrainer")
        weights = load_file(path)
        if set(weights) != set(self.named_parameters):
            differing = sorted(set(self.named_parameters) ^ set(weights))[:5]
            raise UserError(f"{path} is of another value function; they differ in {differing}")
        for name, parameter in self.named_parameters.items():
            parameter.data.copy_(weights[name])


class Roles:
    """Policy, KL reference and value function, and what PPO asks of them about episodes.

    An episode is a row of `ids [B, T]`, whose last `length` columns are the completion, padded at its end.

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

    @torch.no_grad()
    def read(
        self, ids: Tensor, attention_mask: Tensor, length: int, size: int, logps: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities under policy and reference, and values, each `[B, length]`; `size` rows at a time.

        `logps` are the policy's, if `logps` of this class has just computed them: a value head has seen that forward.
        """
        if logps is None:
            logps, _ = self.logps(self.policy, ids, attention_mask, length, size)
        values = self.values(ids, attention_mask, length, size)
        with self.reference() as reference:
            ref_logps, _ = self.logps(reference, ids, attention_mask, length, size)
        return logps, ref_logps, values

    def logps(
        self,
        model: nn.Module,
        ids: Tensor,
        attention_mask: Tensor,
        length: int,
        size: int | None = None,
        compute_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities `[B, length]` of the completions under a model, and entropies if they are asked for.

        Without the LM head's work on prompts and without the padding that ends all rows.
        """
        logps, entropies = [], []
        with self.value_function.reading(), self.accelerator.autocast(), self._without_dropout(model):
            for x, mask, padding in self._batches(ids, attention_mask, size):
                of_batch = token_logps(
                    model,
                    x,
                    mask,
                    length - padding,
                    temperature=self.temperature,
                    cast_lm_head_to_fp32=self.cast_lm_head_to_fp32,
                    compute_entropy=compute_entropy,
                )
                logps.append(F.pad(of_batch[0], (0, padding)))
                if compute_entropy:
                    entropies.append(F.pad(of_batch[1], (0, padding)))
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None

    def values(self, ids: Tensor, attention_mask: Tensor, length: int, size: int | None = None) -> Tensor:
        """Values `[B, length]` of the states before the completions' tokens.

        With a head they come from the last `logps` of the same episodes; else `size` rows are forwarded at a time.
        """
        value_function = self.value_function
        if value_function.is_head:
            return value_function(ids, attention_mask, length)
        values, module = [], value_function.module
        with self.accelerator.autocast(), value_function.active(), self._without_dropout(module):
            for x, mask, padding in self._batches(ids, attention_mask, size):
                with last_mlp_at(module, x.size(1) - length + padding - 1, x.size(1) - 1):
                    of_batch = value_function(x, mask, length - padding)
                values.append(F.pad(of_batch, (0, padding)))
        return torch.cat(values)

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

    def _batches(self, ids: Tensor, attention_mask: Tensor, size: int | None) -> Iterator[tuple[Tensor, Tensor, int]]:
        """`size` rows at a time, and how many columns at their end, padding in every row, were cut off.

        A rollout is padded to its longest episode, so most batches have some.
        """
        size = size or len(ids)
        for x, mask in zip(ids.split(size), attention_mask.split(size), strict=True):
            padding = mask.size(1) - 1 - int(mask.any(0).nonzero().max())
            padding -= padding % (self.pad_to_multiple_of or 1)
            width = mask.size(1) - padding
            yield x[:, :width], mask[:, :width], padding
