"""One training step on rankings: TRL's trainer on all pairs, K rows, and shared prefixes, side by side.

    python tests/benchmarks/ranking_step.py --method reward --k 9 --prompt 256 --completion 64
    python tests/benchmarks/ranking_step.py --method dpo --grid

Three trainers hold the same weights and get the same comparisons: TRL's own RewardTrainer or DPOTrainer on the C(K, 2)
pairs of each prompt as one batch, the ranked trainer with `prefix_sharing=False` (K rows), and the ranked trainer as it
is by default. Each takes its first step inside `train()`, with a learning rate of 0; then their steps
(`training_step`: loss, logged metrics and backward; no collator, no optimizer) are timed in turn, in an order that
rotates. Prompts and completions are random tokens, written out as text, so every trainer tokenizes for itself.

What is reported (theirs / ours: above 1, shared prefixes win):

- `speedup_vs_trl`, `speedup_vs_rows`: median over the repeats of the ratio of step times. The self-check of the first
  shared batch is counted: its time is spread over the repeats (a training run spreads it over all its steps). The same
  without it: `speedup_vs_trl_later_steps`, `speedup_vs_rows_later_steps`. Of the repeats of the latter, the lowest and the
  highest: `spread_vs_trl`, `spread_vs_rows`.
- `bound_vs_trl`, `bound_vs_rows`: the ratio of tokens, K (P + L) of rows and K (K - 1) (P + L) of pairs to P + K L shared:
  what a network whose layers all cost the same for each token could gain. Attention costs more for a later token, so that
  not all of it is reached.
- with `--clock cpu`, times are processor time: those of a machine that nobody else uses, when somebody does.
- `peak_vs_trl`, `peak_vs_rows`: allocator peak of a step above what lies there before it (weights, gradients, batch).
  CUDA: `torch.cuda.max_memory_allocated`. CPU: the running sum of the allocator's events in `torch.profiler`.
- `loss_abs_diff`, `grad_rel_l2`: the larger of the differences from TRL and from K rows.

DPO counts the forward of the reference, the trainers' default, in all three, or in none (`--precompute-ref`). TRL's
fused LM head needs Triton to skip the tokens of prompts; on a CPU it projects every position, which flatters the ratio.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import datasets
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen3Config,
    Trainer,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from prefopt import RankedDPOConfig, RankedDPOTrainer, RankedRewardConfig, RankedRewardTrainer
from prefopt.models.prefix.sharing import PrefixSharing
from prefopt.models.reward import keep_4bit_gradients
from prefopt.rankings.row import to_preferences

SIDES = ("trl", "rows", "shared")
NAMES = {"trl": "TRL, all pairs", "rows": "K rows", "shared": "shared prefixes"}
GRID = {"prompt": (16, 128, 1024), "completion": (16, 64, 256), "k": (2, 4, 9)}
CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config}
MIB = 2**20


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["reward", "dpo"], required=True)
    parser.add_argument("--k", type=int, default=4, help="completions of a prompt")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=64, help="tokens of a completion, EOS included")
    parser.add_argument("--batch", type=int, default=1, help="prompts of a step")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--model", choices=sorted(CONFIGS), default="llama")
    parser.add_argument("--folder", help="a pretrained model instead, on the same random tokens")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--heads", type=int, help="default: hidden / 64")
    parser.add_argument("--kv-heads", type=int, help="default: 2, at most the heads")
    parser.add_argument("--intermediate", type=int, help="default: 2.75 times hidden")
    parser.add_argument("--lora", action="store_true", help="rank 16 on all linear layers")
    parser.add_argument("--load-in-4bit", action="store_true", help="nf4 base, implies --lora")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--precompute-ref", action="store_true", help="DPO: no side forwards the reference")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="default: bf16 on CUDA, else fp32")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--no-trl", action="store_true", help="K rows and shared prefixes alone")
    parser.add_argument(
        "--grid", action="store_true", help=f"K rows against shared prefixes over {GRID}, memory left out"
    )
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    options = parser.parse_args(argv)
    if options.k < 2 or options.completion < 2 or options.prompt < 1:
        parser.error("expected --k and --completion of at least 2 and --prompt of at least 1")
    options.heads = options.heads or max(1, options.hidden // 64)
    options.kv_heads = options.kv_heads or min(2, options.heads)
    options.intermediate = options.intermediate or int(options.hidden * 2.75) // 32 * 32
    options.lora = options.lora or options.load_in_4bit
    options.dtype = options.dtype or ("bf16" if options.device.startswith("cuda") else "fp32")
    if options.folder:
        options.vocab = AutoConfig.from_pretrained(options.folder).vocab_size
    return options


# ---- the same model and comparisons for every side ----


def build_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Every word is a number and a token."""
    words = {"<pad>": 0, "<unk>": 1, "<eos>": 2, **{str(i): i for i in range(3, vocab)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def build_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Ranked comparisons without ties, in random order."""
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> str:
        return "".join(f" {i}" for i in torch.randint(3, options.vocab, (count,), generator=generator).tolist())

    return [
        {
            "prompt": words(options.prompt).strip(),
            "completions": [words(options.completion - 1) for _ in range(options.k)],  # EOS comes on top
            "ranks": (torch.randperm(options.k, generator=generator) + 1).tolist(),
        }
        for _ in range(options.batch)
    ]


def build_model(options: argparse.Namespace, seed: int) -> nn.Module:
    """A new model with random weights, the same for the same seed; or the one in a folder."""
    auto = AutoModelForSequenceClassification if options.method == "reward" else AutoModelForCausalLM
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    torch.manual_seed(seed)
    if options.folder:
        labels = {"num_labels": 1} if options.method == "reward" else {}
        model = auto.from_pretrained(options.folder, dtype=dtype, **labels).to(options.device)
        model.config.pad_token_id, model.config.eos_token_id = 0, 2
        return model
    config = CONFIGS[options.model](
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=options.hidden // options.heads,
        max_position_embeddings=options.prompt + options.completion,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        num_labels=1,
        initializer_range=options.hidden**-0.5,  # activations keep their scale, as in a trained model
    )
    with torch.device(options.device):
        model = auto.from_config(config, dtype=dtype)
    if not options.load_in_4bit:
        return model
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["score", "lm_head"],
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        model = auto.from_pretrained(folder, dtype=dtype, quantization_config=quantization, device_map=options.device)
    keep_4bit_gradients(model)
    return model


def build_trainer(side: str, options: argparse.Namespace, folder: str) -> Trainer:
    """The trainer, as a user builds it."""
    rows, batch = build_rows(options), options.batch
    if side == "trl":
        rows = [pair for row in rows for pair in to_preferences(row)]
        batch = len(rows)
    trainer_class, config_class = {
        ("trl", "reward"): (RewardTrainer, RewardConfig),
        ("trl", "dpo"): (DPOTrainer, DPOConfig),
    }.get(
        (side, options.method),
        (RankedRewardTrainer, RankedRewardConfig)
        if options.method == "reward"
        else (RankedDPOTrainer, RankedDPOConfig),
    )
    more: dict[str, Any] = {} if side == "trl" else {"prefix_sharing": side == "shared"}
    kwargs: dict[str, Any] = {}
    if options.method == "dpo":
        more["precompute_ref_log_probs"] = options.precompute_ref
        if not options.lora:  # with an adapter, the model without it is the reference
            kwargs["ref_model"] = build_model(options, seed=1).requires_grad_(False)
    if options.lora:
        kwargs["peft_config"] = LoraConfig(
            r=16,
            target_modules="all-linear",
            task_type="SEQ_CLS" if options.method == "reward" else "CAUSAL_LM",
            modules_to_save=["score"] if options.method == "reward" else None,
        )
    args = config_class(
        output_dir=folder,
        per_device_train_batch_size=batch,
        max_length=None,
        max_steps=1,
        learning_rate=0.0,
        optim="sgd",
        max_grad_norm=0.0,
        bf16=options.dtype == "bf16",
        use_cpu=options.device == "cpu",
        gradient_checkpointing=options.gradient_checkpointing,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **more,
    )
    trainer = trainer_class(
        model=build_model(options, seed=0),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=build_tokenizer(options.vocab),
        **kwargs,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


# ---- one side ----


class Side:
    """A trainer that has taken its first step, and its batch."""

    def __init__(self, name: str, options: argparse.Namespace, folder: str, trainables: dict[str, Tensor]):
        self.name, self.device = name, torch.device(options.device)
        self.is_quantized = options.load_in_4bit
        self.clock = time.perf_counter if options.clock == "wall" else time.process_time
        self.packed, self.self_check_seconds = False, 0.0
        with self._watched():
            self.trainer = build_trainer(name, options, folder)
            if options.lora:
                self._adopt(trainables)
            self.trainer.train()  # gradient checkpointing, mixed precision: whatever training sets up
        self.model = self.trainer.model
        self.batch = self.trainer._prepare_inputs(next(iter(self.trainer.get_train_dataloader())))

    def _adopt(self, trainables: dict[str, Tensor]) -> None:
        """Adapters are drawn by each trainer: take those of the first side, moved away from 0."""
        for name, parameter in self.trainer.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if name not in trainables:
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.02)
                trainables[name] = parameter.detach().to("cpu", torch.float32, copy=True)
            # on a quantized base TRL rounds them to bf16, the ranked trainers do not
            dtype = torch.float32 if self.is_quantized else parameter.dtype
            parameter.data = trainables[name].to(parameter.device, dtype, copy=True)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Note whether rows are packed, and how long the self-check takes."""
        pack, check = PrefixSharing.packed, PrefixSharing.is_equal

        def watched_pack(*args: Any) -> Any:
            rows = pack(*args)
            self.packed = rows.packed is not None
            return rows

        def watched_check(*args: Any) -> bool:
            self.self_check_seconds, equal = self._timed(lambda: check(*args))
            return equal

        watched = {"packed": watched_pack, "is_equal": watched_check}
        with mock.patch.multiple(PrefixSharing, **watched):
            yield

    def _timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        self._synchronize()
        start = self.clock()
        result = work()
        self._synchronize()
        return self.clock() - start, result

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def step(self) -> Tensor:
        batches, count = self.trainer.get_batch_samples(iter([dict(self.batch)]), 1, self.device)
        return self.trainer.training_step(self.trainer.model_wrapped, batches[0], count)

    def seconds(self) -> float:
        self.model.zero_grad()
        return self._timed(self.step)[0]

    def peak(self) -> tuple[int, float]:
        """Bytes that a step allocates at most above what is there, its gradients not counted; and its loss.

        The gradients stay in the model.
        """
        self.step()
        self.model.zero_grad(set_to_none=False)
        if self.device.type == "cuda":
            self._synchronize()
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            loss = self.step().item()
            return torch.cuda.max_memory_allocated(self.device) - before, loss
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            loss = self.step().item()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        allocated = highest = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            allocated += event.nbytes()
            highest = max(highest, allocated)
        return highest, loss


# ---- all sides ----


@dataclass
class Measured:
    """Of one side: seconds of each repeat; after them peak bytes and loss; None where it ran out of memory."""

    seconds: list[float] | None = None
    peak: int | None = None
    loss: float | None = None
    grads: dict[str, Tensor] | None = None
    packed: bool = False
    self_check_seconds: float = 0.0


def measure(options: argparse.Namespace, names: Sequence[str] = SIDES, *, memory: bool = True) -> dict[str, Measured]:
    """Time the sides in turn, then take memory, loss and gradients of each (unless `memory` is False)."""
    results, sides, trainables = {name: Measured() for name in names}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            try:
                sides[name] = Side(name, options, folder, trainables)
            except torch.OutOfMemoryError:
                _release()
        for name in sides:
            results[name] = Measured([], packed=sides[name].packed)
            results[name].self_check_seconds = sides[name].self_check_seconds
        gc.collect()
        for repeat in range(options.repeats):
            order = list(sides)
            shift = repeat % len(order)
            for name in order[shift:] + order[:shift]:
                results[name].seconds.append(sides[name].seconds())
                sides[name].model.zero_grad()
        for name, side in sides.items() if memory else ():
            results[name].peak, results[name].loss = side.peak()
            results[name].grads = {
                n: p.grad.detach().to("cpu", torch.float32)
                for n, p in side.model.named_parameters()
                if p.grad is not None
            }
            side.model.zero_grad()
    return results


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def ratios(theirs: Measured, ours: Measured, *, self_check: bool) -> list[float]:
    """Of each repeat, theirs / ours; nothing where one of them ran out of memory."""
    if not theirs.seconds or not ours.seconds:
        return []
    extra = ours.self_check_seconds / len(ours.seconds) if self_check else 0.0
    return [t / (o + extra) for t, o in zip(theirs.seconds, ours.seconds, strict=True)]


def speedup(theirs: Measured, ours: Measured, *, self_check: bool) -> float | None:
    """Median over the repeats of theirs / ours."""
    of_repeats = ratios(theirs, ours, self_check=self_check)
    return statistics.median(of_repeats) if of_repeats else None


def bound(options: argparse.Namespace, name: str) -> float:
    """Tokens of a side over those of the packed row."""
    rows = options.k * (options.k - 1 if name == "trl" else 1)
    return rows * (options.prompt + options.completion) / (options.prompt + options.k * options.completion)


def distance(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> float:
    """|g - g'| / |g'| over all parameters."""
    if theirs.keys() != ours.keys():
        raise ValueError(f"different parameters have gradients: {sorted(theirs.keys() ^ ours.keys())}")
    difference = sum((theirs[n].double() - ours[n].double()).square().sum() for n in ours)
    return float((difference / sum(g.double().square().sum() for g in theirs.values())).sqrt())


def compare(options: argparse.Namespace, results: dict[str, Measured]) -> dict[str, Any]:
    """The figures that the module's docstring names."""
    ours = results["shared"]
    figures: dict[str, Any] = {"self_check_seconds": ours.self_check_seconds, "packed": ours.packed}
    loss_differences, grad_differences = {}, {}
    for name, theirs in results.items():
        figures[f"seconds_{name}"] = statistics.median(theirs.seconds) if theirs.seconds else None
        figures[f"peak_mib_{name}"] = theirs.peak / MIB if theirs.peak else None
        figures[f"loss_{name}"] = theirs.loss
        if name == "shared":
            continue
        figures[f"speedup_vs_{name}"] = speedup(theirs, ours, self_check=True)
        figures[f"speedup_vs_{name}_later_steps"] = speedup(theirs, ours, self_check=False)
        of_repeats = ratios(theirs, ours, self_check=False)
        figures[f"spread_vs_{name}"] = [min(of_repeats), max(of_repeats)] if of_repeats else None
        figures[f"bound_vs_{name}"] = bound(options, name)
        figures[f"peak_vs_{name}"] = theirs.peak / ours.peak if theirs.peak and ours.peak else None
        if theirs.grads is not None and ours.grads is not None:
            loss_differences[name] = abs(theirs.loss - ours.loss)
            grad_differences[name] = distance(theirs.grads, ours.grads)
            figures[f"grad_rel_l2_{name}"] = grad_differences[name]
    figures["loss_abs_diff"] = max(loss_differences.values(), default=None)
    figures["grad_rel_l2"] = max(grad_differences.values(), default=None)
    figures["peak_meter"] = meter(options)
    return {**vars(options), "threads": torch.get_num_threads(), **figures}


def meter(options: argparse.Namespace) -> str:
    return (
        "torch.cuda.max_memory_allocated"
        if options.device.startswith("cuda")
        else "torch.profiler, CPU allocator events"
    )


def header(options: argparse.Namespace) -> str:
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    trained = ("4-bit base, " if options.load_in_4bit else "") + ("LoRA" if options.lora else "all weights")
    reference = "no reference in the reward model"
    if options.method == "dpo":
        reference = "reference forward " + ("precomputed, not counted" if options.precompute_ref else "counted")
    if options.folder:
        return f"{options.method}  {options.folder}, {trained}, {name}, {options.dtype}; in every side: {reference}"
    return (
        f"{options.method}  {options.model} {options.layers} x {options.hidden}, {options.heads} heads "
        f"({options.kv_heads} of keys), vocabulary {options.vocab}, {trained}, gradient checkpointing "
        f"{'on' if options.gradient_checkpointing else 'off'}\n"
        f"batch {options.batch} (prompts), {options.repeats} repeats, {device.type} ({name}), {options.dtype}, torch "
        f"{torch.__version__}; in every side: {reference}"
    )


def report(options: argparse.Namespace, results: dict[str, Measured], figures: dict[str, Any]) -> None:
    print(header(options))
    print(
        f"K {options.k}, prompt {options.prompt}, completion {options.completion}; "
        f"packed: {'yes' if figures['packed'] else 'no'}; self-check {figures['self_check_seconds'] * 1e3:.0f} ms, spread "
        f"over the repeats; peak: {figures['peak_meter']}"
    )
    print(f"{'':<18}{'ms a step':>10}{'peak MiB':>10}{'loss':>12}{'speedup':>9}{'later':>8}{'memory':>8}")
    for name, result in results.items():
        if result.seconds is None:
            print(f"{NAMES[name]:<18}  out of memory")
            continue
        line = (
            f"{NAMES[name]:<18}{figures[f'seconds_{name}'] * 1e3:>10.0f}{result.peak / MIB:>10.1f}{result.loss:>12.7f}"
        )
        if figures.get(f"speedup_vs_{name}") is not None:
            line += f"{figures[f'speedup_vs_{name}']:>8.2f}x{figures[f'speedup_vs_{name}_later_steps']:>7.2f}x"
            line += f"{figures[f'peak_vs_{name}']:>7.2f}x"
        print(line)


def run_grid(options: argparse.Namespace) -> dict[str, Any]:
    """Every cell of `GRID`: K rows against shared prefixes."""
    cells = []
    if not options.json:
        print(header(options))
        print(f"{'K':>3}{'prompt':>8}{'completion':>12}{'rows ms':>10}{'shared ms':>11}{'check ms':>10}"
              f"{'rows / shared':>15}{'later steps':>13}")  # fmt: skip
    for prompt in GRID["prompt"]:
        for completion in GRID["completion"]:
            for k in GRID["k"]:
                cell = argparse.Namespace(**{**vars(options), "k": k, "prompt": prompt, "completion": completion})
                results = measure(cell, ("rows", "shared"), memory=False)
                figures = compare(cell, results)
                ratio, later = figures["speedup_vs_rows"], figures["speedup_vs_rows_later_steps"]
                cells.append({"k": k, "prompt": prompt, "completion": completion, "packed": figures["packed"],
                              "speedup_vs_rows": ratio, "speedup_vs_rows_later_steps": later})  # fmt: skip
                if not options.json:
                    print(f"{k:>3}{prompt:>8}{completion:>12}{figures['seconds_rows'] * 1e3:>10.1f}"
                          f"{figures['seconds_shared'] * 1e3:>11.1f}{figures['self_check_seconds'] * 1e3:>10.1f}"
                          f"{ratio:>14.2f}x{later:>12.2f}x{'' if figures['packed'] else '  fell back to rows'}",
                          flush=True)  # fmt: skip
    packed = [cell["speedup_vs_rows"] for cell in cells if cell["packed"]]
    return {
        **vars(options),
        "threads": torch.get_num_threads(),
        "cells": cells,
        "min_speedup_vs_rows": min(cell["speedup_vs_rows"] for cell in cells),
        "min_speedup_vs_rows_packed": min(packed, default=None),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    quiet()
    if options.grid:
        figures = run_grid(options)
        if not options.json:
            print(f"minimum {figures['min_speedup_vs_rows']:.2f}x")
    else:
        results = measure(options, SIDES[1:] if options.no_trl else SIDES)
        figures = compare(options, results)
        if not options.json:
            report(options, results, figures)
    print(json.dumps(figures))
    return figures


def quiet() -> None:
    """No progress bars; warnings only."""
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # what TRL calls in transformers


if __name__ == "__main__":
    main(sys.argv[1:])
