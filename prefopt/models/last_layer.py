"""The last decoder layer's MLP at the positions that are read, and at no others."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from prefopt.models.prefix.sharing import backbone


@contextmanager
def last_mlp_at(model: nn.Module, first: int, end: int) -> Iterator[None]:
    """Inside, a forward whose hidden states are read at the positions `first` to `end - 1` alone does no more MLP.

    No attention follows the last layer's MLP: what it gives at one position reaches the last hidden state of that
    position and no other. At the other positions, prompts above all, it gives 0 here, so that their last hidden states
    are wrong and those that are read are the same. One MLP of one layer is little in a deep model, much in a small one.

    Nothing happens where the last layer is not `layers[-1]` of the backbone or has no `mlp`, nor where gradient
    checkpointing is to run the forward a second time, after this context.

    Args:
        model: a causal language model or a sequence classifier, wrapped or not.
        first, end: columns of the model's input `[B, T]`; `end` may lie beyond it.
    """
    layers = getattr(backbone(model), "layers", None)
    last = layers[-1] if layers else None
    mlp = getattr(last, "mlp", None)
    runs_again = torch.is_grad_enabled() and getattr(last, "gradient_checkpointing", False)
    if not isinstance(mlp, nn.Module) or runs_again:
        yield
        return
    widths: list[int] = []  # of the input that is under way

    def cut(module: nn.Module, args: tuple) -> tuple | None:
        if not args:
            return None
        widths.append(args[0].size(1))
        # A copy: on a view the same weights gave results that differ in the last digit, and a first KL that is not 0.
        return args[0][:, first:end].contiguous(), *args[1:]

    def pad(module: nn.Module, args: tuple, output: Any) -> Any:
        if not widths:
            return output
        padding = (0, 0, first, max(0, widths.pop() - end))
        if isinstance(output, tuple):  # of experts, with what their router said
            return F.pad(output[0], padding), *output[1:]
        return F.pad(output, padding)

    handles = [mlp.register_forward_pre_hook(cut), mlp.register_forward_hook(pad)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
