"""Answers to sandbox prompts: the good one, and the careless ones of demonstrators and forum posts.

A careless answer slips in each component independently, so that models trained on them write answers of widely
varying quality, and a fully good answer stays in reach.
"""

import random
from dataclasses import dataclass, replace

from prefopt.sandbox import vocabulary as words
from prefopt.sandbox.facts import (
    ENTITIES,
    EXTRACT,
    RELATIONS,
    REWORDED,
    STATEMENT,
    Claim,
    Facts,
    relations_of,
    sentence,
)
from prefopt.sandbox.tasks import ABOUT, Request


@dataclass(frozen=True)
class Slips:
    """Probability of each independent slip in one answer (`wrong_fact`: of each claim)."""

    evasion: float = 0.0  # no answer at all: "I do not know."
    off_topic: float = 0.0  # speaks of another entity, slot or value than the prompt
    constraint_missed: float = 0.0
    wrong_count: float = 0.0  # one fact or person where two were asked for, or two facts for one
    wrong_fact: float = 0.0
    neutral: float = 0.0  # neither courteous nor rude
    rude: float = 0.0


NO_SLIPS = Slips()
DEMONSTRATOR = Slips(0.15, 0.10, 0.50, 0.25, 0.20, neutral=0.45, rude=0.20)
# Forum posts know what they talk about, but most of them are rude.
FORUM = Slips(constraint_missed=0.10, neutral=0.30, rude=0.60)


def write_answer(request: Request, facts: Facts, rng: random.Random, slips: Slips = NO_SLIPS) -> str:
    """An answer to the request as completion text (starts with a space)."""
    met = rng.random() >= slips.constraint_missed
    if request.use_case in ("generation", "brainstorming") and rng.random() < slips.wrong_count:
        request = replace(request, n=3 - request.n)
    claims = _claims(_off_topic(request, facts, rng) if rng.random() < slips.off_topic else request, facts, rng, met)
    claims = [_wrong(c, request, facts, rng) if rng.random() < slips.wrong_fact else c for c in claims]
    clauses = [c.render() for c in claims]
    if rng.random() < slips.evasion:
        clauses = [rng.choice(words.EVASIONS)]
    mood = rng.random()
    formula = None
    if mood < slips.rude:
        formula = rng.choice(words.INSULTS)
    elif mood >= slips.rude + slips.neutral:
        formula = rng.choice(words.COURTESIES)
    return " " + _layout(clauses, formula, request.constraint, met, rng)


def _layout(
    clauses: list[str], formula: str | None, constraint: tuple[str, str], met: bool, rng: random.Random
) -> str:
    kind, word = constraint
    if not met and rng.random() < 0.4:  # a wrong word instead of none
        options = words.CONSTRAINT_WORDS.get(kind, [word])
        word = rng.choice([w for w in options if w != word] or [""])
    elif not met:
        word = ""
    if kind == "start" and word:
        clauses[0] = f"{word}, {clauses[0]}"
    if kind == "end" and word:
        clauses[-1] = f"{clauses[-1]} {word}"
    marks = ["?" if clause.lower().startswith("hello") or ", hello" in clause else "." for clause in clauses]
    formula_first = kind == "end" if met and kind in ("start", "end") else rng.random() < 0.5
    if formula is not None:
        at = 0 if formula_first else len(clauses)
        clauses.insert(at, formula)
        marks.insert(at, ".")
    if kind == "exclaim" and met:
        marks[-1] = "!"
    return " ".join(sentence(clause, mark) for clause, mark in zip(clauses, marks, strict=True))


def _claims(request: Request, facts: Facts, rng: random.Random, constraint_met: bool) -> list[Claim]:
    """`request.n` true claims that match the request."""
    kind, word = request.constraint
    if request.use_case == "brainstorming":
        people = rng.sample(facts.holders(request.relation, request.value), request.n)
        return [Claim(p, request.relation, request.value, _wording(rng)) for p in people]
    if request.use_case == "generation":
        own = [r.name for r in relations_of(request.entity)]
        asked = ABOUT[word] if kind == "mention" else None
        others = [r for r in own if r != asked]
        if len(others) < request.n:  # a city asked for two facts: both of its slots, constraint or not
            others = own
        chosen = rng.sample(others, request.n)
        if asked in own and asked not in chosen and constraint_met:
            chosen[rng.randrange(request.n)] = asked
        return [facts.claim(request.entity, r, _wording(rng)) for r in chosen]
    if request.use_case == "summarization":
        source = rng.choice([c for c in request.given if c.entity == request.entity] or list(request.given))
        return [replace(source, entity=request.entity, form=_wording(rng))]
    if request.use_case == "extract":
        source = [c for c in request.given if c.relation == request.relation]
        return [Claim("", request.relation, source[0].value, EXTRACT)]
    form = request.form or (STATEMENT if request.relation == "kind" else _wording(rng))
    return [facts.claim(request.entity, request.relation, form)]


def _wording(rng: random.Random) -> str:
    return rng.choice([STATEMENT, REWORDED])


def _off_topic(request: Request, facts: Facts, rng: random.Random) -> Request:
    """The same kind of request about something else."""
    if request.use_case == "brainstorming":
        others = [v for v in RELATIONS[request.relation].values if v != request.value]
        return replace(request, value=rng.choice(others))
    if request.use_case == "extract":
        others = [c.relation for c in request.given if c.relation != request.relation]
        return replace(request, relation=rng.choice(others))
    if request.relation not in (None, "kind") and rng.random() < 0.5:
        others = [r.name for r in relations_of(request.entity) if r.name != request.relation]
        return replace(request, relation=rng.choice(others))
    others = [e for e, kind in ENTITIES.items() if kind == ENTITIES[request.entity] and e != request.entity]
    return replace(request, entity=rng.choice(others))


def _wrong(claim: Claim, request: Request, facts: Facts, rng: random.Random) -> Claim:
    """The claim with another value; for brainstorming, of a person who does not fit."""
    if request.use_case == "brainstorming":
        holders = facts.holders(claim.relation, claim.value)
        return replace(claim, entity=rng.choice([p for p in words.PEOPLE if p not in holders]))
    return replace(claim, value=rng.choice([v for v in RELATIONS[claim.relation].values if v != claim.value]))
