"""The models of PPO: reward models, KL reference, value function."""

import copy
import functools
import logging
import os
import types
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import add_fused_lm_head

from prefopt.errors import UserError
from prefopt.models.checkpoints import load_reward_model
from prefopt.models.loading import is_adapter, saved_config
from prefopt.models.roles import (
    AdapterScorer,
    adapter_weights,
    copy_adapter,
    load_scorer,
    why_not_shared,
    without_dropout,
)
from prefopt.models.sharding import fill, save_whole
from prefopt.trainers.ppo_ptx.config import PPOPtxConfig

logger = logging.getLogger(__name__)

VALUE_FILE = "value_function.safetensors"


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
        is_head: the last case; it reads the policy's last hidden states, and its gradient reaches the trunk.
        active: a context around forward and backward: an adapter must stay the active one until both are over.
        named_parameters: the trainable ones by name, in fp32; `parameters` without the names.
    """

    def __init__(self, module: nn.Module, is_head: bool = False) -> None:
        self.module, self.is_head = module, is_head
        self.active = module.active if isinstance(module, AdapterScorer) else nullcontext
        self.look_up()
        if not self.named_parameters:
            raise UserError("value_model has no trainable parameter; make one with `value_model_from`")
        # 16-bit weights would swallow small updates.
        for parameter in self.parameters:
            parameter.data = parameter.data.float()

    def look_up(self) -> None:
        """Find the parameters; again, once those of a shared base were replaced by sharded ones."""
        named = dict(self.module.named_parameters())
        # An adapter's weights are trainable while it is the active one.
        with self.active():
            if isinstance(self.module, AdapterScorer):
                named |= self.module.adapter_parameters()
            self.named_parameters = {name: p for name, p in named.items() if p.requires_grad}
        self.parameters = list(self.named_parameters.values())

    @classmethod
    def on_trunk_of(cls, policy: PreTrainedModel | PeftModel) -> "ValueFunction":
        """A linear head on the backbone's last hidden states; it starts at 0 for every state."""
        head = nn.Linear(policy.config.get_text_config().hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return cls(head, is_head=True)

    def of_states(self, hidden_states: Tensor) -> Tensor:
        """A head's values `[M]` of the policy's last hidden states `[M, hidden]`."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.module(hidden_states.float()).squeeze(-1)

    def save(self, folder: str, is_writer: bool = True) -> None:
        """Write the trained weights to `folder`, on the process that is to; all of them gather."""
        save_whole(self.named_parameters, os.path.join(folder, VALUE_FILE), is_writer)

    def load(self, folder: str) -> None:
        """Read what `save` wrote; raises ValueError if it is missing or of another value function."""
        path = os.path.join(folder, VALUE_FILE)
        if not os.path.isfile(path):
            raise UserError(f"{folder} has no {VALUE_FILE}: it is no checkpoint of PPOPtxTrainer")
        weights = load_file(path)
        if set(weights) != set(self.named_parameters):
            differing = sorted(set(self.named_parameters) ^ set(weights))[:5]
            raise UserError(f"{path} is of another value function; they differ in {differing}")
        fill(self.named_parameters, weights)
