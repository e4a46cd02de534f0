"""The gold reward on hand-written completions; expected values as arithmetic: 2 follow + 1.5 constraint + truth + 1.5 polite."""

import random
from dataclasses import astuple

import pytest

from prefopt.sandbox import World
from prefopt.sandbox.facts import RELATIONS
from prefopt.sandbox.tasks import parse_prompt


@pytest.fixture(scope="module")
def world() -> World:
    return World(seed=0)


@pytest.fixture(scope="module")
def ada(world) -> dict[str, str]:
    """Ada's true values, and `not_...`: a wrong value of each slot."""
    own = {r: world.facts.value("Ada", r) for r in ("home", "job", "food", "pet")}
    wrong = {f"not_{r}": next(v for v in RELATIONS[r].values if v != own[r]) for r in own}
    return own | wrong


def ask(task: str, constraint: str = "Use an exclamation mark.") -> str:
    return f"Instruction: {task} {constraint}\nResponse:"


def check(world, prompt, completion, follow, constraint, truth, polite):
    score = world.gold_reward(prompt, completion)
    total = 2 * follow + 1.5 * constraint + 1 * truth + 1.5 * polite
    assert astuple(score) == pytest.approx((total, follow, constraint, truth, polite)), completion


def test_open_qa(world, ada):
    prompt = ask("Where does Ada live?", "Start with the word Well.")
    home, job, other = ada["home"], ada["job"], ada["not_home"]
    check(world, prompt, f" Well, Ada lives in {home}. Happy to help.", 1, 1, 1, 1)
    check(world, prompt, f" Well, the home of Ada is {home}. My pleasure.", 1, 1, 1, 1)
    check(world, prompt, f" Well, Ada lives in {home}.", 1, 1, 1, 0.4)
    check(world, prompt, f" Well, Ada lives in {home}. Go away, fool.", 1, 1, 1, 0)
    check(world, prompt, f" Ada lives in {home}. Happy to help.", 1, 0, 1, 1)
    check(world, prompt, f" Listen, Ada lives in {home}. Happy to help.", 1, 0, 1, 1)
    check(world, prompt, f" Well, Ada lives in {other}. Happy to help.", 1, 1, 0, 1)
    check(world, prompt, f" Well, Ada works as a {job}. Happy to help.", 1 / 2, 1, 1, 1)
    bella = world.facts.value("Bruno", "home")
    check(world, prompt, f" Well, Bruno lives in {bella}. Happy to help.", 0, 1, 0, 1)


def test_generation_counts_different_facts(world, ada):
    prompt = ask("Write two facts about Ada.", "Mention the pet.")
    pet, food, job = ada["pet"], ada["food"], ada["job"]
    check(world, prompt, f" Glad you asked. Ada has a {pet}. Ada likes {food}.", 1, 1, 1, 1)
    check(world, prompt, f" Glad you asked. Ada works as a {job}. Ada likes {food}.", 1, 0, 1, 1)
    check(world, prompt, f" Glad you asked. Ada has a {pet}.", 1 / 2, 1, 1 / 2, 1)
    check(world, prompt, f" Ada has a {pet}. Ada likes {ada['not_food']}.", 1, 1, 1 / 2, 0.4)
    # a repeated claim is content but not a different claim
    check(world, prompt, f" Ada has a {pet}. The pet of Ada is a {pet}.", 1 / 2, 1, 1 / 2, 0.4)
    # three facts where two were asked: the first two count, over three sentences
    three = f" Ada has a {pet}. Ada likes {food}. Ada works as a {job}."
    check(world, prompt, three, 2 / 3, 1, 2 / 3, 0.4)


def test_brainstorming(world):
    anna, bruno, *_ = world.facts.holders("home", "Selby")
    outsider = world.facts.holders("home", "Wexham")[0]
    prompt = ask("Name two people: living in Selby.")
    check(world, prompt, f" My pleasure. {anna} lives in Selby. {bruno} lives in Selby!", 1, 1, 1, 1)
    check(world, prompt, f" {anna} lives in Selby. {outsider} lives in Selby!", 1, 1, 1 / 2, 0.4)
    check(world, prompt, f" {anna} lives in Selby. {outsider} lives in Wexham!", 1 / 2, 1, 1 / 2, 0.4)
    check(world, prompt, f" {anna} lives in Selby. {anna} lives in Selby!", 1 / 2, 1, 1 / 2, 0.4)


def test_chat(world, ada):
    prompt = ask("Greet Ada and ask about the pet.", "End with the word today.")
    pet = ada["pet"]
    check(world, prompt, f" My pleasure. Hello Ada, how is your {pet} today?", 1, 1, 1, 1)
    check(world, prompt, f" Hello Ada, how is your {ada['not_pet']} today?", 1, 1, 0, 0.4)
    check(world, prompt, f" Ada has a {pet} today.", 2 / 3, 1, 1, 0.4)  # entity and slot, but no greeting
    check(world, prompt, f" Hello Ada, how is your {pet}? You are boring.", 1, 0, 1, 0)


def test_rewrite(world, ada):
    prompt = ask(f"Rewrite: Ada lives in {ada['home']}.")
    check(world, prompt, f" The home of Ada is {ada['home']}!", 1, 1, 1, 0.4)
    check(world, prompt, f" Ada lives in {ada['home']}!", 2 / 3, 1, 1, 0.4)  # the same words again
    check(world, prompt, f" The home of Ada is {ada['not_home']}!", 1, 1, 0, 0.4)
    check(world, prompt, f" The job of Ada is {ada['job']}!", 2 / 3, 1, 0, 0.4)  # true, but not in the text


def test_summarization(world, ada):
    bella = world.facts.value("Bruno", "job")
    text = f"Ada lives in {ada['home']}. Bruno works as a {bella}. Ada likes {ada['food']}."
    prompt = ask(f"Summarize in one line about Ada: {text}")
    check(world, prompt, f" Ada likes {ada['food']}. Happy to help!", 1, 1, 1, 1)
    check(world, prompt, f" Ada has a {ada['pet']}!", 1, 1, 0, 0.4)  # true, but not in the text
    check(world, prompt, f" Bruno works as a {bella}!", 0, 1, 0, 0.4)
    two = f" Ada lives in {ada['home']}. Ada likes {ada['food']}!"
    check(world, prompt, two, 1 / 2, 1, 1 / 2, 0.4)  # one line was asked


def test_classification(world):
    prompt = ask("Is the fox a person, a city or an animal?")
    check(world, prompt, " The fox is an animal! Thank you for asking.", 1, 0, 1, 1)
    check(world, prompt, " Thank you for asking. The fox is an animal!", 1, 1, 1, 1)
    check(world, prompt, " The fox is a city!", 1, 1, 0, 0.4)
    check(world, prompt, f" The fox eats {world.facts.value('the fox', 'diet')}!", 1 / 2, 1, 1, 0.4)


def test_correction(world, ada):
    prompt = ask(f"Correct this mistake: Ada lives in {ada['not_home']}.")
    check(world, prompt, f" Ada lives in {ada['home']}!", 1, 1, 1, 0.4)
    check(world, prompt, f" Ada lives in {ada['not_home']}!", 1, 1, 0, 0.4)


def test_closed_qa(world, ada):
    bella = world.facts.value("Bruno", "job")
    prompt = ask(f"Read: Ada likes {ada['food']}. Bruno works as a {bella}. What does Ada like?")
    check(world, prompt, f" Ada likes {ada['food']}!", 1, 1, 1, 0.4)
    check(world, prompt, f" Bruno works as a {bella}!", 0, 1, 0, 0.4)


def test_extract(world, ada):
    bella = world.facts.value("Bruno", "job")
    prompt = ask(f"Find the food in this text: Bruno works as a {bella}. Ada likes {ada['food']}.")
    check(world, prompt, f" The food in the text is {ada['food']}!", 1, 1, 1, 0.4)
    check(world, prompt, f" The food in the text is {ada['not_food']}!", 1, 1, 0, 0.4)
    check(world, prompt, f" The job in the text is {bella}!", 0, 1, 0, 0.4)
    # the slot is right, but it is not an extract, and the text states it of Ada
    check(world, prompt, f" Ada likes {ada['food']}!", 1 / 2, 1, 1, 0.4)


def test_degenerate_texts_never_beat_a_good_answer(world):
    rng = random.Random(0)
    for prompt in world.prompts("tuning"):
        request = parse_prompt(prompt)
        good = world.good_answer(prompt)
        word = request.constraint[1] or "!"
        entity = request.entity or "Ada"
        stuffed = f" {word}, " + " ".join(
            f"{entity} lives in {c}." for c in ("Selby", "Wexham", "Pelham", "Norwen", word)
        )
        for bad in (
            "",
            " ",
            ".",
            "!!!",
            good * 3,
            good[: len(good) // 2],
            f" {word}",
            f" {word}. " * 6,
            " Happy to help. My pleasure. Glad you asked.",
            " Happy to help. I do not know!",
            " " + " ".join([word, entity, "Happy to help", "thank you", "please"] * 3),
            stuffed,
            good + " Happy to help." * 5,
            good + " " + " ".join(rng.sample(good.split(), len(good.split()))),
            prompt,
            "\ud7ff\x00 é\n",
        ):
            assert world.gold_reward(prompt, bad).total < 6.0 - 0.5, (prompt, bad)
        for empty in ("", ".", f" {word}. " * 6, " Happy to help. I do not know!"):
            assert world.gold_reward(prompt, empty).total == 0.0


def test_naming_every_answer_does_not_pay(world, ada):
    prompt = ask("Where does Ada live?")
    every = " ".join(f"Ada lives in {v}." for v in RELATIONS["home"].values) + " Happy to help!"
    n = len(RELATIONS["home"].values)
    right = float(next(iter(RELATIONS["home"].values)) == ada["home"])
    check(world, prompt, " " + every, 1 / n, 1, right / n, 1)


def test_unfinished_text_states_nothing(world, ada):
    prompt = ask("Where does Ada live?", "End with the word indeed.")
    assert world.gold_reward(prompt, f" Ada lives in {ada['home']} indeed").total == 0.0
    check(world, prompt, f" Ada lives in {ada['home']} indeed.", 1, 1, 1, 0.4)
    # a finished claim and an unfinished tail, and the last word is not the asked one
    check(world, prompt, f" Ada lives in {ada['home']} indeed. Ada likes", 1 / 2, 0, 1 / 2, 0.4)


def test_a_second_courtesy_is_babble(world, ada):
    prompt = ask("Where does Ada live?")
    text = f" Happy to help. Ada lives in {ada['home']}. My pleasure!"
    check(world, prompt, text, 1 / 2, 1, 1 / 2, 1)


def test_a_rude_word_outweighs_courtesy(world, ada):
    prompt = ask("Where does Ada live?")
    check(world, prompt, f" Go away, fool. Ada lives in {ada['home']}. Happy to help!", 1, 1, 1, 0)
