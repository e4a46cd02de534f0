"""The processes of `accelerate launch`: one computes a part, all know the whole. Where there is one, it computes all."""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from prefopt.errors import UserError

T, R = TypeVar("T"), TypeVar("R")


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """Which of them this one is, from 0 on."""
    return 0 if count() == 1 else _joined().process_index


def is_main() -> bool:
    """Whether this process writes and prints."""
    return rank() == 0


def spread(items: Sequence[T], compute: Callable[[T], R]) -> list[R]:
    """`compute` of no more items than there are processes, one in each; all have all results, or raise what one met.

    >>> spread([2], lambda x: x + 1)
    [3]
    """
    if count() == 1:
        return [compute(item) for item in items]
    mine = items[rank() : rank() + 1]
    results = together(lambda: [compute(item) for item in mine])
    return [result for one in _from_all(results) for result in one]


def together(compute: Callable[[], R]) -> R:
    """`compute` in every process, which none leaves as if nothing had happened when another has failed."""
    if count() == 1:
        return compute()
    result, error = None, None
    try:
        result = compute()
    except Exception as caught:
        error = caught
    # Of the others the sentence is enough, and not every error can be sent.
    errors = _from_all(None if error is None else (isinstance(error, UserError), f"{type(error).__name__}: {error}"))
    if error is not None:
        raise error
    for number, other in enumerate(errors):
        if other is not None:
            is_users, text = other
            raise (UserError if is_users else RuntimeError)(f"process {number}: {text.removeprefix('UserError: ')}")
    return result


def from_main(compute: Callable[[], R]) -> R:
    """What the first process computes."""
    return spread([None], lambda _: compute())[0]


def _from_all(value: Any) -> list[Any]:
    from accelerate.utils import gather_object

    _joined()
    return gather_object([value])


def _joined() -> Any:
    import torch
    from accelerate import PartialState

    # Without a GPU accelerate joins no other process unless it is told so.
    return PartialState(cpu=not torch.accelerator.is_available())
