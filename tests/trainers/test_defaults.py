"""Defaults that need a word: learning rates of full fine-tuning under an adapter, one epoch, several devices."""

import copy
import logging

import pytest
import torch
from datasets import Dataset

from prefopt import PPOPtxConfig, PPOPtxTrainer, RankedRewardConfig
from prefopt.recipes.sft import SFTStepConfig, SFTStepTrainer
from tests.trainers.conftest import CLASSES, PAIRS, lora, settings

pytestmark = pytest.mark.slow

PROMPTS = Dataset.from_dict({"prompt": ["the cat", "a dog"] * 4})


def length_reward(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def trainer_of(kind, model, tokenizer, tmp_path, **options):
    options = settings(tmp_path / kind, max_steps=1, **options)
    if kind == "ppo-ptx":
        args = PPOPtxConfig(**options, per_device_train_batch_size=4, max_completion_length=3, ptx_coef=0.0)
        return PPOPtxTrainer(model, length_reward, args, PROMPTS, processing_class=tokenizer)
    if kind == "sft":
        rows = Dataset.from_dict({"input_ids": [[5, 6, 1]] * 4, "labels": [[-100, 6, 1]] * 4})
        return SFTStepTrainer(model, SFTStepConfig(**options), train_dataset=rows, processing_class=tokenizer)
    trainer, config = CLASSES[kind]
    return trainer(model, args=config(**options), train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer)


@pytest.mark.parametrize(
    ("kind", "warning"),
    [
        ("sft", "default learning_rate=2e-05, which is meant"),
        ("reward", "default learning_rate=0.0001, which is meant"),
        ("dpo", "default learning_rate=1e-06, which is meant"),
        ("ppo-ptx", "default learning_rate=5e-06 and value_learning_rate=9e-06, which are meant"),
    ],
)
def test_an_adapter_at_a_default_learning_rate_is_warned_of(
    kind, warning, causal_lm, reward_model, tokenizer, tmp_path, caplog
):
    def lines(adapter, **options):
        caplog.clear()
        model = copy.deepcopy(reward_model if kind == "reward" else causal_lm)
        model = lora(model, "SEQ_CLS" if kind == "reward" else "CAUSAL_LM") if adapter else model
        trainer_of(kind, model, tokenizer, tmp_path, **options).train()
        return [record.getMessage() for record in caplog.records if "An adapter is trained" in record.getMessage()]

    with caplog.at_level(logging.WARNING):
        assert lines(adapter=False) == []
        (line,) = lines(adapter=True)
        assert warning in line
        rates = {"learning_rate": 1e-3}
        if kind == "ppo-ptx":
            rates["value_learning_rate"] = 1e-3
        assert lines(adapter=True, **rates) == []


def test_a_reward_model_is_trained_for_one_epoch(reward_model, tokenizer, tmp_path):
    assert RankedRewardConfig(str(tmp_path), use_cpu=True).num_train_epochs == 1
    trainer = trainer_of("reward", reward_model, tokenizer, tmp_path)
    trainer.args.max_steps = -1
    trainer.train()
    assert trainer.state.epoch == 1


@pytest.mark.parametrize("kind", ["reward", "ppo-ptx"])
def test_a_model_on_several_devices_is_refused(kind, causal_lm, reward_model, tokenizer, tmp_path):
    model = reward_model if kind == "reward" else causal_lm
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": torch.device("cuda:1")}
    with pytest.raises(ValueError, match="spread over the devices 0, cuda:1: start one process for each GPU"):
        trainer_of(kind, model, tokenizer, tmp_path)
    model.hf_device_map = {"": "cpu"}
    trainer_of(kind, model, tokenizer, tmp_path)
