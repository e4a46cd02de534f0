"""Scores of a reward model: of ranked rows, of written completions, and of samples by their ids.

A row that is longer than the model has positions, or whose score is not finite, is an error that names it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.errors import UserError
from prefopt.inference.generate import Completion, all_prompt_ids, evaluating, pad
from prefopt.models.passes import loaded_from, max_positions
from prefopt.models.prefix import sharing as prefix_sharing
from prefopt.models.reward import append_reward_token, sequence_scores
from prefopt.models.roles import AdapterScorer
from prefopt.rankings.tokens import build_ids, template_kwargs

Prompt = str | list[dict]


def score_rows(
    reward_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping],
    batch_size: int = 64,
    numbers: Sequence[int] | None = None,
) -> list[list[float]]:
    """Scores of all completions of every row, from the ids that reward-model training would build.

    Completions of a row are forwarded together, what they share once where the model allows it. `numbers` are those of the
    rows in their file, for errors.
    """
    ids, of_rows, names = [], [], []
    for number, row in zip(range(len(rows)) if numbers is None else numbers, rows, strict=True):
        cuts = row.get("truncated") or [False] * len(row["completions"])
        kwargs, both = template_kwargs(row), zip(row["completions"], cuts, strict=True)
        try:
            ids += [_joint_ids(tokenizer, row["prompt"], *one, **kwargs) for one in both]
        except UserError as error:
            raise UserError(f"row {number}: {error}") from error
        of_rows += [number] * len(row["completions"])
        names += [f"row {number}, completion {i}" for i in range(len(row["completions"]))]
    scores = iter(_checked_scores(reward_model, ids, batch_size, of_rows, names))
    return [[next(scores) for _ in row["completions"]] for row in rows]


def score_texts(
    reward_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    completions: Sequence[Prompt],
    truncated: Sequence[bool] | None = None,
    batch_size: int = 64,
    of_rows: Sequence[Mapping] | None = None,
) -> list[float]:
    """Scores of written completions, one per prompt, from the ids that reward-model training would build.

    A completion that is `truncated` (cut at a length limit) gets no end token. `of_rows` is what each prompt's row gives the
    chat template (`template_kwargs`), here and below.
    """
    truncated = [False] * len(completions) if truncated is None else truncated
    of_rows = [{}] * len(completions) if of_rows is None else of_rows
    rows = zip(prompts, completions, truncated, of_rows, strict=True)
    ids = [_joint_ids(tokenizer, *row, **kwargs) for *row, kwargs in rows]
    return _checked_scores(reward_model, ids, batch_size)


def _joint_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Prompt, truncated: bool, **kwargs: Any
) -> list[int]:
    prompt_part, completion_part = build_ids(tokenizer, prompt, completion, truncated=truncated, **kwargs)
    return prompt_part + completion_part


def score_completions(
    reward_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    batch_size: int = 64,
    of_rows: Sequence[Mapping] | None = None,
) -> list[float]:
    """Scores of sampled completions from the ids that were sampled, never from text tokenized again."""
    of_prompts = all_prompt_ids(tokenizer, prompts, of_rows)
    ids = [x + list(completion.ids) for x, completion in zip(of_prompts, completions, strict=True)]
    return _checked_scores(reward_model, ids, batch_size)


def score_samples(
    reward_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    policy_tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    batch_size: int = 64,
    of_rows: Sequence[Mapping] | None = None,
) -> list[float]:
    """Scores of a policy's samples: of the ids as they were sampled where the reward model has the policy's tokens, else,
    and where the policy's tokenizer is not known, of the text.
    """
    known = tokenizer.get_vocab()
    # A pad token, which a tokenizer may have been given, is in no text.
    if policy_tokenizer is not None and all(
        known.get(token) == i
        for token, i in policy_tokenizer.get_vocab().items()
        if token != policy_tokenizer.pad_token
    ):
        return score_completions(reward_model, tokenizer, prompts, completions, batch_size, of_rows)
    texts: list[Prompt] = [
        completion.text if isinstance(prompt, str) else [{"role": "assistant", "content": completion.text}]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    cuts = [completion.truncated for completion in completions]
    return score_texts(reward_model, tokenizer, prompts, texts, cuts, batch_size, of_rows)


def _checked_scores(
    reward_model: PreTrainedModel,
    ids: Sequence[list[int]],
    batch_size: int,
    prompts: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> list[float]:
    """`score_ids` of rows that must all have a score; `names` is what errors call them."""
    names = [f"completion {number}" for number in range(len(ids))] if names is None else names
    longest = max_positions(reward_model.config)
    extra = int(getattr(reward_model.config, "reward_token_id", None) is not None)
    for name, length in zip(names, (len(row) + extra for row in ids), strict=True):
        if longest is not None and length > longest:
            raise UserError(
                f"{name}: {length} tokens, prompt included, the reward model has {longest} positions; shorten it or leave it out"
            )
    scores = score_ids(reward_model, ids, batch_size, prompts)
    for name, score in zip(names, scores, strict=True):
        if not math.isfinite(score):
            raise UserError(
                f"{name}: the reward model's scores are not finite: its weights are broken{loaded_from(reward_model)}"
            )
    return scores


@torch.no_grad()
def score_ids(
    reward_model: nn.Module,
    ids: Sequence[list[int]],
    batch_size: int,
    prompts: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> list[float]:
    """Scores of rows of token ids, `batch_size` at a time, the longest first: the one scorer, also of rollouts.

    What is not read is not computed: prefixes that completions of a prompt share run once where the model allows it and
    it is faster; of other batches, the last layer's MLP sees nothing before the end of the shortest row.

    Args:
        reward_model: full, PEFT, or a role on a base that others share.
        ids: prompt + completion of each row; the reward token is appended here.
        prompts: a number for each row; rows with the same number are completions of one prompt.
        device: of the inputs; default: the model's.

    Returns:
        A score for each row, which is not finite where the model's is not.
    """
    # Masked, so any id will do.
    pad_id = reward_model.config.get_text_config().pad_token_id or 0
    device = reward_model.device if device is None else device
    groups = range(len(ids)) if prompts is None else prompts
    widths: dict[int, int] = {}
    for group, row in zip(groups, ids, strict=True):
        widths[group] = max(widths.get(group, 0), len(row))
    order = sorted(range(len(ids)), key=lambda i: (-widths[groups[i]], groups[i]))
    scores = [0.0] * len(ids)
    role = reward_model.active() if isinstance(reward_model, AdapterScorer) else nullcontext()
    # Switched once for all batches.
    with evaluating(reward_model), role, _sharing_allowed(reward_model, prompts is not None) as is_shared:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            input_ids, attention_mask = pad([ids[i] for i in batch], pad_id, device)
            input_ids, attention_mask = append_reward_token(reward_model, input_ids, attention_mask)
            packed = None
            if is_shared:
                # In the order of the batch.
                numbers = {groups[i]: n for n, i in reversed([*enumerate(batch)])}
                rows = torch.tensor([numbers[groups[i]] for i in batch])
                packed = prefix_sharing.pack_if_faster(input_ids, attention_mask, rows)
            found = sequence_scores(reward_model, input_ids, attention_mask, packed)
            for i, score in zip(batch, found.tolist(), strict=True):
                scores[i] = score
    return scores


@contextmanager
def _sharing_allowed(model: nn.Module, wanted: bool) -> Iterator[bool]:
    """Inside, the model shares prefixes if it is wanted and it can, and whether it does; afterwards if it did before."""
    if not wanted or (not prefix_sharing.is_enabled(model) and prefix_sharing.why_not(model)):
        yield False
        return
    was_enabled = prefix_sharing.is_enabled(model)
    prefix_sharing.enable(model)
    try:
        yield True
    finally:
        if not was_enabled:
            prefix_sharing.disable(model)
