"""Reward models on disk and on the Hub: saving, loading, merging a LoRA adapter into its base, going on with one.

A LoRA reward model is an adapter directory whose `modules_to_save` holds the head, with a `config.json` beside it that
holds what is not a weight: `reward_bias`, `reward_token_id`, `pad_token_id`, how the base was quantized.

transformers' own forward reads the score at the last token that is not the pad token. Where the pad token is EOS, that
is the token before EOS and another score, so such a model is saved with `config.pad_token_id=None`: transformers then
scores single rows, at their last token, and refuses batches. Plain peft takes the base model's config instead: set
`model.config.pad_token_id = None` there too, or use the result of `merge_reward_model`. A model that was trained elsewhere
and has EOS for its pad token was trained at the token before, and is read there: `config.unread_token_id`, set on loading.
"""

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
from peft.utils import load_peft_weights
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prefopt.errors import UserError
from prefopt.models.files import check_model_files, check_reward_head
from prefopt.models.loading import (
    Loaded,
    dequantized,
    first_line,
    fit_vocabulary,
    is_adapter,
    is_end,
    load_tokenizer,
    placement,
    put_on_base,
    saved_config,
    saved_pad_token,
)
from prefopt.models.passes import check_rows
from prefopt.models.reward import (
    add_reward_token,
    fold_reward_bias,
    init_score_head,
    keep_4bit_gradients,
    keep_head_fp32,
    set_reward_bias,
    train_reward_token,
)

logger = logging.getLogger(__name__)

_NO_HEAD = (
    "{} has no trained head, so its scores would be random: it is a language model; give the output of "
    "`prefopt reward` (RankedRewardTrainer)"
)

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


def save_reward_model(model: PreTrainedModel | PeftModel, path: str | os.PathLike, **kwargs: Any) -> None:
    """`model.save_pretrained(path)`; beside a LoRA adapter also `config.json`, which carries `reward_bias`.

    A pad token that is EOS is left out of the model's config, with a warning: see the top of this module.
    """
    keep_pad_from_eos(model)
    keep_logit_plain(model)
    model.save_pretrained(path, **kwargs)
    if isinstance(model, PeftModel):
        save_config_beside(model, path)


def save_config_beside(model: PeftModel, path: str | os.PathLike) -> None:
    """Write `config.json` beside a LoRA reward model: bias, reward token, and the dtype that its base was trained in."""
    base = model.get_base_model()
    embeddings = base.get_input_embeddings()
    # Inside what PEFT may have put around it.
    embeddings = getattr(embeddings, "original_module", getattr(embeddings, "base_layer", embeddings))
    base.config.dtype = embeddings.weight.dtype
    base.config.save_pretrained(path)


def trained_dtype(path: str | os.PathLike, **hub_arguments: Any) -> torch.dtype:
    """The dtype in which a reward model, or the base of a reward adapter, was trained, by the config saved with it."""
    config = saved_config(path, **hub_arguments)
    # Older versions of transformers wrote it under the second name; without any it is that of TRL's trainers.
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return getattr(torch, str(name).removeprefix("torch."))


def load_reward_model(
    path: str | os.PathLike, base_model: str | os.PathLike | PreTrainedModel | None = None, **kwargs: Any
) -> PreTrainedModel | PeftModel:
    """Load a reward model for scoring: full checkpoint or LoRA adapter, head in fp32, eval mode, frozen.

    The base of an adapter is quantized as it was in training, unless `quantization_config` says otherwise (None: not).

    Args:
        path: directory or Hub id of a checkpoint or of an adapter.
        base_model: for an adapter, the base to put it on (path, Hub id or one-label classifier) when it is not where
            the adapter's own `base_model_name_or_path` says.
        **kwargs: for `AutoModelForSequenceClassification.from_pretrained`. `dtype` defaults to the one that the model
            was trained in; whatever it is, the head is the one that was saved, bit for bit.

    Raises:
        UserError: the checkpoint or adapter does not contain the head, the adapter names no base model, or the model reads
            padding or ahead (`check_rows`).
    """
    check_model_files(path, with_base=False)
    path = os.fspath(path)
    if os.path.isdir(path):
        check_reward_model(path, with_base=False)
    hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    kwargs = {"dtype": trained_dtype(path, **hub_arguments), **kwargs, "num_labels": 1}
    if not is_adapter(path, **hub_arguments):
        if base_model is not None:
            raise UserError(f"{path} is a full checkpoint: `base_model` is for adapters")
        with head_loaded_in_fp32():
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                path, output_loading_info=True, **kwargs
            )
        if any(name.startswith("score.") for name in loading["missing_keys"]):
            raise UserError(_NO_HEAD.format(path))
        leave_pad_unread(model)
        keep_head_fp32(model)
        keep_4bit_gradients(model)
    else:
        model = _on_base(path, _adapter_base(path, base_model, hub_arguments, kwargs), hub_arguments)
    check_rows(model)
    return model.eval().requires_grad_(False)


def load_classifier(
    source: str | os.PathLike,
    *,
    load_in_4bit: bool = False,
    dtype: str | None = "auto",
    device: str | torch.device | None = None,
) -> Loaded:
    """A reward model (`prefopt.load_reward_model`: whole or LoRA adapter, head in fp32), with its tokenizer.

    Args:
        dtype: "auto" (as it was trained), "float32", "bfloat16" or "float16".

    Raises:
        UserError: the source has no trained head, or does not exist.
    """
    source = os.fspath(source)
    kwargs = placement(load_in_4bit, dtype, device)
    if not load_in_4bit:
        kwargs.pop("quantization_config", None)  # an adapter's base stays quantized as in training
    if kwargs["dtype"] == "auto":
        del kwargs["dtype"]
    try:
        return load_reward_model(source, **kwargs), load_tokenizer(source)
    except OSError as error:
        raise UserError(f"cannot load a reward model from {source!r}: {first_line(error)}") from error


def check_reward_model(path: str | os.PathLike, *, with_base: bool = True) -> None:
    """Raise what `load_reward_model` would raise about the head, without loading weights.

    Raises:
        UserError: the checkpoint is no one-label classifier, the adapter does not contain a head, or files are damaged.
    """
    check_model_files(path, with_base=with_base)
    if is_adapter(path):
        _require_head(os.fspath(path), PeftConfig.from_pretrained(path))
    else:
        architectures = PreTrainedConfig.get_config_dict(path)[0].get("architectures") or []
        if not any(name.endswith("ForSequenceClassification") for name in architectures):
            raise UserError(_NO_HEAD.format(os.fspath(path)))
    check_reward_head(path)


def merge_reward_model(
    path: str | os.PathLike, base_model: str | os.PathLike | PreTrainedModel | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load a LoRA reward model and merge it into its base: a full reward model, head, bias and reward token included.

    A head that has a bias of its own takes up `config.reward_bias` (`fold_reward_bias`).

    A quantized base is dequantized first: W = dequantized(W_4bit) + scale * B A, the weights the adapter was trained
    on. PEFT's own `merge_and_unload` on it would quantize the sum again and so move every score. Save the result with
    `save_reward_model`, and the tokenizer beside it.

    Args:
        path, base_model, **kwargs: as in `load_reward_model`, but `dtype` (default fp32) is that of the result, whose
            head is fp32 always: the base is loaded, and quantized, in the one that the adapter was trained in.

    Raises:
        UserError: the adapter does not contain the head or names no base model, or `path` is no adapter.
    """
    path = os.fspath(path)
    hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    dtype = kwargs.get("dtype", torch.float32)
    kwargs = {**kwargs, "dtype": trained_dtype(path, **hub_arguments), "num_labels": 1}
    if isinstance(dtype, str):
        dtype = kwargs["dtype"] if dtype == "auto" else getattr(torch, dtype)
    if not is_adapter(path, **hub_arguments):
        raise UserError(f"{path} is no adapter: there is nothing to merge")
    base = dequantized(_adapter_base(path, base_model, hub_arguments, kwargs), dtype)
    if not isinstance(base_model, PreTrainedModel):
        # Its weights alone: `to` would round the frequencies of rotary positions, which are loaded in fp32.
        for weight in base.parameters():
            weight.data = weight.data.to(dtype).contiguous()
    model = _on_base(path, base, hub_arguments).merge_and_unload()
    keep_head_fp32(model)
    fold_reward_bias(model)
    return model.eval().requires_grad_(False)


def keep_logit_plain(model: PreTrainedModel | PeftModel) -> None:
    """Have transformers' pipeline and vLLM give the logit itself: of one label both would give its sigmoid otherwise."""
    model.config.problem_type = "regression"


def keep_pad_from_eos(model: PreTrainedModel | PeftModel, eos_token_id: int | None = None) -> None:
    """Empty the config's `pad_token_id` where transformers would take the closing EOS for padding.

    Nothing of prefopt reads it: padding is known from the attention mask. A reward token ends the row behind EOS, so
    transformers finds it whatever the pad token is, and the config stays as it is.

    Args:
        model: reward model, full or PEFT.
        eos_token_id: the tokenizer's, beside those of the config.
    """
    config = model.config
    text_config = config.get_text_config()
    if getattr(config, "unread_token_id", None) is not None:
        # As transformers has to read it.
        text_config.pad_token_id = config.unread_token_id
        return
    pad = text_config.pad_token_id
    if pad is None or not (pad == eos_token_id or is_end(pad, config)):
        return
    if getattr(config, "reward_token_id", None) is not None:
        return
    logger.warning(
        "the reward model's pad token %d is an EOS token, at which its scores are read: its config is saved with "
        "pad_token_id=None, with which plain transformers scores one row at a time, rightly; a tokenizer with a pad "
        "token of its own keeps padded batches working there",
        pad,
    )
    text_config.pad_token_id = None


def leave_pad_unread(model: PreTrainedModel | PeftModel) -> None:
    """Have the scores of a saved model whose pad token is EOS read where another trainer read them: at the token before.

    prefopt saves no such pad token (`keep_pad_from_eos`).
    """
    pad = model.config.get_text_config().pad_token_id
    model.config.unread_token_id = pad if is_end(pad, model.config) else None


@contextmanager
def head_loaded_in_fp32() -> Iterator[None]:
    """transformers would round the head to `dtype` on the way in; this is its own switch for such modules."""
    kept = PreTrainedModel._keep_in_fp32_modules_strict
    PreTrainedModel._keep_in_fp32_modules_strict = {*(kept or ()), "score"}
    try:
        yield
    finally:
        PreTrainedModel._keep_in_fp32_modules_strict = kept


@contextmanager
def head_comes_later() -> Iterator[None]:
    """A head that an adapter brings, or that is drawn here, is not reported as missing from the base, nor the language
    model's as left over: transformers' own switch for such weights."""
    names = ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected")
    kept = [getattr(PreTrainedModel, name) for name in names]
    for name, before, pattern in zip(names, kept, (r"^score\.", r"^lm_head\."), strict=True):
        setattr(PreTrainedModel, name, {*(before or ()), pattern})
    try:
        yield
    finally:
        for name, before in zip(names, kept, strict=True):
            setattr(PreTrainedModel, name, before)


def _require_head(path: str, adapter: PeftConfig) -> None:
    if "score" not in (getattr(adapter, "modules_to_save", None) or []):
        raise UserError(
            f"the adapter {path} has no trained head: it was made without `modules_to_save=['score']`, so its "
            "scores would be random; train it again with RankedRewardTrainer, which adds it"
        )


def _adapter_base(
    path: str,
    base: str | os.PathLike | PreTrainedModel | None,
    hub_arguments: dict[str, Any],
    kwargs: dict[str, Any],
) -> PreTrainedModel:
    """The base of a reward adapter, quantized as in training, loaded unless it was given."""
    adapter = PeftConfig.from_pretrained(path, **hub_arguments)
    _require_head(path, adapter)
    base = base or adapter.base_model_name_or_path
    if not base:
        raise UserError(f"the adapter {path} names no base model; pass `base_model`")
    if isinstance(base, PreTrainedModel):
        return base
    check_model_files(base)
    of_adapter = set(_HUB_ARGUMENTS) - {"cache_dir", "token", "local_files_only"}
    kwargs = {name: value for name, value in kwargs.items() if name not in of_adapter}
    quantization = saved_config(path, **hub_arguments).get("quantization_config")
    if quantization is not None:
        kwargs.setdefault("quantization_config", quantization)
    if kwargs.get("quantization_config", ...) is None:
        del kwargs["quantization_config"]
    with head_comes_later():
        return AutoModelForSequenceClassification.from_pretrained(base, **kwargs)


def _on_base(path: str, base: PreTrainedModel, hub_arguments: dict[str, Any], is_trainable: bool = False) -> PeftModel:
    """A reward adapter on its base, with the head in fp32 and what `config.json` beside the adapter says."""
    saved = saved_config(path, **hub_arguments)
    keep_head_fp32(base)  # before the adapter's head is copied into it, or fp32 weights would be rounded
    keep_4bit_gradients(base)
    model = put_on_base(path, base, is_trainable, **hub_arguments)
    set_reward_bias(model, saved.get("reward_bias", 0.0))
    base.config.reward_token_id = saved.get("reward_token_id")
    pad, ends = saved_pad_token(path, base.config, **hub_arguments)
    base.config.get_text_config().pad_token_id, base.config.unread_token_id = pad, pad if ends else None
    return model


def reward_model_from_adapter(
    path: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reward_token: str | None = None,
    **kwargs: Any,
) -> PeftModel:
    """A trainable reward model that starts from a LoRA adapter: the SFT step's with a new head, or a reward model's.

    InstructGPT's initialization (section 3.5): the SFT model, its unembedding replaced by a projection to one scalar.

    Args:
        path: directory or Hub id of the adapter.
        tokenizer, reward_token: read the score at this token, which is added to the tokenizer (see
            `add_reward_token`). An adapter that is a reward model keeps the token it has.
        **kwargs: for `AutoModelForSequenceClassification.from_pretrained` of the base model; `revision` is the
            adapter's.
    """
    path = os.fspath(path)
    adapter_at = {"revision": kwargs.pop("revision", None)}
    config = PeftConfig.from_pretrained(path, **adapter_at)
    with head_comes_later():
        base = AutoModelForSequenceClassification.from_pretrained(
            config.base_model_name_or_path, revision=config.revision, num_labels=1, **kwargs
        )
    if "score" in (config.modules_to_save or []):
        return _on_base(path, base, adapter_at, is_trainable=True)
    keep_head_fp32(base)
    keep_4bit_gradients(base)
    fit_vocabulary(base, path, **adapter_at)
    config.task_type, config.inference_mode = "SEQ_CLS", False
    config.modules_to_save = [*(config.modules_to_save or []), "score"]
    if reward_token is not None:
        add_reward_token(base, tokenizer, reward_token)
        train_reward_token(config, base)
    model = get_peft_model(base, config)
    # What the SFT adapter lacks completes its weights: PEFT wants every module of the config.
    set_peft_model_state_dict(model, {**get_peft_model_state_dict(model), **load_peft_weights(path, **adapter_at)})
    init_score_head(model)
    return model
