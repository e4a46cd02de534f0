"""Every private name of TRL and transformers that prefopt/trainers builds on, by class.

When a new release of TRL breaks one of these, this file says which. A private name that the trainers use without
listing it here is an error too, and so is one of our own that happens to exist upstream.
"""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
import trl
from transformers import PreTrainedConfig, Trainer
from trl import DPOTrainer, GRPOTrainer, RewardTrainer
from trl.trainer.utils import RepeatSampler

TRAINERS = (RewardTrainer, DPOTrainer, GRPOTrainer)

# class -> method -> parameters after self, in order; "..." ends a list of which the rest does not matter here
METHODS = {
    Trainer: {
        "_clip_grad_norm": ["model"],
        "_finish_current_push": [],
        "_get_output_dir": ["trial"],
        "_init_training_state": [
            "max_steps",
            "num_update_steps_per_epoch",
            "num_train_epochs",
            "resume_from_checkpoint",
            "trial",
        ],
        "_load_best_model": [],
        "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
        "_load_optimizer_and_scheduler": ["checkpoint"],
        "_prepare_inputs": ["inputs"],
        "_push_from_checkpoint": ["checkpoint_folder"],
        "_save": ["output_dir", "state_dict"],
        "compute_loss_context_manager": [],
        "init_hf_repo": ["token", "private"],
        "create_scheduler": ["num_training_steps", "optimizer"],
        "prediction_step": ["model", "inputs", "prediction_loss_only", "ignore_keys"],
        "push_to_hub": ["commit_message", "blocking", "token", "revision", "private", "kwargs"],
        "save_model": ["output_dir", "_internal_call"],
        "train": ["resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    },
    RewardTrainer: {
        "_prepare_dataset": ["dataset", "processing_class", "args", "dataset_name"],
        "_set_signature_columns_if_needed": [],
        "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
        "create_model_card": ["model_name", "dataset_name", "tags"],
        "evaluate": ["eval_dataset", "ignore_keys", "metric_key_prefix"],
        "log": ["logs", "start_time"],
    },
    DPOTrainer: {
        "_compute_loss": ["model", "inputs", "return_outputs"],
        "_precompute_ref_logps": ["dataset", "name", "batch_size"],
        "_prepare_dataset": ["dataset", "processing_class", "args", "dataset_name"],
        "_set_signature_columns_if_needed": [],
        "compute_ref_log_probs": ["model", "inputs"],
        "evaluate": ["eval_dataset", "ignore_keys", "metric_key_prefix"],
        "log": ["logs", "start_time"],
        "prediction_step": ["model", "inputs", "prediction_loss_only", "ignore_keys"],
    },
    GRPOTrainer: {
        "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
        "_compute_loss": ["model", "inputs"],
        "_generate": ["prompts"],
        "_generate_and_score_completions": ["inputs"],
        "_get_per_token_logps_and_entropies": [
            "model",
            "input_ids",
            "attention_mask",
            "logits_to_keep",
            "batch_size",
            "compute_entropy",
            "...",
        ],
        "_get_train_sampler": ["dataset"],
        "_prepare_inputs": ["generation_batch"],
        "_save_checkpoint": ["model", "trial"],
    },
}

# class -> attributes that instances get, or that the class has
ATTRIBUTES = {
    PreTrainedConfig: ["_name_or_path"],
    Trainer: ["_signature_columns"],
    RewardTrainer: ["_metrics", "_name", "_paper", "_tag_names", "_total_train_tokens", "_tp_size"],
    DPOTrainer: [
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
    ],
    GRPOTrainer: [
        "_buffered_inputs",
        "_is_vlm",
        "_logs",
        "_metrics",
        "_name",
        "_paper",
        "_step",
        "_tag_names",
        "_tokenizer",
        "aux_loss_enabled",
        "eos_token_ids",
        "num_generations_eval",
        "ref_model",
        "reward_weights",
        "temperature",
    ],
    RepeatSampler: ["generator"],
}

# module -> names imported from inside TRL rather than from its top level
IMPORTS = {
    "trl.models.utils": ["disable_gradient_checkpointing"],
    "trl.trainer.utils": [
        "add_fused_lm_head",
        "create_model_from_path",
        "disable_dropout_in_model",
        "get_comet_experiment_url",
        "get_trackio_space_url",
        "pad",
        "shuffle_sequence_dict",
        "split_tensor_dict",
        "use_adapter",
    ],
}

FILES = sorted((Path(__file__).parents[2] / "prefopt" / "trainers").rglob("*.py"))


def source_of(cls):
    return "\n".join(inspect.getsource(base) for base in cls.__mro__ if base is not object)


UPSTREAM = {name for cls in TRAINERS for name in re.findall(r"\b_[a-z]\w*", source_of(cls))}
LISTED = {name for table in (METHODS, ATTRIBUTES) for names in table.values() for name in names}


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_names(tree):
    """(used or overridden, defined) private attributes of a module; plain functions and variables are its own."""
    used, defined = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            used.add(node.attr)
            if isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
        elif isinstance(node, ast.ClassDef):
            for item in node.body:
                names = []
                if isinstance(item, ast.FunctionDef):
                    names = [item.name]
                elif isinstance(item, ast.Assign):
                    names = [target.id for target in item.targets if isinstance(target, ast.Name)]
                elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    names = [item.target.id]
                defined |= {name for name in names if is_private(name)}
    return used | defined, defined


def test_methods_exist_with_their_parameters():
    for cls, methods in METHODS.items():
        for name, expected in methods.items():
            assert hasattr(cls, name), f"{cls.__name__} of trl {trl.__version__} has no {name}"
            parameters = list(inspect.signature(getattr(cls, name)).parameters)[1:]
            if expected[-1:] == ["..."]:
                expected, parameters = expected[:-1], parameters[: len(expected) - 1]
            assert parameters == expected, f"{cls.__name__}.{name}"


def test_attributes_exist():
    for cls, names in ATTRIBUTES.items():
        source = source_of(cls)
        for name in names:
            assigned = re.search(rf"self\.{name}(: [^=\n]+)? = ", source)
            assert assigned or hasattr(cls, name), f"{cls.__name__} of trl {trl.__version__} has no {name}"


def test_imports_exist():
    for module, names in IMPORTS.items():
        for name in names:
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_trainers_use_no_unlisted_private_name(path):
    used, _ = private_names(ast.parse(path.read_text()))
    own = set().union(*(private_names(ast.parse(file.read_text()))[1] for file in FILES))
    unlisted = {name for name in used - LISTED if name in UPSTREAM or name not in own}
    assert not unlisted, (
        f"{path.name} uses private names that METHODS and ATTRIBUTES do not list, or defines names that exist "
        f"upstream: {sorted(unlisted)}"
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_trainers_import_no_unlisted_inner_name(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trl."):
            unlisted = {alias.name for alias in node.names} - set(IMPORTS.get(node.module, []))
            assert not unlisted, f"{path.name}: {node.module} {sorted(unlisted)}"


def test_everything_listed_is_used():
    names = set()
    for file in FILES:
        tree = ast.parse(file.read_text())
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        names |= private_names(tree)[1]
    assert not LISTED - names
