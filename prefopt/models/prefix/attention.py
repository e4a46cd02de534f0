"""Attention of a packed row: what a token may see, computed on blocks or by a kernel for sequences of any length."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from prefopt.models.prefix.layout import Layout, pack

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # PyTorch before 2.10
    varlen_attn = None

logger = logging.getLogger(__name__)


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
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        # Rotating in fp32 leaves queries and keys in it. PyTorch's attention would round them just so; the kernel
        # takes no others.
        query, key, value = (x.to(torch.get_autocast_dtype(device_type)) for x in (query, key, value))
    dropout, scale = kwargs.get("dropout", 0.0), kwargs.get("scaling")
    if has_varlen_kernel(query, key, value, dropout, sliding_window):
        return varlen_attention(query, key, value, prefix_layout, scale, sliding_window), None
    return grouped_attention(module, query, key, value, prefix_layout, sliding_window, **kwargs), None


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attention of a packed row, `[1, S, heads, dim]`, by PyTorch's `scaled_dot_product_attention` on padded blocks.

    The prefixes are one block, causal. The rests are the other: their keys are those of their prefix, then their own.
    """
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
    return torch.cat([layout.prefixes.unpad(prefix), layout.rests.unpad(rest)])[None]


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scale: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Attention of a packed row, `[1, S, heads, dim]`, in one call of flash attention: no padding and no masks.

    Queries stay where they are. Keys of a prefix are repeated for each of its rests, in memory alone.
    """
    sequences = layout.sequences
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return varlen_attn(
        q,
        k.index_select(0, sequences.keys),
        v.index_select(0, sequences.keys),
        sequences.query_bounds,
        sequences.key_bounds,
        sequences.max_queries,
        sequences.max_keys,
        scale=scale,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )[None]


def has_varlen_kernel(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, sliding_window: int | None = None
) -> bool:
    """Whether `varlen_attention` takes these tensors, and has given the right result on this machine."""
    if varlen_attn is None or not query.is_cuda or dropout:
        return False
    head_dim = query.shape[3]
    if query.dtype not in (torch.float16, torch.bfloat16) or head_dim % 8 or head_dim > 128:
        return False
    if {x.dtype for x in (key, value)} != {query.dtype} or value.shape[3] != head_dim:
        return False
    heads = (query.shape[1], key.shape[1])
    return varlen_kernel_works(query.device, query.dtype, heads, head_dim, sliding_window is not None)


@cache
def varlen_kernel_works(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int], head_dim: int, has_window: bool
) -> bool:
    """Try the kernel once, forward and backward, against `grouped_attention` in fp32 on a few ragged rows."""
    # In a thread of its own, as autocast and the hooks of gradient checkpointing belong to a thread: inside a layer that
    # is checkpointed, what the trial keeps for its backward pass would count as the layer's.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_try_varlen_kernel, device, dtype, heads, head_dim, has_window).result()


def _try_varlen_kernel(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int], head_dim: int, has_window: bool
) -> bool:
    rows = torch.tensor([[3, 4, 5, 6], [3, 4, 7, 0], [8, 9, 0, 0], [10, 11, 12, 13], [10, 11, 12, 14]])
    layout = pack(rows.to(device), (rows > 0).long().to(device), torch.tensor([0, 0, 1, 2, 2])).layout
    size = int(layout.prefixes.lengths.sum()) + layout.num_rest_tokens
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, n, size, head_dim) for n in (heads[0], heads[1], heads[1])]
    values = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    window = 2 if has_window else None

    def both_ways(attention: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (x.to(dtype).requires_grad_() for x in values)
        with torch.enable_grad():
            out = attention(q, k, v, layout, sliding_window=window)
            return [out.detach(), *torch.autograd.grad((out.float() ** 2).sum(), (q, k, v))]

    try:
        found = both_ways(varlen_attention, dtype)
        module = nn.Module()
        module.num_key_value_groups = heads[0] // heads[1]
        expected = both_ways(partial(grouped_attention, module), torch.float32)
        worst = max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
    except (RuntimeError, TypeError, ValueError) as error:
        logger.warning(f"Flash attention for sequences of any length is not used: {error}")
        return False
    if not worst < 0.05:  # bfloat16 is off by a percent
        logger.warning(f"Flash attention for sequences of any length is not used: its result is off by {worst:.0%}")
        return False
    return True
