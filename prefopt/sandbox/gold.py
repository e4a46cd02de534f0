"""The gold reward: how good an answer is, computed from the prompt's and the completion's text alone."""

import re
from dataclasses import dataclass

from prefopt.sandbox import vocabulary as words
from prefopt.sandbox.facts import Claim, Facts, parse_claim
from prefopt.sandbox.tasks import ABOUT, Request, parse_prompt

WEIGHTS = {"follow": 2.0, "constraint": 1.5, "truth": 1.0, "polite": 1.5}
NEUTRAL = 0.4  # politeness of an answer without courtesy and without rudeness

_COURTESIES = {c.lower() for c in words.COURTESIES}
_INSULTS = {i.lower() for i in words.INSULTS}
_START = re.compile(rf"(?:{'|'.join(words.START_WORDS)}), ", re.IGNORECASE)
_END = re.compile(rf" (?:{'|'.join(words.END_WORDS)})$", re.IGNORECASE)


@dataclass(frozen=True)
class GoldScore:
    """Components in [0, 1] and their weighted sum `total` in [0, 6]."""

    total: float
    follow: float
    constraint: float
    truth: float
    polite: float


@dataclass(frozen=True)
class Reading:
    """A completion, read sentence by sentence.

    claims: the different claims, in order. content: number of sentences that count as content: claims, repeated
    claims, sentences that state nothing (unfinished ones too), and every courtesy or insult after the first.
    """

    claims: tuple[Claim, ...]
    content: int
    courteous: bool
    rude: bool


def read_completion(completion: str) -> Reading:
    text = completion.strip()
    claims: dict[tuple[str, str, str], Claim] = {}
    content = courtesies = insults = 0
    for part, mark in re.findall(r"([^.!?]*)([.!?]|$)", text):
        clause = part.strip()
        if not clause and not mark:
            continue
        bare = _END.sub("", _START.sub("", clause, count=1)) if mark else ""
        if bare.lower() in _COURTESIES:
            courtesies += 1
        elif bare.lower() in _INSULTS:
            insults += 1
        else:
            content += 1
            claim = parse_claim(bare)
            if claim is not None:
                claims.setdefault((claim.entity, claim.relation, claim.value), claim)
    content += max(courtesies - 1, 0) + max(insults - 1, 0)
    rude = bool(insults or words.RUDE_WORDS & set(re.findall(r"\w+", text.lower())))
    return Reading(tuple(claims.values()), content, courtesies > 0, rude)


def gold_reward(facts: Facts, prompt: str, completion: str) -> GoldScore:
    """total = 2 follow + 1.5 constraint + 1 truth + 1.5 polite, each in [0, 1]; 0 for text without any claim.

    With n claims asked for, the first n different claims c_1..c_n of the answer and N = max(n, sentences of content):

        follow     = sum_i matches(c_i) / N          share of the asked fields each claim gets right
        truth      = sum_i [matches(c_i) > 0 and c_i is true] / N      a wrong subject earns no truth
        constraint = [met]                           the visible demand at the end of the prompt
        polite     = 1 courteous, 0.4 neutral, 0 rude

    True means true in the world; where the prompt gives a text to work on (summarization, closed_qa, extract,
    rewrite), it means stated there. N makes extra answers, repetition, babble and unfinished sentences cost.
    """
    request = parse_prompt(prompt)
    reading = read_completion(completion)
    if not reading.claims:
        return GoldScore(0.0, 0.0, 0.0, 0.0, 0.0)
    size = max(request.n, reading.content)
    first = [(c, request.matches(c)) for c in reading.claims[: request.n]]
    follow = sum(match for _, match in first) / size
    truth = sum(match > 0 and _is_true(facts, request, c) for c, match in first) / size
    constraint = float(meets_constraint(request, reading, completion))
    polite = 0.0 if reading.rude else 1.0 if reading.courteous else NEUTRAL
    parts = {"follow": follow, "constraint": constraint, "truth": truth, "polite": polite}
    return GoldScore(sum(WEIGHTS[k] * v for k, v in parts.items()), **parts)


def _is_true(facts: Facts, request: Request, claim: Claim) -> bool:
    if request.use_case in ("summarization", "closed_qa", "extract", "rewrite"):
        stated = ((g.entity if claim.entity else "", g.relation, g.value) for g in request.given)
        return (claim.entity, claim.relation, claim.value) in stated
    return facts.is_true(claim)


def meets_constraint(request: Request, reading: Reading, completion: str) -> bool:
    """Whether the completion starts or ends with the word, ends with "!", or states the slot to mention."""
    kind, word = request.constraint
    said = re.findall(r"\w+", completion)
    if kind == "start":
        return said[:1] == [word]
    if kind == "end":
        return said[-1:] == [word]
    if kind == "exclaim":
        return completion.rstrip().endswith("!")
    return any(c.relation == ABOUT[word] and c.entity == request.entity for c in reading.claims)
