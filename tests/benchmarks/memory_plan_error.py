"""The error of `prefopt plan` on CPUs: its peak against the one that the allocator sees, over random shapes.

    python tests/benchmarks/memory_plan_error.py --count 25
    python tests/benchmarks/memory_plan_error.py --steps dpo --count 20 --bf16
    python tests/benchmarks/memory_plan_error.py --model SmolLM2-135M-Instruct --lora_r 16

Each shape is a tiny model (architecture, width, depth, heads, vocabulary), a batch (K, lengths) and settings (adapter or
all weights, gradient checkpointing, prefix sharing, a token budget, accumulation; of DPO and PPO-ptx the pretraining
text; of PPO-ptx the rollout and the KL estimator). The trainer takes two optimizer steps as a user's would; what is
compared is the highest sum of live bytes in the second, when the optimizer has its state. The bytes are the CPU
allocator's own events, all of them since before the model was built, as the profiler records them: no tensor and no
operator's scratch space is missed, and what Python holds outside tensors is not counted. With `--model` the shape is that of a pretrained model's
config.json, at the lengths of recipes/smollm2; its weights are random, which take as much room.
"""

import argparse
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import datasets
import torch
import transformers
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from torch.profiler import record_function
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    PrinterCallback,
    Qwen3Config,
    Trainer,
    TrainerCallback,
)
from trl import ModelConfig, get_peft_config

from prefopt import PPOPtxTrainer, RankedDPOTrainer, RankedRewardTrainer
from prefopt.gpu.meter import allocations
from prefopt.gpu.random_models import build_tokenizer
from prefopt.memory import STEPS, Settings, peak
from prefopt.models.checkpoints import save_reward_model
from prefopt.recipes.plan import ARGUMENTS, PlanArguments, on_its_machine, settings_of
from prefopt.recipes.sft import SFTStepTrainer

CONFIGS = {"gemma3": Gemma3TextConfig, "llama": LlamaConfig, "qwen3": Qwen3Config}
MARK = "optimizer step "
Shape = SimpleNamespace


def draw(step: str, rng: random.Random, bf16: bool = False) -> Shape:
    """A model, a batch and settings at random; those after `max_tokens` are of PPO-ptx, those of text also of DPO."""
    heads, head_dim = rng.choice([2, 4, 6]), rng.choice([16, 32])
    hidden = heads * rng.choice([head_dim, 16, 32, 48])
    return Shape(
        step=step,
        model=rng.choice(sorted(CONFIGS)),
        layers=rng.randint(2, 5),
        hidden=hidden,
        heads=heads,
        kv_heads=rng.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        head_dim=head_dim,
        intermediate=hidden * rng.choice([2, 3, 4]),
        vocab=rng.choice([512, 1024, 4096]),
        is_tied=rng.random() < 0.5,
        k=rng.randint(2, 9),
        prompt=rng.randint(8, 128),
        completion=rng.randint(4, 40),
        batch=rng.randint(1, 3),
        accumulation=rng.choice([1, 1, 2]),
        lora_r=rng.choice([None, None, 4, 16, 64]),
        targets=rng.choice(["all-linear", ["q_proj", "v_proj"]]),
        dropout=rng.choice([0.0, 0.05]),
        checkpointing=rng.random() < 0.5,
        shares_prefixes=rng.random() < 0.7,
        max_tokens=rng.choice([None, None, 256]),
        minibatches=rng.choice([1, 2]),
        ptx_length=rng.choice([32, 64, 128, 256]),
        ptx_batch=rng.randint(1, 3),
        ptx_coef=rng.choice([0.0, 1.0]),
        kl_estimator=rng.choice(["k1", "full"]),
        ema_decay=rng.choice([None, 0.992]),
        bf16=bf16,
    )


def of_model(step: str, options: argparse.Namespace) -> Shape:
    """A pretrained model's shape with short rows."""
    config = AutoConfig.from_pretrained(options.model).get_text_config()
    shape = draw(step, random.Random(0), options.bf16)
    vars(shape).update(
        model=options.model, layers=config.num_hidden_layers, hidden=config.hidden_size, vocab=config.vocab_size,
        is_tied=config.tie_word_embeddings, k=options.k, prompt=options.prompt, completion=options.completion,
        batch=options.batch, accumulation=1, lora_r=options.lora_r, targets="all-linear", dropout=0.0,
        checkpointing=False, shares_prefixes=True, max_tokens=None, minibatches=2, ptx_length=128, ptx_batch=2,
        ptx_coef=float(step == "ppo-ptx"), kl_estimator="k1", ema_decay=None,
    )  # fmt: skip
    return shape


# ---- the plan ----


def config_of(shape: Shape) -> PretrainedConfig:
    if shape.model not in CONFIGS:
        config = AutoConfig.from_pretrained(shape.model).get_text_config()
        config.dtype, config.num_labels = torch.float32, 1
        config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, None, 2
        return config
    return CONFIGS[shape.model](
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=shape.is_tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        num_labels=1,
    )


def arguments(shape: Shape, folder: str) -> tuple[Any, ModelConfig]:
    """The step's configuration, as a YAML file would give it."""
    more: dict[str, Any] = {"max_length": None}
    if shape.step in ("reward", "dpo"):
        more |= {"prefix_sharing": shape.shares_prefixes, "max_tokens_per_forward": shape.max_tokens}
    if shape.step == "ppo-ptx":
        more = {
            "generation_batch_size": shape.batch * shape.accumulation * shape.minibatches,
            "max_completion_length": shape.completion,
            "kl_estimator": shape.kl_estimator,
            "ema_decay": shape.ema_decay,
        }
    if shape.step in ("dpo", "ppo-ptx"):
        more |= {
            "ptx_coef": shape.ptx_coef,
            "ptx_batch_ratio": 1.0,
            "ptx_max_length": shape.ptx_length,
            "ptx_per_device_batch_size": shape.ptx_batch,
        }
    args = on_its_machine(ARGUMENTS[shape.step][1])(
        output_dir=folder,
        use_cpu=True,
        bf16=shape.bf16,
        gradient_checkpointing=shape.checkpointing,
        per_device_train_batch_size=shape.batch,
        gradient_accumulation_steps=shape.accumulation,
        max_steps=2 if shape.step != "ppo-ptx" else shape.minibatches + 1,
        learning_rate=1e-5,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **more,
    )
    model_args = ModelConfig(
        model_name_or_path=folder,
        use_peft=shape.lora_r is not None,
        lora_r=shape.lora_r or 1,
        lora_target_modules=shape.targets,
        lora_dropout=shape.dropout,
    )
    return args, model_args


def plan(shape: Shape) -> Settings:
    """What `prefopt plan` makes of the shape."""
    with tempfile.TemporaryDirectory() as folder:
        args, model_args = arguments(shape, folder)
        rows = PlanArguments(k=shape.k, prompt_length=shape.prompt, completion_length=shape.completion)
        settings = settings_of(shape.step, config_of(shape), rows, args, model_args)
    return replace(settings, continues_adapter=shape.step == "ppo-ptx" and shape.lora_r is not None)


# ---- the run ----


def rows_of(shape: Shape) -> Dataset:
    """Twice the rows of a step; every other prompt and completion is one token shorter."""
    rng = random.Random(0)

    def words(count: int, number: int) -> str:
        shorter = number % 2 and count > 1
        return " ".join(str(rng.randint(3, shape.vocab - 1)) for _ in range(count - bool(shorter)))

    rows = []
    for number in range(2 * shape.batch * shape.accumulation * shape.minibatches):
        row: dict[str, Any] = {"prompt": words(shape.prompt, number)}
        if shape.step == "sft":
            row["completion"] = " " + words(shape.completion - 1, number)  # EOS comes on top
        elif shape.step != "ppo-ptx":
            row["completions"] = [" " + words(shape.completion - 1, i) for i in range(shape.k)]
            row["ranks"] = rng.sample(range(1, shape.k + 1), shape.k)
        rows.append(row)
    return Dataset.from_list(rows)


class Marks(TrainerCallback):
    """Name each optimizer step in the profile."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with record_function(f"{MARK}{state.global_step}"):
            pass


def trainer_of(shape: Shape, folder: str) -> Trainer:
    """The trainer of the step, as its recipe builds it."""
    args, model_args = arguments(shape, folder)
    tokenizer, rows, config = build_tokenizer(shape.vocab), rows_of(shape), config_of(shape)
    model_args.lora_task_type = "SEQ_CLS" if shape.step == "reward" else "CAUSAL_LM"
    given = {"args": args, "train_dataset": rows, "processing_class": tokenizer}
    torch.manual_seed(0)
    if shape.step == "ppo-ptx":
        return _ppo_trainer(shape, config, model_args, given, Path(folder))
    auto = AutoModelForSequenceClassification if shape.step == "reward" else AutoModelForCausalLM
    given |= {"model": auto.from_config(config), "peft_config": get_peft_config(model_args)}
    if shape.step == "sft":
        from prefopt.rankings.tokens import build_ids

        def to_ids(row: dict[str, str]) -> dict[str, list[int]]:
            prompt, completion = build_ids(tokenizer, row["prompt"], row["completion"])
            return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}

        given["train_dataset"] = rows.map(to_ids, remove_columns=rows.column_names)
        return SFTStepTrainer(**given)
    if shape.step == "reward":
        return RankedRewardTrainer(**given)
    return RankedDPOTrainer(**given, pretrain_dataset=text_of(shape))


def text_of(shape: Shape) -> Dataset | None:
    """Pretraining text, where there is some."""
    if not shape.ptx_coef:
        return None
    rng = random.Random(1)
    text = " ".join(str(rng.randint(3, shape.vocab - 1)) for _ in range(32 * shape.ptx_length))
    return Dataset.from_list([{"text": text}])


def _ppo_trainer(
    shape: Shape, config: PretrainedConfig, model_args: ModelConfig, given: dict[str, Any], folder: Path
) -> Trainer:
    """Policy and reward model from folders, as the steps before leave them: full, or adapters of one base."""
    tokenizer = given["processing_class"]
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base = str(folder / "base")
    policy: Any = base
    reward: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    if shape.lora_r is not None:
        lora = get_peft_config(model_args)
        of_reward = LoraConfig(
            task_type="SEQ_CLS", r=lora.r, target_modules=lora.target_modules, modules_to_save=["score"]
        )
        save_reward_model(get_peft_model(reward, of_reward), folder / "reward")
        tokenizer.save_pretrained(folder / "reward")
        reward = str(folder / "reward")
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(folder / "sft")
        policy = AutoPeftModelForCausalLM.from_pretrained(folder / "sft", is_trainable=True)
    given["args"].model_init_kwargs = {"dtype": "float32"} if isinstance(policy, str) else None
    return PPOPtxTrainer(policy, reward, pretrain_dataset=text_of(shape), **given)


def measured_peak(shape: Shape) -> int:
    """Most bytes alive at once in the trainer's last step, every allocation since before the model counted."""
    gc.collect()
    with tempfile.TemporaryDirectory() as folder, allocations() as events:
        trainer = trainer_of(shape, folder)
        if shape.step == "ppo-ptx":  # no row ends early
            trainer.generation_config.min_new_tokens = shape.completion
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Marks())
        trainer.train()
    first = min(moment for moment, _, name in events if name.startswith(MARK) and not name.endswith(" 0"))
    alive = highest = 0
    for moment, size, _ in events:
        alive += size
        if moment >= first:
            highest = max(highest, alive)
    return highest


# ---- the errors ----


def compare(shape: Shape) -> dict[str, Any]:
    """Both peaks of a shape, in bytes, and their ratio; above 1 the plan is too high."""
    measured, planned = measured_peak(shape), peak(plan(shape))
    return {
        "shape": vars(shape),
        "step": shape.step,
        "measured": measured,
        "planned": planned.bytes,
        "moment": planned.name,
        "ratio": planned.bytes / measured,
    }


def summary(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per step: number of shapes, and the ratio's lowest, median and highest."""
    ratios = {step: [r["ratio"] for r in results if r["shape"]["step"] == step] for step in STEPS}
    return {
        step: {"n": len(of), "lowest": min(of), "median": statistics.median(of), "highest": max(of)}
        for step, of in ratios.items()
        if of
    }


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="shapes of each step")
    parser.add_argument("--seed", type=int, default=0, help="of the first shape; the next has the next")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--model", help="the shape of a pretrained model, folder or Hub id, instead of random ones")
    parser.add_argument("--k", type=int, default=9, help="of --model, as all below")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--completion", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lora_r", type=int, help="default: all weights")
    options = parser.parse_args(argv)
    quiet()
    results = []
    if options.model is not None:
        for step in options.steps:
            results.append(compare(of_model(step, options)))
            gib = {name: results[-1][name] / 2**30 for name in ("planned", "measured")}
            print(f"| {step} | {gib['planned']:.2f} | {gib['measured']:.2f} | {results[-1]['ratio']:.3f} | "
                  f"{results[-1]['moment']} |", flush=True)  # fmt: skip
        return summary(results)
    for seed in range(options.seed, options.seed + options.count):
        for step in options.steps:
            results.append(compare(draw(step, random.Random(f"{step} {seed}"), options.bf16)))
            print(f"{step} {seed}: {results[-1]['ratio']:.3f} at {results[-1]['moment']}", flush=True)
    print(json.dumps(summary(results), indent=1))
    return summary(results)


def quiet() -> None:
    """No progress bars; warnings only."""
    warnings.filterwarnings("ignore")
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


if __name__ == "__main__":
    main(sys.argv[1:])
