"""Chat rows of several turns, as the steps need them: prompts and demonstrations.

Every function leaves rows alone that are in its step's own format already, so that a recipe can apply it to all rows.
Rows of other tools (`prefopt.rankings.formats.unpaired.with_own_names`) are read under their names here.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from prefopt.errors import UserError
from prefopt.rankings.checks import half_a_character
from prefopt.rankings.formats import unpaired

Rows = Dataset | list[dict]
Messages = Sequence[Mapping[str, Any]]

logger = logging.getLogger(__name__)


def is_message(message: object) -> bool:
    """Whether this is a chat message that says something: a `role`, and `content` or `tool_calls`."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return False
    return bool(message.get("content") or message.get("tool_calls"))


def answers(messages: Messages) -> list[int]:
    """Positions of the assistant's turns after the first user turn: those that answer something.

    >>> turns = ["system", "assistant", "user", "assistant", "user", "assistant", "user"]
    >>> answers([{"role": role, "content": "..."} for role in turns])
    [3, 5]
    """
    roles = [message["role"] for message in messages]
    first = roles.index("user") if "user" in roles else len(roles)
    return [i for i, role in enumerate(roles) if role == "assistant" and i > first]


def check_conversations(rows: Rows, source: str) -> None:
    """Every row has `messages` with an assistant's answer to a user; a UserError names the first that has not."""
    if len(rows) == 0:
        raise UserError(f"{source}: no rows")
    for number, row in enumerate(_messages(rows)):
        _check_messages(row, number, source)
        if not answers(row):
            raise UserError(
                f"{source} row {number}: field 'messages': expected an assistant's answer to a user, got the roles "
                f"{[message['role'] for message in row]}; drop the row"
            )


def with_own_names(rows: Rows, source: str) -> Rows:
    """Rows for fine-tuning that have the names of other tools, under those that are read here."""
    if len(rows) == 0 or not isinstance(rows[0], Mapping) or unpaired.with_own_names(rows[0]) is rows[0]:
        return rows
    if isinstance(rows, Dataset):
        old = [name for name in rows.column_names if name not in unpaired.with_own_names(rows[0])]
        return rows.map(unpaired.with_own_names, remove_columns=old, desc=f"Reading {source}")
    return [unpaired.with_own_names(row) for row in rows]


def prompts_from_messages(rows: Rows, source: str) -> Rows:
    """Conversations as prompts: what stands before the answer to the last user turn. Later turns are counted in the log.

    A `prompt` that is a list of messages stays; one that is text gives way to `messages`, whose first user turn it is
    in the data sets that have both.

    >>> chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    >>> prompts_from_messages([{"messages": chat, "id": 7}], "chats.jsonl")
    [{'id': 7, 'prompt': [{'role': 'user', 'content': 'hi'}]}]
    """
    rows = with_own_names(rows, source)
    if not _has_conversations_instead_of(rows, "prompt"):
        return rows
    left_off = 0
    # Not in `map`, whose result may come from a cache.
    for number, messages in enumerate(_messages(rows)):
        _check_messages(messages, number, source)
        if not any(message["role"] == "user" for message in messages):
            raise UserError(
                f"{source} row {number}: field 'messages': expected a user turn to answer, got none; drop the row"
            )
        left_off += messages[-1]["role"] != "user"
    if left_off:
        logger.warning(
            "%s: the answer to the last user turn is left off in %d of %d conversations", source, left_off, len(rows)
        )

    def split(row: Mapping[str, Any], number: int) -> dict[str, Any]:
        users = [i for i, message in enumerate(row["messages"]) if message["role"] == "user"]
        return {"prompt": row["messages"][: users[-1] + 1]}

    return _replace(rows, split, ("messages", "prompt"), source)


def demonstrations_from_messages(rows: Rows, source: str) -> Rows:
    """Conversations as demonstrations: the last answer is the `completion`, what stands before it the `prompt`.

    >>> chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    >>> demonstrations_from_messages([{"messages": chat}], "chats.jsonl")[0]["completion"]
    [{'role': 'assistant', 'content': 'hello'}]
    """
    rows = with_own_names(rows, source)
    if "completion" in _names(rows) or not _has_conversations_instead_of(rows, "prompt"):
        return rows
    check_conversations(rows, source)

    def split(row: Mapping[str, Any], number: int) -> dict[str, Any]:
        messages = row["messages"]
        last = answers(messages)[-1]
        return {"prompt": messages[:last], "completion": [messages[last]]}

    return _replace(rows, split, ("messages", "prompt"), source)


def _names(rows: Rows) -> set[str]:
    return set(rows.column_names) if isinstance(rows, Dataset) else {name for row in rows for name in row}


def _is_chat(row: Mapping[str, Any], name: str) -> bool:
    return isinstance(row.get(name), list)


def _has_conversations_instead_of(rows: Rows, name: str) -> bool:
    """Whether `messages` are to be read because the step's own field is absent, or is text where they are chat."""
    return len(rows) > 0 and "messages" in _names(rows) and not _is_chat(rows[0], name)


def _messages(rows: Rows) -> Iterable[Any]:
    return rows["messages"] if isinstance(rows, Dataset) else (row.get("messages") for row in rows)


def _check_messages(messages: object, number: int, source: str, name: str = "messages") -> None:
    if not isinstance(messages, list) or not messages or not all(map(is_message, messages)):
        raise UserError(
            f"{source} row {number}: field {name!r}: expected messages with 'role' and 'content', got "
            f"{repr(messages)[:80]}; correct or drop the row"
        )
    if problem := half_a_character(name, messages):
        raise UserError(f"{source} row {number}: {problem}")


def _replace(
    rows: Rows, convert: Callable[[Mapping[str, Any], int], dict[str, Any]], names: Sequence[str], source: str
) -> Rows:
    """Rows with what `convert` makes of each (and of its number) in place of the fields `names`."""
    if isinstance(rows, Dataset):
        old = [name for name in names if name in rows.column_names]
        return rows.map(convert, with_indices=True, remove_columns=old, desc=f"Reading {source}")
    return [
        {name: value for name, value in row.items() if name not in names} | convert(row, number)
        for number, row in enumerate(rows)
    ]
