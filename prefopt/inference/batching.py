"""Rows of ids in padded batches of similar length."""

from collections.abc import Sequence

import torch


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, the longest first (memory trouble shows at once).

    >>> batches_by_length([2, 9, 5], batch_size=2)
    [[1, 2], [0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pad(
    rows: Sequence[list[int]], pad_id: int, device: torch.device | str, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and attention mask `[N, T]`.

    >>> pad([[5, 6, 7], [8]], pad_id=0, device="cpu", left=True)[0].tolist()
    [[5, 6, 7], [0, 0, 8]]
    """
    width = max(len(row) for row in rows)

    def filled(row: list[int], filler: list[int]) -> list[int]:
        return filler + row if left else row + filler

    ids = [filled(list(row), [pad_id] * (width - len(row))) for row in rows]
    mask = [filled([1] * len(row), [0] * (width - len(row))) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
