"""Best of n: the highest score is kept, a killed run goes on bit for bit, and the file is a model of `prefopt eval`."""

import json
import math

import pytest
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from prefopt.errors import UserError
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun
from prefopt.evaluation.stages import drift, tax
from prefopt.evaluation.stages import generate as generation
from prefopt.evaluation.stages import judge as judges
from prefopt.inference import engines
from prefopt.inference.generate import Completion
from prefopt.inference.journal import Journal
from prefopt.inference.jsonl import read_jsonl, write_jsonl
from prefopt.inference.scoring import score_completions, score_texts
from prefopt.models.checkpoints import load_reward_model, save_reward_model
from prefopt.recipes import best_of_n, evaluate

PROMPTS = ["the cat", "a dog", "the red house", "what is this?", "the mat"]


@pytest.fixture
def files(tmp_path, causal_lm, tokenizer, reward_model):
    causal_lm.save_pretrained(tmp_path / "sft")
    save_reward_model(reward_model, tmp_path / "rm")
    for name in ("sft", "rm"):
        tokenizer.save_pretrained(tmp_path / name)
    rows = [{"prompt": p, "use_case": "pets", "ranks": [1, 2]} for p in PROMPTS]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    return tmp_path


def run(files, *extra, output="best.jsonl"):
    keys = {
        "model_name_or_path": files / "sft",
        "reward_model_name_or_path": files / "rm",
        "dataset_name": files / "prompts.jsonl",
        "output": files / output,
        "n": 4,
        "max_new_tokens": 5,
        "batch_size": 8,
    }
    best_of_n.main([str(x) for key, value in keys.items() for x in (f"--{key}", value)] + list(extra))
    return read_jsonl(files / output)


def test_the_sample_with_the_highest_score_is_kept(files, tokenizer, capsys, monkeypatch):
    real, of = engines.generate, {}

    def remembered(model, tokenizer, prompts, **kwargs):
        drawn = real(model, tokenizer, prompts, **kwargs)
        of.update(zip(prompts, drawn, strict=True))
        return drawn

    monkeypatch.setattr(engines, "generate", remembered)
    rows = run(files, "--keep_samples", "true")
    assert [row["prompt"] for row in rows] == PROMPTS
    assert all(row["use_case"] == "pets" and "ranks" not in row for row in rows)
    judge = load_reward_model(files / "rm")
    for row in rows:
        completions = of[row["prompt"]]
        scores = score_completions(judge, tokenizer, [row["prompt"]] * 4, completions)
        best = max(range(4), key=scores.__getitem__)
        assert row["scores"] == pytest.approx(scores, abs=1e-5)
        assert row["completions"] == [completion.text for completion in completions]
        assert row["completions_truncated"] == [completion.truncated for completion in completions]
        assert row["completion"] == completions[best].text
        assert row["truncated"] == completions[best].truncated
        assert row["ids"] == completions[best].ids
        assert row["score"] == pytest.approx(scores[best], abs=1e-5)
        assert row["mean_score"] == pytest.approx(sum(scores) / 4, abs=1e-5)
    printed = capsys.readouterr().out
    assert "5 prompts: score" in printed
    assert f"at most {math.log(4) - 3 / 4:.3f} nats" in printed


def test_a_killed_run_goes_on_where_it_was(files, monkeypatch):
    whole = run(files, output="whole.jsonl")
    real, calls = engines.generate, []

    def killed(model, tokenizer, prompts, **kwargs):
        calls.append(prompts)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(model, tokenizer, prompts, **kwargs)

    monkeypatch.setattr(engines, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        run(files)
    assert not (files / "best.jsonl").exists()
    assert run(files) == whole
    by_length = [
        "what is this?",
        "the red house",
        "the cat",
        "a dog",
        "the mat",
    ]  # tokens, then the order of the rows
    batches = [by_length[:2], by_length[2:4], by_length[4:]]  # of 8 completions, 4 of each prompt
    assert calls == [*batches, batches[2]]  # what was finished is not drawn again
    run(files)
    assert len(calls) == 4
    assert not list(files.glob(".*part"))
    run(files, "--seed", "7", "--overwrite")
    assert len(calls) == 7


def test_equal_scores_keep_the_first(tmp_path):
    def draw(prompts, seed):
        return [[Completion(text, [1], False) for text in "abc"] for _ in prompts], [[0.0, 2.0, 2.0]] * len(prompts)

    rows = Dataset.from_list([{"prompt": "p"}])
    journal = Journal(tmp_path / "journal", {})
    (row,) = best_of_n.best_rows(rows, [[0]], draw, journal=journal, seed=0)
    assert row == {
        "prompt": "p",
        "completion": "b",
        "truncated": False,
        "ids": [1],
        "score": 2.0,
        "mean_score": 4 / 3,
    }


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--n", "0"], "n is 0"),
        (["--temperature", "0"], "n is 4 at temperature 0; expected 1 or more, and 1 if greedy"),
        (["--reward_model_name_or_path", "sft"], "reward_model_name_or_path: .*no trained head"),
    ],
)
def test_mistakes_stop_early(files, extra, message):
    extra = [str(files / "sft") if x == "sft" else x for x in extra]
    with pytest.raises(UserError, match=message):
        run(files, *extra)


def test_a_prompt_too_long_for_the_reward_model_stops_before_anything_is_drawn(files, monkeypatch):
    config = json.loads((files / "rm" / "config.json").read_text())
    (files / "rm" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    monkeypatch.setattr(best_of_n, "policy_engine", lambda *_, **__: pytest.fail("drawn"))
    with pytest.raises(UserError, match=r"row 3: its prompt of \d tokens .*more than the 8 tokens that .*rm reads"):
        run(files)


def test_broken_scores_stop(files):
    broken = AutoModelForSequenceClassification.from_pretrained(files / "rm")
    broken.score.weight.data[:] = float("nan")
    save_reward_model(broken, files / "rm")
    with pytest.raises(UserError, match=r"the head score\.weight is not finite"):
        run(files)


def test_the_file_is_judged_as_a_model(files, tokenizer, caplog):
    rows = run(files)
    args = EvaluationArguments(
        output_dir=str(files / "evaluation"),
        models={"sft": str(files / "sft"), "best": str(files / "best.jsonl")},
    )
    evaluation = EvaluationRun(files / "evaluation")
    own = generation.GenerateArguments([{"prompt": p} for p in PROMPTS], max_new_tokens=5, greedy=False)
    generation.measure(evaluation, args, own)
    assert [row["completion"] for row in evaluation.completions("best")] == [row["completion"] for row in rows]
    judges.measure(evaluation, args, judges.JudgeArguments(reward_judge=str(files / "rm")))
    scores = read_jsonl(judges.scores_path(evaluation, "reward", "best"))
    texts, cuts = [row["completion"] for row in rows], [row["truncated"] for row in rows]
    expected = score_texts(load_reward_model(files / "rm"), tokenizer, PROMPTS, texts, cuts)
    assert [row["score"] for row in scores] == pytest.approx(expected, abs=1e-5)
    write_jsonl(files / "text.jsonl", [{"text": "the cat sat on the mat"}])
    drift.measure(evaluation, args, drift.DriftArguments())
    tax.measure(evaluation, args, tax.TaxArguments(pretraining_text=str(files / "text.jsonl")))
    assert "Traceback" not in caplog.text  # it has no weights: said in the report, and no trouble
    for stage, name in (("drift", "kl_to_sft"), ("tax", "pretraining_bits_per_byte")):
        of = {row["model"]: row for row in evaluation.stage(stage)["measures"] if row["name"] == name}
        assert of["sft"]["value"] is not None
        assert of["best"]["value"] is None
        assert of["best"]["status"] == "skipped"
        assert "holds completions: there are no weights to measure" in of["best"]["reason"]


def test_a_prompt_that_is_asked_several_times_gets_its_completions_in_order(files):
    """One or two for each time; where they do not come out even, all of them every time."""
    asked = [{"prompt": p} for p in ("the cat", "a dog", "the cat")]
    for rows, expected in (
        (["the cat", "a dog", "the cat"], [[0], [1], [2]]),
        (["the cat", "the cat", "a dog", "the cat", "the cat"], [[0, 1], [2], [3, 4]]),
        (["the cat", "a dog"], [[0], [1], [0]]),
    ):
        drawn = [{"prompt": p, "completion": str(i)} for i, p in enumerate(rows)]
        write_jsonl(files / "given.jsonl", drawn, replace=True)
        found = generation._given(str(files / "given.jsonl"), asked, None)
        assert [[int(r["completion"]) for r in found if r["id"] == i] for i in range(3)] == expected


def test_completions_without_ids_have_no_number_of_tokens(files):
    write_jsonl(files / "given.jsonl", [{"prompt": p, "completion": " sat"} for p in PROMPTS])
    models = {"sft": str(files / "given.jsonl"), "best": str(files / "best.jsonl")}
    rows = run(files)
    keys = {
        "output_dir": files / "evaluation",
        "models": json.dumps(models),
        "prompts": files / "prompts.jsonl",
    }
    for stage in ("generate", "report"):
        evaluate.main([stage, *(str(word) for key, value in keys.items() for word in (f"--{key}", value))])
    measures = json.loads((files / "evaluation" / "results.json").read_text(encoding="utf-8"))["measures"]
    tokens = {row["model"]: row for row in measures if row["name"] == "completion_tokens"}
    assert tokens["best"]["value"] == sum(len(row["ids"]) for row in rows) / len(rows)
    assert tokens["sft"]["value"] is None
    assert tokens["sft"]["reason"] == "its file of completions has no `ids`"


def test_prompts_without_a_completion_are_named(files):
    write_jsonl(files / "few.jsonl", [{"prompt": "the cat", "completion": " sat"}])
    args = EvaluationArguments(output_dir=str(files / "evaluation"), models={"few": str(files / "few.jsonl")})
    with pytest.raises(RuntimeError, match=r"few.jsonl has no completion of prompt 1"):
        generation.measure(
            EvaluationRun(files / "evaluation"),
            args,
            generation.GenerateArguments([{"prompt": p} for p in PROMPTS]),
        )
