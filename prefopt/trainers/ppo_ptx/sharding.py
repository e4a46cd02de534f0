"""PPO-ptx under FSDP2: which settings it takes, and what accelerate, which knows one model, leaves to the trainer.

The policy is sharded with all adapters on its base. The heads of roles, and networks of their own, are whole in every
process. So the one optimizer holds both kinds, and its state in a checkpoint stands in two files.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model
from torch import Tensor, nn
from torch.optim import Optimizer

from prefopt.errors import UserError
from prefopt.models.passes import is_sharded
from prefopt.models.sharding import part_like, whole
from prefopt.trainers.ppo_ptx.config import PPOPtxConfig
from prefopt.trainers.ppo_ptx.roles import ValueFunction
from prefopt.trainers.shared.averaging import WeightAverage

logger = get_logger(__name__)

VALUE_OPTIMIZER_FILE = "value_optimizer.pt"


def check_fsdp(plugin: FullyShardedDataParallelPlugin, args: PPOPtxConfig) -> None:
    """Refuse what has not been made to work with sharded weights, or never was run; warn of what is off.

    Raises:
        UserError: naming the setting and what to set instead.
    """
    refused = {
        "fsdp_version: 1": (plugin.fsdp_version == 1, "roles need parameters that keep their names; set 2"),
        "fsdp_state_dict_type": (
            "FULL_STATE_DICT" not in str(plugin.state_dict_type),
            "policy and roles are saved whole; set FULL_STATE_DICT",
        ),
        "fsdp_cpu_ram_efficient_loading: true": (
            plugin.cpu_ram_efficient_loading,
            "roles are copied from weights that are not there yet; set false",
        ),
        "fsdp_activation_checkpointing: true": (
            plugin.activation_checkpointing,
            "it renames the layers; set false, and gradient_checkpointing=True",
        ),
        "use_vllm=True": (args.use_vllm, "sending sharded weights with adapters to vLLM was never run; leave it off"),
        "use_transformers_continuous_batching=True": (
            args.use_transformers_continuous_batching,
            "processes would forward unequally often, and wait for each other for ever; leave it off",
        ),
    }
    for setting, (is_set, sentence) in refused.items():
        if is_set:
            raise UserError(f"{setting} is not supported by PPO-ptx with FSDP: {sentence}")
    if args.prefix_sharing and args.num_generations > 1:
        logger.warning(
            "Prefix sharing is off: whether it pays may differ between processes, and with FSDP all must forward alike. "
            "Every completion is forwarded in a row of its own."
        )


def prepared_reference(reference: nn.Module, accelerator: Accelerator) -> nn.Module:
    """A full policy's frozen copy, sharded as the policy will be.

    Accelerate's own list keeps the policy alone: it compares parameters with those of each model of the list.
    """
    if accelerator.is_fsdp2:
        return fsdp2_prepare_model(accelerator, reference)
    return accelerator.prepare_model(reference, evaluation_mode=True)


def look_up_again(policy: nn.Module, value_function: ValueFunction, average: WeightAverage | None) -> None:
    """Find the parameters again that sharding the policy has replaced."""
    if not is_sharded(policy):
        return
    value_function.look_up()
    if average is not None:
        parameters = dict(policy.named_parameters())
        average.take({name: parameters[name] for name in average.parameters})


@contextmanager
def saved_apart(
    policy: nn.Module, optimizer: Optimizer, values: Mapping[str, nn.Parameter], folder: str, is_writer: bool
) -> Iterator[None]:
    """Inside, a sharded policy is all that the optimizer trains; then the state of the value function is written.

    Of the policy's state accelerate makes a file, and looks for each parameter in the policy.
    """
    if not is_sharded(policy):
        yield
        return
    with _policy_alone(optimizer, values) as groups:
        yield
    options = [{name: x for name, x in group.items() if name != "params"} for group in groups]
    state = {name: _gathered(optimizer.state[parameter]) for name, parameter in values.items()}
    if is_writer:
        torch.save({"groups": options, "state": state}, os.path.join(folder, VALUE_OPTIMIZER_FILE))


@contextmanager
def loaded_apart(
    policy: nn.Module, optimizer: Optimizer, values: Mapping[str, nn.Parameter], folder: str | None
) -> Iterator[None]:
    """`saved_apart` the other way round; `folder` is None where nothing is resumed."""
    if folder is None or not is_sharded(policy):
        yield
        return
    with _policy_alone(optimizer, values) as groups:
        yield
    saved = torch.load(os.path.join(folder, VALUE_OPTIMIZER_FILE), map_location="cpu", weights_only=True)
    for group, options in zip(groups, saved["groups"], strict=True):
        group.update(options)
    for name, parameter in values.items():
        optimizer.state[parameter] = _like(saved["state"][name], parameter)


@contextmanager
def _policy_alone(optimizer: Optimizer, values: Mapping[str, nn.Parameter]) -> Iterator[list[dict[str, Any]]]:
    """Inside, the optimizer has no groups and no state of the value function; gives its groups."""
    own = {id(parameter) for parameter in values.values()}
    # They have joined last.
    first = next(n for n, group in enumerate(optimizer.param_groups) if any(id(p) in own for p in group["params"]))
    groups = optimizer.param_groups[first:]
    del optimizer.param_groups[first:]
    states = {parameter: optimizer.state.pop(parameter, {}) for parameter in values.values()}
    try:
        yield groups
    finally:
        # Loading makes new ones.
        optimizer.param_groups.extend(groups)
        optimizer.state.update(states)


def _gathered(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: whole(x).cpu() if torch.is_tensor(x) else x for name, x in state.items()}


def _like(state: Mapping[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    def placed(x: Tensor) -> Tensor:
        # Others, such as the count of steps, stay where the optimizer keeps them.
        return part_like(x, parameter).to(parameter.device) if x.shape == parameter.shape else x

    return {name: placed(x) if torch.is_tensor(x) else x for name, x in state.items()}
