"""How well a reward model orders what labelers ranked, and what the gold reward itself reaches on the same pairs."""

from collections.abc import Callable, Mapping, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.comparisons import build_ids
from prefopt.evaluation.batching import batches_by_length, pad
from prefopt.evaluation.generate import Completion, prompt_ids
from prefopt.metrics import Estimate, pair_accuracy
from prefopt.shared_base import sequence_scores

Prompt = str | list[dict]


def reward_accuracy(
    reward_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows_by_group: Mapping[str, Sequence[Mapping]],
    batch_size: int = 64,
) -> dict[str, Estimate]:
    """Share of strictly ranked pairs that the reward model orders as the labelers did, per labeler group.

    accuracy = sum over pairs [r(x, y_w) > r(x, y_l)] / pairs, an equal score counting half; the interval resamples
    prompts, because the pairs of one prompt are correlated (InstructGPT, appendix C.2 and E.2).

    Args:
        rows_by_group: ranked comparisons (`prompt`, `completions`, `ranks`) of every group of labelers.

    Example:
        >>> reward_accuracy(model, tokenizer, {"train_labelers": rows})["train_labelers"].value  # doctest: +SKIP
        0.71
    """
    return {
        group: pair_accuracy(
            score_rows(reward_model, tokenizer, rows, batch_size), [r["ranks"] for r in rows]
        )
        for group, rows in rows_by_group.items()
    }


def gold_accuracy(
    gold: Callable[[Prompt, object], object], rows_by_group: Mapping[str, Sequence[Mapping]]
) -> dict[str, Estimate]:
    """The ceiling: the same accuracy for the gold reward, which noisy labelers follow only in part."""
    return {
        group: pair_accuracy(
            [[float(gold(r["prompt"], y).total) for y in r["completions"]] for r in rows],
            [r["ranks"] for r in rows],
        )
        for group, rows in rows_by_group.items()
    }


def score_rows(
    reward_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping],
    batch_size: int = 64,
) -> list[list[float]]:
    """Scores of all completions of every row, from the ids that reward-model training would build."""
    prompts, completions, truncated = [], [], []
    for row in rows:
        prompts += [row["prompt"]] * len(row["completions"])
        completions += row["completions"]
        truncated += row.get("truncated") or [False] * len(row["completions"])
    scores = iter(score_texts(reward_model, tokenizer, prompts, completions, truncated, batch_size))
    return [[next(scores) for _ in row["completions"]] for row in rows]


def score_texts(
    reward_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    completions: Sequence[Prompt],
    truncated: Sequence[bool] | None = None,
    batch_size: int = 64,
) -> list[float]:
    """Scores of written completions, one per prompt, from the ids that reward-model training would build.

    A completion that is `truncated` (cut at a length limit) gets no end token.
    """
    truncated = [False] * len(completions) if truncated is None else truncated
    ids = []
    for prompt, completion, cut in zip(prompts, completions, truncated, strict=True):
        x, y = build_ids(tokenizer, prompt, completion, truncated=cut)
        ids.append(x + y)
    return _score_ids(reward_model, ids, batch_size)


def score_completions(
    reward_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    batch_size: int = 64,
) -> list[float]:
    """Scores of sampled completions from the ids that were sampled, never from text tokenised again."""
    ids = [
        prompt_ids(tokenizer, prompt) + list(completion.ids)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return _score_ids(reward_model, ids, batch_size)


@torch.no_grad()
def _score_ids(reward_model: PreTrainedModel, ids: list[list[int]], batch_size: int) -> list[float]:
    pad_id = reward_model.config.pad_token_id or 0  # masked, so any id will do
    longest = reward_model.config.max_position_embeddings
    for number, row in enumerate(ids):
        if len(row) > longest:
            raise ValueError(
                f"completion {number}: {len(row)} tokens, the reward model has {longest} positions"
            )
    training = reward_model.training
    reward_model.eval()
    scores = [0.0] * len(ids)
    try:
        for batch in batches_by_length([len(row) for row in ids], batch_size):
            input_ids, attention_mask = pad([ids[i] for i in batch], pad_id, reward_model.device)
            for i, score in zip(
                batch, sequence_scores(reward_model, input_ids, attention_mask).tolist(), strict=True
            ):
                scores[i] = score
    finally:
        reward_model.train(training)
    return scores
