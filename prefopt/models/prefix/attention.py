"""Attention of a packed row: what a token may see, computed by the first of several ways that fits the layer.

    flash    the flash attention that the model was loaded with: the package, or a kernel of the Hub
    varlen   PyTorch's flash attention for sequences of any length
    flex     PyTorch's FlexAttention, compiled once for all lengths: capped logits, sinks, heads above 256
    blocks   PyTorch's `scaled_dot_product_attention` on padded blocks: everywhere, and what the others are tried against

A kernel is used after one trial on its device, forward and backward. Which way a model's layers take is logged once.
"""

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from prefopt.models.prefix.layout import Layout, pack

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # PyTorch before 2.10
    varlen_attn = None

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rule:
    """What a layer's attention does besides softmax(scale * q k) v over the tokens that are seen.

    Args:
        scale: default 1 / sqrt(head dimension).
        window: a token sees itself and window - 1 before it.
        softcap: logits are softcap * tanh(logits / softcap).
        dropout: of the weights.
        sinks: `[heads]`, a logit each that takes a share of the weights and has no value.
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0
    sinks: Tensor | None = None


def prefix_sharing_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plain: str = "sdpa",
    prefix_layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention that the model was loaded with, `plain`, unpacking a packed row when there is a layout.

    Args:
        query: `[1, heads, S, dim]`; key and value may have fewer heads.
        plain: a name of transformers' attention interface, or "eager": what runs without a layout.
        prefix_layout: of the packed row.
    """
    if prefix_layout is None:
        # Flash attention looks up in the configuration which kernel it is.
        with _loaded_with(module.config, plain) if is_flash(plain) else nullcontext():
            return _plain_attention(module, plain)(module, query, key, value, attention_mask, **kwargs)
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        # Rotating in fp32 leaves queries and keys in it. PyTorch's attention would round them just so; the kernels
        # take no others.
        query, key, value = (x.to(torch.get_autocast_dtype(device_type)) for x in (query, key, value))
    rule = Rule(
        kwargs.get("scaling"),
        kwargs.get("sliding_window"),
        kwargs.get("softcap"),
        kwargs.get("dropout", 0.0),
        kwargs.get("s_aux"),
    )
    return choose(plain, query, key, value, rule)(query, key, value, prefix_layout, rule), None


def _plain_attention(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if name != "eager":
        return AttentionInterface()[name]
    # Every architecture has its own, next to its layers; a sharded module's class is one of a wrapper's.
    files = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    return next(vars(file)["eager_attention_forward"] for file in files if "eager_attention_forward" in vars(file))


@contextmanager
def _loaded_with(config: PreTrainedConfig, name: str) -> Iterator[None]:
    enabled, config._attn_implementation_internal = config._attn_implementation_internal, name
    try:
        yield
    finally:
        config._attn_implementation_internal = enabled


# ---- blocks --------------------------------------------------------------------------------------------------------
def grouped_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> Tensor:
    """Attention of a packed row, `[1, S, heads, dim]`, on padded blocks.

    The prefixes are one block, causal. The rests are the other: their keys are those of their prefix, then their own.
    """
    num_prefix_tokens = query.shape[2] - layout.num_rest_tokens
    sections = (num_prefix_tokens, layout.num_rest_tokens)

    def unpack(x: Tensor) -> tuple[Tensor, Tensor]:
        prefix, rest = x.squeeze(0).transpose(0, 1).split(sections)
        return layout.prefixes.pad(prefix), layout.rests.pad(rest)

    def attend(block: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        is_plain = rule.softcap is None and rule.sinks is None
        mask = layout.mask(block, rule.window, groups, causal_is_none=is_plain)
        if mask is None:
            out = nn.functional.scaled_dot_product_attention(
                q, k, v, dropout_p=rule.dropout, scale=rule.scale, is_causal=True, enable_gqa=groups > 1
            )
            return out.transpose(1, 2)
        # Query heads that share a key head are no different from more queries: they stand below each other, so that
        # keys and values need not be repeated for them.
        stacked = q.reshape(len(q), k.shape[1], groups * q.shape[2], q.shape[3])
        if is_plain:
            out = nn.functional.scaled_dot_product_attention(
                stacked, k, v, attn_mask=mask, dropout_p=rule.dropout, scale=rule.scale
            )
        else:
            out = _softmax_attention(stacked, k, v, mask, rule)
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


def _softmax_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, rule: Rule) -> Tensor:
    """What `scaled_dot_product_attention` lacks; queries of a key head's group stand below each other."""
    scale = query.shape[3] ** -0.5 if rule.scale is None else rule.scale
    logits = query @ key.transpose(2, 3) * scale
    if rule.softcap is not None:
        logits = torch.tanh(logits / rule.softcap) * rule.softcap
    logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    if rule.sinks is not None:
        groups = len(rule.sinks) // key.shape[1]
        sinks = rule.sinks.to(logits.dtype).view(key.shape[1], groups, 1)
        sinks = sinks.expand(-1, -1, query.shape[2] // groups).reshape(1, key.shape[1], -1, 1)
        logits = torch.cat([logits, sinks.expand(len(query), -1, -1, -1)], dim=3)
    weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))[..., : key.shape[2]].to(
        value.dtype
    )
    return nn.functional.dropout(weights, rule.dropout) @ value


# ---- flash attention: a prefix's keys are repeated for each of its rests, in memory alone; queries stay where they are
def varlen_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> Tensor:
    """Attention of a packed row, `[1, S, heads, dim]`, in one call of PyTorch's kernel: no padding and no masks."""
    sequences = layout.sequences
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    has_switch = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return varlen_attn(
        q,
        k.index_select(0, sequences.keys),
        v.index_select(0, sequences.keys),
        sequences.query_bounds,
        sequences.key_bounds,
        sequences.max_queries,
        sequences.max_keys,
        scale=rule.scale,
        window_size=(-1 if rule.window is None else rule.window - 1, 0),
        # PyTorch 2.11 takes fewer heads of keys without being told so: the kernel is the same.
        **({"enable_gqa": q.shape[1] != k.shape[1]} if has_switch else {}),
    )[None]


def flash_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule, *, name: str) -> Tensor:
    """The same in one call of the flash attention that transformers knows by a name."""
    from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

    (_, varlen, *_), (options, *_) = lazy_import_flash_attention(name)
    sequences = layout.sequences
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    out = varlen(
        q,
        k.index_select(0, sequences.keys),
        v.index_select(0, sequences.keys),
        cu_seqlens_q=sequences.query_bounds,
        cu_seqlens_k=sequences.key_bounds,
        **options(
            query_length=sequences.max_queries,
            key_length=sequences.max_keys,
            is_causal=True,
            dropout=rule.dropout,
            softmax_scale=rule.scale,
            sliding_window=rule.window,
            softcap=rule.softcap,
            s_aux=None if rule.sinks is None else rule.sinks.to(query.dtype),
            max_seqlen_q=sequences.max_queries,
            max_seqlen_k=sequences.max_keys,
        ),
    )
    return (out[0] if isinstance(out, tuple) else out)[None]


# ---- FlexAttention: every key once ---------------------------------------------------------------------------------
@cache
def _flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _with_lse() -> dict[str, Any]:
    """How to ask for the log of the softmax's sum, which torch 2.9 has named anew."""
    from torch.nn.attention import flex_attention as module

    return {"return_aux": module.AuxRequest(lse=True)} if hasattr(module, "AuxRequest") else {"return_lse": True}


def flex_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> Tensor:
    """Attention of a packed row, `[1, S, heads, dim]`, by FlexAttention; no dropout."""

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return rule.softcap * torch.tanh(score / rule.softcap)

    result = _flex_attention()(
        query,
        key,
        value,
        score_mod=None if rule.softcap is None else cap,
        block_mask=layout.block_mask(rule.window),
        scale=rule.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        **({} if rule.sinks is None else _with_lse()),
    )
    if rule.sinks is None:
        return result.transpose(1, 2)
    # exp(lse) is the sum that a softmax divides by; with a sink it is larger by exp(sink).
    out, lse = result[0], getattr(result[1], "lse", result[1])
    share = torch.sigmoid(lse - rule.sinks.float()[:, None])
    return (out * share[..., None].to(out.dtype)).transpose(1, 2)


# ---- which -----------------------------------------------------------------------------------------------------------
Attention = Callable[[Tensor, Tensor, Tensor, Layout, Rule], Tensor]


def choose(plain: str, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Attention:
    """The first way that takes these tensors and this rule and has given the right result on this machine."""
    if not query.is_cuda or (rule.dropout and not is_flash(plain)):
        _log_once("blocks")
        return grouped_attention
    dtypes, dims = {x.dtype for x in (query, key, value)}, {x.shape[3] for x in (query, key, value)}
    is_special = rule.softcap is not None or rule.sinks is not None
    is_for_flash = len(dtypes | dims) == 2 and not dtypes - {torch.float16, torch.bfloat16}
    is_for_flash = is_for_flash and max(dims) % 8 == 0 and max(dims) <= 256
    ways: list[tuple[str, Attention]] = []
    if is_flash(plain) and is_for_flash:
        ways.append((plain, partial(flash_attention, name=plain)))
    if varlen_attn is not None and is_for_flash and not is_special and not rule.dropout:
        ways.append(("varlen", varlen_attention))
    if (is_special or max(dims) > 256) and not rule.dropout and can_compile(query.device.type):
        ways.append(("flex", flex_attention))
    shape = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
    for name, way in ways:
        # Values of sinks are no part of the trial: a layer's parameter would not be found again.
        tried = replace(rule, window=None if rule.window is None else 2, dropout=0.0, sinks=None)
        if kernel_works(name, query.device, query.dtype, shape, tried, rule.sinks is not None):
            _log_once(name)
            return way
    _log_once("blocks")
    return grouped_attention


def is_flash(name: str) -> bool:
    """Whether a name of transformers' attention interface is one of flash attention, the Hub's kernels included."""
    return "flash" in name


def can_compile(device_type: str) -> bool:
    """Whether FlexAttention can be compiled, forward and backward."""
    from torch.utils._triton import has_triton

    return device_type == "cuda" and has_triton()


@cache
def _log_once(name: str) -> None:
    logger.info("attention of packed rows: %s", name)


@cache
def kernel_works(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    rule: Rule,
    has_sinks: bool = False,
) -> bool:
    """Try a kernel once, forward and backward, against `grouped_attention` in fp32 on a few ragged rows.

    Args:
        name: of `choose`.
        shape: heads of the queries, heads of the keys, dimension of a key's head, and of a value's.
    """
    # In a thread of its own, as autocast and the hooks of gradient checkpointing belong to a thread: inside a layer that
    # is checkpointed, what the trial keeps for its backward pass would count as the layer's.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_try_kernel, name, device, dtype, shape, rule, has_sinks).result()


def _try_kernel(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    rule: Rule,
    has_sinks: bool,
) -> bool:
    kernel = {"varlen": varlen_attention, "flex": flex_attention}.get(name) or partial(flash_attention, name=name)
    rows = torch.tensor([[3, 4, 5, 6], [3, 4, 7, 0], [8, 9, 0, 0], [10, 11, 12, 13], [10, 11, 12, 14]])
    layout = pack(rows.to(device), (rows > 0).long().to(device), torch.tensor([0, 0, 1, 2, 2])).layout
    size = int(layout.prefixes.lengths.sum()) + layout.num_rest_tokens
    generator = torch.Generator().manual_seed(0)
    heads, key_heads, key_dim, value_dim = shape
    shapes = [(1, heads, size, key_dim), (1, key_heads, size, key_dim), (1, key_heads, size, value_dim)]
    values = [torch.randn(one, generator=generator) for one in (*shapes, (heads,) * has_sinks)]

    def both_ways(attention: Attention, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(device, dtype).requires_grad_() for x in values]
        of_rule = replace(rule, sinks=inputs[3]) if has_sinks else rule
        with torch.enable_grad():
            out = attention(*inputs[:3], layout, of_rule)
            return [out.detach(), *torch.autograd.grad((out.float() ** 2).sum(), inputs[: 3 + has_sinks])]

    try:
        found = both_ways(kernel, dtype)
        expected = both_ways(grouped_attention, torch.float32)
        worst = max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
    # Whatever a kernel of another package says to such tensors: it is told, and another back-end is tried.
    except (RuntimeError, TypeError, ValueError, ImportError, AttributeError, NotImplementedError) as error:
        logger.warning(f"{name} is not used for the attention of packed rows: {error}")
        return False
    if not worst < 0.05:  # bfloat16 is off by a percent
        logger.warning(f"{name} is not used for the attention of packed rows: its result is off by {worst:.0%}")
        return False
    return True
