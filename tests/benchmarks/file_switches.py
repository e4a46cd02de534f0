"""Over how many files a training step is spread: what a reader opens to follow it, in our trainers and in TRL's.

    python tests/benchmarks/file_switches.py

One call is traced, on a Llama of two layers after a first step: every call of a function of the package (of `trl`, on
TRL's side) and every return to one. Comprehensions and lambdas are part of the function that they stand in.

- `calls`: functions entered; a generator or context manager counts each time it goes on.
- `files`: how many different files they stand in.
- `switches`: how often the line that runs moves to another file of the package, by a call or by a return; the first
  file counts.

The rows are too short for shared prefixes to pay: they are packed, found not to be worth it, and forwarded as they are.
`--functions` prints the path itself.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import ranking_step
import torch
import trl
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, Trainer
from trl import GRPOConfig, GRPOTrainer

import prefopt
from prefopt import PPOPtxConfig, PPOPtxTrainer
from prefopt.gpu.random_models import build_tokenizer
from prefopt.gpu.ranking_step import build_trainer

SIZES = ["--k", "3", "--batch", "2", "--prompt", "6", "--completion", "6",
         "--layers", "2", "--hidden", "32", "--vocab", "64", "--device", "cpu"]  # fmt: skip

# A function of the package: its file and its name.
Step = tuple[str, str]


class Trace:
    """The functions of a package that some work enters, and where its lines run: a step per call and per return."""

    def __init__(self, package: ModuleType) -> None:
        self.folder = str(Path(package.__file__).parent) + os.sep
        self.calls: list[Step] = []
        self.path: list[Step] = []

    def run(self, work: Callable[[], Any]) -> Any:
        sys.settrace(self._on_call)
        try:
            return work()
        finally:
            sys.settrace(None)

    def figures(self) -> dict[str, int]:
        stays = [file for file, _ in itertools.groupby(file for file, _ in self.path)]
        return {"calls": len(self.calls), "files": len(set(stays)), "switches": len(stays)}

    def _step(self, frame: FrameType) -> Step | None:
        code = frame.f_code
        if code.co_filename.startswith(self.folder) and not code.co_name.startswith("<"):
            return code.co_filename.removeprefix(self.folder), code.co_name
        return None

    def _on_call(self, frame: FrameType, event: str, arg: Any) -> Callable | None:
        step = self._step(frame)
        if step is None:
            return None
        self.calls.append(step)
        self.path.append(step)
        frame.f_trace_lines = False
        return self._on_return

    def _on_return(self, frame: FrameType, event: str, arg: Any) -> Callable:
        caller = frame.f_back
        while event == "return" and caller is not None:
            if step := self._step(caller):
                self.path.append(step)
                break
            caller = caller.f_back
        return self._on_return


def trace_after_a_step(trainer: Trainer, method: str, package: ModuleType) -> Trace:
    """Train for a step, so that all that is done once is done; then what `method` runs when it is called once more."""
    calls: list[tuple[tuple, dict[str, Any]]] = []
    original = getattr(trainer, method)

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    setattr(trainer, method, watched)
    trainer.train()
    args, kwargs = calls[-1]
    trace = Trace(package)
    trace.run(lambda: original(*args, **kwargs))
    return trace


def build_rl_trainer(is_ours: bool, folder: str) -> Trainer:
    """PPO-ptx with a reward model, a value function and pretraining text; or TRL's GRPO, with the reward model alone."""
    tokenizer = build_tokenizer(64)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, bos_token_id=None, eos_token_id=2, num_labels=1,
    )  # fmt: skip
    policy, reward_model = LlamaForCausalLM(config), LlamaForSequenceClassification(config)
    settings = {
        "output_dir": folder,
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "max_completion_length": 6,
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    prompts = Dataset.from_dict({"prompt": ["3 4 5", "6 7", "8 9 10 11", "12"] * 4})
    if is_ours:
        args = PPOPtxConfig(**settings, ptx_coef=1.0, ptx_max_length=8)
        texts = Dataset.from_dict({"text": ["3 4 5 6 7 8 9 10 11"] * 32})
        return PPOPtxTrainer(policy, reward_model, args, prompts, processing_class=tokenizer, pretrain_dataset=texts)
    return GRPOTrainer(
        policy,
        reward_model,
        GRPOConfig(**settings, num_generations=2),
        prompts,
        processing_class=tokenizer,
        reward_processing_classes=tokenizer,
    )


def build_ranking_trainer(side: str, method: str, folder: str) -> Trainer:
    return build_trainer(side, ranking_step.parse(["--method", method, *SIZES]), folder)


# What is traced -> how its trainer is built, the method, the package.
TRACED: dict[str, tuple[Callable[[str], Trainer], str, ModuleType]] = {
    "RankedRewardTrainer.compute_loss": (
        lambda folder: build_ranking_trainer("shared", "reward", folder),
        "compute_loss",
        prefopt,
    ),
    "RewardTrainer.compute_loss": (
        lambda folder: build_ranking_trainer("trl", "reward", folder),
        "compute_loss",
        trl,
    ),
    "RankedDPOTrainer.compute_loss": (
        lambda folder: build_ranking_trainer("shared", "dpo", folder),
        "compute_loss",
        prefopt,
    ),
    "DPOTrainer.compute_loss": (
        lambda folder: build_ranking_trainer("trl", "dpo", folder),
        "compute_loss",
        trl,
    ),
    "PPOPtxTrainer.training_step": (lambda folder: build_rl_trainer(True, folder), "training_step", prefopt),
    "GRPOTrainer.training_step": (lambda folder: build_rl_trainer(False, folder), "training_step", trl),
}


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, int]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--functions", action="store_true", help="print the path of each, a line per file")
    options = parser.parse_args(argv)
    ranking_step.quiet()
    figures = {}
    for name, (build, method, package) in TRACED.items():
        with tempfile.TemporaryDirectory() as folder:
            trace = trace_after_a_step(build(folder), method, package)
        figures[name] = trace.figures()
        if options.functions:
            print(f"\n{name}", *lines(trace.path), sep="\n  ")
    print(f"\n{'':36}{'calls':>8}{'files':>8}{'switches':>10}")
    for name, result in figures.items():
        print(f"{name:36}{result['calls']:8}{result['files']:8}{result['switches']:10}")
    print(json.dumps(figures))
    return figures


def lines(path: Sequence[Step]) -> Iterator[str]:
    """`file: function function ...`, a line for each stay in a file."""
    for file, steps in itertools.groupby(path, key=lambda step: step[0]):
        yield f"{file}: {' '.join(name for name, _ in itertools.groupby(name for _, name in steps))}"


if __name__ == "__main__":
    main()
