"""What a row gives the chat template (`tools`, `documents`, `chat_template_kwargs`) reaches every step that asks a policy."""

import pytest
from transformers import LlamaForCausalLM

from prefopt.evaluation.run import EvaluationArguments, EvaluationRun
from prefopt.evaluation.stages import drift
from prefopt.evaluation.stages import generate as generation
from prefopt.inference.generate import Completion
from prefopt.inference.jsonl import read_jsonl, write_jsonl
from prefopt.inference.scoring import score_ids, score_rows, score_samples
from prefopt.models.checkpoints import load_reward_model, save_reward_model
from prefopt.rankings.tokens import build_ids, template_kwargs
from prefopt.recipes import best_of_n, sample

pytestmark = pytest.mark.slow

# As templates of models with tools and documents have it.
FIELDS = "{% for t in tools or [] %}T{{ t | tojson }}{% endfor %}{% for d in documents or [] %}D{{ d.text }}{% endfor %}{{ mood }}"
PROMPT = [{"role": "user", "content": "the cat"}]
ROWS = [
    {"prompt": PROMPT, "tools": [{"name": "find", "parameters": {"a": {"type": "string"}}}]},
    {"prompt": PROMPT, "tools": [{"name": "add", "parameters": {"b": {"type": "integer"}}}]},
    {"prompt": PROMPT, "documents": [{"text": "red"}]},
    {"prompt": PROMPT, "chat_template_kwargs": {"mood": "glad"}},
    {"prompt": PROMPT, "tools": '[{"name": "find"}]', "documents": None},
]


@pytest.fixture
def files(tmp_path, causal_lm, chat_tokenizer, reward_model):
    chat_tokenizer.chat_template = FIELDS + chat_tokenizer.chat_template
    causal_lm.save_pretrained(tmp_path / "sft")
    save_reward_model(reward_model, tmp_path / "rm")
    for name in ("sft", "rm"):
        chat_tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


@pytest.fixture
def asked(monkeypatch, chat_tokenizer):
    """The prompts that a policy is fed, as texts."""
    texts, real = set(), LlamaForCausalLM.generate

    def watched(model, input_ids, attention_mask, **kwargs):
        for ids, mask in zip(input_ids, attention_mask.bool(), strict=True):
            texts.add(chat_tokenizer.decode(ids[mask]))
        return real(model, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "generate", watched)
    return texts


def expected(tokenizer, rows):
    texts = {tokenizer.decode(build_ids(tokenizer, row["prompt"], ".", **template_kwargs(row))[0]) for row in rows}
    assert len(texts) == len(rows)
    assert all("null" not in text for text in texts)
    return texts


def options(files, **more):
    write_jsonl(files / "prompts.jsonl", ROWS[:4])
    keys = {
        "model_name_or_path": files / "sft",
        "dataset_name": files / "prompts.jsonl",
        "output": files / "out.jsonl",
        "max_new_tokens": 4,
        **more,
    }
    return [str(x) for key, value in keys.items() for x in (f"--{key}", value)]


def test_the_fields_themselves(chat_tokenizer):
    assert [set(template_kwargs(row)) for row in ROWS] == [{"tools"}, {"tools"}, {"documents"}, {"mood"}, {"tools"}]
    # A column of this name that is no list of documents is none of the template's.
    assert template_kwargs({"documents": ["red"]}) == template_kwargs({"documents": "red"}) == {}


def test_sample(files, asked, chat_tokenizer):
    sample.main(options(files, k_min=2, k_max=2))
    assert asked == expected(chat_tokenizer, ROWS[:4])


def test_best_of_n(files, asked, chat_tokenizer):
    best_of_n.main(options(files, n=2, reward_model_name_or_path=files / "rm"))
    assert asked == expected(chat_tokenizer, ROWS[:4])
    rows = read_jsonl(files / "out.jsonl")
    judge = load_reward_model(files / "rm")
    ids = [build_ids(chat_tokenizer, PROMPT, ".", **template_kwargs(row))[0] + row["ids"] for row in rows]
    assert [row["score"] for row in rows] == pytest.approx(score_ids(judge, ids, batch_size=1), abs=1e-5)
    others = [score_rows(judge, chat_tokenizer, [{**row, "completions": ["a", "b"]}])[0][0] for row in ROWS]
    assert len({round(score, 6) for score in others}) == len(ROWS)


def test_evaluation(files, asked, chat_tokenizer):
    args = EvaluationArguments(
        models={"sft": str(files / "sft"), "other": str(files / "sft")}, baseline="sft", output_dir=str(files / "eval")
    )
    run = EvaluationRun(files / "eval")
    generation.measure(run, args, generation.GenerateArguments(prompts=ROWS, max_new_tokens=4, greedy=False))
    assert asked == expected(chat_tokenizer, ROWS)
    drift.measure(run, args, drift.DriftArguments())
    # Of the same weights, so it is 0 only if the ids are those that were sampled.
    sums = [sum(row["k1"]) for row in read_jsonl(files / "eval" / "drift" / "other.jsonl")]
    assert sums == pytest.approx([0] * len(ROWS), abs=1e-5)


def test_scores_of_samples_in_words_read_the_fields_too(files, chat_tokenizer):
    judge, completion = load_reward_model(files / "rm"), Completion("red", [], False)
    prompts, of_rows = [row["prompt"] for row in ROWS], [template_kwargs(row) for row in ROWS]
    scores = score_samples(judge, chat_tokenizer, None, prompts, [completion] * len(ROWS), of_rows=of_rows)
    answer = [{"role": "assistant", "content": "red"}]
    rows = [{**row, "completions": [answer, answer]} for row in ROWS]
    assert scores == pytest.approx([of_row[0] for of_row in score_rows(judge, chat_tokenizer, rows)], abs=1e-5)
