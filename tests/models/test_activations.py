"""What is measured on fake tensors is what the CPU allocator sees of real ones, whatever the architecture."""

import copy
from contextlib import nullcontext

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModel, Gemma3TextConfig, GPT2Config, LlamaConfig, Phi3Config, Qwen3Config

from prefopt.models.activations import activation_bytes
from prefopt.models.passes import last_mlp_at, sharing
from prefopt.models.prefix.sharing import enable, plan

pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
CONFIGS = {
    "qwen3": Qwen3Config(**SIZES),
    "llama": LlamaConfig(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES),
    "phi3": Phi3Config(**SIZES),
    "gpt2": GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
}
OPTIONS = [
    {"lora": True, "checkpointing": True, "autocast": True},
    {"lora": True, "shares_prefixes": True},
    {},
    {"checkpointing": True},
    {"autocast": True},
    {"lora": True},
    {"lora": True, "dropout": 0.1},
    {"lora": True, "is_trained": False},
    {"lora": True, "first": 39},
    {"shares_prefixes": True},
]


@pytest.fixture
def allocations(benchmarks):
    import memory_plan_error

    return memory_plan_error.allocations


@pytest.fixture
def rows():
    """Two prompts of 40 tokens with three completions of 24; the second row is shorter."""
    ids = torch.randint(3, 64, (6, 64))
    ids[:3, :40], ids[3:, :40] = ids[0, :40], ids[3, :40]
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return ids, mask, torch.tensor([0, 0, 0, 1, 1, 1])


def net_of(config, lora=None, dtype=torch.float32, device="meta"):
    with torch.device(device):
        net = AutoModel.from_config(copy.deepcopy(config), dtype=dtype)
    if lora:
        net = inject_adapter_in_model(copy.deepcopy(lora), net, low_cpu_mem_usage=device == "meta")
    return net


def measured(
    allocations,
    net,
    rows,
    *,
    is_trained=True,
    checkpointing=False,
    shares_prefixes=False,
    autocast=False,
    first=0,
):
    """The same by the allocator: kept, and the peak of both passes."""
    for module in net.modules():
        if isinstance(module, nn.Embedding):
            module.weight.requires_grad_(False)
    if is_trained and (checkpointing or not any("lora_" in name for name, _ in net.named_parameters())):
        net.enable_input_require_grads()
    if checkpointing:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    net.train(is_trained)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    packed = None
    if shares_prefixes:
        enable(net)
        packed = plan(net, *rows)
    with allocations() as events:
        with torch.set_grad_enabled(is_trained), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if packed is None:
                with last_mlp_at(net, first, 64) if first else nullcontext():
                    output = net(input_ids=rows[0].clone(), attention_mask=rows[1].clone(), use_cache=False)[0]
            else:
                where = {"input_ids": packed.input_ids, "position_ids": packed.position_ids}
                with sharing(net, packed):
                    output = net(**where, use_cache=False)[0]
            with torch.profiler.record_function("forward done"):
                pass
        if is_trained:
            output.backward(torch.empty_like(output))
    alive = peak = kept = 0
    for _, size, name in events:
        alive += size
        peak = max(peak, alive)
        if name == "forward done":
            kept = alive
    # Each of two layers keeps the state of the CPU's generator, whatever the sizes; fake tensors have none.
    states = 2 * torch.get_rng_state().nbytes if checkpointing else 0
    return kept - states, peak - states


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in CONFIGS for options in OPTIONS[: None if name == "qwen3" else 2]],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_fake_tensors_take_what_real_ones_take(allocations, rows, name, options):
    config, options = CONFIGS[name], dict(options)
    dropout, lora = options.pop("dropout", 0.0), None
    if options.pop("lora", False):
        lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout)
    expected = measured(allocations, net_of(config, lora, device="cpu"), rows, **options)
    result = activation_bytes(net_of(config, lora), rows, **options)
    assert result == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "options",
    [{"autocast": True}, {"autocast": True, "checkpointing": True}, {"autocast": True, "is_trained": False}, {}],
    ids=" ".join,
)
def test_quantized_maps_take_what_those_of_bitsandbytes_take(allocations, rows, options):
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
    net = net_of(CONFIGS["llama"], None, torch.bfloat16, "cpu")
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Linear):
            packed = Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16)
            packed.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            parent, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(parent), leaf, packed.to("cpu"))
    net.is_loaded_in_4bit = True
    net = inject_adapter_in_model(lora, net)
    for module in net.modules():
        if isinstance(module, LoraLayer):
            assert "bnb" in type(module).__module__
            module.cast_input_dtype_enabled = "autocast" not in options  # as under CUDA's autocast
    for parameter in net.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    expected = measured(allocations, net, rows, **options)
    result = activation_bytes(net_of(CONFIGS["llama"], lora, torch.bfloat16), rows, is_quantized=True, **options)
    assert result == pytest.approx(expected, rel=0.02)
