"""One forward per prompt: the tokens that the completions of a prompt share run through the network once.

K rows of one prompt repeat it K times. Packed, the batch is one row

    [prefix of prompt 1 | prefix of prompt 2 | ... | rest of row 1 | rest of row 2 | ...]

without padding, in which every token keeps the position it had in its own row. Linear layers, norms and rotary
embeddings act on each token alone, so they need nothing else. Attention mixes tokens: there a rest sees its own prefix
and itself. The result is that of K rows up to rounding, and so is the gradient.

    rows [N, T] --pack--> PackedRows --sharing(model, packed)--> hidden states [1, S, hidden]
                                                                 .index says where each row's token went

How rows are packed stands in `prefix_layout`, how attention runs on them in `prefix_attention`, here which models can
do it and how it is switched on. The attention is registered through transformers' attention interface and behaves like
its `sdpa` wherever no layout is given. The layout travels as a keyword argument of the backbone's forward, which
gradient checkpointing keeps for its second forward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from prefopt.errors import UserError
from prefopt.models.prefix.attention import prefix_sharing_attention
from prefopt.models.prefix.layout import PackedRows, pack

ATTENTION = "prefopt_prefix_sharing"

# Architectures on which the tests have shown equal results. All their layers mix tokens in attention alone, with
# positions given by `position_ids`; a hybrid layer, a position bias or a capped logit would need its own proof.
MODEL_TYPES = {
    "cohere2",
    "exaone4",
    "gemma",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "ministral",
    "mistral",
    "olmo2",
    "olmo3",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "starcoder2",
}
LAYER_TYPES = {"full_attention", "sliding_attention"}

# Below this share of tokens saved, unpacking for attention costs about what the linear layers gain. Below this number,
# a forward takes the time of reading the weights and starting the kernels, whatever the tokens.
MIN_SAVING = 0.1
MIN_SAVED_TOKENS = 64


AttentionInterface.register(ATTENTION, prefix_sharing_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def why_not(model: nn.Module) -> str | None:
    """The reason why this model must forward whole rows, or None when it can share prefixes."""
    model = unwrapped(model)
    config = model.config.get_text_config()
    if config.model_type not in MODEL_TYPES:
        return f"equal results are not proved for the architecture {config.model_type!r}"
    if unknown := set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES:
        return f"its layers of type {', '.join(sorted(unknown))} mix tokens in another way"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "it is spread over several devices"
    if config._attn_implementation not in ("sdpa", ATTENTION):
        return f"it was loaded with attn_implementation={config._attn_implementation!r} instead of 'sdpa'"
    return None


def has_window(model: nn.Module) -> bool:
    """Whether a layer of the model attends within a sliding window."""
    return getattr(unwrapped(model).config.get_text_config(), "sliding_window", None) is not None


def enable(model: nn.Module) -> None:
    """Let the model share prefixes inside `sharing`; everywhere else it stays as it was.

    Raises:
        ValueError: the model cannot (`why_not`).
    """
    if reason := why_not(model):
        raise UserError(f"this model cannot share prefixes: {reason}")
    unwrapped(model).set_attn_implementation(ATTENTION)


def disable(model: nn.Module) -> None:
    """Undo `enable`."""
    if is_enabled(model):
        unwrapped(model).set_attn_implementation("sdpa")


def is_enabled(model: nn.Module) -> bool:
    """Whether `enable` was called on the model."""
    return unwrapped(model).config.get_text_config()._attn_implementation == ATTENTION


def plan(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, prompts: Tensor) -> PackedRows | None:
    """The rows packed, if the model shares prefixes (`enable`) and this is faster than K rows, else None.

    Arguments as for `pack`.
    """
    if not is_enabled(model):
        return None
    packed = pack(input_ids, attention_mask, prompts)
    return packed if is_faster(packed.input_ids.shape[1], packed.num_row_tokens) else None


def is_faster(num_packed_tokens: int, num_row_tokens: int) -> bool:
    """Whether so many packed tokens save enough to be forwarded instead of the rows' own tokens."""
    saved = num_row_tokens - num_packed_tokens
    return saved >= MIN_SAVED_TOKENS and saved >= MIN_SAVING * num_row_tokens


@contextmanager
def sharing(model: nn.Module, packed: PackedRows) -> Iterator[None]:
    """While it lasts, the forward of the backbone treats its input as the packed row.

    Call the model with `packed.input_ids` and `packed.position_ids`. The whole model may be called (data parallel,
    PEFT, a head on top): the layout is handed over where the backbone is entered, past wrappers that would not pass
    it on.
    """

    def hand_over(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        # A mask of four dimensions is taken as it is: none is built for the packed row, and the attention uses none.
        mask = packed.input_ids.new_ones((1, 1, 1, 1), dtype=torch.bool)
        return args, {**kwargs, "attention_mask": mask, "prefix_layout": packed.layout}

    handle = backbone(model).register_forward_pre_hook(hand_over, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def backbone(model: nn.Module) -> nn.Module:
    """The transformer below the head, inside wrappers (data parallel, PEFT)."""
    transformer = unwrapped(model).base_model
    # OPT's language model calls the decoder inside it, which is all there is.
    return transformer.decoder if transformer.config.model_type == "opt" else transformer


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside wrappers (data parallel, PEFT); accelerate's own search walks all modules."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model.get_base_model() if isinstance(model, PeftModel) else model
