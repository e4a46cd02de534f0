"""All K completions of a prompt at once against the same comparisons as shuffled pairs (InstructGPT, section 3.5).

    python tests/benchmarks/batched_vs_pairs.py --method dpo --match tokens seconds --model runs/demo/sft \
        --train runs/demo/data/rankings_rm_train_labelers.jsonl \
        --validation runs/demo/data/rankings_test_heldout_labelers.jsonl

"all K" is RankedRewardTrainer or RankedDPOTrainer with prefix sharing, a batch of prompts a step. "pairs" is TRL's
RewardTrainer or DPOTrainer on every strict pair of the same rankings as a row of its own, all shuffled; of a prompt
with K untied completions each is forwarded K - 1 times a pass. Both start from the same weights, with the same
optimizer and learning rate. "all K" passes over the rankings `--epochs` times; "pairs" then trains until it has spent
as much of what `--match` says, once for each:

    steps        optimizer steps
    tokens       tokens forwarded through the backbone, padding not counted: of rows all of theirs, of packed rows a
                 shared prefix once; for DPO those of the policy and of the reference
    positions    the same with padding, all that input_ids hold
    seconds      wall time of train(), the first step's self-check included, model loading and tokenization not
    cpu_seconds  CPU time of the process in train(): the wall time of a machine that does nothing else (no GPU)

Every pass is in a new order, and a budget may end within a pass. The learning rate goes up over the first 5 % of the
budget and down to a tenth of its peak along a cosine. A step of "pairs" holds as many pairs as a step of "all K" on
average, or `--pairs_per_step`; several numbers make several runs.

Printed for every seed: what was spent, accuracy over the strict pairs of the validation rows and log loss per pair
(nats), with 95 % intervals over prompts; then both averaged over seeds, and the difference to "all K".
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from math import cos, inf, pi
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from prefopt import RankedDPOConfig, RankedDPOTrainer, RankedRewardConfig, RankedRewardTrainer
from prefopt.inference.jsonl import read_jsonl
from prefopt.inference.scoring import score_rows
from prefopt.models.passes import backbone
from prefopt.models.reward import init_score_head
from prefopt.rankings.dataset import prepare_comparisons, tokenize_comparisons
from prefopt.rankings.row import to_preferences
from prefopt.statistics.intervals import ratio_of_sums
from prefopt.statistics.rankings import negative_log_likelihoods, pairs_right

TRAINERS = {
    ("reward", "all K"): (RankedRewardTrainer, RankedRewardConfig),
    ("reward", "pairs"): (RewardTrainer, RewardConfig),
    ("dpo", "all K"): (RankedDPOTrainer, RankedDPOConfig),
    ("dpo", "pairs"): (DPOTrainer, DPOConfig),
}
MATCHES = ("steps", "tokens", "positions", "seconds", "cpu_seconds")


class Budget(TrainerCallback):
    """Meters a run, sets the learning rate by the share of the budget that is spent, and stops when it is."""

    def __init__(self, match: str, limit: float, learning_rate: float):
        self.match, self.limit, self.learning_rate = match, limit, learning_rate
        self.seconds = inf  # at the latest
        self.spent = dict.fromkeys(MATCHES, 0)
        self.is_training = False

    def watch(self, model: nn.Module) -> None:
        """Count what enters the backbone of the model during training."""

        def count(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if self.is_training:
                ids, mask = args[0] if args else kwargs["input_ids"], kwargs.get("attention_mask")
                self.spent["positions"] += ids.numel()
                self.spent["tokens"] += ids.numel() if mask is None else int(mask.sum())

        backbone(model).register_forward_pre_hook(count, with_kwargs=True)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.is_training, self.start = True, (time.perf_counter(), time.process_time())

    def on_step_begin(self, args: Any, state: Any, control: Any, *, optimizer: Any, **kwargs: Any) -> None:
        share = min(1.0, max(self.spent[self.match] / self.limit, self.spent["seconds"] / self.seconds))
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate * min(1, share / 0.05 + 0.02) * (0.55 + 0.45 * cos(pi * share))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.spent["steps"] += 1
        self.spent["seconds"] = time.perf_counter() - self.start[0]
        self.spent["cpu_seconds"] = time.process_time() - self.start[1]
        control.should_training_stop = self.spent[self.match] >= self.limit or self.spent["seconds"] >= self.seconds

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.is_training = False


def train_and_score(
    args: argparse.Namespace, side: str, rows: Dataset, batch: int, budget: Budget, seed: int, test: Dataset
) -> list[list[float]]:
    """Train one side from the start model until the budget is spent; scores of the validation rows."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    shared = {
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": tempfile.mkdtemp(),
        "max_length": None,  # what is too long was dropped from both sides
        **({"beta": args.beta} if args.method == "dpo" else {}),
    }
    trainer_class, config_class = TRAINERS[args.method, side]
    torch.manual_seed(seed)
    model = args.model
    if args.method == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, dtype="float32")
        init_score_head(model)
    config = config_class(
        per_device_train_batch_size=batch,
        max_steps=10**9,  # the budget ends it
        lr_scheduler_type="constant",  # the budget sets it
        logging_strategy="no",
        seed=seed,
        **({"model_init_kwargs": {"dtype": "float32"}} if args.method == "dpo" else {}),
        **shared,
    )
    trainer = trainer_class(
        model=model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[budget]
    )
    for watched in (trainer.model, getattr(trainer, "ref_model", None)):
        if watched is not None:
            budget.watch(watched)
    trainer.train()
    if args.method == "reward":
        return score_rows(trainer.model, tokenizer, list(test), batch_size=256)
    scorer = RankedDPOTrainer(
        model=trainer.model,
        ref_model=trainer.ref_model,
        args=RankedDPOConfig(**shared, per_device_eval_batch_size=16),
        train_dataset=test,
        processing_class=tokenizer,
    )
    prompts = [row["prompt"] for row in test for _ in row["completions"]]
    scores = iter(scorer.score(prompts, [text for row in test for text in row["completions"]]))
    return [[next(scores) for _ in row["completions"]] for row in test]


def sums_over_pairs(scores: Sequence[Sequence[float]], ranks: Sequence[Sequence[int]]) -> np.ndarray:
    """Of every prompt, over its strict pairs: how many are ordered right, their log loss, how many there are."""
    sums = []
    for s, r in zip(scores, ranks, strict=True):
        leads = np.array([s[i] - s[j] for i in range(len(r)) for j in range(len(r)) if r[i] < r[j]])
        sums.append([pairs_right(leads).sum(), negative_log_likelihoods(leads).sum(), len(leads)])
    return np.array(sums)


def estimates(sums: np.ndarray, num_pairs: np.ndarray, sign: str = "") -> str:
    accuracy, loss = (ratio_of_sums(column, num_pairs) for column in sums[:, :2].T)
    return "  ".join(
        f"{name} {x.value:{sign}.4f} [{x.ci_low:{sign}.4f}, {x.ci_high:{sign}.4f}]"
        for name, x in (("accuracy", accuracy), ("log loss", loss))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("reward", "dpo"), default="reward")
    parser.add_argument("--match", choices=MATCHES, nargs="+", default=["steps"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--prompts_per_step", type=int, default=32)
    parser.add_argument("--pairs_per_step", type=int, nargs="+", help="default: as many as all K compares")
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--pairs_learning_rate", type=float, help="default: that of all K")
    parser.add_argument("--beta", type=float, default=0.1, help="of DPO")
    parser.add_argument("--max_length", type=int, help="drop training completions with more tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    longest = getattr(AutoConfig.from_pretrained(args.model), "max_position_embeddings", None)
    rows = {}
    for source, limit in (("train", args.max_length or longest), ("validation", longest)):
        rows[source] = prepare_comparisons(Dataset.from_list(read_jsonl(getattr(args, source))), source=source)
        rows[source] = tokenize_comparisons(rows[source], tokenizer, max_length=limit, source=source)
    train, test = rows["train"], rows["validation"]
    pairs = Dataset.from_list([pair for row in train for pair in to_preferences(row)])
    steps = -(-len(train) // args.prompts_per_step)
    compared = -(-len(pairs) // steps)
    print(f"{args.method}: {len(train)} prompts, {len(pairs)} pairs; a step has {args.prompts_per_step} prompts with "
          f"{compared} pairs on average; {steps} steps a pass", flush=True)  # fmt: skip
    found: dict[str, np.ndarray] = {}

    def run(seed: int, name: str, side: str, rows: Dataset, batch: int, budget: Budget) -> None:
        scores = train_and_score(args, side, rows, batch, budget, seed, test)
        sums = sums_over_pairs(scores, test["ranks"][:])
        found[name] = found.get(name, 0) + sums / len(args.seeds)
        spent = ", ".join(f"{n:.{0 if key in MATCHES[:3] else 1}f} {key}" for key, n in budget.spent.items())
        print(f"seed {seed}  {name:<32} {estimates(sums, sums[:, 2])}  {spent}, "
              f"{budget.spent['steps'] * batch / len(rows):.2f} passes", flush=True)  # fmt: skip

    for seed in args.seeds:
        whole = Budget("steps", round(steps * args.epochs), args.learning_rate)
        run(seed, "all K", "all K", train, args.prompts_per_step, whole)
        for match in args.match:
            for batch in args.pairs_per_step or [compared]:
                budget = Budget(match, whole.spent[match], args.pairs_learning_rate or args.learning_rate)
                run(seed, f"pairs, {batch} a step, equal {match}", "pairs", pairs, batch, budget)
    print(f"mean of {len(args.seeds)} seeds; intervals over prompts, seeds being averaged")
    for name, sums in found.items():
        print(f"{name:<40} {estimates(sums, sums[:, 2])}")
    for name, sums in list(found.items())[1:]:
        print(f"{'all K - ' + name:<40} {estimates(found['all K'] - sums, sums[:, 2], '+')}")


if __name__ == "__main__":
    main()
