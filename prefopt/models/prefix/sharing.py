"""One forward per prompt: the tokens that the completions of a prompt share run through the network once.

K rows of one prompt repeat it K times. Packed, the batch is one row

    [prefix of prompt 1 | prefix of prompt 2 | ... | rest of row 1 | rest of row 2 | ...]

without padding, in which every token keeps the position it had in its own row. Linear layers, norms and rotary
embeddings act on each token alone, so they need nothing else. Attention mixes tokens: there a rest sees its own prefix
and itself. The result is that of K rows up to rounding, and so is the gradient.

    rows [N, T] --pack--> PackedRows --sharing(model, packed)--> hidden states [1, S, hidden]
                                                                 .index says where each row's token went

How rows are packed stands in `layout`, how attention runs on them in `attention`, here which models can do it, how it
is switched on, and `PrefixSharing`, by which a trainer makes sure that it changes nothing. The attention is registered
through transformers' attention interface, once for each that models are loaded with, and is that one wherever no layout
is given. The layout travels as a keyword argument of the backbone's forward, which gradient checkpointing keeps for its
second forward.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from prefopt.errors import UserError
from prefopt.models.passes import TIMES_NOISE, nudged, unwrapped
from prefopt.models.prefix.attention import prefix_sharing_attention
from prefopt.models.prefix.layout import PackedRows, Rows, pack

# By name in transformers' attention interface, the attention that is behind it.
_PLAIN: dict[str, str] = {}

# Architectures on which the tests have shown equal results. All their layers mix tokens in attention alone, with
# positions given by `position_ids`; a hybrid layer, a position bias or a model that counts its input's positions by
# itself (Nemotron; Llama 4, whose attention is cut in chunks too) would need its own proof.
MODEL_TYPES = {
    "apertus",
    "arcee",
    "cohere",
    "cohere2",
    "ernie4_5",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "granitemoe",
    "granitemoeshared",
    "helium",
    "hunyuan_v1_dense",
    "llama",
    "minimax_m2",
    "ministral",
    "ministral3",
    "mistral",
    "mixtral",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "starcoder2",
}
LAYER_TYPES = {"full_attention", "sliding_attention"}

# Below this share of tokens saved, unpacking for attention costs about what the linear layers gain. Below this number,
# a forward takes the time of reading the weights and starting the kernels, whatever the tokens.
MIN_SAVING = 0.1
MIN_SAVED_TOKENS = 64

# So many tokens of what two completions share, and of what they do not, show whether a model shares prefixes rightly.
CHECKED_TOKENS = 32
# Values that differ by so little are the same, whatever the model's noise.
SAME = 1e-3


def _registered(plain: str) -> str:
    """The name of `prefix_sharing_attention` before the attention `plain`."""
    for name, other in _PLAIN.items():
        if other == plain:
            return name
    # Not with the other's name in it: a name with "flash" in it is looked for on the Hub.
    name = f"prefopt_prefix_sharing_{len(_PLAIN)}"
    AttentionInterface.register(name, partial(prefix_sharing_attention, plain=plain))
    if plain in AttentionMaskInterface():
        AttentionMaskInterface.register(name, AttentionMaskInterface()[plain])
    _PLAIN[name] = plain
    return name


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
    attention = _PLAIN.get(config._attn_implementation, config._attn_implementation)
    if (attention != "eager" and attention not in AttentionInterface()) or attention.startswith("paged|"):
        return f"it was loaded with attn_implementation={attention!r}, which is for inference"
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
    if not is_enabled(model):
        model = unwrapped(model)
        model.set_attn_implementation(_registered(model.config.get_text_config()._attn_implementation))


def disable(model: nn.Module) -> None:
    """Undo `enable`."""
    if is_enabled(model):
        model = unwrapped(model)
        model.set_attn_implementation(_PLAIN[model.config.get_text_config()._attn_implementation])


def is_enabled(model: nn.Module) -> bool:
    """Whether `enable` was called on the model."""
    return unwrapped(model).config.get_text_config()._attn_implementation in _PLAIN


def plan(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, prompts: Tensor) -> PackedRows | None:
    """The rows packed, if the model shares prefixes (`enable`) and this is faster than K rows, else None.

    Arguments as for `pack`.
    """
    return pack_if_faster(input_ids, attention_mask, prompts) if is_enabled(model) else None


def pack_if_faster(input_ids: Tensor, attention_mask: Tensor, prompts: Tensor) -> PackedRows | None:
    """The rows packed, if that saves enough tokens; arguments as for `pack`."""
    packed = pack(input_ids, attention_mask, prompts)
    return packed if is_faster(packed.input_ids.shape[1], packed.num_row_tokens) else None


def is_faster(num_packed_tokens: int, num_row_tokens: int) -> bool:
    """Whether so many packed tokens save enough to be forwarded instead of the rows' own tokens."""
    saved = num_row_tokens - num_packed_tokens
    return saved >= MIN_SAVED_TOKENS and saved >= MIN_SAVING * num_row_tokens


@dataclass
class PrefixSharing:
    """Prefix sharing of a trainer's models, as long as the first batches score the same with and without it.

    Args:
        is_on: whether it is wanted; False once a model cannot, or has scored differently twice.
        complete: ids and mask of rows as the model reads them, such as `append_reward_token`.
        read: values `[N]` of complete rows by name, from one forward; the first is compared.
        on_any_process: whether a condition holds on any process; `bool` where each forwards by itself.
        warn: takes the sentence that says why sharing is off.
    """

    is_on: bool
    complete: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
    read: Callable[[nn.Module, Rows], Mapping[str, Tensor]]
    on_any_process: Callable[[bool], bool]
    warn: Callable[[str], None]
    proved: set[int] = field(default_factory=set)
    doubted: set[int] = field(default_factory=set)

    def stop(self, reason: str) -> None:
        """Forward whole rows from now on."""
        self.is_on = False
        self.warn(f"Prefix sharing is off: {reason}. Every completion is forwarded in a row of its own.")

    def can_share(self, model: nn.Module) -> bool:
        """Whether rows of this model may be packed; enables the model."""
        if self.is_on and not is_enabled(model):
            if reason := why_not(model):
                self.stop(reason)
            else:
                enable(model)
        return self.is_on

    def packed(self, model: nn.Module, rows: Rows) -> Rows:
        """Complete rows, packed where that is faster; the first that are packed are forwarded both ways first.

        If they differ, so are the next: by rounding alone two batches of the same model hardly ever do. Rows that are
        packed already, for another model, are not packed again.
        """
        packed, rows = rows.packed, replace(rows, packed=None)
        if not self.is_on:
            return rows
        if packed is None:
            packed = pack_if_faster(rows.input_ids, rows.attention_mask, rows.prompts)
        # A model whose rows never gain by it stays as it was loaded.
        if id(model) not in self.proved and self.on_any_process(packed is not None):
            if not self.can_share(model):
                return rows
            if self.on_any_process(not self.is_equal(model, rows)):
                if id(model) in self.doubted:
                    self.stop("two batches scored differently with it")
                self.doubted.add(id(model))
                return rows
            self.proved.add(id(model))
        return replace(rows, packed=packed)

    def is_equal(self, model: nn.Module, rows: Rows) -> bool:
        """Forward two completions of one prompt both ways, the shortest such pair.

        Equal is what differs no more than the plain model does from itself by rounding: the rows are also forwarded each
        alone, and with embeddings that are `nudged`. A token that sees what it must not moves values by far more.
        """
        pair = self._shortest_pair(model, rows)
        packed = replace(pair, packed=pack(pair.input_ids, pair.attention_mask, pair.prompts))
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                shared, together = self._values(model, packed), self._values(model, pair)
                difference = (shared - together).abs()
                # In fp32 that is all: what rounding alone changes is asked for where it may be the reason.
                if not self.on_any_process(not bool((difference <= SAME).all())):
                    return True
                alone = torch.cat([self._values(model, row) for row in _each_alone(pair)])
                with nudged(model):
                    moved = self._values(model, pair)
        finally:
            model.train(was_training)
        noise = torch.maximum((together - alone).abs(), (together - moved).abs()).max()
        difference = torch.minimum((shared - alone).abs(), difference).max()
        return bool(difference <= torch.clamp(TIMES_NOISE * noise, min=SAME))

    def _values(self, model: nn.Module, rows: Rows) -> Tensor:
        return next(iter(self.read(model, rows).values())).float()

    def _shortest_pair(self, model: nn.Module, rows: Rows) -> Rows:
        """Complete rows of two completions of a prompt, of both no more than `CHECKED_TOKENS` of what they share and of
        what they do not: a layer that mixes tokens in another way does so in any row. Only a sliding window shows in long
        rows alone.
        """
        repeated = (rows.prompts[1:] == rows.prompts[:-1]).nonzero().squeeze(1)
        lengths = rows.attention_mask.sum(1)
        first = repeated[(lengths[repeated] + lengths[repeated + 1]).argmin()]
        both = slice(first, first + 2)
        columns = torch.arange(int(lengths[both].max()), device=lengths.device)
        if not has_window(model):
            prefix = pack(rows.input_ids[both], rows.attention_mask[both], rows.prompts[both]).layout.prefixes
            shared = prefix.width
            columns = columns[
                (columns < min(shared, CHECKED_TOKENS)) | ((columns >= shared) & (columns < shared + CHECKED_TOKENS))
            ]
        ids, mask, completion = (
            x[both][:, columns[columns < x.shape[1]]]
            for x in (rows.input_ids, rows.attention_mask, rows.completion_mask)
        )
        return Rows(*self.complete(model, ids, mask), completion, rows.prompts[both])


def _each_alone(rows: Rows) -> Iterator[Rows]:
    for i, length in enumerate(rows.attention_mask.sum(1).tolist()):
        yield Rows(
            rows.input_ids[i : i + 1, :length],
            rows.attention_mask[i : i + 1, :length],
            rows.completion_mask[i : i + 1, :length],
            rows.prompts[i : i + 1],
        )
