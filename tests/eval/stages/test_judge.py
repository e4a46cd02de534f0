"""Judges, labels by people, and the stage that runs them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from prefopt.errors import UserError
from prefopt.evaluation.judges.gold import ScoreJudge, gold_scores, load_callable
from prefopt.evaluation.judges.language_model import LanguageModelJudge, fill
from prefopt.evaluation.judges.people import HumanJudge, check_labels, preferences
from prefopt.evaluation.results import find
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun
from prefopt.evaluation.stages import judge as judges
from prefopt.evaluation.stages import ratings as metadata
from prefopt.evaluation.stages.judge import JudgeArguments
from prefopt.evaluation.stages.ratings import MetadataArguments, counts_for, flag_share, share
from prefopt.evaluation.stages.reward_model import RewardModelArguments
from prefopt.inference.engines import Transformers
from prefopt.inference.generate import Completion
from prefopt.inference.journal import function_state
from prefopt.inference.jsonl import read_jsonl, write_jsonl
from prefopt.inference.scoring import score_completions
from prefopt.sandbox import FLAGS, World, labelers
from tests.conftest import tiny_config


def completion(i, text, decoding="sampled", **more):
    return {"id": i, "prompt": f"p{i}", "decoding": decoding, "sample": 0, "completion": text, "ids": [5, 6, 1],
            "truncated": False, **more}  # fmt: skip


def answers(*texts):
    return [completion(i, text) for i, text in enumerate(texts)]


def test_the_higher_score_wins_and_equal_scores_tie():
    rows = {"sft": answers("aa", "aa", "aa"), "ppo": answers("aaa", "aa", "a")}
    judge = ScoreJudge(gold_scores(lambda prompt, text: len(text)))
    found = judge.judgements(rows, [("ppo", "sft")])
    assert [(r["id"], r["preference"], r["score_a"], r["score_b"]) for r in found] == [
        (0, 1.0, 3.0, 2.0),
        (1, 0.5, 2.0, 2.0),
        (2, 0.0, 1.0, 2.0),
    ]


def test_greedy_answers_are_judged_against_greedy_ones():
    rows = {
        "sft": [completion(0, "a"), completion(0, "aaaa", "greedy")],
        "ppo": [completion(0, "aa"), completion(0, "aaa", "greedy")],
    }
    found = ScoreJudge(gold_scores(lambda prompt, text: len(text))).judgements(rows, [("ppo", "sft")])
    assert [(r["decoding"], r["preference"]) for r in found] == [("sampled", 1.0), ("greedy", 0.0)]


def test_gold_parts_and_numbers_that_are_none():
    world = World(seed=0)
    prompt = world.prompts("test", 1)[0]
    row = {**completion(0, world.good_answer(prompt)), "prompt": prompt}
    (scored,) = gold_scores(world.gold_reward)("sft", [row])
    assert scored["score"] == 6.0
    assert scored["parts"] == {"follow": 1.0, "constraint": 1.0, "truth": 1.0, "polite": 1.0}
    for none in (
        float("nan"),
        "x",
        "3.5",
        None,
        [1.0, 2.0],
        np.ones(2),
        replace(world.gold_reward(prompt, "a"), total="x"),
    ):
        with pytest.raises(UserError, match=r"gold reward of sft, prompt 0: .* is not a finite number"):
            gold_scores(lambda p, c, none=none: none)("sft", [row])
    part = replace(world.gold_reward(prompt, "a"), truth=None)
    with pytest.raises(UserError, match="gold reward of sft, prompt 0, truth: None is not a finite number"):
        gold_scores(lambda p, c: part)("sft", [row])
    for number in (2, np.float32(2), torch.tensor(2.0), True + True):
        assert gold_scores(lambda p, c, number=number: number)("sft", [row])[0]["score"] == 2.0


@pytest.mark.parametrize("name", ["no_such_module:f", "math:no_such", "math", "math:pi"])
def test_a_wrong_callable_is_named(name):
    with pytest.raises(ValueError, match=name.split(":")[0]):
        load_callable(name)


# ---- people ---------------------------------------------------------------------------------------------------------
def test_rankings_and_ratings_become_pairs():
    rows = [
        {"id": 0, "models": ["x", "y", "z"], "ranks": [1, 2, 2], "ratings": [1, 7, 7], "labeler": "ann"},
        {"id": 1, "models": ["x", "y"], "ratings": [5, 3]},
        {"id": 2, "a": "x", "b": "y", "preference": 0.5},
        {"id": 3, "models": ["x"], "flags": [{}]},
    ]
    found = [(r["id"], r["a"], r["b"], r["preference"]) for r in preferences(rows)]
    assert found == [  # by ranks where there are any; 1 is best
        (0, "x", "y", 1.0),
        (0, "x", "z", 1.0),
        (0, "y", "z", 0.5),
        (1, "x", "y", 1.0),
        (2, "x", "y", 0.5),
    ]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": "unknown", "models": ["x"], "ranks": [1]}, "prompt"),
        ({"id": 0, "models": ["x", "y"], "ranks": [1]}, "ranks"),
        ({"id": 0, "models": ["x", "x"], "ranks": [1, 2]}, "models"),
        ({"id": 0, "models": ["x", "y"]}, "ranks"),
        ({"id": 0, "models": ["x", "y"], "ratings": [0, 3]}, "ratings"),
        ({"id": 0, "models": ["x", "y"], "ratings": [4, "good"]}, "ratings"),
        ({"id": 0, "models": ["x"], "flags": [["hallucination"]]}, "flags"),
        ({"id": 0, "a": "x", "b": "x", "preference": 1}, "b"),
        ({"id": 0, "a": "x", "b": "y", "preference": 2}, "preference"),
    ],
)
def test_wrong_labels_are_named(row, field):
    good = {"id": 0, "models": ["x", "y"], "ranks": [1, 2]}
    with pytest.raises(ValueError, match=f"labels.jsonl row 1: field '{field}'"):
        check_labels([good, row], {}, "labels.jsonl")


def test_labels_of_other_completions_are_left_out_and_counted():
    rows = {"x": answers("new"), "y": answers("same")}
    labels = [{"prompt": "p0", "models": ["x", "y"], "completions": ["old", "same"], "ratings": [1, 7]}]
    kept, stale = check_labels(labels, rows, "labels")
    assert stale == 1
    assert kept == [{"id": 0, "prompt": "p0", "models": ["y"], "completions": ["same"], "ratings": [7]}]


def test_simulated_labelers_label_as_people_do():
    world = World(seed=0)
    prompts = world.prompts("test", 3)
    rows = {
        "good": [{**completion(i, world.good_answer(p)), "prompt": p} for i, p in enumerate(prompts)],
        "bad": [{**completion(i, " no"), "prompt": p} for i, p in enumerate(prompts[:2])],
    }
    label = labelers(world, "train")[0].label
    labels = [
        {**label(prompts[i], [rows[m][i]["completion"] for m in rows]), "id": i, "models": list(rows)}
        for i in range(2)
    ]
    assert [(r["id"], r["models"], r["labeler"]) for r in labels] == [
        (0, ["good", "bad"], "train-0"),
        (1, ["good", "bad"], "train-0"),
    ]
    assert set(labels[0]["flags"][0]) == set(FLAGS) == set(metadata.FLAGS)
    found = HumanJudge(labels).judgements(rows, [("bad", "good")])
    assert [r["preference"] for r in found] == [1.0, 1.0]  # a is "good", as in the labels


# ---- a language model -----------------------------------------------------------------------------------------------
def lm_judge(tokenizer, folder, favors, **more):
    """A judge whose logits say which letter follows the question text."""

    class Backbone(torch.nn.Module):
        config = tiny_config(max_position_embeddings=more.pop("positions", 256))
        calls = 0

        def forward(self, input_ids, attention_mask, **_):
            Backbone.calls += 1
            logits = torch.zeros(*input_ids.shape, 320)
            for row, ids in enumerate(input_ids.tolist()):
                text = tokenizer.decode([i for i, m in zip(ids, attention_mask[row].tolist(), strict=True) if m])
                letter = favors(text)
                token = tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][-1]
                logits[row, :, token] = 5.0
            return BaseModelOutput(last_hidden_state=logits)

    class Model(torch.nn.Module):
        config = Backbone.config
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.base_model = Backbone()

        def forward(self, input_ids, **kwargs):
            return CausalLMOutput(logits=self.base_model(input_ids, None, **kwargs).last_hidden_state)

    model = Model()
    template = "{prompt}|{a}|{b}|Better:"
    return LanguageModelJudge(
        lambda: Transformers(model, tokenizer), template, batch_size=3, folder=folder, **more
    ), Backbone


def test_a_fair_language_model_is_consistent(tokenizer, tmp_path: Path):
    def longer(text):
        _, first, second, _ = text.split("|")
        return "A" if len(first) > len(second) else "B"

    judge, model = lm_judge(tokenizer, tmp_path, longer)
    rows = {"sft": answers("the cat", "the cat", "a"), "ppo": answers("the dog ran", "dog", "the dog")}
    found = judge.judgements(rows, [("ppo", "sft")])
    assert [(r["id"], r["preference"], r["consistent"], r["first"]) for r in found] == [
        (0, 1.0, True, 0.5),
        (1, 0.0, True, 0.5),
        (2, 1.0, True, 0.5),
    ]
    calls = model.calls
    again, _ = lm_judge(tokenizer, tmp_path, longer)
    assert again.judgements(rows, [("ppo", "sft")]) == found
    assert model.calls == calls > 0  # kept


def test_a_language_model_that_always_says_a_gives_ties(tokenizer, tmp_path: Path):
    judge, _ = lm_judge(tokenizer, tmp_path, lambda text: "A")
    found = judge.judgements({"sft": answers("the cat"), "ppo": answers("the dog")}, [("ppo", "sft")])
    assert [(r["preference"], r["consistent"], r["first"]) for r in found] == [(0.5, False, 1.0)]
    measures = judges._consistency("lm", found)
    assert find(measures, "judge_consistency", "lm")["value"] == 0.0
    assert find(measures, "judge_prefers_first", "lm")["value"] == 1.0


def test_a_question_beyond_the_context_is_left_out_and_counted(tokenizer, tmp_path: Path):
    judge, _ = lm_judge(tokenizer, tmp_path, lambda text: "A", positions=40)
    rows = {"sft": answers("a", "the cat sat on the mat " * 20), "ppo": answers("b", "b")}
    assert [r["id"] for r in judge.judgements(rows, [("ppo", "sft")])] == [0]
    assert judge.too_long == 1


def test_a_judge_that_cannot_write_its_verdict_is_refused(tokenizer, tmp_path: Path):
    judge, _ = lm_judge(tokenizer, tmp_path, lambda text: "A")
    model = judge.load().model
    words = Tokenizer(WordLevel({"<unk>": 0, "the": 1}, unk_token="<unk>"))
    judge.load = lambda: Transformers(model, PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>"))
    with pytest.raises(ValueError, match="does not tell A from B"):
        judge.judgements({"sft": answers("a"), "ppo": answers("b")}, [("ppo", "sft")])


def test_the_template_is_checked_and_filled_once(tmp_path: Path):
    with pytest.raises(ValueError, match="b} is missing"):
        LanguageModelJudge(lambda: None, "{prompt} {a}", folder=tmp_path)
    assert fill("{prompt}/{a}/{b}", prompt="{a}", a="{b}", b="x") == "{a}/{b}/x"


# ---- ratings and flags ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("k", "n"), [(4, 25), (0, 30), (30, 30), (1, 1)])
def test_wilsons_interval_is_scipys(k, n):
    expected = binomtest(k, n).proportion_ci(0.95, method="wilson")
    found = share([True] * k + [False] * (n - k))
    assert (found.value, found.n, found.n_clusters) == (k / n, n, n)
    assert (found.ci_low, found.ci_high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_two_labels_of_a_prompt_are_no_two_prompts():
    expected = binomtest(4, 25).proportion_ci(0.95, method="wilson")
    found = share([True] * 8 + [False] * 42, n_clusters=25)
    assert (found.value, found.n, found.n_clusters) == (8 / 50, 50, 25)
    assert (found.ci_low, found.ci_high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_denominators_are_the_papers():
    def label(i, flags, **prompt):
        return {"id": i, "model": "x", "rating": None, "labeler": None, "flags": flags, "prompt": prompt}

    labels = [
        label(0, {"hallucination": True, "satisfies_constraint": True}, use_case="closed_qa"),
        label(1, {"hallucination": False, "satisfies_constraint": False}, use_case="summarization"),
        label(2, {"hallucination": True, "satisfies_constraint": None}, use_case="chat"),
        label(3, {"hallucination": True, "satisfies_constraint": True}, use_case="chat", has_constraint=False),
        label(4, {"hallucination": False}, use_case="chat", closed_domain=True),
    ]
    found = flag_share(labels, "hallucination")
    assert (found.value, found.n) == (1 / 3, 3)
    found = flag_share(labels, "satisfies_constraint")
    assert (found.value, found.n) == (1 / 2, 2)
    assert flag_share(labels, "sexual_content").n == 0
    assert not counts_for("hallucination", {"use_case": "closed_qa"}, ["summarization"])


# ---- the stages, with models ----------------------------------------------------------------------------------------
@pytest.fixture
def evaluation(tmp_path: Path, tokenizer, reward_model) -> tuple[EvaluationRun, EvaluationArguments]:
    torch.manual_seed(0)
    policy = LlamaForCausalLM(tiny_config())
    for name, model in (("policy", policy), ("reward", reward_model)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    run = EvaluationRun(tmp_path / "out")
    args = EvaluationArguments(
        output_dir=str(run.folder),
        models={"sft": str(tmp_path / "policy"), "ppo": str(tmp_path / "policy"), "lost": str(tmp_path / "gone")},
    )
    write_jsonl(run.completions_path("sft"), [completion(i, " cat", ids=[20 + i, 30, 1]) for i in range(3)])
    write_jsonl(run.completions_path("ppo"), [completion(i, " dog", ids=[60 + i, 31, 1]) for i in range(3)])
    return run, args


def test_the_stage_runs_every_judge_and_one_that_breaks_costs_only_itself(evaluation, tokenizer, reward_model):
    run, args = evaluation
    labels = run.folder / "labels.jsonl"
    write_jsonl(labels, [{"id": 1, "models": ["ppo", "sft"], "ranks": [1, 2], "ratings": [6, 4], "flags": [{"hallucination": True}, {"hallucination": None}]}])  # fmt: skip
    own = JudgeArguments(
        gold_judge=lambda prompt, text: len(text),
        human_judgements=str(labels),
        lm_judge=str(run.folder / "nothing"),
        reward_judge=args.models["sft"].replace("policy", "reward"),
    )
    judges.measure(run, args, own)
    stage = run.stage("judge")["data"]["judges"]
    assert {name: status.split(":")[0] for name, status in stage.items()} == {
        "gold": "ok",
        "human": "ok",
        "lm": "failed",
        "reward": "ok",
    }
    assert not judges.judgements_path(run, "lm").exists()
    rows = read_jsonl(judges.judgements_path(run, "reward"))
    sft = run.completions("sft")
    drawn = [Completion(r["completion"], r["ids"], r["truncated"]) for r in sft]
    expected = score_completions(reward_model, tokenizer, [r["prompt"] for r in sft], drawn)
    assert [r["score_a"] for r in rows] == pytest.approx(expected, abs=1e-5)
    assert all(r["preference"] == float(r["score_a"] > r["score_b"]) for r in rows)
    assert [r["preference"] for r in read_jsonl(judges.judgements_path(run, "gold"))] == [0.5] * 3
    (judged,) = read_jsonl(judges.judgements_path(run, "human"))
    assert (judged["a"], judged["b"], judged["preference"]) == ("ppo", "sft", 1.0)

    path = judges.scores_path(run, "reward", "sft")
    first = path.stat().st_mtime_ns
    judges.measure(run, args, own)
    assert path.stat().st_mtime_ns == first  # the same completions and reward model: not scored again
    judges.measure(run, args, replace(own, reward_judge=None))
    assert not path.exists()
    assert not judges.judgements_path(run, "reward").exists()
    judges.measure(run, args, own)
    assert path.stat().st_mtime_ns == first  # nor when it was not asked in between

    metadata.measure(run, args, MetadataArguments(), JudgeArguments(human_judgements=str(labels)))
    measures = run.stage("metadata")["measures"]
    assert find(measures, "rating", "ppo")["value"] == 6.0
    assert find(measures, "flag.hallucination", "ppo")["status"] == "skipped"  # the prompt has no use case
    assert find(measures, "rating", "lost")["status"] == "skipped"
    metadata.measure(run, args, MetadataArguments(), JudgeArguments(human_judgements=str(run.folder / "none.jsonl")))
    found = find(run.stage("metadata")["measures"], "rating", "ppo")
    assert (found["status"], found["value"]) == ("failed", None)
    metadata.measure(run, args, MetadataArguments(), JudgeArguments(human_judgements=None))
    assert "human_judgements" in find(run.stage("metadata")["measures"], "rating", "ppo")["reason"]


def test_a_judge_needs_completions(tmp_path: Path):
    args = EvaluationArguments(output_dir=str(tmp_path), models={"sft": "x"})
    with pytest.raises(FileNotFoundError, match="prefopt eval generate"):
        judges.measure(EvaluationRun(tmp_path), args, JudgeArguments(gold_judge=lambda p, c: 0.0))


def test_labels_of_prompts_that_were_not_generated_for_are_left_out_with_a_count(caplog):
    completions = {
        "sft": [{"id": 0, "prompt": "x", "completion": "a"}],
        "ppo": [{"id": 0, "prompt": "x", "completion": "b"}],
    }
    rows = [
        {"id": 0, "a": "sft", "b": "ppo", "preference": 1.0},
        {"id": 999, "a": "sft", "b": "ppo", "preference": 0.0},
        {"id": "0", "models": ["sft", "ppo"], "ranks": [2, 1]},
    ]
    kept, stale = check_labels(rows, completions, "labels")
    assert [row["id"] for row in kept] == [0]
    assert stale == 2
    assert "2 labels left out" in caplog.text
    with pytest.raises(ValueError, match="labels row 0: field 'id'"):
        check_labels([{"id": [1], "a": "sft", "b": "ppo", "preference": 1.0}], completions, "labels")


def test_an_edited_function_is_another_function(tmp_path, monkeypatch):
    module = tmp_path / "my_judge_module.py"
    module.write_text("def score(prompt, completion): return 1.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = function_state("my_judge_module:score")
    assert function_state("my_judge_module:score") == before
    module.write_text("def score(prompt, completion): return 12.0")
    assert function_state("my_judge_module:score") != before


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"reward_models": {"dpo": "rm"}, "implicit_rewards": {"dpo": 0.1}}, "rename that one"),
        ({"implicit_rewards": {"dpo": "x"}}, "implicit_rewards: dpo: expected the beta"),
        ({"reward_models": {"../rm": "rm"}}, "becomes a file's"),
    ],
)
def test_names_of_reward_models_are_checked(keys, expected):
    with pytest.raises(ValueError, match=expected):
        RewardModelArguments(**keys)
