"""What the tests of `PPOPtxTrainer` share: prompts and text, settings, adapters, a trainer, and what is read off it."""

import inspect

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from prefopt import PPOPtxConfig, PPOPtxTrainer

PROMPTS = Dataset.from_dict({"prompt": ["the cat", "a dog ran to the", "question: what is this?", "red"] * 4})
TEXTS = Dataset.from_dict({"text": ["the cat sat on the mat and the dog ran to the red house", "a dog"] * 4})

# Many tokens end a completion: lengths differ.
END_IDS = [1, *range(200, 230)]


def length_reward(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def config(folder, **overrides):
    """On the CPU in fp32, two steps of four episodes each, without pretraining text."""
    settings = {
        "output_dir": str(folder / "run"),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "max_completion_length": 6,
        "max_steps": 2,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "value_learning_rate": 1e-3,
        "ptx_max_length": 16,
        "ptx_batch_ratio": 0.5,
        "ptx_coef": 0.0,
    }
    return PPOPtxConfig(**{**settings, **overrides})


def lora(model, task_type="CAUSAL_LM", seed=5, std=0.5, targets=("q_proj",), **options):
    """The model with an adapter that has moved away from 0."""
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(task_type=task_type, r=4, target_modules=[*targets], **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model


@pytest.fixture
def make(causal_lm, reward_model, tokenizer, tmp_path):
    """Arguments of the trainer are passed on, the others are settings; with `ptx_coef` there is text."""

    def make(model=causal_lm, rewards=reward_model, data=PROMPTS, **options):
        arguments = inspect.signature(PPOPtxTrainer).parameters
        passed = {name: options.pop(name) for name in [*options] if name in arguments}
        passed.setdefault("processing_class", tokenizer)
        if options.get("ptx_coef"):
            passed.setdefault("pretrain_dataset", TEXTS)
        return PPOPtxTrainer(model, rewards, config(tmp_path, **options), train_dataset=data, **passed)

    return make


def rollout_of(trainer, rows=8):
    """One rollout, as the trainer makes it at its first step."""
    trainer.model.train()
    return trainer._generate_and_score_completions(trainer.train_dataset.to_list()[:rows])


def logs_of(trainer, name):
    return [log[name] for log in trainer.state.log_history if name in log]


def first_log(trainer):
    return next(log for log in trainer.state.log_history if "objective/kl" in log)
