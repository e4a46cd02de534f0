"""The value function of PPO: a network of its own, or a head on the policy's trunk."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefopt.shared_base import token_scores

VALUE_FILE = "value_function.safetensors"


class ValueFunction:
    """V(state before each completion token), kept apart from the policy's modules.

    DDP, generation and the saved policy therefore know nothing of it; its gradients are averaged, clipped and zeroed,
    and its weights saved, by the PPO trainer.

    Attributes:
        module: what is trained: a one-label sequence classifier (full or `PeftModel`), or an `nn.Linear`.
        is_head: the second case; the values then come with the policy's own forward passes, and their gradient
            reaches the trunk.
        parameters: the trainable ones, in fp32.
    """

    def __init__(self, module: nn.Module, trunk: nn.Module | None = None) -> None:
        self.module, self.is_head = module, trunk is not None
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if not self.parameters:
            raise ValueError("value_model has no trainable parameter; make one with `value_model_from`")
        for parameter in self.parameters:  # 16-bit weights would swallow small updates
            parameter.data = parameter.data.float()
        self._reads_trunk = False
        self._trunk_values: list[Tensor] = []
        if trunk is not None:
            trunk.register_forward_hook(self._read_trunk)

    @classmethod
    def on_trunk_of(cls, policy: PreTrainedModel | PeftModel) -> "ValueFunction":
        """A linear head on the backbone's last hidden states; it starts at 0 for every state."""
        head = nn.Linear(policy.config.get_text_config().hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        model = policy.get_base_model() if isinstance(policy, PeftModel) else policy
        return cls(head, trunk=model.base_model)

    def _read_trunk(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._reads_trunk:
            hidden_states = output.last_hidden_state
            with torch.autocast(hidden_states.device.type, enabled=False):
                self._trunk_values.append(self.module(hidden_states.float()).squeeze(-1))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Policy forwards inside this context leave the head's values behind; nothing happens without a head."""
        self._trunk_values, self._reads_trunk = [], self.is_head
        try:
            yield
        finally:
            self._reads_trunk = False

    def __call__(self, ids: Tensor, attention_mask: Tensor, length: int) -> Tensor:
        """Values `[B, length]` of the states before the last `length` tokens of `ids` (`[B, T]`).

        With a head they are those of the policy forwards in the last `reading()`, which must have been of these ids.
        """
        if self.is_head:
            values, self._trunk_values = torch.cat(self._trunk_values), []
        else:
            values = token_scores(self.module, ids, attention_mask)
        return values[:, -length - 1 : -1]

    def save(self, folder: str) -> None:
        """Write the trained weights to `folder`."""
        weights = {n: p.detach().cpu() for n, p in self.module.named_parameters() if p.requires_grad}
        save_file(weights, os.path.join(folder, VALUE_FILE))

    def load(self, folder: str) -> None:
        """Read what `save` wrote; raises ValueError if it is missing or of another value function."""
        path = os.path.join(folder, VALUE_FILE)
        if not os.path.isfile(path):
            raise ValueError(f"{folder} has no {VALUE_FILE}: it is no checkpoint of PPOPtxTrainer")
        weights = load_file(path)
        expected = {name for name, parameter in self.module.named_parameters() if parameter.requires_grad}
        if set(weights) != expected:
            differing = sorted(expected ^ set(weights))[:5]
            raise ValueError(f"{path} is of another value function; they differ in {differing}")
        self.module.load_state_dict(weights, strict=False)
