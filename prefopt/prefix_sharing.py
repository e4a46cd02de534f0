"""One forward per prompt: the tokens that the completions of a prompt share run through the network once.

K rows of one prompt repeat it K times. Packed, the batch is one row

    [prefix of prompt 1 | prefix of prompt 2 | ... | rest of row 1 | rest of row 2 | ...]

without padding, in which every token keeps the position it had in its own row. Linear layers, norms and rotary
embeddings act on each token alone, so they need nothing else. Attention mixes tokens; it is unpacked for it into one
block of prefixes and one of rests, whose keys are those of their own prefix followed by their own. The result is that
of K rows up to rounding, and so is the gradient.

    rows [N, T] --pack--> PackedRows --sharing(model, packed)--> hidden states [1, S, hidden]
                                                                 .index says where each row's token went

The attention is registered through transformers' attention interface and behaves like its `sdpa` wherever no layout
is given. The layout travels as a keyword argument of the backbone's forward, which gradient checkpointing keeps for
its second forward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "prefopt_prefix_sharing"

# Architectures on which the tests have shown equal results. All their layers mix tokens in attention alone, with
# positions given by `position_ids`; a hybrid layer, a position bias or a capped logit would need its own proof.
MODEL_TYPES = {
    "cohere2",
    "exaone4",
    "gemma",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "ministral",
    "mistral",
    "olmo2",
    "olmo3",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "starcoder2",
}
LAYER_TYPES = {"full_attention", "sliding_attention"}

# Below this share of tokens saved, unpacking for attention costs about what the linear layers gain. Below this number,
# a forward takes the time of reading the weights and starting the kernels, whatever the tokens.
MIN_SAVING = 0.1
MIN_SAVED_TOKENS = 64


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


@dataclass
class Layout:
    """How a packed row is unpacked for attention: B prefixes, N rests, the prefix each rest belongs to."""

    prefixes: Blocks
    rests: Blocks
    owner: Tensor  # [N]
    first: Tensor  # [B], a rest of each prefix
    num_rest_tokens: int
    _masks: dict[tuple[str, int | None, int], Tensor | None] = field(default_factory=dict)

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

    def mask(self, block: str, window: int | None, groups: int = 1) -> Tensor | None:
        """Boolean mask, True attends, of the `prefixes`, the `rests` or the `rows`; None means plain causal.

        `groups` copies of it stand below each other.
        """
        if (block, window, groups) not in self._masks:
            mask = self._make_mask(block, window)
            self._masks[block, window, groups] = None if mask is None else mask.repeat(1, 1, groups, 1)
        return self._masks[block, window, groups]

    def _make_mask(self, block: str, window: int | None) -> Tensor | None:
        device = self.owner.device
        width = {"prefixes": self.prefixes.width, "rests": self.rests.width}.get(
            block, self.prefixes.width + self.rests.width
        )
        own = torch.arange(width, device=device)
        distance = own[:, None] - own[None, :]  # [L, L]
        if block != "rests":
            if window is None or window >= width:
                return None
            return ((distance >= 0) & (distance < window))[None, None]
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
        raise ValueError("rows must have at least one token and be padded on the right")
    if bool((prompts.diff() < 0).any()):
        raise ValueError("rows of one prompt must follow each other")

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
    start = torch.where(
        in_prefix, prefix_start[owner][:, None], (rest_start - prefix_lengths[owner])[:, None]
    )
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


def prefix_sharing_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefix_layout: Layout | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa` attention, unpacking a packed row when there is a layout.

    Args:
        query: `[1, heads, S, dim]`; key and value may have fewer heads.
        prefix_layout: of the packed row; without it this is `sdpa`.
        sliding_window: of this layer: a token sees itself and window - 1 before it.
    """
    if prefix_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, sliding_window=sliding_window, **kwargs
        )
    layout = prefix_layout
    num_prefix_tokens = query.shape[2] - layout.num_rest_tokens
    sections = (num_prefix_tokens, layout.num_rest_tokens)

    def unpack(x: Tensor) -> tuple[Tensor, Tensor]:
        prefix, rest = x.squeeze(0).transpose(0, 1).split(sections)
        return layout.prefixes.pad(prefix), layout.rests.pad(rest)

    def attend(block: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        mask = layout.mask(block, sliding_window, groups)
        if mask is None:
            return sdpa_attention_forward(module, q, k, v, None, **{**kwargs, "is_causal": True})[0]
        # Query heads that share a key head are no different from more queries: they stand below each other, so that
        # keys and values need not be repeated for them.
        stacked = q.reshape(len(q), k.shape[1], groups * q.shape[2], q.shape[3])
        out = nn.functional.scaled_dot_product_attention(
            stacked, k, v, attn_mask=mask, dropout_p=kwargs.get("dropout", 0.0), scale=kwargs.get("scaling")
        )
        return out.view(*q.shape[:3], v.shape[3]).transpose(1, 2)

    (q_prefix, q_rest), (k_prefix, k_rest), (v_prefix, v_rest) = map(unpack, (query, key, value))
    k, v = layout.rows(k_prefix, k_rest), layout.rows(v_prefix, v_rest)
    if layout.as_rows:
        q = layout.rows(q_prefix, q_rest)
        prefix, rest = attend("rows", q, k, v).split((layout.prefixes.width, layout.rests.width), dim=1)
        prefix = prefix[layout.first]
    else:
        prefix = attend("prefixes", q_prefix, k_prefix, v_prefix)
        rest = attend("rests", q_rest, k, v)
    return torch.cat([layout.prefixes.unpad(prefix), layout.rests.unpad(rest)])[None], None


AttentionInterface.register(ATTENTION, prefix_sharing_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def why_not(model: nn.Module) -> str | None:
    """The reason why this model must forward whole rows, or None when it can share prefixes."""
    model = _unwrapped(model)
    config = model.config.get_text_config()
    if config.model_type not in MODEL_TYPES:
        return f"equal results are not proved for the architecture {config.model_type!r}"
    if unknown := set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES:
        return f"its layers of type {', '.join(sorted(unknown))} mix tokens in another way"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "it is spread over several devices"
    if config._attn_implementation not in ("sdpa", ATTENTION):
        return f"it was loaded with attn_implementation={config._attn_implementation!r} instead of 'sdpa'"
    return None


def has_window(model: nn.Module) -> bool:
    """Whether a layer of the model attends within a sliding window."""
    return getattr(_unwrapped(model).config.get_text_config(), "sliding_window", None) is not None


def enable(model: nn.Module) -> None:
    """Let the model share prefixes inside `sharing`; everywhere else it stays as it was.

    Raises:
        ValueError: the model cannot (`why_not`).
    """
    if reason := why_not(model):
        raise ValueError(f"this model cannot share prefixes: {reason}")
    _unwrapped(model).set_attn_implementation(ATTENTION)


def disable(model: nn.Module) -> None:
    """Undo `enable`."""
    if is_enabled(model):
        _unwrapped(model).set_attn_implementation("sdpa")


def is_enabled(model: nn.Module) -> bool:
    """Whether `enable` was called on the model."""
    return _unwrapped(model).config.get_text_config()._attn_implementation == ATTENTION


def plan(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, prompts: Tensor) -> PackedRows | None:
    """The rows packed, if the model shares prefixes (`enable`) and this is faster than K rows, else None.

    Arguments as for `pack`.
    """
    if not is_enabled(model):
        return None
    packed = pack(input_ids, attention_mask, prompts)
    return packed if is_faster(packed.input_ids.shape[1], packed.num_row_tokens) else None


def is_faster(num_packed_tokens: int, num_row_tokens: int) -> bool:
    """Whether so many packed tokens save enough to be forwarded instead of the rows' own tokens."""
    saved = num_row_tokens - num_packed_tokens
    return saved >= MIN_SAVED_TOKENS and saved >= MIN_SAVING * num_row_tokens


@contextmanager
def sharing(model: nn.Module, packed: PackedRows) -> Iterator[None]:
    """While it lasts, the forward of the backbone treats its input as the packed row.

    Call the model with `packed.input_ids` and `packed.position_ids`. The whole model may be called (data parallel,
    PEFT, a head on top): the layout is handed over where the backbone is entered, past wrappers that would not pass
    it on.
    """

    def hand_over(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        # A mask of four dimensions is taken as it is: none is built for the packed row, and the attention uses none.
        mask = packed.input_ids.new_ones((1, 1, 1, 1), dtype=torch.bool)
        return args, {**kwargs, "attention_mask": mask, "prefix_layout": packed.layout}

    handle = backbone(model).register_forward_pre_hook(hand_over, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def backbone(model: nn.Module) -> nn.Module:
    """The transformer below the head, inside wrappers (data parallel, PEFT)."""
    return _unwrapped(model).base_model


def _unwrapped(model: nn.Module) -> PreTrainedModel:
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model.get_base_model() if isinstance(model, PeftModel) else model
