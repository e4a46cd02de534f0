"""Likelihoods under a causal language model: of tokens, of raw text, of choices, and how two models differ in them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.errors import UserError
from prefopt.inference.generate import all_prompt_ids, batches_by_length, evaluating, pad
from prefopt.models.heads import logits_in_tiles
from prefopt.models.passes import loaded_from, max_positions

# Tokens that a model without a limit reads of a text at once.
WINDOW = 2048


@dataclass(frozen=True)
class BitsPerByte:
    """Nats and UTF-8 bytes of every text `[N]`; bits per byte are sum(nats) / (ln 2 * sum(bytes))."""

    nats: np.ndarray
    bytes: np.ndarray


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
    A text longer than `max_length` (default: the model's positions, or where it has no limit `WINDOW`) is cut into windows whose context starts anew
    with the last token of the window before, so that every token is scored exactly once.

    Raises:
        UserError: on an empty text, or one that the tokenizer does not give back unchanged.

    >>> bits_per_byte(model, tokenizer, ["the cat sat on the mat"]).nats  # doctest: +SKIP
    array([35.2])
    """
    max_length = max_length or max_positions(model.config) or WINDOW
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
    return BitsPerByte(nats, sizes)


def task_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Mapping], batch_size: int = 64
) -> np.ndarray:
    """Right or wrong `[N]` (1.0 / 0.0) on multiple-choice tasks, answered by likelihood.

    answer = argmax_c sum_t log pi(c_t | BOS, context, c_<t), not divided by length. Between choices of exactly equal
    likelihood the point is shared. A task is `{"context": str, "choices": [str, ...], "answer": str}`; a choice is appended
    to the context as it stands (write its leading space). Raises as `validate_tasks`.

    >>> tasks = [{"context": "the cat sat on the", "choices": [" mat", " dog"], "answer": " mat"}]
    >>> task_accuracy(model, tokenizer, tasks)  # doctest: +SKIP
    array([1.])
    """
    validate_tasks(tasks)
    longest = max_positions(model.config)
    start = _start_id(tokenizer)
    rows = []
    for number, task in enumerate(tasks):
        for choice in task["choices"]:
            context_ids, choice_ids = _split_ids(tokenizer, task["context"], choice)
            if not choice_ids:
                raise UserError(f"task {number}: choice {choice!r} has no tokens")
            if longest is not None and len(context_ids) + len(choice_ids) > longest:
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


def validate_tasks(tasks: Sequence[Mapping], source: str = "") -> None:
    """Stop at the first task that is none, with its number, the field and what was expected, `source` before them."""
    for number, task in enumerate(tasks):
        place = f"{source}task {number}"
        missing = {"context", "choices", "answer"} - set(task)
        if missing:
            raise UserError(f"{place}: missing field {sorted(missing)[0]!r}")
        choices, answer = task["choices"], task["answer"]
        if not isinstance(task["context"], str):
            raise UserError(f"{place}: field 'context': expected a text, got {task['context']!r}")
        are_texts = isinstance(choices, list | tuple) and all(isinstance(choice, str) for choice in choices)
        if not are_texts or len(choices) < 2 or len(set(choices)) < len(choices):
            raise UserError(f"{place}: field 'choices': expected two or more distinct texts, got {choices!r}")
        if answer not in choices:
            raise UserError(f"{place}: field 'answer': expected one of the choices {choices!r}, got {answer!r}")


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
    of_rows: Sequence[Mapping] | None = None,
) -> list[TokenDivergence]:
    """How far the model has moved from the reference, at every token of its own samples y ~ pi(. | x).

        KL_t = sum_v pi(v | x, y_<t) * (log pi(v | x, y_<t) - log ref(v | x, y_<t))

    over the whole vocabulary, end token included: its sum over t is an unbiased estimate of the KL of the two
    distributions over completions, with much less variance than log pi(y) - log ref(y), the sum of k1.

    `completion_ids` are a temperature-1 sample of `model` for each of the prompts, as it was sampled; `progress` is called
    with (completions done, completions in all) after every batch; `of_rows` is what each prompt's row gives the chat template.
    """
    rows = list(zip(all_prompt_ids(tokenizer, prompts, of_rows), map(list, completion_ids), strict=True))
    results: list[TokenDivergence | None] = [None] * len(rows)
    done = 0
    for batch in batches_by_length([len(x) + len(y) for x, y in rows], batch_size):
        input_ids, attention_mask = pad([rows[i][0] + rows[i][1] for i in batch], 0, model.device)
        width = input_ids.shape[1]
        read = [
            (row * width + len(rows[i][0]) - 1 + t, token)
            for row, i in enumerate(batch)
            for t, token in enumerate(rows[i][1])
        ]
        index, sampled = torch.tensor(read, dtype=torch.long).reshape(-1, 2).T
        per_token = _divergences(model, reference, input_ids, attention_mask, index, sampled)
        cuts = np.cumsum([len(rows[i][1]) for i in batch])[:-1]
        for i, values in zip(batch, np.split(per_token, cuts, axis=1), strict=True):
            results[i] = TokenDivergence(*values)
        done += len(batch)
        if progress is not None:
            progress(done, len(rows))
    return results


def _divergences(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    index: torch.Tensor,
    sampled: torch.Tensor,
) -> np.ndarray:
    """`[3, N]`: KL, k1 and entropy at the positions `index` `[N]`, of two distributions a tile of them at a time."""
    inputs = (input_ids, attention_mask)
    ref_inputs = tuple(value.to(reference.device) for value in inputs)
    parts = []
    with evaluating(model), evaluating(reference):
        tiles = zip(
            logits_in_tiles(model, index, *inputs),
            logits_in_tiles(reference, index, *ref_inputs),
            strict=True,
        )
        for (tile, logits), (_, ref_logits) in tiles:
            if logits.shape != ref_logits.shape:
                raise UserError(f"model and reference have {logits.shape[-1]} and {ref_logits.shape[-1]} tokens")
            parts.append(_divergence(logits, ref_logits.to(logits.device), sampled[tile].to(logits.device)))
    return torch.cat(parts, dim=1).double().cpu().numpy()


def _divergence(logits: torch.Tensor, ref_logits: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
    """`[3, N]`: KL, k1 and entropy at each of the tokens, from logits `[N, V]`."""
    logps, ref_logps = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    p, q, ratio = logps.exp(), ref_logps.exp(), logps - ref_logps
    # Terms p log(p/q) + q - p, of which none is below 0: of nearly equal models p log(p/q) alone sums to less than its rounding.
    terms = torch.where(ratio.abs() < 1, p * (ratio + torch.expm1(-ratio)), p * ratio + q - p)
    kl = torch.where(p > 0, terms, q).sum(-1)
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


@torch.no_grad()
def scored_nats(
    model: PreTrainedModel, rows: Sequence[tuple[list[int], int | Sequence[int]]], batch_size: int
) -> np.ndarray:
    """-sum log pi(ids[t] | ids[:t]) over t >= first, for rows (ids, first), or over places, for (ids, places) -> [N] float64.

    The head reads the positions before the scored tokens alone. Rows that differ in their last token only, such as a
    question with one answer or another, are one row of a batch.
    """
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for number, (ids, _) in enumerate(rows):
        rows_of.setdefault(tuple(ids[:-1]), []).append(number)
    inputs = list(rows_of)
    nats = np.zeros(len(rows))
    for batch in batches_by_length([len(ids) for ids in inputs], batch_size):
        input_ids, attention_mask = pad([inputs[i] for i in batch], 0, model.device)
        width = input_ids.shape[1]
        read = [
            (number, row * width + t - 1, rows[number][0][t])
            for row, i in enumerate(batch)
            for number in rows_of[inputs[i]]
            for t in places(*rows[number])
        ]
        numbers, index, labels = torch.tensor(read, dtype=torch.long).reshape(-1, 3).T
        with evaluating(model):
            losses = [
                F.cross_entropy(logits.float(), labels[tile].to(logits.device), reduction="none")
                for tile, logits in logits_in_tiles(model, index, input_ids, attention_mask)
            ]
        np.add.at(nats, numbers.numpy(), torch.cat(losses).double().cpu().numpy())
    if np.isnan(nats).any():
        raise UserError(f"the model's logits are NaN: its weights are broken{loaded_from(model)}")
    return nats


def places(ids: Sequence[int], scored: int | Sequence[int]) -> Sequence[int]:
    """Where a row is scored.

    >>> list(places([5, 6, 7], 1)), places([5, 6, 7], [2])
    ([1, 2], [2])
    """
    return range(scored, len(ids)) if isinstance(scored, int) else scored
