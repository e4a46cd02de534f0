"""Rows, settings and adapters that the tests of the trainers on rankings share."""

import os
from collections.abc import Callable

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState, GradientState
from peft import LoraConfig, get_peft_model

from prefopt import RankedDPOConfig, RankedDPOTrainer, RankedRewardConfig, RankedRewardTrainer

CLASSES = {
    "reward": (RankedRewardTrainer, RankedRewardConfig),
    "dpo": (RankedDPOTrainer, RankedDPOConfig),
}
PAIRS = [
    {"prompt": "question: what is this?", "chosen": " a dog", "rejected": " the red house and the mat"},
    {"prompt": "the cat", "chosen": " sat on the mat", "rejected": " ran"},
    {"prompt": "a", "chosen": " dog ran to the house", "rejected": " dog"},
]
RAGGED = [
    {"prompt": "the cat", "completions": [" sat", " ran to the mat", " and the dog"], "ranks": [2, 1, 3]},
    {"prompt": "what is this?", "completions": [" a dog", " a cat"], "ranks": [2, 1]},
    {
        "prompt": "the dog",
        "completions": [" ran", " sat on the red mat", " is", " and", " to the house"],
        "ranks": [1, 2, 2, 3, 1],
    },
    {"prompt": "is this a dog?", "completions": [" the mat", " red"], "ranks": [1, 2]},
]


def settings(folder, **overrides):
    """For any trainer's configuration: on the CPU in fp32, without progress bars, reports and checkpoints."""
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return {**defaults, **overrides}


def first_loss(trainer):
    inputs = next(iter(trainer.get_train_dataloader()))
    return trainer.compute_loss(trainer.model, inputs)


def shape_of_one_forward(trainer, share):
    """The shape of the ids when every completion of a batch of all rows is forwarded once, prefixes once where shared."""
    rows = [[[*row["prompt_ids"], *ids] for ids in row["completion_ids"]] for row in trainer.train_dataset]
    if not share:
        return sum(map(len, rows)), max(len(ids) for row in rows for ids in row)
    count = 0
    for row in rows:
        shared = sum(len({tuple(ids[:n]) for ids in row}) == 1 for n in range(1, min(map(len, row))))
        count += shared + sum(len(ids) - shared for ids in row)
    return 1, count


def lora(model, task_type, std=0.3, targets=("q_proj", "v_proj"), **options):
    """The model with an adapter that has moved away from 0, and with a head to train where it has one."""
    torch.manual_seed(3)
    modules = ["score"] if task_type == "SEQ_CLS" else None
    config = LoraConfig(task_type=task_type, r=4, target_modules=[*targets], modules_to_save=modules, **options)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=std)
    return model


def in_two_processes(function: Callable, *args, environment: dict[str, str] | None = None) -> None:
    """The function in two processes of one training, on CPUs.

    They are forked from this one, which has imported everything: a start of Python would cost ten times the training.
    """

    def launched() -> None:
        rank = str(torch.distributed.get_rank())
        os.environ.update(RANK=rank, LOCAL_RANK=rank, **(environment or {}))
        # The threads of OpenMP do not live on in a forked process, which would wait for them.
        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        function(*args)

    debug_launcher(launched)


@pytest.fixture
def models(reward_model, causal_lm):
    return {"reward": reward_model, "dpo": causal_lm}


@pytest.fixture
def base_path(tmp_path, causal_lm):
    causal_lm.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")
