"""A language model as the judge, asked about every pair in both orders."""

import logging
import math
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.evaluation.judges.people import Completions, Row
from prefopt.evaluation.report.tables import prompt_text
from prefopt.inference.engines import Engine
from prefopt.inference.generate import prompt_ids
from prefopt.inference.journal import fingerprint_of, kept_rows

logger = logging.getLogger(__name__)
TEMPLATE = (
    "Two answers to an instruction are shown. Which one is better: more helpful, more truthful and less harmful? "
    "Neither its length nor its place counts.\n\nInstruction:\n{prompt}\n\nAnswer A:\n{a}\n\nAnswer B:\n{b}\n\n"
    "Say A or B. The better answer is"
)
# Tokens of a verdict that is written, for a model that thinks first.
WRITTEN = 512


class LanguageModelJudge:
    """The answer whose letter the model holds more likely is preferred; the verdict counts if it is the same with the
    answers exchanged, else the pair is a tie.

        p = 1/2 ([log pi(A | a first) > log pi(B | a first)] + [log pi(B | b first) > log pi(A | b first)])

    `too_long` counts pairs left out because the question does not fit into the model's positions.

    Args:
        load: gives the engine when it is first needed; a tokenizer with a chat template is asked as a chat. Of a server
            that takes no token ids, the letter that it writes is its verdict.
        template: the question, with {prompt}, {a} and {b}.
        folder: verdicts of every pair of models are kept there, and not asked for again.
        state: what the verdicts depend on besides the question and the completions: the model.

    Raises:
        UserError: the template lacks one of the three places, or the tokenizer writes A and B alike.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        template: str = TEMPLATE,
        *,
        batch_size: int = 16,
        folder: Path,
        state: Any = None,
        progress: Callable[[str], None] = logger.info,
    ) -> None:
        for place in ("{prompt}", "{a}", "{b}"):
            if place not in template:
                raise UserError(f"lm_judge_template: expected {{prompt}}, {{a}} and {{b}} in it; {place} is missing")
        self.load, self.template, self.batch_size = cache(load), template, batch_size
        self.folder, self.state, self.progress = folder, state, progress
        self.too_long = 0

    def judgements(self, completions: Completions, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        sampled = {m: {r["id"]: r for r in rows if r["decoding"] == "sampled"} for m, rows in completions.items()}
        found = []
        for a, b in pairs:
            shared = [(row, sampled[b][i]) for i, row in sampled[a].items() if i in sampled[b]]
            inputs = [self.state, self.template, fingerprint_of(shared)]
            rows = kept_rows(self.folder / f"{a} {b}.jsonl", inputs, partial(self._ask, shared, a, b))
            self.too_long += len(shared) - len(rows)
            found += rows
        if self.too_long:
            logger.warning("lm judge: %d pairs left out, which are longer than its context", self.too_long)
        return found

    def _ask(self, shared: Sequence[tuple[Row, Row]], a: str, b: str) -> list[dict[str, Any]]:
        engine = self.load()
        self.progress(f"judge lm: {a} and {b}, {len(shared)} prompts")
        asked = []  # prompts with both of their questions
        for ours, theirs in shared:
            texts = [
                fill(self.template, prompt=prompt_text(ours["prompt"]), a=first["completion"], b=second["completion"])
                for first, second in ((ours, theirs), (theirs, ours))
            ]
            asked.append((ours["id"], texts))
        asked, nats = (self._weighed if engine.takes_ids else self._written)(engine, asked)
        found = []
        for (prompt, _), orders in zip(asked, nats, strict=True):
            # [order, letter]; who is shown first is A. The smaller number of nats is the likelier letter.
            first = [0.5 * (1 + (of_a < of_b) - (of_a > of_b)) for of_a, of_b in orders]
            for_a = [first[0], 1 - first[1]]
            same = for_a[0] == for_a[1]
            verdict = {"preference": for_a[0] if same else 0.5, "consistent": same, "first": sum(first) / 2}
            found.append({"id": prompt, "decoding": "sampled", "a": a, "b": b, **verdict})
        return found

    def _weighed(self, engine: Engine, asked: list[tuple[Any, list[str]]]) -> tuple[list[tuple[Any, list]], list]:
        """The questions that are not too long, and `[question, order, letter]`: nats of each letter as the next word."""
        tokenizer = engine.tokenizer
        chat = tokenizer.chat_template is not None
        letters = [
            tokenizer(letter if chat else f" {letter}", add_special_tokens=False)["input_ids"] for letter in "AB"
        ]
        if not all(letters) or letters[0] == letters[1]:
            raise UserError("the judge's tokenizer does not tell A from B; choose a model that knows letters")
        longest = math.inf if engine.limit is None else engine.limit - max(map(len, letters))
        ids = [
            (prompt, [prompt_ids(tokenizer, [{"role": "user", "content": text}] if chat else text) for text in texts])
            for prompt, texts in asked
        ]
        ids = [(prompt, both) for prompt, both in ids if max(map(len, both)) <= longest]
        rows = [(question + letter, len(question)) for _, both in ids for question in both for letter in letters]
        return ids, engine.nats(rows, self.batch_size).reshape(-1, 2, 2).tolist() if rows else []

    def _written(self, engine: Engine, asked: list[tuple[Any, list[str]]]) -> tuple[list[tuple[Any, list]], list]:
        """The same of a model that writes its verdict: 0 for the letter that it names, 1 for the other, alike without one."""
        chats = [[{"role": "user", "content": text}] for _, texts in asked for text in texts]
        said = engine.generate(chats, max_new_tokens=WRITTEN, temperature=0, batch_size=self.batch_size)
        named = [set(re.findall(r"\b[AB]\b", answer.text)) for (answer,) in said]
        nats = [[float(letter not in letters) if len(letters) == 1 else 0.5 for letter in "AB"] for letters in named]
        return asked, [nats[i : i + 2] for i in range(0, len(nats), 2)]


def fill(template: str, **texts: str) -> str:
    """The question; a place name inside an answer stays text.

    >>> fill("{prompt}: {a} or {b}?", prompt="Which", a="{b}", b="no")
    'Which: {b} or no?'
    """
    return re.sub(rf"\{{({'|'.join(texts)})\}}", lambda place: texts[place[1]], template)
