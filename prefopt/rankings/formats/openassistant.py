"""OpenAssistant conversations: trees of messages in which the replies to one message are ranked."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prefopt.errors import UserError
from prefopt.rankings.formats.fields import answer, field, rank

_ROLES = {"prompter": "user", "assistant": "assistant"}


def messages(rows: Iterable[Mapping[str, Any]], counts: Counter[str]) -> Iterator[dict]:
    """OpenAssistant/oasst1 and oasst2: one message a row, its `parent_id` saying what it answers.

    The prompt is the path from the root, the completions are the assistant's replies to its end, ranked by `rank`
    (from 0, the best). Dropped with a count: messages that are deleted, that reviewers rejected or did not review
    (`review_result` is not true), all below these, and replies without a rank. A table is read to its end before the
    first comparison comes, as its order is not promised. Kept: `id` (of the message answered), `lang`. Source: the
    dataset cards, and https://github.com/LAION-AI/Open-Assistant, oasst-data/oasst_data/schemas.py.

    >>> said = [("q", None, "Name a fruit.", "prompter", None), ("a", "q", "Plum.", "assistant", 0),
    ...         ("b", "q", "No.", "assistant", 1)]
    >>> rows = [dict(zip(("message_id", "parent_id", "text", "role", "rank"), row)) for row in said]
    >>> next(messages(rows, Counter()))["completions"]
    ['Plum.', 'No.']
    """
    yield from _comparisons([_message(row) for row in rows], counts)


def is_tree(row: Mapping[str, Any]) -> bool:
    """The prompt is a message with replies, rather than a text."""
    return isinstance(row["prompt"], Mapping) and "message_id" in row["prompt"]


def trees(rows: Iterable[Mapping[str, Any]], counts: Counter[str]) -> Iterator[dict]:
    """OpenAssistant's exported trees (`*.trees.jsonl`): a `prompt` with nested `replies` a row, otherwise as `messages`.

    >>> replies = [{"message_id": m, "text": t, "role": "assistant", "rank": r} for m, t, r in (("a", "Plum.", 0), ("b", "No.", 1))]
    >>> prompt = {"message_id": "q", "text": "Name a fruit.", "role": "prompter", "replies": replies}
    >>> next(trees([{"message_tree_id": "q", "prompt": prompt}], Counter()))["ranks"]
    [0, 1]
    """
    for row in rows:
        flat = []
        left = [(field(row, "prompt", Mapping), None)]
        while left:
            message, parent = left.pop()
            flat.append(_message({**message, "parent_id": parent}))
            left += [(reply, message["message_id"]) for reply in reversed(message.get("replies") or [])]
        yield from _comparisons(flat, counts)


def _message(row: Mapping[str, Any]) -> dict[str, Any]:
    """Only what is needed, as a whole table of it is held."""
    if field(row, "role", str) not in _ROLES:
        raise UserError(f"field 'role': expected prompter or assistant, got {row['role']!r}; delete the row")
    found = {"id": field(row, "message_id", str), "text": answer(row, "text"), "role": row["role"]}
    found |= {"parent": row.get("parent_id"), "rank": rank(row.get("rank")), "lang": row.get("lang")}
    found["problem"] = None
    if row.get("deleted"):
        found["problem"] = "deleted messages"
    elif row.get("review_result", True) is not True:
        found["problem"] = "messages that reviewers rejected or did not review"
    return found


def _comparisons(rows: list[dict[str, Any]], counts: Counter[str]) -> Iterator[dict]:
    kept = {}
    for row in rows:
        if row["problem"]:
            counts[row["problem"]] += 1
        else:
            kept[row["id"]] = row
    replies = defaultdict(list)
    for row in kept.values():
        if row["role"] == "assistant":
            replies[row["parent"]].append(row)
    for parent, siblings in replies.items():
        path = _path(parent, kept)
        if path is None:
            counts["replies below a message that is missing or dropped"] += len(siblings)
        elif len(siblings) == 1:
            counts["replies without another to compare with"] += 1
        else:
            yield {
                "prompt": [{"role": _ROLES[row["role"]], "content": row["text"]} for row in path],
                "completions": [row["text"] for row in siblings],
                "ranks": [row["rank"] for row in siblings],
                "id": parent,
                "lang": kept[parent]["lang"],
            }


def _path(name: str | None, kept: Mapping[str, dict]) -> list[dict] | None:
    """The messages from the root to the one named; None if one of them is not there."""
    path: list[dict] = []
    while name is not None:
        if name not in kept or len(path) > len(kept):  # the latter: the messages answer each other in a circle
            return None
        path.append(kept[name])
        name = kept[name]["parent"]
    return path[::-1] or None
