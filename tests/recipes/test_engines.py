"""Commands that draw give the same file whoever draws: one process, two of `accelerate launch`, or a server."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from prefopt.errors import UserError
from prefopt.evaluation.judges.language_model import LanguageModelJudge
from prefopt.inference import processes
from prefopt.inference.engines import Transformers, open_engine
from prefopt.inference.jsonl import read_jsonl
from prefopt.inference.scoring import score_texts
from prefopt.models.checkpoints import save_reward_model
from prefopt.recipes import best_of_n, evaluate, sample
from prefopt.recipes.common import lock
from tests.model_server import serving, vllm
from tests.trainers.conftest import in_two_processes

# Between processes and threads of the test.
pytestmark = [pytest.mark.slow, pytest.mark.enable_socket]


def sampled(output, **more):
    main(sample, output=output, k_min=2, k_max=4, max_new_tokens=5, batch_size=3, **more)


def best(output, **more):
    main(best_of_n, output=output, reward_model_name_or_path="rm", n=3, max_new_tokens=5, batch_size=6, **more)


def main(command, **keys):
    keys = {"model_name_or_path": "base", "dataset_name": "prompts.jsonl", **keys}
    command.main([str(x) for key, value in keys.items() for x in (f"--{key}", value)])


def generated(output, **more):
    keys = {"output_dir": output, "prompts": "prompts.jsonl", "max_new_tokens": 5, "batch_size": 3, **more}
    models = '{"sft": "base", "broken": "no-such", "again": "base"}'
    argv = [str(x) for key, value in keys.items() for x in (f"--{key}", value)]
    # The first process tells.
    with pytest.raises(UserError, match="broken failed") if processes.is_main() else nullcontext():
        evaluate.main(["generate", "--models", models, *argv])


def test_two_processes_give_the_files_of_one(files, reward_model, tokenizer):
    """Also where one has begun, and been cut off after an odd number of batches; and neither waits where the other fails."""
    save_reward_model(reward_model, "rm")
    sampled("one.jsonl"), best("best_one.jsonl"), generated("eval_one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "_rankable", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sampled("two.jsonl")
    lock.release()
    journal = Path(".two.jsonl.part")
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) > 4
    journal.write_bytes(b"".join(lines[:2]))

    def two():
        sampled("two.jsonl"), best("best_two.jsonl"), generated("eval_two")
        with pytest.raises(UserError, match=r"^(process 1: )?of the second$"):
            processes.spread([0, 1], lambda number: number and fail())
        assert processes.spread([7, 8], lambda number: (number, processes.rank())) == [(7, 0), (8, 1)]
        Path(f"rank_{processes.rank()}").touch()

    def fail():
        raise UserError("of the second")

    in_two_processes(two)
    assert Path("rank_0").exists()
    assert Path("rank_1").exists()
    pairs = [("one.jsonl", "two.jsonl"), ("best_one.jsonl", "best_two.jsonl")]
    pairs += [
        (f"eval_one/{name}", f"eval_two/{name}") for name in ("completions/sft.jsonl", "completions/again.jsonl")
    ]
    for one, other in pairs:
        assert Path(one).read_bytes() == Path(other).read_bytes()
        assert read_jsonl(one)
    assert not journal.exists()
    assert Path("eval_two/stages/generate.json").read_bytes() == Path("eval_one/stages/generate.json").read_bytes()


def test_a_server_draws_for_every_command(files, causal_lm, tokenizer):
    one = {"k_min": 1, "k_max": 1, "temperature": 0}
    main(sample, output="here.jsonl", max_new_tokens=5, **one)
    with serving(vllm("base", causal_lm, tokenizer)) as asked:
        main(sample, output="there.jsonl", max_new_tokens=5, engine=asked.address, **one)
        best("best.jsonl", engine=asked.address)
        generated("eval", engine=asked.address)
    assert Path("here.jsonl").read_bytes() == Path("there.jsonl").read_bytes()
    assert {len(row["ids"]) > 0 for row in read_jsonl("best.jsonl")} == {True}
    greedy = [row["completion"] for row in read_jsonl("eval/completions/sft.jsonl") if row["decoding"] == "greedy"]
    assert [[text] for text in greedy] == [row["completions"] for row in read_jsonl("here.jsonl")]
    # Drawn by another engine, a finished file is another file.
    with pytest.raises(UserError, match="finished, of other rows"):
        main(sample, output="there.jsonl", max_new_tokens=5, **one)


def test_best_of_n_scores_the_text_of_a_server_that_tells_no_ids(files, reward_model, tokenizer):
    save_reward_model(reward_model, "rm")

    def answer(path, body):
        if path == "/v1/models":
            return {"data": [{"id": "base"}]}
        if "return_token_ids" in body:
            return 400, {"error": {"message": "unknown field"}}
        return {"choices": [{"text": [" sat", " ran to the"][body["seed"] % 2], "finish_reason": "stop"}]}

    with serving(answer) as asked:
        best("best.jsonl", engine=asked.address)
    rows = read_jsonl("best.jsonl")
    assert [(row["ids"], row["truncated"]) for row in rows] == [([], False)] * 4
    texts = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    expected = score_texts(reward_model.eval(), tokenizer, *texts)
    assert [row["score"] for row in rows] == pytest.approx(expected, abs=1e-5)


ANSWERS = {
    model: [
        {
            "id": i,
            "decoding": "sampled",
            "sample": 0,
            "prompt": prompt,
            "completion": text,
            "ids": [],
            "truncated": False,
        }
        for i, (prompt, text) in enumerate(rows)
    ]
    for model, rows in {"a": [("one", "good"), ("two", "bad")], "b": [("one", "bad"), ("two", "bad")]}.items()
}


def test_a_judge_on_a_server_is_the_judge(files, causal_lm, tokenizer):
    def verdicts(engine, folder):
        judge = LanguageModelJudge(lambda: engine, "{prompt} {a} {b} Better:", folder=files / folder)
        return judge.judgements(ANSWERS, [("a", "b")])

    with serving(vllm("base", causal_lm, tokenizer)) as asked:
        there = verdicts(open_engine(asked.address, "base", load=None), "there")
    assert there == verdicts(Transformers(causal_lm, tokenizer), "here")


def test_a_judge_that_is_asked_by_chat_writes_its_verdict(tmp_path):
    def answer(path, body):
        if path == "/v1/models":
            return {"data": [{"id": "judge"}]}
        first, second = body["messages"][0]["content"].split("|")
        letter = "A or B, I cannot say" if first == second else "A" if first == "good" else "B"
        return {"choices": [{"message": {"content": f"It is {letter}."}, "finish_reason": "stop"}]}

    with serving(answer) as asked:
        engine = open_engine(asked.address, "judge", load=None)
        judge = LanguageModelJudge(lambda: engine, "{a}|{b}{prompt}", folder=tmp_path)
        blank = {model: [{**row, "prompt": ""} for row in rows] for model, rows in ANSWERS.items()}
        found = judge.judgements(blank, [("a", "b"), ("b", "a")])
    assert [(r["preference"], r["consistent"], r["first"]) for r in found] == [
        (1.0, True, 0.5),
        (0.5, True, 0.5),
        (0.0, True, 0.5),
        (0.5, True, 0.5),
    ]
