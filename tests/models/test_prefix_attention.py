"""Attention of packed rows by a kernel for sequences of any length; here a loop stands in for the CUDA kernel."""

import logging
import random
from functools import partial, wraps
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    modeling_flash_attention_utils,
)

from prefopt.models.prefix import attention as prefix_attention
from prefopt.models.prefix import sharing as prefix_sharing
from prefopt.models.prefix.attention import (
    Rule,
    choose,
    flash_attention,
    flex_attention,
    grouped_attention,
    kernel_works,
    varlen_attention,
)
from prefopt.models.prefix.layout import pack
from prefopt.models.reward import checkpoint_activations, sequence_scores


def varlen_by_loop(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False,
    softcap=0.0, sinks=None,
):  # fmt: skip
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
            logits = q @ k.T * scale
            logits = softcap * (logits / softcap).tanh() if softcap else logits
            logits = logits.masked_fill(~seen, float("-inf"))
            if sinks is not None:
                logits, v = torch.cat([logits, sinks[head].expand(len(q), 1)], 1), torch.cat([v, 0 * v[:1]])
            heads.append(logits.softmax(-1) @ v)
        out.append(torch.stack(heads, 1))
    assert q_end == len(query)
    assert k_end == len(key)
    return torch.cat(out)


def flash_by_loop(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, s_aux=None,
):  # fmt: skip
    """`flash_attn_varlen_func` by its documentation: what comes after a token is never seen when it is causal."""
    assert causal
    assert dropout_p == 0
    return varlen_by_loop(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=softmax_scale,
        window_size=(window_size[0], 0), enable_gqa=True, softcap=softcap, sinks=s_aux,
    )  # fmt: skip


def flash_without_sinks(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0,
):  # fmt: skip
    return flash_by_loop(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap,
    )  # fmt: skip


def load_flash(monkeypatch, varlen):
    """transformers finds this flash attention, whatever the name."""
    options = modeling_flash_attention_utils._lazy_define_process_function(varlen)
    loaded = ((None, varlen, None, None, None), (options, None))
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda name: loaded)


@pytest.fixture(autouse=True)
def loop_for_the_kernel(monkeypatch):
    monkeypatch.setattr(prefix_attention, "varlen_attn", varlen_by_loop)
    kernel_works.cache_clear()
    yield
    kernel_works.cache_clear()


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
@pytest.mark.parametrize("kernel", ["varlen", "flash"])
def test_kernels_equal_blocks(kernel, heads, window, monkeypatch):
    """Outputs and gradients; the blocks are compared with one softmax at a time in test_prefix_sharing.py."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    load_flash(monkeypatch, flash_by_loop)
    attention, softcap = varlen_attention, None
    if kernel == "flash":
        attention, softcap = partial(flash_attention, name="flash_attention_2"), 0.5
    unshared = 0
    for _ in range(25):
        packed = pack(*random_rows(rng))
        unshared += int((packed.layout.prefixes.lengths == 0).any())
        size = packed.input_ids.shape[1]
        tensors = [
            torch.randn(1, n, size, 8, generator=generator, dtype=torch.float64, requires_grad=True)
            for n in (heads[0], heads[1], heads[1])
        ]
        sinks = None
        if kernel == "flash":
            sinks = torch.randn(heads[0], generator=generator, dtype=torch.float64, requires_grad=True)
            tensors.append(sinks)
        rule = Rule(0.7, window, softcap, sinks=sinks)
        weights = torch.randn(1, size, heads[0], 8, generator=generator, dtype=torch.float64)
        results = []
        for way in (attention, grouped_attention):
            out = way(*tensors[:3], packed.layout, rule)
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
    monkeypatch.setattr(prefix_attention, "choose", lambda *args: varlen_attention)
    monkeypatch.setattr(
        prefix_attention,
        "varlen_attn",
        wraps(varlen_by_loop)(lambda *args, **kwargs: calls.append(1) or varlen_by_loop(*args, **kwargs)),
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

    def on_the_cpu(plain, query, key, value, rule):
        dtypes.extend(x.dtype for x in (query, key, value))
        assert kernel_works("varlen", query.device, query.dtype, (4, 2, 8, 8), Rule(window=rule.window))
        return varlen_attention

    monkeypatch.setattr(prefix_attention, "choose", on_the_cpu)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = sequence_scores(model, ids, mask, packed=pack(ids, mask, prompts))
    scores.sum().backward()
    assert set(dtypes) == {torch.bfloat16}
    assert kernel_works.cache_info().misses == 1


def varlen_of_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    return varlen_by_loop(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=True
    )


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_a_torch_without_the_switch_for_fewer_heads_of_keys(heads, monkeypatch):
    monkeypatch.setattr(prefix_attention, "varlen_attn", varlen_of_torch_2_11)
    assert kernel_works("varlen", torch.device("cpu"), torch.float32, (*heads, 8, 8), Rule(window=2))


def test_the_cpu_has_no_kernel():
    assert choose("flash_attention_2", *torch.randn(3, 1, 2, 5, 8, dtype=torch.bfloat16), Rule()) is grouped_attention


class OnAGPU(SimpleNamespace):
    """As much of a tensor there as decides which way its attention takes."""

    def __init__(self, heads, dim, dtype=torch.bfloat16):
        super().__init__(is_cuda=True, device=torch.device("cuda"), dtype=dtype, shape=(1, heads, 9, dim))


@pytest.mark.parametrize(
    ("plain", "dim", "dtype", "rule", "expected"),
    [
        ("sdpa", 128, torch.bfloat16, {}, ["varlen"]),
        ("sdpa", 256, torch.float16, {"window": 7}, ["varlen"]),  # Gemma's heads
        ("sdpa", 512, torch.bfloat16, {}, ["flex"]),  # Gemma 4's
        ("sdpa", 100, torch.bfloat16, {}, []),
        ("sdpa", 128, torch.float32, {}, []),
        ("sdpa", 128, torch.bfloat16, {"dropout": 0.1}, []),
        ("eager", 256, torch.bfloat16, {"softcap": 50.0}, ["flex"]),
        ("eager", 64, torch.float32, {"sinks": torch.zeros(4)}, ["flex"]),
        ("flash_attention_2", 128, torch.bfloat16, {"softcap": 50.0}, ["flash_attention_2", "flex"]),
        ("flash_attention_2", 128, torch.bfloat16, {"dropout": 0.1}, ["flash_attention_2"]),
        ("kernels-community/vllm-flash-attn3", 64, torch.bfloat16, {"sinks": torch.zeros(4)},
         ["kernels-community/vllm-flash-attn3", "flex"]),
        ("flash_attention_3", 64, torch.bfloat16, {}, ["flash_attention_3", "varlen"]),
    ],
)  # fmt: skip
def test_which_way_a_layer_takes(plain, dim, dtype, rule, expected, monkeypatch, caplog):
    """Each is tried, in this order; blocks are what is left, and each is named once."""
    caplog.set_level(logging.INFO, prefix_attention.logger.name)
    tensors = [OnAGPU(heads, dim, dtype) for heads in (4, 2, 2)]
    monkeypatch.setattr(prefix_attention, "can_compile", lambda device_type: True)
    ways = {"varlen": varlen_attention, "flex": flex_attention}
    for number in range(len(expected) + 1):
        tried = []

        def works(name, device, dtype, shape, rule, has_sinks, tried=tried, number=number):
            tried.append(name)
            assert shape == (4, 2, dim, dim)
            return len(tried) > number

        monkeypatch.setattr(prefix_attention, "kernel_works", works)
        prefix_attention._log_once.cache_clear()
        for _ in range(2):
            tried.clear()
            way = choose(plain, *tensors, Rule(**rule))
        assert tried == expected[: number + 1]
        name = expected[number] if number < len(expected) else "blocks"
        if name in ways or name == "blocks":
            assert way is ways.get(name, grouped_attention)
        else:
            assert (way.func, way.keywords) == (flash_attention, {"name": name})
        assert caplog.messages[-1].endswith(f": {name}")
        assert len(caplog.messages) == number + 1
    monkeypatch.setattr(prefix_attention, "can_compile", lambda device_type: False)
    tried.clear()
    choose(plain, *tensors, Rule(**rule))
    assert "flex" not in tried


def test_a_model_with_flash_attention_shares_and_is_otherwise_as_it_was_loaded(monkeypatch):
    """Without a layout its own attention runs, which reads in the configuration which kernel it is."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, num_labels=1, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    ids, mask, prompts = random_rows(random.Random(3))
    expected = sequence_scores(model, ids, mask)
    names = []

    def flash_on_the_cpu(module, *args, **kwargs):
        names.append(module.config._attn_implementation)
        return AttentionInterface()["sdpa"](module, *args, **kwargs)

    name = "kernels-community/flash-attn2"
    AttentionInterface.register(name, flash_on_the_cpu)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", name)
    try:
        assert prefix_sharing.why_not(model) is None
        prefix_sharing.enable(model)
        assert model.config._attn_implementation != name
        torch.testing.assert_close(sequence_scores(model, ids, mask), expected, rtol=0, atol=1e-6)
        assert names == [name] * 2
        packed = sequence_scores(model, ids, mask, packed=pack(ids, mask, prompts))
        torch.testing.assert_close(packed, expected, rtol=0, atol=1e-6)
        assert len(names) == 2
        monkeypatch.setattr(model, "set_attn_implementation", lambda name: names.append(name))
        prefix_sharing.disable(model)
        assert names[2:] == [name]
    finally:
        del AttentionInterface._global_mapping[name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("name", ["varlen", "flash_attention_2"])
def test_a_right_kernel_is_trusted(name, dtype, window, caplog, monkeypatch):
    load_flash(monkeypatch, flash_by_loop)
    rule = Rule(window=window, softcap=None if name == "varlen" else 1.0)
    assert kernel_works(name, torch.device("cpu"), dtype, (4, 2, 8, 8), rule, name != "varlen")
    assert not caplog.records


def test_a_flash_attention_that_drops_the_sinks_is_not_used(caplog, monkeypatch):
    """transformers hands them over to those that take them, and says nothing of the others."""
    load_flash(monkeypatch, flash_without_sinks)
    assert kernel_works("flash_attention_2", torch.device("cpu"), torch.bfloat16, (4, 2, 8, 8), Rule())
    assert not kernel_works("flash_attention_2", torch.device("cpu"), torch.bfloat16, (4, 2, 8, 8), Rule(), True)
    assert "flash_attention_2 is not used" in caplog.records[-1].message


@wraps(varlen_by_loop)
def looks_ahead(*args, window_size, **kwargs):
    return varlen_by_loop(*args, window_size=(window_size[0], 1), **kwargs)


@wraps(varlen_by_loop)
def forgets_the_window(*args, window_size, **kwargs):
    return varlen_by_loop(*args, window_size=(-1, 0), **kwargs)


@wraps(varlen_by_loop)
def has_a_wrong_gradient(query, key, value, *args, **kwargs):
    return varlen_by_loop(query, key.detach(), value, *args, **kwargs) + 0 * key.sum()


@wraps(varlen_by_loop)
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
        assert not kernel_works("varlen", torch.device("cpu"), torch.bfloat16, (4, 2, 8, 8), Rule(window=2))
    (record,) = caplog.records
    assert reason in record.message
