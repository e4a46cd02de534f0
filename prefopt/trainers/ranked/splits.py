"""Which completions of a batch go into which forward, so that none takes more tokens than a budget."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from prefopt.models.prefix.layout import pack
from prefopt.models.prefix.sharing import is_faster

Cells = list[tuple[int, int]]  # (prompt, completion)


class Size(NamedTuple):
    """Of some completions: tokens with shared prefixes once, tokens of all rows, rows, tokens of the longest row."""

    packed: int
    row_tokens: int
    rows: int
    longest: int


def split_completions(
    input_ids: Tensor, attention_mask: Tensor, present: Tensor, max_tokens: int, shares_prefixes: bool
) -> list[Tensor]:
    """Divide the completions of a batch among forwards of at most `max_tokens` tokens each.

    Whole prompts of similar length go together, so that there is little padding. Only a prompt that alone exceeds the
    budget is divided over its completions, and one completion is never cut, even if it alone exceeds it.

    Args:
        input_ids: `[B, K, T]`, padded on the right.
        attention_mask: `[B, K, T]`.
        present: `[B, K]`, True on the completions to forward.
        max_tokens: padding counts where rows are padded, a shared prefix once where prefixes are shared.
        shares_prefixes: whether the model shares them.

    Returns:
        Masks `[B, K]` that partition `present`; each holds several whole prompts, or completions of one.

    Example:
        Two prompts with two completions of 101 tokens each, 100 of them shared.

        >>> ids = torch.tensor([[[1] * 100 + [7], [1] * 100 + [8]], [[2] * 100 + [7], [2] * 100 + [8]]])
        >>> split = lambda n, s: [
        ...     m.int().tolist()
        ...     for m in split_completions(ids, torch.ones_like(ids), torch.ones(2, 2, dtype=torch.bool), n, s)
        ... ]
        >>> split(204, True)
        [[[1, 1], [1, 1]]]
        >>> split(202, False)
        [[[1, 1], [0, 0]], [[0, 0], [1, 1]]]
        >>> split(101, True)
        [[[1, 0], [0, 0]], [[0, 1], [0, 0]], [[0, 0], [1, 0]], [[0, 0], [0, 1]]]
    """
    ids, real, present = input_ids.cpu(), attention_mask.cpu(), present.cpu()
    lengths = real.sum(-1)

    def size(cells: Cells) -> Size:
        b, k = (torch.tensor(axis) for axis in zip(*sorted(cells), strict=True))
        packed = pack(ids[b, k], real[b, k], b)
        return Size(packed.input_ids.shape[1], packed.num_row_tokens, len(cells), int(lengths[b, k].max()))

    def fits(sizes: list[Size]) -> bool:
        packed, row_tokens = sum(s.packed for s in sizes), sum(s.row_tokens for s in sizes)
        if shares_prefixes and is_faster(packed, row_tokens):
            return packed <= max_tokens
        return sum(s.rows for s in sizes) * max(s.longest for s in sizes) <= max_tokens

    prompts = [[(b, k) for k in present[b].nonzero().squeeze(1).tolist()] for b in range(len(present))]
    sized = sorted(((size(cells), cells) for cells in prompts if cells), key=lambda x: -x[0].longest)
    forwards: list[Cells] = []
    for group in _fill(sized, lambda some: fits([size for size, _ in some])):
        if len(group) > 1 or fits([group[0][0]]):
            forwards.append([cell for _, cells in group for cell in cells])
        else:
            cells = sorted(group[0][1], key=lambda cell: -int(lengths[cell]))
            forwards += _fill(cells, lambda some: fits([size(some)]))
    masks = []
    for cells in forwards:
        mask = torch.zeros_like(present)
        mask[tuple(zip(*cells, strict=True))] = True
        masks.append(mask.to(input_ids.device))
    return masks


def _fill(items: list, fits: Callable[[list], bool]) -> list[list]:
    """Consecutive groups, each as long as it fits, with at least one item."""
    groups: list[list] = []
    for item in items:
        if groups and fits([*groups[-1], item]):
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups
