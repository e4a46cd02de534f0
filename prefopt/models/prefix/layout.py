"""How rows with shared prefixes become one packed row, and how that row is taken apart again for attention.

rows [N, T] --pack--> PackedRows: [prefix of prompt 1 | prefix of prompt 2 | ... | rest of row 1 | rest of row 2 | ...]
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from prefopt.errors import UserError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class Blocks:
    """Where the tokens of consecutive sequences stand in a block `[N, L]` padded on the right."""

    lengths: Tensor  # [N]
    width: int
    slots: Tensor | None  # [sum of lengths], position in the flattened block; None when nothing is padded

    @classmethod
    def of(cls, lengths: Tensor) -> "Blocks":
        width = int(lengths.max()) if len(lengths) else 0
        if bool((lengths == width).all()):
            return cls(lengths, width, None)
        real = torch.arange(width) < lengths[:, None]
        return cls(lengths, width, real.flatten().nonzero().squeeze(1))

    def to(self, device: torch.device) -> "Blocks":
        slots = None if self.slots is None else self.slots.to(device, non_blocking=True)
        return Blocks(self.lengths.to(device, non_blocking=True), self.width, slots)

    def pad(self, x: Tensor) -> Tensor:
        """`[tokens, heads, dim]` -> `[N, heads, L, dim]`."""
        if self.slots is not None:
            padded = x.new_zeros(len(self.lengths) * self.width, *x.shape[1:])
            x = padded.index_copy(0, self.slots, x)
        return x.view(len(self.lengths), self.width, *x.shape[1:]).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """`[N, L, heads, dim]` -> `[tokens, heads, dim]`."""
        x = x.flatten(0, 1)
        return x if self.slots is None else x.index_select(0, self.slots)


@dataclass(frozen=True)
class Sequences:
    """A packed row's queries cut into sequences, and the keys of each: causal when aligned at the last of both.

    `keys [T_k]` says where in the packed row the keys stand; sequence i has the queries from `query_bounds[i]` to
    `query_bounds[i + 1]` and the keys from `key_bounds[i]` to `key_bounds[i + 1]`.
    """

    keys: Tensor
    query_bounds: Tensor  # int32
    key_bounds: Tensor  # int32
    max_queries: int
    max_keys: int


@dataclass
class Layout:
    """How a packed row is unpacked for attention: B prefixes, N rests, the prefix each rest belongs to."""

    prefixes: Blocks
    rests: Blocks
    owner: Tensor  # [N]
    first: Tensor  # [B], a rest of each prefix
    num_rest_tokens: int
    # Made once for all layers, by what was asked for.
    _masks: dict[tuple[str, int | None, int], Any] = field(default_factory=dict)

    @cached_property
    def sequences(self) -> "Sequences":
        """The packed row for an attention that takes sequences of any length: the prefixes, then the rests."""
        device = self.owner.device
        prefixes, rests, owner = self.prefixes.lengths.cpu(), self.rests.lengths.cpu(), self.owner.cpu()
        own_start = torch.cat([prefixes, rests]).cumsum(0) - torch.cat([prefixes, rests])
        owner = torch.cat([torch.arange(len(prefixes)), owner])
        shared = prefixes[owner]  # keys that a sequence has from a prefix; for a prefix these are its own
        queries = torch.cat([prefixes, rests])
        keys = shared + queries
        keys[: len(prefixes)] = prefixes
        sequence = torch.repeat_interleave(torch.arange(len(keys)), keys)
        offset = torch.arange(len(sequence)) - (keys.cumsum(0) - keys)[sequence]
        is_shared = offset < shared[sequence]
        index = torch.where(
            is_shared, own_start[owner[sequence]] + offset, own_start[sequence] + offset - shared[sequence]
        )
        keys, queries = keys[queries > 0], queries[queries > 0]  # a prompt may share nothing

        def boundaries(lengths: Tensor) -> Tensor:
            return nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)

        return Sequences(index.to(device), boundaries(queries), boundaries(keys), int(queries.max()), int(keys.max()))

    @property
    def uniform(self) -> bool:
        """All prefixes have one length."""
        return self.prefixes.slots is None

    @property
    def as_rows(self) -> bool:
        """Attend over whole rows, all causal, when that costs less than a masked rectangle: K (P+L)^2/2 < K L (P+L)."""
        return self.uniform and self.prefixes.width < self.rests.width

    def rows(self, prefix: Tensor, rest: Tensor) -> Tensor:
        """`[B, heads, P, dim]` and `[N, heads, L, dim]` -> `[N, heads, P + L, dim]`."""
        if len(prefix) == 1:
            repeated = prefix.expand(len(self.owner), -1, -1, -1)
        else:
            repeated = prefix.index_select(0, self.owner)
        return torch.cat([repeated, rest], dim=2)

    def mask(self, block: str, window: int | None, groups: int = 1, *, causal_is_none: bool = True) -> Tensor | None:
        """Boolean mask, True attends, of the `prefixes`, the `rests` or the `rows`; plain causal is None unless told.

        `groups` copies of it stand below each other.
        """
        width = {"prefixes": self.prefixes.width, "rests": self.rests.width}.get(
            block, self.prefixes.width + self.rests.width
        )
        if window is not None and window >= self.prefixes.width + self.rests.width:
            window = None
        if block != "rests" and causal_is_none and (window is None or window >= width):
            return None
        if (block, window, groups) not in self._masks:
            self._masks[block, window, groups] = self._make_mask(block, width, window).repeat(1, 1, groups, 1)
        return self._masks[block, window, groups]

    def _make_mask(self, block: str, width: int, window: int | None) -> Tensor:
        device = self.owner.device
        own = torch.arange(width, device=device)
        distance = own[:, None] - own[None, :]  # [L, L]
        if block != "rests":
            seen = distance >= 0
            return (seen if window is None else seen & (distance < window))[None, None]
        # A rest's keys: its prefix, padded to the widest, then itself. Distances to the prefix count its real tokens.
        lengths = self.prefixes.lengths[:1] if self.uniform else self.prefixes.lengths[self.owner]
        key = torch.arange(self.prefixes.width, device=device)
        to_prefix = (lengths[:, None, None] + own[:, None]) - key  # [N or 1, L, P]
        seen = (key < lengths[:, None, None]).expand_as(to_prefix)
        distance = torch.cat([to_prefix, distance.expand(len(lengths), -1, -1)], dim=2)
        seen = nn.functional.pad(seen, (0, width), value=True) & (distance >= 0)
        if window is not None:
            seen = seen & (distance < window)
        return seen[:, None]

    def block_mask(self, window: int | None) -> "BlockMask":
        """FlexAttention's mask of the packed row as it stands: a token sees its prefix and itself, back to the window."""
        if ("flex", window, 1) not in self._masks:
            from torch.nn.attention.flex_attention import create_block_mask

            device = self.owner.device
            lengths = torch.cat([self.prefixes.lengths, self.rests.lengths])
            prefixes = torch.cat([torch.arange(len(self.prefixes.lengths), device=device), self.owner])
            sequence = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
            prefix = prefixes[sequence]
            position = torch.arange(len(sequence), device=device) - (lengths.cumsum(0) - lengths)[sequence]
            position = torch.where(sequence == prefix, position, position + self.prefixes.lengths[prefix])

            def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                is_shared = (sequence[key] == sequence[query]) | (sequence[key] == prefix[query])
                distance = position[query] - position[key]
                return is_shared & (distance >= 0) & ((distance < window) if window is not None else is_shared)

            size = len(sequence)
            self._masks["flex", window, 1] = create_block_mask(sees, None, None, size, size, device=device)
        return self._masks["flex", window, 1]


@dataclass(frozen=True)
class PackedRows:
    """N rows as one, with their shared prefixes stored once.

    `input_ids` and `position_ids` are `[1, S]`; `index[n, t]` is where token t of row n went (padding: anywhere).
    """

    input_ids: Tensor
    position_ids: Tensor
    index: Tensor
    layout: Layout
    num_row_tokens: int


class Read(NamedTuple):
    """Where rows are read, `[M]` each: a position in a row, and the token that is predicted there."""

    row: Tensor
    position: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Rows:
    """Some completions, a row each, and the number of each one's prompt: what a model is read on.

    `input_ids`, `attention_mask` and `completion_mask` are `[N, T]`, `prompts` `[N]`; `packed` are the same rows with
    shared prefixes once, or None to forward them as they are.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    prompts: Tensor
    packed: PackedRows | None = None

    @cached_property
    def read(self) -> Read:
        """Where the completions' tokens are predicted: at the token before each."""
        row, position = self.completion_mask[:, 1:].nonzero(as_tuple=True)
        return Read(row, position, self.input_ids[row, position + 1])


def longest_first(lengths: Tensor, prompts: Tensor) -> Tensor:
    """An order of rows in which little is padding: those of one prompt together, the prompt with the longest row first.

    Example:
        >>> longest_first(torch.tensor([3, 5, 4, 5]), prompts=torch.tensor([7, 8, 7, 9]))
        tensor([1, 3, 2, 0])
    """
    order = lengths.argsort(descending=True, stable=True)
    numbers = prompts.unique(return_inverse=True)[1][order]
    # The place of each prompt's longest row.
    places = torch.full_like(numbers, len(order))
    first = places.scatter_reduce(0, numbers, torch.arange(len(order), device=order.device), "amin")[numbers]
    return order[first.argsort(stable=True)]


def pack(input_ids: Tensor, attention_mask: Tensor, prompts: Tensor) -> PackedRows:
    """Pack rows; rows of the same prompt share their longest common token prefix.

    It is found in the tokens, so it covers what completions begin with alike and stops where tokens merge across the
    boundary of prompt and completion. Every row keeps at least its last token for itself.

    Args:
        input_ids: `[N, T]`, padded on the right.
        attention_mask: `[N, T]`, 1 = real token; every row has one.
        prompts: `[N]`, non-decreasing: rows with equal numbers are completions of one prompt.

    Raises:
        ValueError: a row is empty or padded on the left, or `prompts` is not sorted.

    Example:
        >>> rows = torch.tensor([[5, 6, 7, 0], [5, 6, 8, 9], [4, 3, 0, 0]])
        >>> packed = pack(rows, (rows > 0).long(), torch.tensor([0, 0, 1]))
        >>> packed.input_ids, packed.position_ids
        (tensor([[5, 6, 7, 8, 9, 4, 3]]), tensor([[0, 1, 2, 2, 3, 0, 1]]))
        >>> packed.index[1]  # the second row: its prefix 5 6 is shared, 8 9 its own
        tensor([0, 1, 3, 4])
    """
    device = input_ids.device
    ids, real, prompts = input_ids.cpu(), attention_mask.cpu().bool(), prompts.cpu()
    lengths = real.sum(1)
    positions = torch.arange(ids.shape[1])
    if not torch.equal(real, positions < lengths[:, None]) or bool((lengths == 0).any()):
        raise UserError("rows must have at least one token and be padded on the right")
    if bool((prompts.diff() < 0).any()):
        raise UserError("rows of one prompt must follow each other")

    _, owner, num_rows = prompts.unique_consecutive(return_inverse=True, return_counts=True)
    first = num_rows.cumsum(0) - num_rows
    common = ((ids == ids[first[owner]]) & real).cumprod(1).sum(1)  # with the first row of the prompt
    common = torch.minimum(common, lengths - 1)
    prefix_lengths = torch.full_like(num_rows, ids.shape[1]).scatter_reduce(0, owner, common, "amin")
    prefix_lengths[num_rows == 1] = 0

    rest_lengths = lengths - prefix_lengths[owner]
    prefix_start = prefix_lengths.cumsum(0) - prefix_lengths
    rest_start = prefix_lengths.sum() + rest_lengths.cumsum(0) - rest_lengths
    in_prefix = positions < prefix_lengths[owner][:, None]
    start = torch.where(in_prefix, prefix_start[owner][:, None], (rest_start - prefix_lengths[owner])[:, None])
    index = torch.where(real, start + positions, 0)

    num_tokens = int(prefix_lengths.sum() + rest_lengths.sum())
    packed_ids = torch.empty(num_tokens, dtype=ids.dtype)
    packed_positions = torch.empty(num_tokens, dtype=torch.long)
    packed_ids[index[real]] = ids[real]
    packed_positions[index[real]] = positions.expand_as(ids)[real]
    layout = Layout(
        prefixes=Blocks.of(prefix_lengths).to(device),
        rests=Blocks.of(rest_lengths).to(device),
        owner=owner.to(device),
        first=first.to(device),
        num_rest_tokens=int(rest_lengths.sum()),
    )
    return PackedRows(
        packed_ids[None].to(device),
        packed_positions[None].to(device),
        index.to(device),
        layout,
        int(lengths.sum()),
    )
