"""Answers that were rated one by one: UltraFeedback and HelpSteer."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prefopt.rankings.formats.fields import answer, entries, field, number, user

_ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")
ULTRAFEEDBACK_RATINGS = ("fine-grained_score", "overall_score", *_ASPECTS)
HELPSTEER_RATINGS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")

_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def is_ultrafeedback(row: Mapping[str, Any]) -> bool:
    """Its answers have annotations, or one of its scores; a few rows have no answers."""
    completions = row["completions"]
    if not isinstance(completions, list):
        return False
    names = {name for one in completions if isinstance(one, Mapping) for name in one}
    return not completions or bool(names & {"annotations", *ULTRAFEEDBACK_RATINGS})


def ultrafeedback(
    rows: Iterable[Mapping[str, Any]], counts: Counter[str], rating: str = "fine-grained_score"
) -> Iterator[dict]:
    """openbmb/UltraFeedback: `instruction` and four `completions` of `response`, scores and `annotations`.

    Ranked by `fine-grained_score`, the mean of four aspects that GPT-4 rated from 1 to 5, by which its authors ranked
    too. The mean is taken of `annotations` where there is no such score, as in older copies. `overall_score` (1 to 10) comes with
    the critique; in copies from before December 2023 many a 10 of it should be a 1. Each answer's own
    `custom_system_prompt` is no part of the prompt. Kept: `source`. Source: the dataset card and
    https://github.com/OpenBMB/UltraFeedback, section Update.

    >>> completions = [{"response": "Plum.", "fine-grained_score": 4.5}, {"response": "No.", "fine-grained_score": 2}]
    >>> row = next(ultrafeedback([{"instruction": "Name a fruit.", "completions": completions}], Counter()))
    >>> row["prompt"], row["completions"], row["ratings"]
    ([{'role': 'user', 'content': 'Name a fruit.'}], ['Plum.', 'No.'], [4.5, 2])
    """
    for row in rows:
        completions = entries(row, "completions", "response")
        yield {
            "prompt": user(field(row, "instruction", str)),
            "completions": [answer(one, "response", "completions.") for one in completions],
            "ratings": [_ultrafeedback_rating(one, rating) for one in completions],
            "source": row.get("source"),
        }


def _ultrafeedback_rating(completion: Mapping[str, Any], rating: str) -> float | None:
    if (given := number(completion.get(rating), rating)) is not None:
        return given
    annotations = completion.get("annotations") or {}
    aspects = _ASPECTS if rating == "fine-grained_score" else (rating,)
    values = [number((annotations.get(aspect) or {}).get("Rating"), f"{aspect}.Rating") for aspect in aspects]
    rated = [value for value in values if value is not None]
    return sum(rated) / len(rated) if rated else None


def helpsteer(rows: Iterable[Mapping[str, Any]], counts: Counter[str], rating: str = "helpfulness") -> Iterator[dict]:
    """nvidia/HelpSteer and HelpSteer2: a `prompt`, one `response` and its five ratings from 0 to 4 in each row.

    Rows of one prompt (HelpSteer has up to 4, HelpSteer2 2) are one comparison, wherever they stand: all rows are read first.
    Turns of a longer prompt, which the text parts by "<extra_id_1>Assistant" and "<extra_id_1>User", are its messages.
    Source: the cards of both.

    >>> ratings = dict.fromkeys(HELPSTEER_RATINGS, 1)
    >>> rows = [{"prompt": "Name a fruit.", "response": "No.", **ratings},
    ...         {"prompt": "Name a fruit.", "response": "Plum.", **ratings, "helpfulness": 4}]
    >>> row = next(helpsteer(rows, Counter()))
    >>> row["completions"], row["ratings"]
    (['No.', 'Plum.'], [1, 4])
    """
    answers: dict[str, list[tuple[str, float | None]]] = {}
    for row in rows:
        rated = answer(row, "response"), number(row.get(rating), rating)
        answers.setdefault(field(row, "prompt", str), []).append(rated)
    for prompt, of_prompt in answers.items():
        yield {
            "prompt": helpsteer_messages(prompt),
            "completions": [text for text, _ in of_prompt],
            "ratings": [value for _, value in of_prompt],
        }


def helpsteer_messages(prompt: str) -> list[dict[str, str]]:
    r"""The turns of a HelpSteer prompt.

    >>> [message["content"] for message in helpsteer_messages("Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\nBye")]
    ['Hi', 'Hello', 'Bye']
    """
    first, *parts = _TURN.split(prompt)
    later = [{"role": speaker.lower(), "content": text} for speaker, text in zip(parts[::2], parts[1::2], strict=True)]
    return later if later and not first.strip() else [*user(first), *later]
