"""What the files of a model tell before its weights are loaded: damage, parts that are missing, another kind of model."""

import json
import math
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import (
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from prefopt.errors import UserError, UserTypeError

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# What a name on the Hub can be; any other is a path.
HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
# Sizes of a configuration -> the most they can be; beyond, only the memory would tell.
SIZES = {
    "vocab_size": 10**8,
    "hidden_size": 10**6,
    "num_hidden_layers": 10**4,
    "num_attention_heads": 10**5,
    "max_position_embeddings": 10**10,
}
AGAIN = "copy or download the model again"
_shapes: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {}


class Tensor(NamedTuple):
    """A tensor by what the header of its file says."""

    file: Path
    shape: tuple[int, ...]


def check_model_files(path: str | os.PathLike, *, with_base: bool = True) -> None:
    """Look at a folder that holds a language model, a reward model or an adapter; of a name on the Hub, nothing is said.

    `with_base`: an adapter's base is looked at too.

    Raises:
        UserError: there is no such folder; a file is missing, damaged or no JSON; a tensor of the transformer is missing
            or has another shape; it is no decoder, has custom code, or is a classifier of several labels.
    """
    _check_folder(path, with_base, ())


def _check_folder(path: str | os.PathLike, with_base: bool, above: tuple[str, ...]) -> None:
    folder = _folder(path)
    if folder is None:
        return
    if (folder / GENERATION_CONFIG_NAME).exists():
        _json(folder / GENERATION_CONFIG_NAME)
        _read(GENERATION_CONFIG_NAME, folder, GenerationConfig)
    if (folder / "adapter_config.json").exists():
        _json(folder / "adapter_config.json")
        adapter = _read("adapter_config.json", folder, PeftConfig)
        _headers(_one_of(folder, ADAPTER_WEIGHTS))
        if not with_base:
            return
        base = adapter.base_model_name_or_path
        if not base or not isinstance(base, str):
            raise UserError(
                f"{folder / 'adapter_config.json'} names no base (base_model_name_or_path); write its path there"
            )
        # Not `resolve`, which a loop of links ends with an error.
        if os.path.realpath(base) in (real := (os.path.realpath(folder), *above)):
            raise UserError(f"{folder / 'adapter_config.json'}: the base {base} is an adapter on itself; name a model")
        try:
            _check_folder(base, with_base, real)
        except UserError as error:
            raise UserError(f"the base of the adapter {folder}: {error}") from error
        return
    _check_tensors(folder, checked_config(folder), _headers(_weight_files(folder)))


def checked_config(folder: Path) -> PreTrainedConfig:
    """The configuration of the model in a folder, whose weights need not be there; raises as `check_model_files`."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no model: there is no config.json and no adapter_config.json in it")
    _check_keys(folder, _json(folder / "config.json"))
    config = _read("config.json", folder, AutoConfig)
    check_decoder(config, str(folder))
    _check_sizes(folder, config)
    return config


def check_reward_head(path: str | os.PathLike) -> None:
    """Look at what makes a folder a reward model, whole or adapter: head, `reward_bias`, `reward_token_id`.

    Raises:
        UserError: there is no head; it or the bias is not finite; the token is none of the vocabulary.
    """
    folder = _folder(path)
    if folder is None:
        return
    is_adapter = (folder / "adapter_config.json").exists()
    weights = _headers(_one_of(folder, ADAPTER_WEIGHTS) if is_adapter else _weight_files(folder))
    heads = [name for name in weights if re.search(r"(^|\.)score\.", name)]
    if not heads:
        raise UserError(
            f"{folder} has no trained head, so its scores would be random: its weights have no tensor `score`; give the "
            "output of `prefopt reward` (RankedRewardTrainer)"
        )
    for name in heads:
        file = weights[name].file
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                if not torch.isfinite(tensors.get_tensor(name)).all():
                    raise UserError(f"{file}: the head {name} is not finite (NaN or infinity): train it again")
    file = folder / "config.json"
    saved = _json(file) if file.exists() else {}
    bias, token = saved.get("reward_bias", 0.0), saved.get("reward_token_id")
    if not isinstance(bias, int | float) or not math.isfinite(bias):
        raise UserError(f"{file}: reward_bias is {bias!r}; expected a finite number")
    rows = saved.get("vocab_size")
    if token is not None and not (isinstance(token, int) and 0 <= token < (rows if isinstance(rows, int) else 10**9)):
        raise UserError(f"{file}: reward_token_id is {token!r}; expected the id of a token of the vocabulary")


def _folder(path: str | os.PathLike) -> Path | None:
    """The folder that a path means; None for a name that may be on the Hub."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise UserTypeError(f"expected a folder or a name on the Hub, got {path!r}")
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UserError(f"{folder} is a file; name the folder that holds the model")
    # `exists` follows a link, which may lead nowhere.
    if folder.is_symlink() or not HUB_NAME.fullmatch(os.fspath(path)):
        raise UserError(f"there is no folder {os.fspath(path)}, and no model on the Hub can have this name")
    return None


def _read(name: str, folder: Path, kind: type) -> Any:
    try:
        return kind.from_pretrained(folder)
    # Whatever a wrong value meets in the class that reads it.
    except Exception as error:
        raise _unusable(folder / name, error) from error


def _unusable(file: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{file} cannot be used: {reason[:300]}; mend it, or download the model again")


def _json(file: Path, *keys: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}); download the model again") from error
    if not isinstance(content, dict) or not set(keys) <= content.keys():
        raise UserError(
            f"{file}: expected a JSON object{f' with {keys[0]}' if keys else ''}; download the model again"
        )
    return content


def _check_keys(folder: Path, config: Mapping[str, Any]) -> None:
    """What transformers does not look at: the names of classes, and code beside a model, which it would ask to run."""
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{folder / 'config.json'}: architectures is {names!r:.80}; expected a list of names; {AGAIN}")
    if config.get("auto_map") and config.get("model_type") not in CONFIG_MAPPING:
        raise UserError(
            f"{folder / 'config.json'} needs code that comes with the model (auto_map), which prefopt never runs; take a "
            "model that transformers knows by itself"
        )


def _check_sizes(folder: Path, config: PreTrainedConfig) -> None:
    text = config.get_text_config()
    for name, most in SIZES.items():
        value = getattr(text, name, None)
        if value is not None and not (isinstance(value, int) and 1 <= value <= most):
            raise UserError(
                f"{folder / 'config.json'}: {name} is {value!r}; expected a whole number from 1 to {most}: mend it, or "
                "download the model again"
            )
    labels = len(getattr(config, "id2label", None) or [None])
    is_classifier = any("ForSequenceClassification" in name for name in config.architectures or ())
    if is_classifier and labels != 1:
        raise UserError(f"{folder} is a classifier of {labels} labels; a reward model has one (num_labels=1)")


def _check_tensors(folder: Path, config: PreTrainedConfig, weights: Mapping[str, Tensor]) -> None:
    expected, prefix = _expected(folder, config)
    there = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    missing = sorted(expected.keys() - there.keys()) if weights else []
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"the weights in {folder} lack {missing[0]}{more}, which would be drawn at random; {AGAIN}")
    # Quantized ones are packed.
    if getattr(config, "quantization_config", None) is not None:
        return
    for name, shape in expected.items():
        if weights and there[name].shape != shape:
            raise UserError(
                f"{there[name].file}: {name} has the shape {list(there[name].shape)}, but config.json beside it means "
                f"{list(shape)}: they are not of one model; {AGAIN}"
            )


def check_decoder(config: PreTrainedConfig, name: str, *, is_built_in: bool = True) -> None:
    """Raise unless the model called `name` is a decoder, by its configuration; of transformers, if `is_built_in`."""
    kind = config.model_type
    is_encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    is_unknown = is_built_in and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if config.is_encoder_decoder or is_encoder or is_unknown:
        raise UserError(
            f"{name} is a {kind} model; prefopt trains decoders (language models that write from left to right)"
        )


def _one_of(folder: Path, names: tuple[str, ...]) -> list[Path]:
    for name in names:
        if (folder / name).exists():
            return [folder / name]
    raise UserError(f"{folder} holds no weights: expected {names[0]}; {AGAIN}")


def _weight_files(folder: Path) -> list[Path]:
    for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        if not (folder / SAFE_WEIGHTS_NAME).exists() and (folder / name).exists():
            shards = _json(folder / name, "weight_map")["weight_map"]
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise UserError(f"{folder / name}: weight_map names no file for each tensor; {AGAIN}")
            files = [folder / shard for shard in sorted(set(shards.values()))]
            lost = [file for file in files if not file.is_file()]
            if lost:
                raise UserError(f"{lost[0]} is missing, which {name} names; {AGAIN}")
            return files
    return _one_of(folder, (SAFE_WEIGHTS_NAME, WEIGHTS_NAME))


def _headers(files: list[Path]) -> dict[str, Tensor]:
    """All tensors by name, without their values."""
    weights: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is no file; {AGAIN}")
        if not os.access(file, os.R_OK):
            raise UserError(f"{file} may not be read: change its rights (chmod, chown)")
        read = _header if file.suffix == ".safetensors" else _pickled
        weights |= {name: Tensor(file, shape) for name, shape in read(file).items()}
    return weights


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, "pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        with file.open("rb") as content:
            is_pointer = content.read(40).startswith(b"version https://git-lfs")
        seems = " (it is a Git LFS pointer)" if is_pointer else ""
        raise UserError(f"{file} is damaged or cut{seems}: {error}; {AGAIN}") from error


def _pickled(file: Path) -> dict[str, tuple[int, ...]]:
    """Of PyTorch's own format, which can hold any code: torch reads tensors alone and refuses the rest."""
    try:
        tensors = torch.load(file, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(file))
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    # Whatever the bytes of a broken pickle lead to.
    except Exception as error:
        raise UserError(
            f"{file} is damaged, or a pickle of more than tensors, which is never opened; take the model's .safetensors"
        ) from error


def _expected(folder: Path, config: PreTrainedConfig) -> tuple[dict[str, tuple[int, ...]], str]:
    """The tensors of the transformer without its head, with their shapes, and what stands before their names in the file
    of a model with one; no tensors where files name them otherwise than the class does."""
    if get_checkpoint_conversion_mapping(config.model_type) or config.get_text_config() is not config:
        return {}, ""
    # A command looks at one model more than once.
    if (text := config.to_json_string()) not in _shapes:
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        # Whatever a wrong value meets in the model's class.
        except Exception as error:
            raise _unusable(folder / "config.json", error) from error
        shapes = {name: tuple(parameter.shape) for name, parameter in model.base_model.named_parameters()}
        _shapes[text] = shapes, f"{model.base_model_prefix}."
    return _shapes[text]
