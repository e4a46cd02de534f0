r"""Dialogues written as one text, "\n\nHuman: ...\n\nAssistant: ...": HH-RLHF and Nectar."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prefopt.rankings.formats.fields import answer, entries, field, rank, user

_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_EXCHANGE = re.compile(r"(?:\A\s*|\n\n)Human:.*\n\nAssistant:", re.DOTALL)
_ROLES = {"Human": "user", "Assistant": "assistant"}


def turns(text: str) -> list[dict[str, str]]:
    r"""The turns of a dialogue as chat messages; two of one speaker in a row are one. No turns: no markers.

    >>> turns("\n\nHuman: Hi.\n\nAssistant: Hello!\n\nHuman: Bye.\n\nAssistant:")[1:]
    [{'role': 'assistant', 'content': 'Hello!'}, {'role': 'user', 'content': 'Bye.'}, {'role': 'assistant', 'content': ''}]
    """
    before, *parts = _SPEAKER.split(text)
    if before.strip():  # it does not start with a speaker
        return []
    found: list[dict[str, str]] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role, content = _ROLES[speaker], said.strip()
        if found and found[-1]["role"] == role:
            found[-1]["content"] += f"\n\n{content}"
        else:
            found.append({"role": role, "content": content})
    return found


def is_hh_rlhf(row: Mapping[str, Any]) -> bool:
    """Both answers are whole dialogues, perhaps with something before them."""
    texts = (row["chosen"], row["rejected"])
    return row.get("prompt") is None and all(isinstance(text, str) and _EXCHANGE.search(text) for text in texts)


def hh_rlhf(rows: Iterable[Mapping[str, Any]], counts: Counter[str]) -> Iterator[dict]:
    r"""Anthropic/hh-rlhf: `chosen` and `rejected`, each a whole dialogue, the same but for its last answer.

    The prompt is the turns both share, as messages. Pairs that part before the last answer, or end with a human, are
    dropped with a count, as is what does not begin with a speaker. Source: the card of Anthropic/hh-rlhf (https://github.com/anthropics/hh-rlhf).

    >>> said = "\n\nHuman: Name a fruit.\n\nAssistant: "
    >>> list(hh_rlhf([{"chosen": said + "Plum.", "rejected": said + "No."}], Counter()))
    [{'prompt': [{'role': 'user', 'content': 'Name a fruit.'}], 'completions': ['Plum.', 'No.'], 'ranks': [1, 2]}]
    """
    for row in rows:
        dialogues = [turns(field(row, name, str)) for name in ("chosen", "rejected")]
        if not all(dialogues):
            counts["dialogues that do not begin with a speaker"] += 1
        elif any(dialogue[-1]["role"] != "assistant" for dialogue in dialogues):
            counts["dialogues that do not end with an answer"] += 1
        elif dialogues[0][:-1] != dialogues[1][:-1]:
            counts["pairs that part before the last answer"] += 1
        else:
            answers = [dialogue[-1]["content"] for dialogue in dialogues]
            yield {"prompt": dialogues[0][:-1], "completions": answers, "ranks": [1, 2]}


def is_nectar(row: Mapping[str, Any]) -> bool:
    """The answers are a list of objects."""
    return isinstance(row["answers"], list)


def nectar(rows: Iterable[Mapping[str, Any]], counts: Counter[str]) -> Iterator[dict]:
    r"""berkeley-nest/Nectar: `prompt`, a dialogue that ends with "\n\nAssistant: ", and seven `answers`.

    Each answer has `answer`, `model` and `rank` (a float from 1, the best). Kept: `source`. Source: the dataset card.

    >>> answers = [{"answer": "Plum.", "model": "m", "rank": 1.0}, {"answer": "No.", "model": "n", "rank": 2.0}]
    >>> list(nectar([{"prompt": "\n\nHuman: Name a fruit.\n\nAssistant: ", "answers": answers}], Counter()))
    [{'prompt': [{'role': 'user', 'content': 'Name a fruit.'}], 'completions': ['Plum.', 'No.'], 'ranks': [1, 2], 'source': None}]
    """
    for row in rows:
        text = field(row, "prompt", str)
        prompt = turns(text) or user(text.strip())
        if prompt[-1] == {"role": "assistant", "content": ""}:
            prompt.pop()
        answers = entries(row, "answers", "answer")
        source = row.get("source")
        yield {
            "prompt": prompt,
            "completions": [answer(one, "answer", "answers.").strip() for one in answers],
            "ranks": [rank(one.get("rank")) for one in answers],
            "source": ", ".join(map(str, filter(None, source))) if isinstance(source, list) else source,
        }
