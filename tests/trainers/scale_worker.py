"""Trains by every trainer on tiny models, in whatever processes it is called.

`test_scale.py` compares what it writes. Rollouts are scripted, so that they depend on the prompt alone.
"""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
)

from prefopt import (
    PPOPtxConfig,
    PPOPtxTrainer,
    RankedDPOConfig,
    RankedDPOTrainer,
    RankedRewardConfig,
    RankedRewardTrainer,
)

ROWS = [
    {
        "prompt": prompt,
        "completions": [" the cat sat", " a dog", " the red house on the mat", " ran"][:k],
        "ranks": [1, 2, 2, 3][:k],
    }
    for k, prompt in [
        (4, "what is this"),
        (2, "a dog ran to the"),
        (3, "red"),
        (4, "the cat"),
        (3, "question"),
    ]
    * 4
]
PROMPTS = ["the cat", "a dog ran", "what is", "red"] * 8
TEXTS = ["the cat sat on the mat", "a dog ran to the red house"] * 5


class ScriptedPPO(PPOPtxTrainer):
    """Its completions depend on the prompt alone, not on the process."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> tuple:
        return [[2 + (7 * sum(p) + 11 * t) % 300 for t in range(1 + sum(p) % 5)] for p in prompt_ids], None


def make(kind: str, folder: Path, batch_size: int, out: Path) -> Trainer:
    """The trainer of a kind: `reward`, `dpo` or `ppo`, then `-full`, `-lora`, `-shared` (all roles on one base).

    `-resumed` at the end: trained, then trained again from the checkpoint of the second step. `-bf16` at the end: in bf16,
    with gradient checkpointing, as on a GPU.
    """
    trainer, how, *_ = kind.split("-")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    settings = {
        "output_dir": str(out / kind),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": kind.endswith("-bf16"),
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "save_strategy": "steps" if kind.endswith("-resumed") else "no",
        "save_steps": 2,
        "logging_steps": 1,
        "gradient_checkpointing": kind.endswith("-bf16"),
        "warmup_steps": 0,
    }
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 16}
    if trainer == "ppo":
        args = PPOPtxConfig(
            learning_rate=1e-2,
            value_learning_rate=1e-2,
            ptx_coef=2.0,
            ptx_batch_ratio=0.4,
            ptx_max_length=16,
            max_completion_length=32,
            fit_value_head=False,
            max_grad_norm=0.7,
            missing_eos_penalty=0.3,
            shuffle_dataset=False,
            **settings,
        )
        policy = LlamaForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
        reward: Any = str(folder / "reward")
        if how == "shared":
            policy = AutoPeftModelForCausalLM.from_pretrained(
                folder / "sft_adapter", is_trainable=True, dtype=torch.float32
            )
            reward = str(folder / "reward_adapter")
        return ScriptedPPO(
            policy,
            reward,
            args,
            Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=tokenizer,
            pretrain_dataset=Dataset.from_dict({"text": TEXTS}),
            value_model="head" if how == "head" else None,
            peft_config=LoraConfig(task_type="CAUSAL_LM", **lora) if how == "lora" else None,
        )
    settings |= {"learning_rate": 1e-2, "max_grad_norm": 0.7, "ties": "half", "optim": "adamw_torch"}
    if trainer == "reward":
        model = LlamaForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32)
        trainer_class, args = RankedRewardTrainer, RankedRewardConfig(**settings)
    else:
        model = LlamaForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
        trainer_class, args = RankedDPOTrainer, RankedDPOConfig(**settings)
    return trainer_class(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        peft_config=LoraConfig(**lora) if how == "lora" else None,
    )


def shard_on_cpus() -> None:
    """Have accelerate, which knows FSDP on accelerators alone, shard over gloo processes on the CPU too."""

    def prepare_backend(self: PartialState, *args: Any) -> tuple[str, DistributedType]:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        return "gloo", DistributedType.MULTI_GPU

    def set_device(self: PartialState) -> None:
        self.device = torch.device("cpu")

    PartialState._prepare_backend, PartialState.set_device = prepare_backend, set_device


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter as it is without sharding."""
    parameter = parameter.detach()
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def train(kind: str, folder: Path, batch_size: int, out: Path) -> None:
    """Train, save the model, and write logs and weights to `OUT/KIND.pt`."""
    trainer = make(kind, folder, batch_size, out)
    trainer.train()
    if kind.endswith("-resumed"):
        trainer = make(kind, folder, batch_size, out)
        trainer.train(resume_from_checkpoint=str(out / kind / "checkpoint-2"))
    trainer.save_model()
    weights = {name: whole(p) for name, p in trainer.model.named_parameters()}
    if isinstance(trainer, PPOPtxTrainer):
        weights |= {f"value.{n}": whole(p) for n, p in trainer.value_function.named_parameters.items()}
    timing = ("runtime", "second", "flos", "_time", "step_time")
    logs = [{n: x for n, x in log.items() if not n.endswith(timing)} for log in trainer.state.log_history]
    if trainer.accelerator.is_main_process:
        state = {
            "processes": trainer.accelerator.num_processes,
            "type": trainer.accelerator.distributed_type.value,
            "sharded": sum(hasattr(p, "full_tensor") for p in trainer.model.parameters()),
        }
        torch.save({"state": state, "weights": weights, "logs": logs}, out / f"{kind}.pt")


def train_each(kinds: list[str], folder: Path, batch_size: int, out: Path) -> None:
    """In this process, which may be one of several."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpus()
    for kind in kinds:
        train(kind, folder, batch_size, out)
