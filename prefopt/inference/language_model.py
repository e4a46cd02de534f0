"""What a causal language model still knows: bits per byte, tasks by likelihood, KL to a reference model."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.errors import UserError
from prefopt.inference.batching import batches_by_length, pad
from prefopt.inference.generate import prompt_ids
from prefopt.statistics.intervals import Estimate, bootstrap_over_prompts

TOKENS_AT_ONCE = 1024  # of which the probabilities of a whole vocabulary are in memory


@dataclass(frozen=True)
class BitsPerByte:
    """Nats and UTF-8 bytes of every text `[N]`, and the estimate over all of them."""

    nats: np.ndarray
    bytes: np.ndarray
    estimate: Estimate


def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int = 16,
    max_length: int | None = None,
) -> BitsPerByte:
    """How well the model predicts raw text, in a unit that does not depend on the tokenizer.

    bits per byte = sum_i nats_i / (ln 2 * sum_i bytes_i), nats_i = -sum_t log pi(x_t | BOS, x_<t), bytes_i = UTF-8
    bytes of text i. The first token is conditioned on BOS (on EOS where the tokenizer has no BOS); no EOS is scored.
    A text longer than `max_length` (default: the model's positions) is cut into windows whose context starts anew
    with the last token of the window before, so that every token is scored exactly once.

    Raises:
        ValueError: on an empty text, or one that the tokenizer does not give back unchanged.

    Example:
        >>> bits_per_byte(model, tokenizer, ["the cat sat on the mat"]).estimate.value  # doctest: +SKIP
        2.31
    """
    max_length = max_length or _positions(model)
    start = _start_id(tokenizer)
    rows, owner = [], []
    for number, text in enumerate(texts):
        ids = _lossless_ids(tokenizer, text, number)
        for first in range(0, len(ids), max_length):
            context = start if first == 0 else ids[first - 1]
            rows.append(([context, *ids[first : first + max_length]], 1))
            owner.append(number)
    nats = np.zeros(len(texts))
    np.add.at(nats, owner, scored_nats(model, rows, batch_size))
    sizes = np.array([len(text.encode("utf-8")) for text in texts], dtype=np.float64)
    return bits_per_byte_of(nats, sizes)


def bits_per_byte_of(nats: np.ndarray, sizes: np.ndarray) -> BitsPerByte:
    """From the nats and the UTF-8 bytes of every text `[N]`; the interval resamples texts."""
    return BitsPerByte(nats, sizes, bootstrap_over_prompts(_bits_of, nats, sizes))


def bits_per_byte_difference(a: BitsPerByte, b: BitsPerByte) -> Estimate:
    """Bits per byte of `a` minus those of `b` on the same texts; the interval resamples texts (paired)."""
    if not np.array_equal(a.bytes, b.bytes):
        raise UserError("paired difference: the two results are not about the same texts")
    return bootstrap_over_prompts(_bits_of, a.nats - b.nats, a.bytes)


def _bits_of(nats: np.ndarray, sizes: np.ndarray, axis: int) -> np.ndarray:
    return nats.sum(axis) / (math.log(2) * sizes.sum(axis))


def task_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Mapping],
    batch_size: int = 64,
) -> np.ndarray:
    """Right or wrong `[N]` (1.0 / 0.0) on multiple-choice tasks, answered by likelihood.

    answer = argmax_c sum_t log pi(c_t | BOS, context, c_<t), not divided by length. Between choices of exactly equal
    likelihood the point is shared.

    Args:
        tasks: `{"context": str, "choices": [str, ...], "answer": str}`, the answer being one of the choices; a
            choice is appended to the context as it stands (write its leading space).

    Raises:
        ValueError: on a task with a missing field, fewer than two or repeated choices, or an answer that is none of them.

    Example:
        >>> tasks = [{"context": "the cat sat on the", "choices": [" mat", " dog"], "answer": " mat"}]
        >>> task_accuracy(model, tokenizer, tasks)  # doctest: +SKIP
        array([1.])
    """
    validate_tasks(tasks)
    longest = _positions(model)
    start = _start_id(tokenizer)
    rows = []
    for number, task in enumerate(tasks):
        for choice in task["choices"]:
            context_ids, choice_ids = _split_ids(tokenizer, task["context"], choice)
            if not choice_ids:
                raise UserError(f"task {number}: choice {choice!r} has no tokens")
            if len(context_ids) + len(choice_ids) > longest:
                raise UserError(
                    f"task {number}: context and choice have {len(context_ids) + len(choice_ids)} tokens, "
                    f"the model has {longest} positions; shorten the task"
                )
            rows.append(([start, *context_ids, *choice_ids], 1 + len(context_ids)))
    log_likelihoods = -scored_nats(model, rows, batch_size)
    correct, position = [], 0
    for task in tasks:
        scores = log_likelihoods[position : position + len(task["choices"])]
        position += len(task["choices"])
        best = np.flatnonzero(scores == scores.max())
        correct.append(1 / len(best) if list(task["choices"]).index(task["answer"]) in best else 0.0)
    return np.array(correct)


def validate_tasks(tasks: Sequence[Mapping]) -> None:
    """Stop at the first task that is none, with its number, the field and what was expected."""
    for number, task in enumerate(tasks):
        missing = {"context", "choices", "answer"} - set(task)
        if missing:
            raise UserError(f"task {number}: missing field {sorted(missing)[0]!r}")
        choices, answer = task["choices"], task["answer"]
        if len(choices) < 2 or len(set(choices)) < len(choices):
            raise UserError(
                f"task {number}: field 'choices': expected two or more distinct texts, got {choices!r}"
            )
        if answer not in choices:
            raise UserError(
                f"task {number}: field 'answer': expected one of the choices {choices!r}, got {answer!r}"
            )


@dataclass(frozen=True)
class TokenDivergence:
    """Of one completion, at each of its tokens `[T]`, in nats."""

    kl: np.ndarray  # sum_v pi(v) * (log pi(v) - log ref(v))
    k1: np.ndarray  # log pi(y_t) - log ref(y_t), of the token that was sampled
    entropy: np.ndarray  # -sum_v pi(v) * log pi(v)


@torch.no_grad()
def token_divergence(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict]],
    completion_ids: Sequence[list[int]],
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[TokenDivergence]:
    """How far the model has moved from the reference, at every token of its own samples y ~ pi(. | x).

        KL_t = sum_v pi(v | x, y_<t) * (log pi(v | x, y_<t) - log ref(v | x, y_<t))

    over the whole vocabulary, end token included: its sum over t is an unbiased estimate of the KL of the two
    distributions over completions, with much less variance than log pi(y) - log ref(y), the sum of k1.

    Args:
        completion_ids: a temperature-1 sample of `model` for each of the prompts, as it was sampled.
        progress: called with (completions done, completions in all) after every batch.
    """
    rows = [
        (prompt_ids(tokenizer, prompt), list(ids))
        for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]
    found: list[TokenDivergence | None] = [None] * len(rows)
    done = 0
    for batch in batches_by_length([len(x) + len(y) for x, y in rows], batch_size):
        input_ids, attention_mask = pad([rows[i][0] + rows[i][1] for i in batch], 0, model.device)
        predicts = torch.zeros_like(attention_mask, dtype=torch.bool)
        for row, i in enumerate(batch):
            x, y = rows[i]
            predicts[row, len(x) - 1 : len(x) + len(y) - 1] = True
        logits = _logits(model, input_ids, attention_mask, predicts)
        ref_logits = _logits(reference, input_ids, attention_mask, predicts).to(logits.device)
        if logits.shape != ref_logits.shape:
            raise UserError(f"model and reference have {logits.shape[-1]} and {ref_logits.shape[-1]} tokens")
        sampled = torch.tensor([token for i in batch for token in rows[i][1]], device=logits.device)
        parts = [
            _divergence(*part)
            for part in zip(*(x.split(TOKENS_AT_ONCE) for x in (logits, ref_logits, sampled)), strict=True)
        ]
        per_token = torch.cat(parts, dim=1).double().cpu().numpy()
        cuts = np.cumsum([len(rows[i][1]) for i in batch])[:-1]
        for i, values in zip(batch, np.split(per_token, cuts, axis=1), strict=True):
            found[i] = TokenDivergence(*values)
        done += len(batch)
        if progress is not None:
            progress(done, len(rows))
    return found


def _divergence(logits: torch.Tensor, ref_logits: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
    """`[3, N]`: KL, k1 and entropy at each of the tokens, from logits `[N, V]`."""
    logps, ref_logps = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    p = logps.exp()
    kl = torch.where(p > 0, p * (logps - ref_logps), 0.0).sum(-1)
    entropy = -torch.where(p > 0, p * logps, 0.0).sum(-1)
    k1 = (logps - ref_logps).gather(-1, sampled[:, None]).squeeze(-1)
    return torch.stack([kl, k1, entropy])


def _split_ids(tokenizer: PreTrainedTokenizerBase, context: str, choice: str) -> tuple[list[int], list[int]]:
    """Joint tokenization cut after the context; where the cut falls inside a token, the two tokenized apart."""
    context_ids = _ids(tokenizer, context)
    joint = _ids(tokenizer, context + choice)
    if joint[: len(context_ids)] == context_ids:
        return context_ids, joint[len(context_ids) :]
    return context_ids, _ids(tokenizer, choice)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _lossless_ids(tokenizer: PreTrainedTokenizerBase, text: str, number: int) -> list[int]:
    if not text:
        raise UserError(f"bits per byte: text {number} is empty")
    ids = _ids(tokenizer, text)
    back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if back != text:
        raise UserError(
            f"bits per byte: {type(tokenizer).__name__} does not give text {number} back unchanged "
            f"({text[:60]!r} became {back[:60]!r}); use a lossless tokenizer, or clean the text"
        )
    return ids


def _start_id(tokenizer: PreTrainedTokenizerBase) -> int:
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise UserError("the tokenizer has neither a BOS nor an EOS token to start a text with")
    return start


def _positions(model: PreTrainedModel) -> int:
    return model.config.max_position_embeddings


@torch.no_grad()
def scored_nats(model: PreTrainedModel, rows: Sequence[tuple[list[int], int]], batch_size: int) -> np.ndarray:
    """-sum log pi(ids[t] | ids[:t]) over t >= first, for rows (ids, first) -> [N] float64."""
    nats = np.zeros(len(rows))
    for batch in batches_by_length([len(ids) for ids, _ in rows], batch_size):
        ids, mask = pad([rows[i][0] for i in batch], 0, model.device)
        targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        for row, i in enumerate(batch):
            targets[row, : rows[i][1] - 1] = -100
        logits = _logits(model, ids[:, :-1], mask[:, :-1])
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
        nats[batch] = losses.double().sum(-1).cpu().numpy()
    if np.isnan(nats).any():
        raise UserError("the model's logits are NaN: its weights are broken")
    return nats


def _logits(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    where: torch.Tensor | None = None,
) -> torch.Tensor:
    """fp32 logits `[N, T, V]`; at the positions `where` `[N, T]` only, `[positions, V]` as the model gives them."""
    training = model.training
    model.eval()
    try:
        logits = model(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            use_cache=False,
        ).logits
        return logits.float() if where is None else logits[where.to(logits.device)]
    finally:
        model.train(training)
