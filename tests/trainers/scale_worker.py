"""Trains by every trainer on tiny models, in whatever processes it is called.

`test_scale.py` compares what it writes. Rollouts are scripted, so that they depend on the prompt alone.
"""

import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import DistributedType, PartialState
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import (
    BitsAndBytesConfig,
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
from tests.trainers.ppo_ptx.conftest import END_IDS

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
# Five, so that processes, each of which takes a multiple of two, never have the same.
PROMPTS = ["the cat", "a dog ran", "what is", "red", "the red house"] * 8
TEXTS = ["the cat sat on the mat", "a dog ran to the red house"] * 5


class ScriptedPPO(PPOPtxTrainer):
    """Its completions depend on the prompt alone, not on the process."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> tuple:
        return [[2 + (7 * sum(p) + 11 * t) % 300 for t in range(1 + sum(p) % 5)] for p in prompt_ids], None


class LikeliestPPO(PPOPtxTrainer):
    """Its completions are the policy's, on any number of processes: nothing is left to chance."""

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple:
        with patch("torch.multinomial", lambda probs, num_samples: probs.argmax(-1, keepdim=True)):
            return super()._generate_single_turn(*args, **kwargs)


def make(kind: str, folder: Path, batch_size: int, out: Path) -> Trainer:
    """The trainer of a kind: `reward`, `dpo` or `ppo`, then `-full`, `-lora`, `-shared` (all roles on one base).

    Of PPO also `-head` (the value function is one on the trunk), `-average` of the weights, `-exact` KL, `-drawn` (the
    policy generates, the likeliest tokens).

    `-resumed` at the end: trained, then trained again from the checkpoint of the second step. `-bf16` at the end: in bf16.
    `-checkpointing`: of the activations, as on a GPU; also with `-bf16`. `-4bit`: the base of reward model or DPO, packed as
    FSDP wants it.
    """
    trainer, how, *more = kind.split("-")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    settings = {
        "output_dir": str(out / kind),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": kind.endswith("-bf16"),
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": 2,
        "max_steps": 2 if "drawn" in more else 3,
        "save_strategy": "steps" if kind.endswith("-resumed") else "no",
        "save_steps": 2,
        "logging_steps": 1,
        "gradient_checkpointing": not {"bf16", "checkpointing"}.isdisjoint(more),
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
            max_completion_length=8 if "drawn" in more else 32,
            fit_value_head=False,
            # So that the value function's gradient is clipped too.
            vf_coef=20.0,
            max_grad_norm=0.7,
            missing_eos_penalty=0.3,
            shuffle_dataset=False,
            ema_decay=0.7 if "average" in more else None,
            kl_estimator="full" if "exact" in more else "k1",
            **settings,
        )
        policy = LlamaForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
        reward: Any = str(folder / "reward")
        if how == "shared":
            policy = AutoPeftModelForCausalLM.from_pretrained(
                folder / "sft_adapter", is_trainable=True, dtype=torch.float32
            )
            reward = str(folder / "reward_adapter")
        policy.generation_config.eos_token_id = END_IDS
        return (LikeliestPPO if "drawn" in more else ScriptedPPO)(
            policy,
            reward,
            args,
            Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=tokenizer,
            pretrain_dataset=Dataset.from_dict({"text": TEXTS}),
            value_model="head" if "head" in more else None,
            peft_config=LoraConfig(task_type="CAUSAL_LM", **lora) if how == "lora" else None,
        )
    settings |= {"learning_rate": 1e-2, "max_grad_norm": 0.7, "ties": "half", "optim": "adamw_torch"}
    loading: dict[str, Any] = {"dtype": torch.float32}
    if "4bit" in more:
        loading["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.float32)
    if trainer == "reward":
        model = LlamaForSequenceClassification.from_pretrained(folder / "reward", **loading)
        trainer_class, args = RankedRewardTrainer, RankedRewardConfig(**settings)
    else:
        model = LlamaForCausalLM.from_pretrained(folder / "policy", **loading)
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
    if hasattr(parameter, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()
    parameter = parameter.detach()
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def is_sharded(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "full_tensor") or not getattr(parameter, "ds_persist", True)


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of all weights of the model, and of the value function where there is one."""
    named = dict(trainer.model.named_parameters())
    if isinstance(trainer, PPOPtxTrainer):
        named |= {f"value.{name}": p for name, p in trainer.value_function.named_parameters.items()}
    return {name: whole(parameter).clone() for name, parameter in named.items()}


def train(kind: str, folder: Path, batch_size: int, out: Path) -> None:
    """Train, save the model, and write logs and weights to `OUT/KIND.pt`."""
    trainer = make(kind, folder, batch_size, out)
    if plugin := trainer.accelerator.state.deepspeed_plugin:
        # It leaves small weights whole, as all of these are.
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    trainer.train()
    uninterrupted = weights_of(trainer)
    if kind.endswith("-resumed"):
        trainer = make(kind, folder, batch_size, out)
        trainer.train(resume_from_checkpoint=str(out / kind / "checkpoint-2"))
    trainer.save_model()
    timing = ("runtime", "second", "flos", "_time", "step_time")
    logs = [{n: x for n, x in log.items() if not n.endswith(timing)} for log in trainer.state.log_history]
    weights = weights_of(trainer)
    if trainer.accelerator.is_main_process:
        state = {
            "processes": trainer.accelerator.num_processes,
            "type": trainer.accelerator.distributed_type.value,
            "sharded": sum(map(is_sharded, trainer.model.parameters())),
        }
        results = {"state": state, "weights": weights, "uninterrupted": uninterrupted, "logs": logs}
        torch.save(results, out / f"{kind}.pt")


def train_each(kinds: list[str], folder: Path, batch_size: int, out: Path) -> None:
    """In this process, which may be one of several."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpus()
    for kind in kinds:
        train(kind, folder, batch_size, out)


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
