"""One trunk for several roles: the layers below every adapter of a base are run once for a batch.

Adapters on the upper layers only (LoRA's `layers_to_transform`) leave the layers below as they are in every role, so that
policy, reference, value function and reward model read the same hidden states there. They are recorded in the pass of the
first role; in those of the others stand-ins take the place of the layers. That is exact, and no backward pass enters them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from prefopt.models.passes import backbone, unwrapped
from prefopt.models.prefix.sharing import MODEL_TYPES


def num_shared_layers(model: nn.Module) -> int:
    """How many layers at the bottom of a model are the same in each of its adapters, and frozen.

    0 for a full model, and where hidden states may not be all that a layer hands to the next.
    """
    transformer, layers = backbone(model), getattr(backbone(model), "layers", None)
    if not isinstance(model, PeftModel) or model.active_peft_config.is_prompt_learning or not layers:
        return 0
    config = transformer.config.get_text_config()
    # Where upper layers read keys and values of lower ones, these must run.
    hands_on_more = config.model_type not in MODEL_TYPES or getattr(config, "num_kv_shared_layers", 0)
    if hands_on_more or _is_adapted(unwrapped(model).get_input_embeddings()):
        return 0
    return next((number for number, layer in enumerate(layers) if _is_adapted(layer)), 0)


def _is_adapted(module: nn.Module) -> bool:
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return any(isinstance(m, kinds) for m in module.modules()) or any(p.requires_grad for p in module.parameters())


class _StandIn(nn.Module):
    """In the place of a layer, with its attributes: the layer itself without gradients, or nothing."""

    def __init__(self, layer: nn.Module, is_run: bool) -> None:
        super().__init__()
        # In a list: the layer is no part of it.
        self._layer, self._is_run = [layer], is_run

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._layer[0], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self._is_run:
            return hidden_states
        with torch.no_grad():
            return self._layer[0](hidden_states, *args, **kwargs)


class _Last(_StandIn):
    """In the place of the last shared layer: hands on its output, kept in `kept` from the first pass on."""

    def __init__(self, layer: nn.Module, kept: list[Tensor]) -> None:
        super().__init__(layer, is_run=not kept)
        self._kept = kept

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._is_run:
            self._kept.append(super().forward(hidden_states, *args, **kwargs))
        states = self._kept[0].detach()
        # Re-entrant checkpointing gives no gradients where no input asks for one.
        runs_again = torch.is_grad_enabled() and getattr(self._layer[0], "gradient_checkpointing", False)
        return states.requires_grad_() if runs_again else states


@contextmanager
def trunk(model: nn.Module, layers: int, kept: list[Tensor]) -> Iterator[None]:
    """Inside, a forward takes the output of the lowest `layers` layers from `kept`, or puts it there if it is empty.

    Args:
        model: wrapped or not, or a role on its base; of those whose `num_shared_layers` that is.
        layers: at least 1.
        kept: of one batch, whatever role reads it.
    """
    transformer = backbone(model)
    own = transformer.layers
    below = [_StandIn(layer, is_run=not kept) for layer in own[: layers - 1]]
    transformer.layers = nn.ModuleList([*below, _Last(own[layers - 1], kept), *own[layers:]])
    try:
        yield
    finally:
        transformer.layers = own
