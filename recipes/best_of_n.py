"""Best of n: draw n completions of every prompt and keep the one that the reward model scores highest.

    prefopt best-of-n --model_name_or_path sft --reward_model_name_or_path rm --dataset_name prompts.jsonl --n 16 \\
                      --output best.jsonl

The baseline that PPO is compared with, and that trains nothing (Stiennon et al. 2020, arXiv:2009.01325; Nakano et al.
2021, arXiv:2112.09332). Each output row keeps the input row's fields, except those about other completions, and adds
`completion`, `truncated`, `ids`, `score` and the `mean_score` of all n; with `--keep_samples true` all n `completions`,
their `scores`, and which are cut (`completions_truncated`), too: rows that `prefopt data convert` makes rankings of. A
killed run resumes where it was. The file is a "model" of `prefopt eval`: `models: {sft: sft, best_of_16: best.jsonl}`.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from trl import ModelConfig

from prefopt.errors import UserError
from prefopt.inference import processes
from prefopt.inference.generate import Completion, batches_by_length, derived_seed, prompt_ids
from prefopt.inference.journal import Journal, source_state
from prefopt.inference.scoring import score_samples
from prefopt.models.checkpoints import load_classifier
from prefopt.rankings.tokens import template_kwargs
from prefopt.recipes.common.arguments import parse, setting
from prefopt.recipes.common.models import model_init_kwargs, policy_engine
from prefopt.recipes.common.progress import counting
from prefopt.recipes.sample import (
    SamplingArguments,
    check_sampling,
    load_prompts,
    sampling_inputs,
    without_completions,
    written_rows,
)
from prefopt.statistics.intervals import mean_estimate
from prefopt.statistics.overoptimization import best_of_n_distance

logger = logging.getLogger(__name__)

Draw = Callable[[list[dict[str, Any]], int], tuple[list[list[Completion]], list[list[float]]]]


@dataclass
class BestOfNArguments(SamplingArguments):
    """How many to choose from, and who chooses."""

    reward_model_name_or_path: str | None = setting(
        None, "Reward model: full checkpoint or LoRA adapter, folder or Hub id."
    )
    n: int = setting(16, "Completions per prompt, of which one is kept.")
    keep_samples: bool = setting(False, "Write all completions and their scores as well.")


def best_rows(
    rows: Dataset,
    batches: Sequence[Sequence[int]],
    draw: Draw,
    *,
    journal: Journal,
    seed: int,
    keep_samples: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """The rows with the completion of the highest score, the first of several.

    `draw(rows, seed)` gives completions and scores of each row's prompt; those of a batch of rows are an entry of the journal.
    """

    def best(number: int, batch: Sequence[int]) -> list[dict[str, Any]]:
        drawn = draw([rows[i] for i in batch], derived_seed(seed, number))
        return [_best(*of_prompt, keep_samples) for of_prompt in zip(*drawn, strict=True)]

    chosen: dict[int, dict[str, Any]] = {}
    entries = journal.entries(len(batches), lambda number: best(number, batches[number]))
    for batch, entry in zip(batches, entries, strict=True):
        chosen |= zip(batch, entry, strict=True)
        progress(len(chosen), len(rows))
    return [without_completions(row) | chosen[i] for i, row in enumerate(rows)]


def _best(samples: Sequence[Completion], scores: Sequence[float], keep_samples: bool) -> dict[str, Any]:
    best = scores.index(max(scores))
    chosen = {
        "completion": samples[best].text,
        "truncated": samples[best].truncated,
        "ids": samples[best].ids,
        "score": scores[best],
        "mean_score": sum(scores) / len(scores),
    }
    if keep_samples:
        chosen |= {
            "completions": [completion.text for completion in samples],
            "completions_truncated": [completion.truncated for completion in samples],
            "scores": scores,
        }
    return chosen


def main(argv: list[str] | None = None) -> None:
    """Draw, score, and keep the best."""
    args, model_args = parse((BestOfNArguments, ModelConfig), argv, "prefopt best-of-n", __doc__)
    init_kwargs = model_init_kwargs(model_args)
    check_sampling(args)
    if args.n < 1 or (args.temperature == 0 and args.n > 1):
        raise UserError(f"n is {args.n} at temperature {args.temperature:g}; expected 1 or more, and 1 if greedy")
    if not args.reward_model_name_or_path:
        raise UserError("reward_model_name_or_path is required: the output of `prefopt reward`")
    rows, tokenizer = load_prompts(args, model_args, args.reward_model_name_or_path)
    inputs = sampling_inputs(args, model_args, rows) | {
        "reward_model": source_state(args.reward_model_name_or_path),
        "n": [args.n, args.keep_samples],
    }

    def choose(journal: Journal) -> list[dict[str, Any]]:
        lengths = [len(prompt_ids(tokenizer, row["prompt"], **template_kwargs(row))) for row in rows]
        batches = batches_by_length(lengths, max(1, args.batch_size // args.n))
        draw = _drawer(args, model_args, init_kwargs, tokenizer)
        with counting(f"best of {args.n}") as progress:
            return best_rows(
                rows, batches, draw, journal=journal, seed=args.seed, keep_samples=args.keep_samples, progress=progress
            )

    rows_of_all = written_rows(args, inputs, choose)
    if processes.is_main():
        _report(rows_of_all, args.n)


def _drawer(args: BestOfNArguments, model_args: ModelConfig, init_kwargs: dict, tokenizer: Any) -> Draw:
    """Draws from the policy and asks the reward model."""
    # Before the engine: vLLM takes what memory is left.
    reward_model, reward_tokenizer = load_classifier(
        args.reward_model_name_or_path, load_in_4bit=model_args.load_in_4bit, dtype=model_args.dtype
    )
    engine = policy_engine(args.engine, model_args, init_kwargs, tokenizer)

    def draw(rows: list[dict[str, Any]], seed: int) -> tuple[list[list[Completion]], list[list[float]]]:
        samples = engine.generate(
            [row["prompt"] for row in rows],
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            num_return=args.n,
            batch_size=args.batch_size,
            seed=seed,
            of_rows=[template_kwargs(row) for row in rows],
        )
        flat = [completion for completions in samples for completion in completions]
        repeated = [row for row in rows for _ in range(args.n)]
        prompts, of_rows = [row["prompt"] for row in repeated], [template_kwargs(row) for row in repeated]
        # A server may not say which ids it has sampled.
        known = tokenizer if all(completion.ids for completion in flat) else None
        scores = score_samples(reward_model, reward_tokenizer, known, prompts, flat, args.batch_size, of_rows)
        return samples, [scores[i : i + args.n] for i in range(0, len(scores), args.n)]

    return draw


def _report(rows: list[dict[str, Any]], n: int) -> None:
    """What the choice gained, and how far it went: KL(best of n || policy) <= log n - (n - 1) / n nats.

    (Stiennon et al. 2020, appendix G.3; an upper bound by Beirami et al. 2024, arXiv:2401.01879.)
    """
    if silent := sum(not row["completion"].strip() for row in rows):
        logger.warning("%d of %d best completions say nothing", silent, len(rows))
    best, mean = (mean_estimate([row[name] for row in rows]) for name in ("score", "mean_score"))
    print(
        f"{len(rows)} prompts: score {best.value:.3f} [{best.ci_low:.3f}, {best.ci_high:.3f}] of the best of {n}, "
        f"{mean.value:.3f} on average; KL to the policy at most {float(best_of_n_distance(n)) ** 2:.3f} nats"
    )
