"""Every public format, from a small sample in it to the rows it must give."""

import json
from collections import Counter

import pytest

from prefopt.rankings.checks import joined_parts, validate_comparisons
from prefopt.rankings.formats import FORMATS, convert, detect, needs_conversion
from prefopt.rankings.formats.pairs import as_messages


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def converted(rows, **options):
    counts = Counter()
    found = list(convert(rows, counts=counts, **options))
    if found:
        validate_comparisons(found)
    return found, dict(counts)


FRUIT = [user("Name a fruit.")]
NECTAR = {
    "prompt": "\n\nHuman: Hi.\n\nAssistant: Hello!\n\nHuman: Name a fruit.\n\nAssistant: ",
    "answers": [
        {"answer": "A pear, why?", "model": "m1", "rank": 2.0},
        {"answer": " Plum. ", "model": "m2", "rank": 1.0},
        {"answer": "Unsure.", "model": "m3", "rank": None},
        {"answer": "A stone.", "model": "m4", "rank": 7.0},
    ],
    "turns": 2,
    "num_responses": 4,
    "source": ["lmsys-chat-1m"],
    "good_natured": True,
}
ULTRAFEEDBACK = {
    "source": "evol_instruct",
    "instruction": "Name a fruit.",
    "models": ["a", "b", "c"],
    "completions": [
        {
            "response": "Plum.",
            "overall_score": 7.0,
            "fine-grained_score": 4.5,
            "annotations": {"honesty": {"Rating": "5", "Rationale": "Right."}},
        },
        {
            "response": "Stone.",
            "overall_score": 8.0,
            "fine-grained_score": 1.25,
            "annotations": {"honesty": {"Rating": "N/A", "Rationale": ""}},
        },
        {
            "response": "Pear.",
            "overall_score": 7.0,
            "fine-grained_score": 4.5,
            "annotations": {"honesty": {"Rating": "3", "Rationale": "Late."}},
        },
    ],
}


def test_nectar():
    rows, counts = converted([NECTAR])
    assert rows == [
        {
            "prompt": [user("Hi."), assistant("Hello!"), user("Name a fruit.")],
            "completions": ["A pear, why?", "Plum.", "A stone."],
            "ranks": [2, 1, 3],
            "source": "lmsys-chat-1m",
        }
    ]
    assert counts == {"completions without a rank": 1}


def test_ultrafeedback_by_each_rating():
    (row,), counts = converted([ULTRAFEEDBACK])
    assert row == {
        "prompt": FRUIT,
        "completions": ["Plum.", "Stone.", "Pear."],
        "ranks": [1, 2, 1],
        "ratings": [4.5, 1.25, 4.5],
        "source": "evol_instruct",
    }
    assert counts == {}
    (row,), _ = converted([ULTRAFEEDBACK], rating="overall_score")
    assert (row["ranks"], row["ratings"]) == ([2, 1, 2], [7.0, 8.0, 7.0])
    (row,), counts = converted([ULTRAFEEDBACK], rating="honesty")
    assert (row["completions"], row["ratings"], counts) == (
        ["Plum.", "Pear."],
        [5, 3],
        {"completions without a rank": 1},
    )


def test_answers_that_are_null_are_empty_ones():
    row = {
        **ULTRAFEEDBACK,
        "completions": [*ULTRAFEEDBACK["completions"], {"response": None, "fine-grained_score": 5}],
    }
    (found,), counts = converted([row])
    assert found["completions"] == ["Plum.", "Stone.", "Pear."]
    assert counts == {"empty completions": 1}


def test_null_in_place_of_an_answer_object_is_an_empty_answer():
    nectar = {**NECTAR, "answers": [None, *NECTAR["answers"]], "source": [None]}
    (found,), counts = converted([nectar])
    assert (found["completions"], found["ranks"]) == (["A pear, why?", "Plum.", "A stone."], [2, 1, 3])
    assert counts == {"empty completions": 1, "completions without a rank": 1}
    feedback = {**ULTRAFEEDBACK, "completions": [None, *ULTRAFEEDBACK["completions"]]}
    (found,), counts = converted([feedback])
    assert found["completions"] == ["Plum.", "Stone.", "Pear."]
    assert counts == {"empty completions": 1}


def test_ultrafeedback_with_scores_that_are_null():
    """Arrow fills in null where other rows have a score."""
    completions = [
        {"response": text, "fine-grained_score": None, "annotations": {"honesty": {"Rating": rating}}}
        for text, rating in (("Plum.", "2"), ("Stone.", "4"))
    ]
    (row,), _ = converted([{"instruction": "Name a fruit.", "completions": completions}])
    assert (row["ratings"], row["ranks"]) == ([2, 4], [2, 1])


def test_ultrafeedback_before_it_had_scores():
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    completions = [
        {"response": text, "annotations": {a: {"Rating": r} for a, r in zip(aspects, ratings, strict=True)}}
        for text, ratings in (("Plum.", "5432"), ("Stone.", ("1", "2", "N/A", "3")))
    ]
    (row,), _ = converted([{"instruction": "Name a fruit.", "completions": completions}])
    assert row["ratings"] == [(5 + 4 + 3 + 2) / 4, (1 + 2 + 3) / 3]


def helpsteer(prompt, response, **ratings):
    even = dict.fromkeys(("helpfulness", "correctness", "coherence", "complexity", "verbosity"), 2)
    return {"prompt": prompt, "response": response, **even, **ratings}


def test_helpsteer_joins_the_rows_of_a_prompt():
    longer = "Hi.\n<extra_id_1>Assistant\nHello!\n<extra_id_1>User\nName a fruit."
    rows = [
        helpsteer("Name a fruit.", "Plum.", helpfulness=4, verbosity=0),
        helpsteer("Name a fruit.", "A stone is no fruit.", helpfulness=1, verbosity=4),
        helpsteer("Name a fruit.", "Pear.", helpfulness=4, verbosity=0),
        helpsteer(longer, "Plum.", helpfulness=3),
        helpsteer(longer, "No.", helpfulness=3),
        helpsteer("One answer only?", "Yes."),
    ]
    found, counts = converted(rows)
    assert found == [
        {
            "prompt": FRUIT,
            "completions": ["Plum.", "A stone is no fruit.", "Pear."],
            "ranks": [1, 2, 1],
            "ratings": [4, 1, 4],
        }
    ]
    assert counts == {
        "rows in which all completions tie": 1,
        "rows with fewer than two completions left": 1,
    }
    (_, tied), _ = converted(rows, keep_tied=True)
    assert tied == {
        "prompt": [user("Hi."), assistant("Hello!"), user("Name a fruit.")],
        "completions": ["Plum.", "No."],
        "ranks": [1, 1],
        "ratings": [3, 3],
    }
    (row,), _ = converted(rows, rating="verbosity")
    assert row["ranks"] == [2, 1, 2]
    # Also where they do not follow each other.
    assert converted([rows[0], rows[3], rows[5], rows[1], rows[4], rows[2]]) == (found, counts)


def test_helpsteer2_preference():
    row = {"prompt": "Name a fruit.", "response_1": "Plum.", "response_2": "No.", "split": "train"}
    found, counts = converted([{**row, "preference_strength": s} for s in (-3, 1, 0, None)])
    assert [(r["ranks"], r["ratings"]) for r in found] == [([1, 2], [3, 0]), ([2, 1], [0, 1])]
    assert found[0]["prompt"] == FRUIT
    assert counts == {
        "rows in which all completions tie": 1,
        "completions without a rank": 2,
        "rows with fewer than two completions left": 1,
    }


def test_helpsteer3():
    context = [user("Hi."), assistant("Hello!"), user("Name a fruit.")]
    row = {"domain": "general", "language": "english", "context": context, "individual_preference": []}
    found, _ = converted([{**row, "response1": "No.", "response2": "Plum.", "overall_preference": 2}])
    assert found == [
        {
            "prompt": context,
            "completions": ["No.", "Plum."],
            "ranks": [2, 1],
            "ratings": [0, 2],
            "source": "general",
            "lang": "english",
        }
    ]


SAID = "\n\nHuman: Hi.\n\nAssistant: Hello!\n\nHuman: Name a fruit.\n\nAssistant:"


def test_hh_rlhf():
    other = SAID.replace("Hello!", "What?")
    rows = [
        {"chosen": f"{SAID} Plum.\n\nOr a pear.", "rejected": f"{SAID} No."},
        {"chosen": f"{SAID} Plum.", "rejected": f"{other} Plum."},
        {"chosen": f"{SAID} Plum.", "rejected": f"{SAID} Plum."},
        {"chosen": f"{SAID} Plum.", "rejected": SAID},
        {"chosen": f"{SAID} Plum.\n\nHuman: Ta.", "rejected": f"{SAID} No.\n\nHuman: Ta."},
    ]
    found, counts = converted(rows)
    assert found == [
        {
            "prompt": [user("Hi."), assistant("Hello!"), user("Name a fruit.")],
            "completions": ["Plum.\n\nOr a pear.", "No."],
            "ranks": [1, 2],
        }
    ]
    assert counts == {
        "pairs that part before the last answer": 1,
        "completions that stand in a row with two ranks": 2,
        "empty completions": 1,
        "rows with fewer than two completions left": 2,
        "dialogues that do not end with an answer": 1,
    }


def oasst(name, parent, text, rank=None, **other):
    role = "prompter" if name.startswith("q") else "assistant"
    message = {"message_id": name, "parent_id": parent, "text": text, "role": role, "rank": rank}
    return {**message, "lang": "en", "deleted": False, "review_result": True, **other}


OASST = [  # a reply before what it answers: the order of a table is not promised
    oasst("a2", "q1", "Pear, a fruit.", 0),
    oasst("q1", None, "Name a fruit."),
    oasst("a1", "q1", "Plum.", 1),
    oasst("a3", "q1", "Buy things!", 2, deleted=True),
    oasst("a4", "q1", "Stone.", 3, review_result=False),
    oasst("a5", "q1", "Apple.", None),
    oasst("q2", "a1", "Another?"),
    oasst("b1", "q2", "No.", 1),
    oasst("b2", "q2", "Pear.", 0),
    oasst("q3", "a3", "Why?"),
    oasst("c1", "q3", "Because.", 0),
    oasst("q4", None, "Alone?"),
    oasst("d1", "q4", "Yes.", None),
]
OASST_ROWS = [
    {
        "prompt": FRUIT,
        "completions": ["Pear, a fruit.", "Plum."],
        "ranks": [1, 2],
        "id": "q1",
        "lang": "en",
    },
    {
        "prompt": [*FRUIT, assistant("Plum."), user("Another?")],
        "completions": ["No.", "Pear."],
        "ranks": [2, 1],
        "id": "q2",
        "lang": "en",
    },
]
OASST_COUNTS = {
    "deleted messages": 1,
    "messages that reviewers rejected or did not review": 1,
    "replies below a message that is missing or dropped": 1,
    "completions without a rank": 1,
    "replies without another to compare with": 1,
}


def test_oasst_table():
    assert converted(OASST) == (OASST_ROWS, OASST_COUNTS)


def test_oasst_trees():
    def nested(name):
        message = next(dict(m) for m in OASST if m["message_id"] == name)
        message["replies"] = [nested(m["message_id"]) for m in OASST if m["parent_id"] == name]
        del message["parent_id"]  # the export leaves it out where there is none; the nesting says it
        return message

    rows = [
        {"message_tree_id": name, "tree_state": "ready_for_export", "prompt": nested(name)} for name in ("q1", "q4")
    ]
    assert converted(rows) == (OASST_ROWS, OASST_COUNTS)


def test_messages_that_answer_each_other_in_a_circle_end():
    rows = [oasst("q1", "a1", "Why?"), oasst("a1", "q1", "So.", 0), oasst("a2", "q1", "No.", 1)]
    assert converted(rows) == ([], {"replies below a message that is missing or dropped": 2})


def shp(a, b, x, y, label, post="p1"):
    row = {"post_id": post, "domain": "askculinary_train", "history": f"Which fruit? {post}", "labels": label}
    return {**row, "human_ref_A": a, "human_ref_B": b, "score_A": x, "score_B": y}


def test_shp_rankings_hold_the_pairs_of_the_data_and_no_others():
    # Written in the order early (9 votes), middle (4), late (12), last (5). Of early > middle, early > last and the like
    # the data says nothing: the better one was seen longer.
    rows = [
        shp("late", "early", 12, 9, 1),
        shp("middle", "late", 4, 12, 0),
        shp("last", "middle", 5, 4, 1),
        shp("late", "early", 12, 9, 1),
        shp("last", "early", 5, 9, 1),
        shp("sweet", "sour", 30, 20, 1, post="p2"),
        shp("bitter", "sour", 3, 20, 0, post="p2"),
        shp("sweet", "bitter", 30, 3, 1, post="p2"),
    ]
    found, counts = converted(rows)
    assert [(r["id"], r["completions"], r["ranks"], r["ratings"]) for r in found] == [
        ("p1", ["late", "early"], [1, 2], [12, 9]),
        ("p1", ["late", "middle"], [1, 2], [12, 4]),
        ("p1", ["last", "middle"], [1, 2], [5, 4]),
        ("p2", ["sweet", "sour", "bitter"], [1, 2, 3], [30, 20, 3]),
    ]
    assert found[0]["prompt"] == [user("Which fruit? p1")]
    assert found[0]["source"] == "askculinary_train"
    assert counts == {
        "pairs that repeat an earlier one of the post": 1,
        "pairs whose label contradicts the scores": 1,
    }


def test_shp_pairs_of_a_post_are_joined_wherever_they_stand():
    rows = [
        shp("late", "early", 12, 9, 1),
        shp("sweet", "sour", 30, 20, 1, post="p2"),
        shp("late", "middle", 12, 4, 1),
        shp("bitter", "sour", 3, 20, 0, post="p2"),
        shp("early", "middle", 9, 4, 1),
        shp("sweet", "bitter", 30, 3, 1, post="p2"),
    ]
    assert [row["completions"] for row in converted(rows)[0]] == [
        ["late", "early", "middle"],
        ["sweet", "sour", "bitter"],
    ]
    in_order = sorted(rows, key=lambda row: row["post_id"])
    assert converted(rows) == converted(in_order)


def test_shp_every_pair_stands_in_one_ranking():
    # Comments with a time and a score each; the data holds the pairs whose better one was not written earlier.
    comments = [(t, (7 * t) % 11 + 2) for t in range(11)]
    pairs = {(f"c{t}", f"c{u}"): (s, v) for t, s in comments for u, v in comments if s > v and t >= u}
    rows = [shp(a, b, x, y, 1) for (a, b), (x, y) in pairs.items()]
    found, _ = converted(rows)
    held = [
        (better, worse)
        for row in found
        for i, better in enumerate(row["completions"])
        for worse in row["completions"][i + 1 :]
    ]
    assert sorted(held) == sorted(pairs)
    assert max(len(row["completions"]) for row in found) > 2


def test_summarize_keeps_each_workers_judgement():
    post = {
        "id": "t3",
        "post": "Long story.",
        "title": "Me",
        "subreddit": "tifu",
        "site": None,
        "article": None,
    }
    news = {"id": "n1", "post": None, "title": "News", "site": "cnn", "article": "It rained."}
    summaries = [
        {"text": " It was short.", "policy": "sup1", "note": None},
        {"text": "Long.", "policy": "ref"},
    ]
    rest = {"summaries": summaries, "batch": "batch3", "split": "train"}
    rows = [
        {"info": post, **rest, "choice": 1, "worker": "w1", "extra": {"confidence": None}},
        {"info": post, **rest, "choice": 0, "worker": "w2", "extra": {"confidence": 7}},
        {"info": news, **rest, "choice": 0, "worker": "w2", "extra": {"confidence": 2}},
    ]
    found, counts = converted(rows)
    story = {
        "prompt": "SUBREDDIT: r/tifu\n\nTITLE: Me\n\nPOST: Long story.\n\nTL;DR:",
        "completions": [" It was short.", " Long."],
    }
    assert found == [
        {**story, "ranks": [2, 1], "labeler": "w1", "id": "t3", "source": "batch3"},
        {**story, "ranks": [1, 2], "labeler": "w2", "confidence": 7, "id": "t3", "source": "batch3"},
        {
            **story,
            "prompt": "Article:\n\nIt rained.\n\nTL;DR:",
            "ranks": [1, 2],
            "labeler": "w2",
            "confidence": 2,
            "id": "n1",
            "source": "batch3",
        },
    ]
    assert counts == {}


def test_webgpt():
    row = {"question": {"dataset": "eli5", "id": "x1", "full_text": "Why is it blue?"}, "quotes_0": {}}
    rows = [
        {**row, "answer_0": "Light [1].", "answer_1": "Paint.", "score_0": 0.5, "score_1": -0.5},
        {**row, "answer_0": "Light.", "answer_1": "Air.", "score_0": 0.0, "score_1": 0.0},
    ]
    found, counts = converted(rows)
    expected = {
        "prompt": [user("Why is it blue?")],
        "completions": ["Light [1].", "Paint."],
        "ranks": [1, 2],
        "ratings": [0.5, -0.5],
        "id": "x1",
        "source": "eli5",
    }
    assert (found, counts) == ([expected], {"rows in which all completions tie": 1})
    (_, tie), _ = converted(rows, keep_tied=True)
    assert tie["ranks"] == [1, 1]


def test_pairs_of_texts():
    rows = [
        {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5", "margin": 2.0, "labeler": 7},
        {"prompt": None, "chosen": "The sky is blue today", "rejected": "The sky is black today"},
        {"prompt": None, "chosen": "Nothing", "rejected": "shared"},
    ]
    found, counts = converted(rows)
    assert found == [
        {
            "prompt": "2 + 2 =",
            "completions": [" 4", " 5"],
            "ranks": [1, 2],
            "ratings": [2.0, 0],
            "labeler": "7",
        },
        {"prompt": "The sky is", "completions": [" blue today", " black today"], "ranks": [1, 2]},
    ]
    assert counts == {"pairs that share no prompt": 1}


def test_pairs_of_messages_hold_the_prompt_that_both_start_with():
    binarized = {
        "prompt": "Name a fruit.",
        "prompt_id": "f00",
        "chosen": [*FRUIT, assistant("Plum.")],
        "rejected": [*FRUIT, assistant("No.")],
        "messages": [*FRUIT, assistant("Plum.")],
        "score_chosen": 8.5,
        "score_rejected": 3.0,
    }
    apart = {"chosen": [*FRUIT, user("Now!"), assistant("Plum.")], "rejected": [*FRUIT, assistant("No.")]}
    nothing = {"chosen": [user("A"), assistant("a")], "rejected": [user("B"), assistant("b")]}
    explicit = {"prompt": FRUIT, "chosen": [assistant("Pear.")], "rejected": [assistant("No.")]}
    found, counts = converted([binarized, apart, nothing, explicit])
    assert found == [
        {
            "prompt": FRUIT,
            "completions": [[assistant("Plum.")], [assistant("No.")]],
            "ranks": [1, 2],
            "ratings": [8.5, 3.0],
        },
        {"prompt": FRUIT, "completions": [[assistant("Pear.")], [assistant("No.")]], "ranks": [1, 2]},
    ]
    assert counts == {"pairs that part before an answer": 1, "pairs that share no prompt": 1}


def test_tables():
    four = ["w", "x", "y", "z"]
    rows = [
        {"prompt": "p1", "completions": four, "ranking": "D > C > A = B", "labeler": "ann", "day": 3},
        {"prompt": "p2", "completions": '["w", "x"]', "ranks": "[2, 1]", "ratings": "[1, 6]"},
        {
            "prompt": "p3",
            "completions": ["w", "", "y"],
            "ratings": [6, 2, 7],
            "flags": [{"a": 1}, {}, {"b": 1}],
        },
        {"prompt": "p4", "completion_A": "w", "completion_b": "x", "ranking": "B > A"},
        {"prompt": "p5", "completions": ["w", "x"], "ranks": [1.0, 4.0], "ratings": [5, None], "labeler": 3},
    ]
    found, counts = converted(rows)
    assert found == [
        {"prompt": "p1", "completions": four, "ranks": [3, 3, 2, 1], "labeler": "ann", "day": 3},
        {"prompt": "p2", "completions": ["w", "x"], "ranks": [2, 1], "ratings": [1, 6]},
        {
            "prompt": "p3",
            "completions": ["w", "y"],
            "ranks": [2, 1],
            "ratings": [6, 7],
            "flags": [{"a": 1}, {"b": 1}],
        },
        {"prompt": "p4", "completions": ["w", "x"], "ranks": [2, 1]},
        {"prompt": "p5", "completions": ["w", "x"], "ranks": [1, 2], "labeler": "3"},
    ]
    assert counts == {"empty completions": 1, "ratings of rows that are not rated throughout": 1}


def test_repeated_answers_and_rows():
    row = {"prompt": "p", "completions": ["w", "x", "w"], "ranks": [1, 2, 1], "labeler": "ann"}
    twice = {**row, "ranks": [1, 2, 3]}
    found, counts = converted([row, row, {**row, "labeler": "bob"}, twice])
    assert [(r["completions"], r["labeler"]) for r in found] == [(["w", "x"], "ann"), (["w", "x"], "bob")]
    assert counts == {
        "repeated completions": 3,
        "rows that repeat an earlier one": 1,
        "completions that stand in a row with two ranks": 2,
        "rows with fewer than two completions left": 1,
    }


def test_answers_that_are_good_or_bad_are_compared_by_prompt():
    said = [
        ("p", " a", True),
        ("q", " c", True),
        ("p", " b", False),
        ("r", " d", False),
        ("r", " e", False),
        ("p", " f", True),
    ]
    rows = [{"prompt": prompt, "completion": text, "label": good} for prompt, text, good in said]
    found, counts = converted([*rows, {**rows[0], "label": None}])
    assert found == [{"prompt": "p", "completions": [" a", " b", " f"], "ranks": [1, 2, 1]}]
    assert counts == {
        "answers without a label": 1,
        "rows with fewer than two completions left": 1,
        "rows in which all completions tie": 1,
    }
    # As CSV has them, and with tools, which are part of what was asked.
    assert converted([{**row, "label": str(row["label"])} for row in rows])[0] == found
    with_tools = [{**rows[0], "tools": [{"name": "x"}]}, {**rows[2], "tools": [{"name": "y"}]}]
    assert converted(with_tools)[1] == {"rows with fewer than two completions left": 2}


def test_a_conversation_that_is_judged_ends_with_an_answer():
    with pytest.raises(ValueError, match="row 0: field 'messages': expected a prompt and an answer"):
        converted([{"messages": FRUIT, "label": True}])


@pytest.mark.parametrize(
    "names",
    [("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating")],
)
def test_scores_of_the_two_answers_are_ratings(names):
    row = {"prompt": "p", "chosen": "a", "rejected": "b", **dict(zip(names, (4.5, "2"), strict=True))}
    assert converted([row])[0][0]["ratings"] == [4.5, 2]


LEFT_OUT = "values of {!r}, which seem to belong to the prompt"


@pytest.mark.parametrize(
    ("rows", "read"),
    [
        ([{"prompt": "p", "chosen": "a", "rejected": "b"}], []),
        ([{"question": "p", "chosen": "a", "rejected": "b"}], ["history"]),
        ([{"chosen": [*FRUIT, assistant("Plum.")], "rejected": [*FRUIT, assistant("No.")]}], []),
        ([{"prompt": "p", "completion": text, "label": text == "a"} for text in "ab"], []),
        ([{"instruction": "p", "output": text, "kto_tag": text == "a"} for text in "ab"], ["history"]),
        ([{"messages": [*FRUIT, assistant(text)], "label": text == "a"} for text in "ab"], []),
    ],
)
def test_what_belongs_to_the_prompt_is_read_or_counted(rows, read):
    """A system message always, the history where another tool's names ask, a context never."""
    more = {"history": [["x", "y"]], "context": "c", "system": "s"}
    (found,), counts = converted([{**row, **more} for row in rows])
    assert found["prompt"][0] == {"role": "system", "content": "s"}
    assert (assistant("y") in found["prompt"]) == ("history" in read)
    assert counts == {LEFT_OUT.format(name): len(rows) for name in ("history", "context") if name not in read}


def test_what_is_asked_twice_is_asked_once():
    row = {"instruction": "p", "input": "p", "chosen": "a", "rejected": "b"}
    assert converted([row]) == ([{"prompt": [user("p")], "completions": ["a", "b"], "ranks": [1, 2]}], {})


def test_a_pair_without_an_answer_costs_one_pair():
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": None, "rejected": "b"}]
    assert converted([*rows, rows[1] | {"chosen": "b", "rejected": None}])[1] == {
        "pairs without one of the answers": 2
    }


def test_a_ranking_that_is_a_list_is_called_so():
    row = {"prompt": "p", "completions": ["a", "b"], "ranking": ["B", "A"]}
    with pytest.raises(
        ValueError, match=r"row 0: field 'ranking': expected a text such as 'B > A = C', got \['B', 'A'\]"
    ):
        converted([row])


def test_messages_as_json_in_a_cell_are_messages():
    chats = [json.dumps([*FRUIT, assistant(text)]) for text in ("Plum.", "No.")]
    row = {"chosen": chats[0], "rejected": chats[1]}
    assert needs_conversion(row) == "pairs"
    expected = {"prompt": FRUIT, "completions": [[assistant("Plum.")], [assistant("No.")]], "ranks": [1, 2]}
    assert converted([row]) == ([expected], {})
    # A text that begins like JSON is a text.
    texts = {"prompt": "p", "chosen": '["a"]', "rejected": "[b"}
    assert needs_conversion(texts) is None
    assert converted([texts])[0][0]["completions"] == ['["a"]', "[b"]


def test_calls_of_functions_in_sharegpt_are_the_assistants():
    call = {"name": "find", "arguments": {"a": 1}}
    turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(call)}]
    turns += [{"from": "observation", "value": "4"}, {"from": "function_call", "value": "find it"}]
    calls = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    assert as_messages(turns) == [user("q"), calls, {"role": "tool", "content": "4"}, assistant("find it")]
    several = [{"from": "function_call", "value": json.dumps([call, call])}]
    assert as_messages(several)[0]["tool_calls"] == calls["tool_calls"] * 2


@pytest.mark.parametrize("row", [{"messages": FRUIT}, {"conversations": [{"from": "human", "value": "q"}]}])
def test_rows_without_a_preference_are_called_so(row):
    with pytest.raises(ValueError, match=r"have one answer each and no preference.*`prefopt sft` learns from them"):
        converted([row])


def test_parts_of_content_under_another_name():
    parts = [{"type": "text", "text": "Name ", "value": None}, {"type": "text", "value": "a fruit."}]
    assert joined_parts(parts) == "Name a fruit."
    with pytest.raises(ValueError, match="expected parts of text"):
        joined_parts([{"type": "image", "value": "a.png"}])


ARENA = {
    "conversation_a": [*FRUIT, assistant("Plum.")],
    "conversation_b": [*FRUIT, assistant("No.")],
    "winner": "model_a",
}
ARENA_ANSWERS = {"prompt": '["Name a fruit."]', "response_a": '["Plum."]', "response_b": '["No."]'}


def test_votes_of_the_arena():
    second = [user("Another."), assistant("Pear.")]
    rows = [
        {**ARENA, "judge": "arena_user_3", "question_id": "q", "language": "English", "turn": 1, "tstamp": 1.5},
        {**ARENA, "winner": "model_b"},
        {**ARENA, "winner": "tie"},
        {**ARENA, "winner": "tie (bothbad)"},
        # The second turn of both asks the same after other answers: it is part of what is compared.
        {**ARENA, "conversation_a": [*ARENA["conversation_a"], *second], "turn": 2},
        # MT-bench judges the first of two turns: what follows it was not judged.
        {**ARENA, "conversation_b": [*FRUIT, assistant("Never."), *second], "turn": 1},
        # As in the 140k: texts are parts, and other fields stand beside them.
        {
            **ARENA,
            "conversation_b": [
                {**FRUIT[0], "num_tokens": 4},
                {"role": "assistant", "content": [{"type": "text", "text": "N", "image": None}, {"type": "text", "text": "o!"}]},
            ],
        },
        {**ARENA, "conversation_a": [*FRUIT, assistant([{"type": "image", "image": "a.png"}])]},
        {**ARENA, "conversation_a": [user("Name a tree."), assistant("Oak.")]},
    ]  # fmt: skip
    plum, no = [assistant("Plum.")], [assistant("No.")]
    found, counts = converted(rows)
    assert found == [
        {"prompt": FRUIT, "completions": [plum, no], "ranks": [1, 2], "labeler": "arena_user_3", "id": "q", "lang": "English"},
        {"prompt": FRUIT, "completions": [plum, no], "ranks": [2, 1]},
        {"prompt": FRUIT, "completions": [[*plum, *second], no], "ranks": [1, 2]},
        {"prompt": FRUIT, "completions": [plum, [assistant("Never.")]], "ranks": [1, 2]},
        {"prompt": FRUIT, "completions": [plum, [assistant("No!")]], "ranks": [1, 2]},
    ]  # fmt: skip
    assert counts == {
        "rows in which all completions tie": 2,
        "pairs with a turn that is no text": 1,
        "pairs that share no prompt": 1,
    }
    assert [row["ranks"] for row in converted(rows[:4], keep_tied=True)[0]] == [[1, 2], [2, 1], [1, 1]]


def test_answers_of_the_arena_by_turn():
    won = {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}
    two = {name: json.dumps([*json.loads(value), f"{name}?"]) for name, value in ARENA_ANSWERS.items()}
    rows = [
        {"id": 7, **ARENA_ANSWERS, **won},
        # A cell of a CSV file.
        {**ARENA_ANSWERS, "winner_model_a": "1", "winner_model_b": "0"},
        {**ARENA_ANSWERS, "winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1},
        {**two, **won},
        {**ARENA_ANSWERS, "response_a": "[null]", **won},
        {"prompt": "[1, 2] Which?", "response_a": "1", "response_b": "2", "winner": "B", "judge": 3},
    ]
    plum, no = [assistant("Plum.")], [assistant("No.")]
    found, counts = converted(rows)
    assert found == [
        {"prompt": FRUIT, "completions": [plum, no], "ranks": [2, 1], "id": 7},
        {"prompt": FRUIT, "completions": [plum, no], "ranks": [1, 2]},
        {
            "prompt": FRUIT,
            "completions": [
                [*said, user("prompt?"), assistant(f"response_{side}?")] for said, side in ((plum, "a"), (no, "b"))
            ],
            "ranks": [2, 1],
        },
        {
            "prompt": [user("[1, 2] Which?")],
            "completions": [[assistant("1")], [assistant("2")]],
            "ranks": [2, 1],
            "labeler": "3",
        },
    ]
    assert counts == {
        "rows in which all completions tie": 1,
        "pairs with a turn that has no question or no answer": 1,
    }


@pytest.mark.parametrize("completions", ["completions", "responses", "generations", "candidates", "answers"])
@pytest.mark.parametrize("ratings", ["ratings", "scores", "rewards"])
@pytest.mark.parametrize("asked", ["prompt", "instruction"])
def test_lists_of_scored_answers_under_the_names_of_other_tools(asked, completions, ratings):
    row = {asked: "p", completions: ["a", "b", "c"], ratings: [0.5, 2, 2], "models": ["x", "y", "z"]}
    prompt = "p" if asked == "prompt" else [user("p")]
    expected = {"prompt": prompt, "completions": ["a", "b", "c"], "ranks": [2, 1, 1], "ratings": [0.5, 2, 2]}
    assert needs_conversion(row) in ("table", "table-instruction")
    assert converted([row])[0] == [{**expected, "models": ["x", "y", "z"]}]
    # As cells of a CSV file.
    cells = {asked: "p", completions: '["a", "b", "c"]', ratings: "[0.5, 2, 2]"}
    assert converted([cells])[0] == [expected]


@pytest.mark.parametrize("text", ["text", "response", "completion", "generation", "answer", "content", "output"])
@pytest.mark.parametrize("rated", ["rating", "score", "reward", "overall_score"])
def test_answers_that_are_objects_with_a_score_each(text, rated):
    answers = [{text: "a", rated: 1.5, "model": "x"}, {text: "b", rated: None}, {text: "c", rated: "4"}, None]
    found, counts = converted([{"prompt": "p", "responses": answers}])
    assert found == [{"prompt": "p", "completions": ["a", "c"], "ranks": [2, 1], "ratings": [1.5, 4]}]
    assert counts == {"completions without a rank": 1, "empty completions": 1}


def test_answers_that_are_objects_with_a_rank_each():
    row = {
        "instruction": "p",
        "input": "q",
        "system": "s",
        "completions": [{"text": "a", "rank": 2}, {"text": "b", "rank": 1}],
    }
    prompt = [{"role": "system", "content": "s"}, user("p\nq")]
    assert converted([row])[0] == [{"prompt": prompt, "completions": ["a", "b"], "ranks": [2, 1]}]


def test_all_samples_of_best_of_n_are_ranked_by_their_scores():
    kept = {"completion": " a", "truncated": True, "ids": [4], "score": 2.5, "mean_score": 1.0}
    row = {"prompt": "p", "source": "s", **kept, "completions": [" b", " a", ""], "scores": [0.5, 2.5, 0.0]}
    expected = {"prompt": "p", "completions": [" b", " a"], "ranks": [2, 1], "ratings": [0.5, 2.5], "source": "s"}
    assert converted([row]) == ([expected], {"empty completions": 1})
    # Which are cut is told of each; a file of before does not say it.
    cut = {**row, "completions_truncated": [True, False, True]}
    assert converted([cut])[0] == [{**expected, "truncated": [True, False]}]
    # Within the margin they tie; ranks have none.
    assert [one["ranks"] for one in converted([row], keep_tied=True, tie_margin=2.0)[0]] == [[1, 1]]
    assert converted([row], tie_margin=1.9)[0][0]["ranks"] == [2, 1]
    assert converted([{**row, "ranks": [3, 1, 2]}], tie_margin=9.0)[0][0]["ranks"] == [2, 1]


def test_names_of_other_tools_give_way_to_our_own():
    """Scores beside ranks are no ratings, which would become margins; a text called `answers` is no list."""
    row = {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2], "scores": [3, 4], "answers": "two"}
    assert needs_conversion(row) is None
    assert converted([row])[0] == [row]


SAMPLES = {
    "arena": ARENA,
    "arena-answers": {**ARENA_ANSWERS, "winner_model_a": 1, "winner_model_b": 0},
    "table-instruction": {"instruction": "p", "generations": ["a", "b"], "ratings": [1, 2]},
    "pairs-messages": {
        "chosen_messages": [*FRUIT, assistant("Plum.")],
        "rejected_messages": [*FRUIT, assistant("No.")],
    },
    "pairs-responses": {"instruction": "p", "chosen_response": "a", "rejected_response": "b"},
    "comparison": {"instruction": "p", "input": "", "output": ["a", "b"]},
    "unpaired": {"prompt": "p", "completion": "a", "label": True},
    "unpaired-alpaca": {"instruction": "p", "input": "", "output": "a", "kto_tag": False},
    "nectar": NECTAR,
    "hh-rlhf": {"chosen": f"{SAID} Plum.", "rejected": f"{SAID} No."},
    "ultrafeedback": ULTRAFEEDBACK,
    "helpsteer": helpsteer("Name a fruit.", "Plum."),
    "helpsteer2-preference": {"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": 1},
    "helpsteer3": {"context": FRUIT, "response1": "a", "response2": "b", "overall_preference": 1},
    "oasst": OASST[0],
    "oasst-trees": {"message_tree_id": "q1", "prompt": {"message_id": "q1"}},
    "shp": shp("a", "b", 2, 3, 0),
    "summarize": {"info": {}, "summaries": [], "choice": 0, "worker": "w"},
    "webgpt": {"question": {}, "answer_0": "a", "answer_1": "b", "score_0": 0, "score_1": 0},
    "pairs": {"prompt": "p", "chosen": "a", "rejected": "b"},
    "table": {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]},
}


@pytest.mark.parametrize("name", FORMATS)
def test_detected_by_its_columns(name):
    assert detect(SAMPLES[name]) == name


def test_streams_stay_streams():
    """The first comparison comes before the stream ends."""

    def endless():
        number = 0
        while True:
            number += 1
            yield {"prompt": f"p{number}", "chosen": "a", "rejected": "b"}

    rows = convert(endless(), counts=Counter())
    assert [next(rows)["prompt"] for _ in range(3)] == ["p1", "p2", "p3"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"question": "?", "reply": "!"}], {}, "rows: no known format has the columns question, reply; "),
        ([], {}, "rows: expected at least one row, got none"),
        ([SAMPLES["pairs"]], {"format": "pears"}, "format: expected one of nectar, .*, got 'pears'"),
        (
            [SAMPLES["pairs"]],
            {"format": "shp"},
            "rows row 0: field 'history': expected the columns .* of format shp",
        ),
        (
            [SAMPLES["pairs"]],
            {"rating": "fun"},
            "rating: expected none, as it has only one for format pairs, got 'fun'",
        ),
        ([ULTRAFEEDBACK], {"rating": "fun"}, "rating: expected one of fine-grained_score, .* got 'fun'"),
        (
            [SAMPLES["pairs"], {"prompt": "p", "chosen": "a", "rejected": 7}],
            {"source": "my.jsonl"},
            "my.jsonl row 1: field 'chosen': expected two texts or two lists of messages, got 'a' and 7",
        ),
        (
            [{**NECTAR, "answers": ["Plum."]}],
            {},
            r"row 0: field 'answers\[0\]': expected an object, got 'Plum.'",
        ),
        (
            [{"question": "Which way?", "chosen": "Which way? Left.", "rejected": "Which way? Right."}],
            {},
            "row 0: field 'prompt': expected a text or messages, got nothing, but a field 'question'; rename that",
        ),
        (
            [{"chosen": [*FRUIT, None], "rejected": [*FRUIT, assistant("No.")]}],
            {},
            "row 0: field 'chosen': expected two texts or two lists of messages",
        ),
        (
            [{"context": [*FRUIT, None], "response1": "a", "response2": "b", "overall_preference": 1}],
            {},
            "row 0: field 'prompt': expected chat messages with 'role' and 'content', got None",
        ),
        (
            [{**NECTAR, "answers": [{"model": "m"}]}],
            {},
            "row 0: field 'answers.answer': expected a text, got nothing",
        ),
        (
            [helpsteer("p", "r", helpfulness="good")],
            {},
            "row 0: field 'helpfulness': expected a number, got 'good'",
        ),
        (
            [{**SAMPLES["summarize"], "choice": 2}],
            {},
            "row 0: field 'choice': expected 0 or 1 of two summaries, got 2",
        ),
        (
            [{**SAMPLES["table"], "ranks": [1]}],
            {},
            "row 0: field 'ranks': expected one for each of the 2 completions",
        ),
        (
            [{"prompt": "p", "completions": "a, b", "ranking": "A > B"}],
            {},
            "row 0: field 'completions': expected a list, in CSV as JSON",
        ),
        (
            [{"prompt": "p", "A": "a", "ranking": "A > B"}],
            {},
            "row 0: field 'ranking': expected names of columns, got 'B'",
        ),
        (
            [{**ARENA, "winner": "the first"}],
            {},
            "row 0: field 'winner': expected model_a, model_b or one of tie, .*, got 'the first'",
        ),
        (
            [{**SAMPLES["arena-answers"], "winner_model_b": None}],
            {},
            "row 0: field 'winner': expected model_a, model_b or a tie, got nothing",
        ),
        (
            [{**OASST[0], "role": "system"}],
            {},
            "row 0: field 'role': expected prompter or assistant, got 'system'",
        ),
    ],
)
def test_errors_name_the_row_and_the_field(rows, options, message):
    with pytest.raises(ValueError, match=message):
        list(convert(rows, counts=Counter(), **options))
