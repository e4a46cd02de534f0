"""Scores of a reward model: of ranked rows, of written completions, and of samples by their ids."""

import math
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.errors import UserError
from prefopt.inference.generate import Completion, pad, prompt_ids
from prefopt.models.prefix import sharing as prefix_sharing
from prefopt.models.reward import append_reward_token, sequence_scores
from prefopt.rankings.tokens import build_ids

Prompt = str | list[dict]


def score_rows(
    reward_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping],
    batch_size: int = 64,
) -> list[list[float]]:
    """Scores of all completions of every row, from the ids that reward-model training would build.

    Completions of a row are forwarded together, what they share once where the model allows it.
    """
    ids, numbers = [], []
    for number, row in enumerate(rows):
        cuts = row.get("truncated") or [False] * len(row["completions"])
        for completion, cut in zip(row["completions"], cuts, strict=True):
            x, y = build_ids(tokenizer, row["prompt"], completion, truncated=cut)
            ids.append(x + y)
            numbers.append(number)
    scores = iter(_score_ids(reward_model, ids, batch_size, numbers))
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
    """Scores of sampled completions from the ids that were sampled, never from text tokenized again."""
    ids = [
        prompt_ids(tokenizer, prompt) + list(completion.ids)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return _score_ids(reward_model, ids, batch_size)


def score_samples(
    reward_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    policy_tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    batch_size: int = 64,
) -> list[float]:
    """Scores of a policy's samples: of the ids as they were sampled where the reward model has the policy's tokens, else,
    and where the policy's tokenizer is not known, of the text.

    Raises:
        UserError: a score is not finite.
    """
    known = tokenizer.get_vocab()
    if policy_tokenizer is not None and all(
        known.get(token) == i for token, i in policy_tokenizer.get_vocab().items()
    ):
        scores = score_completions(reward_model, tokenizer, prompts, completions, batch_size)
    else:
        texts: list[Prompt] = [
            completion.text
            if isinstance(prompt, str)
            else [{"role": "assistant", "content": completion.text}]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        cuts = [completion.truncated for completion in completions]
        scores = score_texts(reward_model, tokenizer, prompts, texts, cuts, batch_size)
    if not all(map(math.isfinite, scores)):
        raise UserError("the reward model's scores are not finite: its weights are broken")
    return scores


@torch.no_grad()
def _score_ids(
    reward_model: PreTrainedModel,
    ids: list[list[int]],
    batch_size: int,
    prompts: Sequence[int] | None = None,
) -> list[float]:
    """Scores of rows of ids; rows with the same number in `prompts` are completions of one prompt."""
    pad_id = reward_model.config.pad_token_id or 0  # masked, so any id will do
    longest = reward_model.config.max_position_embeddings
    for number, row in enumerate(ids):
        if len(row) > longest:
            raise UserError(
                f"completion {number}: {len(row)} tokens, the reward model has {longest} positions"
            )
    shares = prompts is not None and prefix_sharing.why_not(reward_model) is None
    prompts = range(len(ids)) if prompts is None else prompts
    widths: dict[int, int] = {}
    for prompt, row in zip(prompts, ids, strict=True):
        widths[prompt] = max(widths.get(prompt, 0), len(row))
    order = sorted(range(len(ids)), key=lambda i: (-widths[prompts[i]], prompts[i]))
    was_training, was_sharing = reward_model.training, prefix_sharing.is_enabled(reward_model)
    reward_model.eval()
    if shares:
        prefix_sharing.enable(reward_model)
    scores = [0.0] * len(ids)
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            input_ids, attention_mask = pad([ids[i] for i in batch], pad_id, reward_model.device)
            input_ids, attention_mask = append_reward_token(reward_model, input_ids, attention_mask)
            numbers = {prompts[i]: n for n, i in reversed([*enumerate(batch)])}  # in the order of the batch
            groups = torch.tensor([numbers[prompts[i]] for i in batch])
            packed = prefix_sharing.plan(reward_model, input_ids, attention_mask, groups)
            found = sequence_scores(reward_model, input_ids, attention_mask, packed)
            for i, score in zip(batch, found.tolist(), strict=True):
                scores[i] = score
    finally:
        reward_model.train(was_training)
        if not was_sharing:
            prefix_sharing.disable(reward_model)
    return scores
