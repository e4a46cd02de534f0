"""One side of ppo_step.py, which runs it: PYTHON trl112_ppo_worker.py ours|trl112 FOLDER

Both sides are here, so that their settings can be read next to each other. `trl112` runs in an environment with TRL
1.12, which knows nothing of prefopt. The worker waits for a line on stdin before each update (one rollout and all
optimizer steps on it) and answers with a JSON line, so that the two processes can take turns.
"""

import gc
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import datasets
import torch
import torch._dynamo  # optimizers import it: not a part of what is measured
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PrinterCallback,
    TrainerCallback,
)

MODULES = {"ours": "prefopt.trainers.ppo_ptx.trainer", "trl112": "trl.experimental.ppo.ppo_trainer"}
ARCHITECTURES = (LlamaForCausalLM, LlamaForSequenceClassification)  # imported before memory is measured


class Meter:
    """The highest memory above what was held when the meter was made, before any model was loaded."""

    def __init__(self, device: str) -> None:
        self.is_cuda = device == "cuda"
        if self.is_cuda:
            torch.cuda.init()
        gc.collect()
        self.start = 0 if self.is_cuda else _status("VmRSS")
        self.reset()

    def reset(self) -> None:
        """Forget earlier peaks."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM falls to VmRSS

    def held(self) -> int:
        return torch.cuda.memory_allocated() if self.is_cuda else _status("VmRSS") - self.start

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.is_cuda else _status("VmHWM") - self.start


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


class Turns(TrainerCallback):
    """Wait for a line before each update, and report the update after it."""

    def __init__(self, channel: TextIO) -> None:
        self.channel, self.optimizer_steps, self.gc_seconds = channel, 0, 0.0
        gc.callbacks.append(self._time_gc)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]  # may be wrapped by accelerate
        getattr(optimizer, "optimizer", optimizer).register_step_post_hook(self._count)
        self._wait()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if "objective/scores" not in (logs or {}):  # the summary of a finished training
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.start
        answer(
            self.channel,
            seconds=seconds,
            cpu_seconds=time.process_time() - self.cpu_start,
            gc_seconds=self.gc_seconds,
            score=logs["objective/scores"],
            kl=logs["objective/kl"],
            optimizer_steps=self.optimizer_steps,
        )
        self._wait()

    def _count(self, *args: Any) -> None:
        self.optimizer_steps += 1

    def _time_gc(self, phase: str, info: dict[str, int]) -> None:
        self.gc_seconds += time.perf_counter() * (1 if phase == "stop" else -1)

    def _wait(self) -> None:
        if not sys.stdin.readline():
            sys.exit("the benchmark is gone")
        self.optimizer_steps, self.gc_seconds = 0, 0.0
        self.start, self.cpu_start = time.perf_counter(), time.process_time()


def answer(channel: TextIO, **values: Any) -> None:
    channel.write(json.dumps(values) + "\n")
    channel.flush()


# ---- the two trainers, with the same settings ----


def common_settings(options: dict[str, Any], folder: Path, side: str) -> dict[str, Any]:
    """Arguments that mean the same in both configurations; the optimizer is the default of both, AdamW (fused).

    A minibatch is one micro-batch: with gradient accumulation TRL 1.12 takes one optimizer step per inner epoch,
    whatever `num_mini_batches` says.
    """
    return {
        "output_dir": str(folder / f"run_{side}"),
        "gradient_accumulation_steps": 1,
        "activation_checkpointing": False,  # TRL 1.12 ignores it
        "bf16": False,  # TRL 1.12 ignores it
        "temperature": 1.0,
        "learning_rate": options["learning_rate"],
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "kl_coef": options["kl_coef"],
        "kl_estimator": "k1",
        "vf_coef": 0.1,
        "seed": options["seed"],
        "use_cpu": options["device"] == "cpu",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def lora_config(options: dict[str, Any]) -> LoraConfig | None:
    if not options["lora"]:
        return None
    layers = targets(options["layers"], options["upper_half"])
    return LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM", **layers)


def targets(layers: int, upper_half: bool) -> dict[str, Any]:
    """Where LoRA is: on all linear layers, or on those of the upper half."""
    if not upper_half:
        return {"target_modules": "all-linear"}
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return {"target_modules": names, "layers_to_transform": list(range(layers // 2, layers))}


def build_ours(options: dict[str, Any], folder: Path, turns: Turns) -> Any:
    """Reward model and value function are made from the saved reward model's path."""
    from prefopt import PPOPtxConfig, PPOPtxTrainer

    updates = options["warmup"] + options["updates"]
    steps = options["epochs"] * options["minibatches"]
    args = PPOPtxConfig(
        **common_settings(options, folder, "ours"),
        per_device_train_batch_size=options["batch"] // options["minibatches"],
        generation_batch_size=options["batch"],
        num_iterations=options["epochs"],
        num_generations=options["completions"],
        max_completion_length=options["response"],
        max_steps=updates * steps,
        logging_steps=steps,  # once per rollout, as TRL 1.12 does
        value_learning_rate=options["learning_rate"],  # TRL 1.12 has one learning rate
        warmup_steps=0,
        max_grad_norm=0.0,  # TRL 1.12 does not clip
        epsilon=0.2,
        value_clip_range=0.2,
        discount=1.0,
        gae_lambda=0.95,
        ptx_coef=0.0,  # TRL 1.12 has no pretraining gradients
    )
    trainer = PPOPtxTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32),
        str(folder / "reward"),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": text} for text in read(folder / "prompts.json")]),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
        peft_config=lora_config(options),
        callbacks=[turns],
    )
    return trainer, lambda: trainer.accelerator.unwrap_model(trainer.model)


def build_trl112(options: dict[str, Any], folder: Path, turns: Turns) -> Any:
    """Value function: the reward model's weights again; with LoRA its factors and head are trained, as ours are."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    updates = options["warmup"] + options["updates"]
    args = PPOConfig(
        **common_settings(options, folder, "trl112"),
        per_device_train_batch_size=options["batch"],
        num_mini_batches=options["minibatches"],
        num_ppo_epochs=options["epochs"],
        local_rollout_forward_batch_size=min(64, options["batch"]),  # 64 is its default
        response_length=options["response"],
        stop_token="eos",
        total_episodes=updates * options["batch"],  # TRL 1.12 ignores max_steps
        cliprange=0.2,
        cliprange_value=0.2,
        gamma=1.0,
        lam=0.95,
        num_sample_generations=0,
        eval_strategy="no",
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    if options["lora"]:
        reward_model = load_reward_adapter(folder, is_trainable=False).merge_and_unload()
        value_model = load_reward_adapter(folder, is_trainable=True).base_model.model
    else:
        reward_model, value_model = (
            AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32)
            for _ in range(2)
        )
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32),
        ref_model=None,
        reward_model=reward_model.eval().requires_grad_(False),
        value_model=value_model,
        train_dataset=Dataset.from_list(
            [
                {"input_ids": tokenizer(text)["input_ids"]}
                for text in read(folder / "prompts.json")
                for _ in range(options["completions"])
            ]
        ),
        eval_dataset=Dataset.from_dict({"input_ids": []}),  # None raises in a DataLoader
        peft_config=lora_config(options),
        callbacks=[turns],
    )
    return trainer, lambda: trainer.policy_model


def load_reward_adapter(folder: Path, is_trainable: bool) -> PeftModel:
    base = AutoModelForSequenceClassification.from_pretrained(folder / "policy", num_labels=1, dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder / "reward", is_trainable=is_trainable)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def main(side: str, folder: Path) -> None:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the trainers print goes to the log
    options = read(folder / "options.json")
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    importlib.import_module(MODULES[side])
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.sum().backward()
    torch.optim.AdamW([parameter]).step()  # lazy imports

    meter = Meter(options["device"])
    torch.manual_seed(options["seed"])
    trainer, policy = (build_ours if side == "ours" else build_trl112)(options, folder, Turns(channel))
    trainer.remove_callback(PrinterCallback)
    meter.reset()
    models = meter.held()
    answer(channel, trl=trl.__version__, transformers=transformers.__version__, torch=torch.__version__)
    trainer.train()
    peak = meter.peak()
    policy().save_pretrained(folder / f"trained_{side}")
    answer(channel, peak=peak, models=models)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
