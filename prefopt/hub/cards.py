"""Model cards: what is known of a run is kept in `model_card.json`, and README.md is written from it.

A README.md whose text somebody has edited is kept. In one that is written again, metadata that somebody has added
(`license`, `language`, ...) stay.
"""

import hashlib
import json
import logging
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import BitsAndBytesConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from prefopt.errors import UserError
from prefopt.models.loading import saved_vocabulary

logger = logging.getLogger(__name__)

README = "README.md"
FACTS = "model_card.json"
ADAPTER_CONFIG = "adapter_config.json"
_TEMPLATE = Path(__file__).with_name("card.md")
_EMPTY_FORM = "# Model Card for Model ID"  # heads what PEFT saves beside an adapter


def read_facts(folder: str | os.PathLike) -> dict[str, Any]:
    """The content of `model_card.json`: `method`, `paper`, `data`, `hyperparameters`, `results`, ...; empty without it."""
    return _read_json(Path(folder) / FACTS)


def holds_model(folder: str | os.PathLike) -> bool:
    """Whether a model or an adapter is saved in a folder."""
    return any((Path(folder) / name).is_file() for name in (ADAPTER_CONFIG, CONFIG_NAME))


def write_card(
    folder: str | os.PathLike,
    facts: Mapping[str, Any],
    location: str | None = None,
    saved_in: str | os.PathLike | None = None,
) -> None:
    """Write `model_card.json` (`facts`, as of `read_facts`) and, unless somebody has edited it, README.md.

    The code in the card loads the model from `location`, a Hub id; default: the folder. The model itself, full or LoRA
    adapter, is `saved_in` a folder; default: `folder`.
    """
    folder = Path(folder)
    if is_handwritten(folder):
        logger.warning("%s was edited by hand and is kept; delete it to have it written again", folder / README)
        _drop_local_base(folder / README)
        written = read_facts(folder).get("written")
    else:
        card = build_card(saved_in or folder, facts, location or os.fspath(folder))
        _keep_added_metadata(card, folder / README)
        card.save(folder / README)
        written = _digest(card.text)
    text = json.dumps({**facts, "written": written}, ensure_ascii=False, indent=1) + "\n"
    (folder / FACTS).write_text(text, encoding="utf-8")


def is_handwritten(folder: str | os.PathLike) -> bool:
    """Whether the text of README.md is neither that of `write_card` nor PEFT's empty form; its metadata do not count."""
    path = Path(folder) / README
    if not path.is_file():
        return False
    text = ModelCard.load(path, ignore_metadata_errors=True).text
    return _EMPTY_FORM not in text and _digest(text) != read_facts(folder).get("written")


def build_card(folder: str | os.PathLike, facts: Mapping[str, Any], location: str | None = None) -> ModelCard:
    """The card of a saved model: metadata with `model-index`, code that loads it, results, training; see `write_card`."""
    folder = Path(folder)
    location = os.fspath(folder) if location is None else location
    model = _describe(folder, facts)
    base, datasets = model["base"] or facts.get("base_model"), facts.get("datasets", [])
    is_public = is_public_base(base, facts, folder)
    title = location.rstrip("/").split("/")[-1]
    task = "text-classification" if model["is_reward"] else "text-generation"
    tags = {"trl", "prefopt", *facts.get("tags", ())} | ({"lora"} if model["is_adapter"] else set())
    data = ModelCardData(
        model_name=title,
        base_model=base if is_public else None,
        base_model_relation="adapter" if model["is_adapter"] and is_public else None,
        datasets=[name for name in datasets if _may_be_hub_id(name)] or None,
        library_name="peft" if model["is_adapter"] else "transformers",
        pipeline_tag=task,
        tags=sorted(tags),
        eval_results=[_eval_result(row, task) for row in facts.get("results", [])] or None,
    )
    content = {
        **{name: {} for name in ("paper", "data", "hyperparameters", "links", "versions")},
        **facts,
        **model,
        "title": title,
        "base": base and (f"[{base}](https://huggingface.co/{base})" if is_public else Path(base).name),
        "datasets": [
            f"[{name}](https://huggingface.co/datasets/{name})" if _may_be_hub_id(name) else Path(name).name
            for name in datasets
        ],
        "location": json.dumps(location),
        "serve": _serve_command(location, model["reward_bias"]),
        "results": [
            {**row, "shown": f"{row['value']:.4g}", "interval": _interval(row), "dataset": Path(row["dataset"]).name}
            for row in facts.get("results", [])
        ],
    }
    return ModelCard.from_template(data, template_path=os.fspath(_TEMPLATE), **content)


def is_hub_id(name: str | None) -> bool:
    """Whether a name can be a repository `owner/name` of the Hub and is no local path.

    >>> is_hub_id("Qwen/Qwen3-0.6B-Base"), is_hub_id("runs/demo/sft"), is_hub_id("./sft"), is_hub_id(None)
    (True, False, False, False)
    """
    return _may_be_hub_id(name) and not os.path.exists(name)


def is_public_base(base: str | None, facts: Mapping[str, Any], folder: Path) -> bool:
    """Whether the base of a saved model is on the Hub, wherever this is asked: `runs/base` may be a folder there, not here.

    The trainer knew it and wrote down the Hub id, or that there is none. Without its word a path that leads to something
    from the model's own folder, or from one around it, is no Hub id.
    """
    if "base_model" in facts:
        return base == facts["base_model"] and _may_be_hub_id(base)
    return is_hub_id(base) and not any((around / base).exists() for around in folder.resolve().parents)


def _may_be_hub_id(name: str | None) -> bool:
    if not name or name.count("/") != 1:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _describe(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the files of a saved model say about how to load and use it."""
    adapter, config = _read_json(folder / ADAPTER_CONFIG), _read_json(folder / CONFIG_NAME)
    is_adapter, kinds = bool(adapter), config.get("architectures") or []
    is_reward = adapter.get("task_type") == "SEQ_CLS"
    is_reward |= not is_adapter and any(kind.endswith("ForSequenceClassification") for kind in kinds)
    quantization = config.get("quantization_config") or facts.get("quantization")
    has_bias = is_reward and bool(config.get("reward_bias"))
    has_generation_config = (folder / GENERATION_CONFIG_NAME).is_file()
    auto_model = "AutoModelForSequenceClassification" if is_reward else "AutoModelForCausalLM"
    of_adapters = {
        "AutoConfig": has_bias,
        "BitsAndBytesConfig": quantization,
        "GenerationConfig": has_generation_config and not is_reward,
    }
    imports = {auto_model, "AutoTokenizer", *(name for name, used in of_adapters.items() if is_adapter and used)}
    return {
        "is_adapter": is_adapter,
        "is_reward": is_reward,
        "base": adapter.get("base_model_name_or_path"),
        "base_path": json.dumps(adapter.get("base_model_name_or_path")),
        "auto_model": auto_model,
        "imports": sorted(imports),
        "quantization": _quantization_code(quantization) if is_adapter and quantization else "",
        "vocabulary": saved_vocabulary(folder) if is_adapter else None,
        "pad_token_id": config.get("pad_token_id"),
        "has_bias": has_bias,
        "reward_bias": config.get("reward_bias") if has_bias else None,
        "has_generation_config": has_generation_config,
        "reward_token_id": config.get("reward_token_id") if is_reward else None,
        "is_chat": facts.get("is_chat", (folder / "chat_template.jinja").is_file()),
        "adds_eos": facts.get("adds_eos", False),
    }


def _serve_command(location: str, bias: float | None) -> str:
    r"""What has vLLM serve a whole reward model, its bias subtracted.

    >>> _serve_command("me/rm", 0.25)
    'vllm serve me/rm --runner pooling --pooler-config \'{"logit_mean": 0.25}\''
    """
    pooler = ["--pooler-config", json.dumps({"logit_mean": bias})] if bias else []
    return shlex.join(["vllm", "serve", location, "--runner", "pooling", *pooler])


def _quantization_code(quantization: Mapping[str, Any]) -> str:
    """Keyword arguments of BitsAndBytesConfig, as far as they are not its defaults."""
    defaults = BitsAndBytesConfig().to_dict()
    own = {key: value for key, value in quantization.items() if key in defaults and value != defaults[key]}
    return ", ".join(f"{key}={value!r}" for key, value in own.items() if key[0] != "_")


def _eval_result(row: Mapping[str, Any], task: str) -> EvalResult:
    interval, dataset = _interval(row), row["dataset"]
    is_public = _may_be_hub_id(dataset)
    said = [f"n = {row['n']}"] if row.get("n") else []
    said += [f"95 % interval {interval}"] if interval else []
    return EvalResult(
        task_type=task,
        dataset_type=dataset if is_public else "local",
        dataset_name=dataset if is_public else Path(dataset).name,
        dataset_split=row.get("split"),
        metric_type=row["metric"],
        metric_name=row["title"] + (f" ({', '.join(said)})" if said else ""),
        metric_value=row["value"],
    )


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row.get("low"), row.get("high")
    return "" if low is None or high is None else f"{low:.4g} to {high:.4g}"


def _keep_added_metadata(card: ModelCard, path: Path) -> None:
    if not path.is_file():
        return
    new = card.data.to_dict()
    old = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    for key, value in old.items():
        if key not in new and key not in ("base_model", "base_model_relation", "model-index", "model_name"):
            card.data[key] = value


def _drop_local_base(path: Path) -> None:
    """PEFT writes the base's local path into the metadata at every save, and the Hub then refuses the upload."""
    card = ModelCard.load(path, ignore_metadata_errors=True)
    base = card.data.get("base_model")
    if isinstance(base, str) and not is_public_base(base, read_facts(path.parent), path.parent):
        card.data.pop("base_model")
        card.save(path)


def _digest(text: str) -> str:
    lines = [line.rstrip() for line in text.strip().splitlines()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({error}); mend it, or move it to have it written anew"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object; mend it, or move it to have it written anew")
    return content
