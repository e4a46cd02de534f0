"""Two models' answers and which of them won, as LMSYS and LMArena publish the votes of Chatbot Arena."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from prefopt.errors import UserError
from prefopt.rankings.checks import joined_parts, shorten
from prefopt.rankings.formats.fields import field, number, user
from prefopt.rankings.formats.pairs import after_system
from prefopt.rankings.prompts import shared_turns

_SIDES = ("a", "b")
_TIES = ("tie", "tie (bothbad)", "both_bad", "both bad")


def conversations(rows: Iterable[Mapping[str, Any]], counts: Counter[str]) -> Iterator[dict]:
    """`conversation_a`, `conversation_b` and the `winner`: `model_a`, `model_b`, or a tie, also of two bad ones.

    lmsys/chatbot_arena_conversations, lmsys/mt_bench_human_judgments, lmarena-ai/arena-human-preference-100k and -140k. The
    prompt is the turns that both begin with; later turns of the user, which follow other answers, are part of what is
    compared. Of MT-bench's rows that judge the first `turn`, what follows it is left out. Kept: the `judge` as `labeler`,
    `question_id` as `id`, `language` as `lang`. Source: the dataset cards.

    >>> question = {"role": "user", "content": "Name a fruit."}
    >>> answers = [{"role": "assistant", "content": text} for text in ("Plum.", "No.")]
    >>> row = {"conversation_a": [question, answers[0]], "conversation_b": [question, answers[1]], "winner": "model_b"}
    >>> next(conversations([row], Counter()))["ranks"]
    [2, 1]
    """
    for row in rows:
        chats = [_turns(row, f"conversation_{side}") for side in _SIDES]
        if any(not isinstance(turn["content"], str) for chat in chats for turn in chat):
            counts["pairs with a turn that is no text"] += 1
            continue
        shared = shared_turns(*chats) if all(chats) else 0
        if not shared or any(chat[shared]["role"] != "assistant" for chat in chats):
            counts["pairs that share no prompt"] += 1
            continue
        yield {
            "prompt": chats[0][:shared],
            "completions": [chat[shared:] for chat in chats],
            "ranks": _ranks(row),
            "labeler": None if row.get("judge") is None else str(row["judge"]),
            "id": row.get("question_id"),
            "lang": row.get("language"),
        }


def answers(rows: Iterable[Mapping[str, Any]], counts: Counter[str]) -> Iterator[dict]:
    """`prompt`, `response_a`, `response_b` and the `winner`, or `winner_model_a`, `winner_model_b` of 0 and 1.

    lmsys/lmsys-arena-human-preference-55k, whose three texts are lists in JSON with an entry for each turn; also plain texts,
    with a `winner` of `a`, `b` or a tie. A turn without an answer leaves the row out. Kept: `id`, the `judge` as `labeler`.
    Source: the dataset card and https://www.kaggle.com/competitions/lmsys-chatbot-arena/data.

    >>> row = {"prompt": '["Why?"]', "response_a": '["So."]', "response_b": '["No."]', "winner_model_a": 1, "winner_model_b": 0}
    >>> next(answers([row], Counter()))["completions"]
    [[{'role': 'assistant', 'content': 'So.'}], [{'role': 'assistant', 'content': 'No.'}]]
    """
    for row in rows:
        asked, *replies = (_by_turn(row, name) for name in ("prompt", "response_a", "response_b"))
        turns = [[asked, reply] for reply in replies]
        if any(len(reply) != len(asked) or None in (*asked, *reply) for reply in replies):
            counts["pairs with a turn that has no question or no answer"] += 1
            continue
        chats = [
            [turn for said in zip(*both, strict=True) for turn in (*user(said[0]), _assistant(said[1]))]
            for both in turns
        ]
        yield {
            "prompt": after_system(row.get("system"), chats[0][:1]),
            "completions": [chat[1:] for chat in chats],
            "ranks": _ranks(row),
            "labeler": None if row.get("judge") is None else str(row["judge"]),
            "id": row.get("id"),
        }


def has_winner(row: Mapping[str, Any]) -> bool:
    """It says which of two answers won."""
    return row.get("winner") is not None or row.get("winner_model_a") is not None


def _ranks(row: Mapping[str, Any]) -> list[int]:
    winner = row.get("winner")
    if winner is None:
        won = [number(row.get(f"winner_model_{side}"), f"winner_model_{side}") for side in _SIDES]
        if None in won:
            raise UserError("field 'winner': expected model_a, model_b or a tie, got nothing; fill it or drop the row")
        return [2 - int(bool(won[0])), 2 - int(bool(won[1]))] if any(won) else [1, 1]
    said = str(winner).strip().lower()
    if said in _TIES:
        return [1, 1]
    for side, ranks in zip(_SIDES, ([1, 2], [2, 1]), strict=True):
        if said in (side, f"model_{side}", f"response_{side}"):
            return ranks
    raise UserError(
        f"field 'winner': expected model_a, model_b or one of {', '.join(_TIES)}, got {shorten(winner)}; mend or drop the row"
    )


def _turns(row: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The messages of a conversation, up to the answer to the turn that was judged."""
    turns: list[dict[str, Any]] = []
    judged = row.get("turn")
    for i, message in enumerate(field(row, name, list)):
        message = field({f"{name}[{i}]": message}, f"{name}[{i}]", Mapping)
        asked = sum(turn["role"] == "user" for turn in turns)
        if isinstance(judged, int) and message.get("role") == "user" and asked == max(judged, 1):
            break
        turns.append({"role": field(message, "role", str), "content": _text(message.get("content"))})
    return turns


def _by_turn(row: Mapping[str, Any], name: str) -> list[str | None]:
    """The texts of one side: those of a list, also as JSON, or one text."""
    value = row.get(name)
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, list) and all(isinstance(text, str | None) for text in value):
        return value
    return [None if row.get(name) is None else field(row, name, str)]


def _text(content: Any) -> Any:
    """The content of a turn as one text, if it is one."""
    try:
        return joined_parts(content) if isinstance(content, list) else content
    except UserError:
        return None


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
