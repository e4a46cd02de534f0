"""Memory of PPO's four roles: four 4-bit models with adapters against four adapters on one 4-bit base.

    python tests/benchmarks/shared_base_memory.py --layers 16 --hidden 2048 --vocab 128256

Counts the bytes of real tensors: embeddings (bf16, tied to the LM head) and nf4 weights with their quantization
constants, fp32 LoRA weights of policy, reference, value and reward on every linear layer, and the state of an AdamW
that has taken a step on policy and value. Activations are left out. Layers are built, counted and freed one by one, so
that shapes larger than the machine can be measured. The last line is JSON; `ratio_vs_four_4bit` is four / shared.
"""

import argparse
import json

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

ROLES = {"default": True, "ref": False, "value": True, "reward": False}  # adapter -> trained?
GIB = 2**30


def num_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def quantized_layer(config: LlamaConfig) -> nn.Module:
    """A decoder layer as bitsandbytes loads it: nf4 linear layers, bf16 norms."""
    layer = LlamaDecoderLayer(config, layer_idx=0).to(torch.bfloat16)
    for name, linear in [(n, m) for n, m in layer.named_modules() if isinstance(m, nn.Linear)]:
        packed = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, quant_type="nf4", device="meta"
        )
        packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        parent, _, child = name.rpartition(".")
        setattr(layer.get_submodule(parent), child, packed.to("cpu"))
    return layer.requires_grad_(False)


def base_bytes(layer: nn.Module) -> int:
    total = num_bytes(p for name, p in layer.named_parameters() if "lora_" not in name)
    for module in layer.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            total += num_bytes([state.absmax, state.code])
            if state.nested:
                total += num_bytes([state.state2.absmax, state.state2.code])
    return total


def adapter_bytes(layer: nn.Module, rank: int) -> tuple[int, int]:
    """Bytes of all roles' LoRA weights on a layer, and of AdamW's state for the trained ones."""
    targets = [name for name, module in layer.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
    peft_config = LoraConfig(r=rank, target_modules=targets)
    model = get_peft_model(layer, peft_config)
    for name in [*ROLES][1:]:
        model.add_adapter(name, peft_config)
    weights = {name: p for name, p in model.named_parameters() if "lora_" in name}
    trained = [p for name, p in weights.items() if any(f".{role}." in name for role, is_trained in ROLES.items() if is_trained)]  # fmt: skip
    for parameter in trained:
        parameter.requires_grad_(True)
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    state = [x for values in optimizer.state.values() for x in values.values() if x.dim() > 0]
    return num_bytes(weights.values()), num_bytes(state)


def measure(layers: int, hidden: int, vocab: int, rank: int, intermediate: int | None = None) -> dict:
    heads = max(1, hidden // 64)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate or 4 * hidden,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
    )
    # Embeddings tied to the LM head, and the last norm.
    base = num_bytes([torch.empty(vocab, hidden, dtype=torch.bfloat16), torch.empty(hidden, dtype=torch.bfloat16)])
    adapters = optimizer = 0
    for _ in range(layers):
        layer = quantized_layer(config)
        base += base_bytes(layer)
        weights, state = adapter_bytes(layer, rank)
        adapters, optimizer = adapters + weights, optimizer + state
    shared, four = base + adapters + optimizer, 4 * base + adapters + optimizer
    return {
        "layers": layers,
        "hidden": hidden,
        "vocab": vocab,
        "rank": rank,
        "base_bytes": base,
        "adapter_bytes": adapters,
        "adam_bytes": optimizer,
        "shared_bytes": shared,
        "four_4bit_bytes": four,
        "ratio_vs_four_4bit": four / shared,
    }


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--intermediate", type=int, help="default: 4 x hidden")
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args(argv)
    found = measure(args.layers, args.hidden, args.vocab, args.rank, args.intermediate)
    print(f"{args.layers} layers x {args.hidden}, vocabulary {args.vocab:,}, LoRA rank {args.rank}, GiB:")
    print(f"  one 4-bit base {found['base_bytes'] / GIB:.3f}, four adapters {found['adapter_bytes'] / GIB:.3f}, "
          f"AdamW of policy and value {found['adam_bytes'] / GIB:.3f}")  # fmt: skip
    print(f"  four 4-bit models {found['four_4bit_bytes'] / GIB:.3f}, one shared base {found['shared_bytes'] / GIB:.3f}")  # fmt: skip
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
