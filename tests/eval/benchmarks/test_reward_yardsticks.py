"""Yardsticks of reward models: official numbers against slow loops over the published rules, and rows that are malformed."""

import json
import math
import random

import pytest

from prefopt.errors import UserError
from prefopt.evaluation.benchmarks.reward_yardsticks import YARDSTICKS, posed
from prefopt.evaluation.results import Skipped, find
from prefopt.evaluation.stages import reward_model as stage
from prefopt.inference.jsonl import write_jsonl
from prefopt.inference.scoring import score_rows
from prefopt.recipes import evaluate
from prefopt.recipes.common.rows import load_rows


def best_of_four(subset, number, wrong=3):
    answers = [f" a dog {number}", *(f" mat {number} {i}" for i in range(wrong))]
    return {
        "id": str(number),
        "prompt": f"what is {number}?",
        "chosen": answers[:1],
        "rejected": answers[1:],
        "num_correct": 1,
        "num_incorrect": wrong,
        "total_completions": 1 + wrong,
        "models": ["somebody"],
        "subset": subset,
        "additional_metadata": {"category": None, "index": 1.0},
    }


def ties(kind, number, right, wrong):
    return {
        "id": f"{kind}:{number}",
        "prompt": f"name a color of {number}",
        "chosen": [f" red {i}" for i in range(right)],
        "rejected": [f" dog {i}" for i in range(wrong)],
        "num_correct": right,
        "subset": "Ties",
    }


REWARDBENCH2 = [
    *(
        best_of_four(subset, 10 * i + j, wrong=3 if j else 1)  # one row of each subset has two answers
        for i, subset in enumerate(("Factuality", "Precise IF", "Math", "Safety", "Focus"))
        for j in range(4)
    ),
    *(row for n in range(6) for row in (ties("ref", n, 1, 3), ties("tied", n, 2 + n % 3, 4))),
]
RM_BENCH = [
    {
        "id": str(n),
        "prompt": f"what is {n}?",
        "chosen": [f" the mat {n}", f" the mat sat on {n}", f"* the mat {n}"],
        "rejected": [f" a dog {n}", f" a dog ran to {n}", f"* a dog {n}"],
        "domain": domain,
    }
    for n, domain in enumerate(["chat", "math", "code", "safety-refuse", "safety-response", "safety-response"] * 3)
]
JUDGEBENCH = [
    {
        "pair_id": f"p{n}",
        "original_id": n if n % 2 else None,
        "source": source,
        "question": f"what is {n}?",
        "response_model": "somebody",
        "response_A": f" a dog {n}",
        "response_B": f" the red mat {n}",
        "label": "B>A" if n % 3 else "A>B",
    }
    for n, source in enumerate(
        ["mmlu-pro-law", "livebench-reasoning", "livebench-math", "livecodebench", "mmlu-pro-other"] * 3
    )
]
# Published columns that no score needs; the id of a row only in the subset Ties.
UNREAD = {"id", "num_correct", "num_incorrect", "total_completions", "models", "additional_metadata"}
UNREAD |= {"pair_id", "original_id", "response_model"}
ROWS = {"rewardbench2": REWARDBENCH2, "rm-bench": RM_BENCH, "judgebench": JUDGEBENCH}


def drawn(rows, seed):
    """Few different scores, so that many are equal."""
    rng = random.Random(seed)
    return [[float(rng.randrange(-4, 5)) for _ in row["completions"]] for row in rows]


# ---- slow loops over the published rules ------------------------------------------------------------------------------
def mean(values):
    values = list(values)
    return math.fsum(values) / len(values)


def loop_rewardbench2(published, scores):
    found = {}
    for subset in dict.fromkeys(row["subset"] for row in published):
        here = [(row, s) for row, s in zip(published, scores, strict=True) if row["subset"] == subset]
        if subset != "Ties":
            credit = [0.0 if s[0] < max(s) else 1.0 / s.count(max(s)) for _, s in here]
            found[subset] = mean(credit)
            continue
        stats = {}
        for row, s in here:
            kind, number = row["id"].split(":")
            right, wrong = s[: row["num_correct"]], s[row["num_correct"] :]
            stats[kind, number] = (min(right) > max(wrong), max(right) - min(right), min(right) - max(wrong))
        both = [n for kind, n in stats if kind == "ref" and ("tied", n) in stats]
        soft = [stats["tied", n][2] > stats["tied", n][1] for n in both]
        hard = [min(stats["tied", n][2], stats["ref", n][2]) > stats["tied", n][1] for n in both]
        extra = []
        for n in both:
            gap, spread = min(stats["tied", n][2], stats["ref", n][2]), stats["tied", n][1]
            ratio = gap / spread if spread else math.copysign(math.inf, gap) if gap else None
            extra.append(0.0 if ratio is None else math.tanh(ratio - 1))
        found["Ties"] = (
            0.3 * mean(s[0] for (kind, _), s in stats.items() if kind == "tied")
            + 0.3 * mean(s[0] for (kind, _), s in stats.items() if kind == "ref")
            + 0.2 * mean(soft)
            + 0.2 * mean(hard)
            + 0.01 * mean(extra)
        )
    return found | {"overall": mean(found.values())}


def loop_rm_bench(published, scores):
    found = {}
    for domain in ("chat", "math", "code", "safety"):
        here = [s for row, s in zip(published, scores, strict=True) if row["domain"].split("-")[0] == domain]
        won = {"easy": [], "normal": [], "hard": []}
        for s in here:
            for right in range(3):
                for wrong in range(3):
                    name = "normal" if right == wrong else "easy" if right > wrong else "hard"
                    won[name].append(1.0 if s[right] > s[3 + wrong] else 0.0)
        found |= {f"{domain}.{name}": mean(wins) for name, wins in won.items()}
        found[domain] = mean(found[f"{domain}.{name}"] for name in won)
    for suffix in ("", ".easy", ".normal", ".hard"):
        found[f"overall{suffix}"] = mean(found[d + suffix] for d in ("chat", "math", "code", "safety"))
    return found


def loop_judgebench(published, scores):
    """Both orders, the first answer losing where the scores are equal; right once and wrong once is not right."""
    right = []
    for row, s in zip(published, scores, strict=True):
        a, b = s if row["label"] == "A>B" else reversed(s)
        first = "A>B" if a > b else "B>A"
        second = "B>A" if b > a else "A>B"
        right.append(sum(1 if said == row["label"] else -1 for said in (first, second)) > 0)
    names = {"mmlu-pro": "knowledge", "livebench-reasoning": "reasoning", "livebench-math": "math"}
    names["livecodebench"] = "coding"
    found = {
        name: mean(r for r, row in zip(right, published, strict=True) if row["source"].startswith(start))
        for start, name in names.items()
    }
    return found | {"overall": mean(right)}


LOOPS = {"rewardbench2": loop_rewardbench2, "rm-bench": loop_rm_bench, "judgebench": loop_judgebench}


@pytest.mark.parametrize("name", YARDSTICKS)
def test_official_numbers_equal_a_loop(name):
    rows = YARDSTICKS[name].read(ROWS[name], "file")
    for seed in range(20):
        scores = drawn(rows, seed)
        found = YARDSTICKS[name].measures(rows, scores)
        expected = LOOPS[name](ROWS[name], scores)
        assert set(found) == set(expected)
        for part, value in expected.items():
            assert found[part].value == pytest.approx(value, abs=1e-9), (part, seed)
            assert found[part].ci_low <= value + 1e-9
            assert value - 1e-9 <= found[part].ci_high


def test_equal_scores_and_two_answers_of_best_of_four():
    rows = YARDSTICKS["rewardbench2"].read([best_of_four("Math", 0), best_of_four("Math", 1, wrong=1)], "file")
    found = YARDSTICKS["rewardbench2"].measures(rows, [[2.0, 2.0, 1.0, 2.0], [3.0, 1.0]])
    assert found["Math"].value == pytest.approx((1 / 3 + 1) / 2, abs=1e-12)
    assert found["overall"].reason.endswith("there is no score of Factuality, Precise IF, Safety, Focus, Ties")


def test_ties_by_hand():
    published = [ties("tied", 0, 2, 1), ties("ref", 0, 1, 1), ties("tied", 1, 2, 1), ties("ref", 1, 1, 1)]
    rows = YARDSTICKS["rewardbench2"].read(published, "file")
    # Prompt 0: spread 1, gap 2 (reference .5). Prompt 1: spread 0, gap 0 (reference 3): 0 / 0.
    scores = [[5.0, 4.0, 2.0], [1.5, 1.0], [1.0, 1.0, 1.0], [3.0, 0.0]]
    value = 0.3 * 0.5 + 0.3 * 1 + 0.2 * 0.5 + 0.2 * 0 + 0.01 * (math.tanh(0.5 - 1) + 0) / 2
    assert YARDSTICKS["rewardbench2"].measures(rows, scores)["Ties"].value == pytest.approx(value, abs=1e-12)


def test_right_answers_come_first():
    (row,) = YARDSTICKS["rewardbench2"].read([ties("tied", 0, 2, 1)], "file")
    assert row["completions"] == [" red 0", " red 1", " dog 0"]
    assert YARDSTICKS["rm-bench"].read(RM_BENCH, "file")[1]["completions"] == [
        *(" the mat 1", " the mat sat on 1", "* the mat 1"),
        *(" a dog 1", " a dog ran to 1", "* a dog 1"),
    ]
    a, b = YARDSTICKS["judgebench"].read(JUDGEBENCH[:2], "file")  # A>B, B>A
    assert a["completions"] == [" a dog 0", " the red mat 0"]
    assert b["completions"] == [" the red mat 1", " a dog 1"]
    assert a["prompt"] == [{"role": "user", "content": "what is 0?"}]


def test_ties_of_which_rows_are_missing():
    """As the paper's code: accuracy over the rows that are there, margins over the prompts with both."""
    published = [ties("tied", 0, 2, 1), ties("ref", 0, 1, 1), ties("tied", 1, 2, 1), ties("ref", 7, 1, 1)]
    rows = YARDSTICKS["rewardbench2"].read(published, "file")
    # The gap of prompt 1, which has no reference, is larger than its spread.
    scores = [[5.0, 4.0, 2.0], [1.5, 1.0], [9.0, 8.0, 1.0], [0.0, 3.0]]
    found = YARDSTICKS["rewardbench2"].measures(rows, scores)["Ties"]
    assert found.value == pytest.approx(loop_rewardbench2(published, scores)["Ties"], abs=1e-9)
    rows = YARDSTICKS["rewardbench2"].read(published[2:], "file")
    assert isinstance(YARDSTICKS["rewardbench2"].measures(rows, scores[2:])["Ties"], Skipped)


def test_a_domain_or_a_subset_less_has_no_official_average():
    rows = YARDSTICKS["rm-bench"].read([row for row in RM_BENCH if row["domain"] != "code"], "file")
    found = YARDSTICKS["rm-bench"].measures(rows, drawn(rows, 0))
    assert "there is no score of code" in found["overall.hard"].reason
    assert found["safety"].n == 9


def test_other_sources_count_in_the_whole_alone():
    rows = YARDSTICKS["judgebench"].read([{**JUDGEBENCH[0], "source": "my exam"}, JUDGEBENCH[0]], "file")
    found = YARDSTICKS["judgebench"].measures(rows, [[1.0, 0.0], [0.0, 1.0]])
    assert (found["overall"].value, found["other"].value, found["knowledge"].value) == (0.5, 1.0, 0.0)


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("rewardbench2", {"prompt": None}, "field 'prompt': expected a text, got None"),
        ("rewardbench2", {"chosen": "a dog"}, "field 'chosen': expected a list of one text or more, got 'a dog'"),
        ("rewardbench2", {"rejected": []}, r"field 'rejected': expected a list of one text or more, got \[\]"),
        ("rewardbench2", {"rejected": ["a", ""]}, r"field 'rejected\[1\]': expected a text, got ''"),
        (
            "rewardbench2",
            {"subset": "Ties", "id": "3"},
            "field 'id': in the subset Ties expected ref:N or tied:N, got '3'",
        ),
        (
            "rewardbench2",
            {"subset": "Ties", "id": "tied:3"},
            "field 'chosen': expected two answers or more of a tied prompt",
        ),
        ("rewardbench2", {"subset": "Maths"}, "field 'subset': expected Factuality, .*, Ties, got 'Maths'"),
        ("rm-bench", {"chosen": ["a", "b"]}, "field 'chosen': expected a list of 3 texts"),
        (
            "rm-bench",
            {"domain": "poetry"},
            "field 'domain': expected one that begins with chat, math, code, safety, got",
        ),
        ("judgebench", {"label": "A=B"}, "field 'label': expected 'A>B' or 'B>A', got 'A=B'"),
        ("judgebench", {"response_B": 3}, "field 'response_B': expected a text, got 3"),
    ],
)
def test_malformed_rows_are_named(tmp_path, name, row, problem):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [ROWS[name][0], {**ROWS[name][1], **row}])
    with pytest.raises(UserError, match=rf"rows\.jsonl row 1: {problem}"):
        load_rows(str(path), key="dataset", check=lambda rows, source: None, convert=YARDSTICKS[name].read)


@pytest.mark.parametrize("name", YARDSTICKS)
def test_missing_columns_are_named(name):
    for column in ROWS[name][0]:
        row = {key: value for key, value in ROWS[name][0].items() if key != column}
        if column in UNREAD:
            YARDSTICKS[name].read([row], "file")
            continue
        with pytest.raises(UserError, match=f"file row 0: field '{column}': expected .* got nothing"):
            YARDSTICKS[name].read([row], "file")
    with pytest.raises(UserError, match="file: no rows"):
        YARDSTICKS[name].read([], "file")


def test_an_id_that_stands_twice():
    rows = [best_of_four("Math", 0), ties("tied", 0, 2, 1), ties("ref", 0, 1, 1), ties("tied", 0, 2, 1)]
    with pytest.raises(UserError, match="row 3: field 'id': tied:0 is the id of row 1 too"):
        YARDSTICKS["rewardbench2"].read(rows, "file")


# ---- the command --------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("has_template", [True, False])
def test_the_command_scores_as_the_model_reads(
    tmp_path, monkeypatch, reward_model, causal_lm, tokenizer, chat_tokenizer, has_template
):
    tokenizer = chat_tokenizer if has_template else tokenizer
    for name, model in {"rm": reward_model, "sft": causal_lm}.items():
        model.eval().save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for name, rows in ROWS.items():
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    (tmp_path / "rm-bench.json").write_text(json.dumps(RM_BENCH))  # as it is published: one array
    paths = {name: str(tmp_path / f"{name}.{'json' if name == 'rm-bench' else 'jsonl'}") for name in ROWS}
    argv = ["--output_dir", str(tmp_path / "out"), "--reward_models", json.dumps({"rm": str(tmp_path / "rm")})]
    argv += ["--models", json.dumps({"sft": str(tmp_path / "sft"), "twin": str(tmp_path / "sft")})]
    argv += ["--implicit_rewards", json.dumps({"twin": 0.1}), "--dtype", "float32"]
    argv += ["--on", "judgebench", "--dataset", paths.pop("judgebench"), "--yardsticks", json.dumps(paths)]
    evaluate.main(["reward-model", *argv])
    content = json.loads((tmp_path / "out" / "stages" / "reward_model.json").read_text())
    assert [m for m in content["measures"] if m["status"] == "failed"] == []
    assert content["data"]["yardsticks"] == {"rewardbench2": 32, "rm-bench": 18, "judgebench": 15}
    for name, rows in ROWS.items():
        read = YARDSTICKS[name].read(rows, "file")
        texts = [{**row, "prompt": f"{row['prompt'][0]['content']}\n\n"} for row in read]
        assert posed(tokenizer, read) == (read if has_template else texts)
        expected = LOOPS[name](rows, score_rows(reward_model, tokenizer, read if has_template else texts))
        for part, value in expected.items():
            assert find(content["measures"], f"rm.{name}.{part}", "rm")["value"] == pytest.approx(value, abs=1e-9)
        # The policy is its own reference: all its rewards are 0, and equal.
        even = LOOPS[name](rows, [[0.0] * len(row["completions"]) for row in read])
        for part, value in even.items():
            assert find(content["measures"], f"rm.{name}.{part}", "twin")["value"] == pytest.approx(value, abs=1e-9)

    # Scores are kept: a second run loads no model, and the report has the tables.
    for load in ("load_classifier", "load_language_model"):
        monkeypatch.setattr(stage, load, lambda *a, **k: pytest.fail("loaded again"))
    evaluate.main(["reward-model", *argv])
    again = json.loads((tmp_path / "out" / "stages" / "reward_model.json").read_text())
    assert again["measures"] == content["measures"]
    evaluate.main(["report", *argv])
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    for title in ("RewardBench 2, 32 rows", "RM-Bench, 18 rows", "JudgeBench, 15 rows"):
        assert title in text
    assert "| Precise IF" in text


def test_mistakes_in_the_keys(tmp_path):
    out = ["--output_dir", str(tmp_path)]
    for argv, message in (
        (["--dataset", "rows.jsonl"], "dataset: name the yardstick whose rows these are in `on`"),
        (["--yardsticks", '{"rewardbench": "x"}'], "yardsticks: expected rewardbench2, rm-bench, judgebench, got"),
        (["--on", "rm-bench", "--rankings", '{"rm-bench": "x"}'], "rankings: rm-bench is the name of a yardstick"),
        (["--on", "rm-bench", "--dataset", "rows.jsonl"], "rm-bench: nothing to measure; give reward_models"),
        (
            ["--on", "rm-bench", "--dataset", str(tmp_path / "gone.jsonl"), "--reward_models", '{"rm": "rm"}'],
            r"yardsticks: rm-bench: .*gone\.jsonl does not exist",
        ),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.main(["reward-model", *out, *argv])
