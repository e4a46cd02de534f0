"""What supervised fine-tuning learns from: demonstrations, conversations and well rated outputs, to token ids and labels.

Token ids come from `prefopt.rankings.dataset.build_ids`, so the policy learns the very ids that it will be fed and that reward
models and PPO see.
"""

import json
import logging
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from prefopt.errors import UserError
from prefopt.rankings.formats.unpaired import LABELS, label
from prefopt.rankings.prompts import columns_of
from prefopt.rankings.tokens import SPELT_TOKENS, build_ids, row_ids, spells_control_tokens, template_kwargs
from prefopt.recipes.common.conversations import answers, check_conversations
from prefopt.recipes.common.rows import Rows, check_fields

logger = logging.getLogger(__name__)


def check_sft_rows(rows: Rows, source: str) -> None:
    """Rows are all {"prompt", "completion"}, all {"messages"} or all {"text"}."""
    names = rows.column_names if isinstance(rows, Dataset) else (rows[0] if rows else {})
    if bad := [i for i, row in enumerate(columns_of(rows, LABELS)) if label(row) is False]:
        raise UserError(
            f"{source} row {bad[0]}: the answers of {len(bad)} of {len(rows)} rows are labeled false, and fine-tuning would learn "
            "them like the good ones; leave them out, or compare good with bad ones: "
            f"`prefopt data convert {source} --out rankings.jsonl`"
        )
    if "messages" in names and "completion" not in names:
        check_conversations(rows, source)
    elif "text" in names and "completion" not in names:
        check_fields("text")(rows, source)
    elif "completions" in names:
        raise UserError(
            f"{source}: the rows are ranked comparisons; give them as rated_dataset_name to learn from their best outputs"
        )
    else:
        check_fields("prompt", "completion")(rows, source)


def kind_of(rows: Dataset) -> str:
    """What a row is: "completion" (a demonstration), "messages" (a conversation) or, if it has neither, "text"."""
    return next(name for name in ("completion", "messages", "text") if name in rows.column_names)


def rated_demonstrations(rows: Dataset, min_rating: float, source: str) -> Dataset:
    """The outputs of ranked comparisons that were rated `min_rating` or more, as demonstrations.

    A text that several labelers rated so is one demonstration. What is left out is counted in the log.
    """
    demonstrations: dict[str, dict] = {}
    rated = good = without = 0
    for row in rows:
        if row.get("ratings") is None:
            without += 1
            continue
        cuts = row.get("truncated") or [False] * len(row["completions"])
        for completion, rating, cut in zip(row["completions"], row["ratings"], cuts, strict=True):
            rated += 1
            if rating >= min_rating:
                good += 1
                demonstration = {"prompt": row["prompt"], "completion": completion, "truncated": cut}
                demonstrations.setdefault(json.dumps(demonstration, sort_keys=True, default=str), demonstration)
    if not demonstrations:
        raise UserError(
            f"{source}: none of {rated} rated outputs is rated {min_rating:g} or more ({without} of {len(rows)} rows have no "
            "ratings); lower min_rating, or give rankings with `ratings`"
        )
    logger.warning("%s: %d of %d rated outputs are rated %g or more, %d of them repeated; %d of %d rows have no ratings",
                   source, good, rated, min_rating, good - len(demonstrations), without, len(rows))  # fmt: skip
    return Dataset.from_list(list(demonstrations.values()))


def conversation_examples(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], loss_on: str = "all", **chat_template_kwargs: Any
) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of a conversation, with a loss on every answer of the assistant, or on the last.

    An answer's ids, and those of all that stands before it, are what `build_ids` gives: what the policy is fed and
    samples when it gives that answer, whether or not the chat template marks the assistant's turns. Where the template
    writes an answer alike once the conversation goes on, all turns are one example. Where it does not (a thought that is
    rendered in the last turn only), the next answer begins an example of its own.
    """
    turns = answers(messages)
    examples: list[tuple[list[int], list[int]]] = []
    for turn in turns if loss_on == "all" else turns[-1:]:
        prompt_ids, completion_ids = build_ids(tokenizer, messages[:turn], [messages[turn]], **chat_template_kwargs)
        ids, labels = examples.pop() if examples else ([], [])
        if prompt_ids[: len(ids)] != ids:
            examples.append((ids, labels))
            ids, labels = [], []
        unscored = [-100] * (len(prompt_ids) - len(ids))
        examples.append((prompt_ids + completion_ids, labels + unscored + completion_ids))
    return examples


def tokenize_demonstrations(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None, source: str, loss_on: str = "all"
) -> Dataset:
    """Token ids by the same function as reward modeling and PPO; loss on what the policy is to say, alone."""
    is_conversation = kind_of(rows) == "messages"
    names = ["messages"] if is_conversation else ["prompt", "completion"]
    texts = (tuple(row.values()) for row in rows.with_format(None).select_columns(names))
    if spelt := sum(spells_control_tokens(tokenizer, *parts) for parts in texts):
        logger.warning("%s: %d of %d %s", source, spelt, len(rows), SPELT_TOKENS)

    def examples_of(row: dict) -> list[tuple[list[int], list[int]]]:
        kwargs = template_kwargs(row)
        if is_conversation:
            return conversation_examples(tokenizer, row["messages"], loss_on, **kwargs)
        x, (y,), (spans,) = row_ids(
            tokenizer, row["prompt"], [row["completion"]], [bool(row.get("truncated"))], kwargs
        )
        said = {place for span in spans for place in range(*span)}
        return [(x + y, [-100] * len(x) + [token if i in said else -100 for i, token in enumerate(y)])]

    def to_ids(batch: dict[str, list]) -> dict[str, list]:
        columns = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        examples = [example for row in columns for example in examples_of(row)]
        return {"input_ids": [ids for ids, _ in examples], "labels": [labels for _, labels in examples]}

    tokenized = rows.map(to_ids, batched=True, remove_columns=rows.column_names, desc=f"Tokenizing {source}")
    if len(tokenized) > len(rows):
        logger.warning("%s: %d conversations make %d examples, because the chat template writes some answers differently "
                       "once the conversation goes on", source, len(rows), len(tokenized))  # fmt: skip
    if max_length is None:
        return tokenized
    kept = tokenized.filter(lambda row: len(row["input_ids"]) <= max_length)
    if len(kept) < len(tokenized):
        logger.warning("%s: dropped %d of %d examples longer than max_length=%d tokens", source,
                       len(tokenized) - len(kept), len(tokenized), max_length)  # fmt: skip
    if len(kept) == 0:
        raise UserError(f"{source}: every example is longer than max_length={max_length}; raise it")
    return kept
