"""Samples become rankings by reward models, a judge of all K at once, or a function; a killed run ends in the same bytes."""

import json
import math
import re

import pytest
import torch

from prefopt import cli
from prefopt.errors import UserError
from prefopt.evaluation.judges.ordering import OrderingJudge, earlier_wins, order_scores, same_verdicts, shown_orders
from prefopt.inference.engines import Transformers
from prefopt.inference.generate import Completion
from prefopt.inference.jsonl import read_json, read_jsonl, write_jsonl
from prefopt.inference.scoring import score_rows
from prefopt.models.checkpoints import load_classifier, save_reward_model
from prefopt.models.loading import load_language_model
from prefopt.recipes import rank
from tests.model_server import serving, vllm

SAMPLES = [
    {
        "prompt": prompt,
        "use_case": "pets",
        "completions": [" sat", " ran to the red house", " mat", f" is {i}"][: 3 + i % 2],
        "truncated": [False, True, False, False][: 3 + i % 2],
    }
    for i, prompt in enumerate(["the cat", "a dog", "the red house", "what is this?", "the mat"])
]


@pytest.fixture
def files(files, reward_model, tokenizer):
    write_jsonl("samples.jsonl", SAMPLES)
    torch.manual_seed(7)
    torch.nn.init.normal_(reward_model.score.weight)
    save_reward_model(reward_model, "rm1")
    tokenizer.save_pretrained("rm1")
    return files


def run(*extra, output="out.jsonl"):
    rank.main(["samples.jsonl", "--output", output, *map(str, extra)])
    return read_jsonl(output)


def measures(output="out"):
    return {m["name"]: m["value"] for m in read_json(f"{output}.report.json")["measures"]}


def dense(scores):
    return [sorted(set(scores), reverse=True).index(score) + 1 for score in scores]


# ---- reward models --------------------------------------------------------------------------------------------------
def test_the_ranks_are_the_order_of_the_scores(files, capsys):
    rows = run("--reward_model", "rm")
    expected = score_rows(*load_classifier("rm"), SAMPLES)
    for row, sample, scores in zip(rows, SAMPLES, expected, strict=True):
        assert row["ratings"] == pytest.approx(scores, abs=1e-5)
        assert row["scores"] == [row["ratings"]]
        assert row["ranks"] == dense(scores)
        assert {name: row[name] for name in sample} == sample
        assert row["labeler"] == "rm"
        assert "disagreement" not in row
    assert cli.main(["data", "validate", "out.jsonl"]) == 0
    assert "5 rows of comparisons, all as they should be" in capsys.readouterr().out
    pairs = [(r, i, j) for r in rows for i in range(len(r["ranks"])) for j in range(i)]
    longer = [
        (r["ranks"][i] < r["ranks"][j]) == (len(r["completions"][i]) > len(r["completions"][j]))
        if len(r["completions"][i]) != len(r["completions"][j])
        else 0.5
        for r, i, j in pairs
    ]
    assert measures()["longer_wins"] == pytest.approx(sum(longer) / len(longer), abs=1e-12)


@pytest.mark.parametrize(("combine", "of"), [("mean", lambda a, b: (a + b) / 2), ("minimum", min)])
def test_several_are_combined_and_their_disagreement_is_kept(files, combine, of):
    rows = run("--reward_model", "rm", "rm1", "--combine", combine)
    both = [score_rows(*load_classifier(name), SAMPLES) for name in ("rm", "rm1")]
    for row, first, second in zip(rows, *both, strict=True):
        assert row["ratings"] == pytest.approx([of(a, b) for a, b in zip(first, second, strict=True)], abs=1e-5)
        bits = []
        for i in range(len(first)):
            for j in range(i):
                p = [1 / (1 + math.exp(s[j] - s[i])) for s in (first, second)]
                entropy = [-x * math.log2(x) - (1 - x) * math.log2(1 - x) for x in (*p, sum(p) / 2)]
                bits.append(entropy[2] - (entropy[0] + entropy[1]) / 2)
        assert row["disagreement"] == pytest.approx(sum(bits) / len(bits), abs=1e-5)
        assert row["labeler"] == f"{combine} of rm, rm1"
    same = [
        ((a[i] > a[j]) == (b[i] > b[j]), len(a) * (len(a) - 1) / 2)
        for a, b in zip(*both, strict=True)
        for i in range(len(a))
        for j in range(i)
    ]
    assert measures()["consistency"] == pytest.approx(sum(x / n for x, n in same) / 5, abs=1e-12)


def test_within_the_margin_they_tie_and_nothing_is_scored_again(files, monkeypatch):
    rows = run("--reward_model", "rm")
    monkeypatch.setattr(rank, "load_classifier", lambda *_, **__: pytest.fail("loaded"))
    spread = max(max(row["ratings"]) - min(row["ratings"]) for row in rows)
    with pytest.raises(UserError, match=r"no comparison in 5 rows.*5 rows in which all completions tie"):
        run("--reward_model", "rm", "--tie_margin", spread + 1, "--overwrite")
    tied = run("--reward_model", "rm", "--tie_margin", spread + 1, "--keep_tied", "true", "--overwrite")
    assert all(set(row["ranks"]) == {1} for row in tied)
    margin = sorted(rows[1]["ratings"])[1] - sorted(rows[1]["ratings"])[0]
    (row,) = [r for r in run("--reward_model", "rm", "--tie_margin", margin, "--overwrite") if r["prompt"] == "a dog"]
    assert len(set(row["ranks"])) < len(row["ranks"])


def test_best_and_worst_are_a_pair_of_the_same_ranking(files):
    every = run("--reward_model", "rm", "rm1")
    pairs = run("--reward_model", "rm", "rm1", "--keep", "best_and_worst", output="pairs.jsonl")
    for row, pair in zip(every, pairs, strict=True):
        best, worst = (row["ratings"].index(end(row["ratings"])) for end in (max, min))
        for name in ("completions", "ratings", "truncated"):
            assert pair[name] == [row[name][best], row[name][worst]]
        assert pair["scores"] == [[scores[best], scores[worst]] for scores in row["scores"]]
        assert pair["ranks"] == [1, 2]


def test_samples_of_best_of_n_are_ranked(files):
    kept = {"completion": " b", "truncated": True, "ids": [4], "score": 2.0, "mean_score": 1.0}
    rows = [
        {
            "prompt": "p",
            **kept,
            "completions": [" b", "", " a", " a"],
            "completions_truncated": [True, False, False, True],
        }
    ]
    write_jsonl("samples.jsonl", rows)
    (row,) = run("--reward_model", "rm")
    assert (row["completions"], row["truncated"]) == ([" b", " a"], [True, False])
    assert "completion" not in row
    left_out = read_json("out.report.json")["left_out"]
    assert left_out == {"empty completions": 1, "repeated completions": 1}


# ---- a language model that orders all K at once ---------------------------------------------------------------------
def test_the_judge_scores_by_the_likelihood_of_each_letter(files):
    template = "{prompt} {answers} best:"
    rows = run("--judge", "base", "--judge_template", template, "--orders", 3, "--seed", 5)
    model, tokenizer = load_language_model("base")
    judgements = read_jsonl("out.judgements.jsonl")
    read = 0
    for number, (sample, judgement) in enumerate(zip(SAMPLES, judgements, strict=True)):
        k, expected = len(sample["completions"]), []
        for shown, places in zip(shown_orders(k, 3, 5, number), judgement["places"], strict=True):
            assert [shown[place] for place in places] == list(range(k))
            answers = "\n\n".join(f"Answer {'ABCD'[n]}:\n{sample['completions'][i]}" for n, i in enumerate(shown))
            ids = tokenizer(template.format(prompt=sample["prompt"], answers=answers))["input_ids"]
            read += len(ids)
            scores = [0.0] * k
            for n, i in enumerate(shown):
                letter = tokenizer(f" {'ABCD'[n]}")["input_ids"]
                logps = model(torch.tensor([ids + letter])).logits[0].log_softmax(-1)
                scores[i] = sum(float(logps[len(ids) + t - 1, token]) for t, token in enumerate(letter))
            expected.append(scores)
        for scores, slow in zip(judgement["scores"], expected, strict=True):
            assert scores == pytest.approx(slow, abs=1e-4)
        (row,) = [row for row in rows if row["prompt"] == sample["prompt"]]
        assert row["ratings"] == pytest.approx([sum(of) / 3 for of in zip(*expected, strict=True)], abs=1e-4)
    cost = read_json("out.report.json")["cost"]
    assert cost == {"calls": 15, "prompt_tokens": read, "completion_tokens": 0, "unread": 0}
    bias = [earlier_wins(one["scores"], one["places"]) for one in judgements]
    assert measures()["prefers_first"] == pytest.approx(sum(bias) / 5, abs=1e-12)


def test_each_order_is_seen_backwards_so_that_a_taste_for_a_place_cancels():
    class FirstIsBest:
        tokenizer = limit = None
        takes_ids = False

        def generate(self, prompts, **settings):
            return [[Completion("A > B > C", [], False)] for _ in prompts]

    judge = OrderingJudge(FirstIsBest(), orders=4)
    (found,) = judge.judge([{"prompt": "p", "completions": ["x", "y", "z"]}], [0])
    assert found["calls"] == 4
    assert [sum(of) for of in zip(*found["scores"], strict=True)] == [4.0, 4.0, 4.0]
    assert earlier_wins(found["scores"], found["places"]) == 1.0
    assert same_verdicts(found["scores"][:2]) == 0.0


def test_orders_that_cannot_be_read_are_counted(files, monkeypatch):
    answers = iter(["B > A > C", "no idea", "C = A > B", "C = A > B", *["?"] * 6])

    def written(self, prompts, **settings):
        assert (settings["temperature"], len(settings)) == (0, 3)
        return [[Completion(next(answers), [1, 2], False)] for _ in prompts]

    monkeypatch.setattr(Transformers, "generate", written)
    monkeypatch.setattr("prefopt.evaluation.judges.ordering.WRITTEN", 64)
    write_jsonl("samples.jsonl", [{**row, "completions": [" a", " b", " c"], "truncated": None} for row in SAMPLES])
    rows = run("--judge", "base", "--judge_by", "order", "--judge_template", "{prompt} {answers}")
    first, second = (shown_orders(3, 2, 42, number) for number in (0, 1))
    assert rows[0]["ratings"] == [[1.0, 2.0, 0.0][first[0].index(i)] for i in range(3)]
    both = [[[1.5, 0.0, 1.5][of.index(i)] for i in range(3)] for of in second]
    assert rows[1]["ratings"] == [sum(of) / 2 for of in zip(*both, strict=True)]
    report = read_json("out.report.json")
    assert (report["cost"]["unread"], report["cost"]["completion_tokens"]) == (7, 20)
    assert report["left_out"] == {"rows of which the judge said no order": 3}


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("B>A = C", [0.5, 2.0, 0.5]),
        ("Answer A is fine. Order: A = B = C", [1.0, 1.0, 1.0]),
        ("Perhaps A > B > C? No: C > B > A.", [0.0, 1.0, 2.0]),
        ("B > A", None),
        ("A > B > C > D", None),
        ("A > B > B > C", None),
        ("a > b > c", None),
        ("", None),
    ],
)
def test_an_order_is_read_only_if_it_has_all_letters_once(text, scores):
    assert order_scores(text, 3) == scores


@pytest.mark.enable_socket
def test_a_server_judges_as_the_model_in_memory_does(files, tokenizer, causal_lm):
    template = ["--judge_template", "{prompt} {answers} best:"]
    with serving(vllm("base", causal_lm, tokenizer)) as server:
        served = run("--judge", "base", "--judge_engine", server.address, *template, output="served.jsonl")
        with pytest.raises(UserError, match="of other samples, another ranker"):
            run("--judge", "base", *template, output="served.jsonl")
    for row, expected in zip(served, run("--judge", "base", *template), strict=True):
        assert row["ratings"] == pytest.approx(expected["ratings"], abs=1e-4)
    assert read_json("served.report.json")["cost"] == read_json("out.report.json")["cost"]


@pytest.mark.enable_socket
def test_a_server_that_takes_texts_alone_writes_orders(files):
    def answer(path, body):
        if path == "/v1/models":
            return {"data": [{"id": "gpt"}]}
        assert path == "/v1/chat/completions"
        (message,) = body["messages"]
        # It prefers the answers in the order of the alphabet of their texts.
        texts = dict(re.findall(r"Answer ([A-D]):\n(.*)", message["content"]))
        return {
            "choices": [{"message": {"content": " > ".join(sorted(texts, key=texts.get))}, "finish_reason": "stop"}]
        }

    with serving(answer) as server:
        rows = run("--judge", "gpt", "--judge_engine", server.address)
        asked = len(server)
        run("--judge", "gpt", "--judge_engine", server.address, "--tie_margin", 0.1)
        assert len(server) == asked
    for row in rows:
        order = sorted(row["completions"])
        assert row["ranks"] == [1 + order.index(text) for text in row["completions"]]
    report = read_json("out.report.json")
    assert report["cost"] == {"calls": 10, "prompt_tokens": None, "completion_tokens": None, "unread": 0}
    assert measures()["consistency"] == 1.0


def test_questions_that_are_too_long_are_left_out_with_a_count(files):
    config = json.loads((files / "base" / "config.json").read_text())
    question = len(load_language_model("base")[1]("What is best? the cat" + " Answer A: sat" * 3)["input_ids"])
    (files / "base" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": question + 60}))
    long = {"prompt": "the cat " * 200, "completions": [" sat", " ran"]}
    write_jsonl("samples.jsonl", [long, {"prompt": "x", "completions": [" a", " b"]}])
    (row,) = run("--judge", "base", "--judge_template", "{prompt} {answers}")
    assert row["prompt"] == "x"
    assert read_json("out.report.json")["left_out"] == {"rows longer than the judge's context": 1}


# ---- a function, and people -----------------------------------------------------------------------------------------
def test_a_function_ranks(files, monkeypatch):
    (files / "mine.py").write_text("def shorter(prompt, completion):\n    return -len(completion)\n")
    monkeypatch.syspath_prepend(str(files))
    for row in run("--function", "mine:shorter"):
        assert row["ranks"] == dense([-len(text) for text in row["completions"]])
        assert row["labeler"] == "mine:shorter"
    assert measures()["longer_wins"] == 0.0
    assert measures()["length_correlation"] == pytest.approx(-1.0, abs=1e-12)
    (files / "bad.py").write_text("def none(prompt, completion):\n    return float('nan')\n")
    with pytest.raises(UserError, match="bad:none, prompt 0: nan is not a finite number"):
        run("--function", "bad:none", output="bad.jsonl")
    (files / "worse.py").write_text("def none(prompt, completion):\n    raise KeyError(completion)\n")
    with pytest.raises(UserError, match="worse:none, prompt 0: KeyError: ' sat'"):
        run("--function", "worse:none", output="bad.jsonl")


def test_the_least_certain_go_to_people_and_to_nobody_else(files):
    every = run("--reward_model", "rm", "rm1")
    options = ["--people", 2, "--people_k", 2, "--random_share", 0]
    rows = run("--reward_model", "rm", "rm1", *options, output="half.jsonl")
    people = read_jsonl("half.people.jsonl")
    assert sorted(row["prompt"] for row in rows + people) == sorted(row["prompt"] for row in SAMPLES)
    assert len(people) == 2
    assert all(row["chosen"] == "disagreement" and len(row["completions"]) == 2 for row in people)
    assert all("ranks" not in row and "_number" not in row for row in people)
    assert [row for row in every if row["prompt"] in {row["prompt"] for row in rows}] == rows
    cli.main(["label", "export", "half.people.jsonl", "--out", "sheet.html"])
    assert (files / "sheet.key.jsonl").is_file()
    assert len(run("--reward_model", "rm", "rm1", "--overwrite", output="half.jsonl")) == len(SAMPLES)
    assert not (files / "half.people.jsonl").exists()


# ---- kills, and what is there ---------------------------------------------------------------------------------------
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(files, monkeypatch):
    monkeypatch.setattr(rank, "ROWS_AT_ONCE", 2)
    options = ["--reward_model", "rm", "rm1", "--people", 1]
    run(*options, output="whole.jsonl")
    real, calls = rank.score_rows, []

    def killed(model, tokenizer, rows, *options):
        calls.append(len(rows))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(model, tokenizer, rows, *options)

    monkeypatch.setattr(rank, "score_rows", killed)
    with pytest.raises(KeyboardInterrupt):
        run(*options)
    assert not (files / "out.jsonl").exists()
    run(*options)
    assert calls == [2, 2, 1, 2, 2, 2, 1]
    for name in ("jsonl", "judgements.jsonl", "people.jsonl", "report.json"):
        assert (files / f"out.{name}").read_bytes() == (files / f"whole.{name}").read_bytes()
    assert not list(files.glob(".*.part"))
    before = {path: path.stat().st_mtime_ns for path in files.glob("out.judgements*")}
    run(*options)
    assert len(calls) == 7
    assert {path: path.stat().st_mtime_ns for path in files.glob("out.judgements*")} == before


def test_nothing_of_others_is_written_over(files):
    (files / "out.judgements.jsonl").write_text("somebody's work\n")
    with pytest.raises(UserError, match=r"out\.judgements\.jsonl is there, and this command did not write it"):
        run("--reward_model", "rm")
    (files / "out.judgements.jsonl").unlink()
    (files / "out.jsonl").write_text("somebody's work\n")
    with pytest.raises(UserError, match=r"out\.jsonl is there, of other samples.*--overwrite"):
        run("--reward_model", "rm")
    assert (files / "out.jsonl").read_text() == "somebody's work\n"
    assert not (files / "out.judgements.jsonl").exists()
    run("--reward_model", "rm", "--overwrite")
    with pytest.raises(UserError, match="of other samples, another ranker or other settings"):
        run("--reward_model", "rm1")
    with pytest.raises(UserError, match="is also read"):
        run("--reward_model", "rm", output="samples.jsonl")
    with pytest.raises(UserError, match=r"out\.csv': nothing is written as a table; name a \.jsonl"):
        run("--reward_model", "rm", output="out.csv")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no ranker given; expected one of reward_model"),
        (["--reward_model", "rm", "--judge", "base"], "reward_model and judge given; expected one"),
        (["--reward_model", "base"], "reward_model: .*no trained head"),
        (["--reward_model", "nowhere"], "reward_model: .*nowhere"),
        (["--reward_model", "rm", "rm1", "./rm"], r"reward_model: rm and \./rm are one model"),
        (["--judge", "rm"], "judge: "),
        (["--judge", "base", "--judge_template", "{prompt}"], r"\{answers\} is missing"),
        (["--function", "nowhere:at_all"], "cannot import 'nowhere:at_all'"),
        (["--reward_model", "rm", "--people", 1, "--people_k", 1], "k from 2"),
        (["--reward_model", "rm", "--tie_margin", -1], "tie_margin is -1.0; expected at least 0"),
    ],
)
def test_mistakes_stop_before_anything_is_asked(files, options, message):
    with pytest.raises(UserError, match=message):
        run(*options)
    assert not list(files.glob("out*"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completion": " a"}, "field 'completions': expected a list"),
        ({"completions": [1, 2]}, r"field 'completions\[0\]': expected a string or a list of chat messages, got 1"),
        ({"completions": [" a", " b"], "truncated": [True]}, "field 'truncated': .* one entry for each of the 2"),
        ({"completions": [" a", " a", " b"], "flags": [{}] * 2}, "field 'flags': .* one entry for each of the 3"),
    ],
)
def test_a_row_that_is_no_sample_is_named(files, row, message):
    write_jsonl("samples.jsonl", [*SAMPLES, {"prompt": "p", **row}])
    with pytest.raises(UserError, match=f"samples.jsonl row 5: {message}"):
        run("--reward_model", "rm")


def test_a_row_that_a_reward_model_cannot_score_is_named(files):
    repeated = {"prompt": "p", "completions": [" a", " a"]}
    write_jsonl("samples.jsonl", [SAMPLES[0], repeated, {"prompt": "p", "completions": [" a", " dog" * 300]}])
    with pytest.raises(
        UserError, match=r"samples.jsonl, rm, row 2, completion 1: \d+ tokens, .* 256 positions; shorten"
    ):
        run("--reward_model", "rm")
    write_jsonl(
        "samples.jsonl", [SAMPLES[0], {"prompt": [{"role": "user", "content": "p"}], "completions": ["a", "b"]}]
    )
    with pytest.raises(UserError, match=r"samples\.jsonl, rm, row 1: .* no chat template"):
        run("--reward_model", "rm")
