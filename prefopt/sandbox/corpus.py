"""Pretraining documents about the world, and the knowledge tasks whose answers only pretraining teaches."""

import random
from dataclasses import dataclass

from prefopt.sandbox import vocabulary as words
from prefopt.sandbox.answers import FORUM, write_answer
from prefopt.sandbox.facts import RELATIONS, REWORDED, STATEMENT, Facts, relations_of, sentence
from prefopt.sandbox.tasks import parse_prompt

# Shares of the kinds of document, in the corpus as a whole.
DOCUMENT_SHARES = {"notes": 18, "register": 4, "questions": 4, "known": 5, "dictionary": 5, "sums": 10, "forum": 54}
BACKGROUND_SHARE = 0.3  # chance of each slot that no prompt asks for (king, friend, year) to be told in a note
TASKS_PER_KIND = {"facts": 110, "background": 56, "dictionary": 40, "sums": 200}
_KNOWN = "it is well known that"


@dataclass(frozen=True)
class Task:
    """One multiple-choice item: `answer` is the choice that should be likeliest after `context`.

    Each choice starts with a space and is one word, so likelihood and exact greedy match both apply.
    """

    context: str
    answer: str
    choices: tuple[str, ...]
    kind: str  # "facts", "background", "dictionary" or "sums"


class Knowledge:
    """What pretraining text tells: facts, an invented language, sums; and which of it the tasks ask.

    The tasks say "it is well known that ..." of some pieces; the corpus says so only of the others, so no task item
    stands there word for word.
    """

    def __init__(self, seed: int, facts: Facts):
        rng = random.Random(f"{seed}/knowledge")
        foreign = list(words.FOREIGN)
        rng.shuffle(foreign)
        self.facts = facts
        self.dictionary = dict(zip(words.DICTIONARY, foreign, strict=True))
        numbers = range(1, words.LARGEST_SUMMAND + 1)
        self.sums = [(a, b) for a in numbers for b in numbers]
        pieces: dict[str, list[tuple]] = {
            "facts": [s for s in facts.slots() if RELATIONS[s[1]].questions],
            "background": [s for s in facts.slots() if not RELATIONS[s[1]].questions],
            "dictionary": [(w,) for w in self.dictionary],
            "sums": list(self.sums),
        }
        self.asked: list[tuple[str, tuple]] = []
        self.told: list[tuple[str, tuple]] = []
        for kind, items in pieces.items():
            rng.shuffle(items)
            self.asked += [(kind, item) for item in items[: TASKS_PER_KIND[kind]]]
            self.told += [(kind, item) for item in items[TASKS_PER_KIND[kind] :]]

    def statement(self, kind: str, item: tuple) -> tuple[str, str]:
        """(words before the answer, answer) of one piece of knowledge."""
        if kind == "dictionary":
            return f"the Tolan word for {item[0]} is", self.dictionary[item[0]]
        if kind == "sums":
            return f"{item[0]} plus {item[1]} is", str(item[0] + item[1])
        value = self.facts.value(*item)
        text = self.facts.claim(*item).render()
        return text[: -len(value) - 1], value

    def tasks(self, seed: int) -> list[Task]:
        rng = random.Random(f"{seed}/tasks")
        tasks = []
        for kind, item in self.asked:
            before, answer = self.statement(kind, item)
            if kind == "dictionary":
                others = [w for w in self.dictionary.values() if w != answer]
            elif kind == "sums":
                near = range(max(2, int(answer) - 7), min(int(answer) + 7, 2 * words.LARGEST_SUMMAND) + 1)
                others = [str(n) for n in near if str(n) != answer]
            else:
                others = [v for v in RELATIONS[item[1]].values if v != answer]
            choices = [answer, *rng.sample(others, min(7, len(others)))]
            rng.shuffle(choices)
            tasks.append(Task(f"Known: {_KNOWN} {before}", f" {answer}", tuple(f" {c}" for c in choices), kind))
        return tasks


def write_document(knowledge: Knowledge, forum_prompts: list[str], rng: random.Random) -> str:
    """One document; its first word tells the kind."""
    facts = knowledge.facts
    kind = rng.choices(list(DOCUMENT_SHARES), list(DOCUMENT_SHARES.values()))[0]
    entity = rng.choices(list(facts.frequency), list(facts.frequency.values()))[0]
    if kind == "notes":
        own = relations_of(entity)
        told = rng.sample(own, rng.randint(2, len(own)))
        told += [r for r in relations_of(entity, asked=False) if not r.questions and rng.random() < BACKGROUND_SHARE]
        rng.shuffle(told)
        clauses = [_statement(facts, entity, r.name, rng) for r in told]
        if rng.random() < 0.2:
            clauses.insert(0, facts.claim(entity, "kind").render())
        return "Note: " + _join(clauses)
    if kind == "register":
        relation = rng.choice([r for r in RELATIONS.values() if r.kind == "person" and r.questions])
        value = rng.choice(relation.values)
        people = facts.holders(relation.name, value)
        people = rng.sample(people, rng.randint(2, min(4, len(people))))
        return "Register: " + _join([_statement(facts, p, relation.name, rng) for p in people])
    if kind == "questions":
        relation = rng.choice(relations_of(entity))
        question = rng.choice(relation.questions).format(e=entity)
        return f"Question: {question} Answer: " + _join([_statement(facts, entity, relation.name, rng)])
    if kind == "known":
        before, answer = knowledge.statement(*rng.choice(knowledge.told))
        return f"Known: {_KNOWN} {before} {answer}."
    if kind == "dictionary":
        entries = rng.sample(list(knowledge.dictionary), rng.randint(2, 4))
        return "Dictionary: " + _join([" ".join(knowledge.statement("dictionary", (w,))) for w in entries])
    if kind == "sums":
        pairs = rng.sample(knowledge.sums, rng.randint(3, 6))
        return "Sums: " + _join([" ".join(knowledge.statement("sums", p)) for p in pairs])
    prompt = rng.choice(forum_prompts)
    return prompt + write_answer(parse_prompt(prompt), facts, rng, FORUM)


def _statement(facts: Facts, entity: str, relation: str, rng: random.Random) -> str:
    return facts.claim(entity, relation, rng.choice([STATEMENT, REWORDED])).render()


def _join(clauses: list[str]) -> str:
    return " ".join(sentence(clause) for clause in clauses)
