"""Ranked comparisons, from text to token ids: checked rows, one tokenisation, nothing dropped without a count.

`prefopt.ranked_rows` describes the row and converts it, `prefopt.row_checks` validates it, `prefopt.collator` makes
batches `[B, K, T]`; their public names can be imported from here.

Everything that needs token ids (reward-model training, scoring, centring, PPO rewards, DPO) takes them from
`build_ids`, so a reward model is never asked about a sequence that is spelled differently from its training data.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Dataset, List, Value

from prefopt.collator import RankedCollator
from prefopt.ranked_rows import (
    format_ranking,
    from_preference,
    parse_ranking,
    ranks_from_ratings,
    to_preferences,
)
from prefopt.row_checks import (
    PER_COMPLETION,
    dense_ranks,
    margin_problem,
    shorten,
    validate_comparisons,
    validate_ratings,
    validate_tokenized,
)

__all__ = [
    "RankedCollator",
    "build_ids",
    "format_ranking",
    "from_preference",
    "parse_ranking",
    "prepare_comparisons",
    "ranks_from_ratings",
    "to_preferences",
    "tokenize_comparisons",
    "validate_comparisons",
]

logger = logging.getLogger(__name__)

_TIES = ("drop", "half")
ENDED_PROMPTS = (
    "prompts end with EOS, which the tokenizer adds to every text, so completions stand behind EOS, here and in "
    "generation; if that is not meant, set tokenizer.add_eos_token=False, or take EOS out of its post-processor"
)


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
    prompt_ids, (completion_ids,) = _row_ids(
        tokenizer, prompt, [completion], [truncated], chat_template_kwargs
    )
    return prompt_ids, completion_ids


def _row_ids(
    tokenizer: Any, prompt: str | list[dict], completions: list, truncated: list[bool], template_kwargs: dict
) -> tuple[list[int], list[list[int]]]:
    """`build_ids` for all completions of a prompt."""
    if isinstance(prompt, str):
        prompt_ids = tokenizer(prompt)["input_ids"]
        render = None
    else:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                "the prompt is a list of chat messages, but the tokenizer has no chat template; set "
                "tokenizer.chat_template (trl.clone_chat_template copies one), or give prompts as plain text"
            )
        prompt = without_nulls_in_calls(prompt)
        render = partial(tokenizer.apply_chat_template, tokenize=False, **template_kwargs)
        generation = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **template_kwargs
        )
        prompt_ids = generation["input_ids"]
    tail, closing = _answer_tail(tokenizer, render) if render else ("", "")

    completion_ids = []
    for completion, cut in zip(completions, truncated, strict=True):
        if render is None:
            if not isinstance(completion, str):
                raise ValueError(
                    "the prompt is text but the completion is chat messages; give both in one format"
                )
            answer, joint = completion, tokenizer(prompt + completion)["input_ids"]
        else:
            messages = (
                [{"role": "assistant", "content": completion}]
                if isinstance(completion, str)
                else without_nulls_in_calls(completion)
            )
            text = render([*prompt, *messages])
            if tail and text.endswith(tail):
                text = text.removesuffix(tail) + ("" if cut else closing or tail)
            joint = tokenizer(text, add_special_tokens=False)["input_ids"]
            content = (
                messages[0]["content"] if len(messages) == 1 and not messages[0].get("tool_calls") else None
            )
            answer = content if isinstance(content, str) else None

        if joint[: len(prompt_ids)] == prompt_ids:
            ids = joint[len(prompt_ids) :]
        elif answer is not None:
            ids = _ids_of_continuation(tokenizer, answer if cut else answer + closing)
        else:
            parting = (i for i, (a, b) in enumerate(zip(prompt_ids, joint, strict=False)) if a != b)
            ids = joint[next(parting, len(joint)) :]

        if not (cut or closing):
            if tokenizer.eos_token_id is None:
                raise ValueError(
                    "the tokenizer has no EOS token to end a completion with; set tokenizer.eos_token to the token "
                    "at which the policy stops"
                )
            if not ids or ids[-1] != tokenizer.eos_token_id:
                ids = [*ids, tokenizer.eos_token_id]
        completion_ids.append(ids)
    return prompt_ids, completion_ids


def without_nulls_in_calls(prompt: str | list[dict]) -> str | list[dict]:
    """Messages whose tool calls have only the arguments they were written with; text as it is.

    Arrow keeps one set of fields for a column, so in a row of a Dataset each call also has, as null, the arguments of all
    other calls, and the template would write them out. An argument that was null from the start goes with them.

    >>> call = {"function": {"name": "find", "arguments": {"city": "Rome", "street": None}}}
    >>> without_nulls_in_calls([{"role": "assistant", "content": None, "tool_calls": [call]}])[0]["tool_calls"]
    [{'function': {'name': 'find', 'arguments': {'city': 'Rome'}}}]
    """
    if isinstance(prompt, str):
        return prompt
    return [
        {**message, "tool_calls": _without_nulls(message["tool_calls"])}
        if message.get("tool_calls")
        else message
        for message in prompt
    ]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _answer_tail(tokenizer: Any, render: Callable[[list[dict]], str]) -> tuple[str, str]:
    """What the chat template writes after an assistant's text, and that up to the token(s) that close the turn.

    These are the first special tokens in a row: `<|im_end|>` of ChatML's `<|im_end|>\\n`, `<|end|>` of Phi's
    `<|end|>\\n<|endoftext|>`, both of Cohere's `<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`; "" if there are none.
    """
    probe = "where-does-this-end"
    exchange = [{"role": "user", "content": probe}, {"role": "assistant", "content": probe}]
    tail = render(exchange).rpartition(probe)[2]
    tokens = [
        token for token in {*tokenizer.get_added_vocab(), tokenizer.eos_token} if token and token.strip()
    ]
    closing = re.search(f"(?:{'|'.join(map(re.escape, tokens))})+", tail) if tokens else None
    return tail, tail[: closing.end()] if closing else ""


def _ids_of_continuation(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text in mid-sequence: no special tokens, and no space where SentencePiece marks the start of a text."""
    anchor = "\n"
    anchor_ids = tokenizer(anchor, add_special_tokens=False)["input_ids"]
    anchored = tokenizer(anchor + text, add_special_tokens=False)["input_ids"]
    if anchored[: len(anchor_ids)] == anchor_ids:
        return anchored[len(anchor_ids) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prepare_comparisons(
    dataset: Dataset | Sequence[Mapping[str, Any]],
    *,
    ties: str = "drop",
    margins: bool = False,
    source: str = "train",
) -> Dataset:
    """A validated dataset of ranked rows, from ranked or TRL preference rows.

    Rows in which all completions tie have no gradient under `ties="drop"`: they are dropped and counted in the log.
    Of a dataset that already has token ids, lengths and ranks are checked. With `margins`, the ratings will make margins: they are
    checked by `validate_ratings` and rows without are counted in the log.

    Raises:
        ValueError: as `validate_comparisons` and `validate_ratings`, and when no row is left.

    >>> rows = prepare_comparisons([{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}])
    >>> rows[0]["completions"], rows[0]["ranks"]
    ([' 4', ' 5'], [1, 2])
    """
    check_ties(ties)
    if isinstance(dataset, Dataset) and _is_tokenized(dataset):
        validate_tokenized(dataset, source)
        if dataset.features["ranks"] != List(Value("int64")):
            dataset = dataset.cast_column("ranks", List(Value("int64")))
        if margins:
            _check_margins(dataset, source)
        return _keep_rows_with_a_comparison(dataset, dataset, ties, source, "")
    if isinstance(dataset, Dataset) and dataset.format["type"] not in (None, "custom"):
        dataset = dataset.with_format(None)  # rows as Python objects, not tensors
    validate_comparisons(dataset, source)
    if not isinstance(dataset, Dataset):
        columns = dict.fromkeys(key for row in dataset for key in row)
        dataset = Dataset.from_dict({name: [row.get(name) for row in dataset] for name in columns})
    if "completions" not in dataset.column_names:
        dataset = _from_preferences(dataset, source, margins)
    if dataset.features["ranks"] != List(Value("int64")):  # e.g. 1.0, which some writers make of 1
        dataset = dataset.cast_column("ranks", List(Value("int64")))
    if margins:
        _check_margins(dataset, source)
    return _keep_rows_with_a_comparison(dataset, dataset, ties, source, "")


def _from_preferences(dataset: Dataset, source: str, margins: bool) -> Dataset:
    if "margin" not in dataset.column_names:
        return dataset.map(from_preference, remove_columns=["chosen", "rejected"])
    given = dataset.with_format(None)["margin"][:]
    for index, margin in enumerate(given):
        if margins and (problem := margin_problem(margin)):
            raise ValueError(f"{source} row {index}: {problem}")
    if (count := sum(margin is not None for margin in given)) and not margins:
        logger.warning(
            f"{source}: {count} rows have a margin, kept as ratings; the loss reads it if margin_coef > 0 (1 as in TRL)"
        )
    # Not by `map`, which cannot tell the type of a column whose first rows are empty.
    rest = [name for name in dataset.column_names if name not in ("margin", "ratings")]
    dataset = dataset.select_columns(rest).map(from_preference, remove_columns=["chosen", "rejected"])
    ratings = [None if margin is None else [margin, 0.0] for margin in given]
    return dataset.add_column("ratings", ratings, feature=List(Value("float64")))


def _check_margins(dataset: Dataset, source: str) -> None:
    if missing := validate_ratings(dataset, source):
        logger.warning(
            f"{source}: {missing} of {len(dataset)} rows have no ratings: the margin of their pairs is 0"
        )


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
    A second warning counts the prompts that the tokenizer ends with EOS: the completion stands behind EOS, in generation
    too, until the tokenizer stops adding it. Applying it to its own result changes nothing.

    Raises:
        ValueError: as `build_ids`, a `max_length` below 1, and when no row is left.
    """
    check_ties(ties)
    if max_length is not None and max_length < 1:
        raise ValueError(
            f"max_length={max_length!r}: expected a number of tokens from 1, or None to drop nothing for its length"
        )
    if not _is_tokenized(dataset):
        dataset = dataset.map(
            tokenize_row,
            with_indices=True,
            fn_kwargs={"tokenizer": tokenizer, "source": source},
            num_proc=num_proc,
            desc=f"Tokenizing {source}",
        )
        ended = sum(ids[-1] == tokenizer.eos_token_id for ids in dataset.with_format(None)["prompt_ids"][:])
        if ended and isinstance(dataset[0]["prompt"], str) and ends_texts(tokenizer):
            logger.warning(f"{source}: {ended} of {len(dataset)} {ENDED_PROMPTS}")
    if max_length is None:
        return dataset
    fitting = dataset.map(
        fit_row, fn_kwargs={"max_length": max_length}, num_proc=num_proc, desc=f"Fitting {source}"
    )
    return _keep_rows_with_a_comparison(
        dataset, fitting, ties, source, f" longer than max_length={max_length} tokens"
    )


def ends_texts(tokenizer: Any) -> bool:
    """Whether the tokenizer puts EOS behind every text by itself."""
    return tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]


def tokenize_row(
    row: Mapping[str, Any], index: int, tokenizer: Any, source: str, of: str = " of the prepared rows"
) -> dict[str, Any]:
    """`prompt_ids` and `completion_ids` of one checked row; a ValueError names `source` and the row's number."""
    template_kwargs = dict(row.get("chat_template_kwargs") or {})
    if tools := row.get("tools"):
        template_kwargs["tools"] = json.loads(tools) if isinstance(tools, str) else tools
    cuts = row.get("truncated") or [False] * len(row["completions"])
    try:
        prompt_ids, completion_ids = _row_ids(
            tokenizer, row["prompt"], row["completions"], cuts, template_kwargs
        )
        if not prompt_ids:
            raise ValueError("field 'prompt': expected at least one token, got none; drop the row")
    except Exception as error:  # a chat template may raise anything; say for which row
        prompt = shorten(row["prompt"])
        raise ValueError(f"{source} row {index}{of} (prompt {prompt}): {error}") from error
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids}


def fit_row(row: Mapping[str, Any], max_length: int) -> dict[str, Any]:
    """The lists of a tokenized row without the completions that are too long; `ranks` dense again, perhaps empty."""
    room = max_length - len(row["prompt_ids"])
    keep = [i for i, ids in enumerate(row["completion_ids"]) if len(ids) <= room]
    kept = {name: [row[name][i] for i in keep] for name in PER_COMPLETION if row.get(name) is not None}
    return {**kept, "ranks": dense_ranks(kept["ranks"])}


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


def check_ties(ties: str) -> None:
    """Raise ValueError for what is no way to treat ties."""
    if ties not in _TIES:
        raise ValueError(f"ties: expected one of {', '.join(_TIES)}, got {ties!r}")
