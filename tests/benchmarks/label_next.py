"""What `prefopt label next` is worth on the sandbox: accuracy of the reward model against the number of labeled prompts.

    prefopt pipeline --config recipes/tiny/pipeline.yaml
    python tests/benchmarks/label_next.py --run_dir runs/demo --out runs/label_next

A team that labels in rounds: rank some prompts, train a reward model from the SFT model on all rankings so far, choose
the prompts and outputs of the next round from a pool of samples, rank those, and so on. All strategies of a seed start
from the same prompts and spend the same: prompts ranked, `--k` outputs each, one labeler per prompt, the same one
whoever chose it. They differ in what chooses:

    random        prompts and outputs at random (`--random_share 1`)
    margin        the command's default: margins of the reward model near 0, and a tenth at random
    disagreement  between two reward models of different seeds, and a tenth at random; twice the training

A seed draws the pool, the labelers, the heads of the reward models and the order of the data; the SFT model and the
held-out prompts are those of the run. Accuracy is measured on held-out prompts, over the pairs that a labeler of the
training group ranks strictly, and over those that the gold reward orders, which has no noise; that of disagreement is
its first reward model's. The ceiling is what the gold reward itself reaches on the labelers' pairs.

Printed and written into `--out`, as label_next.json and label_next.svg: means over seeds, and the differences to random
at the same number of prompts and on average over the rounds, with two 95 % intervals: over held-out prompts (bootstrap,
paired, seeds averaged: says nothing of other seeds) and over seeds (Student's t of the paired differences). What is
finished is kept in sums.json there, and a second run goes on behind it.
"""

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t as student
from transformers import AutoTokenizer

from prefopt import load_reward_model
from prefopt.inference.jsonl import read_jsonl, write_jsonl, write_whole
from prefopt.inference.scoring import score_rows
from prefopt.labeling.next_tasks import choose_next
from prefopt.rankings.checks import dense_ranks
from prefopt.recipes import reward
from prefopt.sandbox import World, labelers
from prefopt.statistics.intervals import ratio_of_sums
from prefopt.statistics.rankings import pairs_right

STRATEGIES = ("random", "margin", "disagreement")
Rows = Sequence[Mapping[str, Any]]


class Team:
    """What all strategies of one seed share: the pool, the labelers, the held-out prompts and their pairs."""

    def __init__(self, args: argparse.Namespace, seed: int):
        self.args, self.seed = args, seed
        data = Path(args.run_dir) / "data"
        self.start = str(Path(args.run_dir) / args.model)
        self.tokenizer = AutoTokenizer.from_pretrained(self.start)
        self.people = labelers(World(seed=args.world_seed), "train")
        samples = read_jsonl(data / "samples_rm.jsonl")
        self.pool = random.Random(f"{seed} pool").sample(samples, min(args.pool, len(samples)))
        self.test = read_jsonl(data / "rankings_test_train_labelers.jsonl")[: args.test]
        self.gold = gold_ranks(World(seed=args.world_seed), self.test)

    def label(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The ranking of the prompt's labeler: noise belongs to labeler and text, so it is the same for all strategies."""
        person = random.Random(f"{self.seed} {row['prompt']}").choice(self.people)
        return person.label(row["prompt"], row["completions"]) | {"truncated": row["truncated"]}

    def train(self, rankings: Rows, seed: int) -> Any:
        """`prefopt reward` on these rankings, from the SFT model."""
        with TemporaryDirectory() as folder:
            write_jsonl(Path(folder) / "rankings.jsonl", rankings)
            keys = {
                "config": self.args.config, "model_name_or_path": self.start, "output_dir": f"{folder}/rm",
                "dataset_name": f"{folder}/rankings.jsonl", "num_train_epochs": self.args.epochs, "seed": seed,
                "logging_strategy": "no", "disable_tqdm": True,
            }  # fmt: skip
            reward.main([word for name, value in keys.items() for word in (f"--{name}", str(value))])
            return load_reward_model(f"{folder}/rm")

    def scores(self, model: Any, rows: Rows) -> list[list[float]]:
        return score_rows(model, self.tokenizer, rows, batch_size=256)

    def run(self, strategy: str) -> list[np.ndarray]:
        """Per number of labeled prompts, `sums_over_pairs` of labelers and of gold: [prompts, 4]."""
        args, labeled, models, found = self.args, [], [], []
        members = (0, 1) if strategy == "disagreement" else (0,)
        for round_, budget in enumerate(args.budgets):
            known = {row["prompt"] for row in labeled}
            left = [row for row in self.pool if row["prompt"] not in known]
            if round_ == 0 or strategy == "random":
                scores = [[[0.0] * len(row["completions"])] for row in left]
                how = {"random_share": 1.0}
            else:
                scores = list(zip(*(self.scores(model, left) for model in models), strict=True))
                how = {"random_share": args.random_share, "by": strategy}
            chosen = choose_next(
                left, scores, n=budget - len(labeled), k=args.k, seed=1000 * self.seed + round_, **how
            )
            labeled += [self.label(row) for row in chosen]
            models = [self.train(labeled, seed=1000 * self.seed + member) for member in members]
            got = self.scores(models[0], self.test)
            sums = [sums_over_pairs(got, ranks) for ranks in ([row["ranks"] for row in self.test], self.gold)]
            found.append(np.concatenate(sums, axis=1))
            share = found[-1].sum(axis=0)
            print(f"seed {self.seed}  {strategy:<13}{len(labeled):>5} prompts   accuracy {share[0] / share[1]:.4f}   "
                  f"against gold {share[2] / share[3]:.4f}", flush=True)  # fmt: skip
        return found


def gold_ranks(world: World, rows: Rows) -> list[list[int]]:
    return [
        dense_ranks([-world.gold_reward(row["prompt"], text).total for text in row["completions"]]) for row in rows
    ]


def sums_over_pairs(scores: Sequence[Sequence[float]], ranks: Sequence[Sequence[int]]) -> np.ndarray:
    """Of every prompt, over its strict pairs: how many are ordered right, and how many there are."""
    sums = []
    for s, r in zip(scores, ranks, strict=True):
        leads = np.array([s[i] - s[j] for i in range(len(r)) for j in range(len(r)) if r[i] < r[j]])
        sums.append([pairs_right(leads).sum(), len(leads)])
    return np.array(sums, dtype=float)


def estimate(right: np.ndarray, pairs: np.ndarray) -> dict[str, Any]:
    """A share of pairs, or a difference of two, from `[seeds, prompts]` of pairs right and `[prompts]` of pairs.

    Example:
        >>> estimate(np.array([[2.0, 1.0], [1.0, 1.0]]), np.array([2.0, 2.0]))["per_seed"]
        [0.75, 0.5]
    """
    over_prompts = ratio_of_sums(right.mean(axis=0), pairs)
    per_seed = right.sum(axis=1) / pairs.sum()
    half = np.nan
    if len(per_seed) > 1:
        half = student.ppf(0.975, len(per_seed) - 1) * per_seed.std(ddof=1) / len(per_seed) ** 0.5
    interval = [over_prompts.value - half, over_prompts.value + half] if len(per_seed) > 1 else None
    return {
        "value": over_prompts.value,
        "over_prompts": [over_prompts.ci_low, over_prompts.ci_high],
        "over_seeds": interval,
        "per_seed": per_seed.tolist(),
    }


def summary(sums: Mapping[str, np.ndarray], args: argparse.Namespace, ceiling: np.ndarray) -> dict[str, Any]:
    """From `[seeds, budgets, prompts, 4]` of every strategy."""
    found: dict[str, Any] = {"ceiling": estimate(ceiling[None, :, 0], ceiling[:, 1])}
    for column, name in ((0, "labelers"), (2, "gold")):
        pairs = sums["random"][0, 0, :, column + 1]
        right = {strategy: values[..., column] for strategy, values in sums.items()}
        found[name] = {
            strategy: {
                "accuracy": [estimate(values[:, i], pairs) for i in range(len(args.budgets))],
                "minus_random": [
                    estimate(values[:, i] - right["random"][:, i], pairs) for i in range(len(args.budgets))
                ],
                # Without the first round, which all share.
                "minus_random_on_average": estimate((values - right["random"])[:, 1:].mean(axis=1), pairs),
            }
            for strategy, values in right.items()
        }
    return found


def said(one: Mapping[str, Any], sign: str = "") -> str:
    low, high = one["over_prompts"]
    seeds = one["over_seeds"]
    over_seeds = f" ({seeds[0]:{sign}.3f}, {seeds[1]:{sign}.3f})" if seeds else ""
    return f"{one['value']:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]{over_seeds}"


def table(found: Mapping[str, Any], args: argparse.Namespace, seeds: Sequence[int]) -> str:
    lines = [f"{len(seeds)} seeds; [over held-out prompts] (over seeds)",
             f"ceiling: the gold reward on the labelers' pairs {said(found['ceiling'])}"]  # fmt: skip
    for name, words in (("labelers", "labelers' pairs"), ("gold", "pairs that the gold reward orders")):
        lines.append(f"accuracy on {words}")
        for i, budget in enumerate(args.budgets):
            for strategy, one in found[name].items():
                line = f"{budget:>6} prompts  {strategy:<13} {said(one['accuracy'][i])}"
                if strategy != "random" and i:
                    line += f"   minus random {said(one['minus_random'][i], '+')}"
                lines.append(line)
        for strategy, one in found[name].items():
            if strategy != "random":
                lines.append(f"{strategy} minus random, mean of the rounds after the first: "
                             f"{said(one['minus_random_on_average'], '+')}")  # fmt: skip
    return "\n".join(lines)


def plot(found: Mapping[str, Any], args: argparse.Namespace, path: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    names = {"labelers": "pairs ranked by labelers", "gold": "pairs ordered by the gold reward"}
    for axes, (name, title) in zip(figure.subplots(1, 2), names.items(), strict=True):
        for number, (strategy, one) in enumerate(found[name].items()):
            values = np.array([point["value"] for point in one["accuracy"]])
            ends = np.array([point["over_prompts"] for point in one["accuracy"]])
            x = np.array(args.budgets) * (1 + 0.015 * (number - 1))  # beside each other
            axes.errorbar(x, values, [values - ends[:, 0], ends[:, 1] - values], fmt="o-", capsize=2, label=strategy)
        if name == "labelers":
            axes.axhline(found["ceiling"]["value"], color="gray", linestyle="--", label="gold reward")
        axes.set_xscale("log")
        axes.set_xticks(args.budgets, [str(budget) for budget in args.budgets])
        axes.minorticks_off()
        axes.set(title=title, xlabel=f"labeled prompts (K = {args.k})", ylabel="accuracy on held-out prompts")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--run_dir", required=True, help="of `prefopt pipeline`, past its step `label`")
    parser.add_argument("--out", required=True, help="folder of the results")
    parser.add_argument("--model", default="sft-epochs", help="folder in run_dir that reward models start from")
    parser.add_argument("--config", default="recipes/tiny/reward.yaml", help="of `prefopt reward`")
    parser.add_argument("--world_seed", type=int, default=0, help="seed of the run")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--budgets", type=int, nargs="+", default=[100, 200, 400, 800], help="prompts labeled so far")
    parser.add_argument("--pool", type=int, default=1600, help="prompts to choose from")
    parser.add_argument("--test", type=int, help="held-out prompts; default: all")
    parser.add_argument("--k", type=int, default=4, help="outputs ranked per prompt")
    parser.add_argument("--random_share", type=float, default=0.1)
    parser.add_argument("--epochs", type=float, default=2, help="over the rankings, for every reward model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(argv)
    if "random" not in args.strategies:
        parser.error("--strategies needs 'random', which the others are compared with")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "sums.json"
    settings = {name: value for name, value in vars(args).items() if name not in ("seeds", "strategies", "out")}
    sums: dict[str, dict[str, Any]] = {}
    if kept.is_file():
        before = json.loads(kept.read_text())
        if before["settings"] != settings:
            raise SystemExit(f"{kept} is of other settings; choose another --out")
        sums = before["sums"]
    for seed in args.seeds:
        team = None
        for strategy in args.strategies:
            if str(seed) not in sums.setdefault(strategy, {}):
                team = team or Team(args, seed)
                sums[strategy][str(seed)] = [one.tolist() for one in team.run(strategy)]
                write_whole(kept, json.dumps({"settings": settings, "sums": sums}))
    team = Team(args, args.seeds[0])
    world = World(seed=args.world_seed)
    totals = [[world.gold_reward(r["prompt"], y).total for y in r["completions"]] for r in team.test]
    ceiling = sums_over_pairs(totals, [row["ranks"] for row in team.test])
    arrays = {name: np.array([sums[name][str(seed)] for seed in args.seeds]) for name in args.strategies}
    found = summary(arrays, args, ceiling)
    print(table(found, args, args.seeds))
    write_whole(out / "label_next.json", json.dumps({**settings, "seeds": args.seeds, **found}, indent=1) + "\n")
    plot(found, args, out / "label_next.svg")
    return found


if __name__ == "__main__":
    main()
