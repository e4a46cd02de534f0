"""What each trainer needs of TRL and transformers beyond their public interface, checked when the trainer is imported.

The trainers override private methods of TRL's. A release that renames one would leave ours uncalled without a word, so
every such name stands here, by trainer, with the parameters it must have. A TRL that has them all is used, whatever its
version; one that lacks a seam is refused by the trainers that need it and by no other.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from types import CodeType

from prefopt.errors import UserImportError


@dataclass(frozen=True)
class Seams:
    """Private names of one class: methods with their parameters after `self` ("..." ends a list), and attributes."""

    methods: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    attributes: tuple[str, ...] = ()


_TRAINER = Seams(
    methods={
        "_clip_grad_norm": ("model",),
        "_finish_current_push": (),
        "_get_output_dir": ("trial",),
        "_init_training_state": (
            "max_steps",
            "num_update_steps_per_epoch",
            "num_train_epochs",
            "resume_from_checkpoint",
            "trial",
        ),
        "_load_best_model": (),
        "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
        "_load_optimizer_and_scheduler": ("checkpoint",),
        "_prepare_inputs": ("inputs",),
        "_push_from_checkpoint": ("checkpoint_folder",),
        "_save": ("output_dir", "state_dict"),
        "compute_loss_context_manager": (),
        "create_scheduler": ("num_training_steps", "optimizer"),
        "init_hf_repo": ("token", "..."),
        "prediction_step": ("model", "inputs", "prediction_loss_only", "ignore_keys"),
        "push_to_hub": ("commit_message", "blocking", "token", "revision", "..."),
        "save_model": ("output_dir", "_internal_call"),
        "train": ("resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
    },
    attributes=("_globalstep_last_logged", "_signature_columns", "_tr_loss"),
)
_CONFIG = Seams(attributes=("_name_or_path",))
_PREPARE = ("dataset", "processing_class", "args", "dataset_name")
_EVALUATE = ("eval_dataset", "ignore_keys", "metric_key_prefix")
_CARDS = ("get_comet_experiment_url", "get_trackio_space_url")

# trainer -> class -> its seams
CLASSES: dict[str, dict[str, Seams]] = {
    "RankedRewardTrainer": {
        "transformers.PreTrainedConfig": _CONFIG,
        "transformers.Trainer": _TRAINER,
        "trl.RewardTrainer": Seams(
            methods={
                "_prepare_dataset": _PREPARE,
                "_set_signature_columns_if_needed": (),
                "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
                "create_model_card": ("model_name", "dataset_name", "tags"),
                "evaluate": _EVALUATE,
                "log": ("logs", "start_time"),
            },
            attributes=("_metrics", "_name", "_paper", "_tag_names", "_total_train_tokens", "_tp_size"),
        ),
    },
    "RankedDPOTrainer": {
        "transformers.PreTrainedConfig": _CONFIG,
        "transformers.Trainer": _TRAINER,
        "trl.DPOTrainer": Seams(
            methods={
                "_precompute_ref_logps": ("dataset", "name", "batch_size"),
                "_prepare_dataset": _PREPARE,
                "_set_signature_columns_if_needed": (),
                "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
                "compute_ref_log_probs": ("model", "inputs"),
                "evaluate": _EVALUATE,
                "log": ("logs", "start_time"),
                "prediction_step": ("model", "inputs", "prediction_loss_only", "ignore_keys"),
            },
            attributes=(
                "_metrics",
                "_name",
                "_paper",
                "_tag_names",
                "_total_train_tokens",
                "_tp_size",
                "aux_loss_enabled",
                "beta",
                "precompute_ref_logps",
                "ref_model",
                "router_aux_loss_coef",
            ),
        ),
    },
    "PPOPtxTrainer": {
        "transformers.PreTrainedConfig": _CONFIG,
        "transformers.Trainer": _TRAINER,
        "trl.GRPOTrainer": Seams(
            methods={
                "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
                "_compute_loss": ("model", "inputs"),
                "_generate": ("prompts",),
                "_generate_and_score_completions": ("inputs",),
                "_get_per_token_logps_and_entropies": (
                    "model",
                    "input_ids",
                    "attention_mask",
                    "logits_to_keep",
                    "batch_size",
                    "compute_entropy",
                    "...",
                ),
                "_get_train_sampler": ("dataset",),
                "_prepare_inputs": ("generation_batch",),
                "_tokenize_prompts": ("prompts",),
                "_save_checkpoint": ("model", "trial"),
                "_save_optimizer_and_scheduler": ("output_dir",),
            },
            attributes=(
                "_buffered_inputs",
                "_is_vlm",
                "_last_loaded_step",
                "_logs",
                "_metrics",
                "_name",
                "_paper",
                "_step",
                "_tag_names",
                "_tokenizer",
                "_total_train_tokens",
                "aux_loss_enabled",
                "eos_token_ids",
                "num_generations_eval",
                "ref_model",
                "reward_weights",
                "temperature",
            ),
        ),
        "trl.generation.vllm_client.VLLMClient": Seams(
            methods={"get_server_info": (), "init_communicator": ("device",), "reset_prefix_cache": ()},
            attributes=("base_url", "model", "session"),
        ),
        "trl.generation.vllm_generation.VLLMGeneration": Seams(
            methods={"_init_vllm": (), "sync_weights": ()},
            attributes=(
                "accelerator",
                "enable_sleep_mode",
                "generation_kwargs",
                "llm",
                "mode",
                "model",
                "vllm_client",
            ),
        ),
        "trl.trainer.utils.RepeatSampler": Seams(attributes=("generator",)),
    },
}

# trainer -> module -> names that are imported from inside TRL rather than from its top level
IMPORTS: dict[str, dict[str, tuple[str, ...]]] = {
    "RankedRewardTrainer": {"trl.trainer.utils": ("create_model_from_path", *_CARDS)},
    "RankedDPOTrainer": {
        "trl.models.utils": ("disable_gradient_checkpointing",),
        "trl.trainer.utils": ("use_adapter", *_CARDS),
    },
    "PPOPtxTrainer": {
        "trl.generation.vllm_generation": ("VLLMClient", "VLLMGeneration"),
        "trl.trainer.grpo_trainer": ("VLLMGeneration",),
        "trl.trainer.utils": (
            "add_fused_lm_head",
            "split_tensor_dict",
            "use_adapter",
            *_CARDS,
        ),
    },
}

# These read log-probabilities off TRL's fused LM head.
_ON_FUSED_HEAD = ("RankedDPOTrainer", "PPOPtxTrainer")


def missing_seams(trainer: str) -> list[str]:
    """What the installed TRL and transformers lack of what a trainer is built on, a sentence each; empty if nothing.

    Args:
        trainer: a key of `CLASSES`.

    Example:
        >>> missing_seams("RankedRewardTrainer")
        []
    """
    return [*_missing_imports(trainer), *_missing_members(trainer), *_missing_kernel(trainer)]


def require_seams(trainer: str) -> None:
    """Raise unless TRL and transformers have all that a trainer is built on.

    Raises:
        UserImportError: naming the trainer, the versions, and every seam that is not as it was.
    """
    if problems := missing_seams(trainer):
        others = [name for name in CLASSES if name != trainer and not missing_seams(name)]
        usable = f"; {' and '.join(others)} can be used" if others else ""
        raise UserImportError(
            f"{trainer} does not work with trl {version('trl')} and transformers {version('transformers')}: "
            f"{'; '.join(problems)}. Install versions that prefopt was tested with (pip install trl==1.16.0 "
            f"transformers==5.23.0), or a newer prefopt{usable}"
        )


def verdicts() -> dict[str, list[str]]:
    """`missing_seams` of every trainer."""
    return {trainer: missing_seams(trainer) for trainer in CLASSES}


def _missing_imports(trainer: str) -> Iterator[str]:
    for module, names in IMPORTS[trainer].items():
        try:
            inner = import_module(module)
        except ImportError as error:
            yield f"{module} cannot be imported ({error})"
            continue
        yield from (f"{module} has no {name}" for name in names if not hasattr(inner, name))


def _missing_members(trainer: str) -> Iterator[str]:
    for path, seams in CLASSES[trainer].items():
        module, _, name = path.rpartition(".")
        try:
            cls = getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            yield f"{path} cannot be imported ({error})"
            continue
        for method, expected in seams.methods.items():
            if not hasattr(cls, method):
                yield f"{name} has no method {method}"
                continue
            parameters = tuple(inspect.signature(getattr(cls, method)).parameters)[1:]
            if expected[-1:] == ("...",):
                expected = expected[:-1]
                parameters = parameters[: len(expected)]
            if parameters != expected:
                yield f"{name}.{method} takes ({', '.join(parameters)}) instead of ({', '.join(expected)})"
        written = _names_in_code(cls)
        for attribute in seams.attributes:
            if attribute not in written and not hasattr(cls, attribute):
                yield f"{name} has no attribute {attribute}"


def _missing_kernel(trainer: str) -> Iterator[str]:
    """TRL 1.15's fused LM head is a Triton kernel and nothing else; later ones have a path without."""
    if trainer not in _ON_FUSED_HEAD or find_spec("triton") is not None:
        return
    try:
        needed = not hasattr(import_module("trl.kernels.chunked_logprob"), "_use_triton")
    except ImportError:
        needed = True
    if needed:
        yield "its fused LM head needs Triton, which is not installed (it comes with CUDA builds of torch)"


def _names_in_code(cls: type) -> set[str]:
    """Every name that the methods of a class and of its bases mention: instance attributes are among them.

    Reading them off the byte code takes a millisecond; parsing the sources takes a second.
    """
    names: set[str] = set()
    for base in cls.__mro__:
        for member in vars(base).values():
            member = inspect.unwrap(getattr(member, "__func__", getattr(member, "fget", None) or member))
            if isinstance(code := getattr(member, "__code__", None), CodeType):
                names.update(*_names(code))
    return names


def _names(code: CodeType) -> Iterator[Iterable[str]]:
    yield code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
