"""What the files of a model tell before its weights are loaded: damage, parts that are missing, another kind of model."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from prefopt.errors import UserError

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def check_model_files(path: str | os.PathLike, **hub_arguments: Any) -> None:
    """Look at a folder that holds a language model, a reward model or an adapter; of a name on the Hub, nothing is said.

    Raises:
        UserError: a file is missing, damaged or no JSON; a tensor of the transformer is missing; it is no decoder.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    if (folder / "adapter_config.json").exists():
        _json(folder / "adapter_config.json")
        adapter = _read("adapter_config.json", folder, PeftConfig, hub_arguments)
        _headers(_one_of(folder, ADAPTER_WEIGHTS))
        if not adapter.base_model_name_or_path:
            raise UserError(
                f"{folder / 'adapter_config.json'} names no base (base_model_name_or_path); write its path there"
            )
        if Path(adapter.base_model_name_or_path) != folder:
            check_model_files(adapter.base_model_name_or_path)
        return
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no model: there is no config.json and no adapter_config.json in it")
    _json(folder / "config.json")
    config = _read("config.json", folder, AutoConfig, hub_arguments)
    _check_kind(folder, config)
    weights = _headers(_weight_files(folder))
    expected, prefix = _expected(config)
    missing = sorted(expected - {name.removeprefix(prefix) for name in weights}) if weights else []
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"the weights in {folder} lack {missing[0]}{more}, which would be drawn at random; copy or download the model again"
        )


def _read(name: str, folder: Path, kind: type, hub_arguments: dict[str, Any]) -> Any:
    try:
        return kind.from_pretrained(folder, **hub_arguments)
    # Whatever a wrong value meets in the class that reads it.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{folder / name} cannot be used: {reason[:300]}; mend it, or download the model again"
        ) from error


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


def _check_kind(folder: Path, config: PreTrainedConfig) -> None:
    kind = config.model_type
    is_encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if config.is_encoder_decoder or is_encoder or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"{folder} is a {kind} model; prefopt trains decoders (language models that write from left to right)"
        )


def _one_of(folder: Path, names: tuple[str, ...]) -> list[Path]:
    for name in names:
        if (folder / name).exists():
            return [folder / name]
    raise UserError(f"{folder} holds no weights: expected {names[0]}; copy or download the model again")


def _weight_files(folder: Path) -> list[Path]:
    for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        if not (folder / SAFE_WEIGHTS_NAME).exists() and (folder / name).exists():
            shards = _json(folder / name, "weight_map")["weight_map"]
            files = [folder / shard for shard in sorted(set(shards.values()))]
            lost = [file for file in files if not file.is_file()]
            if lost:
                raise UserError(f"{lost[0]} is missing, which {name} names; copy or download the model again")
            return files
    return _one_of(folder, (SAFE_WEIGHTS_NAME, WEIGHTS_NAME))


def _headers(files: list[Path]) -> set[str]:
    """The names of all tensors; none of a pickle, which is not opened here."""
    names: set[str] = set()
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is no file; copy or download the model again")
        if file.suffix != ".safetensors":
            continue
        try:
            with safe_open(file, "pt") as weights:
                names |= set(weights.keys())
        except (SafetensorError, OSError) as error:
            begins = file.read_bytes()[:40]
            seems = " (it is a Git LFS pointer)" if begins.startswith(b"version https://git-lfs") else ""
            raise UserError(f"{file} is damaged or cut{seems}: {error}; copy or download the model again") from error
    return names


def _expected(config: PreTrainedConfig) -> tuple[set[str], str]:
    """The tensors of the transformer without its head, and what stands before their names in the file of a model with
    one; no tensors where files name them otherwise than the class does."""
    if get_checkpoint_conversion_mapping(config.model_type) or config.get_text_config() is not config:
        return set(), ""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name for name, _ in model.base_model.named_parameters()}, f"{model.base_model_prefix}."
