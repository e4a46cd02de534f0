"""Reward and value models: read-out of the scalar head, the reward bias, loading, merging and cloning.

A reward model is a standard `AutoModelForSequenceClassification` with one label, or a `PeftModel` of one. Its head is
called `score`. prefopt's score is the head's output at the last token minus `config.reward_bias`, so a plain
transformers user gets the same number by subtracting that one field. With `config.reward_token_id`, that token is
appended to every sequence before it is scored.
"""

import copy
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils import ModulesToSaveWrapper, load_peft_weights
from torch import nn
from transformers import (
    AddedToken,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME, cached_file, find_adapter_config_file

from prefopt.prefix_sharing import PackedRows, sharing

logger = logging.getLogger(__name__)

# Keyword arguments of `from_pretrained` that say where a file is rather than how to build the model.
_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


def _classifier(model: nn.Module) -> PreTrainedModel:
    """The sequence classifier inside wrappers (data parallel, PEFT)."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            raise ValueError(
                "prompt-learning adapters shift the token positions; use an adapter on weights, such as LoRA"
            )
        model = model.get_base_model()
    if getattr(model, "score", None) is None or getattr(model.config, "num_labels", None) != 1:
        raise ValueError(
            f"{type(model).__name__} is no reward model: expected a decoder loaded with "
            "`AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)`, whose head is called `score`"
        )
    return model


@contextmanager
def _padding_allowed(config: PreTrainedConfig) -> Iterator[None]:
    # The model's own pooling refuses a batch without a pad token. Its result is not used here, so any id will do.
    config = config.get_text_config()
    missing = config.pad_token_id is None
    if missing:
        config.pad_token_id = 0
    try:
        yield
    finally:
        if missing:
            config.pad_token_id = None


def _hidden_states(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
) -> torch.Tensor:
    """Last hidden states `[N, T, hidden]` of the backbone.

    The whole (possibly wrapped) model is called, not the backbone alone: mixed precision, data parallel gradient
    hooks and sharded parameters all hang on that call.
    """
    classifier = _classifier(model)
    captured: list[torch.Tensor] = []
    handle = classifier.score.register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    try:
        with _padding_allowed(classifier.config):
            model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
            )
    finally:
        handle.remove()
    return captured[0]


def _positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions count real tokens, so left padding changes nothing, whatever the position encoding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _apply_head(model: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """`score` head in fp32, whatever autocast says, minus the reward bias; drops the last axis."""
    classifier = _classifier(model)
    head = classifier.score
    with torch.autocast(device_type=hidden_states.device.type, enabled=False):
        if all(parameter.dtype == torch.float32 for parameter in head.parameters()):
            scores = head(hidden_states.float())
        else:
            weights = {name: parameter.float() for name, parameter in head.named_parameters()}
            scores = torch.func.functional_call(head, weights, (hidden_states.float(),))
    return scores.squeeze(-1) - get_reward_bias(classifier)


def token_scores(model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Score after every token: backbone + `score` head at each position, minus `config.reward_bias`.

    Args:
        model: reward or value model, full or PEFT, wrapped or not.
        input_ids: token ids `[N, T]`, padded on either side.
        attention_mask: `[N, T]`, 1 = real token.

    Returns:
        fp32 scores `[N, T]`, differentiable. Values at padding are meaningless.

    Raises:
        ValueError: the model has no one-label `score` head.
    """
    hidden_states = _hidden_states(model, input_ids, attention_mask, _positions(attention_mask))
    return _apply_head(model, hidden_states)


def append_reward_token(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put `config.reward_token_id`, if the model reads its score at one, after the last real token of every row.

    Everything that scores calls this, so a row that already ends with the token, or has no real token, stays as it is.

    Args:
        model: reward model, full or PEFT, wrapped or not.
        input_ids: token ids `[..., T]`, padded on either side.
        attention_mask: `[..., T]`, 1 = real token.

    Returns:
        `input_ids` and `attention_mask`, one column wider if a row had no room for the token.
    """
    token = getattr(_classifier(model).config, "reward_token_id", None)
    if token is None:
        return input_ids, attention_mask
    last = (torch.arange(1, input_ids.shape[-1] + 1, device=input_ids.device) * attention_mask.long()).amax(
        -1
    )
    final = input_ids.gather(-1, (last - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    lacks = (last > 0) & (final != token)
    if (lacks & (last == input_ids.shape[-1])).any():
        input_ids = nn.functional.pad(input_ids, (0, 1))
        attention_mask = nn.functional.pad(attention_mask, (0, 1))
    here = lacks.unsqueeze(-1) & (torch.arange(input_ids.shape[-1], device=last.device) == last.unsqueeze(-1))
    return input_ids.masked_fill(here, token), attention_mask.masked_fill(here, 1)


def sequence_scores(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    packed: PackedRows | None = None,
) -> torch.Tensor:
    """prefopt's score of each sequence: `token_scores` at the last real token, or at the appended reward token.

    The last real token is found from the attention mask, never from the pad id (pad may equal EOS). Every row must
    have at least one real token. The reward token is appended here (see `append_reward_token`).

    Args:
        model: reward model, full or PEFT, wrapped or not.
        input_ids: token ids `[N, T]`, padded on either side.
        attention_mask: `[N, T]`, 1 = real token.
        packed: the same rows, reward token included, as `prefix_sharing.plan` packed them: they are then forwarded as
            one, with shared prefixes once.

    Returns:
        fp32 scores `[N]`, differentiable.

    Raises:
        ValueError: `packed` is not of these rows, or the model has no one-label `score` head.
    """
    input_ids, attention_mask = append_reward_token(model, input_ids, attention_mask)
    last = (torch.arange(attention_mask.shape[1], device=attention_mask.device) * attention_mask).argmax(-1)
    row = torch.arange(len(last), device=last.device)
    if packed is None:
        hidden_states = _hidden_states(model, input_ids, attention_mask, _positions(attention_mask))
        return _apply_head(model, hidden_states[row, last])
    if packed.index.shape != input_ids.shape:
        raise ValueError(
            f"packed rows {tuple(packed.index.shape)} are not those of input_ids {tuple(input_ids.shape)}; append the "
            "reward token (`append_reward_token`) before packing"
        )
    with sharing(model, packed):
        hidden_states = _hidden_states(model, packed.input_ids, None, packed.position_ids)
    return _apply_head(model, hidden_states[0, packed.index[row, last]])


def get_reward_bias(model: nn.Module) -> float:
    """`config.reward_bias`: what is subtracted from the head's output (0 when it was never set)."""
    return float(getattr(_classifier(model).config, "reward_bias", 0.0))


def set_reward_bias(model: nn.Module, value: float) -> None:
    """Store the bias as `config.reward_bias`; `save_reward_model` and the trainers keep it, adapters included."""
    _classifier(model).config.reward_bias = float(value)


def init_score_head(model: nn.Module) -> None:
    """Draw a new head: normal with standard deviation 1 / sqrt(hidden + 1).

    Small, so that training starts from scores that differ little, yet not 0, so that the backbone gets gradients from
    the first step. The scale is that of Stiennon et al. 2020 (arXiv:2009.01325), whose reward model InstructGPT continues (the paper
    states no scale of its own): scores of order 1 for hidden states of order 1.
    """
    head = _classifier(model).score
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=(module.in_features + 1) ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if isinstance(head, ModulesToSaveWrapper):  # both copies start equal, as PEFT makes them
        for saved in head.modules_to_save.values():
            saved.load_state_dict(head.original_module.state_dict())


def _cast_input(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (args[0].to(next(module.parameters()).dtype),)


def keep_head_fp32(model: nn.Module) -> None:
    """Cast the head's weights to fp32 in place; a plain `model(...)` on a 16-bit base keeps working."""
    head = _classifier(model).score.float()
    if _cast_input not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_cast_input)


def keep_4bit_gradients(model: nn.Module) -> None:
    """Keep the input gradients of bitsandbytes' 4-bit layers on CPUs with AVX512-BF16.

    There, bitsandbytes repacks a layer's weights for good in the first forward in evaluation mode, and the repacked
    layer passes no gradient to its input: training then goes on without a word, wrongly. To be called before the
    first forward of a 4-bit model that is to be trained; prefopt's trainers and loaders do. Other models are left alone.
    A layer that was repacked already is restored, but its scales were rounded to bf16 on the way (a warning says so).
    """
    repacked = 0
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                module.state_dict()  # saving is where bitsandbytes restores the layout
                repacked += 1
    if repacked:
        logger.warning(
            "%d 4-bit layers had been used for evaluation on the CPU, which rounds their scales; load the model again "
            "and call `keep_4bit_gradients` first to train on the exact weights",
            repacked,
        )


def add_reward_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Make the model read its score at `token`, put after the end of every completion; returns the token's id.

    The tokenizer gets the token if it lacks it, the embeddings a row if they lack it (many vocabularies have spare or
    reserved rows, and taking one of those keeps the model's shape), and `config.reward_token_id` the id.

    Raises:
        ValueError: the text already uses the token, or the model reads at another one.
    """
    if token in (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token, tokenizer.unk_token):
        raise ValueError(
            f"reward_token {token!r} has a role in the text already (EOS, PAD, BOS or UNK); take another"
        )
    if token in tokenizer.get_vocab() and token not in tokenizer.get_added_vocab():
        raise ValueError(f"reward_token {token!r} is an ordinary token of the text; take a special one")
    tokenizer.add_tokens(AddedToken(token, special=True, normalized=False), special_tokens=True)
    token_id = tokenizer.convert_tokens_to_ids(token)
    other = getattr(model.config, "reward_token_id", None)
    if other not in (None, token_id):
        raise ValueError(
            f"the model reads its score at token {other}, but reward_token {token!r} has the id {token_id}"
        )
    if other == token_id:
        return token_id
    if token_id >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(token_id + 1)
    model.config.reward_token_id = token_id
    return token_id


def train_reward_token(config: PeftConfig, model: PreTrainedModel) -> None:
    """Have a LoRA configuration train, and save, the row of the model's reward token in the embeddings."""
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings).rpartition(".")[2]
    rows = getattr(config, "trainable_token_indices", None) or {}
    rows = dict(rows) if isinstance(rows, dict) else {name: rows}
    rows[name] = sorted({*rows.get(name, ()), model.config.reward_token_id})
    config.trainable_token_indices = rows


def save_reward_model(model: PreTrainedModel | PeftModel, path: str | os.PathLike, **kwargs: Any) -> None:
    """`model.save_pretrained(path)`; beside a LoRA adapter also `config.json`, which carries `reward_bias`."""
    model.save_pretrained(path, **kwargs)
    if isinstance(model, PeftModel):
        _classifier(model).config.save_pretrained(path)


def push_reward_model(model: PreTrainedModel | PeftModel, repo_id: str, **kwargs: Any) -> None:
    """`model.push_to_hub(repo_id)`; beside a LoRA adapter also `config.json`, which carries `reward_bias`.

    The trainer's own `push_to_hub` does as much, and adds the tokenizer and a model card.
    """
    model.push_to_hub(repo_id, **kwargs)
    if isinstance(model, PeftModel):
        _classifier(model).config.push_to_hub(repo_id, **kwargs)


def load_reward_model(
    path: str | os.PathLike, base_model: str | os.PathLike | PreTrainedModel | None = None, **kwargs: Any
) -> PreTrainedModel | PeftModel:
    """Load a reward model for scoring: full checkpoint or LoRA adapter, head in fp32, eval mode, frozen.

    The base of an adapter is quantised as it was in training, unless `quantization_config` says otherwise (None: not).

    Args:
        path: directory or Hub id of a checkpoint or of an adapter.
        base_model: for an adapter, the base to put it on (path, Hub id or one-label classifier) when it is not where
            the adapter's own `base_model_name_or_path` says.
        **kwargs: for `AutoModelForSequenceClassification.from_pretrained`. `dtype` defaults to fp32, as in TRL's
            trainers; whatever it is, the head is the one that was saved, bit for bit.

    Raises:
        ValueError: the checkpoint or adapter does not contain the head, or the adapter names no base model.
    """
    path = os.fspath(path)
    hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    kwargs = {"dtype": torch.float32, **kwargs, "num_labels": 1}
    if find_adapter_config_file(path, **hub_arguments) is None:
        if base_model is not None:
            raise ValueError(f"{path} is a full checkpoint: `base_model` is for adapters")
        with head_loaded_in_fp32():
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                path, output_loading_info=True, **kwargs
            )
        if any(name.startswith("score.") for name in loading["missing_keys"]):
            raise ValueError(
                f"{path} has no trained head, so its scores would be random: it is a language model; give the output "
                "of RankedRewardTrainer"
            )
        keep_head_fp32(model)
        keep_4bit_gradients(model)
    else:
        model = _on_base(path, _adapter_base(path, base_model, hub_arguments, kwargs), hub_arguments)
    return model.eval().requires_grad_(False)


def merge_reward_model(
    path: str | os.PathLike, base_model: str | os.PathLike | PreTrainedModel | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load a LoRA reward model and merge it into its base: a full reward model, head, bias and reward token included.

    A quantised base is dequantised first: W = dequantised(W_4bit) + scale * B A, the weights the adapter was trained
    on. PEFT's own `merge_and_unload` on it would quantise the sum again and so move every score. Save the result with
    `save_reward_model`, and the tokenizer beside it.

    Args:
        path, base_model, **kwargs: as in `load_reward_model`. `dtype` (default fp32) is also that of the result; its
            head is fp32 always.

    Raises:
        ValueError: the adapter does not contain the head or names no base model, or `path` is no adapter.
    """
    path = os.fspath(path)
    hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    kwargs = {"dtype": torch.float32, **kwargs, "num_labels": 1}
    if find_adapter_config_file(path, **hub_arguments) is None:
        raise ValueError(f"{path} is no adapter: there is nothing to merge")
    base = _adapter_base(path, base_model, hub_arguments, kwargs)
    if getattr(base, "is_quantized", False):
        dtype = kwargs["dtype"]
        base = base.dequantize(dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    model = _on_base(path, base, hub_arguments).merge_and_unload()
    keep_head_fp32(model)
    return model.eval().requires_grad_(False)


@contextmanager
def head_loaded_in_fp32() -> Iterator[None]:
    """transformers would round the head to `dtype` on the way in; this is its own switch for such modules."""
    kept = PreTrainedModel._keep_in_fp32_modules_strict
    PreTrainedModel._keep_in_fp32_modules_strict = {*(kept or ()), "score"}
    try:
        yield
    finally:
        PreTrainedModel._keep_in_fp32_modules_strict = kept


def _saved_config(path: str, hub_arguments: dict[str, Any]) -> dict[str, Any]:
    """The `config.json` beside an adapter; empty if it was not saved by prefopt."""
    file = cached_file(path, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub_arguments)
    return {} if file is None else PreTrainedConfig.get_config_dict(path, **hub_arguments)[0]


def _adapter_base(
    path: str,
    base: str | os.PathLike | PreTrainedModel | None,
    hub_arguments: dict[str, Any],
    kwargs: dict[str, Any],
) -> PreTrainedModel:
    """The base of a reward adapter, quantised as in training, loaded unless it was given."""
    adapter = PeftConfig.from_pretrained(path, **hub_arguments)
    if "score" not in (getattr(adapter, "modules_to_save", None) or []):
        raise ValueError(
            f"the adapter {path} has no trained head: it was made without `modules_to_save=['score']`, so its "
            "scores would be random; train it again with RankedRewardTrainer, which adds it"
        )
    base = base or adapter.base_model_name_or_path
    if not base:
        raise ValueError(f"the adapter {path} names no base model; pass `base_model`")
    if isinstance(base, PreTrainedModel):
        return base
    of_adapter = set(_HUB_ARGUMENTS) - {"cache_dir", "token", "local_files_only"}
    kwargs = {name: value for name, value in kwargs.items() if name not in of_adapter}
    quantization = _saved_config(path, hub_arguments).get("quantization_config")
    if quantization is not None:
        kwargs.setdefault("quantization_config", quantization)
    if kwargs.get("quantization_config", ...) is None:
        del kwargs["quantization_config"]
    return AutoModelForSequenceClassification.from_pretrained(base, **kwargs)


def _on_base(
    path: str, base: PreTrainedModel, hub_arguments: dict[str, Any], is_trainable: bool = False
) -> PeftModel:
    """A reward adapter on its base, with the head in fp32 and what `config.json` beside the adapter says."""
    saved = _saved_config(path, hub_arguments)
    if saved.get("vocab_size", 0) > base.get_input_embeddings().num_embeddings:
        base.resize_token_embeddings(saved["vocab_size"])  # the adapter holds the rows that this adds
    keep_head_fp32(base)  # before the adapter's head is copied into it, or fp32 weights would be rounded
    keep_4bit_gradients(base)
    model = PeftModel.from_pretrained(base, path, is_trainable=is_trainable, **hub_arguments)
    set_reward_bias(model, saved.get("reward_bias", 0.0))
    base.config.reward_token_id = saved.get("reward_token_id")
    return model


def reward_model_from_adapter(
    path: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reward_token: str | None = None,
    **kwargs: Any,
) -> PeftModel:
    """A trainable reward model that starts from a LoRA adapter: the SFT step's with a new head, or a reward model's.

    InstructGPT's initialisation (section 3.5): the SFT model, its unembedding replaced by a projection to one scalar.

    Args:
        path: directory or Hub id of the adapter.
        tokenizer, reward_token: read the score at this token, which is added to the tokenizer (see
            `add_reward_token`). An adapter that is a reward model keeps the token it has.
        **kwargs: for `AutoModelForSequenceClassification.from_pretrained` of the base model.
    """
    path = os.fspath(path)
    config = PeftConfig.from_pretrained(path)
    base = AutoModelForSequenceClassification.from_pretrained(
        config.base_model_name_or_path, num_labels=1, **kwargs
    )
    if "score" in (config.modules_to_save or []):
        return _on_base(path, base, {}, is_trainable=True)
    keep_head_fp32(base)
    keep_4bit_gradients(base)
    config.task_type, config.inference_mode = "SEQ_CLS", False
    config.modules_to_save = [*(config.modules_to_save or []), "score"]
    if reward_token is not None:
        add_reward_token(base, tokenizer, reward_token)
        train_reward_token(config, base)
    model = get_peft_model(base, config)
    init_score_head(model)
    # The new head completes the SFT adapter's weights: PEFT wants every module of the config.
    set_peft_model_state_dict(model, {**get_peft_model_state_dict(model), **load_peft_weights(path)})
    return model


def value_model_from(reward_model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """A trainable copy of a reward model, head and bias included: InstructGPT's initial value function (C.4).

    Values are read at every token of the text, never at a reward token, so after a reward model that has one the value
    function starts from an extrapolation of its head.

    Of a PEFT model the adapter and the head are trainable, of a full model everything.
    """
    value_model = copy.deepcopy(reward_model).train()
    if isinstance(value_model, PeftModel):
        value_model.requires_grad_(False)
        value_model.active_peft_config.inference_mode = False
        value_model.set_adapter(value_model.active_adapter)
    else:
        for parameter in value_model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    keep_head_fp32(value_model)
    return value_model
