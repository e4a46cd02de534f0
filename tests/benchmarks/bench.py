"""The figures that prefopt's claims rest on, in one table: ratios of one run, their spread, and the bound next to each.

    make bench
    OMP_NUM_THREADS=1 python tests/benchmarks/bench.py [FOLDER]

A line for each measurement, in a process of its own, one after the other: steps of the reward and DPO trainers with shared
prefixes against K rows and against TRL's trainers on all pairs (`ranking_step.py`, processor time, so that other work on
the machine does not count), and an update of PPO against TRL 1.12's trainer (`ppo_step.py`), with one completion of a
prompt and adapters on all layers, and with four and adapters on the upper half. FOLDER, or the environment's
PREFOPT_REAL_MODELS, has a pretrained SmolLM2 (or a folder `smollm2` with one), of which there are lines too. About 15
minutes on a quiet machine.

Columns: median ratio over the repeats after the self-check, [lowest, highest], and the bound, which is the ratio of tokens;
peak memory of a step, theirs / ours, above what lies there before it. What could not be measured says why, and the rest
goes on. The last line is JSON: the figures of each line by its name.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RANKINGS = {
    **{
        f"{method} K={k}": ["--method", method, "--k", str(k), "--repeats", "3" if k == 9 else "5"]
        for method in ("reward", "dpo")
        for k in (2, 4, 9)
    },
    "reward K=4 LoRA": ["--method", "reward", "--k", "4", "--lora"],
    "dpo K=4 LoRA": ["--method", "dpo", "--k", "4", "--lora"],
    "reward K=4 prompt 1024": ["--method", "reward", "--k", "4", "--prompt", "1024", "--no-trl"],
    "reward K=4 completions 256": ["--method", "reward", "--k", "4", "--completion", "256", "--no-trl"],
    "dpo K=2 completions 256": ["--method", "dpo", "--k", "2", "--completion", "256", "--no-trl"],
}
OF_SMOLLM2 = ["--k", "4", "--lora", "--prompt", "128", "--completion", "32", "--repeats", "3"]
PRETRAINED = {f"SmolLM2 {method} K=4 LoRA": ["--method", method, *OF_SMOLLM2] for method in ("reward", "dpo")}
PPO = {
    "ppo LoRA": ["--lora", "--updates", "20"],
    "ppo LoRA, upper half, K=4": ["--lora", "--updates", "20", "--upper-half", "--completions", "4"],
}
SMALL = {
    "ranking_step.py": ["--layers", "2", "--hidden", "32", "--vocab", "64", "--prompt", "32", "--completion", "8",
                        "--repeats", "2"],
    "ppo_step.py": ["--updates", "1", "--warmup", "1", "--batch", "8", "--epochs", "1", "--eval-prompts", "8"],
}  # fmt: skip


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=os.environ.get("PREFOPT_REAL_MODELS"), help="of SmolLM2")
    parser.add_argument("--only", default="", help="lines whose name has this in it")
    parser.add_argument("--small", action="store_true", help="whether it runs, on models of no size")
    return parser.parse_args(argv)


def lines(options: argparse.Namespace) -> dict[str, tuple[str, list[str]]]:
    """By name, the benchmark and its arguments."""
    chosen = {name: ("ranking_step.py", [*arguments, "--clock", "cpu"]) for name, arguments in RANKINGS.items()}
    chosen |= {name: ("ppo_step.py", arguments) for name, arguments in PPO.items()}
    if options.folder:
        folder = Path(options.folder)
        folder = folder / "smollm2" if (folder / "smollm2").is_dir() else folder
        chosen |= {
            name: ("ranking_step.py", [*arguments, "--clock", "cpu", "--folder", str(folder)])
            for name, arguments in PRETRAINED.items()
        }
    if options.small:
        chosen = {name: (file, [*arguments, *SMALL[file]]) for name, (file, arguments) in chosen.items()}
    return {name: line for name, line in chosen.items() if options.only in name}


def measure(file: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The JSON of a benchmark's last line, or `error`, what it ended with."""
    done = subprocess.run([sys.executable, HERE / file, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip() or "no output").splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def ratio(figures: dict[str, Any], side: str) -> str:
    value = figures.get(f"speedup_vs_{side}_later_steps")
    if value is None:
        return ""
    low, high = figures[f"spread_vs_{side}"]
    return f"{value:.2f} [{low:.2f}, {high:.2f}] of {figures[f'bound_vs_{side}']:.2f}"


def row(name: str, figures: dict[str, Any]) -> str:
    if "error" in figures:
        return f"{name:<28}not measured: {figures['error']}"
    if "cpu_speedup_vs_trl112" in figures:
        return (
            f"{name:<28}{'':<27}{figures['cpu_speedup_vs_trl112']:.2f} of TRL 1.12, processor time; reward "
            f"{figures['reward_ours'] - figures['reward_trl112']:+.3f} +- {figures['reward_difference_se']:.3f}; memory "
            f"{figures['peak_vs_trl112']:.2f}"
        )
    peaks = "".join(f"{figures.get(f'peak_vs_{side}') or float('nan'):>10.2f}" for side in ("rows", "trl"))
    return f"{name:<28}{ratio(figures, 'rows'):<27}{ratio(figures, 'trl'):<34}{peaks}"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    start = time.perf_counter()
    print(f"{'above 1, ours wins':<28}{'time, K rows / ours':<27}{'time, TRL on pairs / ours':<34}"
          f"{'memory: rows':>10}{'TRL':>8}", flush=True)  # fmt: skip
    results = {}
    for name, (file, arguments) in lines(options).items():
        results[name] = measure(file, arguments)
        print(row(name, results[name]), flush=True)
    results["wall_seconds"] = round(time.perf_counter() - start, 1)
    print(json.dumps(results))
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
