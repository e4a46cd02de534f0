"""What rounds and all K answers are worth on the sandbox, at the same number of labeled samples: gold reward, three seeds.

    prefopt pipeline --config recipes/tiny/pipeline.yaml
    python tests/benchmarks/iterate_rounds.py --run_dir runs/demo --out runs/iterate_rounds

From the SFT model of the run, every arm has as many prompts with K = 4..9 answers each, ranked by the same labeler (gold
reward plus that labeler's noise, close ones tied, as the sandbox's labelers) and learns from each of them once:

    all_k       three rounds of `prefopt iterate`, DPO from the rankings of all K
    best_worst  the same, DPO from the best and the worst of each ranking alone
    offline     one round with the prompts of all three: DPO from answers of the SFT model

A seed draws prompts' answers, their order and the training. Gold reward is that of one sample per held-out prompt, the seeds of
a prompt averaged; intervals of 95 % over prompts, which say nothing of other seeds. `--ranker reward_model` ranks by the run's
reward model instead, for nothing. Each arm of each seed is a folder of `prefopt iterate`: a second run goes on where one was.
"""

import argparse
import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml

from prefopt.evaluation.run import EvaluationRun
from prefopt.evaluation.stages.judge import scores_path
from prefopt.inference.jsonl import read_json, read_jsonl, write_json
from prefopt.recipes import iterate
from prefopt.sandbox import World, demo_gold_reward
from prefopt.statistics.intervals import mean_estimate, paired_difference

SETTINGS = Path(iterate.__file__).parent / "tiny" / "iterate.yaml"
ARMS = ("all_k", "best_worst", "offline")


def labeler(prompt: str, completion: str) -> float:
    """The impression of a labeler, whose noise belongs to the text."""
    noise = random.Random(f"{prompt}/{completion}").gauss(0.0, World.labeler_noise)
    return demo_gold_reward(prompt, completion).total + noise


def settings(arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The keys of `prefopt iterate` for an arm."""
    run, keys = args.run_dir, yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    ranker = {"reward_model": [str(run / "reward")], "tie_margin": 0.1}
    if args.ranker == "labeler":
        ranker = {"function": "iterate_rounds:labeler", "tie_margin": World.tie_width}
    keys["rank"] = {**ranker, "batch_size": 256, "keep": "best_and_worst" if arm == "best_worst" else "all"}
    keys["dpo"] |= {"save_strategy": "no"} | json.loads(args.dpo)
    keys["dpo"].pop("save_steps"), keys["dpo"].pop("save_total_limit")
    keys["evaluate"] = {
        name: keys["evaluate"][name] for name in ("max_new_tokens", "batch_size", "gold_judge", "drift_prompts")
    } | {"prompts": str(run / "data" / "prompts_test.jsonl"), "heldout_use_case": World.held_out_use_case}
    rounds = 1 if arm == "offline" else args.rounds
    return keys | {
        "output_dir": str(args.out / f"{arm}-{seed}"),
        "policy": str(run / "sft"),
        "prompts": str(run / "data" / "prompts_rl.jsonl"),
        "prompts_per_round": args.prompts_per_round * args.rounds // rounds,
        "rounds": rounds,
        "seed": seed,
    }


def gold_rewards(folder: Path, model: str) -> dict[int, float]:
    """Of one sample of every held-out prompt, by its number."""
    evaluation = EvaluationRun(folder / "evaluation")
    counted = {row["id"] for row in evaluation.measured_samples(model, World.held_out_use_case)}
    rows = read_jsonl(scores_path(evaluation, "gold", model))
    return {row["id"]: row["score"] for row in rows if row["decoding"] == "sampled" and row["id"] in counted}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run_dir", type=Path, required=True, help="folder of a finished `prefopt pipeline` run, seed 0"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts_per_round", type=int, default=600)
    parser.add_argument("--ranker", choices=["labeler", "reward_model"], default="labeler")
    parser.add_argument("--dpo", default="{}", help="JSON of other keys of `prefopt dpo`")
    args = parser.parse_args(argv)
    gold: dict[str, list[dict[int, float]]] = {"sft": [], **{f"{arm}, round {n}": [] for arm in ARMS
                                               for n in range(1, 2 if arm == "offline" else args.rounds + 1)}}  # fmt: skip
    for seed in range(args.seeds):
        for arm in ARMS:
            keys = settings(arm, seed, args)
            with TemporaryDirectory() as folder:
                config = Path(folder) / "iterate.yaml"
                config.write_text(yaml.safe_dump(keys), encoding="utf-8")
                iterate.main(["--config", str(config)])
            folder = Path(keys["output_dir"])
            results = read_json(folder / "iterate.json", "rounds")
            for n in range(1, keys["rounds"] + 1):
                # Where the rule has ended an arm, its last policy stands for the rounds that it has not had.
                reached = min(n, len(results["rounds"]))
                gold[f"{arm}, round {n}"].append(gold_rewards(folder, f"round_{reached}"))
        gold["sft"].append(gold_rewards(folder, "sft"))
    prompts = sorted(gold["sft"][0])
    means = {name: np.mean([[one[i] for i in prompts] for one in of_seeds], axis=0) for name, of_seeds in gold.items()}
    last = f"all_k, round {args.rounds}"
    found: dict[str, Any] = {"prompts": len(prompts), "seeds": args.seeds, "prompts_per_round": args.prompts_per_round}
    for name, of_prompts in means.items():
        per_seed = [float(np.mean([one[i] for i in prompts])) for one in gold[name]]
        reward, less = mean_estimate(of_prompts), paired_difference(means[last], of_prompts)
        print(f"{name:<22} gold {reward}  {last} minus it {less}  per seed {', '.join(f'{x:.3f}' for x in per_seed)}")
        found[name] = {"gold": reward.value, "ci_low": reward.ci_low, "ci_high": reward.ci_high, "per_seed": per_seed}
        found[name] |= {"last_minus_it": [less.value, less.ci_low, less.ci_high]}
    write_json(args.out / "iterate_rounds.json", found)
    return found


if __name__ == "__main__":
    main()
