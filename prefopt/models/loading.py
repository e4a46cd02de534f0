"""One loader for everything that is evaluated: whole models, 4-bit ones, LoRA adapters (merged or not), classifiers."""

import os
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prefopt.errors import UserError
from prefopt.models.checkpoints import is_adapter, load_reward_model, remember_reward_token

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def load_language_model(
    source: str | os.PathLike,
    *,
    load_in_4bit: bool = False,
    dtype: str | None = "auto",
    merge: bool = False,
    device: str | torch.device | None = None,
) -> Loaded:
    """A causal language model for evaluation, frozen, with its tokenizer.

    Args:
        source: folder or Hub id of a whole model (also one that was saved quantized), or of a LoRA adapter, whose base
            is loaded from where the adapter says.
        load_in_4bit: quantize the weights (of an adapter: of its base) to nf4 on the way in.
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        merge: add an adapter's weights to its base, W + scale * B A, so that it costs no time of its own; a 4-bit base
            is dequantized first, because the sum quantized again would be another model.
        device: default: the first GPU, or the CPU where there is none.

    Raises:
        ValueError: the source is a reward model, does not exist, or `merge` is asked for what is no adapter.
        FileNotFoundError: the source is a file of completions.

    Example:
        >>> model, tokenizer = load_language_model("runs/demo/sft")  # doctest: +SKIP
    """
    source = os.fspath(source)
    if is_completions(source):
        raise FileNotFoundError(f"{source} holds completions: there are no weights to measure")
    kwargs = _keywords(load_in_4bit, dtype, device)
    try:
        if not is_adapter(source):
            if merge:
                raise UserError(f"{source!r} is no adapter: there is nothing to merge")
            _refuse_classifier(source, AutoConfig.from_pretrained(source).architectures)
            tokenizer = load_tokenizer(source)
            model = AutoModelForCausalLM.from_pretrained(source, **kwargs)
        else:
            adapter = PeftConfig.from_pretrained(source)
            _refuse_classifier(source, ["ForSequenceClassification"] * (adapter.task_type == "SEQ_CLS"))
            tokenizer = load_tokenizer(source)
            base = AutoModelForCausalLM.from_pretrained(adapter.base_model_name_or_path, **kwargs)
            model = _on_base(source, base, len(tokenizer), merge)
            remember_reward_token(model, source)
    except OSError as error:
        raise UserError(f"cannot load a language model from {source!r}: {_first_line(error)}") from error
    return model.eval().requires_grad_(False), tokenizer


def _on_base(source: str, base: PreTrainedModel, vocabulary: int, merge: bool) -> PreTrainedModel:
    if vocabulary > base.get_input_embeddings().num_embeddings:
        base.resize_token_embeddings(vocabulary)  # the adapter holds the rows that this adds
    if merge and getattr(base, "is_quantized", False):
        base = base.dequantize()
    model = PeftModel.from_pretrained(base, source)
    return model.merge_and_unload() if merge else model


def load_classifier(
    source: str | os.PathLike,
    *,
    load_in_4bit: bool = False,
    dtype: str | None = "float32",
    device: str | torch.device | None = None,
) -> Loaded:
    """A reward model (`prefopt.load_reward_model`: whole or LoRA adapter, head in fp32), with its tokenizer.

    Raises:
        ValueError: the source has no trained head, or does not exist.
    """
    source = os.fspath(source)
    kwargs = _keywords(load_in_4bit, dtype, device)
    if not load_in_4bit:
        kwargs.pop("quantization_config", None)  # an adapter's base stays quantized as in training
    try:
        return load_reward_model(source, **kwargs), load_tokenizer(source)
    except OSError as error:
        raise UserError(f"cannot load a reward model from {source!r}: {_first_line(error)}") from error


def load_tokenizer(source: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model, or beside the base of an adapter that has none; a missing padding token is
    replaced by EOS."""
    source = os.fspath(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError):
        if not is_adapter(source):
            raise
        tokenizer = AutoTokenizer.from_pretrained(PeftConfig.from_pretrained(source).base_model_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def known_tokenizer(source: str | os.PathLike) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a policy, or None where the policy is not on this machine or only its completions are."""
    try:
        return None if is_completions(source) else load_tokenizer(source)
    except (OSError, ValueError):
        return None


def is_completions(source: str | os.PathLike) -> bool:
    """Whether a "model" is a file of completions, such as `prefopt best-of-n` writes, and has no weights."""
    return os.fspath(source).endswith(".jsonl")


def _keywords(load_in_4bit: bool, dtype: str | None, device: str | torch.device | None) -> dict[str, Any]:
    device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    keywords: dict[str, Any] = {"dtype": dtype or "auto", "device_map": {"": device}}
    if load_in_4bit:
        unsaid = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        computes = unsaid if dtype in (None, "auto") else getattr(torch, dtype)
        keywords["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=computes,
        )
    return keywords


def _refuse_classifier(source: str, architectures: list[str] | None) -> None:
    if any("ForSequenceClassification" in name for name in architectures or ()):
        raise UserError(f"{source!r} is a reward model; expected a language model")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
