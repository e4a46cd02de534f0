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


RELATIONS = {
    r.name: r
    for r in (
        Relation(
            "home",
            "person",
            tuple(words.CITIES),
            {
                STATEMENT: "{e} lives in {v}",
                REWORDED: "the home of {e} is {v}",
                GREETING: "hello {e}, how is life in {v}",
                EXTRACT: "the city in the text is {v}",
            },
            ("Where does {e} live?", "Which city is the home of {e}?"),
            "the city",
        ),
        Relation(
            "job",
            "person",
            tuple(words.JOBS),
            {
                STATEMENT: "{e} works as a {v}",
                REWORDED: "the job of {e} is {v}",
                GREETING: "hello {e}, how is your work as a {v}",
                EXTRACT: "the job in the text is {v}",
            },
            ("What is the job of {e}?", "Which work does {e} do?"),
            "the job",
        ),
        Relation(
            "food",
            "person",
            tuple(words.FOODS),
            {
                STATEMENT: "{e} likes {v}",
                REWORDED: "the food of {e} is {v}",
                GREETING: "hello {e}, do you want {v}",
                EXTRACT: "the food in the text is {v}",
            },
            ("What does {e} like?", "Which food does {e} like?"),
            "the food",
        ),
        Relation(
            "pet",
            "person",
            tuple(words.PETS),
            {
                STATEMENT: "{e} has a {v}",
                REWORDED: "the pet of {e} is a {v}",
                GREETING: "hello {e}, how is your {v}",
                EXTRACT: "the pet in the text is a {v}",
            },
            ("Which pet does {e} have?", "What is the pet of {e}?"),
            "the pet",
        ),
        Relation(
            "river",
            "city",
            tuple(words.RIVERS),
            {STATEMENT: "{e} lies on the {v}", REWORDED: "the river of {e} is the {v}"},
            ("Which river does {e} lie on?", "What is the river of {e}?"),
            "the river",
        ),
        Relation(
            "craft",
            "city",
            tuple(words.CRAFTS),
            {STATEMENT: "{e} is known for {v}", REWORDED: "the craft of {e} is {v}"},
            ("What is {e} known for?", "Which craft does {e} have?"),
            "the craft",
        ),
        # Never asked in a prompt: knowledge that only pretraining text holds.
        Relation(
            "king", "city", tuple(words.KINGS), {STATEMENT: "{e} is ruled by {v}", REWORDED: "the king of {e} is {v}"}
        ),
        Relation(
            "friend",
            "person",
            tuple(words.PEOPLE),
            {STATEMENT: "{e} is a friend of {v}", REWORDED: "the friend of {e} is {v}"},
        ),
        Relation(
            "year",
            "person",
            tuple(words.YEARS),
            {STATEMENT: "{e} was born in {v}", REWORDED: "the year of {e} is {v}"},
        ),
        Relation(
            "diet",
            "animal",
            tuple(words.DIETS),
            {STATEMENT: "{e} eats {v}", REWORDED: "the diet of {e} is {v}"},
            ("What does {e} eat?", "What is the diet of {e}?"),
            "the diet",
        ),
        Relation(
            "den",
            "animal",
            tuple(words.DENS),
            {STATEMENT: "{e} sleeps in {v}", REWORDED: "the den of {e} is in {v}"},
            ("Where does {e} sleep?", "Where is the den of {e}?"),
            "the den",
        ),
        Relation(
            "colour",
            "animal",
            tuple(words.COLOURS),
            {STATEMENT: "{e} looks {v}", REWORDED: "the colour of {e} is {v}"},
            ("How does {e} look?", "What is the colour of {e}?"),
            "the colour",
        ),
        Relation("kind", "any", tuple(words.KINDS), {STATEMENT: "{e} is {v}"}),
    )
}
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
