"""Every role on one base: reward model and value function as LoRA adapters beside the policy's.

PPO needs a policy, the SFT model it must stay near, a value function and a reward model. With LoRA they differ in
their adapters and heads alone, so one base, quantized or not, serves them all:

    base (4-bit, 8-bit or 16-bit) + adapter `default` -> policy
                                  + adapter `ref`     -> SFT model, frozen
                                  + adapter `value`   + fp32 head -> value function
                                  + adapter `reward`  + fp32 head -> reward model, frozen

An `AdapterScorer` is one of the last two: it behaves like a one-label sequence classifier, so that everything that
reads scores (`prefopt.models.reward`) reads it.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from prefopt.errors import UserError
from prefopt.models.loading import saved_config, saved_embeddings, saved_pad_token
from prefopt.models.passes import backbone, is_sharded

_HEAD = "base_model.model.score."  # the head's weights in a saved reward adapter
_ADAPTER_WEIGHTS = "adapter_model.safetensors"


class AdapterScorer(nn.Module):
    """A reward model or value function on another model's base.

    The adapter is active during the forward only. For a backward pass, which may run the forward once more (gradient
    checkpointing), keep it active until that is over:

        with scorer.active():
            loss(token_scores(scorer, input_ids, attention_mask)).backward()

    Attributes:
        score: the head, in fp32; it belongs to this role alone.
        config: of a reward model: `num_labels` 1, `reward_bias`, `reward_token_id`.
        adapter: name of the adapter on the shared base.
        peft_config: what the adapter is saved with, so that it loads as a reward model by itself.
    """

    def __init__(
        self,
        model: PeftModel,
        adapter: str,
        score: nn.Module,
        config: PreTrainedConfig,
        peft_config: PeftConfig,
    ) -> None:
        super().__init__()
        # In a list: the base is not part of this module.
        self._model = [model]
        self.adapter, self.score, self.config, self.peft_config = adapter, score.float(), config, peft_config

    @property
    def shared_model(self) -> PeftModel:
        """The model on whose base it is."""
        return self._model[0]

    @property
    def base_model(self) -> nn.Module:
        """The transformer below the head, which is the shared one."""
        return backbone(self.shared_model)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this role's adapter the active one, and its weights the ones that take gradients."""
        model = self._model[0]
        before = model.active_adapter
        if before == self.adapter:
            yield
            return
        model.set_adapter(self.adapter)
        try:
            yield
        finally:
            model.set_adapter(before)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
        **positions: Tensor,
    ) -> SequenceClassifierOutputWithPast:
        """Logits `[N, T, 1]`: the head's output at every position, no pooling."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": use_cache, **positions}
        with self.active():
            if is_sharded(self):
                hidden_states = self._states_of_whole(**inputs)
            else:
                hidden_states = self.base_model(**inputs).last_hidden_state
        return SequenceClassifierOutputWithPast(logits=self.score(hidden_states.float()))

    def _states_of_whole(self, **inputs: Any) -> Tensor:
        """`hidden_states` by a call of the whole model, whose own head sees one position."""
        states: list[Tensor] = []
        handle = self.base_model.register_forward_hook(lambda *of_call: states.append(of_call[-1].last_hidden_state))
        try:
            self.shared_model(**inputs, logits_to_keep=1)
        finally:
            handle.remove()
        return states[0]

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's weights by their name on the shared base; to be asked again once these are sharded."""
        own = {id(weight) for weight in adapter_weights(self._model[0], self.adapter).values()}
        return {name: parameter for name, parameter in self._model[0].named_parameters() if id(parameter) in own}

    def save_pretrained(self, folder: str | os.PathLike, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write a LoRA reward model, which `load_reward_model` and plain peft load by themselves.

        `state_dict` is that of the shared model, where its own is not whole.
        """
        os.makedirs(folder, exist_ok=True)
        weights = get_peft_model_state_dict(self._model[0], state_dict, self.adapter)
        weights |= {f"{_HEAD}{name}": weight for name, weight in self.score.state_dict().items()}
        weights = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        save_file(weights, os.path.join(folder, _ADAPTER_WEIGHTS), metadata={"format": "pt"})
        self.peft_config.save_pretrained(folder)
        self.config.save_pretrained(folder)


def adapter_weights(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """An adapter's weights, themselves and no copies, by the names that PEFT saves them under.

    No search of names for ".adapter." finds them all: those of embeddings, trained tokens and IA3 END in the adapter.
    """
    tensors = chain(model.named_buffers(remove_duplicate=False), model.named_parameters(remove_duplicate=False))
    return get_peft_model_state_dict(model, dict(tensors), adapter, save_embedding_layers=False)


def copy_adapter(model: PeftModel, source: str, target: str) -> None:
    """Give the adapter `target`, of the same configuration, the weights of `source` in their dtypes, and freeze it."""
    weights = adapter_weights(model, source)
    for name, copied in adapter_weights(model, target).items():
        copied.data = weights[name].detach().clone()
        copied.requires_grad_(False)


def without_dropout(config: PeftConfig) -> PeftConfig:
    """A copy of an adapter's configuration in which its dropout, whatever it is called, is 0."""
    config = copy.deepcopy(config)
    for name in vars(config):
        if name.endswith("dropout"):
            setattr(config, name, 0.0)
    return config


def why_not_shared(model: nn.Module, path: str | os.PathLike) -> str | None:
    """The reason why the reward adapter at `path` cannot use the base of `model`, or None when it can."""
    if not isinstance(model, PeftModel):
        return "the policy is a full model"
    config, policy = PeftConfig.from_pretrained(path), model.peft_config["default"]
    ours, theirs = policy.base_model_name_or_path, config.base_model_name_or_path
    if not _same_place(ours, theirs):
        return f"it was trained on {theirs!r}, the policy on {ours!r}"
    ours, theirs = (c.revision or "main" for c in (policy, config))
    if ours != theirs:
        return f"it was trained on revision {theirs} of its base, the policy on {ours}"
    if config.peft_type != model.peft_type:
        return f"it is a {config.peft_type.value} adapter, the policy's a {model.peft_type.value} adapter"
    # These two are names that PEFT tries for a head.
    if extra := set(config.modules_to_save or ()) - {"score", "classifier"}:
        return f"it has weights of its own for {', '.join(sorted(extra))}"
    # PEFT looks for the trained tokens of each adapter in each embedding matrix that has some.
    ours, theirs = (bool(getattr(c, "trainable_token_indices", None)) for c in (policy, config))
    if ours != theirs:
        return f"{'the policy' if ours else 'it'} has token embeddings of its own"
    saved = saved_config(path)
    embeddings = model.get_base_model().get_input_embeddings().weight
    if saved.get("vocab_size", 0) > len(embeddings):
        return "its vocabulary is larger than the policy's"
    # PEFT saves those of the base along with an adapter on them, and those of a vocabulary that has grown.
    for weight in saved_embeddings(path).values():
        if not torch.equal(weight.to(embeddings), embeddings[: len(weight)]):
            return "the token embeddings of its base are not the policy's"
    dtype = saved.get("dtype", saved.get("torch_dtype"))
    if dtype is not None and getattr(torch, dtype) != embeddings.dtype:
        return f"its base is {dtype}, the policy's {str(embeddings.dtype).removeprefix('torch.')}"
    bits, own_bits = (
        _bits(c) for c in (saved.get("quantization_config"), model.config.to_dict().get("quantization_config"))
    )
    if bits != own_bits:
        return f"its base is {bits}, the policy's {own_bits}"
    return None


def load_scorer(model: PeftModel, path: str | os.PathLike, adapter: str = "reward") -> AdapterScorer:
    """Load a LoRA reward model onto the base of `model`, as the frozen adapter `adapter`.

    Args:
        model: a policy whose base is that of the reward model (`why_not_shared` is None).
        path: directory of the reward adapter, as `RankedRewardTrainer` saves it.

    Raises:
        ValueError: the base is another one, or the adapter has no head.
    """
    if reason := why_not_shared(model, path):
        raise UserError(f"the reward model {os.fspath(path)} needs a base of its own: {reason}")
    weights = load_peft_weights(os.fspath(path), device="cpu")
    for name in saved_embeddings(path):
        del weights[name]
    head = {name.removeprefix(_HEAD): weights.pop(name) for name in [*weights] if name.startswith(_HEAD)}
    if not head:
        raise UserError(f"the adapter {os.fspath(path)} has no trained head: it is no reward model")
    score = nn.Linear(head["weight"].shape[1], 1, bias="bias" in head)
    score.load_state_dict({name: weight.float() for name, weight in head.items()})
    peft_config = PeftConfig.from_pretrained(path)
    config = copy.deepcopy(model.config)
    for name, value in {"num_labels": 1, "reward_bias": 0.0, "reward_token_id": None}.items():
        setattr(config, name, saved_config(path).get(name, value))
    config.num_labels, config.name_or_path = 1, os.fspath(path)
    pad, ends = saved_pad_token(path, model.config)
    config.get_text_config().pad_token_id, config.unread_token_id = pad, pad if ends else None
    config.architectures = saved_config(path).get("architectures")
    _add_adapter(model, adapter, peft_config, weights)
    return AdapterScorer(model, adapter, score, config, peft_config).requires_grad_(False)


def trainable_copy(scorer: AdapterScorer, adapter: str = "value") -> AdapterScorer:
    """A trainable copy beside a scorer, head and bias included: InstructGPT's initial value function (C.4).

    The copy's weights take gradients inside its `active()`.
    """
    model = scorer._model[0]
    _add_adapter(model, adapter, scorer.peft_config, adapter_weights(model, scorer.adapter))
    head = copy.deepcopy(scorer.score).requires_grad_(True)
    return AdapterScorer(model, adapter, head, copy.deepcopy(scorer.config), scorer.peft_config)


def _add_adapter(model: PeftModel, name: str, config: PeftConfig, weights: dict[str, Tensor]) -> None:
    # Scores and values are those of the weights, also while the policy trains.
    config = without_dropout(config)
    config.task_type, config.modules_to_save = model.peft_config["default"].task_type, None
    model.add_adapter(name, config)
    expected = adapter_weights(model, name).keys()
    missing, unexpected = sorted(expected - weights.keys()), sorted(weights.keys() - expected)
    if missing or unexpected:
        raise UserError(
            f"the adapter does not fit the base: {len(missing)} weights missing, {len(unexpected)} too "
            f"many, such as {[*missing, *unexpected][0]}"
        )
    set_peft_model_state_dict(model, {key: weights[key].detach() for key in expected}, adapter_name=name)
    # The new weights are frozen unless their role is active.
    model.set_adapter(model.active_adapter)


def _same_place(ours: str | None, theirs: str | None) -> bool:
    if not ours or not theirs:
        return False
    return ours == theirs or (os.path.isdir(ours) and os.path.realpath(ours) == os.path.realpath(theirs))


def _bits(quantization: Any) -> str:
    if not quantization:
        return "not quantized"
    if quantization.get("load_in_4bit"):
        return f"4-bit {quantization.get('bnb_4bit_quant_type')}"
    return "8-bit" if quantization.get("load_in_8bit") else str(quantization.get("quant_method"))
