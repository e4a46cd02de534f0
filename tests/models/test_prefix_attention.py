"""Attention of packed rows by a kernel for sequences of any length; here a loop stands in for the CUDA kernel."""

import random

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
)

from prefopt.models.prefix import attention as prefix_attention
from prefopt.models.prefix import sharing as prefix_sharing
from prefopt.models.prefix.attention import (
    grouped_attention,
    has_varlen_kernel,
    varlen_attention,
    varlen_kernel_works,
)
from prefopt.models.prefix.layout import pack
from prefopt.models.reward import checkpoint_activations, sequence_scores


def varlen_by_loop(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """`torch.nn.attention.varlen.varlen_attn` by its documentation, one sequence and one head at a time."""
    left, right = window_size
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa or query.shape[1] == key.shape[1]
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[2] ** -0.5 if scale is None else scale
    out = []
    bounds = zip(cu_seq_q, cu_seq_q[1:], cu_seq_k, cu_seq_k[1:], strict=False)
    for q_start, q_end, k_start, k_end in (map(int, some) for some in bounds):
        assert 0 < q_end - q_start <= max_q
        assert q_end - q_start <= k_end - k_start <= max_k
        own = torch.arange(k_end - k_start - (q_end - q_start), k_end - k_start)[:, None]  # aligned at the last
        other = torch.arange(k_end - k_start)[None]
        seen = (other <= own + right) & ((other >= own - left) if left >= 0 else True)
        heads = []
        for head in range(query.shape[1]):
            q, k, v = (
                query[q_start:q_end, head],
                key[k_start:k_end, head // groups],
                value[k_start:k_end, head // groups],
            )
            heads.append((q @ k.T * scale).masked_fill(~seen, float("-inf")).softmax(-1) @ v)
        out.append(torch.stack(heads, 1))
    assert q_end == len(query)
    assert k_end == len(key)
    return torch.cat(out)


@pytest.fixture(autouse=True)
def loop_for_the_kernel(monkeypatch):
    monkeypatch.setattr(prefix_attention, "varlen_attn", varlen_by_loop)
    varlen_kernel_works.cache_clear()
    yield
    varlen_kernel_works.cache_clear()


def random_rows(rng: random.Random) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of one to four prompts that share from nothing to all but the last token."""
    rows, prompts = [], []
    for b in range(rng.randrange(1, 5)):
        prompt = [rng.randrange(3, 30) for _ in range(rng.randrange(0, 7))]
        for _ in range(rng.randrange(1, 5)):
            rows.append(prompt + [rng.randrange(3, 6) for _ in range(rng.randrange(1, 6))])
            prompts.append(b)
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return ids, (ids > 0).long(), torch.tensor(prompts)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
def test_varlen_equals_blocks(heads, window):
    """Outputs and gradients; the blocks are compared with one softmax at a time in test_prefix_sharing.py."""
    rng, generator, module = random.Random(0), torch.Generator().manual_seed(0), nn.Module()
    module.num_key_value_groups = heads[0] // heads[1]
    unshared = 0
    for _ in range(25):
        packed = pack(*random_rows(rng))
        unshared += int((packed.layout.prefixes.lengths == 0).any())
        size = packed.input_ids.shape[1]
        tensors = [
            torch.randn(1, n, size, 8, generator=generator, dtype=torch.float64, requires_grad=True)
            for n in (heads[0], heads[1], heads[1])
        ]
        weights = torch.randn(1, size, heads[0], 8, generator=generator, dtype=torch.float64)
        results = []
        for out in (
            varlen_attention(*tensors, packed.layout, 0.7, window),
            grouped_attention(module, *tensors, packed.layout, window, scaling=0.7),
        ):
            results.append([out, *torch.autograd.grad((out * weights).sum(), tensors)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert unshared > 3


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_scores_as_with_rows(kind, checkpointing, monkeypatch):
    config_class, model_class, extra = {
        "llama": (LlamaConfig, LlamaForSequenceClassification, {}),
        "mistral": (MistralConfig, MistralForSequenceClassification, {"sliding_window": 4}),
    }[kind]
    config = config_class(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, num_labels=1, initializer_range=0.2,
        **extra,
    )  # fmt: skip
    torch.manual_seed(0)
    model = model_class(config).train()
    if checkpointing:
        checkpoint_activations(model, {"use_reentrant": False})
    ids, mask, prompts = random_rows(random.Random(3))
    weights = torch.randn(len(ids), generator=torch.Generator().manual_seed(1))

    def both_ways(packed):
        model.zero_grad()
        scores = sequence_scores(model, ids, mask, packed=packed)
        (scores * weights).sum().backward()
        return scores, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected = both_ways(None)
    calls = []
    monkeypatch.setattr(prefix_attention, "has_varlen_kernel", lambda *args: True)
    monkeypatch.setattr(
        prefix_attention,
        "varlen_attn",
        lambda *args, **kwargs: calls.append(1) or varlen_by_loop(*args, **kwargs),
    )
    prefix_sharing.enable(model)
    scores, gradient = both_ways(pack(ids, mask, prompts))
    assert len(calls) == 2 * (2 if checkpointing else 1)  # layers, and again in the backward pass
    torch.testing.assert_close(scores, expected[0], rtol=0, atol=1e-6)
    assert torch.linalg.vector_norm(gradient - expected[1]) < 1e-5 * torch.linalg.vector_norm(expected[1])


def test_the_first_forward_may_be_one_of_training_under_autocast(monkeypatch):
    """Queries and keys reach the kernel in 16 bits, and its trial inside a checkpointed layer leaves the layer alone."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, num_labels=1, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).train()
    checkpoint_activations(model, {"use_reentrant": False})
    prefix_sharing.enable(model)
    ids, mask, prompts = random_rows(random.Random(3))
    dtypes = []

    def on_the_cpu(query, key, value, dropout, window):
        dtypes.extend(x.dtype for x in (query, key, value))
        return varlen_kernel_works(query.device, query.dtype, (4, 2), 8, window is not None)

    monkeypatch.setattr(prefix_attention, "has_varlen_kernel", on_the_cpu)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = sequence_scores(model, ids, mask, packed=pack(ids, mask, prompts))
    scores.sum().backward()
    assert set(dtypes) == {torch.bfloat16}
    assert varlen_kernel_works.cache_info().misses == 1


def test_the_cpu_has_no_kernel():
    assert not has_varlen_kernel(*torch.randn(3, 1, 2, 5, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_window", [False, True])
def test_a_right_kernel_is_trusted(dtype, has_window, caplog):
    assert varlen_kernel_works(torch.device("cpu"), dtype, (4, 2), 8, has_window)
    assert not caplog.records


def looks_ahead(*args, window_size, **kwargs):
    return varlen_by_loop(*args, window_size=(window_size[0], 1), **kwargs)


def forgets_the_window(*args, window_size, **kwargs):
    return varlen_by_loop(*args, window_size=(-1, 0), **kwargs)


def has_a_wrong_gradient(query, key, value, *args, **kwargs):
    return varlen_by_loop(query, key.detach(), value, *args, **kwargs) + 0 * key.sum()


def is_missing(*args, **kwargs):
    raise RuntimeError("no kernel image is available for execution on the device")


def takes_other_heads(*args, **kwargs):
    raise ValueError("number of heads in key must divide those in query")


def has_other_arguments(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (looks_ahead, "off by"),
        (forgets_the_window, "off by"),
        (has_a_wrong_gradient, "off by"),
        (is_missing, "no kernel image"),
        (takes_other_heads, "number of heads"),
        (has_other_arguments, "unexpected keyword"),
    ],
)
def test_a_wrong_kernel_is_not_used(kernel, reason, monkeypatch, caplog):
    monkeypatch.setattr(prefix_attention, "varlen_attn", kernel)
    for _ in range(3):
        assert not varlen_kernel_works(torch.device("cpu"), torch.bfloat16, (4, 2), 8, True)
    (record,) = caplog.records
    assert reason in record.message
