"""Reward models of a pretrained model on people's rankings: all K at once against TRL's pairs and simple baselines.

    python tests/benchmarks/real_rankings.py --model SmolLM2-135M-Instruct --out runs/rankings \
        --train ranked_train.jsonl --validation ranked_val.jsonl --seconds 600

Of every source in the rows (`source`), and of every seed, with LoRA or all weights:

    all K               RankedRewardTrainer for `--seconds` of training, or `--epochs` passes if they end earlier
    pairs, time         TRL's RewardTrainer on the strict pairs of the same rankings, shuffled, for the same wall time
    pairs, samples      the same for as many comparisons as "all K" has seen
    bag of words        hashed words, linear, the loss of the reward model (all pairs of a prompt weigh 1), on all rows
    longer wins         no training

Both trainers have the same start, head and optimizer, the learning rate of `--learning_rate` (or `--pairs_learning_rate`),
up over the first 5 % of the budget and down along a cosine. With `--tune` the validation file is not read: every seventh
training prompt takes its place, to choose settings on. A result is a file in `--out`; those that are there are kept, so
that a killed run goes on, and the command may be started once per core.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer

sys.path.insert(0, str(Path(__file__).parent))
from batched_vs_pairs import Budget

from prefopt import RankedRewardConfig, RankedRewardTrainer
from prefopt.inference.jsonl import read_jsonl, write_json
from prefopt.inference.scoring import score_rows
from prefopt.models.reward import init_score_head
from prefopt.rankings.dataset import prepare_comparisons, tokenize_comparisons
from prefopt.rankings.row import to_preferences
from prefopt.statistics.rankings import Pairs, ranking_metrics
from prefopt.statistics.reward_models import accuracy_difference, longer_wins_accuracy

SHOWN = ("accuracy", "nll", "brier", "ece")
SIDES = ("all K", "pairs, time", "pairs, samples")


def glued(row: dict[str, Any]) -> dict[str, Any]:
    """The row with a space between prompt and completions where there is none: one that the model's tokens expect."""
    gap = "" if row["prompt"][-1:].isspace() else " "
    return {**row, "completions": [c if c[:1].isspace() else gap + c for c in row["completions"]]}


def load(args: argparse.Namespace, source: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[dict], list[dict]]:
    """Training and validation rows of a source that are not longer than `--max_length` tokens."""
    train = [glued(row) for row in read_jsonl(args.train) if row["source"] == source]
    if args.tune:
        prompts = sorted({row["prompt"] for row in train})
        random.Random(0).shuffle(prompts)
        held_out = set(prompts[::7])
        parts = [[row for row in train if (row["prompt"] in held_out) == held] for held in (False, True)]
    else:
        parts = [train, [glued(row) for row in read_jsonl(args.validation) if row["source"] == source]]
    return tuple(
        [row for row in prepare_comparisons(rows, source=source) if longest(row, tokenizer) <= args.max_length]
        for rows in parts
    )


def longest(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> int:
    return max(len(tokenizer(row["prompt"] + text)["input_ids"]) + 1 for text in row["completions"])


def train_and_score(
    args: argparse.Namespace, side: str, rows: Dataset, batch: int, budget: Budget, seed: int, test: Sequence[dict]
) -> list[list[float]]:
    """Train one side until the budget is spent; scores of the validation rows."""
    tokenizer = make_tokenizer(args.model)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    init_score_head(model)
    if args.lora_r:
        adapter = {"task_type": "SEQ_CLS", "modules_to_save": ["score"], "target_modules": "all-linear"}
        # Not by the trainers, which would each draw a head of their own.
        model = get_peft_model(model, LoraConfig(r=args.lora_r, lora_alpha=2 * args.lora_r, **adapter))
    trainer_class, config_class = (
        (RankedRewardTrainer, RankedRewardConfig) if side == "all K" else (RewardTrainer, RewardConfig)
    )
    config = config_class(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        max_steps=10**9,  # the budget ends it
        lr_scheduler_type="constant",  # the budget sets it
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,  # what is too long was dropped from both sides
        seed=seed,
    )
    trainer = trainer_class(
        model=model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[budget]
    )
    budget.watch(trainer.model)
    trainer.train()
    return score_rows(trainer.model, tokenizer, test, batch_size=64)


def make_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """With a pad token that is not EOS, at which TRL's trainer would not read the score."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        others = [t for t in tokenizer.all_special_tokens if t not in (tokenizer.eos_token, tokenizer.bos_token)]
        tokenizer.pad_token = others[0]
    return tokenizer


def bag_of_words(train: Sequence[dict], test: Sequence[dict]) -> list[list[float]]:
    """Scores of a linear model of hashed words and pairs of words, trained on the difference of every strict pair."""
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import LogisticRegression

    words = HashingVectorizer(n_features=2**18, ngram_range=(1, 2), alternate_sign=False, norm="l2")
    differences, weights = [], []
    for row in train:
        table = words.transform(row["completions"])
        pairs = [(i, j) for i, j in combinations(range(len(row["ranks"])), 2) if row["ranks"][i] != row["ranks"][j]]
        for i, j in pairs:
            best, worst = (i, j) if row["ranks"][i] < row["ranks"][j] else (j, i)
            differences.append(table[best] - table[worst])
            weights.append(1 / len(pairs))
    x = vstack([*differences, *(-d for d in differences)])
    y = np.repeat([1, 0], len(differences))
    model = LogisticRegression(C=10.0, fit_intercept=False, max_iter=300).fit(x, y, sample_weight=[*weights, *weights])
    return [(words.transform(row["completions"]) @ model.coef_[0]).tolist() for row in test]


def numbers(scores: Sequence[Sequence[float]], test: Sequence[dict]) -> dict[str, Any]:
    metrics = ranking_metrics(scores, [row["ranks"] for row in test])
    return {
        name: {"value": m.value, "ci_low": m.ci_low, "ci_high": m.ci_high, "n": m.n, "prompts": m.n_clusters}
        for name, m in metrics.items()
        if name in SHOWN
    }


def one(args: argparse.Namespace, source: str, seed: int, parts: tuple[list[dict], list[dict]]) -> dict[str, Any]:
    """All sides of one source and seed."""
    train, test = parts
    tokenizer = make_tokenizer(args.model)
    ranked = tokenize_comparisons(Dataset.from_list(train), tokenizer, max_length=args.max_length, source=source)
    pairs = Dataset.from_list([pair for row in train for pair in to_preferences(row)])
    steps = -(-len(train) // args.prompts_per_step)
    compared = max(1, round(len(pairs) / steps))
    found: dict[str, Any] = {"train_rows": len(train), "train_pairs": len(pairs), "validation_rows": len(test)}
    rate = args.pairs_learning_rate or args.learning_rate
    spent: dict[str, float] = {}
    for side in args.sides:
        if side == "all K":
            # Whichever ends first.
            budget = Budget("steps", round(steps * args.epochs), args.learning_rate)
            budget.seconds = args.seconds
            scores = train_and_score(args, side, ranked, args.prompts_per_step, budget, seed, test)
            spent = dict(budget.spent)
        else:
            in_time = side == "pairs, time"
            batch = args.pairs_per_step or compared
            amount = spent["seconds"] if in_time else round(spent["steps"] * compared / batch)
            budget = Budget("seconds" if in_time else "steps", amount, rate)
            scores = train_and_score(args, side, pairs, batch, budget, seed, test)
        found[side] = {**numbers(scores, test), "spent": budget.spent, "scores": scores}
        share = budget.spent["steps"] * (args.prompts_per_step if side == "all K" else batch)
        found[side]["passes"] = share / len(train if side == "all K" else pairs)
        print(f"{source} seed {seed} {side}: {told(found[side])}", flush=True)
    return found


def told(of: dict[str, Any]) -> str:
    parts = [f"{n} {of[n]['value']:.3f} [{of[n]['ci_low']:.3f}, {of[n]['ci_high']:.3f}]" for n in SHOWN if n in of]
    if "spent" in of:
        parts.append(f"{of['spent']['seconds']:.0f} s, {of['passes']:.2f} passes")
    return "  ".join(parts)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sources", nargs="+", help="default: all")
    parser.add_argument("--seconds", type=float, default=600, help="of training, the evaluation not counted")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--prompts_per_step", type=int, default=4)
    parser.add_argument(
        "--pairs_per_step", type=int, help="of TRL; default: as many comparisons as a step of all K has"
    )
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--pairs_learning_rate", type=float, help="default: that of all K")
    parser.add_argument("--lora_r", type=int, default=16, help="0: all weights")
    parser.add_argument("--max_length", type=int, default=128, help="rows with a longer completion are left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--tune", action="store_true", help="validate on every seventh training prompt")
    parser.add_argument("--limit", type=int, help="no more rows of either file than this, for a trial")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("out", "seeds", "sources")}
    tokenizer = make_tokenizer(args.model)
    sources = args.sources or sorted({row["source"] for row in read_jsonl(args.train)})
    results: dict[str, Any] = {"settings": settings}
    for source in sources:
        parts = tuple(rows[: args.limit] for rows in load(args, source, tokenizer))
        test = parts[1]
        pairs = Pairs.of([row["ranks"] for row in test])
        longer = longer_wins_accuracy(pairs, [[len(c) for c in row["completions"]] for row in test])
        results[source] = {"longer wins": str(longer), "bag of words": numbers(bag_of_words(*parts), test)}
        print(f"{source}: {len(parts[0])} + {len(test)} rows; longer wins {longer}; bag of words "
              f"{told(results[source]['bag of words'])}", flush=True)  # fmt: skip
        for seed in args.seeds:
            path = args.out / f"{source}_{seed}.json"
            try:
                with FileLock(f"{path}.lock", timeout=0):
                    known = json.loads(path.read_text()) if path.is_file() else None
                    if known is None or known["settings"] != settings:
                        write_json(path, {"settings": settings, **one(args, source, seed, parts)})
            except Timeout:
                continue  # another process has it
        found = [json.loads(p.read_text()) for s in args.seeds if (p := args.out / f"{source}_{s}.json").is_file()]
        for side in args.sides if found else ():
            mean = np.mean([of[side]["accuracy"]["value"] for of in found])
            print(f"{source} {side}: accuracy {mean:.3f}, mean of {len(found)} seeds")
            if side != args.sides[0]:
                # Of the mean over the seeds of each prompt's accuracy: the scores of a pair are compared seed by seed.
                both = [accuracy_difference(pairs, of[args.sides[0]]["scores"], of[side]["scores"]) for of in found]
                print(f"  {args.sides[0]} minus {side}, by seed: {'; '.join(map(str, both))}")
        results[source]["seeds"] = [{side: {k: v for k, v in of[side].items() if k != "scores"} for side in args.sides}
                                    for of in found]  # fmt: skip
    write_json(args.out / "results.json", results)
    return results


if __name__ == "__main__":
    main()
