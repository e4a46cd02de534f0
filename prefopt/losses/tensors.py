"""What every loss asks of its tensors: one shape, and fp32 at least."""

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """Half precision as fp32; fp32 and fp64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def require_same_shape(**tensors: Tensor) -> None:
    """Raise unless all have one shape.

    Example:
        >>> require_same_shape(values=torch.zeros(2), rewards=torch.zeros(3))
        Traceback (most recent call last):
        ValueError: shapes differ: values (2,), rewards (3,)
    """
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if len({tuple(x.shape) for x in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"shapes differ: {shapes}")


def of_one_shape(**tensors: Tensor) -> list[Tensor]:
    """The tensors, each in fp32 at least and the one called `mask` as bool; raises as `require_same_shape` does.

    Example:
        >>> of_one_shape(values=torch.ones(1, dtype=torch.bfloat16), mask=torch.ones(1))
        [tensor([1.]), tensor([True])]
    """
    require_same_shape(**tensors)
    return [x.bool() if name == "mask" else at_least_fp32(x) for name, x in tensors.items()]
