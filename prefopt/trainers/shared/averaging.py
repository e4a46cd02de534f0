"""The exponential moving average of the weights (InstructGPT, arXiv:2203.02155, appendix C.4)."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerState

from prefopt.errors import UserError
from prefopt.models.sharding import fill, save_whole

AVERAGE_FILE = "weight_average.safetensors"


class WeightAverage(TrainerCallback):
    r"""After every optimizer step,

        \bar\theta_t = decay * \bar\theta_{t-1} + (1 - decay) * \theta_t,    \bar\theta_0 = \theta_0

    with decay 0.992 in InstructGPT (appendix C.4): a memory of about 1 / (1 - decay) = 125 steps. Kept in fp32 on the
    device of the weights.

    Of a LoRA policy the factors A and B are averaged, each by itself. Their product is not the average of the
    products B A, but it can be saved and loaded as an adapter of the same rank.

    Args:
        parameters: name -> parameter, the ones that train.
        decay: from 0 (the current weights) to 1 (the initial ones).

    Example:
        >>> weight = nn.Parameter(torch.zeros(1))
        >>> average = WeightAverage({"weight": weight}, decay=0.75)
        >>> weight.data += 1
        >>> average.update()
        >>> with average.swapped_in():
        ...     weight.item()
        0.25
        >>> weight.item()
        1.0
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.take(parameters)

    def take(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Average these parameters from now on, from their current weights."""
        self.parameters = dict(parameters)
        self.restart()

    def restart(self) -> None:
        """The average becomes the current weights."""
        self._averaged = AveragedModel(self._weights(), multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        # AveragedModel's first update copies.
        self.update()

    def update(self) -> None:
        """Take the current weights into the average."""
        self._averaged.update_parameters(self._weights())

    def _weights(self) -> nn.ParameterList:
        return nn.ParameterList(parameter.detach().float() for parameter in self.parameters.values())

    @property
    def averages(self) -> dict[str, torch.Tensor]:
        """Name -> average, fp32."""
        averages = (average.detach() for average in self._averaged.module)
        return dict(zip(self.parameters, averages, strict=True))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; afterwards its last ones again, bit for bit."""
        last = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        try:
            self._fill(self.averages)
            yield
        finally:
            self._fill(last)

    @torch.no_grad()
    def _fill(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    def save(self, folder: str, is_writer: bool = True) -> None:
        """Write the averages to `folder`, on the process that is to; all of them gather."""
        save_whole(self.averages, os.path.join(folder, AVERAGE_FILE), is_writer)

    def load(self, folder: str) -> None:
        """Read what `save` wrote; raises ValueError if it is missing or of other weights."""
        path = os.path.join(folder, AVERAGE_FILE)
        if not os.path.isfile(path):
            raise UserError(f"{folder} has no {AVERAGE_FILE}: it was saved without ema_decay")
        saved = load_file(path)
        if saved.keys() != self.parameters.keys():
            differing = sorted(saved.keys() ^ self.parameters.keys())[:5]
            raise UserError(f"{path} averages other weights; they differ in {differing}")
        fill(self.averages, saved)

    # ---- Trainer's events -------------------------------------------------------------------------------------
    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # Not where a checkpoint was loaded.
        if state.global_step == 0:
            self.restart()

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.update()
