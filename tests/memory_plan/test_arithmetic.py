"""The parts of a plan, against real modules on the meta device and numbers worked out by hand."""

import copy
import dataclasses

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from prefopt.memory_plan.fitting import NESTED_NF4, NF4, fit, largest_batch
from prefopt.memory_plan.heads import BACKWARD_TILES, dense_head, fused_head
from prefopt.memory_plan.layers import Batch, Layer
from prefopt.memory_plan.models import Adapter, Architecture, Precision, base_bytes
from prefopt.memory_plan.steps import CUDA_CONTEXT, FRAGMENTATION, Settings, forwards, moments, peak

# Qwen3-8B-Base, from its public config.json.
QWEN3_8B = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
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
    config = config or tiny()
    if options.pop("lora", False):
        options["adapter"] = Adapter.of(config, LORA)
    return Settings(step, Architecture.of(config), options.pop("precision", Precision()), **options)


# ---- parameters ----


def test_qwen3_8b_has_the_parameters_that_its_shapes_say():
    h, f, q, kv, layers, vocab = 4096, 12_288, 32 * 128, 8 * 128, 36, 151_936
    linear = h * q + 2 * h * kv + q * h + 3 * h * f
    norms = 2 * h + 2 * 128
    total = 2 * vocab * h + layers * (linear + norms) + h
    architecture = Architecture.of(Qwen3Config(**QWEN3_8B))
    assert architecture.layer_linear == linear
    assert architecture.layer_other == norms
    assert architecture.parameters == total == 8_190_735_360


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config])
def test_one_layer_counts_for_all(config_class, tied):
    config = config_class(**{**QWEN3_8B, "num_hidden_layers": 5, "tie_word_embeddings": tied})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert Architecture.of(config).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], None])
def test_an_adapter_on_one_layer_counts_for_all(targets):
    lora = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_config(tiny()), lora)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert Adapter.of(tiny(), lora).parameters(3) == trained


def test_saved_modules_count_with_the_adapter():
    lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    alone = LoraConfig(r=4, target_modules=["q_proj"])
    assert Adapter.of(tiny(), lora).elsewhere - Adapter.of(tiny(), alone).elsewhere == 512 * 64


def test_another_layer_is_refused():
    with pytest.raises(ValueError, match="no memory arithmetic for the architecture 'gpt2'"):
        Architecture.of(GPT2Config())


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


def test_quantization_packs_linear_maps_alone():
    architecture = Architecture.of(tiny())
    whole = base_bytes(architecture, Precision(2, False, 2.0), architecture.lm_head)
    packed = base_bytes(architecture, Precision(2, False, 0.5), architecture.lm_head)
    assert whole - packed == 1.5 * 3 * architecture.layer_linear


# ---- what autograd keeps ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("lora", [None, LORA, LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1)])
@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config])
def test_a_layer_keeps_what_autograd_saves(config_class, lora, is_padded, dtype):
    """Bytes of all tensors saved by three layers, less those saved by two."""
    sizes = {k: v for k, v in tiny().to_dict().items() if k in QWEN3_8B}
    ids = torch.randint(3, 512, (3, 40))
    mask = torch.ones_like(ids)
    mask[0, -1] -= int(is_padded)
    totals = []
    for layers in (2, 3):
        model = AutoModelForCausalLM.from_config(config_class(**{**sizes, "num_hidden_layers": layers}), dtype=dtype)
        if lora:
            model = get_peft_model(model, copy.deepcopy(lora)).base_model.model
        saved: dict[int, int] = {}
        alive = []

        def keep(tensor, saved=saved, alive=alive):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)  # or its place in memory would be given away
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.train()(input_ids=ids, attention_mask=mask, use_cache=False)
        for parameter in model.parameters():
            saved.pop(parameter.untyped_storage().data_ptr(), None)
        totals.append(sum(saved.values()))
    config = config_class(**sizes)
    size = torch.finfo(dtype).bits // 8
    layer = Layer(Architecture.of(config), Precision(size, False, size), Adapter.of(config, lora) if lora else None)
    assert layer.kept(Batch(3, 40, is_padded=is_padded)) == pytest.approx(totals[1] - totals[0], rel=0.01)


def test_shared_prefixes_are_kept_once():
    rows, shared = Batch(9, 300), Batch(9, 300, prompts=1, prefix=256)
    assert (rows.tokens, shared.tokens) == (9 * 300, 256 + 9 * 44)
    layer = Layer(Architecture.of(tiny()), Precision())
    assert layer.kept(shared) < 0.5 * layer.kept(rows)
    assert not Batch(2, 100, prompts=1, prefix=10).is_packed  # 10 tokens of 200 are too few to pay


def test_flash_attention_on_a_gpu_has_no_masks():
    architecture, half = Architecture.of(tiny()), Precision(2, False, 2.0)
    batch = Batch(8, 300, prompts=2, prefix=200)
    keys = 2 * 200 + 8 * 300  # a prefix is repeated for each of its rests
    expected = 2 * (2 * batch.tokens * 64 + 2 * keys * 32) + batch.tokens * 4 * 4
    on_gpu = Layer(architecture, half, is_cuda=True)
    assert on_gpu.attention(batch).kept == expected
    assert on_gpu.masks(batch) == 0 < Layer(architecture, half).masks(batch)


# ---- heads ----


def test_a_fused_head_has_tiles_and_no_logits():
    architecture = Architecture.of(Qwen3Config(**QWEN3_8B))
    on_gpu = fused_head(architecture, Precision(2, True, NF4), 10_000, is_trained=False, is_cuda=True)
    assert on_gpu.kept == 10_000 * 4096 * 2
    assert on_gpu.forward - on_gpu.kept == 4096 * 32_768 * 2  # one tile in bf16
    assert on_gpu.backward - on_gpu.forward == 10_000 * 4096 * 4  # hidden gradients in fp32
    on_cpu = fused_head(architecture, Precision(2, True, NF4), 10_000, is_trained=False, is_cuda=False)
    assert on_cpu.backward - on_gpu.backward == BACKWARD_TILES * 4096 * 32_768 * 4


def test_a_dense_head_keeps_its_log_softmax():
    head = dense_head(Architecture.of(tiny()), Precision(), 100, forward_copies=4, is_trained=False)
    assert head.kept == 4 * 100 * (64 + 512)
    assert head.forward == head.kept + 3 * 4 * 100 * 512
    assert head.backward == head.kept + 2 * 4 * 100 * 512


# ---- steps ----


def parts(**options):
    return peak(settings(**options)).parts


def test_adam_has_two_moments_and_an_adapter_little_of_each():
    a = Architecture.of(tiny())
    assert parts(step="sft")["optimizer"] == 2 * 4 * a.parameters
    assert parts(step="sft", optimizer=0.5)["optimizer"] == 0.5 * 4 * a.parameters
    count = Adapter.of(tiny(), LORA).parameters(3)
    found = parts(step="sft", lora=True)
    assert (found["adapters"], found["optimizer"]) == (4 * count, 2 * 4 * count)


def test_full_ppo_holds_four_models_and_adapters_one():
    full, shared = parts(step="ppo-ptx"), parts(step="ppo-ptx", lora=True, continues_adapter=True)
    a = Architecture.of(tiny())
    value = a.backbone + a.hidden
    assert full["weights"] == full["reference"] == 4 * a.parameters
    assert full["reward model"] == full["value function"] == 4 * value
    assert full["optimizer"] == 2 * 4 * (a.parameters + value)
    assert "reference" not in shared
    count = Adapter.of(tiny(), LORA).parameters(3)
    assert shared["adapters"] == 4 * 4 * count  # policy, value, reward, reference
    assert shared["optimizer"] == 2 * 2 * 4 * count


def test_a_kv_cache_holds_keys_and_values_of_all_rows():
    found = {m.name: m for m in moments(settings(step="ppo-ptx", rollout=64, prompt=100, completion=20))}
    layer = 2 * 32 * 4 * 64 * 120
    assert found["last token of the rollout"].parts["KV cache"] == 3 * layer + layer // 2
    assert found["prompts of the rollout: head"].parts["KV cache"] == 3 * 2 * 32 * 4 * 64 * 100


def test_a_reference_of_a_full_model_can_be_spared():
    assert parts(step="dpo")["reference"] == 4 * Architecture.of(tiny()).parameters
    assert "reference" not in parts(step="dpo", precomputes_reference=True)
    assert "reference" not in parts(step="dpo", lora=True)


def test_pretraining_text_comes_on_top_of_both_gradients():
    found = {m.name: m for m in moments(settings(step="ppo-ptx", ptx_blocks=4, ptx_batch=2, ptx_length=64))}
    a = Architecture.of(tiny())
    both = 4 * (a.parameters + a.backbone + a.hidden)
    assert found["pretraining: head, forward"].parts["gradients"] == both + 4 * a.parameters
    assert found["optimizer"].parts["gradients"] == both


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_grow_while_the_backward_pass_goes_down(tied):
    config = tiny(tie_word_embeddings=tied)
    found = {m.name.split(": ")[-1]: m for m in moments(settings(config, step="sft"))}
    a, table = Architecture.of(config), 512 * 64
    everything = a.layers * a.layer + 64 + table * (1 if tied else 2)
    expected = {
        "head, forward": 0,
        "last layer": table + a.layer,
        "first layer": everything if tied else everything - table,
        "embeddings": everything + (table if tied else 0),  # a second gradient of one table, before the sum
        "optimizer": everything,
    }
    assert {name: found[name].parts.get("gradients", 0) for name in expected} == {
        name: 4 * count for name, count in expected.items()
    }
    accumulated = moments(settings(config, step="sft", accumulation=2))
    assert all(m.parts["gradients"] >= 4 * everything for m in accumulated)


def test_the_exact_kl_holds_logits_of_two_models():
    found = {m.name: m for m in moments(settings(step="ppo-ptx", rollout=64, completion=20, has_full_kl=True))}
    rows = 1024 // 20
    logits, chunk = 4 * rows * 20 * 512, 4 * 256 * 512
    assert found["exact KL"].parts["head"] == max(3 * logits + 4 * rows * 512, 2 * logits + 5.25 * chunk)
    assert "exact KL" not in {m.name for m in moments(settings(step="ppo-ptx"))}


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
    batch, *found = forwards(s)
    assert (batch.rows, batch.tokens, *found) == (rows, tokens, several, divided)


def test_checkpointing_keeps_one_vector_a_layer():
    long = {"step": "reward", "lora": True, "k": 4, "prompt": 400, "completion": 100}
    without, with_it = (parts(checkpointing=on, **long)["activations"] for on in (False, True))
    layer = settings(**long)
    batch, _, _ = forwards(layer)
    kept = Layer(layer.architecture, layer.precision, layer.adapter).kept(batch)
    stream = 4 * batch.tokens * 64
    # three layers' tensors (the first has no residual to differentiate) against three streams and one layer again
    assert without - with_it == 3 * kept - stream - (3 * stream + kept - stream)


def test_a_gpu_has_a_context_and_fragments():
    on_cpu, on_gpu = (
        peak(settings(step="sft", lora=True)),
        peak(settings(step="sft", lora=True, is_cuda=True)),
    )
    assert "CUDA context" not in on_cpu.parts
    moving = sum(on_gpu.parts.get(name, 0) for name in ("gradients", "activations", "head"))
    assert on_gpu.parts["CUDA context"] == CUDA_CONTEXT
    assert on_gpu.parts["fragmentation"] == pytest.approx(FRAGMENTATION * moving, abs=1)


def test_an_unknown_step_is_refused():
    with pytest.raises(ValueError, match="step 'grpo'"):
        moments(settings(step="grpo"))


# ---- fitting ----

LARGE = {"precision": Precision(4, True, 4.0), "is_cuda": True, "checkpointing": False, "batch": 8, "k": 9}


def test_8b_fits_into_24_gib_with_what_is_tried_in_order():
    config = Qwen3Config(**QWEN3_8B)
    whole = settings(config, **LARGE)
    found = fit(whole, 24 * GIB, Adapter.of(config, LORA))
    assert found.fits
    assert peak(found.settings).bytes <= 24 * GIB < peak(whole).bytes
    assert list(found.changes)[:4] == ["load_in_4bit", "dtype", "use_peft", "gradient_checkpointing"]


def test_no_change_where_it_fits_and_the_batch_that_still_does():
    small = settings(lora=True, is_cuda=True, batch=2)
    found = fit(small, 2 * GIB, small.adapter)
    assert (found.fits, found.changes, found.settings) == (True, {}, small)
    size = largest_batch(small, 2 * GIB)
    assert peak(dataclasses.replace(small, batch=size)).bytes <= 2 * GIB
    assert peak(dataclasses.replace(small, batch=size + 1)).bytes > 2 * GIB


def test_the_largest_budget_of_tokens_that_fits_is_taken():
    config = Qwen3Config(**QWEN3_8B)
    found = fit(settings(config, **LARGE), 10 * GIB, Adapter.of(config, LORA))
    tokens = found.changes["max_tokens_per_forward"]
    assert found.fits
    more = dataclasses.replace(found.settings, max_tokens=tokens + 1024)
    assert peak(more).bytes > 10 * GIB


def test_what_cannot_fit_says_so_and_what_fits_shorter_is_found():
    config = Qwen3Config(**QWEN3_8B)
    qlora = Adapter.of(config, LORA)
    assert not fit(settings(config, **LARGE), 6 * GIB, qlora).fits
    ppo = settings(config, step="ppo-ptx", rollout=512, ptx_blocks=64, prompt=4096, completion=4096, **LARGE)
    found = fit(ppo, 10 * GIB, qlora)
    assert found.fits
    assert {"per_device_train_batch_size", "generation_batch_size", "max_completion_length"} <= {*found.changes}
    assert found.settings.batch * found.settings.accumulation == ppo.batch


def test_a_plan_reads_the_config_that_is_on_disk(tmp_path):
    Qwen3Config(**QWEN3_8B).save_pretrained(tmp_path)
    assert Architecture.of(AutoConfig.from_pretrained(tmp_path)) == Architecture.of(Qwen3Config(**QWEN3_8B))
