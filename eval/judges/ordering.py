"""A language model as the judge of all answers to a prompt at once, asked in several orders."""

import random
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from string import ascii_uppercase
from typing import Any, Literal

import numpy as np
from scipy.stats import rankdata

from prefopt.errors import UserError
from prefopt.evaluation.judges.language_model import WRITTEN, fill
from prefopt.evaluation.report.tables import prompt_text
from prefopt.inference.engines import Engine
from prefopt.inference.generate import derived_seed, prompt_ids
from prefopt.rankings.row import parse_ranking

By = Literal["letters", "order"]
_ASKED = (
    "Several answers to an instruction are shown. Which ones are better: more helpful, more truthful and less harmful? "
    "Neither their length nor their place counts.\n\nInstruction:\n{prompt}\n\n{answers}\n\n"
)
TEMPLATES: dict[By, str] = {
    "letters": _ASKED + "Say the letter of the best answer. The best answer is",
    "order": _ASKED + 'Order all of them from best to worst, with = between equally good ones, as in "B > A = C". '
    "Write the order and nothing else.",
}


class OrderingJudge:
    """Asks about all K answers at once, in `orders` orders: drawn ones, each of them backwards as well.

    By "letters" the score of an answer is the log-likelihood of its letter as the best one, of which one forward pass
    gives all K; by "order" the model writes an order such as "B > A = C", and the score is the number of answers that it
    puts below, those that it ties counting half (Borda's count). The mean over orders is without the taste for a place.

    Args:
        engine: the model.
        by: default: letters, and order of a server that takes no token ids.
        template: the question, with {prompt} and {answers}; default: that of `by` in `TEMPLATES`.
        seed: of the orders.

    Raises:
        UserError: the template lacks one of the two places, the tokenizer writes two letters alike, or the server takes no
            token ids.
    """

    def __init__(
        self,
        engine: Engine,
        by: By | None = None,
        template: str | None = None,
        *,
        orders: int = 2,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        self.engine, self.by = engine, by or ("letters" if engine.takes_ids else "order")
        self.template = check_template(template or TEMPLATES[self.by])
        self.orders, self.batch_size, self.seed = orders, batch_size, seed
        if by == "letters" and engine.tokenizer is None:
            raise UserError(
                "judge_by letters needs the judge's tokenizer: name its folder or Hub id, or judge by order"
            )

    def judge(self, rows: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> list[dict[str, Any]]:
        """For each row `scores` and `places` (of the K answers, 0 = shown first) in every order that could be read, and what
        it took: `calls`, `prompt_tokens` and `completion_tokens` (None where no tokenizer is known), `unread` orders and
        whether the question is `too_long`.

        `numbers` are those of the rows in their file, which decide about their orders.
        """
        orders = [
            shown_orders(len(row["completions"]), self.orders, self.seed, number)
            for row, number in zip(rows, numbers, strict=True)
        ]
        questions = [
            (self._question(row, shown), len(shown)) for row, of in zip(rows, orders, strict=True) for shown in of
        ]
        answers = iter((self._letters if self.by == "letters" else self._written)(questions))
        return [_judgement([(shown, next(answers)) for shown in of]) for of in orders]

    def _question(self, row: Mapping[str, Any], shown: Sequence[int]) -> str:
        letters = zip(ascii_uppercase, shown, strict=False)
        answers = "\n\n".join(f"Answer {letter}:\n{_answer(row['completions'][i])}" for letter, i in letters)
        return fill(self.template, prompt=prompt_text(row["prompt"]), answers=answers)

    def _letters(self, questions: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
        """Scores of the places by the likelihood of their letters."""
        tokenizer = self.engine.tokenizer
        chat = tokenizer.chat_template is not None
        written = [
            tokenizer(letter if chat else f" {letter}", add_special_tokens=False)["input_ids"]
            for letter in ascii_uppercase[: max(k for _, k in questions)]
        ]
        if not all(written) or len({tuple(ids) for ids in written}) < len(written):
            raise UserError("the judge's tokenizer does not tell letters apart; choose a model that does")
        room = None if self.engine.limit is None else self.engine.limit - max(map(len, written))
        asked = [self._ids(text) for text, _ in questions]
        fits = [room is None or len(ids) <= room for ids in asked]
        rows = [
            (ids + letter, len(ids))
            for ids, fit, (_, k) in zip(asked, fits, questions, strict=True)
            if fit
            for letter in written[:k]
        ]
        nats = iter(self.engine.nats(rows, self.batch_size).tolist() if rows else [])
        return [
            {
                "scores": [-next(nats) for _ in range(k)] if fit else None,
                "too_long": not fit,
                "prompt": len(ids),
                "said": 0,
            }
            for ids, fit, (_, k) in zip(asked, fits, questions, strict=True)
        ]

    def _written(self, questions: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
        """Scores of the places by the order that the model writes."""
        tokenizer, limit = self.engine.tokenizer, self.engine.limit
        lengths = [None if tokenizer is None else len(self._ids(text)) for text, _ in questions]
        fits = [limit is None or n is None or n + WRITTEN <= limit for n in lengths]
        chat = tokenizer is None or tokenizer.chat_template is not None
        prompts = [[{"role": "user", "content": text}] if chat else text for text, _ in questions]
        settings = {"max_new_tokens": WRITTEN, "temperature": 0, "batch_size": self.batch_size}
        drawn = iter(self.engine.generate([p for p, fit in zip(prompts, fits, strict=True) if fit], **settings))
        result = []
        for (_, k), fit, length in zip(questions, fits, lengths, strict=True):
            (said,) = next(drawn) if fit else (None,)
            scores = None if said is None else order_scores(said.text, k)
            tokens = None if said is None or length is None else len(said.ids)
            result.append({"scores": scores, "too_long": not fit, "prompt": length, "said": tokens})
        return result

    def _ids(self, text: str) -> list[int]:
        chat = self.engine.tokenizer.chat_template is not None
        return prompt_ids(self.engine.tokenizer, [{"role": "user", "content": text}] if chat else text)


def check_template(template: str) -> str:
    """The template, if it has the places for prompt and answers."""
    for place in ("{prompt}", "{answers}"):
        if place not in template:
            raise UserError(f"judge_template: expected {{prompt}} and {{answers}} in it; {place} is missing")
    return template


def _answer(completion: Any) -> str:
    """As text; of a single message what it says."""
    return (
        str(completion[0]["content"])
        if isinstance(completion, list) and len(completion) == 1
        else prompt_text(completion)
    )


def _judgement(of_row: Sequence[tuple[list[int], dict[str, Any]]]) -> dict[str, Any]:
    """What all orders of a row say, of its completions where the model spoke of places."""
    scores, places = [], []
    for shown, answer in of_row:
        if answer["scores"] is not None:
            scores.append([answer["scores"][place] for place in np.argsort(shown)])
            places.append(np.argsort(shown).tolist())
    said = [answer for _, answer in of_row if not answer["too_long"]]
    total = {
        key: None if any(one[name] is None for one in said) else sum(one[name] for one in said)
        for key, name in (("prompt_tokens", "prompt"), ("completion_tokens", "said"))
    }
    counts = {"unread": len(said) - len(scores), "too_long": len(said) < len(of_row)}
    return {"scores": scores, "places": places, "calls": len(said), **total, **counts}


def shown_orders(k: int, orders: int, *seed: object) -> list[list[int]]:
    """Which of k answers is shown at each place, in every order: drawn ones, each of them backwards as well.

    >>> first, backwards, other = shown_orders(4, 3, "seed")
    >>> backwards == first[::-1], sorted(other)
    (True, [0, 1, 2, 3])
    """
    generator = random.Random(derived_seed(*seed))
    found: list[list[int]] = []
    for number in range(orders):
        found.append(found[-1][::-1] if number % 2 else generator.sample(range(k), k))
    return found


def order_scores(text: str, k: int) -> list[float] | None:
    """Of a written order, for each of the first k letters the answers below it, ties counting half; None if it is none.

    The last one counts: models that think write others before.

    >>> order_scores("The order is: C > A = B.", 3)
    [0.5, 0.5, 2.0]
    >>> order_scores("All of them are good.", 3) is None
    True
    """
    letters = ascii_uppercase[:k]
    for found in reversed(re.findall(r"\b[A-Z](?:\s*[>=]\s*[A-Z])+\b", text)):
        if sorted(re.findall("[A-Z]", found)) == list(letters):
            return [float(rank) - 1 for rank in rankdata([-rank for rank in parse_ranking(found, letters)])]
    return None


def same_verdicts(scores: Sequence[Sequence[float]]) -> float | None:
    """Share of the pairs of answers on which two rankers (orders, models) say the same: better, worse or tied.

    Mean over the pairs of rankers, from their scores `[M, K]`; None of a single one.

    >>> same_verdicts([[3, 2, 1], [3, 1, 2]]) == 2 / 3
    True
    """
    signs = [np.sign(np.subtract.outer(of, of))[np.triu_indices(len(of), 1)] for of in map(np.asarray, scores)]
    shares = [float(np.mean(a == b)) for a, b in combinations(signs, 2)]
    return float(np.mean(shares)) if shares else None


def earlier_wins(scores: Sequence[Sequence[float]], places: Sequence[Sequence[int]]) -> float:
    """Share of the verdicts on pairs that go to the answer shown before the other, ties counting half; .5 is without bias.

    From scores and places `[M, K]` in M orders.

    >>> earlier_wins([[2.0, 1.0], [2.0, 2.0]], [[0, 1], [1, 0]])
    0.75
    """
    shares = []
    for of, at in zip(scores, places, strict=True):
        shown = np.asarray(of)[np.argsort(at)]
        leads = np.subtract.outer(shown, shown)[np.triu_indices(len(shown), 1)]
        shares.append(float(np.mean((1 + np.sign(leads)) / 2)))
    return float(np.mean(shares))
