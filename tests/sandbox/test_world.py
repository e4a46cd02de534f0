"""The world: splits, proportions, determinism, corpus and knowledge tasks."""

from collections import Counter
from itertools import combinations

import pytest

from prefopt.sandbox import SPLIT_SIZES, World
from prefopt.sandbox.facts import RELATIONS, Claim, parse_claim, sentence
from prefopt.sandbox.gold import WEIGHTS
from prefopt.sandbox.tasks import CONSTRAINTS, TEMPLATES, USE_CASE_SHARES, parse_prompt

pytestmark = pytest.mark.slow

SPLITS = list(SPLIT_SIZES)
BEST = sum(WEIGHTS.values())


@pytest.fixture(scope="module")
def world() -> World:
    return World(seed=0)


@pytest.fixture(scope="module")
def corpus(world) -> list[str]:
    return world.corpus("train", 12_000)


def test_prompts_are_distinct_and_splits_share_no_combination(world):
    for split in SPLITS:
        prompts = world.prompts(split)
        assert len(set(prompts)) == len(prompts) == SPLIT_SIZES[split]
    for a, b in combinations(SPLITS, 2):
        assert not set(world.prompts(a)) & set(world.prompts(b))
        cells_a = {parse_prompt(p).combination for p in world.prompts(a)}
        cells_b = {parse_prompt(p).combination for p in world.prompts(b)}
        assert not cells_a & cells_b, (a, b)


def test_smaller_and_larger_draws_stay_inside_their_split(world):
    test_cells = {parse_prompt(p).combination for p in world.prompts("test")}
    for n in (50, 900):
        prompts = world.prompts("sft", n)
        assert len(set(prompts)) == n
        assert not test_cells & {parse_prompt(p).combination for p in prompts}


@pytest.mark.parametrize("split", SPLITS)
def test_use_cases_follow_table_1(world, split):
    shares = dict(USE_CASE_SHARES)
    if split in ("rm", "rl"):
        del shares[World.held_out_use_case]
    counts = Counter(world.use_case(p) for p in world.prompts(split))
    assert set(counts) == set(shares)
    n = SPLIT_SIZES[split]
    for use_case, share in shares.items():
        assert abs(counts[use_case] - n * share / sum(shares.values())) < 1, use_case


def test_table_1_shares_are_the_papers():
    assert list(USE_CASE_SHARES.values()) == [45.6, 12.4, 11.2, 8.4, 6.6, 4.2, 3.5, 3.5, 2.6, 1.9]


def test_same_seed_same_world_other_seed_other_world(world):
    again, other = World(seed=0), World(seed=1)
    for split in SPLITS:
        assert again.prompts(split) == world.prompts(split)
    prompt = world.prompts("sft")[0]
    assert again.demonstrations("sft", 20) == world.demonstrations("sft", 20)
    assert again.good_answer(prompt) == world.good_answer(prompt)
    assert again.corpus("train", 200) == world.corpus("train", 200)
    assert again.knowledge_tasks() == world.knowledge_tasks()
    assert other.prompts("test") != world.prompts("test")
    assert other.corpus("train", 200) != world.corpus("train", 200)
    assert [t.answer for t in other.knowledge_tasks()] != [t.answer for t in world.knowledge_tasks()]


@pytest.mark.parametrize("split", SPLITS)
def test_every_prompt_has_a_good_answer(world, split):
    for prompt in world.prompts(split)[:600]:
        assert prompt.startswith("Instruction: ")
        assert prompt.endswith("\nResponse:")
        answer = world.good_answer(prompt)
        assert answer.startswith(" ")
        assert world.gold_reward(prompt, answer).total == pytest.approx(BEST), (prompt, answer)


def test_demonstrations_slip_as_documented(world):
    scores = [world.gold_reward(p, world.demonstration(p, draw)) for p in world.prompts("sft") for draw in (0, 1)]
    n = len(scores)
    answered = [s for s in scores if s.total > 0]
    share = {
        "evasive": 1 - len(answered) / n,
        "rude": sum(s.polite == 0.0 for s in answered) / len(answered),
        "neutral": sum(s.polite == 0.4 for s in answered) / len(answered),
        "constraint": sum(s.constraint for s in answered) / len(answered),
        "perfect": sum(s.total == pytest.approx(BEST) for s in scores) / n,
    }
    assert share["evasive"] == pytest.approx(0.15, abs=0.03)
    assert share["rude"] == pytest.approx(0.20, abs=0.03)
    assert share["neutral"] == pytest.approx(0.45, abs=0.04)
    assert share["constraint"] == pytest.approx(0.50, abs=0.05)
    assert 0.04 < share["perfect"] < 0.20
    assert 3.0 < sum(s.total for s in scores) / n < 4.5


def test_unknown_split_and_too_large_draw_are_refused(world):
    with pytest.raises(ValueError, match=r"split: expected one of .*got 'train'"):
        world.prompts("train")
    with pytest.raises(ValueError, match="ask for a smaller n"):
        world.prompts("tuning", 50_000)
    with pytest.raises(ValueError, match="split: expected 'train' or 'test'"):
        world.corpus("sft", 1)
    with pytest.raises(ValueError, match="not a sandbox prompt"):
        world.use_case("Tell me a joke.")


def test_corpus_splits_are_disjoint(world, corpus):
    held_out = world.corpus("test", 1_000)
    assert len(set(corpus)) == len(corpus)
    assert not set(corpus) & set(held_out)


def test_no_prompt_of_another_split_stands_in_the_corpus(world, corpus):
    inside = {d.split("\nResponse:")[0] + "\nResponse:" for d in corpus if d.startswith("Instruction:")}
    assert len(inside) > 1_000
    for split in SPLITS:
        if split != "forum":
            assert not inside & set(world.prompts(split)), split
    assert inside <= set(world.prompts("forum"))


def test_knowledge_tasks_are_distinct_and_not_in_the_corpus(world, corpus):
    tasks = world.knowledge_tasks()
    assert len({t.context for t in tasks}) == len(tasks) >= 400
    text = "\n".join(corpus + world.corpus("test", 1_000))
    for task in tasks:
        assert task.context + task.answer not in text, task
    kinds = Counter(t.kind for t in tasks)
    assert set(kinds) == {"facts", "background", "dictionary", "sums"}


def test_knowledge_task_answers_are_right_and_taught(world, corpus):
    text = "\n".join(corpus).lower()
    for task in world.knowledge_tasks():
        assert task.choices.count(task.answer) == 1
        assert len(task.choices) == len(set(task.choices)) == 8
        statement = task.context.removeprefix("Known: it is well known that ") + task.answer
        if task.kind == "sums":
            a, _, b, *_ = statement.split()
            assert int(task.answer) == int(a) + int(b)
        elif task.kind in ("facts", "background"):
            claim = parse_claim(statement)
            assert claim is not None
            assert world.facts.is_true(claim)
        else:
            assert statement.lower() in text


def test_pretraining_only_knowledge_is_in_no_prompt(world):
    hidden = [r for r in RELATIONS.values() if r.name in ("king", "friend", "year")]
    assert all(not r.questions and not r.about for r in hidden)
    prompts = [p for split in SPLITS for p in world.prompts(split)[:500]]
    for prompt in prompts:
        for word in ("Tolan", "plus", "ruled", "friend", "born"):
            assert word not in prompt


def test_claims_read_back_as_written(world):
    for entity, relation in world.facts.slots():
        for form in RELATIONS[relation].forms:
            subject = "" if form == "extract" else entity
            claim = Claim(subject, relation, world.facts.value(entity, relation), form)
            assert parse_claim(claim.render()) == claim
            assert parse_claim(sentence(claim.render(), "")) == claim
    assert parse_claim("Ada lives in bread") is None
    assert parse_claim("the fox lives in Selby") is None
    assert parse_claim("Ada lives in Selby and Ada likes jam") is None


def test_values_are_dealt_evenly(world):
    for relation in ("home", "job", "food", "pet"):
        for value in RELATIONS[relation].values:
            assert len(world.facts.holders(relation, value)) >= 3
    kinds = [world.facts.value(e, "kind") for e in ("Ada", "Selby", "the fox")]
    assert kinds == ["a person", "a city", "an animal"]


def test_every_template_and_constraint_occurs(world):
    seen = {parse_prompt(p).combination[:2] for p in world.prompts("rl", 3000) + world.prompts("sft")}
    assert {(u, t) for u, ts in TEMPLATES.items() for t in ts} <= seen
    assert {parse_prompt(p).constraint[0] for p in world.prompts("rl", 3000)} == set(CONSTRAINTS)
