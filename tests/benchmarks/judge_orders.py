"""A language model as the judge of K answers at once against all of their pairs in both orders: agreement and calls.

    python tests/benchmarks/judge_orders.py --model SmolLM2-135M-Instruct --rankings ranked_val.jsonl --rows 40

Of every ranking by people that has `--k` answers or more, `--k` drawn ones are judged at once (`OrderingJudge` by letters,
in 1, 2 and 4 orders) and pair by pair (`LanguageModelJudge`). Agreement is the share of the pairs that people rank
strictly on which the judge says the same, its ties counting half: mean over prompts, of the differences paired by prompt.
The last line is JSON.
"""

import argparse
import json
import random
import tempfile
from itertools import combinations
from pathlib import Path

import numpy as np

from prefopt.evaluation.judges.language_model import LanguageModelJudge
from prefopt.evaluation.judges.ordering import OrderingJudge, earlier_wins
from prefopt.inference.engines import Transformers
from prefopt.inference.jsonl import read_jsonl
from prefopt.models.loading import load_language_model
from prefopt.statistics.intervals import Estimate, mean_estimate, paired_difference


def chosen_rows(path: str, source: str | None, k: int, count: int) -> list[dict]:
    """`count` rankings of k answers each, drawn with seed 0; no row in which all of them tie."""
    generator = random.Random(0)
    rows = []
    for row in read_jsonl(path):
        if len(row["completions"]) >= k and source in (None, row.get("source")):
            picked = generator.sample(range(len(row["completions"])), k)
            ranks = [row["ranks"][i] for i in picked]
            if len(set(ranks)) > 1:
                rows.append(
                    {"prompt": row["prompt"], "completions": [row["completions"][i] for i in picked], "ranks": ranks}
                )
    generator.shuffle(rows)
    return rows[:count]


def agreement(ranks: list[int], wins: np.ndarray) -> float:
    """Share of the strictly ranked pairs on which `wins[i, j]` (1: i is better, .5: tie) says what the ranks say.

    >>> agreement([1, 2, 2], np.array([[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]]))
    0.5
    """
    pairs = [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]
    return float(np.mean([wins[pair] for pair in pairs]))


def wins_of(scores: np.ndarray) -> np.ndarray:
    return (1 + np.sign(np.subtract.outer(scores, scores))) / 2


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rankings", required=True, help="JSONL of prompt, completions, ranks")
    parser.add_argument("--source", help="only rows of this `source`")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=8)
    args = parser.parse_args(argv)
    rows = chosen_rows(args.rankings, args.source, args.k, args.rows)
    engine = Transformers(*load_language_model(args.model))
    found: dict[str, tuple[list[float], int, Estimate]] = {}
    for orders in (1, 2, 4):
        judge = OrderingJudge(engine, "letters", orders=orders, batch_size=args.batch_size)
        judged = judge.judge(rows, range(len(rows)))
        # A row that is too long for the model says nothing, which is half of the pairs.
        scores = [np.mean(one["scores"] or [[0.0] * args.k], axis=0) for one in judged]
        shown = [earlier_wins(one["scores"], one["places"]) for one in judged if one["scores"]]
        agreed = [agreement(row["ranks"], wins_of(of)) for row, of in zip(rows, scores, strict=True)]
        found[f"at once, {orders} orders"] = (agreed, sum(one["calls"] for one in judged), mean_estimate(shown))
    names = [str(i) for i in range(args.k)]
    pairs = list(combinations(names, 2))
    answers = {
        name: [
            {"id": number, "decoding": "sampled", "prompt": row["prompt"], "completion": row["completions"][int(name)]}
            for number, row in enumerate(rows)
        ]
        for name in names
    }
    with tempfile.TemporaryDirectory() as folder:
        by_pairs = LanguageModelJudge(lambda: engine, batch_size=args.batch_size, folder=Path(folder))
        verdicts = by_pairs.judgements(answers, pairs)
    wins = np.full((len(rows), args.k, args.k), 0.5)
    for verdict in verdicts:
        i, j = int(verdict["a"]), int(verdict["b"])
        wins[verdict["id"], i, j] = verdict["preference"]
        wins[verdict["id"], j, i] = 1 - verdict["preference"]
    agreed = [agreement(row["ranks"], of) for row, of in zip(rows, wins, strict=True)]
    found["all pairs, both orders"] = (agreed, 2 * len(verdicts), mean_estimate([v["first"] for v in verdicts]))
    result = {"model": args.model, "rows": len(rows), "k": args.k}
    for name, (share, calls, first) in found.items():
        less = paired_difference(share, agreed)
        print(
            f"{name:<24} agreement {mean_estimate(share)}, minus all pairs {less}; {calls} calls; prefers first {first}"
        )
        result[name] = {"agreement": mean_estimate(share).value, "difference": less.value, "calls": calls}
        result[name]["prefers_first"] = first.value
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
