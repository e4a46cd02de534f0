"""Entities, facts and claims of the sandbox world, and the sentences that state them.

A claim says that a relation gives an entity a value. Every claim has fixed wordings ("forms"), so that the sentence
parser below reads back exactly what the renderer writes, and the gold reward needs no model.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from prefopt.sandbox import vocabulary as words

STATEMENT, REWORDED, GREETING, EXTRACT = "statement", "reworded", "greeting", "extract"


@dataclass(frozen=True)
class Relation:
    """A slot of one kind of entity: its name in prompts, its values, its wordings and the questions about it."""

    name: str
    kind: str
    values: tuple[str, ...]
    forms: dict[str, str] = field(hash=False)
    questions: tuple[str, ...] = ()
    about: str = ""  # how a prompt asks for it: "Mention {about}", "ask about {about}"


# name | kind of entity | values | statement | the same in other words | questions; those without are never asked in a
# prompt: knowledge that only pretraining text holds.
_TABLE = """
home | person | CITIES | {e} lives in {v} | the home of {e} is {v} | Where does {e} live? | Which city is the home of {e}?
job | person | JOBS | {e} works as a {v} | the job of {e} is {v} | What is the job of {e}? | Which work does {e} do?
food | person | FOODS | {e} likes {v} | the food of {e} is {v} | What does {e} like? | Which food does {e} like?
pet | person | PETS | {e} has a {v} | the pet of {e} is a {v} | Which pet does {e} have? | What is the pet of {e}?
river | city | RIVERS | {e} lies on the {v} | the river of {e} is the {v} | Which river does {e} lie on? | What is the river of {e}?
craft | city | CRAFTS | {e} is known for {v} | the craft of {e} is {v} | What is {e} known for? | Which craft does {e} have?
king | city | KINGS | {e} is ruled by {v} | the king of {e} is {v}
friend | person | PEOPLE | {e} is a friend of {v} | the friend of {e} is {v}
year | person | YEARS | {e} was born in {v} | the year of {e} is {v}
diet | animal | DIETS | {e} eats {v} | the diet of {e} is {v} | What does {e} eat? | What is the diet of {e}?
den | animal | DENS | {e} sleeps in {v} | the den of {e} is in {v} | Where does {e} sleep? | Where is the den of {e}?
colour | animal | COLOURS | {e} looks {v} | the colour of {e} is {v} | How does {e} look? | What is the colour of {e}?
"""
# Of what a person is asked about: the greeting, and what a text says that it is.
_ASKED = {
    "home": ("hello {e}, how is life in {v}", "the city in the text is {v}"),
    "job": ("hello {e}, how is your work as a {v}", "the job in the text is {v}"),
    "food": ("hello {e}, do you want {v}", "the food in the text is {v}"),
    "pet": ("hello {e}, how is your {v}", "the pet in the text is a {v}"),
}


def _relation(line: str) -> Relation:
    name, kind, values, statement, reworded, *questions = line.split(" | ")
    forms = {
        STATEMENT: statement,
        REWORDED: reworded,
        **dict(zip((GREETING, EXTRACT), _ASKED.get(name, ()), strict=False)),
    }
    about = f"the {'city' if name == 'home' else name}" if questions else ""
    return Relation(name, kind, tuple(getattr(words, values)), forms, tuple(questions), about)


RELATIONS = {relation.name: relation for relation in map(_relation, _TABLE.strip().splitlines())}
RELATIONS["kind"] = Relation("kind", "any", tuple(words.KINDS), {STATEMENT: "{e} is {v}"})
ENTITIES = {
    **dict.fromkeys(words.PEOPLE, "person"),
    **dict.fromkeys(words.CITIES, "city"),
    **{f"the {name}": "animal" for name in words.ANIMALS},
}
_KIND_VALUE = {"person": "a person", "city": "a city", "animal": "an animal"}
_LOWER_ENTITIES = {name.lower(): name for name in ENTITIES}
_LOWER_VALUES = {name: {v.lower(): v for v in r.values} for name, r in RELATIONS.items()}
_PATTERNS = [
    (r.name, form, re.compile(re.escape(t).replace(r"\{e\}", "(?P<e>.+)").replace(r"\{v\}", "(?P<v>.+)")))
    for r in RELATIONS.values()
    for form, t in r.forms.items()
]


@dataclass(frozen=True)
class Claim:
    """`relation` gives `entity` the value `value`; an extract names no entity and has the entity ''."""

    entity: str
    relation: str
    value: str
    form: str = STATEMENT

    def render(self) -> str:
        """The claim as words, without capital letter and final mark.

        >>> Claim("Ada", "home", "Selby").render()
        'Ada lives in Selby'
        """
        return RELATIONS[self.relation].forms[self.form].format(e=self.entity, v=self.value)


def applies(relation: Relation, entity: str) -> bool:
    return relation.kind in ("any", ENTITIES[entity])


def relations_of(entity: str, *, asked: bool = True) -> list[Relation]:
    """The relations an entity has; with `asked`, only those that prompts may ask for."""
    return [r for r in RELATIONS.values() if r.kind == ENTITIES[entity] and (r.questions or not asked)]


@lru_cache(maxsize=65536)
def parse_claim(text: str) -> Claim | None:
    """The claim that a clause states (case does not matter), or None.

    >>> parse_claim("The home of Ada is Selby")
    Claim(entity='Ada', relation='home', value='Selby', form='reworded')
    >>> parse_claim("Ada lives in bread") is None
    True
    """
    text = text.lower()
    for relation, form, pattern in _PATTERNS:
        match = pattern.fullmatch(text)
        if match is None:
            continue
        found = match.groupdict()
        value = _LOWER_VALUES[relation].get(found["v"])
        entity = "" if form == EXTRACT else _LOWER_ENTITIES.get(found["e"])
        if value is not None and entity is not None and (not entity or applies(RELATIONS[relation], entity)):
            return Claim(entity, relation, value, form)
    return None


def sentence(text: str, mark: str = ".") -> str:
    """Capital letter and final mark."""
    return text[:1].upper() + text[1:] + mark


class Facts:
    """All facts of one world: `value(entity, relation)`, drawn from the seed.

    Values are dealt out evenly (every city has three inhabitants), so no answer is right by frequency alone.
    Entities differ in how often pretraining text speaks of them (`frequency`), so some facts are better known.
    """

    def __init__(self, seed: int):
        rng = random.Random(f"{seed}/facts")
        self._values: dict[tuple[str, str], str] = {}
        self.frequency: dict[str, float] = {}
        for kind in ("person", "city", "animal"):
            members = [e for e, k in ENTITIES.items() if k == kind]
            for relation in (r for r in RELATIONS.values() if r.kind == kind):
                dealt = [relation.values[i % len(relation.values)] for i in range(len(members))]
                rng.shuffle(dealt)
                self._values.update({(e, relation.name): v for e, v in zip(members, dealt, strict=True)})
            self._values.update({(e, "kind"): _KIND_VALUE[kind] for e in members})
            ranks = list(range(len(members)))
            rng.shuffle(ranks)
            self.frequency.update({e: 1.0 / (1.0 + r / len(members) * 8) for e, r in zip(members, ranks, strict=True)})

    def value(self, entity: str, relation: str) -> str:
        return self._values[entity, relation]

    def claim(self, entity: str, relation: str, form: str = STATEMENT) -> Claim:
        """The true claim about this slot."""
        return Claim(entity, relation, self.value(entity, relation), form)

    def is_true(self, claim: Claim) -> bool:
        return self._values.get((claim.entity, claim.relation)) == claim.value

    def holders(self, relation: str, value: str) -> list[str]:
        """The entities of which `relation` has `value`."""
        return [e for (e, r), v in self._values.items() if r == relation and v == value]

    def slots(self) -> Iterator[tuple[str, str]]:
        """Every (entity, relation) that is a fact, kinds excepted."""
        return (slot for slot in self._values if slot[1] != "kind")
