"""What there is to hold of a model: parameters by kind, adapters, and in how many bytes."""

import copy
from collections.abc import Collection
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

# Architectures whose decoder layer is the one of `layers.py`: RMSNorm before attention with rotary positions and before
# a gated MLP, one after the other.
MODEL_TYPES = {"llama", "ministral", "mistral", "qwen2", "qwen3", "smollm3"}


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder and its parameter counts: embeddings, LM head (0 if tied), of each layer, the last norm."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    has_qk_norm: bool
    embedding: int
    lm_head: int
    layer_linear: int  # weights of a layer's linear maps, which quantization packs
    layer_other: int  # norms and biases
    last_norm: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Architecture":
        """Count the parameters of one layer of the model that the configuration describes, on the meta device.

        Raises:
            ValueError: the layers are none that the arithmetic here describes.
        """
        config = config.get_text_config()
        if config.model_type not in MODEL_TYPES:
            raise ValueError(
                f"no memory arithmetic for the architecture {config.model_type!r}; there is for "
                f"{', '.join(sorted(MODEL_TYPES))}"
            )
        model = one_layer(config)
        layer, embeddings, head = model.model.layers[0], model.get_input_embeddings(), model.lm_head
        linear = sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=layer.self_attn.head_dim,
            intermediate=config.intermediate_size,
            vocab=config.vocab_size,
            has_qk_norm=hasattr(layer.self_attn, "q_norm"),
            embedding=embeddings.weight.numel(),
            lm_head=0 if head.weight is embeddings.weight else head.weight.numel(),
            layer_linear=linear,
            layer_other=sum(p.numel() for p in layer.parameters()) - linear,
            last_norm=model.model.norm.weight.numel(),
        )

    @property
    def q(self) -> int:
        """Width of the queries of a token."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of the keys of a token, and of its values."""
        return self.kv_heads * self.head_dim

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        return self.layer_linear + self.layer_other

    @property
    def backbone(self) -> int:
        """Parameters below the head."""
        return self.embedding + self.layers * self.layer + self.last_norm

    @property
    def parameters(self) -> int:
        """Parameters of the language model."""
        return self.backbone + self.lm_head


def one_layer(config: PreTrainedConfig) -> nn.Module:
    """The language model with one of its layers, on the meta device."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: parameters in each layer and elsewhere, and the linear maps of a layer that have one."""

    rank: int
    has_dropout: bool
    targets: frozenset[str]
    layer: int
    elsewhere: int

    @classmethod
    def of(cls, config: PreTrainedConfig, lora: LoraConfig) -> "Adapter":
        """Let peft put the adapter on one layer of the model, on the meta device, and count it.

        Raises:
            ValueError: no module has one of the names in `target_modules` (peft).
        """
        model = one_layer(config.get_text_config())
        saved = [module for name, module in model.named_modules() if _is_among(name, lora.modules_to_save)]
        elsewhere = sum(p.numel() for module in saved for p in module.parameters())
        model = inject_adapter_in_model(copy.deepcopy(lora), model, low_cpu_mem_usage=True)
        trained = {name: p.numel() for name, p in model.named_parameters() if ".lora_" in name}
        in_layer = {name: count for name, count in trained.items() if ".layers.0." in name}
        return cls(
            rank=lora.r,
            has_dropout=lora.lora_dropout > 0,
            targets=frozenset(name.split(".lora_A")[0].rpartition(".")[2] for name in in_layer if ".lora_A" in name),
            layer=sum(in_layer.values()),
            elsewhere=elsewhere + sum(trained.values()) - sum(in_layer.values()),
        )

    def parameters(self, layers: int) -> int:
        """Of all layers."""
        return layers * self.layer + self.elsewhere


def _is_among(name: str, names: Collection[str] | None) -> bool:
    return name.rpartition(".")[2] in (names or ())


@dataclass(frozen=True)
class Precision:
    """Bytes of a weight, and in which dtype the linear maps compute.

    Attributes:
        weights: bytes of a weight that is not quantized; embeddings, and so the residual stream, are in this dtype.
        autocast: linear maps and attention compute in 16 bit whatever the weights are.
        linear: bytes of a weight of a layer's linear map, `weights` unless quantized.
    """

    weights: int = 4
    autocast: bool = False
    linear: float = 4.0

    @property
    def is_quantized(self) -> bool:
        """Whether the layers' linear maps are packed in 4 or 8 bit."""
        return self.linear < 2

    @property
    def compute(self) -> int:
        """Bytes of a number that comes out of a linear map; bitsandbytes' compute in the dtype of the weights."""
        return 2 if self.autocast and not self.is_quantized else self.weights

    @property
    def casts_weights(self) -> bool:
        """Whether autocast makes 16-bit copies of fp32 weights."""
        return self.autocast and self.weights == 4 and not self.is_quantized

    @property
    def adapter(self) -> int:
        """Bytes of a number that goes into an adapter's linear maps; their weights are fp32."""
        return 2 if self.autocast else 4


def base_bytes(architecture: Architecture, precision: Precision, head: int) -> int:
    """Weights of a model with `head` parameters above the backbone.

    >>> tiny = Architecture(2, 8, 2, 1, 4, 16, 100, False, 800, 800, 500, 16, 8)
    >>> base_bytes(tiny, Precision(), tiny.lm_head) == 4 * (800 + 2 * 516 + 8 + 800)
    True
    """
    other = architecture.embedding + architecture.layers * architecture.layer_other + architecture.last_norm
    return round(
        precision.weights * (other + head) + precision.linear * architecture.layers * architecture.layer_linear
    )
