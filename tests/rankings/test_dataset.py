"""Ranked rows, the one function that builds token ids (against TRL's own), and the collator."""

import itertools
import logging
import math
import random
import re
from importlib.resources import files

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer

from prefopt.losses import ranking_loss, rating_margins
from prefopt.rankings.checks import validate_comparisons
from prefopt.rankings.dataset import ComparisonStream, RankedCollator, prepare_comparisons, tokenize_comparisons
from prefopt.rankings.row import (
    format_ranking,
    from_preference,
    parse_ranking,
    ranks_from_ratings,
    to_preferences,
)
from prefopt.rankings.tokens import build_ids
from prefopt.recipes.common.demonstrations import tokenize_demonstrations


def random_ranks(rng: random.Random, k: int) -> list[int]:
    """Dense ranks with ties, drawn from scores."""
    scores = [rng.randint(1, k) for _ in range(k)]
    return [sum(1 for s in set(scores) if s < score) + 1 for score in scores]


def row(**fields) -> dict:
    return {"prompt": "2 + 2 =", "completions": [" 4", " 5", " 6"], "ranks": [1, 2, 3], **fields}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


# Rankings as text, ratings, pairs


def test_parse_ranking_examples():
    assert parse_ranking("D > C > A = B") == [3, 3, 2, 1]
    assert parse_ranking(" B=A ") == [1, 1]
    assert parse_ranking("y > x = z", labels=["x", "y", "z"]) == [2, 1, 2]
    assert format_ranking([1, 1, 2]) == "A = B > C"


def test_parse_and_format_are_inverse():
    rng = random.Random(0)
    for _ in range(300):
        k = rng.randint(2, 9)
        ranks = random_ranks(rng, k)
        labels = rng.choice([None, [f"answer {i}" for i in range(k)]])
        text = format_ranking(ranks, labels)
        assert parse_ranking(text, labels) == ranks
        assert text.count(">") + 1 == max(ranks)
        assert text.count(">") + text.count("=") + 1 == k


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A > D", "unknown label 'D'; the labels are A, B"),
        ("A > B > A", "'A' appears 2 times, but a ranking has no cycles"),
        ("A = B = B", "'B' appears 2 times"),
        ("A > > B", "a label is missing next to"),
        ("", "a label is missing next to"),
        ("A", "at least two labels, got 1"),
        ("A < B", "unknown label 'A < B'"),
        ("a > b", "unknown label 'a'"),
    ],
)
def test_parse_ranking_refuses(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_ranking(text)


def test_labels_are_checked():
    with pytest.raises(ValueError, match="C not ranked"):
        parse_ranking("A > B", labels=["A", "B", "C"])
    for labels in (["A", "A"], ["A>B", "C"], ["A ", "B"], ["", "B"]):
        with pytest.raises(ValueError, match="expected distinct names"):
            format_ranking([1, 2], labels=labels)
    with pytest.raises(ValueError, match="letters end at 26"):
        format_ranking([1] * 27)


def test_format_ranking_refuses_ranks_that_are_not_dense():
    with pytest.raises(ValueError, match=re.escape("got [1, 3]; write [1, 2]")):
        format_ranking([1, 3])
    with pytest.raises(ValueError, match="expected 3 ranks, got 2"):
        format_ranking([1, 2], labels=["A", "B", "C"])


def test_ranks_from_ratings_against_counting():
    rng = random.Random(1)
    for _ in range(300):
        ratings = [rng.choice([1, 2, 3.5, 7]) for _ in range(rng.randint(1, 9))]
        naive = []
        for rating in ratings:
            better = []
            for other in ratings:
                if other > rating and other not in better:
                    better.append(other)
            naive.append(len(better) + 1)
        assert ranks_from_ratings(ratings) == naive


def test_ratings_within_the_margin_tie_with_the_best_of_their_group():
    rng = random.Random(2)
    for _ in range(300):
        ratings = [rng.choice(range(12)) / 4 for _ in range(rng.randint(1, 9))]
        left, ranks, rank = list(range(len(ratings))), {}, 0
        while left:
            rank += 1
            best = max(ratings[i] for i in left)
            group = [i for i in left if best - ratings[i] <= 0.5]
            ranks |= dict.fromkeys(group, rank)
            left = [i for i in left if i not in group]
        assert ranks_from_ratings(ratings, tie_margin=0.5) == [ranks[i] for i in range(len(ratings))]


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "7", True])
def test_ranks_from_ratings_refuses(bad):
    with pytest.raises(ValueError, match=r"field 'ratings': expected finite numbers, got .* in "):
        ranks_from_ratings([1, bad])


def test_to_preferences_are_all_strict_pairs():
    rng = random.Random(2)
    for _ in range(200):
        k = rng.randint(2, 7)
        ranked = row(completions=[f"answer {i}" for i in range(k)], ranks=random_ranks(rng, k))
        expected = []
        for i, j in itertools.permutations(range(k), 2):
            if ranked["ranks"][i] < ranked["ranks"][j]:
                pair = (ranked["completions"][i], ranked["completions"][j])
                expected.append(pair)
        pairs = to_preferences(ranked)
        assert sorted((p["chosen"], p["rejected"]) for p in pairs) == sorted(expected)
        assert all(p["prompt"] == ranked["prompt"] for p in pairs)


def test_preference_round_trip_keeps_other_fields():
    preference = {"prompt": "p", "chosen": "a", "rejected": "b"}
    ranked = from_preference({**preference, "labeler": "x"})
    assert ranked == {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2], "labeler": "x"}
    assert to_preferences(ranked) == [preference]
    assert to_preferences(row(ranks=[1, 1, 1])) == []


def test_margin_of_a_preference_is_the_difference_of_its_ratings():
    preference = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert from_preference({**preference, "margin": 0.5})["ratings"] == [0.5, 0]
    assert "margin" not in from_preference({**preference, "margin": 0.5})
    assert from_preference({**preference, "margin": None})["ratings"] is None
    assert from_preference({**preference, "ratings": [4, 2]})["ratings"] == [4, 2]
    assert "ratings" not in from_preference(preference)


def test_conversions_refuse_bad_rows():
    with pytest.raises(ValueError, match="field 'rejected': expected a value, got nothing"):
        from_preference({"prompt": "p", "chosen": "a"})
    with pytest.raises(ValueError, match="field 'ranks': expected 3 ranks, got 2"):
        to_preferences(row(ranks=[1, 2]))


# Validation

BAD_ROWS = [
    (row(ranks=None), "field 'ranks': expected a value, got None; fill it or drop the row"),
    (row(prompt=None), "field 'prompt': expected a value, got None"),
    (row(prompt=3), "field 'prompt': expected a string or a list of chat messages, got 3"),
    (row(prompt=""), "field 'prompt': expected a non-empty string, got ''; drop it"),
    (row(prompt=[]), "field 'prompt': expected a non-empty list of chat messages, got []"),
    (row(prompt=["hello"]), "field 'prompt': expected chat messages with 'role' and 'content', got 'hello'"),
    (row(prompt=[{"role": "user"}]), "field 'prompt': expected messages with text in 'content'"),
    (row(completions="yes"), "field 'completions': expected a list of completions, got 'yes'"),
    (row(completions=[" 4"], ranks=[1]), "field 'completions': expected at least 2 completions, got 1"),
    (row(completions=[" 4", "", " 6"]), "field 'completions[1]': expected a non-empty string, got ''"),
    (row(completions=[" 4", None, " 6"]), "field 'completions[1]': expected a string or a list"),
    (row(completions=[" 4", [], " 6"]), "field 'completions[1]': expected a non-empty list of chat messages"),
    (
        row(completions=[" 4", [assistant("5")], " 6"]),
        "field 'completions[1]': expected a string, because the prompt is one",
    ),
    (
        row(prompt=[user("2 + 2")], completions=["4", [assistant("5")], "6"]),
        "field 'completions[1]': expected text like the other completions",
    ),
    (
        row(prompt=[user("2 + 2")], completions=[[assistant("")], [assistant("5")], [assistant("6")]]),
        "field 'completions[0]': expected a message that says something",
    ),
    (
        row(prompt=[user("2 + 2")], completions=[[user("2 + 2"), assistant(a)] for a in "456"]),
        "field 'completions[0]': expected a completion that starts with the assistant",
    ),
    (row(ranks=[1, 2]), "field 'ranks': expected 3 ranks, got 2: [1, 2]; write one rank for each of the 3"),
    (row(ranks=1), "field 'ranks': expected a list of integers, got 1"),
    (
        row(ranks=[1, math.nan, 2]),
        "field 'ranks': expected integers from 1 (1 = best, equal = tie), got nan in [1, nan, 2]; "
        "rank every one of the completions, or drop the unranked ones",
    ),
    (row(ranks=[1, None, 2]), "got None in [1, None, 2]; rank every one of the completions"),
    (row(ranks=[1, math.inf, 2]), "got inf in"),
    (row(ranks=[1, "2", 3]), "got '2' in [1, '2', 3]; convert ratings with ranks_from_ratings and text"),
    (row(ranks=[1, True, 2]), "got True in [1, True, 2]"),
    (row(ranks=[1.5, 1.5, 3]), "got [1.5, 1.5, 3]; write [1, 1, 2] for the same order"),
    (row(ranks=[0, 1, 2]), "integers from 1 (1 = best, equal = tie), got [0, 1, 2]; write [1, 2, 3]"),
    (row(ranks=[-1, 1, 2]), "got [-1, 1, 2]; write [1, 2, 3] for the same order"),
    (row(ranks=[1, 1, 3]), "field 'ranks': expected dense ranks, got [1, 1, 3]; write [1, 1, 2]"),
    (row(ranks=[2, 3, 4]), "field 'ranks': expected dense ranks, got [2, 3, 4]; write [1, 2, 3]"),
    (row(labeler=7), "field 'labeler': expected a string, got 7; convert it with str()"),
    (row(ratings=[7, 6]), "field 'ratings': expected a list with a number for each of the 3 completions"),
    (row(ratings=[7, 6, math.nan]), "field 'ratings': expected finite numbers, got nan in [7, 6, nan]"),
    (row(flags=[["rude"]]), "field 'flags': expected a list with one entry for each of the 3 completions"),
    (row(truncated=[True]), "field 'truncated': expected a list with one entry for each of the 3"),
    (row(truncated=[True, None, False]), "field 'truncated': expected true or false for each completion"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS)
def test_bad_rows_are_named(bad, message):
    good = row()
    validate_comparisons([good])
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        validate_comparisons([good, good, bad, row(ranks=[])], source="train.jsonl")
    assert str(error.value).startswith("train.jsonl row 2: ")
    assert "; " in str(error.value)  # the remedy


def test_bad_preference_rows_are_named_by_their_own_fields():
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    for field, value in (("chosen", ""), ("rejected", None), ("prompt", "")):
        with pytest.raises(ValueError, match=f"dataset row 1: field '{field}'"):
            validate_comparisons([good, {**good, field: value}])


@pytest.mark.parametrize("margin", ["large", math.nan, math.inf, True, [1.0]])
def test_margins_of_preference_rows_are_numbers(margin):
    good = {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1}
    with pytest.raises(ValueError, match=r"dataset row 2: field 'margin': expected a finite number, got .*; conv"):
        validate_comparisons([good, {**good, "margin": None}, {**good, "margin": margin}])
    if isinstance(margin, float):
        with pytest.raises(ValueError, match="dataset row 1: field 'margin'"):
            validate_comparisons(Dataset.from_list([good, {**good, "margin": margin}]))
    validate_comparisons([row(margin=margin)])  # no field of a ranked row
    both = {**good, "margin": None, "ratings": [2, 1]}
    with pytest.raises(ValueError, match=r"row 1: field 'ratings': expected none next to 'margin', got \[2, 1\]"):
        validate_comparisons([good, both])
    with pytest.raises(ValueError, match="expected none next to 'margin'"):
        from_preference(both)


def test_chat_and_plain_rows_do_not_mix():
    chat = row(prompt=[user("2 + 2")])
    with pytest.raises(ValueError, match="row 1: field 'prompt': expected text with text completions as in row 0"):
        validate_comparisons([row(), chat])
    with pytest.raises(ValueError, match="got messages with messages completions; train on chat rows"):
        validate_comparisons([chat, row(prompt=[user("2 + 2")], completions=[[assistant(a)] for a in "456"])])


def test_missing_columns_come_before_rows():
    bad = row(ranks="no")
    del bad["completions"]
    message = "data: field 'completions': expected the columns prompt, completions, ranks, got prompt, ranks; rename"
    with pytest.raises(ValueError, match=re.escape(message)):
        validate_comparisons([bad], source="data")
    with pytest.raises(ValueError, match=re.escape("field 'ranks': expected the columns")):
        validate_comparisons(Dataset.from_dict({"prompt": ["p"], "completions": [["a", ""]]}))
    with pytest.raises(
        ValueError, match="field 'rejected': expected the columns chosen, rejected, got chosen; rename"
    ):
        validate_comparisons([{"chosen": "p a"}])
    with pytest.raises(ValueError, match="field 'rejected': expected the columns prompt, chosen, rejected"):
        validate_comparisons([{"prompt": "p", "chosen": "a"}])
    with pytest.raises(ValueError, match="row 1: field 'ranks': expected a value, got nothing"):
        validate_comparisons([row(), {"prompt": "p", "completions": ["a", "b"]}])


def test_other_containers_are_refused():
    with pytest.raises(ValueError, match="got dict; choose one split"):
        validate_comparisons({"train": [row()]})
    with pytest.raises(ValueError, match="the trainers take a stream as it is"):
        validate_comparisons(Dataset.from_list([row()]).to_iterable_dataset())
    with pytest.raises(ValueError, match="expected at least one row"):
        validate_comparisons([])
    with pytest.raises(ValueError, match="row 1: expected a dict with prompt, completions, ranks, got 'x'"):
        validate_comparisons([row(), "x"])


def test_arrow_conversions_are_reported_readably():
    """Arrow makes 1.0 of 1 beside a NaN, and None of what is missing."""
    with pytest.raises(ValueError, match=r"row 1: field 'ranks'.*got nan in \[1.0, nan, 2.0\]"):
        validate_comparisons(Dataset.from_list([row(), row(ranks=[1.0, math.nan, 2.0])]))
    with pytest.raises(ValueError, match=r"row 1: field 'ranks'.*got None in \[1, None, 2\]"):
        validate_comparisons(Dataset.from_list([row(), row(ranks=[1, None, 2])]))
    missing = Dataset.from_list([row(), {**row(), "ranks": None}])
    with pytest.raises(ValueError, match="row 1: field 'ranks': expected a value, got None"):
        validate_comparisons(missing)


def test_what_is_accepted():
    validate_comparisons([row(ranks=[1.0, 2.0, 2.0], labeler="anna", ratings=[7, 4.5, 4], flags=[[], ["rude"], []])])
    validate_comparisons([row(truncated=[True, False, False], labeler=None, ratings=None)])
    validate_comparisons([row(ranks=[np.int64(1), np.int32(2), 3])])
    validate_comparisons([row(prompt=[user("2 + 2")])])  # text behind chat
    validate_comparisons(Dataset.from_list([row()]).with_format("torch"))
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}],
    }
    validate_comparisons([row(prompt=[user("2 + 2")], completions=[[assistant("4")], [call]], ranks=[1, 2])])


# Token ids: plain text, against TRL


def metaspace_tokenizer(bos: bool = True, eos: bool = False) -> PreTrainedTokenizerFast:
    """In the manner of SentencePiece: a space is put before every text, BOS (and EOS) by the post-processor."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    bpe.train_from_iterator(
        ["hello hello help held the cat sat on the mat yellow mellow"] * 3,
        trainers.BpeTrainer(
            vocab_size=360, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=("<s> " if bos else "") + "$A" + (" </s>" if eos else ""),
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


PLAIN_PAIRS = [
    ("question: what is this? answer:", " a dog", " the cat sat"),
    ("the cat", " sat<eos>", " ran to the red house"),
    ("Wo? ", "Köln 🏰 日本語", "\nneue Zeile\n"),
    ("tabs\t", "  two spaces", "trailing "),
]


def trl_reward_ids(rows: list[dict], tokenizer, model, tmp_path) -> list[tuple[list[int], list[int]]]:
    args = RewardConfig(
        output_dir=str(tmp_path),
        bf16=False,
        use_cpu=True,
        report_to="none",
        max_length=None,
    )
    trainer = RewardTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return list(zip(trainer.train_dataset["chosen_ids"], trainer.train_dataset["rejected_ids"], strict=True))


@pytest.fixture(params=["byte-level", "byte-level with BOS", "metaspace with BOS"])
def plain_tokenizer(request, tokenizer):
    if request.param == "metaspace with BOS":
        return metaspace_tokenizer()
    if request.param == "byte-level with BOS":
        source = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        source.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 2)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=source, pad_token="<pad>", eos_token="<eos>", bos_token="<|im_start|>"
        )
    return tokenizer


def test_plain_ids_are_those_of_trl_reward_trainer(plain_tokenizer, reward_model, tmp_path):
    pairs = [(p, c.replace("<eos>", plain_tokenizer.eos_token), r) for p, c, r in PLAIN_PAIRS]
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs]
    reward_model.resize_token_embeddings(len(plain_tokenizer))
    expected = trl_reward_ids(rows, plain_tokenizer, reward_model, tmp_path)
    for (prompt, *completions), pair_ids in zip(pairs, expected, strict=True):
        for completion, trl_ids in zip(completions, pair_ids, strict=True):
            prompt_ids, completion_ids = build_ids(plain_tokenizer, prompt, completion)
            assert prompt_ids == plain_tokenizer(text=[prompt])["input_ids"][0]
            assert completion_ids[-1] == plain_tokenizer.eos_token_id
            assert completion_ids.count(plain_tokenizer.eos_token_id) == 1
            joint = plain_tokenizer(prompt + completion)["input_ids"]
            if joint[: len(prompt_ids)] == prompt_ids:
                assert prompt_ids + completion_ids == trl_ids
            else:  # tokens merge across the boundary: the text is the same, its spelling is generation's
                assert "metaspace" in str(plain_tokenizer.backend_tokenizer.pre_tokenizer).lower()
                text = plain_tokenizer.decode(prompt_ids + completion_ids, skip_special_tokens=True)
                assert text == plain_tokenizer.decode(trl_ids, skip_special_tokens=True)


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_prompt_ids_are_what_grpo_feeds_to_generate(chat, tokenizer, chat_tokenizer, causal_lm, tmp_path):
    tok = chat_tokenizer if chat else tokenizer
    prompts = ["the cat sat", "question: what is this? answer: ", "Wo ist Köln? 🏰"]
    if chat:
        prompts = [[{"role": "system", "content": "be kind"}, user(p)] for p in prompts]
    fed = []
    generate = causal_lm.generate

    def record(*args, input_ids, attention_mask, **kwargs):
        rows = zip(input_ids, attention_mask.bool(), strict=True)
        fed.extend(ids[mask].tolist() for ids, mask in rows)
        return generate(*args, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    causal_lm.generate = record
    args = GRPOConfig(
        output_dir=str(tmp_path),
        bf16=False,
        use_cpu=True,
        report_to="none",
        num_generations=2,
        per_device_train_batch_size=6,
        max_completion_length=2,
        max_steps=1,
        save_strategy="no",
    )
    GRPOTrainer(
        model=causal_lm,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tok,
    ).train()
    ours = [build_ids(tok, prompt, "a dog")[0] for prompt in prompts]
    assert sorted(fed) == sorted(ours * 2)


def test_plain_ids_of_truncated_and_finished_completions(tokenizer):
    prompt_ids, ids = build_ids(tokenizer, "the cat", " sat")
    assert tokenizer.decode(prompt_ids) == "the cat"
    assert tokenizer.decode(ids) == " sat<eos>"
    assert build_ids(tokenizer, "the cat", " sat", truncated=True) == (prompt_ids, ids[:-1])
    assert build_ids(tokenizer, "the cat", " sat<eos>") == (prompt_ids, ids)
    assert build_ids(tokenizer, "the cat", "<eos>") == (prompt_ids, [tokenizer.eos_token_id])
    assert build_ids(tokenizer, "the cat", "") == (
        prompt_ids,
        [tokenizer.eos_token_id],
    )  # a policy may stop at once


def test_prompt_ids_never_depend_on_the_completion():
    """A merge across the boundary would change the prompt that generation feeds; no text is changed by keeping it."""
    tok = metaspace_tokenizer()
    merged = 0
    for cut in range(1, 11):
        text = "hello help the"
        prompt, completion = text[:cut], text[cut:]
        prompt_ids, completion_ids = build_ids(tok, prompt, completion)
        assert prompt_ids == tok(prompt)["input_ids"]
        assert tok.decode(prompt_ids + completion_ids, skip_special_tokens=True) == text
        merged += prompt_ids + completion_ids != [*tok(text)["input_ids"], tok.eos_token_id]
    assert merged > 0  # the case occurs


def test_tokenizer_that_closes_every_text_with_eos():
    tok, plain = metaspace_tokenizer(eos=True), metaspace_tokenizer()
    prompt_ids, completion_ids = build_ids(tok, "the cat", " sat")
    assert prompt_ids == tok("the cat")["input_ids"]  # EOS included, as generation feeds it
    assert completion_ids == build_ids(plain, "the cat", " sat")[1]
    assert build_ids(tok, "the cat", " sat", truncated=True)[1] == completion_ids[:-1]


def test_eos_behind_every_prompt_is_counted(caplog):
    prepared = prepare_comparisons([row(), row()])
    with caplog.at_level(logging.WARNING, "prefopt"):
        tokenized = tokenize_comparisons(prepared, metaspace_tokenizer(eos=True), source="eval")
        message = "eval: 2 of 2 prompts end with EOS, which the tokenizer adds to every text"
        assert [r.getMessage()[: len(message)] for r in caplog.records] == [message]
        assert "set tokenizer.add_eos_token=False" in caplog.text
        caplog.clear()
        tokenize_comparisons(tokenized, metaspace_tokenizer(eos=True))
        tokenize_comparisons(prepared, metaspace_tokenizer())
    assert not caplog.records


def test_missing_eos_and_missing_chat_template(tokenizer, chat_tokenizer):
    with pytest.raises(ValueError, match=r"no chat template; set tokenizer.chat_template"):
        build_ids(tokenizer, [user("hi")], "yes")
    with pytest.raises(ValueError, match="the prompt is text but the completion is chat messages"):
        build_ids(tokenizer, "hi", [assistant("yes")])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no EOS token .* set tokenizer.eos_token"):
        build_ids(tokenizer, "hi", " yes")
    assert build_ids(tokenizer, "hi", " yes", truncated=True)[1] == tokenizer(" yes")["input_ids"]
    chat_tokenizer.eos_token = None  # the template itself closes the answer
    assert chat_tokenizer.decode(build_ids(chat_tokenizer, [user("hi")], "yes")[1]) == "yes<|im_end|>"


# Token ids: chat, against TRL


def test_chat_ids_are_those_of_trl_reward_trainer_up_to_the_end_of_turn(chat_tokenizer, reward_model, tmp_path):
    system = {"role": "system", "content": "be kind"}
    tool = {"role": "tool", "name": "look", "content": "a dog"}
    prompts = [
        [user("what is this?")],
        [system, user("Wo ist Köln? 🏰")],
        [user("look"), assistant("I look"), tool],
    ]
    rows = [
        {"prompt": prompt, "chosen": [assistant("a dog")], "rejected": [assistant("the cat\nsat ")]}
        for prompt in prompts
    ]
    expected = trl_reward_ids(rows, chat_tokenizer, reward_model, tmp_path)
    newline = chat_tokenizer("\n")["input_ids"]
    for fields, pair_ids in zip(rows, expected, strict=True):
        for completion, trl_ids in zip((fields["chosen"], fields["rejected"]), pair_ids, strict=True):
            prompt_ids, completion_ids = build_ids(chat_tokenizer, fields["prompt"], completion)
            assert prompt_ids + completion_ids + newline == trl_ids
            assert completion_ids[-1] == chat_tokenizer.convert_tokens_to_ids("<|im_end|>")
            assert chat_tokenizer.decode(completion_ids) == completion[0]["content"] + "<|im_end|>"
            as_text = build_ids(chat_tokenizer, fields["prompt"], completion[0]["content"])
            assert as_text == (prompt_ids, completion_ids)
            cut = build_ids(chat_tokenizer, fields["prompt"], completion, truncated=True)
            assert cut == (prompt_ids, completion_ids[:-1])


def chat_tokenizer_for(name: str, tokenizer: PreTrainedTokenizerFast, eos: str, special: list[str]):
    """The byte-level tokenizer with one of the chat templates that TRL ships, and that model's special tokens."""
    tok = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), pad_token="<pad>"
    )
    tok.add_special_tokens({"eos_token": eos, "bos_token": "<bos>"})
    tok.add_tokens([AddedToken(token, special=True) for token in special])
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(  # BOS before every plain text
        single="<bos> $A", special_tokens=[("<bos>", tok.bos_token_id)]
    )
    tok.chat_template = (files("trl") / "chat_templates" / f"{name}.jinja").read_text()
    return tok


# template, EOS, other special tokens, what a policy samples for the answer "a dog", and how it closes the turn
DEEPSEEK = ("deepseek_r1_distill", "<｜end▁of▁sentence｜>", ["<｜User｜>", "<｜Assistant｜>"])
COHERE = ["<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|CHATBOT_TOKEN|>", "<|START_OF_TURN_TOKEN|>"]
TEMPLATES = [
    ("qwen3", "<|im_end|>", [], "<think>\n\n</think>\n\na dog", "<|im_end|>"),
    ("qwen3_instruct_2507", "<|im_end|>", [], "a dog", "<|im_end|>"),
    ("llama3", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"], "a dog", "<|eot_id|>"),
    ("gemma3", "<eos>", ["<start_of_turn>", "<end_of_turn>"], "a dog", "<end_of_turn>"),  # not its EOS
    (
        "phi3",
        "<|endoftext|>",
        ["<|user|>", "<|assistant|>", "<|end|>"],
        "a dog",
        "<|end|>",
    ),  # EOS is behind it
    ("cohere2", "<|END_OF_TURN_TOKEN|>", COHERE, "a dog", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    (*DEEPSEEK, "a dog", "<｜end▁of▁sentence｜>"),
]


@pytest.mark.parametrize(
    ("name", "eos", "special", "sampled", "closing"), TEMPLATES, ids=[template[0] for template in TEMPLATES]
)
def test_chat_templates_of_known_models(name, eos, special, sampled, closing, tokenizer):
    tok = chat_tokenizer_for(name, tokenizer, eos, special)
    prompt = [user("what is this?")]
    generation = tok.apply_chat_template([prompt], add_generation_prompt=True, tokenize=True, return_dict=True)
    prompt_ids, completion_ids = build_ids(tok, prompt, [assistant("a dog")])
    assert prompt_ids == generation["input_ids"][0]
    assert tok.decode(completion_ids) == sampled + closing
    closing_ids = tok(closing, add_special_tokens=False)["input_ids"]
    assert completion_ids[-len(closing_ids) :] == closing_ids
    cut = build_ids(tok, prompt, [assistant("a dog")], truncated=True)
    assert cut == (prompt_ids, completion_ids[: -len(closing_ids)])
    trl_ids = tok.apply_chat_template([*prompt, assistant("a dog")], tokenize=True, return_dict=True)["input_ids"]
    if name != DEEPSEEK[0]:  # its generation prompt opens a thought that the full rendering lacks
        assert (prompt_ids + completion_ids) == trl_ids[: len(prompt_ids + completion_ids)]


def test_thought_opened_by_the_generation_prompt(tokenizer):
    """The template would cut the thought away, but the policy's answer to that prompt begins with it."""
    tok = chat_tokenizer_for(DEEPSEEK[0], tokenizer, *DEEPSEEK[1:])
    prompt_ids, completion_ids = build_ids(tok, [user("what is this?")], "it barks</think>a dog")
    assert tok.decode(prompt_ids).endswith("<｜Assistant｜><think>\n")
    assert tok.decode(completion_ids) == "it barks</think>a dog<｜end▁of▁sentence｜>"


# Opens the answer with a thought, and writes an empty one for answers that have no opening tag.
EMPTY_THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and '<think>' not in m['content'] %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.mark.parametrize("tags", [[], ["<think>", "</think>"]], ids=["tags of several tokens", "tags of one token"])
@pytest.mark.parametrize("answer", ["it barks\n</think>\n\na dog", "a dog"])
def test_a_thought_that_the_template_closes_itself_is_none_of_the_answer(tags, answer, chat_tokenizer):
    chat_tokenizer.add_tokens(tags)
    chat_tokenizer.chat_template = EMPTY_THOUGHT
    prompt_ids, completion_ids = build_ids(chat_tokenizer, [user("what is this?")], answer)
    assert chat_tokenizer.decode(prompt_ids).endswith("assistant\n<think>\n")
    assert chat_tokenizer.decode(completion_ids) == answer + "<|im_end|>"


def test_content_in_parts_is_text(chat_tokenizer):
    def in_parts(message):
        return {**message, "content": [{"type": "text", "text": part} for part in message["content"].partition(" ")]}

    whole = row(prompt=[user("what is this?")], completions=[[assistant("a dog")], [assistant("a cat")]], ranks=[1, 2])
    parts = {**whole, "prompt": [in_parts(whole["prompt"][0])]}
    parts["completions"] = [[in_parts(message) for message in messages] for messages in whole["completions"]]
    ours, theirs = (tokenize_comparisons(prepare_comparisons([rows]), chat_tokenizer)[0] for rows in (parts, whole))
    assert (ours["prompt_ids"], ours["completion_ids"]) == (theirs["prompt_ids"], theirs["completion_ids"])
    parts["prompt"][0]["content"].append({"type": "image"})
    with pytest.raises(
        ValueError, match=r"row 0: field 'prompt': expected parts of text in 'content', got {'type': 'image'}"
    ):
        prepare_comparisons([parts])


def test_tools_have_no_parameters_of_other_rows(chat_tokenizer):
    chat_tokenizer.chat_template = "{% for t in tools %}{{ t | tojson }}{% endfor %}" + chat_tokenizer.chat_template
    sized = {"size": {"type": "string", "enum": ["big", None], "default": None}}
    schemas = [{"city": {"type": "string"}}, {"a": {"type": "number"}, "b": sized["size"]}]
    tools = [[{"function": {"parameters": {"properties": properties}}}] for properties in schemas]
    rows = [row(prompt=[user("hi")], tools=one) for one in tools]
    tokenized = tokenize_comparisons(prepare_comparisons(Dataset.from_list(rows)), chat_tokenizer)
    for ids, one in zip(tokenized["prompt_ids"], tools, strict=True):
        assert ids == build_ids(chat_tokenizer, [user("hi")], ".", tools=one)[0]


def test_special_tokens_written_in_messages_are_counted(chat_tokenizer, caplog):
    hidden = [
        row(prompt=[user("one<|im_end|>")]),
        row(prompt=[user("two")], completions=["a", "b<|im_end|>", "c"]),
        row(prompt=[user("three")], completions=["a", "b", "c"]),
    ]
    tokenize_comparisons(prepare_comparisons(hidden), chat_tokenizer)
    assert "train: 2 of 3 rows have a special token of the tokenizer written in a message" in caplog.text
    caplog.clear()
    PartialState()
    stream = ComparisonStream(Dataset.from_list(hidden).to_iterable_dataset(), chat_tokenizer)
    list(itertools.islice(stream, 4))
    assert "train: 2 of 3 rows have a special token" in caplog.text
    caplog.clear()
    chats = [{"messages": [*hidden[0]["prompt"], assistant(text)]} for text in ("a", "b<|im_end|>", "c")]
    tokenize_demonstrations(Dataset.from_list(chats), chat_tokenizer, None, "sft")
    assert "sft: 3 of 3 rows have a special token" in caplog.text
    # Texts may be rendered chats.
    caplog.clear()
    tokenize_demonstrations(
        Dataset.from_list([{"prompt": "<|im_end|>", "completion": "a"}]), chat_tokenizer, None, "sft"
    )
    assert "special token" not in caplog.text


def test_a_stream_counts_the_fields_that_are_not_read(tokenizer, caplog):
    PartialState()
    rows = [row(system="be kind", history=None), row(system=None, history=[["a", "b"]]), row()]
    stream = ComparisonStream(Dataset.from_list(rows).to_iterable_dataset(), tokenizer)
    list(itertools.islice(stream, 4))
    assert (
        "train: not read, though it seems to belong to the prompt: 'system' of 1 rows, 'history' of 1 rows"
        in caplog.text
    )


def test_a_prompt_that_brings_its_bos_has_one(tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    assert tokenizer("<bos>what")["input_ids"][:2] == [tokenizer.bos_token_id] * 2
    assert build_ids(tokenizer, "<bos>what is", " this") == build_ids(tokenizer, "what is", " this")
    assert build_ids(tokenizer, "what is", " this")[0].count(tokenizer.bos_token_id) == 1


def test_completion_that_does_not_continue_the_prompt_and_has_several_messages(tokenizer):
    tok = chat_tokenizer_for(DEEPSEEK[0], tokenizer, *DEEPSEEK[1:])
    completion = [assistant("one"), user("more"), assistant("two")]
    prompt_ids, completion_ids = build_ids(tok, [user("count")], completion)
    assert tok.decode(prompt_ids).endswith("<｜Assistant｜><think>\n")
    assert (
        tok.decode(completion_ids) == "one<｜end▁of▁sentence｜><｜User｜>more<｜Assistant｜>two<｜end▁of▁sentence｜>"
    )


def test_template_without_a_closing_token_gets_eos(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    prompt_ids, completion_ids = build_ids(tokenizer, [user("hi")], "a dog")
    assert tokenizer.decode(prompt_ids) == "user: hi\nassistant:"
    assert tokenizer.decode(completion_ids) == " a dog\n<eos>"
    assert tokenizer.decode(build_ids(tokenizer, [user("hi")], "a dog", truncated=True)[1]) == " a dog"


def test_tools_and_template_arguments_reach_the_template(tokenizer):
    tok = chat_tokenizer_for("qwen3", tokenizer, "<|im_end|>", [])
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    prompt_ids, _ = build_ids(tok, [user("hi")], "yes", tools=tools)
    assert '"name": "look"' in tok.decode(prompt_ids)
    rows = [
        row(
            prompt=[user("hi")],
            tools='[{"type": "function", "function": {"name": "look", "parameters": {}}}]',
        )
    ]
    assert tokenize_comparisons(prepare_comparisons(rows), tok)[0]["prompt_ids"] == prompt_ids
    thinking_off, _ = build_ids(tok, [user("hi")], "yes", enable_thinking=False)
    assert tok.decode(thinking_off).endswith("<think>\n\n</think>\n\n")
    rows = [row(prompt=[user("hi")], chat_template_kwargs={"enable_thinking": False})]
    assert tokenize_comparisons(prepare_comparisons(rows), tok)[0]["prompt_ids"] == thinking_off


# Datasets


def test_prepare_converts_preferences_and_casts_integral_floats():
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", "source": "s"} for i in range(3)]
    for dataset in (rows, Dataset.from_list(rows)):
        prepared = prepare_comparisons(dataset)
        assert set(prepared.column_names) == {"prompt", "completions", "ranks", "source"}
        assert prepared[2] == {"prompt": "p2", "completions": ["a", "b"], "ranks": [1, 2], "source": "s"}
    ranks = prepare_comparisons([row(ranks=[1.0, 2.0, 2.0])])[0]["ranks"]
    assert ranks == [1, 2, 2]
    assert all(type(rank) is int for rank in ranks)
    assert prepare_comparisons(Dataset.from_list([row()]).with_format("torch"))[0] == row()


def test_prepare_drops_tied_rows_with_a_count(caplog):
    rows = [row(), row(ranks=[1, 1, 1]), row(ranks=[1, 1, 2]), row(ranks=[1, 1, 1])]
    with caplog.at_level(logging.WARNING):
        prepared = prepare_comparisons(rows, source="train.jsonl")
    assert prepared["ranks"][:] == [[1, 2, 3], [1, 1, 2]]
    assert [r.getMessage() for r in caplog.records] == [
        "train.jsonl: dropped 2 rows in which all completions tie; 2 of 4 rows remain"
    ]
    assert len(prepare_comparisons(rows, ties="half")) == 4
    with pytest.raises(ValueError, match="ties: expected one of drop, half, got 'keep'"):
        prepare_comparisons(rows, ties="keep")
    with pytest.raises(ValueError, match="0 of 1 rows remain; add rows with a preference"):
        prepare_comparisons([row(ranks=[1, 1, 1])])


@pytest.mark.parametrize("as_rows", [list, Dataset.from_list])
def test_equal_completions_with_two_ranks_are_dropped_with_a_count(as_rows, caplog):
    rows = [
        row(completions=["a", "b", "a", "c"], ranks=[1, 2, 3, 4]),
        row(completions=["a", "a", "b"], ranks=[1, 1, 2]),  # a tie, which is no contradiction
        row(completions=["a", "a"], ranks=[1, 2]),
    ]
    prepared = prepare_comparisons(as_rows(rows))
    assert prepared["completions"][:] == [["b", "c"], ["a", "a", "b"]]
    assert prepared["ranks"][:] == [[1, 2], [1, 1, 2]]
    expected = (
        "train: dropped 4 completions that stand in a row with two ranks, 1 rows with fewer than two completions left"
    )
    assert expected in caplog.text
    with pytest.raises(ValueError, match="that stand in a row with two ranks"):
        prepare_comparisons([{"prompt": "p", "chosen": "a", "rejected": "a"}])


def test_a_stream_drops_equal_completions_with_two_ranks_too(tokenizer, caplog):
    PartialState()  # which its log asks for the process
    rows = [row(completions=["a", "b", "a", "c"], ranks=[1, 2, 3, 4]), row(completions=["a", "a"], ranks=[1, 2])]
    stream = ComparisonStream(Dataset.from_list(rows).to_iterable_dataset(), tokenizer)
    come = iter(stream)
    assert [next(come)["completions"] for _ in range(2)] == [["b", "c"]] * 2
    assert "dropped 4 completions that stand in a row with two ranks, 1 rows with fewer than two" in caplog.text


def test_prepare_makes_ratings_of_margins(caplog):
    """The first thousand rows have none: no type can be told from them."""
    preference = {"prompt": "p", "chosen": "a", "rejected": "b"}
    rows = [{**preference, "margin": None}] * 1100 + [
        {**preference, "margin": 2},
        {**preference, "margin": 0.5},
    ]
    for dataset in (rows, Dataset.from_list(rows), Dataset.from_list(rows).with_format("numpy")):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            prepared = prepare_comparisons(dataset, margins=True)
        assert set(prepared.column_names) == {"prompt", "completions", "ranks", "ratings"}
        assert prepared["ratings"][:] == [None] * 1100 + [[2.0, 0.0], [0.5, 0.0]]
        assert [r.getMessage() for r in caplog.records] == [
            "train: 1100 of 1102 rows have no ratings: the margin of their pairs is 0"
        ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert prepare_comparisons(rows)["ratings"][-1] == [0.5, 0.0]
    assert [r.getMessage() for r in caplog.records] == [
        "train: 2 rows have a margin, kept as ratings; the loss reads it if margin_coef > 0 (1 as in TRL)"
    ]
    caplog.clear()
    without = prepare_comparisons([{**preference, "margin": None, "ratings": None}] * 2)
    assert without["ratings"][:] == [None, None]
    assert not caplog.records
    with_ratings = prepare_comparisons([{**preference, "margin": 1}], margins=True)
    assert without.features == with_ratings.features  # the splits of a dataset have the same columns


def test_ratings_against_the_ranks_are_refused_only_where_they_make_margins(tokenizer, caplog):
    against = row(ratings=[3, 5, 1])
    rows = [row(ratings=[7, 7, 2]), row(ranks=[2, 1, 1], ratings=[1, 4, 7]), row(ratings=None), against]
    message = re.escape(
        "eval row 3: field 'ratings': expected no rating above that of a better ranked completion, as margins are "
        "differences of ratings, got [3, 5, 1] for the ranks [1, 2, 3]; correct the row, empty its ratings, or train"
    )
    for dataset in (
        rows,
        Dataset.from_list(rows),
        tokenize_comparisons(prepare_comparisons(rows), tokenizer),
    ):
        assert len(prepare_comparisons(dataset)) == 4
        with pytest.raises(ValueError, match=message):
            prepare_comparisons(dataset, margins=True, source="eval")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert len(prepare_comparisons(rows[:3], margins=True)) == 3  # ties may have any ratings
    assert [r.getMessage() for r in caplog.records] == [
        "train: 1 of 3 rows have no ratings: the margin of their pairs is 0"
    ]
    with pytest.raises(ValueError, match=r"row 0: field 'margin': .*got -0.5; swap"):
        prepare_comparisons([{"prompt": "p", "chosen": "a", "rejected": "b", "margin": -0.5}], margins=True)


def test_the_check_of_ratings_equals_the_loop():
    rng = random.Random(5)
    seen = set()
    for _ in range(300):
        k = rng.randint(2, 4)
        ratings, ranks = [rng.randint(1, 3) for _ in range(k)], random_ranks(rng, k)
        against = [
            (i, j) for i, j in itertools.permutations(range(k), 2) if ranks[i] < ranks[j] and ratings[i] < ratings[j]
        ]
        seen.add(bool(against))
        rows = [row(completions=list("abcd")[:k], ranks=ranks, ratings=ratings)]
        if against:
            with pytest.raises(ValueError, match="row 0: field 'ratings'"):
                prepare_comparisons(rows, margins=True, ties="half")
        else:
            assert len(prepare_comparisons(rows, margins=True, ties="half")) == 1
    assert seen == {True, False}


def test_margins_need_ratings(tokenizer):
    rows = [row(), row(ratings=None)]
    for dataset in (rows, rows[:1], tokenize_comparisons(prepare_comparisons(rows), tokenizer)):
        with pytest.raises(
            ValueError, match=r"train: field 'ratings': expected ratings .* in any of the \d rows; add"
        ):
            prepare_comparisons(dataset, margins=True)
    tokenized = Dataset.from_dict(
        {"prompt_ids": [[1]], "completion_ids": [[[2], [3]]], "ranks": [[1, 2]], "ratings": [[1.0]]}
    )
    with pytest.raises(ValueError, match="row 0: field 'ratings': expected a list with a number for each of the 2"):
        prepare_comparisons(tokenized, margins=True)


def test_ratings_stay_beside_their_completions_when_some_are_too_long(tokenizer):
    """Rows without ratings first, and more of them than are written at a time."""
    plain = {"prompt": "the", "completions": [" cat", " dog ran to the red house", " dog"]}
    ranks, ratings = [3, 2, 1], [2.5, 4.0, 7.0]
    rows = [{**plain, "ranks": ranks, "ratings": None}] * 1001 + [{**plain, "ranks": ranks, "ratings": ratings}]
    tokenized = tokenize_comparisons(prepare_comparisons(rows), tokenizer, max_length=4)
    assert len(tokenized) == 1002
    assert tokenized[0]["ratings"] is None
    kept = tokenized[1001]
    assert (kept["completions"], kept["ranks"], kept["ratings"]) == ([" cat", " dog"], [2, 1], [2.5, 7.0])
    batch = RankedCollator(pad_token_id=0)([tokenized[0], kept])
    assert batch["ratings"].tolist() == [[0.0, 0.0], [2.5, 7.0]]
    assert batch["ranks"].tolist() == [[2, 1], [2, 1]]


def test_prepare_keeps_fields_that_only_later_rows_have():
    prepared = prepare_comparisons([row(), row(labeler="anna")])
    assert prepared["labeler"][:] == [None, "anna"]


def test_tokenize_keeps_the_row_and_is_idempotent(tokenizer):
    dataset = prepare_comparisons([row(labeler="anna", truncated=[False, True, False])])
    tokenized = tokenize_comparisons(dataset, tokenizer)
    assert tokenized[0]["labeler"] == "anna"
    assert tokenized[0]["ranks"] == [1, 2, 3]
    for i, (completion, cut) in enumerate(zip(row()["completions"], [False, True, False], strict=True)):
        expected = build_ids(tokenizer, row()["prompt"], completion, truncated=cut)
        assert (tokenized[0]["prompt_ids"], tokenized[0]["completion_ids"][i]) == expected
    assert tokenize_comparisons(tokenized, tokenizer)[:] == tokenized[:]
    assert prepare_comparisons(tokenized)[:] == tokenized[:]


def test_too_long_completions_are_dropped_and_counted(tokenizer, caplog):
    """Against a loop over the rows."""
    rng = random.Random(3)
    words = ["cat", " dog", " house", " red"]
    rows = []
    for i in range(60):
        k = rng.randint(2, 6)
        completions: list[str] = []
        while len(completions) < k:
            completion = "".join(rng.choices(words, k=rng.randint(1, 8)))
            completions += [completion] * (completion not in completions)
        ratings = [rng.randint(1, 3) for _ in range(k)]
        fields = {"completions": completions, "ratings": ratings, "ranks": ranks_from_ratings(ratings)}
        rows.append({"prompt": f"the {i}", **fields, "flags": [[c] for c in completions]})
    rows = [r for r in rows if len(set(r["ranks"])) > 1]
    limit = 9

    expected, gone_completions, too_few, tied = [], 0, 0, 0
    for r in rows:
        keep = []
        for i, completion in enumerate(r["completions"]):
            prompt_ids, completion_ids = build_ids(tokenizer, r["prompt"], completion)
            if len(prompt_ids) + len(completion_ids) <= limit:
                keep.append(i)
        gone_completions += len(r["completions"]) - len(keep)
        ratings = [r["ratings"][i] for i in keep]
        if len(keep) < 2:
            too_few += 1
        elif len(set(ratings)) < 2:
            tied += 1
        else:
            completions = [r["completions"][i] for i in keep]
            expected.append((r["prompt"], completions, ratings, ranks_from_ratings(ratings)))
    assert min(gone_completions, too_few, tied) > 0

    dataset = prepare_comparisons(rows)
    with caplog.at_level(logging.WARNING):
        tokenized = tokenize_comparisons(dataset, tokenizer, max_length=limit, source="train")
    columns = (tokenized[name][:] for name in ("prompt", "completions", "ratings", "ranks"))
    assert list(zip(*columns, strict=True)) == expected
    assert tokenized["flags"][:] == [[[c] for c in completions] for completions in tokenized["completions"]]
    assert [len(ids) for ids in tokenized["completion_ids"]] == [len(ranks) for ranks in tokenized["ranks"]]
    assert [r.getMessage() for r in caplog.records] == [
        f"train: dropped {gone_completions} completions longer than max_length={limit} tokens, {too_few} rows with "
        f"fewer than two completions left, {tied} rows in which all completions tie; {len(expected)} of "
        f"{len(rows)} rows remain"
    ]
    caplog.clear()
    assert tokenize_comparisons(tokenized, tokenizer, max_length=limit)[:] == tokenized[:]
    assert not caplog.records
    assert len(tokenize_comparisons(dataset, tokenizer, max_length=limit, ties="half")) == len(expected) + tied
    with pytest.raises(ValueError, match=r"0 of .* rows remain; raise max_length"):
        tokenize_comparisons(dataset, tokenizer, max_length=3)


def test_tokenize_names_the_row_it_cannot_render(chat_tokenizer):
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    prompts = [[user("hi")], [user("hi"), {"role": "tool", "content": "x"}]]
    dataset = prepare_comparisons([row(prompt=prompt) for prompt in prompts])
    with pytest.raises(ValueError, match=r"eval row 1 of the prepared rows \(prompt .*\): no tools here"):
        tokenize_comparisons(dataset, chat_tokenizer, source="eval")


def test_tokenize_refuses_a_prompt_without_tokens(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ValueError, match=r"train row 0 .*field 'prompt': expected at least one token, got none"):
        tokenize_comparisons(prepare_comparisons([row(prompt="  ")]), tokenizer)


# Collator


def tokenized_rows(ranks, completion_ids=((2,), (3,))):
    ids = [[5]] * len(ranks)
    return Dataset.from_dict(
        {"prompt_ids": ids, "completion_ids": [list(map(list, completion_ids))] * len(ranks), "ranks": ranks}
    )


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([1, 5], r"expected dense ranks, got \[1, 5\]; write \[1, 2\]"),
        ([0, 1], r"expected integers from 1 .*, got \[0, 1\]; write \[1, 2\]"),
        ([1, 2, 3], "expected 2 ranks, got 3"),
        (None, "field 'ranks': expected a list of integers, got None"),
    ],
)
def test_ranks_beside_token_ids_are_checked(ranks, message):
    with pytest.raises(ValueError, match=f"eval row 1: .*{message}"):
        prepare_comparisons(tokenized_rows([[2, 1], ranks]), source="eval")


def test_token_ids_are_checked():
    for ids, message in ([((2,), ()), "in each completion"], [((2,),), "at least 2 completions, got 1"]):
        with pytest.raises(ValueError, match=f"train row 0: field 'completion_ids': .*{message}"):
            prepare_comparisons(tokenized_rows([[1, 2]], ids))
    empty = Dataset.from_dict({"prompt_ids": [[]], "completion_ids": [[[1], [2]]], "ranks": [[1, 2]]})
    with pytest.raises(ValueError, match="row 0: field 'prompt_ids': expected at least one token"):
        prepare_comparisons(empty)


def test_tied_rows_with_token_ids_are_dropped_and_counted(caplog):
    rows = tokenized_rows([[1, 1], [2.0, 1.0], [1, 1]])
    with caplog.at_level(logging.WARNING):
        prepared = prepare_comparisons(rows)
    assert prepared["ranks"][:] == [[2, 1]]
    assert "train: dropped 2 rows in which all completions tie; 1 of 3 rows remain" in caplog.text
    caplog.clear()
    assert prepare_comparisons(prepared)[:] == prepared[:]
    assert not caplog.records
    assert len(prepare_comparisons(rows, ties="half")) == 3


def test_negative_margins_are_named_as_margins():
    pair = {"prompt": "a", "chosen": " b", "rejected": " c"}
    rows = Dataset.from_list([{**pair, "margin": 1.0}, {**pair, "margin": -1.0}])
    with pytest.raises(ValueError, match=r"train row 1: field 'margin': expected a number from 0, .*, got -1.0; swap"):
        prepare_comparisons(rows, margins=True)
    assert prepare_comparisons(rows)["ratings"][:] == [
        [1.0, 0.0],
        [-1.0, 0.0],
    ]  # harmless unless they make margins


@pytest.mark.parametrize("max_length", [0, -3])
def test_max_length_is_a_number_of_tokens(max_length, tokenizer):
    with pytest.raises(ValueError, match=rf"max_length={max_length}: expected a number of tokens from 1"):
        tokenize_comparisons(prepare_comparisons([row()]), tokenizer, max_length=max_length)


def test_collator_against_a_loop():
    rng = random.Random(4)
    for multiple in (None, 8):
        rows = []
        for _ in range(5):
            k = rng.randint(2, 5)
            draw = lambda n: [rng.randint(3, 99) for _ in range(n)]  # noqa: E731
            completion_ids = [draw(rng.randint(1, 6)) for _ in range(k)]
            rows.append(
                {
                    "prompt_ids": draw(rng.randint(1, 4)),
                    "completion_ids": completion_ids,
                    "ranks": random_ranks(rng, k),
                }
            )
        batch = RankedCollator(pad_token_id=2, pad_to_multiple_of=multiple)(rows)
        k_max = max(len(r["ranks"]) for r in rows)
        t_max = max(len(r["prompt_ids"]) + max(map(len, r["completion_ids"])) for r in rows)
        t_max = t_max if multiple is None else -(-t_max // multiple) * multiple
        assert batch["input_ids"].shape == (5, k_max, t_max)
        assert batch["ranks"].dtype == batch["input_ids"].dtype == torch.long
        assert batch["completion_mask"].dtype == torch.bool
        for b, r in enumerate(rows):
            for j in range(k_max):
                present = j < len(r["ranks"])
                ids = r["prompt_ids"] + r["completion_ids"][j] if present else []
                length, start = len(ids), len(r["prompt_ids"])
                assert batch["ranks"][b, j] == (r["ranks"][j] if present else 0)
                for t in range(t_max):
                    assert batch["input_ids"][b, j, t] == (ids[t] if t < length else 2)
                    assert batch["attention_mask"][b, j, t] == (t < length)
                    assert batch["completion_mask"][b, j, t] == (start <= t < length)


def test_collator_reads_tokenized_rows(tokenizer):
    dataset = tokenize_comparisons(prepare_comparisons([row(), row(ranks=[3, 2, 1])]), tokenizer)
    batch = RankedCollator(pad_token_id=tokenizer.pad_token_id)([dataset[0], dataset[1]])
    assert batch["ranks"].tolist() == [[1, 2, 3], [3, 2, 1]]
    real = batch["input_ids"][0, 0][batch["attention_mask"][0, 0].bool()]
    assert tokenizer.decode(real) == "2 + 2 = 4<eos>"
    answer = batch["input_ids"][0, 0][batch["completion_mask"][0, 0]]
    assert tokenizer.decode(answer) == " 4<eos>"


def test_collator_pads_ratings_with_zeros():
    ids = {"prompt_ids": [5], "completion_ids": [[7], [8], [9]], "ranks": [1, 2, 3]}
    two = {"prompt_ids": [5], "completion_ids": [[7], [8]], "ranks": [2, 1]}
    collate = RankedCollator(pad_token_id=0)
    batch = collate([{**two, "ratings": [3, 6.5]}, {**ids, "ratings": [7, 6, -1]}, {**two, "ratings": None}, two])
    assert batch["ratings"].tolist() == [[3.0, 6.5, 0.0], [7.0, 6.0, -1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert batch["ratings"].dtype == torch.float32
    assert collate([{**two, "ratings": None}])["ratings"].tolist() == [[0.0, 0.0]]  # the same keys in every batch
    assert "ratings" not in collate([two, ids])


def test_trl_margin_column_gives_the_loss_of_trl_reward_trainer(tokenizer):
    """From the rows to the loss."""
    margins = [0.5, None, 2.0]
    rows = [
        {"prompt": "the", "chosen": f" {c}", "rejected": " mat", "margin": m}
        for c, m in zip("abc", margins, strict=True)
    ]
    batch = RankedCollator(pad_token_id=0)(list(tokenize_comparisons(prepare_comparisons(rows), tokenizer)))
    scores = torch.tensor([[0.3, -0.2], [1.0, 0.5], [-1.0, 2.0]])
    margin = torch.tensor([0.5, 0.0, 2.0])
    trl = -torch.nn.functional.logsigmoid(scores[:, 0] - scores[:, 1] - margin).mean()
    loss = ranking_loss(scores, batch["ranks"], margins=rating_margins(batch["ratings"], 1.0))
    torch.testing.assert_close(loss, trl, atol=1e-6, rtol=1e-6)
