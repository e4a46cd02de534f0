"""One training step on rankings: TRL's trainer on all pairs, K rows, and shared prefixes, side by side.

    python tests/benchmarks/ranking_step.py --method reward --k 9 --prompt 256 --completion 64
    python tests/benchmarks/ranking_step.py --method dpo --grid

The three sides and their steps are those of `prefopt.gpu.ranking_step`; the steps are timed in turn, in an order that
rotates.

What is reported (theirs / ours: above 1, shared prefixes win):

- `speedup_vs_trl`, `speedup_vs_rows`: median over the repeats of the ratio of step times. The self-check of the first
  shared batch is counted: its time is spread over the repeats (a training run spreads it over all its steps). The same
  without it: `speedup_vs_trl_later_steps`, `speedup_vs_rows_later_steps`. Of the repeats of the latter, the lowest and the
  highest: `spread_vs_trl`, `spread_vs_rows`.
- `bound_vs_trl`, `bound_vs_rows`: the ratio of tokens, K (P + L) of rows and K (K - 1) (P + L) of pairs to P + K L shared:
  what a network whose layers all cost the same for each token could gain. Attention costs more for a later token, so that
  not all of it is reached. `flop_bound_vs_trl`, `flop_bound_vs_rows`: the ratio of operations, attention and LM head too.
- with `--clock cpu`, times are processor time: those of a machine that nobody else uses, when somebody does.
- `peak_vs_trl`, `peak_vs_rows`: allocator peak of a step above what lies there before it (weights, gradients, batch).
  CUDA: `torch.cuda.max_memory_allocated`. CPU: the running sum of the allocator's events in `torch.profiler`.
- `loss_abs_diff`, `grad_rel_l2`: the larger of the differences from TRL and from K rows.

DPO counts the forward of the reference, the trainers' default, in all three, or in none (`--precompute-ref`). TRL's
fused LM head needs Triton to skip the tokens of prompts; on a CPU it projects every position, which flatters the ratio.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import datasets
import torch
import transformers
from transformers import AutoConfig

from prefopt.gpu.ranking_step import CONFIGS, SIDES, Measured, Step, compare, measure

NAMES = {"trl": "TRL, all pairs", "rows": "K rows", "shared": "shared prefixes"}
GRID = {"prompt": (16, 128, 1024), "completion": (16, 64, 256), "k": (2, 4, 9)}
MIB = 2**20


@dataclass
class Options(Step):
    """A step, and how it is reported."""

    no_trl: bool = False
    grid: bool = False
    json: bool = False


def parse(argv: Sequence[str] | None = None) -> Options:
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
    return Options(**vars(options), head_dim=options.hidden // options.heads)


def meter(options: Options) -> str:
    return (
        "torch.cuda.max_memory_allocated"
        if options.device.startswith("cuda")
        else "torch.profiler, CPU allocator events"
    )


def header(options: Options) -> str:
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


def report(options: Options, results: dict[str, Measured], figures: dict[str, Any]) -> None:
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


def run_grid(options: Options) -> dict[str, Any]:
    """Every cell of `GRID`: K rows against shared prefixes."""
    cells = []
    if not options.json:
        print(header(options))
        print(f"{'K':>3}{'prompt':>8}{'completion':>12}{'rows ms':>10}{'shared ms':>11}{'check ms':>10}"
              f"{'rows / shared':>15}{'later steps':>13}")  # fmt: skip
    for prompt in GRID["prompt"]:
        for completion in GRID["completion"]:
            for k in GRID["k"]:
                cell = replace(options, k=k, prompt=prompt, completion=completion)
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
        figures = {**compare(options, results), "peak_meter": meter(options)}
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
