"""Weights of which every process holds a part (FSDP2's `DTensor`), gathered and scattered.

What gathers is a collective act: all processes call it, in one order.
"""

import os
from collections.abc import Mapping

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it is without sharding, detached; the tensor itself where it is not sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that every process has whole, in parts as `like` is; itself where that is whole."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def fill(targets: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Copy whole weights into tensors of the same names, sharded or not."""
    for name, target in targets.items():
        target.copy_(part_like(weights[name], target))


def save_whole(tensors: Mapping[str, Tensor], path: str | os.PathLike, is_writer: bool = True) -> None:
    """Gather tensors one after the other, and write them to a safetensors file on the process that is to."""
    gathered = {}
    for name, tensor in tensors.items():
        tensor = whole(tensor)
        if is_writer:
            gathered[name] = tensor.cpu().contiguous()
    if is_writer:
        save_file(gathered, path)
