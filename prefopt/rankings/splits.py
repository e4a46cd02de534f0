"""Train, validation and test rows such that no labeler, user or prompt is on two sides (InstructGPT, section 3.2).

The paper takes prompts that share a long common prefix once, at most 200 prompts of a user, and splits by user id.
"""

import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.errors import UserError

Row = Mapping[str, Any]


def one_per_prefix(rows: Sequence[Row], length: int) -> list[int]:
    """Positions of the rows whose prompt is the first with its first `length` characters, or is shorter than that.

    Rows of one prompt stay together. Of messages the texts count, without the system message, which may be the same
    everywhere.

    >>> one_per_prefix([{"prompt": p} for p in ("Write a poem", "Write a play", "Sing", "Write a poem")], 8)
    [0, 2, 3]
    """
    first: dict[str, str] = {}
    kept = []
    for position, row in enumerate(rows):
        text = _text(row["prompt"])
        prompt = json.dumps(row["prompt"], sort_keys=True, default=str)
        if len(text) < length or first.setdefault(text[:length], prompt) == prompt:
            kept.append(position)
    return kept


def most_per_key(rows: Sequence[Row], by: str, most: int, seed: int) -> list[int]:
    """Positions of the rows of at most `most` prompts of each value of the field `by`, drawn at random.

    >>> rows = [{"prompt": p, "user": "ann"} for p in "aabc"]
    >>> {rows[i]["prompt"] for i in most_per_key(rows, "user", 3, seed=0)} == {"a", "b", "c"}
    True
    >>> len({rows[i]["prompt"] for i in most_per_key(rows, "user", 2, seed=0)})
    2
    """
    prompts: dict[str, dict[str, None]] = defaultdict(dict)
    names = [
        (_key(row, by, position), json.dumps(row["prompt"], sort_keys=True, default=str))
        for position, row in enumerate(rows)
    ]
    for key, prompt in names:
        prompts[key][prompt] = None
    kept = {
        key: set(random.Random(f"{seed} {key}").sample([*own], min(most, len(own)))) for key, own in prompts.items()
    }
    return [position for position, (key, prompt) in enumerate(names) if prompt in kept[key]]


def split_by_key(rows: Sequence[Row], by: str, shares: Mapping[str, float], seed: int) -> dict[str, list[int]]:
    """Positions of the rows of each side, such that rows with one value of the field `by` are all on one side.

    Values go in random order to the side that lacks most rows of its share, so that a side has users with many rows as
    well as with few. Those with more rows than half the smallest share go first, those with most rows before others:
    drawn late, they would spoil the shares. No side stays empty.

    Raises:
        UserError: a row without a value of `by`, or fewer values than sides.

    >>> rows = [{"prompt": str(i), "user": i // 2} for i in range(20)]
    >>> sides = split_by_key(rows, "user", {"train": 0.8, "test": 0.2}, seed=0)
    >>> {side: len(positions) for side, positions in sides.items()}
    {'train': 16, 'test': 4}
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for position, row in enumerate(rows):
        groups[_key(row, by, position)].append(position)
    if len(groups) < len(shares):
        raise UserError(
            f"field {by!r}: expected at least {len(shares)} different values, one for each of {', '.join(shares)}, got "
            f"{len(groups)}; split by another field, e.g. prompt, or into fewer sides"
        )
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    large = min(shares.values()) * len(rows) / 2
    order.sort(key=lambda key: -len(groups[key]) if len(groups[key]) > large else 0)
    sides: dict[str, list[str]] = {side: [] for side in shares}
    lacking = {side: share * len(rows) for side, share in shares.items()}
    for i, key in enumerate(order):
        empty = [side for side in sides if not sides[side]]
        open_sides = empty if len(order) - i <= len(empty) else list(sides)
        side = max(open_sides, key=lambda side: lacking[side])
        sides[side].append(key)
        lacking[side] -= len(groups[key])
    return {side: sorted(position for key in keys for position in groups[key]) for side, keys in sides.items()}


def _key(row: Row, by: str, position: int) -> str:
    if row.get(by) is None:
        raise UserError(
            f"row {position}: field {by!r}: expected a value to split by, got {'None' if by in row else 'nothing'}; "
            "fill it, or split by another field, e.g. prompt"
        )
    return json.dumps(row[by], sort_keys=True, default=str)


def _text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(prompt, str):
        return prompt
    said = (message.get("content") for message in prompt if message.get("role") != "system")
    return "\n".join(content if isinstance(content, str) else json.dumps(content, default=str) for content in said)
