"""What a step checks before any weights are loaded: lengths, logging, and that nothing trained is overwritten."""

import logging
import math
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig
from transformers import AutoConfig, PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from prefopt.errors import UserError
from prefopt.inference.jsonl import read_json
from prefopt.models.checkpoints import check_reward_model
from prefopt.models.loading import is_adapter
from prefopt.models.passes import max_positions
from prefopt.rankings.tokens import plain_messages, template_kwargs
from prefopt.recipes.common.errors import explain
from prefopt.recipes.common.lock import LOCK

logger = logging.getLogger(__name__)

# Files that hold a model, whoever saved it; `save_model` writes Trainer's arguments beside it.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
NO_WEIGHTS = ("training_args.bin",)
# How transformers and peft call the weights of the model that a step ends with; its value function is another file.
SAVED = ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")

# report_to -> packages of which one is needed; transformers itself asks only after the model is loaded.
LOGGERS = {
    "trackio": ("trackio",),
    "wandb": ("wandb",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "mlflow": ("mlflow",),
    "swanlab": ("swanlab",),
}


# ---- the folder of the run --------------------------------------------------------------------------------------
def is_finished(args: TrainingArguments) -> bool:
    """Whether `output_dir` holds this run, finished, and the command asks to go on with it: nothing is left to do.

    A UserError if training would overwrite a trained model or checkpoints, or go on from what is not there.
    """
    folder, resume = Path(args.output_dir), str(args.resume_from_checkpoint or "").lower()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {folder} is a file; name a folder")
    state, checkpoints = _state(folder), sort_checkpoints(str(folder)) if folder.is_dir() else []
    weights = _weights(folder)
    # A training step leaves its lock, so that one killed while it saved the model can start anew.
    if weights and state is None and not checkpoints and not (folder / LOCK).exists():
        raise UserError(
            f"output_dir: {folder} holds a model ({weights[0].name}) that is of no run of this folder, and training would "
            "overwrite it; choose another output_dir"
        )
    resumes = resume not in ("", "none", "false")
    if resumes and resume not in ("true", "latest"):
        if not Path(args.resume_from_checkpoint).is_dir():
            raise UserError(
                f"resume_from_checkpoint: there is no folder {args.resume_from_checkpoint}; name a checkpoint, or 'true' "
                "for the newest of output_dir"
            )
        return False
    if not resumes:
        if state is None and not checkpoints:
            return False
        held = f"{len(checkpoints)} checkpoints of an unfinished run" if state is None else "a finished run"
        raise UserError(
            f"output_dir: {folder} holds {held}, which a new run would overwrite; go on with it by "
            "resume_from_checkpoint: true, or choose another output_dir (or delete that one)"
        )
    if state is None:
        return False
    if args.max_steps > 0:
        asked, done, unit = args.max_steps, state["max_steps"], "steps"
    else:
        asked, done, unit = math.ceil(args.num_train_epochs), state["num_train_epochs"], "epochs"
    if asked <= done:
        print(f"{folder} holds the finished run of {done} {unit}: nothing is left to train")
        return True
    if not checkpoints:
        raise UserError(
            f"output_dir: the finished run in {folder} has no checkpoint to go on from (save_strategy was 'no'), and to "
            "start anew would overwrite it; choose another output_dir"
        )
    return False


def _weights(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix in WEIGHTS and path.name not in NO_WEIGHTS)


def _state(folder: Path) -> dict[str, Any] | None:
    """The state that a step writes last of all; None where no step has ended, or its weights are missing."""
    if not any(next(folder.glob(pattern), None) for pattern in SAVED):
        return None
    try:
        state = read_json(folder / TRAINER_STATE_NAME, "max_steps", "num_train_epochs")
    except UserError:
        return None
    return state if all(isinstance(state[key], int | float) for key in ("max_steps", "num_train_epochs")) else None


# ---- lengths ----------------------------------------------------------------------------------------------------
def positions(path: str, revision: str | None = None) -> int | None:
    """How many tokens a model or the base of an adapter reads, by its configuration; None if that tells no limit."""
    try:
        if is_adapter(path, revision=revision):
            path, revision = PeftConfig.from_pretrained(path, revision=revision).base_model_name_or_path, None
        config = AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        reason = explain(error) or str(error).splitlines()[0]
        raise UserError(f"cannot read the configuration of {path!r}: {reason}") from error
    return max_positions(config)


def check_length(args: TrainingArguments, name: str, path: str, revision: str | None = None) -> None:
    """Refuse a length that is beyond the model's positions; a default one is lowered, with a warning."""
    length, limit = getattr(args, name), positions(path, revision)
    if length is None or limit is None or length <= limit:
        return
    default = next(field.default for field in fields(args) if field.name == name)
    if length != default:
        raise UserError(
            f"{name} is {length}, but {path} reads at most {limit} tokens (max_position_embeddings of its "
            f"configuration); set {name} to {limit} or less"
        )
    logger.warning("%s: lowered from its default %d to the %d tokens that %s reads", name, length, limit, path)
    setattr(args, name, limit)


def check_prompts(
    rows: Dataset,
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    paths: Sequence[str],
    completion: tuple[str, int],
    **chat_template_kwargs: Any,
) -> None:
    """Refuse prompts that leave the models at `paths` no room for a completion of `(key, tokens)`, naming row and lengths."""
    limits = {path: limit for path in paths if (limit := positions(path)) is not None}
    if not limits:
        return
    path = min(limits, key=lambda name: limits[name])
    prompts, is_chat = rows["prompt"][:], not isinstance(rows[0]["prompt"], str)
    if is_chat:
        how = {"tokenize": False, "add_generation_prompt": True, **chat_template_kwargs}
        prompts = [
            tokenizer.apply_chat_template(plain_messages(row["prompt"]), **{**how, **template_kwargs(row)})
            for row in rows
        ]
    lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=not is_chat)["input_ids"]]
    row = max(range(len(lengths)), key=lengths.__getitem__)
    key, tokens = completion
    if lengths[row] + tokens > limits[path]:
        raise UserError(
            f"{source} row {row}: its prompt of {lengths[row]} tokens and {key} {tokens} are more than the "
            f"{limits[path]} tokens that {path} reads (max_position_embeddings of its configuration); lower {key} or "
            "leave out the longest prompts"
        )


def check_reward_models(**paths: str) -> None:
    """Refuse what is no reward model, by the names of the keys that hold the paths."""
    for key, path in paths.items():
        try:
            check_reward_model(path)
        except (OSError, ValueError) as error:
            said = str(error).splitlines()[0]
            raise UserError(f"{key}: {said if str(path) in said else f'{path}: {said}'}") from error


# ---- logging ----------------------------------------------------------------------------------------------------
def check_reporting(report_to: str | Sequence[str]) -> None:
    """Every name of `report_to` is one that transformers knows, and its package is installed."""
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    try:
        get_reporting_integration_callbacks(names)
    except ValueError as error:
        raise UserError(f"report_to: {error}") from error
    for name in names:
        packages = LOGGERS.get(name, ())
        if packages and not any(find_spec(package) for package in packages):
            raise UserError(f"report_to: {name} needs its package: pip install {packages[0]}; or leave report_to out")
