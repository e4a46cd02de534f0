"""Tiny runs of every kind, which end in a saved folder, and the code of a model card."""

import re
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

from prefopt.trainers.dpo.config import RankedDPOConfig
from prefopt.trainers.dpo.trainer import RankedDPOTrainer
from prefopt.trainers.ppo_ptx.config import PPOPtxConfig
from prefopt.trainers.ppo_ptx.trainer import PPOPtxTrainer
from prefopt.trainers.reward.config import RankedRewardConfig
from prefopt.trainers.reward.trainer import RankedRewardTrainer

QUESTION, ANSWER = "What is 2 + 2?", " 4"  # what the cards ask
ROWS = [
    {"prompt": prompt, "completions": [f" {a} dog", f" {a} cat", f" {a} mat"], "ranks": [1, 2, 3]}
    for prompt in ("the", "question:")
    for a in ("red", "a")
]
DEMONSTRATIONS = [{"prompt": row["prompt"], "completion": row["completions"][0]} for row in ROWS]
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
SETTINGS: dict[str, Any] = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "learning_rate": 0.05,
    "max_steps": 2,
    "logging_steps": 1,
}


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def chat(row: dict[str, Any]) -> dict[str, Any]:
    """A ranked row as messages."""
    answers = [[{"role": "assistant", "content": text}] for text in row["completions"]]
    return {**row, "prompt": [{"role": "user", "content": row["prompt"]}], "completions": answers}


def reward_trainer(
    base: str,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    lora: bool = True,
    four_bit: bool = False,
    rows: list[dict[str, Any]] = ROWS,
    stream: bool = False,
    **overrides: Any,
) -> RankedRewardTrainer:
    settings = {**SETTINGS, "output_dir": str(out), "per_device_train_batch_size": 2, **overrides}
    return RankedRewardTrainer(
        model=base,
        args=RankedRewardConfig(**settings),
        train_dataset=Dataset.from_list(rows).to_iterable_dataset() if stream else Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:2]) if "eval_strategy" in overrides else None,
        processing_class=tokenizer,
        quantization_config=nf4() if four_bit else None,
        peft_config=LoraConfig(**LORA) if lora else None,
    )


def dpo_trainer(
    base: str, tokenizer: PreTrainedTokenizerBase, out: Path, four_bit: bool = False, **overrides: Any
) -> RankedDPOTrainer:
    settings = {**SETTINGS, "output_dir": str(out), "per_device_train_batch_size": 2, **overrides}
    return RankedDPOTrainer(
        model=base,
        args=RankedDPOConfig(**settings),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        quantization_config=nf4() if four_bit else None,
        peft_config=LoraConfig(**LORA),
    )


def ppo_trainer(
    policy: Any, tokenizer: PreTrainedTokenizerBase, out: Path, reward: Any, **overrides: Any
) -> PPOPtxTrainer:
    """PPO-ptx on all of one base: the policy, its reference, the reward model, the value function."""
    settings = {
        **SETTINGS,
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "max_completion_length": 4,
        "ptx_max_length": 8,
        "ptx_batch_ratio": 1,
        **overrides,
    }
    if isinstance(policy, str):
        policy = AutoPeftModelForCausalLM.from_pretrained(policy, is_trainable=True, dtype=torch.float32)
    return PPOPtxTrainer(
        model=policy,
        reward_funcs=reward,
        args=PPOPtxConfig(**settings),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS]),
        processing_class=tokenizer,
        pretrain_dataset=Dataset.from_list([{"text": "the cat sat on the mat and the dog ran"}] * 4),
    )


def run_card(text: str) -> dict[str, Any]:
    """Run all Python of a model card, one block behind the other; returns its variables."""
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    variables: dict[str, Any] = {}
    exec(compile("\n".join(blocks), "card", "exec"), variables)
    return variables
