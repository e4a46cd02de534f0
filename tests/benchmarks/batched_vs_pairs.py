"""One pass over comparisons batched per prompt against the same comparisons as shuffled pairs (InstructGPT, 3.5).

    python tests/benchmarks/batched_vs_pairs.py --model runs/demo/sft-epochs \
        --train runs/demo/data/rankings_rm_train_labelers.jsonl \
        --validation runs/demo/data/rankings_test_heldout_labelers.jsonl

Both trainers start from the same weights, take the same number of optimizer steps at the same learning rate, and see
the same comparisons once: RankedRewardTrainer a batch of prompts a step, TRL's RewardTrainer as many shuffled pairs a
step as that batch holds on average. Printed for every seed: validation accuracy over strict pairs and log loss per
pair (nats), with 95 % intervals over prompts, and the wall time of both in the same process.
"""

import argparse
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from prefopt import RankedRewardConfig, RankedRewardTrainer
from prefopt.comparisons import prepare_comparisons, to_preferences
from prefopt.evaluation.generate import read_jsonl
from prefopt.evaluation.reward import score_rows
from prefopt.metrics import bootstrap_over_prompts, pair_accuracy
from prefopt.shared_base import init_score_head


def log_loss(scores: list[list[float]], ranks: list[list[int]]):
    """Mean of -log sigmoid(r_w - r_l) over all strict pairs, interval over prompts."""
    sums, counts = [], []
    for row_scores, row_ranks in zip(scores, ranks, strict=True):
        margins = [
            row_scores[i] - row_scores[j]
            for i in range(len(row_ranks))
            for j in range(len(row_ranks))
            if row_ranks[i] < row_ranks[j]
        ]
        sums.append(-F.logsigmoid(torch.tensor(margins, dtype=torch.float64)).sum().item())
        counts.append(len(margins))
    sums, counts = np.array(sums), np.array(counts, dtype=float)
    return bootstrap_over_prompts(lambda s, c, axis: s.sum(axis) / c.sum(axis), sums, counts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--prompts_per_step", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train = prepare_comparisons(Dataset.from_list(read_jsonl(args.train)), source="train")
    validation = prepare_comparisons(Dataset.from_list(read_jsonl(args.validation)), source="validation")
    pairs = Dataset.from_list([pair for row in train for pair in to_preferences(row)])
    steps = -(-len(train) // args.prompts_per_step)
    pairs_per_step = -(-len(pairs) // steps)
    print(f"{len(train)} prompts, {len(pairs)} pairs, {steps} steps of {args.prompts_per_step} prompts "
          f"or {pairs_per_step} pairs")  # fmt: skip
    for seed in args.seeds:
        shared = {
            "learning_rate": args.learning_rate,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            "max_steps": steps,
            "seed": seed,
            "bf16": False,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "output_dir": tempfile.mkdtemp(),
            "max_length": None,
        }
        runs = {
            "batched per prompt": (RankedRewardTrainer, RankedRewardConfig, train, args.prompts_per_step),
            "shuffled pairs": (RewardTrainer, RewardConfig, pairs, pairs_per_step),
        }
        for name, (trainer_class, config_class, rows, batch) in runs.items():
            torch.manual_seed(seed)
            model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1)
            init_score_head(model)
            trainer = trainer_class(
                model=model,
                args=config_class(per_device_train_batch_size=batch, **shared),
                train_dataset=rows,
                processing_class=tokenizer,
            )
            start = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - start
            scores = score_rows(model, tokenizer, list(validation), batch_size=256)
            ranks = [list(row) for row in validation["ranks"]]
            accuracy, loss = pair_accuracy(scores, ranks), log_loss(scores, ranks)
            print(f"seed {seed}  {name:<20} accuracy {accuracy.value:.4f} [{accuracy.ci_low:.4f}, "
                  f"{accuracy.ci_high:.4f}]  log loss {loss.value:.4f} [{loss.ci_low:.4f}, {loss.ci_high:.4f}]  "
                  f"{seconds:.1f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
