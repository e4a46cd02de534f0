"""Ranked comparisons: K completions of one prompt and the labeler's ranks, from text to padded tensors.

A row is `{"prompt": ..., "completions": [...], "ranks": [...]}`. The prompt is a string, or a list of chat messages;
the completions are strings, or lists of chat messages when the prompt is one. `ranks` are integers, 1 = best,
equal = tie, dense (A = B > C is 1, 1, 2). Optional: `labeler` (str) and, one entry per completion, `ratings`,
`flags` and `truncated` (True: cut at a length limit). TRL preference rows (`prompt`, `chosen`, `rejected`) are the
case K = 2.

Everything that needs token ids (reward-model training, scoring, centring, PPO rewards, DPO) takes them from
`build_ids`, so a reward model is never asked about a sequence that is spelled differently from its training data.
"""

import json
import logging
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from datasets import Dataset, List, Value

logger = logging.getLogger(__name__)

_PER_COMPLETION = ("completions", "completion_ids", "ranks", "ratings", "flags", "truncated")
_TIES = ("drop", "half")


# ---------------------------------------------------------------------------------------------------------------------
# Rankings as text, ratings and pairs
# ---------------------------------------------------------------------------------------------------------------------


def parse_ranking(text: str, labels: Sequence[str] | None = None) -> list[int]:
    """Ranks of a ranking written with `>` (better than) and `=` (as good as), in the order of `labels`.

    Args:
        text: every label exactly once, e.g. `"D > C > A = B"`.
        labels: names of the completions in row order; default the letters A, B, C, ...

    Returns:
        Dense ranks, 1 = best, one per label.

    Raises:
        ValueError: an unknown, repeated (which a cycle needs) or missing label, or fewer than two.

    >>> parse_ranking("D > C > A = B")
    [3, 3, 2, 1]
    >>> parse_ranking("right > left", labels=["left", "right"])
    [2, 1]
    """
    groups = [[name.strip() for name in group.split("=")] for group in text.split(">")]
    names = [name for group in groups for name in group]
    labels = _default_labels(len(names)) if labels is None else _checked_labels(labels)
    where = f"ranking {_show(text)}"
    for name in names:
        if not name:
            raise ValueError(f"{where}: a label is missing beside '>' or '='; write e.g. 'B > A = C'")
        if name not in labels:
            raise ValueError(
                f"{where}: unknown label {_show(name)}; the labels are {', '.join(labels)}, "
                "joined by '>' (better) and '=' (tie) only"
            )
        if names.count(name) > 1:
            raise ValueError(
                f"{where}: label {name!r} appears {names.count(name)} times, but a ranking has no cycles and "
                "no repeats; write each label once"
            )
    if missing := [label for label in labels if label not in names]:
        raise ValueError(f"{where}: {', '.join(missing)} not ranked; write each of {', '.join(labels)} once")
    if len(names) < 2:
        raise ValueError(f"{where}: expected at least two labels, got {len(names)}")
    rank = {name: position for position, group in enumerate(groups, start=1) for name in group}
    return [rank[label] for label in labels]


def format_ranking(ranks: Sequence[int], labels: Sequence[str] | None = None) -> str:
    """The ranking as text: the inverse of `parse_ranking`, with tied labels in their row order.

    Raises:
        ValueError: ranks that are not dense integers from 1, or another number of labels.

    >>> format_ranking([3, 3, 2, 1])
    'D > C > A = B'
    >>> format_ranking([2, 1], labels=["left", "right"])
    'right > left'
    """
    labels = _default_labels(len(ranks)) if labels is None else _checked_labels(labels)
    if problem := _ranks_problem(list(ranks), len(labels), "labels"):
        raise ValueError(problem)
    groups = [
        [label for label, r in zip(labels, ranks, strict=True) if r == rank] for rank in sorted(set(ranks))
    ]
    return " > ".join(" = ".join(group) for group in groups)


def ranks_from_ratings(ratings: Sequence[float]) -> list[int]:
    """Dense ranks from ratings such as a 1-7 Likert scale: a higher rating is better, equal ratings tie.

    Raises:
        ValueError: a rating that is not a finite number.

    >>> ranks_from_ratings([6, 2, 7, 6])
    [2, 3, 1, 2]
    """
    if problem := _ratings_problem(ratings, len(ratings)):
        raise ValueError(problem)
    return _dense([-rating for rating in ratings])


def from_preference(row: Mapping[str, Any]) -> dict[str, Any]:
    """A TRL preference row (`prompt`, `chosen`, `rejected`) as a ranked row with K = 2; other fields are kept.

    Raises:
        ValueError: a field that is missing or not as described at the top of this module.

    >>> from_preference({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"})
    {'prompt': '2 + 2 =', 'completions': [' 4', ' 5'], 'ranks': [1, 2]}
    """
    if problem := _row_problem(row, ("prompt", "chosen", "rejected")):
        raise ValueError(problem)
    ranked = {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]], "ranks": [1, 2]}
    return {
        **ranked,
        **{key: value for key, value in row.items() if key not in ("prompt", "chosen", "rejected")},
    }


def to_preferences(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All strict pairs of a ranked row as TRL preference rows; ties give none, so the list may be empty.

    Raises:
        ValueError: a field that is missing or not as described at the top of this module.

    >>> pairs = to_preferences({"prompt": "2 + 2 =", "completions": [" 5", " 4", " four"], "ranks": [2, 1, 1]})
    >>> [(pair["chosen"], pair["rejected"]) for pair in pairs]
    [(' 4', ' 5'), (' four', ' 5')]
    """
    if problem := _row_problem(row, ("prompt", "completions", "ranks")):
        raise ValueError(problem)
    pairs = []
    for (a, rank_a), (b, rank_b) in combinations(zip(row["completions"], row["ranks"], strict=True), 2):
        if rank_a != rank_b:
            chosen, rejected = (a, b) if rank_a < rank_b else (b, a)
            pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    return pairs


# ---------------------------------------------------------------------------------------------------------------------
# Validation
# ---------------------------------------------------------------------------------------------------------------------


def validate_comparisons(rows: Dataset | Sequence[Mapping[str, Any]], source: str = "dataset") -> None:
    """Check every row (ranked, or TRL preference) and stop at the first that is not as described above.

    Raises:
        ValueError: naming the source, the row (counted from 0), the field, what was expected, and the remedy.
            Missing columns are reported before any row is read.

    >>> validate_comparisons([{"prompt": "2 + 2 =", "completions": [" 4", " 5"], "ranks": [1, 3]}])
    Traceback (most recent call last):
    ValueError: dataset row 0: field 'ranks': expected dense ranks, got [1, 3]; write [1, 2] for the same order
    """
    if isinstance(rows, Mapping) or not isinstance(rows, Dataset | Sequence):
        raise ValueError(
            f"{source}: expected a datasets.Dataset or a list of dicts, got {type(rows).__name__}; "
            "choose one split of a DatasetDict, and load a streaming dataset without streaming"
        )
    if len(rows) == 0:
        raise ValueError(f"{source}: expected at least one row, got none")
    required = _required_columns(rows, source)
    layout = None
    for index, row in enumerate(_iterate(rows)):
        problem = _row_problem(row, required)
        if problem is None:
            completion = row["chosen"] if "chosen" in required else row["completions"][0]
            row_layout = (_kind(row["prompt"]), _kind(completion))
            layout = layout or row_layout
            if row_layout != layout:
                problem = (
                    f"field 'prompt': expected {layout[0]} with {layout[1]} completions as in row 0, got "
                    f"{row_layout[0]} with {row_layout[1]} completions; train on chat rows and plain rows separately"
                )
        if problem:
            raise ValueError(f"{source} row {index}: {problem}")


def _required_columns(rows: Dataset | Sequence[Mapping[str, Any]], source: str) -> tuple[str, ...]:
    if isinstance(rows, Dataset):
        columns = set(rows.column_names)
    else:
        columns = {key for row in rows if isinstance(row, Mapping) for key in row}
    is_ranked = bool(columns & {"completions", "ranks"}) or not columns & {"chosen", "rejected"}
    required = ("prompt", "completions", "ranks") if is_ranked else ("prompt", "chosen", "rejected")
    if missing := [name for name in required if name not in columns]:
        remedy = "rename or add it"
        if not is_ranked and missing == ["prompt"]:
            remedy = (
                "if the prompt is part of both answers, split it off with dataset.map(trl.extract_prompt)"
            )
        raise ValueError(
            f"{source}: field {missing[0]!r}: expected the columns {', '.join(required)}, "
            f"got {', '.join(sorted(columns)) or 'none'}; {remedy}"
        )
    return required


def _iterate(rows: Dataset | Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    if not isinstance(rows, Dataset):
        yield from rows
        return
    known = {"prompt", "chosen", "rejected", "labeler", *_PER_COMPLETION}
    for batch in rows.select_columns([name for name in rows.column_names if name in known]).iter(1000):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _row_problem(row: Any, required: tuple[str, ...]) -> str | None:
    """What is wrong with a row, as "field ...: expected ..., got ...; remedy", or None."""
    if not isinstance(row, Mapping):
        return (
            f"expected a dict with {', '.join(required)}, got {_show(row)}; load the file as one dict per row"
        )
    for name in required:
        if row.get(name) is None:
            return f"field {name!r}: expected a value, got {'None' if name in row else 'nothing'}; fill it or drop the row"
    prompt = row["prompt"]
    if problem := _text_problem(prompt, "prompt", ("user", "system", "assistant", "tool", "developer")):
        return problem
    if "chosen" in required:
        completions = {"chosen": row["chosen"], "rejected": row["rejected"]}
    else:
        if not isinstance(row["completions"], list | tuple):
            return _problem(
                "completions", "a list of completions", row["completions"], "write one list entry each"
            )
        if (k := len(row["completions"])) < 2:
            return _problem(
                "completions", "at least 2 completions", k, "one alone carries no comparison: drop the row"
            )
        completions = {f"completions[{i}]": completion for i, completion in enumerate(row["completions"])}
    first = _kind(next(iter(completions.values())))
    for name, completion in completions.items():
        if problem := _text_problem(completion, name):
            return problem
        if _kind(completion) == "messages" and isinstance(prompt, str):
            return _problem(
                name,
                "a string, because the prompt is one",
                completion,
                "give prompt and completions in one format",
            )
        if _kind(completion) != first:
            return _problem(name, f"{first} like the other completions", completion, "give all in one format")
    k = len(completions)
    if "ranks" in required and (problem := _ranks_problem(row["ranks"], k, "completions")):
        return problem
    if not isinstance(row.get("labeler"), str | None):
        return _problem("labeler", "a string", row["labeler"], "convert it with str()")
    if row.get("ratings") is not None and (problem := _ratings_problem(row["ratings"], k)):
        return problem
    for name in ("flags", "truncated"):
        value = row.get(name)
        if value is not None and not (isinstance(value, list | tuple) and len(value) == k):
            return _problem(
                name, f"a list with one entry for each of the {k} completions", value, "align it or drop it"
            )
    if not all(isinstance(cut, bool) for cut in row.get("truncated") or ()):
        return _problem("truncated", "true or false for each completion", row["truncated"], "fill the gaps")
    return None


def _text_problem(value: Any, name: str, openers: Sequence[str] = ("assistant", "tool")) -> str | None:
    if isinstance(value, str):
        if value == "":
            remedy = (
                "drop it"
                if name == "prompt"
                else "drop it, or write the EOS token for an answer that ends at once"
            )
            return _problem(name, "a non-empty string", value, remedy)
        return None
    if not isinstance(value, list | tuple):
        return _problem(name, "a string or a list of chat messages", value, "convert it or drop the row")
    if not value:
        return _problem(name, "a non-empty list of chat messages", value, "drop it")
    for message in value:
        if not (isinstance(message, Mapping) and isinstance(message.get("role"), str)):
            return _problem(name, "chat messages with 'role' and 'content'", message, "convert the messages")
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            return _problem(
                name, "messages with text in 'content'", message, "fill 'content' or drop the row"
            )
    if not any(message.get("content") or message.get("tool_calls") for message in value):
        return _problem(name, "a message that says something", value, "drop it")
    if name != "prompt" and value[0]["role"] not in openers:
        remedy = "leave the prompt out of the completion"
        return _problem(name, "a completion that starts with the assistant", value[0], remedy)
    return None


def _ranks_problem(ranks: Any, k: int, things: str) -> str | None:
    if not isinstance(ranks, list | tuple):
        return _problem("ranks", "a list of integers", ranks, "write one rank per completion, 1 = best")
    if len(ranks) != k:
        remedy = f"write one rank for each of the {k} {things}"
        return _problem("ranks", f"{k} ranks", f"{len(ranks)}: {_show(ranks)}", remedy, as_is=True)
    for rank in ranks:
        if rank is None or (isinstance(rank, float) and math.isnan(rank)):
            got = f"{_show(rank)} in {_show(ranks)}"
            remedy = f"rank every one of the {things}, or drop the unranked ones"
            return _problem("ranks", "integers from 1 (1 = best, equal = tie)", got, remedy, as_is=True)
        is_number = isinstance(rank, numbers.Real) and not isinstance(rank, bool)
        if not is_number or rank != int(rank if math.isfinite(rank) else 0):
            remedy = "convert scores with ranks_from_ratings or text with parse_ranking"
            got = f"{_show(rank)} in {_show(ranks)}"
            return _problem("ranks", "integers from 1 (1 = best, equal = tie)", got, remedy, as_is=True)
    if min(ranks, default=1) < 1:
        remedy = f"write {_dense(ranks)} for the same order"
        return _problem("ranks", "integers from 1 (1 = best)", ranks, remedy)
    if list(ranks) != (dense := _dense(ranks)):
        return _problem("ranks", "dense ranks", ranks, f"write {dense} for the same order")
    return None


def _ratings_problem(ratings: Any, k: int) -> str | None:
    if not isinstance(ratings, list | tuple) or len(ratings) != k:
        return _problem(
            "ratings", f"a list with a number for each of the {k} completions", ratings, "align it"
        )
    for rating in ratings:
        is_number = isinstance(rating, numbers.Real) and not isinstance(rating, bool)
        if not is_number or not math.isfinite(rating):
            got = f"{_show(rating)} in {_show(ratings)}"
            return _problem(
                "ratings", "finite numbers", got, "rate every completion or drop the field", as_is=True
            )
    return None


def _problem(field: str, expected: str, got: Any, remedy: str, as_is: bool = False) -> str:
    return f"field {field!r}: expected {expected}, got {got if as_is else _show(got)}; {remedy}"


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _kind(value: Any) -> str:
    return "text" if isinstance(value, str) else "messages"


def _dense(values: Sequence[float]) -> list[int]:
    """Dense ranks, smallest value first."""
    rank = {value: position for position, value in enumerate(sorted(set(values)), start=1)}
    return [rank[value] for value in values]


def _default_labels(k: int) -> list[str]:
    if k > 26:
        raise ValueError(f"ranking of {k} completions: the letters end at 26; pass labels")
    return [chr(ord("A") + i) for i in range(k)]


def _checked_labels(labels: Sequence[str]) -> list[str]:
    if len(set(labels)) != len(labels) or any(
        not s.strip() or s != s.strip() or set(s) & set(">=") for s in labels
    ):
        raise ValueError(
            f"labels {_show(list(labels))}: expected distinct names without '>', '=' or outer spaces"
        )
    return list(labels)


# ---------------------------------------------------------------------------------------------------------------------
# Token ids
# ---------------------------------------------------------------------------------------------------------------------


def build_ids(
    tokenizer: Any,
    prompt: str | list[dict],
    completion: str | list[dict],
    *,
    truncated: bool = False,
    **chat_template_kwargs: Any,
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of one completion: the only place where this package turns text into ids.

    `prompt_ids` are the ids that TRL's GRPOTrainer feeds the policy for this prompt, and `completion_ids` those a
    policy would have sampled after it, the closing token included. For plain text that is `tokenizer(prompt)` and the
    rest of `tokenizer(prompt + completion)` plus EOS; for chat, the template's rendering of the conversation.
    Together they are the ids TRL's RewardTrainer builds, with these exceptions:

    - Chat: what the template adds behind the closing end-of-turn token (a newline in ChatML) is left out, because a
      policy stops at that token. If the template closes the answer with text alone, EOS is appended.
    - A prompt whose ids are not a prefix of the joint ids (tokens merge across the boundary, the tokenizer ends every
      text with EOS, or the template opens the answer with a thought that it does not render afterwards) keeps its
      own ids, since generation feeds those, and the text of the completion is tokenised by itself behind them.
      Completions of several messages or with tool calls continue instead from where the two renderings part.
    - `truncated`: the completion was cut at a length limit, so no closing token is invented.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt: text, or chat messages.
        completion: text, or chat messages; text behind a chat prompt is an assistant message.
        truncated: the completion was cut at a length limit.
        chat_template_kwargs: passed to the chat template, e.g. `tools` or `enable_thinking`.

    Returns:
        `(prompt_ids, completion_ids)`, two lists of int.

    Raises:
        ValueError: the tokenizer lacks the EOS token or the chat template that the row needs.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"</s>": 0, "two": 1, "plus": 2, "is": 3, "four": 4}, unk_token="</s>"))
    >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    >>> build_ids(tokenizer, "two plus two is", " four")
    ([1, 2, 1, 3], [4, 0])
    >>> build_ids(tokenizer, "two plus two is", " four", truncated=True)
    ([1, 2, 1, 3], [4])
    """
    prompt_ids = _prompt_ids(tokenizer, prompt, chat_template_kwargs)
    return prompt_ids, _completion_ids(
        tokenizer, prompt, prompt_ids, completion, truncated, chat_template_kwargs
    )


def _prompt_ids(tokenizer: Any, prompt: str | list[dict], template_kwargs: dict[str, Any]) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "the prompt is a list of chat messages, but the tokenizer has no chat template; set "
            "tokenizer.chat_template (trl.clone_chat_template copies one), or give prompts as plain text"
        )
    return tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **template_kwargs
    )["input_ids"]


def _completion_ids(
    tokenizer: Any,
    prompt: str | list[dict],
    prompt_ids: list[int],
    completion: str | list[dict],
    truncated: bool,
    template_kwargs: dict[str, Any],
) -> list[int]:
    if isinstance(prompt, str):
        if not isinstance(completion, str):
            raise ValueError(
                "the prompt is text but the completion is chat messages; give both in one format"
            )
        answer, closing, rest = completion, "", tokenizer(prompt + completion)["input_ids"]
    else:
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        rendered = tokenizer.apply_chat_template(prompt + completion, tokenize=False, **template_kwargs)
        tail, closing = _answer_tail(tokenizer, template_kwargs)
        if tail and rendered.endswith(tail):
            kept = rendered.removesuffix(tail)
            rendered = kept if truncated else kept + (closing or tail)
        rest = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        is_one_text = len(completion) == 1 and not completion[0].get("tool_calls")
        answer = (
            completion[0]["content"] if is_one_text and isinstance(completion[0]["content"], str) else None
        )

    if rest[: len(prompt_ids)] == prompt_ids:
        ids = rest[len(prompt_ids) :]
    elif answer is not None:
        ids = _ids_of_continuation(tokenizer, answer if truncated else answer + closing)
    else:
        shared = next(
            (i for i, (a, b) in enumerate(zip(prompt_ids, rest, strict=False)) if a != b), len(rest)
        )
        ids = rest[shared:]

    if truncated or closing:
        return ids
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no EOS token to end a completion with; set tokenizer.eos_token to the token at which "
            "the policy stops"
        )
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def _answer_tail(tokenizer: Any, template_kwargs: dict[str, Any]) -> tuple[str, str]:
    """What the chat template writes after an assistant's text, and that up to its first special token ("" if none)."""
    probe = "where-does-this-end"
    exchange = [{"role": "user", "content": probe}, {"role": "assistant", "content": probe}]
    tail = tokenizer.apply_chat_template(exchange, tokenize=False, **template_kwargs).rpartition(probe)[2]
    tokens = {*tokenizer.get_added_vocab(), tokenizer.eos_token}
    ends = [tail.find(token) + len(token) for token in tokens if token and token.strip() and token in tail]
    return tail, tail[: min(ends)] if ends else ""


def _ids_of_continuation(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text in mid-sequence: no special tokens, and no space where SentencePiece marks the start of a text."""
    anchor = "\n"
    anchor_ids = tokenizer(anchor, add_special_tokens=False)["input_ids"]
    anchored = tokenizer(anchor + text, add_special_tokens=False)["input_ids"]
    if anchored[: len(anchor_ids)] == anchor_ids:
        return anchored[len(anchor_ids) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ---------------------------------------------------------------------------------------------------------------------
# Datasets and batches
# ---------------------------------------------------------------------------------------------------------------------


def prepare_comparisons(
    dataset: Dataset | Sequence[Mapping[str, Any]], *, ties: str = "drop", source: str = "train"
) -> Dataset:
    """A validated dataset of ranked rows, from ranked or TRL preference rows.

    Rows in which all completions tie have no gradient under `ties="drop"`: they are dropped and counted in the log.
    A dataset that already has token ids is returned as it is.

    Raises:
        ValueError: as `validate_comparisons`, and when no row is left.

    >>> rows = prepare_comparisons([{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}])
    >>> rows[0]["completions"], rows[0]["ranks"]
    ([' 4', ' 5'], [1, 2])
    """
    _check_ties(ties)
    if isinstance(dataset, Dataset) and _is_tokenized(dataset):
        return dataset
    if isinstance(dataset, Dataset) and dataset.format["type"] not in (None, "custom"):
        dataset = dataset.with_format(None)  # rows as Python objects, not tensors
    validate_comparisons(dataset, source)
    if not isinstance(dataset, Dataset):
        columns = dict.fromkeys(key for row in dataset for key in row)
        dataset = Dataset.from_dict({name: [row.get(name) for row in dataset] for name in columns})
    if "completions" not in dataset.column_names:
        dataset = dataset.map(from_preference, remove_columns=["chosen", "rejected"])
    if dataset.features["ranks"] != List(Value("int64")):  # e.g. 1.0, which some writers make of 1
        dataset = dataset.cast_column("ranks", List(Value("int64")))
    return _keep_rows_with_a_comparison(dataset, dataset, ties, source, "")


def tokenize_comparisons(
    dataset: Dataset,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    ties: str = "drop",
    source: str = "train",
    num_proc: int | None = None,
) -> Dataset:
    """Add `prompt_ids` and `completion_ids` (K lists) to prepared rows.

    A completion that makes prompt + completion longer than `max_length` is dropped and the ranks of the others are
    made dense again; a row goes only if fewer than two completions, or under `ties="drop"` no strict pair, remain.
    One warning gives the counts. The chat template sees the row's `tools` and `chat_template_kwargs`, as in TRL.
    Applying it to its own result changes nothing.

    Raises:
        ValueError: as `build_ids`, and when no row is left.
    """
    _check_ties(ties)
    if not _is_tokenized(dataset):
        dataset = dataset.map(
            _tokenize_row, fn_kwargs={"tokenizer": tokenizer}, num_proc=num_proc, desc=f"Tokenizing {source}"
        )
    if max_length is None:
        return dataset
    fitting = dataset.map(
        _drop_too_long, fn_kwargs={"max_length": max_length}, num_proc=num_proc, desc=f"Fitting {source}"
    )
    return _keep_rows_with_a_comparison(
        dataset, fitting, ties, source, f" longer than max_length={max_length} tokens"
    )


def _tokenize_row(row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    template_kwargs = dict(row.get("chat_template_kwargs") or {})
    if tools := row.get("tools"):
        template_kwargs["tools"] = json.loads(tools) if isinstance(tools, str) else tools
    prompt_ids = _prompt_ids(tokenizer, row["prompt"], template_kwargs)
    cuts = row.get("truncated") or [False] * len(row["completions"])
    completion_ids = [
        _completion_ids(tokenizer, row["prompt"], prompt_ids, completion, cut, template_kwargs)
        for completion, cut in zip(row["completions"], cuts, strict=True)
    ]
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids}


def _drop_too_long(row: Mapping[str, Any], max_length: int) -> dict[str, Any]:
    room = max_length - len(row["prompt_ids"])
    keep = [i for i, ids in enumerate(row["completion_ids"]) if len(ids) <= room]
    kept = {name: [row[name][i] for i in keep] for name in _PER_COMPLETION if row.get(name) is not None}
    return {**kept, "ranks": _dense(kept["ranks"])}


def _keep_rows_with_a_comparison(
    before: Dataset, after: Dataset, ties: str, source: str, why: str
) -> Dataset:
    """Drop rows of `after` that compare nothing, and log what is gone since `before`."""
    ranks = after["ranks"][:]
    few = sum(len(r) < 2 for r in ranks)
    tied = sum(len(r) >= 2 and len(set(r)) < 2 for r in ranks) if ties == "drop" else 0
    dropped_completions = sum(map(len, before["ranks"][:])) - sum(map(len, ranks))
    if not (few or tied or dropped_completions):
        return after
    kept = [i for i, r in enumerate(ranks) if len(r) >= 2 and (ties != "drop" or len(set(r)) > 1)]
    counts = [f"{dropped_completions} completions{why}"] if dropped_completions else []
    counts += [f"{few} rows with fewer than two completions left"] if few else []
    counts += [f"{tied} rows in which all completions tie"] if tied else []
    message = f"{source}: dropped {', '.join(counts)}; {len(kept)} of {len(ranks)} rows remain"
    if not kept:
        remedy = "raise max_length" if few or dropped_completions else "add rows with a preference"
        raise ValueError(f"{message}; {remedy}")
    logger.warning(message)
    return after.select(kept) if len(kept) < len(ranks) else after


def _is_tokenized(dataset: Dataset) -> bool:
    return {"prompt_ids", "completion_ids", "ranks"} <= set(dataset.column_names)


def _check_ties(ties: str) -> None:
    if ties not in _TIES:
        raise ValueError(f"ties: expected one of {', '.join(_TIES)}, got {ties!r}")


@dataclass
class RankedCollator:
    """Tokenized rows to tensors `[B, K, T]`: B prompts, K completions, T tokens, padded on the right.

    `input_ids` and `attention_mask` (0/1) cover prompt and completion; `completion_mask` (bool) is True on the
    completion's tokens; `ranks [B, K]` is 0 where a row has fewer completions than the largest of the batch. Those
    absent completions are all padding: run the model on `ranks > 0` only.

    Args:
        pad_token_id: fills `input_ids`.
        pad_to_multiple_of: makes T a multiple of this number.

    >>> collate = RankedCollator(pad_token_id=0)
    >>> batch = collate([
    ...     {"prompt_ids": [5, 6], "completion_ids": [[7, 1], [8, 9, 1], [1]], "ranks": [2, 1, 2]},
    ...     {"prompt_ids": [5], "completion_ids": [[9, 1], [7, 1]], "ranks": [1, 2]},
    ... ])
    >>> batch["input_ids"]
    tensor([[[5, 6, 7, 1, 0],
             [5, 6, 8, 9, 1],
             [5, 6, 1, 0, 0]],
    <BLANKLINE>
            [[5, 9, 1, 0, 0],
             [5, 7, 1, 0, 0],
             [0, 0, 0, 0, 0]]])
    >>> batch["attention_mask"][0]
    tensor([[1, 1, 1, 1, 0],
            [1, 1, 1, 1, 1],
            [1, 1, 1, 0, 0]])
    >>> batch["completion_mask"][0].int()
    tensor([[0, 0, 1, 1, 0],
            [0, 0, 1, 1, 1],
            [0, 0, 1, 0, 0]], dtype=torch.int32)
    >>> batch["ranks"]
    tensor([[2, 1, 2],
            [1, 2, 0]])
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        k = max(len(row["ranks"]) for row in rows)
        t = max(len(row["prompt_ids"]) + len(ids) for row in rows for ids in row["completion_ids"])
        if self.pad_to_multiple_of:
            t = math.ceil(t / self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = torch.full((len(rows), k, t), self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros(len(rows), k, t, dtype=torch.long)
        completion_mask = torch.zeros(len(rows), k, t, dtype=torch.bool)
        ranks = torch.zeros(len(rows), k, dtype=torch.long)
        for b, row in enumerate(rows):
            ranks[b, : len(row["ranks"])] = torch.tensor(row["ranks"])
            start = len(row["prompt_ids"])
            for j, completion in enumerate(row["completion_ids"]):
                end = start + len(completion)
                input_ids[b, j, :end] = torch.tensor([*row["prompt_ids"], *completion])
                attention_mask[b, j, :end] = 1
                completion_mask[b, j, start:end] = True
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "completion_mask": completion_mask,
            "ranks": ranks,
        }
