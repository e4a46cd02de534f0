"""Answers of several turns: a policy learns the assistant's, as TRL's marks of training templates and our own SFT have it."""

import itertools

import pytest
import torch
from datasets import Dataset
from jinja2 import TemplateError

from prefopt import RankedDPOTrainer
from prefopt.evaluation.stages.reward_model import implicit_rewards
from prefopt.rankings.dataset import (
    ComparisonStream,
    RankedCollator,
    prepare_comparisons,
    tokenize_comparisons,
)
from prefopt.rankings.tokens import row_ids
from prefopt.recipes.common.demonstrations import conversation_examples, tokenize_demonstrations
from tests.rankings.test_dataset import assistant, chat_tokenizer_for, user
from tests.trainers.dpo.conftest import config


def tool(text: str) -> dict:
    return {"role": "tool", "content": text}


PROMPT = [user("what is this?")]
CALLS = [assistant("look"), tool("four"), assistant("yes, it is")]
TALK = [assistant("look"), user("and?"), assistant("yes, it is"), user("so"), assistant("done")]
LLAMA = ["<|start_header_id|>", "<|end_header_id|>"]
GLM = ["<|assistant|>", "<|observation|>"]
# Of several tokens one special: what TRL marks is what a policy samples, to its end token. ChatML's marks include a newline.
TEMPLATES = [
    ("llama3_training", "<|eot_id|>", LLAMA, ""),
    ("glm4moe_training", "<|user|>", GLM, ""),
    ("qwen3_instruct_2507_training", "<|im_end|>", ["<|im_start|>"], "\n"),
    ("qwen3_training", "<|im_end|>", ["<|im_start|>"], "\n"),
    ("gemma3_training", "<end_of_turn>", ["<start_of_turn>"], "\n"),
]


def said(tokenizer, completion) -> list[str]:
    _, (ids,), (spans,) = row_ids(tokenizer, PROMPT, [completion], [False], {})
    return [tokenizer.decode(ids[first:last]) for first, last in spans]


@pytest.mark.parametrize("completion", [CALLS, TALK], ids=["tools", "users"])
@pytest.mark.parametrize(("name", "eos", "special", "more"), TEMPLATES, ids=[t[0] for t in TEMPLATES])
def test_what_trl_marks_in_its_training_templates(name, eos, special, more, completion, tokenizer):
    tok = chat_tokenizer_for(name, tokenizer, eos, special)
    how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    try:
        theirs = tok.apply_chat_template(PROMPT + completion, **how)
    except TemplateError:
        # Of a user's turn nothing is refused.
        assert completion is CALLS
        pytest.skip("the template takes no tools")
    marked = list(zip(theirs["input_ids"], theirs["assistant_masks"], strict=True))
    turns = [[i for i, _ in group] for is_said, group in itertools.groupby(marked, lambda x: x[1]) if is_said]
    answers = [turn["content"] for turn in completion if turn["role"] == "assistant"]
    assert said(tok, completion) == [tok.decode(ids).removesuffix(more) for ids in turns]
    assert all(answer in text for answer, text in zip(answers, said(tok, completion), strict=True))
    prompt_ids, (ids,), _ = row_ids(tok, PROMPT, [completion], [False], {})
    assert prompt_ids + ids == theirs["input_ids"][: len(prompt_ids + ids)]


@pytest.mark.parametrize("completion", [CALLS, TALK], ids=["tools", "users"])
def test_what_fine_tuning_on_the_conversation_learns(completion, chat_tokenizer):
    ((ids, labels),) = conversation_examples(chat_tokenizer, PROMPT + completion)
    rows = Dataset.from_list([{"prompt": PROMPT, "completion": completion}])
    (row,) = tokenize_demonstrations(rows, chat_tokenizer, None, "sft")
    assert row == {"input_ids": ids, "labels": labels}
    assert chat_tokenizer.decode([i for i in labels if i != -100]) == "".join(said(chat_tokenizer, completion))


THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


def test_turns_that_a_template_writes_in_another_way_once_the_conversation_goes_on(chat_tokenizer):
    turns = [assistant("hm</think>look"), tool("four"), assistant("so</think>yes")]
    chat_tokenizer.chat_template = THOUGHTS
    assert said(chat_tokenizer, turns) == ["look<|im_end|>", "so</think>yes<|im_end|>"]
    # The template closes a thought that the generation prompt has begun: none of the assistant's words.
    chat_tokenizer.chat_template = OPENED
    assert said(chat_tokenizer, CALLS) == ["look<|im_end|>", "yes, it is<|im_end|>"]
    # No end of turn: the last answer gets the EOS.
    chat_tokenizer.chat_template = NO_END
    assert said(chat_tokenizer, CALLS) == ["look", "yes, it is\n<|im_end|>"]
    assert said(chat_tokenizer, CALLS[:2]) == ["look"]


def test_a_truncated_answer_ends_where_it_is_cut(chat_tokenizer):
    _, (ids,), (spans,) = row_ids(chat_tokenizer, PROMPT, [CALLS], [True], {})
    assert [chat_tokenizer.decode(ids[a:b]) for a, b in spans] == ["look<|im_end|>", "yes, it is"]
    assert spans[-1][1] == len(ids)


ROWS = [
    {"prompt": PROMPT, "completions": [CALLS, TALK], "ranks": [1, 2]},
    {"prompt": PROMPT, "completions": [[assistant("a dog")], [assistant("a cat")], CALLS], "ranks": [1, 2, 3]},
]


def test_only_rows_of_several_messages_have_spans_and_they_stay_with_their_completion(chat_tokenizer):
    whole = tokenize_comparisons(prepare_comparisons(Dataset.from_list(ROWS)), chat_tokenizer)
    assert [len(spans) for spans in whole[0]["assistant_spans"]] == [2, 3]
    assert whole[1]["assistant_spans"][0] == [[0, len(whole[1]["completion_ids"][0])]]
    longest = len(whole[1]["prompt_ids"]) + len(whole[1]["completion_ids"][0])
    fitting = tokenize_comparisons(whole, chat_tokenizer, max_length=longest)
    assert fitting[0]["assistant_spans"] == whole[1]["assistant_spans"][:2]
    stream = ComparisonStream(Dataset.from_list(ROWS).to_iterable_dataset(), chat_tokenizer)
    assert [row["assistant_spans"] for row in itertools.islice(stream, 2)] == whole["assistant_spans"][:]
    plain = [{"prompt": PROMPT, "completions": [[assistant("a dog")], [assistant("a cat")]], "ranks": [1, 2]}]
    assert "assistant_spans" not in tokenize_comparisons(prepare_comparisons(plain), chat_tokenizer).column_names


@pytest.mark.parametrize("share", [True, False], ids=["prefixes shared", "rows"])
def test_dpo_learns_what_the_assistant_says_alone(share, causal_lm, chat_tokenizer, tmp_path):
    trainer = RankedDPOTrainer(
        causal_lm,
        args=config(tmp_path, prefix_sharing=share),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=chat_tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        values = trainer._measure(trainer.model, batch)
    rows = {len(row["ranks"]): row for row in trainer.train_dataset}
    for b, ranks in enumerate(batch["ranks"]):
        row = rows[int((ranks > 0).sum())]
        for k, completion in enumerate(row["completions"]):
            ids = row["prompt_ids"] + row["completion_ids"][k]
            with torch.no_grad():
                logps = causal_lm(torch.tensor([ids])).logits[0].log_softmax(-1)
            _, labels = conversation_examples(chat_tokenizer, PROMPT + completion)[0]
            expected = sum(logps[t - 1, label] for t, label in enumerate(labels) if label != -100)
            assert values["log_probs"][b, k].item() == pytest.approx(expected.item(), abs=1e-4)
            assert batch["completion_mask"][b, k].sum() == sum(label != -100 for label in labels)
    perturbed = trainer.model
    with torch.no_grad():
        for parameter in perturbed.parameters():
            parameter.mul_(1.1)
    scores = trainer.score([PROMPT] * 2, [CALLS, TALK])
    of_evaluation = implicit_rewards(perturbed, trainer.ref_model, chat_tokenizer, ROWS[:1], beta=trainer.beta)
    assert scores == pytest.approx(of_evaluation[0], rel=1e-4)
    assert min(map(abs, scores)) > 1e-3


def test_answers_that_differ_in_the_words_of_a_tool_alone_have_nothing_to_teach_a_policy(
    causal_lm, chat_tokenizer, tmp_path
):
    good, bad = ([assistant("look"), tool(text)] for text in ("four", "nine nine"))
    trainer = RankedDPOTrainer(
        causal_lm,
        args=config(tmp_path, max_steps=3, learning_rate=1e-2),
        train_dataset=Dataset.from_list([{"prompt": PROMPT, "completions": [good, bad], "ranks": [1, 2]}]),
        processing_class=chat_tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx([0.693147] * 3, abs=1e-5)


def test_the_mask_of_rows_with_spans():
    row = {"prompt_ids": [1], "completion_ids": [[2, 3, 4], [5, 6]], "ranks": [1, 2]}
    batch = RankedCollator(0)([{**row, "assistant_spans": [[[0, 1], [2, 3]], [[1, 2]]]}])
    assert batch["completion_mask"].int().tolist() == [[[0, 1, 0, 1], [0, 0, 1, 0]]]
