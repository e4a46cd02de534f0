"""One answer a row: demonstrations under the names of other tools, and answers judged good or bad, as KTO reads them."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prefopt.errors import UserError
from prefopt.rankings.checks import shorten
from prefopt.rankings.formats.fields import field
from prefopt.rankings.formats.pairs import after_system, as_messages, unread, with_one_prompt
from prefopt.rankings.prompts import OTHER_NAMES, TEMPLATE_FIELDS, is_chat

LABELS = ("label", "kto_tag")
# Where an answer stands: beside the prompt, or at the end of a conversation.
_ANSWERS = ("completion", "output", "response")
_CHATS = ("messages", "conversations")


def is_unpaired(row: Mapping[str, Any]) -> bool:
    """It has an answer and whether it is good."""
    return label(row) is not None and any(row.get(name) for name in (*_ANSWERS, *_CHATS))


def unpaired(rows: Iterable[Mapping[str, Any]], counts: Counter[str]) -> Iterator[dict]:
    """`prompt`, `completion` and `label` (true: good), TRL's unpaired preference format; the good answers rank above the bad.

    Also LLaMA-Factory's `messages` or `conversations` with a `label`, and `instruction`, `input`, `output` with a `kto_tag`.
    Rows of one prompt are one comparison, wherever they stand: all rows are read first. A prompt whose answers are all good,
    or all bad, compares nothing. Source: https://huggingface.co/docs/trl/dataset_formats#unpaired-preference.

    >>> rows = [{"prompt": "2 + 2 =", "completion": text, "label": text == " 4"} for text in (" 5", " 4")]
    >>> list(unpaired(rows, Counter()))
    [{'prompt': '2 + 2 =', 'completions': [' 5', ' 4'], 'ranks': [2, 1]}]
    """
    comparisons: dict[str, dict[str, Any]] = {}
    for row in rows:
        good = label(row)
        if good is None:
            counts["answers without a label"] += 1
            continue
        counts.update(f"values of {name!r}, which seem to belong to the prompt" for name in unread(row))
        prompt, answer = exchange(row)
        of_template = {name: row[name] for name in TEMPLATE_FIELDS if row.get(name)}
        key = json.dumps([prompt, of_template], sort_keys=True, default=str)
        comparison = comparisons.setdefault(key, {"prompt": prompt, "completions": [], "ranks": [], **of_template})
        comparison["completions"].append(answer)
        comparison["ranks"].append(1 if good else 2)
    yield from comparisons.values()


def label(row: Mapping[str, Any]) -> bool | None:
    """Whether the row's answer is good; None where it does not say so.

    >>> label({"label": "False"}), label({"kto_tag": True}), label({"label": "positive"})
    (False, True, None)
    """
    value = next((row[name] for name in LABELS if row.get(name) is not None), None)
    if isinstance(value, str):
        # As CSV has it.
        return {"true": True, "false": False}.get(value.lower())
    return value if isinstance(value, bool) else None


def with_own_names(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row for fine-tuning of another tool under the names that are read here; any other as it is.

    `conversations`, as ShareGPT has them, are `messages`; `instruction`, `input` and `output` (Alpaca), `input` and `output`, or
    `prompt` and `response`, are `prompt` and `completion`. A `system` becomes part of the prompt.

    >>> with_own_names({"prompt": "2 + 2 =", "response": " 4", "id": 7})
    {'id': 7, 'prompt': '2 + 2 =', 'completion': ' 4'}
    """
    if {"messages", "text", "completion", "completions", "chosen"} & row.keys():
        return row
    chat = as_messages(row.get("conversations"))
    if is_chat(chat):
        rest = {name: value for name, value in row.items() if name not in ("conversations", "system")}
        return {**rest, "messages": after_system(row.get("system"), chat)}
    name = next((name for name in _ANSWERS if isinstance(row.get(name), str)), None)
    if name is None or not any(row.get(asked) for asked in ("prompt", *OTHER_NAMES)):
        return row
    prompt, answer = exchange(row)
    used = {"prompt", "history", "system", name, *OTHER_NAMES} - {*unread(row)}
    return {**{key: value for key, value in row.items() if key not in used}, "prompt": prompt, "completion": answer}


def exchange(row: Mapping[str, Any]) -> tuple[Any, Any]:
    """Prompt and answer, both texts or both messages."""
    chat = next((chat for name in _CHATS if is_chat(chat := as_messages(row.get(name)))), None)
    if chat and not any(row.get(name) for name in _ANSWERS):
        if len(chat) < 2 or chat[-1].get("role") != "assistant":
            raise UserError(f"field 'messages': expected a prompt and an answer, got {shorten(chat)}; drop the row")
        return with_one_prompt({**row, "prompt": chat[:-1]})["prompt"], chat[-1:]
    name = next((name for name in _ANSWERS if row.get(name)), _ANSWERS[0])
    prompt, answer = with_one_prompt(row).get("prompt"), as_messages(row.get(name))
    if not is_chat(answer):
        answer = field(row, name, str)
    if is_chat(answer) and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(answer, str) and isinstance(prompt, list):
        answer = [{"role": "assistant", "content": answer}]
    return prompt, answer
