"""Models by path: whole ones, 4-bit ones, LoRA adapters put on their base, merged into it or not."""

import os
import re
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    cached_file,
    find_adapter_config_file,
)

from prefopt.errors import UserError
from prefopt.models.files import check_decoder, check_model_files
from prefopt.models.passes import check_rows
from prefopt.models.reward import keep_4bit_gradients

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]

# The whole matrix of input embeddings in an adapter's weights, by the names that transformers' decoders give it, as PEFT
# saves it if it has grown, is trained, or has trained rows.
_EMBEDDINGS = re.compile(
    r"\.(embed_tokens|embed_in|wte|word_embeddings|tok_embeddings)((\.token_adapter)?\.base_layer)?\.weight$"
)


# ---- adapters -------------------------------------------------------------------------------------------------------
def is_adapter(path: str | os.PathLike, **hub_arguments: Any) -> bool:
    """Whether a directory or Hub repository holds an adapter rather than a whole model."""
    return find_adapter_config_file(os.fspath(path), **hub_arguments) is not None


def saved_config(path: str | os.PathLike, **hub_arguments: Any) -> dict[str, Any]:
    """The `config.json` of a checkpoint or beside an adapter; empty if there is none, as plain peft leaves it."""
    if _file(path, CONFIG_NAME, hub_arguments) is None:
        return {}
    return PreTrainedConfig.get_config_dict(os.fspath(path), **hub_arguments)[0]


def is_end(token: int | None, config: PreTrainedConfig) -> bool:
    """Whether a token is one of the config's EOS tokens."""
    ends = config.get_text_config().eos_token_id
    return token is not None and token in (ends if isinstance(ends, list | tuple) else [ends])


def saved_pad_token(path: str | os.PathLike, base: PreTrainedConfig, **hub_arguments: Any) -> tuple[int | None, bool]:
    """The pad token of the model at `path`, an adapter's on a base with this config, and whether it is EOS as well.

    Other trainers write no `config.json` beside an adapter. They take the tokenizer's pad token, or else its EOS.
    """
    if saved := saved_config(path, **hub_arguments):
        base = type(base).from_dict(saved)
    pad = base.get_text_config().pad_token_id
    if saved:
        return pad, is_end(pad, base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(os.fspath(path), **hub_arguments)
    except (OSError, ValueError, KeyError):  # none is beside the adapter
        return pad, is_end(pad, base)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return pad, pad == tokenizer.eos_token_id


def saved_vocabulary(path: str | os.PathLike, **hub_arguments: Any) -> int | None:
    """Rows of the embedding matrix that an adapter carries whole, as it does for a vocabulary that has grown."""
    file = _file(path, SAFETENSORS_WEIGHTS_NAME, hub_arguments)
    if file is None:
        return None
    with safe_open(file, "pt") as weights:
        names = [name for name in weights.keys() if _EMBEDDINGS.search(name)]  # noqa: SIM118
        return weights.get_slice(names[0]).get_shape()[0] if names else None


def saved_embeddings(path: str | os.PathLike, **hub_arguments: Any) -> dict[str, torch.Tensor]:
    """The embedding matrices of the base that an adapter carries whole, by name, as PEFT saves them."""
    file = _file(path, SAFETENSORS_WEIGHTS_NAME, hub_arguments)
    if file is None:
        return {}
    with safe_open(file, "pt") as weights:
        return {name: weights.get_tensor(name) for name in weights.keys() if _EMBEDDINGS.search(name)}  # noqa: SIM118


def fit_vocabulary(base: PreTrainedModel, path: str | os.PathLike, **hub_arguments: Any) -> None:
    """Give the base of an adapter as many token embeddings as it had when the adapter was trained.

    The embeddings that the adapter carries decide. An adapter without any was trained on those of its base, or on those
    that the `config.json` beside it counts; where there is none, the tokenizer beside it says how many ids may come.
    Neither of the two makes the base's smaller, since vocabularies are padded.
    """
    size = base.get_input_embeddings().num_embeddings
    rows = saved_vocabulary(path, **hub_arguments)
    if rows is None:
        config = saved_config(path, **hub_arguments)
        if config:
            rows = type(base.config).from_dict(config).get_text_config().vocab_size
        else:
            rows = _tokenizer_length(path, hub_arguments)
        rows = max(size, rows)
    if rows != size:
        base.resize_token_embeddings(rows)


def put_on_base(
    path: str | os.PathLike, base: PreTrainedModel, is_trainable: bool = False, **hub_arguments: Any
) -> PeftModel:
    """The adapter at `path` on its base, whose vocabulary is made the adapter's: the one way to do it."""
    fit_vocabulary(base, path, **hub_arguments)
    try:
        model = PeftModel.from_pretrained(base, os.fspath(path), is_trainable=is_trainable, **hub_arguments)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        # Of others, such as the memory, the error says it itself.
        if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the adapter {os.fspath(path)} does not fit its base {base.name_or_path}: {reason}; name the base that it "
            "was trained on in adapter_config.json (base_model_name_or_path)"
        ) from error
    file = _file(path, SAFETENSORS_WEIGHTS_NAME, hub_arguments)
    if file is not None:
        with safe_open(file, "pt") as weights:
            missing = sorted(
                get_peft_model_state_dict(model, save_embedding_layers=False).keys() - set(weights.keys())
            )
        if missing:
            raise UserError(
                f"{file} lacks {missing[0]}, which would be drawn at random; copy or download the adapter again"
            )
    return model


def dequantized(base: PreTrainedModel, dtype: str | torch.dtype | None = None) -> PreTrainedModel:
    """A base to merge an adapter into: 4-bit weights + scale * B A, quantized again, would be another model."""
    if not getattr(base, "is_quantized", False):
        return base
    if isinstance(dtype, str):
        dtype = None if dtype == "auto" else getattr(torch, dtype)
    return base.dequantize(dtype=dtype)


# ---- language models ------------------------------------------------------------------------------------------------
def load_causal_lm(
    source: str | os.PathLike,
    *,
    is_trainable: bool = False,
    merge: bool = False,
    revision: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel | PeftModel:
    """A causal language model, whole or a LoRA adapter on its base.

    Beside an adapter, `config.json` names the reward token, which the policy must never sample, and
    `generation_config.json` the tokens that end a completion.

    Args:
        source: folder or Hub id of a whole model (also one that was saved quantized), or of an adapter, whose base is
            loaded from where the adapter says.
        is_trainable: the adapter's weights are to be trained; else the model is frozen and in evaluation mode.
        merge: add an adapter's weights to its base, W + scale * B A, so that it costs no time of its own; a 4-bit base
            is dequantized first.
        revision: of `source`; the base's is the one in the adapter's config.
        kwargs: for `from_pretrained` of the whole model or the base: `dtype`, `quantization_config`, `device_map`, ...

    Raises:
        UserError: the source is a reward model, `merge` is asked for what is no adapter, or the model is frozen and reads
            padding or ahead (`check_rows`; the trainers look at one that is to be trained).
        OSError: there is no model at the source.
    """
    source = os.fspath(source)
    check_language_model(source, revision=revision)
    if is_adapter(source, revision=revision):
        adapter = PeftConfig.from_pretrained(source, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(
            adapter.base_model_name_or_path, revision=adapter.revision, **kwargs
        )
        if _file(source, GENERATION_CONFIG_NAME, {"revision": revision}) is not None:
            model.generation_config = GenerationConfig.from_pretrained(source, revision=revision)
        if merge:
            model = dequantized(model, kwargs.get("dtype"))
        model = put_on_base(source, model, is_trainable, revision=revision)
        if merge:
            model = model.merge_and_unload()
        model.config.reward_token_id = saved_config(source, revision=revision).get("reward_token_id")
    elif merge:
        raise UserError(f"{source!r} is no adapter: there is nothing to merge")
    else:
        model = AutoModelForCausalLM.from_pretrained(source, revision=revision, **kwargs)
    if is_trainable:
        keep_4bit_gradients(model)
        return model
    check_rows(model)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Outline:
    """A language model without its weights: what it reads at most, how its completions end, and what it never says."""

    base: str
    base_revision: str | None
    adapter: PeftConfig | None
    config: PreTrainedConfig
    generation_config: GenerationConfig
    never: int | None


def outline(source: str | os.PathLike, revision: str | None = None) -> Outline:
    """What `load_causal_lm` would find beside the weights of a whole model, or of an adapter and its base."""
    base, base_revision, adapter = os.fspath(source), revision, None
    if is_adapter(source, revision=revision):
        adapter = PeftConfig.from_pretrained(os.fspath(source), revision=revision)
        base, base_revision = adapter.base_model_name_or_path, adapter.revision
    config = AutoConfig.from_pretrained(base, revision=base_revision)
    places = [(base, base_revision), *([] if adapter is None else [(os.fspath(source), revision)])]
    generation = GenerationConfig.from_model_config(config)
    for place, of in places:
        if _file(place, GENERATION_CONFIG_NAME, {"revision": of}) is not None:
            generation = GenerationConfig.from_pretrained(place, revision=of)
    never = saved_config(source, revision=revision).get("reward_token_id")
    return Outline(base, base_revision, adapter, config, generation, never)


def check_language_model(source: str | os.PathLike, revision: str | None = None) -> None:
    """Raise if the source is a reward model, or its files cannot be loaded, without loading weights."""
    source = os.fspath(source)
    check_model_files(source)
    if is_adapter(source, revision=revision):
        is_reward = PeftConfig.from_pretrained(source, revision=revision).task_type == "SEQ_CLS"
    else:
        names = AutoConfig.from_pretrained(source, revision=revision).architectures or ()
        is_reward = any("ForSequenceClassification" in name for name in names)
    if is_reward:
        raise UserError(f"{source!r} is a reward model; expected a language model")


def check_policy(model: str | PreTrainedModel | PeftModel) -> None:
    """Raise unless a model, or what is at a path, is a language model and a decoder."""
    if isinstance(model, str):
        check_language_model(model)
        return
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if "ForSequenceClassification" in type(base).__name__:
        raise UserError(f"the policy is a {type(base).__name__}, a reward model; expected a language model")
    # A class of somebody's own may be one as well.
    check_decoder(base.config, "the policy", is_built_in=False)


def load_language_model(
    source: str | os.PathLike,
    *,
    load_in_4bit: bool = False,
    dtype: str | None = "auto",
    merge: bool = False,
    device: str | torch.device | None = None,
) -> Loaded:
    """`load_causal_lm` for evaluation, with the tokenizer.

    Args:
        source, merge: as in `load_causal_lm`.
        load_in_4bit: quantize the weights (of an adapter: of its base) to nf4 on the way in.
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        device: default: the first GPU, or the CPU where there is none.

    Raises:
        UserError: the source is a reward model, does not exist, or `merge` is asked for what is no adapter.
        FileNotFoundError: the source is a file of completions.

    Example:
        >>> model, tokenizer = load_language_model("runs/demo/sft")  # doctest: +SKIP
    """
    source = os.fspath(source)
    if is_completions(source):
        raise FileNotFoundError(f"{source} holds completions: there are no weights to measure")
    try:
        model = load_causal_lm(source, merge=merge, **placement(load_in_4bit, dtype, device))
        return model, load_tokenizer(source)
    except OSError as error:
        raise UserError(f"cannot load a language model from {source!r}: {first_line(error)}") from error


def load_tokenizer(source: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model, or beside the base of an adapter that has none; a missing padding token is
    replaced by EOS."""
    source = os.fspath(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    # Whatever a broken file meets in the class that reads it.
    except Exception as error:
        if not is_adapter(source):
            raise UserError(f"cannot load a tokenizer from {source!r}: {first_line(error)}") from error
        return load_tokenizer(PeftConfig.from_pretrained(source).base_model_name_or_path)
    if not is_adapter(source):
        check_vocabulary(tokenizer, source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, source: str, **hub_arguments: Any) -> None:
    """Raise unless the model at `source` has an embedding for every token that rows can have.

    Added tokens may be beyond without ever standing in a row: Gemma 3's text models have one for images. The words of the
    vocabulary, and the tokens that pad, begin and end rows, may not.
    """
    rows = AutoConfig.from_pretrained(source, **hub_arguments).get_text_config().vocab_size
    used = [token for token in (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) if token is not None]
    beyond = [token for token in used if tokenizer.convert_tokens_to_ids(token) >= rows]
    if beyond or tokenizer.vocab_size > rows:
        what = repr(beyond[0]) if beyond else f"{tokenizer.vocab_size} words"
        raise UserError(
            f"the tokenizer in {source!r} has ids beyond the model's embeddings for {rows} tokens ({what}): they are not of "
            "one model, or the embeddings were not resized (model.resize_token_embeddings)"
        )


def known_tokenizer(source: str | os.PathLike) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a policy, or None where the policy is not on this machine or only its completions are."""
    try:
        return None if is_completions(source) else load_tokenizer(source)
    except (OSError, ValueError):
        return None


def is_completions(source: str | os.PathLike) -> bool:
    """Whether a "model" is a file of completions, such as `prefopt best-of-n` writes, and has no weights."""
    return os.fspath(source).endswith(".jsonl")


def placement(
    load_in_4bit: bool = False, dtype: str | None = "auto", device: str | torch.device | None = None
) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for a model that is evaluated: all of it on one device."""
    # The first GPU, or under `accelerate launch` that of the process.
    device = device or (f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu")
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


def first_line(error: Exception) -> str:
    """What an error says, without the advice below."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _file(path: str | os.PathLike, name: str, hub_arguments: dict[str, Any]) -> str | None:
    return cached_file(os.fspath(path), name, _raise_exceptions_for_missing_entries=False, **hub_arguments)


def _tokenizer_length(path: str | os.PathLike, hub_arguments: dict[str, Any]) -> int:
    try:
        return len(AutoTokenizer.from_pretrained(os.fspath(path), **hub_arguments))
    except (OSError, ValueError, KeyError):  # none is beside the adapter
        return 0
