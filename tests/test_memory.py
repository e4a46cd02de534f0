"""A plan of memory: parameters against real modules and by hand, moments by hand, and the peak against the allocator's."""

import random
from dataclasses import replace

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config, T5Config

from prefopt.errors import UserError
from prefopt.gpu.random_models import QWEN3_8B
from prefopt.memory import (
    BACKWARD_TILES,
    CUDA_CONTEXT,
    FRAGMENTATION,
    NESTED_NF4,
    NF4,
    STEPS,
    Batch,
    Model,
    Settings,
    fit,
    forwards,
    head_bytes,
    largest_batch,
    moments,
    peak,
)
from prefopt.models.prefix import sharing as prefix_sharing

pytestmark = pytest.mark.slow

LORA = LoraConfig(r=16, target_modules="all-linear", lora_dropout=0.0)
GIB = 2**30


def tiny(**overrides):
    sizes = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    return Qwen3Config(**{**sizes, **overrides})


def settings(config=None, step="reward", **options):
    lora = LORA if options.pop("lora", False) else None
    return Settings(step, Model(config or tiny(), *options.pop("precision", (4, False, 4.0)), lora), **options)


def lora_parameters(config=None):
    return Model(config or tiny(), lora=LORA).adapter


# ---- parameters ----


def test_qwen3_8b_has_the_parameters_that_its_shapes_say():
    h, f, q, kv, layers, vocab = 4096, 12_288, 32 * 128, 8 * 128, 36, 151_936
    linear = layers * (h * q + 2 * h * kv + q * h + 3 * h * f)
    norms = layers * (2 * h + 2 * 128) + h
    model = Model(Qwen3Config(**QWEN3_8B), 2, True, NF4)
    assert model.sizes == (vocab * h, vocab * h, vocab * h + linear + norms, linear)
    assert model.sizes.backbone + model.sizes.lm_head == 8_190_735_360
    assert model.bytes(vocab * h) == 2 * (2 * vocab * h + norms) + linear * (0.5 + 4 / 64)
    assert model.kv_bytes == 2 * kv * 2


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config, GPT2Config], ids=lambda c: c.model_type)
@pytest.mark.parametrize("tied", [True, False])
def test_all_parameters_are_counted(config, tied):
    config = config(**{**tiny().to_diff_dict(), "n_embd": 64, "n_head": 4, "tie_word_embeddings": tied})
    model = AutoModelForCausalLM.from_config(config)
    sizes = Model(config).sizes
    assert sizes.backbone + sizes.lm_head == sum(p.numel() for p in model.parameters())
    assert (sizes.embedding, sizes.lm_head) == (512 * 64, 0 if tied else 512 * 64)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], None])
def test_an_adapter_is_counted_as_peft_makes_it(targets):
    lora = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_config(tiny()), lora)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert Model(tiny(), lora=lora).adapter == trained
    saved = LoraConfig(r=4, target_modules=targets, modules_to_save=["embed_tokens"])
    assert Model(tiny(), lora=saved).adapter == trained + 512 * 64


def test_what_is_no_decoder_is_refused():
    with pytest.raises(UserError, match="no memory arithmetic for the architecture 't5'"):
        _ = Model(T5Config()).sizes
    with pytest.raises(UserError, match=r"lora_target_modules: .*nothing"):
        _ = Model(tiny(), lora=LoraConfig(target_modules=["nothing"])).adapter


@pytest.mark.parametrize(("nested", "bytes_of_weight"), [(False, NF4), (True, NESTED_NF4)])
def test_a_4bit_weight_takes_what_bitsandbytes_takes(nested, bytes_of_weight):
    layer = Linear4bit(1024, 2048, bias=False, quant_type="nf4", compress_statistics=nested)
    layer.weight = Params4bit(
        torch.randn(2048, 1024), requires_grad=False, quant_type="nf4", compress_statistics=nested
    )
    layer = layer.to("cpu")
    state = layer.weight.quant_state
    tensors = [layer.weight, state.absmax, *([state.state2.absmax] if nested else [])]
    assert sum(t.numel() * t.element_size() for t in tensors) == pytest.approx(bytes_of_weight * 1024 * 2048, rel=1e-3)


# ---- activations ----


@pytest.mark.parametrize("batch", [Batch(5, 1, 48), Batch(4, 3, 48, 32)], ids=["rows", "shared prefixes"])
def test_the_line_through_two_and_three_goes_through_more(batch):
    model = Model(tiny(num_hidden_layers=4))
    expected = model._measure(4, batch, True, False)
    assert model.activations(batch) == pytest.approx(expected, rel=5e-3)


def test_checkpointing_keeps_one_vector_a_layer():
    model, batch = Model(tiny(num_hidden_layers=3), lora=LORA), Batch(2, 1, 64)
    kept = {(n, on): model._measure(n, batch, True, on)[0] for n in (2, 3) for on in (False, True)}
    assert kept[3, True] - kept[2, True] == 4 * 2 * 64 * 64  # fp32, 2 rows of 64 tokens, hidden 64
    assert kept[3, False] - kept[2, False] > 5 * 4 * 2 * 64 * 64


def test_shared_prefixes_run_once(monkeypatch):
    monkeypatch.setattr(prefix_sharing, "MIN_SAVED_TOKENS", 64)
    assert (Batch(1, 9, 300).tokens, Batch(1, 9, 300, 256).tokens) == (9 * 300, 256 + 9 * 44)
    assert Batch(1, 2, 100, 10).tokens == 200  # 10 tokens of 200 are too few to pay
    model = Model(tiny(num_hidden_layers=1))
    assert model.activations(Batch(1, 9, 300, 256))[0] < 0.5 * model.activations(Batch(1, 9, 300))[0]


# ---- heads ----


def test_a_fused_head_has_tiles_and_no_logits():
    model = Model(Qwen3Config(**QWEN3_8B), 2, True, NF4, LORA)
    forward, training, kept = head_bytes(model, 10_000, is_cuda=True)
    # the hidden states of all positions, and one tile in bf16; in the backward pass their gradients in fp32
    assert forward == 10_000 * 4096 * 2 + 4096 * 32_768 * 2
    assert training - forward == 10_000 * 4096 * 4
    assert kept == 10_000 * 4096 * 2
    assert head_bytes(model, 10_000, is_cuda=False)[1] - training == BACKWARD_TILES * 4096 * 32_768 * 4


def test_a_dense_head_keeps_its_log_softmax():
    kept, logits = 4 * 100 * (64 + 512), 4 * 100 * 512
    result = head_bytes(Model(tiny(), lora=LORA), 100, is_cuda=False, copies=2)
    assert result == (kept + logits, kept + 2 * logits, kept)
    assert head_bytes(Model(tiny(), lora=LORA), 100, is_cuda=False, copies=4)[0] == kept + 3 * logits


# ---- steps ----


def parts(**options):
    return peak(settings(**options)).parts


@pytest.mark.usefixtures("plain_activations")
def test_adam_has_two_moments_and_an_adapter_little_of_each():
    sizes = Model(tiny()).sizes
    assert parts(step="sft")["optimizer"] == 2 * 4 * (sizes.backbone + sizes.lm_head)
    assert parts(step="sft", optimizer=0.5)["optimizer"] == 0.5 * 4 * (sizes.backbone + sizes.lm_head)
    result, count = parts(step="sft", lora=True), lora_parameters()
    assert (result["adapters"], result["optimizer"]) == (4 * count, 2 * 4 * count)


@pytest.mark.usefixtures("plain_activations")
def test_full_ppo_holds_four_models_and_adapters_one():
    full, shared = parts(step="ppo-ptx"), parts(step="ppo-ptx", lora=True, continues_adapter=True)
    sizes = Model(tiny()).sizes
    policy, value = sizes.backbone + sizes.lm_head, sizes.backbone + 64
    assert full["weights"] == full["reference"] == 4 * policy
    assert full["reward model"] == full["value function"] == 4 * value
    assert full["optimizer"] == 2 * 4 * (policy + value)
    assert "reference" not in shared
    count = lora_parameters()
    assert shared["adapters"] == 4 * 4 * count  # policy, value, reward, reference
    assert shared["optimizer"] == 2 * 2 * 4 * count


@pytest.mark.usefixtures("plain_activations")
def test_a_kv_cache_holds_keys_and_values_of_all_rows():
    result = {m.name: m for m in moments(settings(step="ppo-ptx", rollout=64, prompt=100, completion=20))}
    layer = 2 * 32 * 4 * 64 * 120
    assert result["last token of the rollout"].parts["KV cache"] == 3 * layer + layer // 2
    assert result["prompts of the rollout: head"].parts["KV cache"] == 3 * 2 * 32 * 4 * 64 * 100


@pytest.mark.usefixtures("plain_activations")
def test_a_reference_of_a_full_model_can_be_spared():
    sizes = Model(tiny()).sizes
    assert parts(step="dpo")["reference"] == 4 * (sizes.backbone + sizes.lm_head)
    assert "reference" not in parts(step="dpo", precomputes_reference=True)
    assert "reference" not in parts(step="dpo", lora=True)
    names = [m.name for m in moments(settings(step="dpo", lora=True, precomputes_reference=True))]
    assert not any(name.startswith("reference") for name in names)


@pytest.mark.usefixtures("plain_activations")
def test_pretraining_text_comes_on_top_of_both_gradients():
    options = {"ptx_blocks": 4, "ptx_batch": 2, "ptx_length": 64}
    result = {m.name: m for m in moments(settings(step="ppo-ptx", **options))}
    sizes = Model(tiny()).sizes
    policy = 4 * (sizes.backbone + sizes.lm_head)
    both = policy + 4 * (sizes.backbone + 64)
    assert result["pretraining: head"].parts["gradients"] == both + policy
    assert result["pretraining: embeddings"].parts["gradients"] == both + policy + 4 * 512 * 64
    assert result["optimizer"].parts["gradients"] == both


@pytest.mark.usefixtures("plain_activations")
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_grow_while_the_backward_pass_goes_down(tied):
    config = tiny(tie_word_embeddings=tied)
    result = {m.name.split(": ")[-1]: m for m in moments(settings(config, step="sft"))}
    table, sizes = 512 * 64, Model(config).sizes
    everything = sizes.backbone + sizes.lm_head
    expected = {
        "head": 0,
        "last layer": table,
        "first layer": everything if tied else everything - table,
        "embeddings": everything + (table if tied else 0),  # a second gradient of one table, before the sum
        "optimizer": everything,
    }
    assert {name: m.parts["gradients"] for name, m in result.items()} == {
        name: 4 * count for name, count in expected.items()
    }
    tokens = 8 * 768
    assert result["last layer"].parts["activations"] == int(0.1 * 3 * 1024 * tokens) + 2048 * tokens
    assert result["first layer"].parts["activations"] == int(0.1 * 1024 * tokens) + 2048 * tokens
    accumulated = moments(settings(config, step="sft", accumulation=2))
    assert all(m.parts["gradients"] >= 4 * everything for m in accumulated)


@pytest.mark.usefixtures("plain_activations")
def test_the_exact_kl_holds_logits_of_two_models():
    options = {"step": "ppo-ptx", "rollout": 64, "completion": 20}
    result = {m.name: m for m in moments(settings(has_full_kl=True, **options))}
    rows = 1024 // 20
    logits, chunk = 4 * rows * 20 * 512, 4 * 256 * 512
    assert result["exact KL"].parts["head"] == max(3 * logits + 4 * rows * 512, 2 * logits + 5.25 * chunk)
    assert "exact KL" not in {m.name for m in moments(settings(**options))}


@pytest.mark.parametrize(
    ("max_tokens", "rows", "tokens", "several", "divided"),
    [
        (None, 8, 2 * (100 + 4 * 50), False, False),
        (300, 4, 100 + 4 * 50, True, False),
        (250, 3, 100 + 3 * 50, True, True),
        (150, 1, 150, True, True),
        (10, 1, 150, True, True),
    ],
)
def test_a_token_budget_divides_as_the_trainer_does(max_tokens, rows, tokens, several, divided):
    s = settings(batch=2, k=4, prompt=100, completion=50, max_tokens=max_tokens)
    batch, *result = forwards(s)
    assert (batch.prompts * batch.k, batch.tokens, *result) == (rows, tokens, several, divided)


@pytest.mark.usefixtures("plain_activations")
def test_a_gpu_has_a_context_and_fragments():
    on_cpu, on_gpu = (peak(settings(step="sft", lora=True, is_cuda=is_cuda)) for is_cuda in (False, True))
    assert "CUDA context" not in on_cpu.parts
    moving = sum(on_gpu.parts.get(name, 0) for name in ("gradients", "activations", "head"))
    assert on_gpu.parts["CUDA context"] == CUDA_CONTEXT
    assert on_gpu.parts["fragmentation"] == pytest.approx(FRAGMENTATION * moving, abs=1)


def test_an_unknown_step_is_refused():
    with pytest.raises(ValueError, match="step 'grpo'"):
        moments(settings(step="grpo"))


# ---- fitting ----

LARGE = {"precision": (4, True, 4.0), "is_cuda": True, "checkpointing": False, "batch": 8, "k": 9}


@pytest.mark.usefixtures("plain_activations")
def test_8b_fits_into_24_gib_with_what_is_tried_in_order():
    whole = settings(Qwen3Config(**QWEN3_8B), **LARGE)
    changes, result = fit(whole, 24 * GIB, LORA)
    assert peak(result).bytes <= 24 * GIB < peak(whole).bytes
    assert list(changes)[:3] == ["load_in_4bit", "dtype", "use_peft"]


@pytest.mark.usefixtures("plain_activations")
def test_no_change_where_it_fits_and_the_batch_that_still_does():
    small = settings(lora=True, is_cuda=True, batch=2)
    assert fit(small, 2 * GIB, LORA) == ({}, small)
    size = largest_batch(small, 2 * GIB)
    assert peak(replace(small, batch=size)).bytes <= 2 * GIB
    assert peak(replace(small, batch=size + 1)).bytes > 2 * GIB
    assert largest_batch(small, GIB // 2) == 0


@pytest.mark.usefixtures("plain_activations")
def test_the_largest_budget_of_tokens_that_fits_is_taken():
    changes, result = fit(settings(Qwen3Config(**QWEN3_8B), **{**LARGE, "batch": 128}), 7 * GIB, LORA)
    assert peak(result).bytes <= 7 * GIB
    more = replace(result, max_tokens=changes["max_tokens_per_forward"] + 1024)
    assert peak(more).bytes > 7 * GIB


@pytest.mark.usefixtures("plain_activations")
def test_what_cannot_fit_says_so_and_what_fits_shorter_is_found():
    config = Qwen3Config(**QWEN3_8B)
    assert peak(fit(settings(config, **LARGE), 5 * GIB, LORA)[1]).bytes > 5 * GIB
    ppo = settings(config, step="ppo-ptx", rollout=512, ptx_blocks=64, prompt=4096, completion=4096, **LARGE)
    changes, result = fit(ppo, 10 * GIB, LORA)
    assert peak(result).bytes <= 10 * GIB
    assert {"per_device_train_batch_size", "generation_batch_size", "max_completion_length"} <= {*changes}
    assert result.batch * result.accumulation == ppo.batch


# ---- against the allocator ----


@pytest.fixture
def benchmark(monkeypatch, benchmarks):
    # as users have it; other tests share all prefixes
    monkeypatch.setattr(prefix_sharing, "MIN_SAVED_TOKENS", 64)
    import memory_plan_error

    return memory_plan_error


# Of each step the first draws, and some that were planned wrongly once: the reference of DPO runs while the policy's
# graph waits, and the last layer of rows that are not packed is computed where they are read alone.
@pytest.mark.parametrize(
    ("step", "seed"),
    [*((step, seed) for step in STEPS for seed in (0, 1)), ("reward", 609233), ("dpo", 609233), ("dpo", 5007)],
)
def test_the_planned_peak_of_a_drawn_shape_is_the_measured_one(benchmark, step, seed):
    shape = benchmark.draw(step, random.Random(f"{step} {seed}"))
    assert benchmark.compare(shape)["ratio"] == pytest.approx(1, abs=0.15)
