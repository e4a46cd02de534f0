"""The ten use cases of InstructGPT's Table 1 in the sandbox world: prompts, and what a good answer must contain.

A prompt is `Instruction: TASK CONSTRAINT\\nResponse:`; its completion starts with a space. Each prompt is one
`Request` in words, and `parse_prompt` reads the request back from the text, so that nothing but text is needed to
judge an answer.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from prefopt.errors import UserError
from prefopt.sandbox import vocabulary as words
from prefopt.sandbox.facts import (
    ENTITIES,
    EXTRACT,
    GREETING,
    RELATIONS,
    REWORDED,
    STATEMENT,
    Claim,
    Facts,
    parse_claim,
    relations_of,
    sentence,
)

# Ouyang et al. 2022, Table 1 (percent of API prompts; sums to 99.9 there).
USE_CASE_SHARES = {
    "generation": 45.6,
    "open_qa": 12.4,
    "brainstorming": 11.2,
    "chat": 8.4,
    "rewrite": 6.6,
    "summarization": 4.2,
    "classification": 3.5,
    "other": 3.5,
    "closed_qa": 2.6,
    "extract": 1.9,
}
HELD_OUT_USE_CASE = "brainstorming"  # absent from reward-model and RL prompts

CONSTRAINTS = {
    "start": "Start with the word {w}.",
    "end": "End with the word {w}.",
    "exclaim": "Use an exclamation mark.",
    "mention": "Mention {w}.",
}
ABOUT = {r.about: r.name for r in RELATIONS.values() if r.about}

# {e} entity, {v} value, {a} slot, {q} question, {c} one claim, {t} a text of several claims.
TEMPLATES = {
    "generation": [
        "Write one fact about {e}.",
        "Tell me one thing about {e}.",
        "Give one line about {e}.",
        "Name one thing about {e}.",
        "State one fact about {e}.",
        "Write two facts about {e}.",
        "Tell me two things about {e}.",
        "Give two lines about {e}.",
        "Name two things about {e}.",
        "State two facts about {e}.",
    ],
    "open_qa": ["{q}", "Answer this: {q}", "Please tell me: {q}"],
    "brainstorming": [
        "Name two people: {v}.",
        "Think of two people: {v}.",
        "Suggest two people: {v}.",
        "List two people: {v}.",
    ],
    "chat": ["Greet {e} and ask about {a}.", "Say hello to {e} and ask about {a}."],
    "rewrite": ["Say this in other words: {c}", "Rewrite: {c}"],
    "summarization": ["Summarize in one line about {e}: {t}", "Shorten to one line about {e}: {t}"],
    "classification": [
        "Is {e} a person, a city or an animal?",
        "What kind of thing is {e}?",
        "Sort into person, city or animal: {e}.",
        "Which class fits {e}?",
    ],
    "other": ["Correct this mistake: {c}", "This is wrong: {c} Correct it."],
    "closed_qa": ["Read: {t} {q}", "Text: {t} {q}"],
    "extract": ["Take {a} from this text: {t}", "Find {a} in this text: {t}"],
}
# "Name two people: living in Selby." The value of a brainstorming prompt in words.
_SHARED = {"home": "living in {v}", "job": "working as {v}", "food": "liking {v}", "pet": "having a {v}"}


@dataclass(frozen=True)
class Request:
    """What a prompt asks for. Fields that are None leave the answer free.

    A good answer states exactly `n` different claims with this entity, relation, value and form, and meets the
    constraint. `given` are the claims in the prompt's own text; `combination` names the entity x template cell that is
    held out as a whole.
    """

    use_case: str
    n: int
    entity: str | None = None
    relation: str | None = None
    value: str | None = None
    form: str | None = None
    constraint: tuple[str, str] = ("exclaim", "")
    given: tuple[Claim, ...] = ()
    combination: tuple[str, ...] = ()

    def matches(self, claim: Claim) -> float:
        """Share of the asked fields that a claim gets right; 0 when it speaks of something else altogether.

        "Something else" is another entity, for brainstorming another value and for extraction another slot.
        """
        subject = "value" if self.use_case == "brainstorming" else "entity"
        if self.use_case == "extract":
            subject = "relation"
        if getattr(claim, subject) != getattr(self, subject):
            return 0.0
        asked = [f for f in ("entity", "relation", "value", "form") if getattr(self, f) is not None]
        return sum(getattr(claim, f) == getattr(self, f) for f in asked) / len(asked)


def _text(claims: tuple[Claim, ...]) -> str:
    return " ".join(sentence(c.render()) for c in claims)


def _claims(text: str) -> tuple[Claim, ...] | None:
    parsed = tuple(parse_claim(part) for part in re.findall(r"([^.!?]+)\.\s*", text))
    return None if not parsed or None in parsed else parsed


# ---- drawing: combination -> the words that fill the template ----
def combinations(use_case: str, facts: Facts) -> Iterator[tuple[str, ...]]:
    """All entity x template cells of a use case: (use case, template, subject, ...)."""
    people = words.PEOPLE
    for template in TEMPLATES[use_case]:
        head = (use_case, template)
        if use_case in ("generation", "classification"):
            yield from ((*head, e) for e in ENTITIES)
        elif use_case == "open_qa":
            yield from ((*head, e, q) for e in ENTITIES for r in relations_of(e) for q in r.questions)
        elif use_case == "brainstorming":
            yield from ((*head, r, v) for r in _SHARED for v in RELATIONS[r].values)
        elif use_case == "summarization":
            yield from ((*head, e) for e in people)
        else:  # one slot of one person
            yield from ((*head, e, r) for e in people for r in _SHARED)


def draw_prompt(combination: tuple[str, ...], facts: Facts, rng: random.Random) -> str:
    """One prompt of an entity x template cell, with its texts and its constraint drawn from `rng`."""
    use_case, template, subject, *rest = combination
    fill: dict[str, str] = {"e": subject}
    if use_case == "open_qa":
        fill["q"] = rest[0].format(e=subject)
    elif use_case == "brainstorming":
        fill["v"] = _SHARED[subject].format(v=rest[0])
    elif use_case == "rewrite":
        fill["c"] = sentence(facts.claim(subject, rest[0], rng.choice([STATEMENT, REWORDED])).render())
    elif use_case == "other":
        wrong = [v for v in RELATIONS[rest[0]].values if v != facts.value(subject, rest[0])]
        fill["c"] = sentence(Claim(subject, rest[0], rng.choice(wrong)).render())
    elif use_case in ("summarization", "closed_qa", "extract"):
        slots = list(_SHARED) if use_case == "summarization" else [rest[0]]
        own = [facts.claim(subject, r) for r in rng.sample(slots, min(2, len(slots)))]
        other = rng.choice([p for p in words.PEOPLE if p != subject])
        taken = {c.relation for c in own}
        extra = facts.claim(other, rng.choice([r for r in _SHARED if r not in taken]))
        fill["t"] = _text(tuple(rng.sample([*own, extra], len(own) + 1)))
        if use_case == "closed_qa":
            fill["q"] = rng.choice(list(RELATIONS[rest[0]].questions)).format(e=subject)
    if use_case in ("chat", "extract"):
        fill["a"] = RELATIONS[rest[0]].about
    kinds = ["start", "start", "end", "end", "exclaim"]
    if use_case == "generation":
        kinds += ["mention", "mention"]
    kind = rng.choice(kinds)
    word = ""
    if kind == "mention":
        word = rng.choice(relations_of(subject)).about
    elif kind in words.CONSTRAINT_WORDS:
        word = rng.choice(words.CONSTRAINT_WORDS[kind])
    return f"Instruction: {template.format(**fill)} {CONSTRAINTS[kind].format(w=word)}\nResponse:"


# ---- reading: prompt text -> Request ----
# A text or a claim ends with a full stop, a question has none: this is what tells "{t} {q}" apart.
_FIELD = {"t": r".+\.", "c": r".+\.", "q": r"[^.]+\?"}


def _as_regex(template: str) -> str:
    return re.sub(r"\\\{(\w)\\\}", lambda m: f"(?P<{m[1]}>{_FIELD.get(m[1], '[^.:?]+')})", re.escape(template))


_CONSTRAINT = {kind: re.compile(_as_regex(t)) for kind, t in CONSTRAINTS.items()}
_TEMPLATE = [(u, t, re.compile(_as_regex(t))) for u, ts in TEMPLATES.items() for t in ts if t != "{q}"]
_TEMPLATE.append(("open_qa", "{q}", re.compile(_as_regex("{q}"))))  # last: it matches any question
_QUESTION = [(r.name, q, re.compile(_as_regex(q))) for r in RELATIONS.values() for q in r.questions]
_SHARED_REGEX = {r: re.compile(_as_regex(t)) for r, t in _SHARED.items()}


def _question(text: str) -> tuple[str, str, str] | None:
    for relation, question, regex in _QUESTION:
        match = regex.fullmatch(text)
        if match and match["e"] in ENTITIES and RELATIONS[relation].kind == ENTITIES[match["e"]]:
            return match["e"], relation, question
    return None


def _request(use_case: str, template: str, f: dict[str, str]) -> Request | None:
    """The request of a filled template, or None where the words do not fit it."""
    n, entity, relation, value, form = 1, f.get("e"), None, None, None
    given = _claims(f.get("c") or f["t"]) if f.keys() & {"c", "t"} else ()
    asked = _question(f["q"]) if "q" in f else ()
    if given is None or asked is None or (entity is not None and entity not in ENTITIES):
        return None
    if asked:
        entity, relation, question = asked
    cell = (entity, relation)
    if use_case in ("generation", "summarization"):
        n, cell = 2 if " two " in template else 1, (entity,)
    elif use_case == "classification":
        relation, cell = "kind", (entity,)
    elif use_case == "open_qa":
        cell = (entity, question)
    elif use_case == "brainstorming":
        matches = ((name, regex.fullmatch(f["v"])) for name, regex in _SHARED_REGEX.items())
        cell = next(((name, m["v"]) for name, m in matches if m and m["v"] in RELATIONS[name].values), None)
        if cell is None:
            return None
        n, (relation, value) = 2, cell
    elif use_case in ("rewrite", "other"):
        cell = entity, relation = given[0].entity, given[0].relation
        if use_case == "rewrite":
            form = REWORDED if given[0].form == STATEMENT else STATEMENT
    elif use_case in ("chat", "extract"):
        relation, form = ABOUT.get(f["a"]), GREETING if use_case == "chat" else EXTRACT
        owner = entity or next((c.entity for c in given if c.relation == relation), None)
        if owner is None or (use_case == "chat" and relation not in _SHARED):
            return None
        cell = (owner, relation)
    return Request(use_case, n, entity, relation, value, form, given=given, combination=(use_case, template, *cell))


@lru_cache(maxsize=65536)
def parse_prompt(prompt: str) -> Request:
    """The request behind a prompt's text; a UserError for a text that is not a prompt of the sandbox.

    >>> request = parse_prompt("Instruction: Where does Ada live? Start with the word Well.\\nResponse:")
    >>> request.use_case, request.entity, request.relation, request.constraint
    ('open_qa', 'Ada', 'home', ('start', 'Well'))
    """
    if parts := re.fullmatch(r"Instruction: (?P<task>.+[.?]) (?P<constraint>[^.?]+\.)\nResponse:", prompt):
        demands = ((kind, regex.fullmatch(parts["constraint"])) for kind, regex in _CONSTRAINT.items())
        constraint = next(((kind, m.groupdict().get("w", "")) for kind, m in demands if m), None)
        for use_case, template, regex in _TEMPLATE if constraint else ():
            match = regex.fullmatch(parts["task"])
            request = _request(use_case, template, match.groupdict()) if match else None
            if request is not None:
                return replace(request, constraint=constraint)
    raise UserError(
        f"not a sandbox prompt: {prompt!r}; expected 'Instruction: TASK CONSTRAINT\\nResponse:' as World.prompts writes it"
    )
