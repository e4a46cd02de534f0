"""Where the prompt of a preference row stands: beside the answers, or at the beginning of both (TRL's implicit prompt)."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from prefopt.errors import UserError

# What some data sets call the prompt.
OTHER_NAMES = ("question", "instruction", "input", "query")
# What the chat template is given along with the messages.
TEMPLATE_FIELDS = ("tools", "documents", "chat_template_kwargs")
# What some data sets have of the prompt in fields of its own; `prefopt data convert` makes one prompt of them.
PARTS = ("system", "input", "history", "context", "conversations")


def unread_parts(rows: Iterable[Mapping[str, Any]], names: Iterable[str] = PARTS) -> str | None:
    """What a step leaves out that belongs to the prompt, with counts, or None.

    >>> unread_parts([{"prompt": "Hi", "system": "Be kind."}, {"prompt": "Hi", "system": ""}])
    "not read, though it seems to belong to the prompt: 'system' of 1 rows; write it into the prompt"
    """
    counts = Counter(name for row in rows for name in names if row.get(name))
    return unread_in_words(counts) if counts else None


def unread_in_words(counts: Mapping[str, int]) -> str:
    """What `unread_parts` says of how many rows have which field."""
    fields = ", ".join(f"{name!r} of {count} rows" for name, count in counts.items())
    return f"not read, though it seems to belong to the prompt: {fields}; write it into the prompt"


def columns_of(rows: Any, names: Iterable[str]) -> Iterable[Mapping[str, Any]]:
    """Some columns of a `datasets.Dataset`, so that no others are read; a list of rows as it is."""
    columns = getattr(rows, "column_names", None)
    if columns is None:
        return rows
    some = [name for name in names if name in columns]
    return rows.with_format(None).select_columns(some) if some else []


class NothingShared(UserError):
    """The answers of a row without a prompt begin with nothing in common."""


def with_prompt(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A preference row (`chosen`, `rejected`) with its `prompt`, which may be the common beginning of both answers.

    Of messages it is the turns that both begin with, as in TRL, also where there is a text `prompt` beside them; that text is
    the user's message if both begin with the assistant. Of texts it is what both begin with up to the last white space:
    `trl.extract_prompt` cuts a word that begins alike, whose tokens are then others than those of the whole text.
    Anything else is returned as it is.

    Raises:
        NothingShared: without a prompt, the answers begin with nothing in common.
        UserError: another field seems to hold the prompt.

    >>> with_prompt({"chosen": "The sky is blue.", "rejected": "The sky is blurry."})
    {'chosen': ' blue.', 'rejected': ' blurry.', 'prompt': 'The sky is'}
    """
    chosen, rejected, prompt = row.get("chosen"), row.get("rejected"), row.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str) and prompt is None:
        if elsewhere := [name for name in OTHER_NAMES if row.get(name)]:
            raise UserError(
                f"field 'prompt': expected a text or messages, got nothing, but a field {elsewhere[0]!r}; rename "
                "that to prompt if it is what was answered, or remove it if the answers begin with the prompt"
            )
        length = _shared(chosen, rejected)
        while length and not chosen[length].isspace():
            length -= 1
        if not chosen[:length].strip():
            raise NothingShared(
                "expected 'chosen' and 'rejected' that begin with the same words, as there is no prompt beside them; "
                "add a field 'prompt', or drop the row"
            )
        return {**row, "chosen": chosen[length:], "rejected": rejected[length:], "prompt": chosen[:length]}
    if isinstance(prompt, list) or not (is_chat(chosen) and is_chat(rejected)):
        return row
    if length := shared_turns(chosen, rejected):
        return {**row, "chosen": chosen[length:], "rejected": rejected[length:], "prompt": chosen[:length]}
    if isinstance(prompt, str) and chosen[0].get("role") == rejected[0].get("role") == "assistant":
        return {**row, "prompt": [{"role": "user", "content": prompt}]}
    beside = "the prompt beside them is a text" if prompt else "there is no prompt beside them"
    raise NothingShared(
        f"expected 'chosen' and 'rejected' that begin with the same turns, as {beside}; correct or drop the row"
    )


def is_chat(messages: Any) -> bool:
    """Whether this is a list of objects, as messages are."""
    return isinstance(messages, list) and bool(messages) and all(isinstance(one, Mapping) for one in messages)


def shared_turns(chosen: list, rejected: list) -> int:
    """How many turns both begin with, such that one is left of each; what Arrow fills in as null tells none apart."""
    return _shared(
        *([{k: v for k, v in turn.items() if v is not None} for turn in turns] for turns in (chosen, rejected))
    )


def _shared(a: str | list, b: str | list) -> int:
    """Length of the common start, such that something is left of both."""
    most = min(len(a), len(b)) - 1
    return next((i for i in range(most) if a[i] != b[i]), max(most, 0))
