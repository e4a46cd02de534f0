"""Cost of a training step on rankings against K and against the prompt's length, with fitted exponents and a plot.

    python tests/benchmarks/scaling.py --method reward --plot scaling.svg

TRL's trainer on all pairs, K rows and shared prefixes, each timed by `ranking_step.py` on its default model, or a
smaller one (its options all work here; `--prompt` is the prompt of the sweep over K, `--k` the K of the sweep over
prompts). The exponent b of cost = a x^b is fitted by least squares in logarithms. Expected in tokens, for a prompt of P
and completions of L: pairs K (K - 1) (P + L), rows K (P + L), shared P + K L. A power law is exact for none of them
over a finite range; the same fit to these counts is printed beside.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ranking_step
from matplotlib.figure import Figure
from ranking_step import NAMES, SIDES, measure

KS = (2, 3, 4, 6, 8, 12, 16)
PROMPTS = (32, 64, 128, 256, 512, 1024)
DEFAULTS = ["--layers", "4", "--hidden", "128", "--prompt", "256", "--completion", "32", "--repeats", "5"]


def tokens(side: str, k: int, prompt: int, completion: int) -> int:
    """Tokens that run through the model for one prompt."""
    if side == "shared":
        return prompt + k * completion
    return (k * (k - 1) if side == "trl" else k) * (prompt + completion)


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """b of y = a x^b, least squares in logarithms."""
    log_x, log_y = [math.log(v) for v in x], [math.log(v) for v in y]
    mean_x, mean_y = sum(log_x) / len(log_x), sum(log_y) / len(log_y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(log_x, log_y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in log_x)


def sweep(options: ranking_step.Options, axis: str, values: Sequence[int]) -> dict[str, Any]:
    """Seconds of a step of each side at each value of `k` or `prompt`; fastest of the repeats."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    counts: dict[str, list[int]] = {side: [] for side in SIDES}
    for value in values:
        cell = replace(options, **{axis: value})
        results = measure(cell, memory=False)
        for side in SIDES:
            seconds[side].append(min(results[side].seconds))
            counts[side].append(tokens(side, cell.k, cell.prompt, cell.completion))
        print(f"{axis} {value:>5}  " + "  ".join(f"{NAMES[s]} {seconds[s][-1] * 1e3:8.1f} ms" for s in SIDES),
              flush=True)  # fmt: skip
    return {
        axis: list(values),
        "seconds": seconds,
        "exponents": {side: exponent(values, seconds[side]) for side in SIDES},
        "exponents_of_tokens": {side: exponent(values, counts[side]) for side in SIDES},
    }


def plot(sweeps: dict[str, dict[str, Any]], options: ranking_step.Options, path: str) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    labels = {
        "k": f"completions K (prompt {options.prompt}, completion {options.completion})",
        "prompt": f"tokens of the prompt (K = {options.k}, completion {options.completion})",
    }
    for axes, (axis, result) in zip(figure.subplots(1, 2), sweeps.items(), strict=True):
        for side in SIDES:
            label = f"{NAMES[side]}: {axis}^{result['exponents'][side]:.2f}"
            axes.loglog(result[axis], result["seconds"][side], "o-", label=label)
        axes.set(xlabel=labels[axis], ylabel="seconds a step")
        axes.set_xticks(result[axis], [str(value) for value in result[axis]])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{options.method}: {options.model} {options.layers} x {options.hidden}, {options.device}")
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--plot", help="write a plot here, as .svg or .png")
    parser.add_argument("--ks", type=int, nargs="+", default=KS)
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS)
    ours, rest = parser.parse_known_args(argv)
    options = ranking_step.parse([*DEFAULTS, *rest])
    ranking_step.quiet()
    print(ranking_step.header(options))
    sweeps = {"k": sweep(options, "k", ours.ks), "prompt": sweep(options, "prompt", ours.prompts)}
    for axis, result in sweeps.items():
        for side in SIDES:
            print(f"{NAMES[side]:<18}{axis}^{result['exponents'][side]:.2f}   "
                  f"(tokens: {axis}^{result['exponents_of_tokens'][side]:.2f})")  # fmt: skip
    if ours.plot:
        plot(sweeps, options, ours.plot)
    print(json.dumps(sweeps))
    return sweeps


if __name__ == "__main__":
    main(sys.argv[1:])
