"""Models for every recipe: a path that the trainer loads, or a trained LoRA adapter to go on with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl import ModelConfig, RewardConfig, SFTConfig, get_peft_config, get_quantization_config

from prefopt.errors import UserError
from prefopt.inference.engines import Engine, open_engine
from prefopt.models.checkpoints import reward_model_from_adapter
from prefopt.models.files import check_model_files
from prefopt.models.loading import (
    check_language_model,
    check_vocabulary,
    first_line,
    is_adapter,
    load_causal_lm,
    placement,
)
from prefopt.recipes.common.errors import explain


def model_init_kwargs(model_args: ModelConfig) -> dict[str, Any]:
    """`from_pretrained` arguments of a `ModelConfig`, as TRL's own scripts build them."""
    if not model_args.model_name_or_path:
        raise UserError("model_name_or_path is required: a local folder or a Hub id")
    attention, known = model_args.attn_implementation, {"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()}
    # A name on the Hub is that of a kernel.
    if attention is not None and attention not in known and "/" not in attention:
        raise UserError(f"attn_implementation: {attention!r} is none of {', '.join(sorted(known))}")
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }


def check_model(model_args: ModelConfig) -> None:
    """`check_model_files` of the model that a command names."""
    try:
        check_model_files(str(model_args.model_name_or_path))
    except UserError as error:
        raise UserError(f"model_name_or_path: {error}") from error


def load_tokenizer(model_args: ModelConfig, args: SFTConfig | RewardConfig | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer; a missing padding token is replaced by EOS, as TRL does.

    `eos_token` and the template file `chat_template_path` of `args` are set here, before any row is tokenized; TRL's
    trainers set the same once more and tell the model.
    """
    path = model_args.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=model_args.model_revision, trust_remote_code=False)
    # Whatever a broken file meets in the class that reads it.
    except Exception as error:
        reason = explain(error) or first_line(error)
        raise UserError(f"model_name_or_path: cannot load a tokenizer from {path!r}: {reason}") from error
    if not is_adapter(path, revision=model_args.model_revision):
        check_vocabulary(tokenizer, path, revision=model_args.model_revision)
    if args is not None and args.eos_token is not None:
        if args.eos_token not in tokenizer.get_vocab():
            raise UserError(f"eos_token: {args.eos_token!r} is no token of {path!r}; name one of its vocabulary")
        tokenizer.eos_token = args.eos_token
    if args is not None and args.chat_template_path is not None:
        template = Path(args.chat_template_path)
        if template.suffix not in (".jinja", ".j2") or not template.is_file():
            raise UserError(
                f"chat_template_path: expected a file with a .jinja template, got {args.chat_template_path!r}; of another "
                "model's template, save tokenizer.chat_template into one"
            )
        try:
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"chat_template_path: {template} is not UTF-8 text ({error})") from error
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise UserError(
            f"the tokenizer of {path!r} has neither a padding nor an end-of-sequence token: set tokenizer.eos_token and "
            "save the tokenizer beside the model"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(
    model_args: ModelConfig, init_kwargs: dict[str, Any], *, is_trainable: bool = True
) -> str | PreTrainedModel | PeftModel:
    """A language model: to train, a path for the trainer to load, or the LoRA adapter to go on with; else the model,
    frozen, on the GPU where there is one.

    Continuing an adapter makes its starting point the KL reference, which is what SFT with LoRA ends in.
    """
    path, revision = model_args.model_name_or_path, model_args.model_revision
    try:
        check_language_model(path, revision)
    except ValueError as error:
        raise UserError(f"model_name_or_path: {error}") from error
    if is_adapter(path, revision=revision):
        _refuse_second_adapter(model_args)
    elif is_trainable:
        return path
    placed = {} if is_trainable else {"device_map": placement()["device_map"]}
    return load_causal_lm(
        path,
        is_trainable=is_trainable,
        quantization_config=get_quantization_config(model_args),
        **placed | init_kwargs,
    )


def policy_engine(
    engine: str, model_args: ModelConfig, init_kwargs: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> Engine:
    """The engine of a command for the model that it names."""
    if engine == "vllm" and model_args.load_in_8bit:
        raise UserError("engine vllm reads no weights in 8 bit: leave out load_in_8bit")
    return open_engine(
        engine,
        str(model_args.model_name_or_path),
        lambda: (load_policy(model_args, init_kwargs, is_trainable=False), tokenizer),
        tokenizer=tokenizer,
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        load_in_4bit=model_args.load_in_4bit,
    )


def quantization_for(model: str | PeftModel, model_args: ModelConfig) -> BitsAndBytesConfig | None:
    """How a trainer is to quantize the model that it loads from a path; an adapter's base is loaded and quantized."""
    return get_quantization_config(model_args) if isinstance(model, str) else None


def load_reward_start(
    model_args: ModelConfig,
    init_kwargs: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    reward_token: str | None = None,
) -> str | PeftModel:
    """What reward modeling starts from: a path, or the SFT step's LoRA adapter with a new head on it.

    With `reward_token` the tokenizer gets it here if a new head is put on an adapter, else in the trainer.
    """
    if not is_adapter(model_args.model_name_or_path, revision=model_args.model_revision):
        return model_args.model_name_or_path
    _refuse_second_adapter(model_args)
    quantization = get_quantization_config(model_args)
    try:
        return reward_model_from_adapter(
            model_args.model_name_or_path, tokenizer, reward_token, quantization_config=quantization, **init_kwargs
        )
    except ValueError as error:
        raise UserError(error) from error


def _refuse_second_adapter(model_args: ModelConfig) -> None:
    if model_args.use_peft:
        raise UserError(
            f"{model_args.model_name_or_path} is a LoRA adapter and is used as it is: leave use_peft unset"
        )


def peft_config(model_args: ModelConfig, task_type: str, modules_to_save: Sequence[str] = ()) -> PeftConfig | None:
    """TRL's LoRA configuration for this task, or None without `use_peft`."""
    quantized = model_args.load_in_4bit or model_args.load_in_8bit
    if quantized and not model_args.use_peft and not is_adapter(model_args.model_name_or_path):
        raise UserError(
            "quantized weights cannot be trained: add use_peft, which trains a LoRA adapter on them, or drop load_in_"
            + ("4bit" if model_args.load_in_4bit else "8bit")
        )
    model_args.lora_task_type = task_type
    config = get_peft_config(model_args)
    if config is not None and modules_to_save:
        config.modules_to_save = sorted({*(config.modules_to_save or ()), *modules_to_save})
    return config
