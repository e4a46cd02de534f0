r"""One PPO update (a rollout and all optimizer steps on it): TRL 1.12's PPOTrainer, its last, and PPOPtxTrainer.

    python tests/benchmarks/ppo_step.py
    python tests/benchmarks/ppo_step.py --lora
    python tests/benchmarks/ppo_step.py --lora --completions 4 --upper-half

With the default sizes a policy learns a random reward model's taste within the run, so that the rewards say something.
For the time alone, a larger model whose rewards do not move in so few updates:

    python tests/benchmarks/ppo_step.py --vocab 4096 --prompt 64 --response 32 --layers 4 --hidden 128 --batch 16 \
        --updates 10 --learning-rate 2e-4 --eval-prompts 256

TRL 1.12 lives in a virtual environment that the first run makes (`--venv`; it needs a package index once) with the
versions of `constraints.txt`, TRL aside. Each trainer runs in a process of its own on the same saved model, reward
model, prompts and settings. The two take turns: one waits while the other makes an update.

How they are made equal:

- Trained: policy and value function, in full, or LoRA rank 16 on all linear layers of both (or of their upper half) and
  the value head. The
  reference is a frozen copy, with LoRA the base without an adapter. The value function starts as the reward model. With
  LoRA the reward model is an adapter on the policy's base: ours keeps all roles on one base, TRL 1.12 gets it merged,
  and the value function as an adapter on a base of its own.
- A minibatch is one micro-batch (no gradient accumulation): TRL 1.12 otherwise takes one step per inner epoch whatever
  `num_mini_batches` says. Optimizer steps are counted in both; a difference is an error.
- Padding and EOS are practically never sampled, so every response has the full length on both sides, nothing is padded.
- fp32, no gradient checkpointing, no gradient clipping, no pretraining gradients, constant and equal learning rates
  of policy and value function: what TRL 1.12 ignores or lacks is off in both.

What is reported (above 1, ours wins):

- `speedup_vs_trl112`: ratio of the medians of samples per second, over the updates after the warm-up.
  `speedup_without_gc_vs_trl112`: the same without Python's garbage collections, which TRL 1.12 asks for several times an
  update: they cost a fixed time, so they weigh more the smaller the model.
  `cpu_speedup_vs_trl112`: ratio of processor time instead of time on the clock, for a machine that others use too.
- `peak_vs_trl112`: theirs / ours, peak memory above what the process held before it loaded a model: weights of all
  roles, gradients, optimizer, activations. CUDA: `torch.cuda.max_memory_allocated`. CPU: resident memory (VmHWM, reset
  when the trainer is built, less VmRSS before). `peak_above_models_vs_trl112`: the same less what was held when the
  trainer was built.
- `reward_ours`, `reward_trl112`: mean score of one response to each of the same held-out prompts by the policies after
  all updates, warm-up included; `reward_start` before them. The same code samples and scores all three. `*_se`: standard errors
  over prompts; `reward_difference_se` is paired by prompt.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from trl112_ppo_worker import targets

from prefopt.gpu.random_models import build_tokenizer

WORKER = Path(__file__).with_name("trl112_ppo_worker.py")
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
TRL = "trl==1.12.0"
SIDES = ("trl112", "ours")
NAMES = {"trl112": "TRL 1.12 PPOTrainer", "ours": "PPOPtxTrainer"}
MIB = 2**20
# glibc gives freed memory back to the system or not by the largest block freed so far, an accident of the first step that
# is worth a tenth of the time. Both sides keep it.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--lora", action="store_true", help="rank 16 on all linear layers")
    parser.add_argument(
        "--upper-half", action="store_true", help="with --lora: adapters on the upper half of the layers"
    )
    parser.add_argument("--batch", type=int, default=128, help="samples of a rollout")
    parser.add_argument("--completions", type=int, default=1, help="samples of a prompt; TRL 1.12 reads it as often")
    parser.add_argument("--minibatches", type=int, default=4, help="optimizer steps of an inner epoch")
    parser.add_argument("--epochs", type=int, default=4, help="inner epochs")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=16, help="tokens of a response")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, help="default: 3e-4, with LoRA 1e-3")
    parser.add_argument("--kl-coef", type=float, default=0.02)
    parser.add_argument("--warmup", type=int, default=2, help="updates that are not timed")
    parser.add_argument("--updates", type=int, default=40, help="updates that are timed")
    parser.add_argument("--eval-prompts", type=int, default=1024, help="held-out prompts for the reward reached")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--venv", type=Path, default=cache / "prefopt" / "trl112")
    options = parser.parse_args(argv)
    if options.batch % options.minibatches or options.batch % options.completions:
        parser.error("--batch must be a multiple of --minibatches and of --completions")
    if options.updates < 1 or options.prompt < 1 or options.hidden % 64:
        parser.error("expected --updates and --prompt of at least 1 and --hidden a multiple of 64")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.learning_rate = options.learning_rate or (1e-3 if options.lora else 3e-4)
    return options


# ---- the environment of TRL 1.12 ----


def python_of_trl112(venv: Path) -> Path:
    """The interpreter of the environment, which is made where it is not complete."""
    python, marker = venv / "bin" / "python", venv / "installed.txt"
    wanted = [
        TRL,
        f"torch=={torch.__version__.split('+')[0]}",
        f"transformers=={transformers.__version__}",
        "peft",
    ]
    if marker.is_file() and marker.read_text().split() == wanted:
        return python
    print(f"making {venv} with {' '.join(wanted)} (once)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pins = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith(("trl==", "torch=="))]
    constraints = venv / "constraints.txt"
    constraints.write_text("\n".join(pins) + "\n")
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-c", str(constraints), *wanted], check=True)
    marker.write_text("\n".join(wanted) + "\n")
    return python


# ---- what both sides load ----


@torch.no_grad()
def build_policy(options: argparse.Namespace) -> LlamaForCausalLM:
    """Random weights; dimension 0 of the hidden states is a constant that speaks against padding and EOS alone."""
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=int(options.hidden * 2.75) // 32 * 32,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
        max_position_embeddings=options.prompt + options.response,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        initializer_range=options.hidden**-0.5,  # activations keep their scale, as in a trained model
    )
    torch.manual_seed(options.seed)
    model = LlamaForCausalLM(config)
    embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight
    nn.init.normal_(embeddings)
    embeddings[:, 0], head[:, 0] = 8.0, 0.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
    head[[0, 2]] = 0.0
    head[[0, 2], 0] = -20.0
    return model


def build_reward_model(options: argparse.Namespace, folder: Path) -> nn.Module:
    """The policy's backbone with a random head; with LoRA, and an adapter that is not 0."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "policy", num_labels=1, dtype=torch.float32)
    nn.init.normal_(model.score.weight, std=options.hidden**-0.5)
    if options.lora:
        config = LoraConfig(
            r=16,
            lora_alpha=32,
            task_type="SEQ_CLS",
            modules_to_save=["score"],
            **targets(options.layers, options.upper_half),
        )
        model = get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
    return model


def build_prompts(options: argparse.Namespace, count: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, options.vocab, (count, options.prompt), generator=generator)
    return [" ".join(map(str, row)) for row in ids.tolist()]


def prepare(options: argparse.Namespace, folder: Path) -> None:
    """Write model, reward model, tokenizer, prompts and options for both sides."""
    build_policy(options).save_pretrained(folder / "policy")
    reward_model = build_reward_model(options, folder)
    reward_model.save_pretrained(folder / "reward")
    reward_model.config.save_pretrained(folder / "reward")
    tokenizer = build_tokenizer(options.vocab)
    tokenizer.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "reward")
    count = (options.warmup + options.updates) * options.batch // options.completions
    prompts = build_prompts(options, count, seed=options.seed)
    (folder / "prompts.json").write_text(json.dumps(prompts))
    (folder / "options.json").write_text(json.dumps(vars(options), default=str))


# ---- the two processes ----


class Side:
    """A worker process, which makes one update at a time."""

    def __init__(self, name: str, python: str | Path, folder: Path, options: argparse.Namespace) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        env = {**os.environ, "HF_HUB_OFFLINE": "1", **KEEP_FREED_MEMORY}
        if options.device == "cpu":
            env["CUDA_VISIBLE_DEVICES"] = ""  # TRL 1.12 takes a GPU where there is one
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(python), str(WORKER), name, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=env,
            )
        self.versions = self._answer()
        self.updates: list[dict[str, float]] = []

    def update(self) -> None:
        self._go()
        self.updates.append(self._answer())

    def finish(self) -> dict[str, float]:
        self._go()
        result = self._answer()
        self.process.wait()
        return result

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def _go(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended early:\n{self.log.read_text()[-4000:]}")
        return json.loads(line)


def measure(options: argparse.Namespace, pythons: dict[str, str | Path], folder: Path) -> dict[str, Any]:
    """All updates of all sides, in turn; the order changes from update to update."""
    sides: dict[str, Side] = {}
    try:
        for name, python in pythons.items():
            sides[name] = Side(name, python, folder, options)
        for number in range(options.warmup + options.updates):
            for name in sorted(sides, reverse=number % 2 == 0):
                sides[name].update()
        results = {
            name: {**side.finish(), "updates": side.updates, "versions": side.versions} for name, side in sides.items()
        }
    finally:
        for side in sides.values():
            side.stop()
    expected = options.epochs * options.minibatches
    for name, result in results.items():
        steps = {update["optimizer_steps"] for update in result["updates"]}
        if steps != {expected}:
            raise RuntimeError(f"{name} took {sorted(steps)} optimizer steps per update, expected {expected}")
    return results


# ---- the reward reached ----


@torch.no_grad()
def rewards_of(
    policy: PreTrainedModel | PeftModel, reward_model: nn.Module, options: argparse.Namespace
) -> tuple[Tensor, float]:
    """Score of one sampled response to each held-out prompt, and the mean length of the responses."""
    tokenizer = build_tokenizer(options.vocab)
    prompts = build_prompts(options, options.eval_prompts, seed=options.seed + 1_000_003)
    ids = tokenizer(prompts, return_tensors="pt")["input_ids"].to(options.device)
    policy, reward_model = policy.to(options.device).eval(), reward_model.to(options.device).eval()
    torch.manual_seed(options.seed)
    scores, lengths = [], []
    for batch in ids.split(64):
        sampled = policy.generate(
            input_ids=batch,
            attention_mask=torch.ones_like(batch),
            do_sample=True,
            top_k=0,
            max_new_tokens=options.response,
            pad_token_id=0,
        )
        mask = (sampled != 0).long()
        scores.append(reward_model(input_ids=sampled, attention_mask=mask).logits.squeeze(-1).float().cpu())
        lengths.append(mask[:, batch.size(1) :].sum(1).float().cpu())
    return torch.cat(scores), torch.cat(lengths).mean().item()


def evaluate(options: argparse.Namespace, folder: Path, names: Sequence[str]) -> dict[str, Any]:
    def load_policy(name: str | None) -> PreTrainedModel | PeftModel:
        is_whole = name is None or not options.lora
        path = folder / (f"trained_{name}" if name is not None and is_whole else "policy")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return model if is_whole else PeftModel.from_pretrained(model, folder / f"trained_{name}")

    path = folder / ("policy" if options.lora else "reward")
    reward_model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
    if options.lora:
        reward_model = PeftModel.from_pretrained(reward_model, folder / "reward")
    start, _ = rewards_of(load_policy(None), reward_model, options)
    figures: dict[str, Any] = {"reward_start": start.mean().item(), "reward_start_se": _se(start)}
    reached = {}
    for name in names:
        reached[name], figures[f"response_length_{name}"] = rewards_of(load_policy(name), reward_model, options)
        figures[f"reward_{name}"] = reached[name].mean().item()
        figures[f"reward_{name}_se"] = _se(reached[name])
    if set(SIDES) <= set(names):
        figures["reward_difference_se"] = _se(reached["ours"] - reached["trl112"])
    return figures


def _se(x: Tensor) -> float:
    return (x.std() / len(x) ** 0.5).item()


# ---- figures ----


def compare(options: argparse.Namespace, results: dict[str, Any], rewards: dict[str, Any]) -> dict[str, Any]:
    """The figures that the module's docstring names."""
    figures: dict[str, Any] = {}
    for name, result in results.items():
        timed = result["updates"][options.warmup :]
        seconds = statistics.median(update["seconds"] for update in timed)
        figures[f"samples_per_second_{name}"] = options.batch / seconds
        figures[f"cpu_seconds_per_update_{name}"] = statistics.median(update["cpu_seconds"] for update in timed)
        seconds = statistics.median(update["seconds"] - update["gc_seconds"] for update in timed)
        figures[f"samples_per_second_without_gc_{name}"] = options.batch / seconds
        figures[f"seconds_per_update_{name}"] = [round(update["seconds"], 4) for update in timed]
        figures[f"peak_mib_{name}"] = result["peak"] / MIB
        figures[f"models_mib_{name}"] = result["models"] / MIB
        figures[f"scores_{name}"] = [round(update["score"], 3) for update in result["updates"]]
        figures[f"kl_{name}"] = [round(update["kl"], 3) for update in result["updates"]]
    if set(SIDES) <= set(results):
        ours, theirs = results["ours"], results["trl112"]
        figures["peak_above_models_vs_trl112"] = (theirs["peak"] - theirs["models"]) / (ours["peak"] - ours["models"])
        for key, rate in {
            "speedup": "samples_per_second",
            "speedup_without_gc": "samples_per_second_without_gc",
        }.items():
            figures[f"{key}_vs_trl112"] = figures[f"{rate}_ours"] / figures[f"{rate}_trl112"]
        cpu = "cpu_seconds_per_update"
        figures["cpu_speedup_vs_trl112"] = figures[f"{cpu}_trl112"] / figures[f"{cpu}_ours"]
        figures["peak_vs_trl112"] = theirs["peak"] / ours["peak"]
    settings = {name: value for name, value in vars(options).items() if name != "venv"}
    return {
        **settings,
        "dtype": "fp32",
        "threads": torch.get_num_threads(),
        "optimizer_steps_per_update": options.epochs * options.minibatches,
        "versions": {name: result["versions"] for name, result in results.items()},
        "peak_meter": (
            "torch.cuda.max_memory_allocated"
            if options.device == "cuda"
            else "VmHWM of the process above its VmRSS before models were loaded"
        ),
        **figures,
        **rewards,
    }


def report(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    trained = "LoRA rank 16 of policy and value function" if options.lora else "policy and value function"
    trained += ", upper half of the layers" if options.upper_half else ""
    print(
        f"llama {options.layers} x {options.hidden}, vocabulary {options.vocab}, fp32, {options.device} "
        f"({figures['threads']} threads); trained: {trained}\n"
        f"rollout of {options.batch} samples, {options.completions} of a prompt ({options.prompt} + {options.response} tokens), {options.epochs} inner "
        f"epochs of {options.minibatches} minibatches = {figures['optimizer_steps_per_update']} optimizer steps, "
        f"counted in both\n"
        f"{options.updates} timed updates in turn after {options.warmup} of warm-up; peak: {figures['peak_meter']}\n"
        "off in both, as TRL 1.12 ignores or lacks them: mixed precision, gradient checkpointing, gradient clipping, "
        "gradient accumulation,\npretraining gradients, learning rate of the value function"
    )
    print(f"{'':<22}{'samples/s':>10}{'peak MiB':>10}{'models':>8}{'reward':>9}{'+-':>7}{'length':>8}")
    print(f"{'start':<50}{figures['reward_start']:>9.3f}{figures['reward_start_se']:>7.3f}")
    for name in figures["versions"]:
        print(
            f"{NAMES[name]:<22}{figures[f'samples_per_second_{name}']:>10.2f}{figures[f'peak_mib_{name}']:>10.0f}"
            f"{figures[f'models_mib_{name}']:>8.0f}{figures[f'reward_{name}']:>9.3f}"
            f"{figures[f'reward_{name}_se']:>7.3f}{figures[f'response_length_{name}']:>8.1f}"
        )
    if "speedup_vs_trl112" in figures:
        difference = figures["reward_ours"] - figures["reward_trl112"]
        print(
            f"{figures['speedup_vs_trl112']:.2f}x faster ({figures['speedup_without_gc_vs_trl112']:.2f}x without garbage "
            f"collections), {figures['peak_vs_trl112']:.2f}x less memory "
            f"({figures['peak_above_models_vs_trl112']:.2f}x above the built trainer), reward {difference:+.3f} "
            f"+- {figures['reward_difference_se']:.3f}"
        )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    pythons = {"trl112": python_of_trl112(options.venv), "ours": sys.executable}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(options, folder)
        results = measure(options, pythons, folder)
        figures = compare(options, results, evaluate(options, folder, SIDES))
    figures["wall_seconds"] = round(time.perf_counter() - start, 1)
    report(options, figures)
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main(sys.argv[1:])
