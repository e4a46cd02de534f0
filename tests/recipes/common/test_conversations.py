"""Chat rows of several turns in every step: loss masks written out by hand, prompts, demonstrations, implicit prompts."""

import re

import pytest
from datasets import Dataset
from trl import SFTConfig

from prefopt.errors import UserError
from prefopt.inference.jsonl import write_jsonl
from prefopt.rankings.checks import validate_comparisons
from prefopt.rankings.dataset import prepare_comparisons, tokenize_comparisons
from prefopt.rankings.tokens import build_ids
from prefopt.recipes import sft
from prefopt.recipes.common.conversations import (
    demonstrations_from_messages,
    prompts_from_messages,
)
from prefopt.recipes.common.demonstrations import (
    check_sft_rows,
    conversation_examples,
    rated_demonstrations,
    tokenize_demonstrations,
)
from prefopt.recipes.common.rows import load_rows
from prefopt.recipes.sft import SFTArguments, load_sft_rows


def say(*turns):
    """Messages from "role: content"."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


TWO_TURNS = say("system: be kind", "user: what is this?", "assistant: a dog", "user: red?", "assistant: the cat")
OPENING = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nwhat is this?<|im_end|>\n<|im_start|>assistant\n"
BETWEEN = "\n<|im_start|>user\nred?<|im_end|>\n<|im_start|>assistant\n"
# Thoughts are shown in the last turn only, as Qwen3's template does.
THOUGHTFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}(hm) {% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def by_hand(tokenizer, *segments):
    """Token ids and labels of (text, whether it counts)."""
    ids, labels = [], []
    for text, counts in segments:
        of_text = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += of_text
        labels += of_text if counts else [-100] * len(of_text)
    return ids, labels


# ---- SFT: what the loss is on ----
def test_loss_on_all_answers(chat_tokenizer):
    expected = by_hand(
        chat_tokenizer,
        (OPENING, False),
        ("a dog<|im_end|>", True),
        (BETWEEN, False),
        ("the cat<|im_end|>", True),
    )
    assert conversation_examples(chat_tokenizer, TWO_TURNS) == [expected]


def test_loss_on_the_last_answer(chat_tokenizer):
    before = OPENING + "a dog<|im_end|>" + BETWEEN
    expected = by_hand(chat_tokenizer, (before, False), ("the cat<|im_end|>", True))
    assert conversation_examples(chat_tokenizer, TWO_TURNS, "last") == [expected]


def test_what_stands_behind_the_last_answer_is_left_off(chat_tokenizer):
    open_ended = TWO_TURNS + say("user: and the mat?")
    assert conversation_examples(chat_tokenizer, open_ended) == conversation_examples(chat_tokenizer, TWO_TURNS)


def test_an_assistant_that_speaks_first_answers_nothing(chat_tokenizer):
    greeted = say("assistant: hi", "user: what is this?", "assistant: a dog")
    before = "<|im_start|>assistant\nhi<|im_end|>\n<|im_start|>user\nwhat is this?<|im_end|>\n<|im_start|>assistant\n"
    expected = by_hand(chat_tokenizer, (before, False), ("a dog<|im_end|>", True))
    assert conversation_examples(chat_tokenizer, greeted) == [expected]


def test_a_template_that_rewrites_earlier_answers_gives_an_example_for_each(chat_tokenizer, caplog):
    chat_tokenizer.chat_template = THOUGHTFUL
    first = by_hand(chat_tokenizer, (OPENING, False), ("(hm) a dog<|im_end|>", True))
    second = by_hand(chat_tokenizer, (OPENING + "a dog<|im_end|>" + BETWEEN, False), ("(hm) the cat<|im_end|>", True))
    assert conversation_examples(chat_tokenizer, TWO_TURNS) == [first, second]
    rows = Dataset.from_list([{"messages": TWO_TURNS}])
    tokenized = tokenize_demonstrations(rows, chat_tokenizer, None, "train")
    assert tokenized["input_ids"][:] == [first[0], second[0]]
    assert tokenized["labels"][:] == [first[1], second[1]]
    assert "1 conversations make 2 examples" in caplog.text


def test_every_answer_is_learned_with_the_ids_that_the_policy_samples(chat_tokenizer):
    ((ids, labels),) = conversation_examples(chat_tokenizer, TWO_TURNS)
    for turn in (2, 4):
        prompt_ids, completion_ids = build_ids(chat_tokenizer, TWO_TURNS[:turn], [TWO_TURNS[turn]])
        start, end = len(prompt_ids), len(prompt_ids) + len(completion_ids)
        assert ids[:end] == prompt_ids + completion_ids
        assert labels[start:end] == completion_ids


def test_too_long_conversations_are_dropped_with_a_count(chat_tokenizer, caplog):
    rows = Dataset.from_list([{"messages": TWO_TURNS}, {"messages": TWO_TURNS[1:3]}])
    ((short, _),) = conversation_examples(chat_tokenizer, TWO_TURNS[1:3])
    kept = tokenize_demonstrations(rows, chat_tokenizer, len(short), "train")
    assert kept["input_ids"][:] == [short]
    assert "dropped 1 of 2 examples" in caplog.text


def test_a_call_is_learned_with_the_arguments_it_was_written_with(chat_tokenizer):
    """In a column of Arrow every call has the arguments of all, those of the others as null."""
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace(
        "{{ m['content'] }}", "{{ m['content'] or m['tool_calls'][0]['function']['arguments'] | tojson }}"
    )
    rows = []
    for arguments in ({"city": "Rome"}, {"sum": "1 + 1", "digits": 2}):
        call = {"type": "function", "function": {"name": "ask", "arguments": arguments}}
        rows.append([*say("user: red?"), {"role": "assistant", "content": None, "tool_calls": [call]}])
    written = Dataset.from_dict({"messages": rows})
    assert written[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["sum"] is None
    learned = tokenize_demonstrations(written, chat_tokenizer, None, "chats.jsonl")["labels"]
    assert [chat_tokenizer.decode([i for i in labels if i >= 0]) for labels in learned] == [
        '{"city": "Rome"}<|im_end|>',
        '{"sum": "1 + 1", "digits": 2}<|im_end|>',
    ]
    later = Dataset.from_dict({"prompt": [chat + say("tool: 17", "user: the mat?") for chat in rows]})
    of_row = build_ids(chat_tokenizer, later[0]["prompt"], "no")[0]
    assert '{"city": "Rome"}<|im_end|>' in chat_tokenizer.decode(of_row)


def test_tools_of_a_row_reach_the_template(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ tools[0]['name'] if tools else '' }}" + chat_tokenizer.chat_template
    rows = Dataset.from_list([{"messages": TWO_TURNS[1:3], "tools": '[{"name": "the house"}]'}])
    (ids,) = tokenize_demonstrations(rows, chat_tokenizer, None, "train")["input_ids"]
    assert chat_tokenizer.decode(ids).startswith("the house<|im_start|>user")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": say("user: hi")}], r"chats row 0: field 'messages': expected an assistant's answer"),
        ([{"messages": TWO_TURNS}, {"messages": "hi"}], r"chats row 1: field 'messages': expected messages"),
        ([{"messages": [{"role": "user"}]}], r"expected messages with 'role' and 'content'"),
        ([{"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2]}], "rated_dataset_name"),
    ],
)
def test_bad_rows_of_sft(rows, message):
    with pytest.raises(ValueError, match=message):
        check_sft_rows(rows, "chats")


# ---- SFT on outputs that labelers rated well ----
def test_outputs_rated_seven_are_demonstrations(caplog):
    rows = [
        {
            "prompt": "a",
            "completions": ["x", "y", "z"],
            "ratings": [7, 3, 7],
            "truncated": [False, False, True],
        },
        {"prompt": "a", "completions": ["x", "y", "z"], "ratings": [7, 6, 5], "truncated": None},
        {"prompt": "b", "completions": ["x", "y"], "ratings": None, "truncated": None},
    ]
    found = rated_demonstrations(Dataset.from_list(rows), 7, "rankings.jsonl")
    assert found.to_list() == [
        {"prompt": "a", "completion": "x", "truncated": False},
        {"prompt": "a", "completion": "z", "truncated": True},
    ]
    assert "3 of 6 rated outputs are rated 7 or more, 1 of them repeated; 1 of 3 rows have no" in caplog.text
    assert len(rated_demonstrations(Dataset.from_list(rows), 6, "rankings.jsonl")) == 3
    with pytest.raises(ValueError, match=r"none of 6 rated outputs is rated 7.5 or more .1 of 3 rows"):
        rated_demonstrations(Dataset.from_list(rows), 7.5, "rankings.jsonl")


def test_a_cut_output_gets_no_end_token(tokenizer):
    rows = Dataset.from_list([{"prompt": "the", "completion": " cat", "truncated": cut} for cut in (True, False)])
    cut, whole = tokenize_demonstrations(rows, tokenizer, None, "rated")["input_ids"]
    assert whole == [*cut, tokenizer.eos_token_id]


def test_rated_outputs_alone_or_beside_demonstrations(tmp_path):
    ranked = {"prompt": "a", "completions": ["x", "y"], "ranks": [1, 2], "ratings": [7, 3]}
    write_jsonl(tmp_path / "rankings.jsonl", [ranked])
    write_jsonl(tmp_path / "demos.jsonl", [{"prompt": "b", "completion": "z"}])
    given = {"rated_dataset_name": str(tmp_path / "rankings.jsonl")}
    args = SFTConfig(output_dir=str(tmp_path), bf16=False, report_to="none")
    train, _, beside = load_sft_rows(SFTArguments(**given), args)
    assert (train["completion"][:], beside) == (["x"], None)
    train, _, beside = load_sft_rows(SFTArguments(dataset_name=str(tmp_path / "demos.jsonl"), **given), args)
    assert (train["completion"][:], beside["completion"][:]) == (["z"], ["x"])
    with pytest.raises(UserError, match=r"none of 2 rated outputs is rated 8 or more"):
        load_sft_rows(SFTArguments(**given, min_rating=8), args)


@pytest.mark.parametrize("key", ["--assistant_only_loss", "--completion_only_loss"])
def test_trls_words_for_what_the_loss_is_on_name_ours(key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="say it with loss_on"):
        sft.main(["--model_name_or_path", "x", "--dataset_name", "y", key, "true", "--report_to", "none"])


# ---- prompts and demonstrations ----
@pytest.mark.parametrize("as_rows", [list, Dataset.from_list])
def test_prompts_end_with_the_last_user_turn(as_rows, caplog):
    rows = as_rows(
        [
            {"id": 0, "messages": TWO_TURNS, "prompt": "what is this?"},
            {"id": 1, "messages": TWO_TURNS[:4], "prompt": "what is this?"},
        ]
    )
    prompts = prompts_from_messages(rows, "chats")
    assert [row["prompt"] for row in prompts] == [TWO_TURNS[:4], TWO_TURNS[:4]]
    assert [row["id"] for row in prompts] == [0, 1]
    assert all("messages" not in row for row in prompts)
    assert "left off in 1 of 2 conversations" in caplog.text


def test_a_prompt_of_messages_stays():
    rows = [{"prompt": say("user: hi"), "messages": TWO_TURNS}]
    assert prompts_from_messages(rows, "chats") is rows


def test_a_conversation_without_a_user_is_no_prompt():
    rows = [{"messages": TWO_TURNS}, {"messages": say("system: be kind", "assistant: hi")}]
    with pytest.raises(ValueError, match="chats row 1: field 'messages': expected a user turn"):
        prompts_from_messages(rows, "chats")


@pytest.mark.parametrize("as_rows", [list, Dataset.from_list])
def test_the_last_answer_is_the_demonstration(as_rows):
    rows = demonstrations_from_messages(as_rows([{"messages": TWO_TURNS, "prompt": "what is this?"}]), "chats")
    assert [dict(row) for row in rows] == [{"prompt": TWO_TURNS[:4], "completion": TWO_TURNS[4:]}]


# ---- TRL's preference rows ----
@pytest.mark.parametrize("as_rows", [list, Dataset.from_list])
@pytest.mark.parametrize("extra", [{}, {"prompt": "what is this?"}])
def test_an_implicit_prompt_is_that_of_the_same_row_with_its_prompt(as_rows, extra, chat_tokenizer):
    better, worse = say("assistant: the cat"), say("assistant: a dog ran")
    pair = {"chosen": TWO_TURNS[:4] + better, "rejected": TWO_TURNS[:4] + worse, "margin": 1.5, **extra}
    implicit = as_rows([pair])
    validate_comparisons(implicit, "pairs")
    explicit = [{"prompt": TWO_TURNS[:4], "chosen": better, "rejected": worse, "margin": 1.5}]
    ours, theirs = (tokenize_comparisons(prepare_comparisons(rows), chat_tokenizer) for rows in (implicit, explicit))
    for name in ("prompt_ids", "completion_ids", "ranks", "ratings"):
        assert ours[name][:] == theirs[name][:]


def test_pairs_without_a_common_turn_stop(tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", [{"chosen": say("user: a", "assistant: b"), "rejected": say("user: c")}])
    with pytest.raises(UserError, match="row 0: expected 'chosen' and 'rejected' that begin with the same turns"):
        load_rows(str(tmp_path / "pairs.jsonl"), key="dataset_name", check=validate_comparisons)


@pytest.mark.parametrize("as_rows", [list, Dataset.from_list])
@pytest.mark.parametrize("apart", [("red", "cat"), ("redder", "redness")])
def test_texts_are_split_between_words_and_have_the_ids_of_the_whole_text(as_rows, apart, tokenizer):
    texts = [f"what is {word}" for word in apart]
    rows = prepare_comparisons(as_rows([{"chosen": texts[0], "rejected": texts[1]}]))
    assert (rows[0]["prompt"], rows[0]["completions"]) == ("what is", [f" {word}" for word in apart])
    row = tokenize_comparisons(rows, tokenizer)[0]
    for text, ids in zip(texts, row["completion_ids"], strict=True):
        assert row["prompt_ids"] + ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


def test_a_text_prompt_beside_messages_is_the_users(chat_tokenizer):
    pair = {"prompt": "what is this?", "chosen": say("assistant: a dog"), "rejected": say("assistant: the cat")}
    explicit = {**pair, "prompt": say("user: what is this?")}
    ours, theirs = (
        tokenize_comparisons(prepare_comparisons(Dataset.from_list([row] * 2)), chat_tokenizer)
        for row in (pair, explicit)
    )
    assert ours["prompt"][:] == theirs["prompt"][:]
    assert ours["prompt_ids"][:] == theirs["prompt_ids"][:]
    assert ours["completion_ids"][:] == theirs["completion_ids"][:]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "Yes", "rejected": "No"}, "expected 'chosen' and 'rejected' that begin with the same words"),
        (
            {"chosen": "a b", "rejected": "a c", "question": "what?"},
            "field 'prompt': expected a text or messages, got nothing, but a field 'question'",
        ),
        (
            {"prompt": "a", "chosen": say("user: a", "assistant: b"), "rejected": say("user: c", "assistant: b")},
            "that begin with the same turns, as the prompt beside them is a text",
        ),
    ],
)
@pytest.mark.parametrize("as_rows", [list, Dataset.from_list])
def test_pairs_whose_prompt_is_nowhere_stop(as_rows, row, message):
    with pytest.raises(UserError, match=f"train row 0: .*{re.escape(message)}"):
        prepare_comparisons(as_rows([row]))
