"""Models of real shapes with random weights, and text for them: built in code, so that nothing is downloaded."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.quantizers import AutoHfQuantizer

Shape = Mapping[str, Any]
# From the public config.json of these models.
QWEN3_600M: Shape = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
QWEN3_8B: Shape = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
# In the place of both where no GPU is.
MINIATURE: Shape = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}


def build_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Every word is a number and a token."""
    words = {"<pad>": 0, "<unk>": 1, "<eos>": 2, **{str(i): i for i in range(3, vocab)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def random_text(count: int, vocab: int, generator: torch.Generator) -> str:
    """A text of so many tokens of `build_tokenizer`, each after a space.

    >>> random_text(3, 100, torch.Generator().manual_seed(0)).startswith(" ")
    True
    """
    return "".join(f" {i}" for i in torch.randint(3, vocab, (count,), generator=generator).tolist())


def config_of(shape: Shape, **changes: Any) -> PreTrainedConfig:
    """A Qwen 3 of a shape, with the special tokens of `build_tokenizer`; activations keep their scale, as if trained."""
    tokens = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2, "max_position_embeddings": 8192}
    shape = {**shape, **changes}
    return Qwen3Config(**{**tokens, "initializer_range": shape["hidden_size"] ** -0.5, **shape})


def random_base(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, *, is_quantized: bool = False, seed: int = 0
) -> PreTrainedModel:
    """A language model with random weights, the same for the same seed.

    A quantized one is packed layer by layer as it grows: at no time is there more of it in 16 bit than a layer, and no
    file is written, which of an 8B model would have 16 GB.
    """
    torch.manual_seed(seed)
    layers, types = config.num_hidden_layers, getattr(config, "layer_types", None)
    config = copy.deepcopy(config)
    if is_quantized:
        config.num_hidden_layers, config.layer_types = 1, types and types[:1]
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    # A name that no folder has: adapters are told by it to be of the same base.
    model.config._name_or_path = model.name_or_path = "random/base"
    if not is_quantized:
        return model
    model.config.num_hidden_layers, model.config.layer_types = layers, types
    quantize(model, dtype, device)
    for number in range(1, layers):
        with torch.device(device):
            layer = type(model.model.layers[0])(model.config, layer_idx=number).to(dtype)
        _pack(layer, dtype, device)
        model.model.layers.append(layer)
    return model


def quantize(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    """Pack the linear maps of a model's layers in 4 bit (nf4, nested), and mark it as `from_pretrained` does."""
    for layer in model.base_model.layers:
        _pack(layer, dtype, device)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["score", "lm_head"],
    )
    model.hf_quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    model.config.quantization_config = quantization
    model.quantization_method = quantization.quant_method
    model.is_loaded_in_4bit = True


def _pack(layer: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    # Not above: where it does not fit the GPU's driver, everything else can still be looked at.
    import bitsandbytes as bnb

    for name, linear in [(n, m) for n, m in layer.named_modules() if isinstance(m, nn.Linear)]:
        packed = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        parent, _, child = name.rpartition(".")
        setattr(layer.get_submodule(parent), child, packed.to(device))
