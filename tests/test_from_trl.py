"""docs/from_trl.md: every row of its tables is run, on rows in that schema."""

import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from prefopt import RankedDPOConfig, RankedDPOTrainer, RankedRewardConfig, RankedRewardTrainer, cli
from prefopt.inference.jsonl import read_jsonl, write_jsonl
from prefopt.models.checkpoints import save_reward_model
from prefopt.rankings.dataset import prepare_comparisons, tokenize_comparisons
from tests.conftest import tiny_config
from tests.trainers.conftest import settings

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "from_trl.md").read_text(encoding="utf-8")
ASK, SYSTEM, GOOD, BAD = "what is this?", "the red house", "a dog", "the mat"


def table(heading: str) -> list[list[str]]:
    """The cells of the rows below a line of headings."""
    lines = PAGE[PAGE.index(heading) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def of(role: str, text: str) -> dict:
    return {"role": role, "content": text}


def sharegpt(who: str, text: str) -> dict:
    return {"from": who, "value": text}


def in_parts(*turns: dict) -> list[dict]:
    return [{**turn, "content": [{"type": "text", "value": turn["content"]}], "loss_weight": 1.0} for turn in turns]


USER, GOOD_TURN, BAD_TURN = of("user", ASK), of("assistant", GOOD), of("assistant", BAD)
GOOD_CHAT, BAD_CHAT = [USER, GOOD_TURN], [USER, BAD_TURN]
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]
# Of each row of the table: rows of a file, and what a model is to read before the answers.
ROWS = {
    "TRL, preference": ([{"prompt": [USER], "chosen": [GOOD_TURN], "rejected": [BAD_TURN]}], [ASK]),
    "TRL, preference without a prompt": ([{"chosen": GOOD_CHAT, "rejected": BAD_CHAT}], [ASK]),
    "TRL, tool calls": (
        [{"prompt": [USER], "chosen": [GOOD_TURN], "rejected": [BAD_TURN], "tools": TOOLS}],
        ["find", ASK],
    ),
    "TRL, unpaired (KTO)": (
        [{"prompt": [USER], "completion": [turn], "label": turn is GOOD_TURN} for turn in (BAD_TURN, GOOD_TURN)],
        [ASK],
    ),
    "TRL, prompt-completion": ([{"prompt": [USER], "completion": [GOOD_TURN]}], [ASK]),
    "TRL, language modeling": ([{"messages": GOOD_CHAT}], [ASK]),
    "TRL, prompt-only": ([{"prompt": [USER]}] * 2, [ASK]),
    "LLaMA-Factory, Alpaca": (
        [{"instruction": ASK, "input": "a cat", "output": GOOD, "system": SYSTEM, "history": [["one", "two"]]}],
        [SYSTEM, "one", "two", f"{ASK}\na cat"],
    ),
    "LLaMA-Factory, ShareGPT": (
        [
            {
                "conversations": [sharegpt("human", ASK), sharegpt("gpt", GOOD)],
                "system": SYSTEM,
                "tools": json.dumps(TOOLS),
            }
        ],
        ["find", SYSTEM, ASK],
    ),
    "LLaMA-Factory, Alpaca preference": (
        [{"instruction": ASK, "input": "a cat", "chosen": GOOD, "rejected": BAD}],
        [f"{ASK}\na cat"],
    ),
    "LLaMA-Factory, ShareGPT preference": (
        [
            {
                "conversations": [sharegpt("human", ASK)],
                "chosen": sharegpt("gpt", GOOD),
                "rejected": sharegpt("gpt", BAD),
            }
        ],
        [ASK],
    ),
    "LLaMA-Factory, version 1": (
        [{"chosen_messages": in_parts(*GOOD_CHAT), "rejected_messages": in_parts(*BAD_CHAT)}],
        [ASK],
    ),
    "LLaMA-Factory, comparison_gpt4": ([{"instruction": ASK, "input": "", "output": [GOOD, BAD]}], [ASK]),
    "LLaMA-Factory, KTO (ShareGPT)": (
        [{"messages": GOOD_CHAT, "label": True}, {"messages": BAD_CHAT, "label": False}],
        [ASK],
    ),
    "LLaMA-Factory, KTO (Alpaca)": (
        [{"instruction": ASK, "input": "", "output": text, "kto_tag": text == GOOD} for text in (GOOD, BAD)],
        [ASK],
    ),
    "axolotl, chatml.intel": ([{"system": SYSTEM, "question": ASK, "chosen": GOOD, "rejected": BAD}], [SYSTEM, ASK]),
    "axolotl, chatml.icr, bradley_terry": (
        [{"system": SYSTEM, "input": ASK, "chosen": GOOD, "rejected": BAD}],
        [SYSTEM, ASK],
    ),
    "axolotl, chatml.argilla": ([{"instruction": ASK, "chosen_response": GOOD, "rejected_response": BAD}], [ASK]),
    "axolotl, chatml.prompt_pairs": (
        [{"system": SYSTEM, "prompt": ASK, "chosen": GOOD, "rejected": BAD}],
        [SYSTEM, ASK],
    ),
    "axolotl, chatml.ultra": (
        [{"system": SYSTEM, "prompt": ASK, "chosen": GOOD_CHAT, "rejected": BAD_CHAT}],
        [SYSTEM, ASK],
    ),
    "axolotl, chat_template.default": ([{"messages": [USER], "chosen": GOOD_TURN, "rejected": BAD_TURN}], [ASK]),
    "axolotl, zephyr.nectar": (
        [
            {
                "prompt": f"\n\nHuman: {ASK}\n\nAssistant: ",
                "answers": [{"answer": text, "model": "m", "rank": rank} for text, rank in ((GOOD, 1.0), (BAD, 2.0))],
            }
        ],
        [ASK],
    ),
    "axolotl, chat_template": ([{"conversations": [sharegpt("human", ASK), sharegpt("gpt", GOOD)]}], [ASK]),
    "OpenRLHF, preference": ([{"prompt": f"{ASK} ", "chosen": GOOD, "rejected": BAD, "margin": 2.0}], [ASK]),
    "OpenRLHF, preference with scores": (
        [{"chosen": GOOD_CHAT, "rejected": BAD_CHAT, "chosen_score": 4.0, "rejected_score": 1.0}],
        [ASK],
    ),
    "OpenRLHF, SFT": ([{"input": ASK, "output": GOOD}], [ASK]),
    "alignment-handbook, ultrafeedback_binarized": (
        [
            {
                "prompt": ASK,
                "chosen": GOOD_CHAT,
                "rejected": BAD_CHAT,
                "messages": GOOD_CHAT,
                "score_chosen": 8.0,
                "score_rejected": 4.5,
            }
        ],
        [ASK],
    ),
    "alignment-handbook, ultrachat_200k": ([{"prompt": ASK, "prompt_id": "1", "messages": GOOD_CHAT}], [ASK]),
    "alignment-handbook, smoltalk2": (
        [
            {
                "prompt": [USER],
                "chosen": [GOOD_TURN],
                "rejected": [BAD_TURN],
                "chat_template_kwargs": {"custom_instructions": "bark"},
            }
        ],
        ["bark", ASK],
    ),
    "RLHFlow, scored answers": ([{"prompt": [USER], "responses": [BAD, GOOD], "rewards": [-1.5, 0.25]}], [ASK]),
    "distilabel, scored answers": ([{"instruction": ASK, "generations": [BAD, GOOD], "ratings": [2, 5]}], [ASK]),
    "UltraFeedback and its kin": (
        [{"instruction": ASK, "completions": [{"response": BAD, "score": 2}, {"response": GOOD, "score": 5}]}],
        [ASK],
    ),
    "LMArena, votes": ([{"conversation_a": BAD_CHAT, "conversation_b": GOOD_CHAT, "winner": "model_b"}], [ASK]),
    "LMArena, 55k": (
        [
            {
                "prompt": json.dumps([ASK]),
                "response_a": json.dumps([BAD]),
                "response_b": json.dumps([GOOD]),
                "winner_model_a": 0,
                "winner_model_b": 1,
                "winner_tie": 0,
            }
        ],
        [ASK],
    ),
    "any, answers with a score each": ([{"prompt": f"{ASK} ", "responses": [BAD, GOOD], "scores": [0.1, 0.9]}], [ASK]),
}
TABLE = table("| from | rows | here |")


class Begins(Exception):
    """Training would begin now."""


@pytest.fixture
def workshop(tmp_path, monkeypatch, chat_tokenizer):
    monkeypatch.chdir(tmp_path)
    chat_tokenizer.chat_template = (
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{{ custom_instructions }}"
        + chat_tokenizer.chat_template
    )
    LlamaForCausalLM(tiny_config()).save_pretrained("sft")
    save_reward_model(LlamaForSequenceClassification(tiny_config(num_labels=1)), "rm")
    for name in ("sft", "rm"):
        chat_tokenizer.save_pretrained(name)

    def begins(trainer):
        raise Begins(trainer)

    monkeypatch.setattr("prefopt.recipes.common.training.show_progress", begins)
    return tmp_path


def trained_on(command: str, arguments: list[str]):
    """The trainer, as it is when it is to begin."""
    more = {"model_name_or_path": "sft", "output_dir": "out", "report_to": "none", "use_cpu": "true"}
    more |= {"per_device_train_batch_size": "2", "max_steps": "1"}
    if command == "ppo-ptx":
        more |= {"reward_model_name_or_path": "rm", "ptx_coef": "0", "max_completion_length": "4"}
    module = import_module(f"prefopt.recipes.{command.replace('-', '_')}")
    with pytest.raises(Begins) as begun:
        module.main([*arguments, *(word for key, value in more.items() for word in (f"--{key}", value))])
    return begun.value.args[0]


def _keys(values: list) -> set[str]:
    return {key for value in values if isinstance(value, dict) for key in value}


def test_the_table_has_the_rows_that_are_run():
    assert [cells[0] for cells in TABLE] == list(ROWS)
    for name, columns, _ in TABLE:
        of_file = set().union(*ROWS[name][0])
        # Of answers that are objects, also their fields.
        of_file |= {key for value in ROWS[name][0][0].values() if isinstance(value, list) for key in _keys(value)}
        assert set(re.findall(r"`(\w+)`", columns)) <= of_file | (
            {"messages"} if "or `messages`" in columns else set()
        )


@pytest.mark.parametrize("cells", TABLE, ids=[cells[0] for cells in TABLE])
def test_a_row_of_the_table(cells, workshop, chat_tokenizer, capsys):
    rows, before = ROWS[cells[0]]
    write_jsonl("file.jsonl", rows)
    program, command, *arguments = shlex.split(cells[2].strip("`").replace("FILE", "file.jsonl"))
    assert program == "prefopt"
    if command == "data":
        assert cli.main([command, *arguments]) == 0
        ids = tokenize_comparisons(prepare_comparisons(read_jsonl("rankings.jsonl")), chat_tokenizer)
    elif command == "ppo-ptx":
        trainer = trained_on(command, arguments)
        assert [row["prompt"] for row in trainer.train_dataset] == [row["prompt"] for row in rows]
        return
    else:
        ids = trained_on(command, arguments).train_dataset
    if command == "sft":
        (row,) = ids
        answer = next(i for i, label in enumerate(row["labels"]) if label != -100)
        prompt, completions = chat_tokenizer.decode(row["input_ids"][:answer]), [row["labels"][answer:]]
    else:
        (row,) = ids
        prompt, completions = chat_tokenizer.decode(row["prompt_ids"]), row["completion_ids"]
        completions = [ids for _, ids in sorted(zip(row["ranks"], completions, strict=True))]
    places = [prompt.find(text) for text in before]
    assert -1 not in places
    assert places == sorted(places)
    answers = [chat_tokenizer.decode(ids).removesuffix("<|im_end|>") for ids in completions]
    assert answers == ([GOOD] if command == "sft" else [GOOD, BAD])


@pytest.mark.parametrize("name", [name for name, (rows, _) in ROWS.items() if {"label", "kto_tag"} & rows[0].keys()])
def test_answers_that_are_bad_are_not_learned(name, workshop):
    write_jsonl("file.jsonl", ROWS[name][0])
    with pytest.raises(SystemExit, match=r"row [01]: the answers of 1 of 2 rows are labeled false") as error:
        cli.main(
            ["sft", "--model_name_or_path", "sft", "--dataset_name", "file.jsonl", "--output_dir", "out", "--use_cpu"]
        )
    assert "`prefopt data convert file.jsonl --out rankings.jsonl`" in str(error.value)


@pytest.mark.parametrize("cells", TABLE, ids=[cells[0] for cells in TABLE])
def test_validate_says_what_the_table_says(cells, workshop, capsys):
    """Rows that are to be converted are refused with that command; others are as they should be."""
    write_jsonl("file.jsonl", ROWS[cells[0]][0])
    if "data convert" not in cells[2] or cells[0] == "OpenRLHF, preference with scores":
        assert cli.main(["data", "validate", "file.jsonl"]) == 0
        assert "all as they should be" in capsys.readouterr().out
        return
    command = cells[2].strip("`").replace("FILE", "file.jsonl")
    with pytest.raises(SystemExit, match=re.escape(f"`{command}` reads it")):
        cli.main(["data", "validate", "file.jsonl"])


# TRL's three forms of preference rows, the last with the prompt and without.
FORMS = {
    "text": {"prompt": "what is", "chosen": " a dog", "rejected": " a red house"},
    "text without a prompt": {"chosen": "what is a dog", "rejected": "what is a red house"},
    "text that parts inside a word": {"chosen": "the red house", "rejected": "the redder house"},
    "messages": {"prompt": [USER], "chosen": [GOOD_TURN], "rejected": [BAD_TURN]},
    "messages without a prompt": {"chosen": GOOD_CHAT, "rejected": BAD_CHAT},
}
TRAINERS = {
    "reward": (RankedRewardTrainer, RankedRewardConfig, RewardTrainer, RewardConfig, "rm"),
    "dpo": (RankedDPOTrainer, RankedDPOConfig, DPOTrainer, DPOConfig, "sft"),
}


@pytest.mark.parametrize("way", ["trainer", "command"])
@pytest.mark.parametrize("step", TRAINERS)
@pytest.mark.parametrize("form", FORMS)
def test_the_ids_of_preference_rows_are_those_of_trl(form, step, way, workshop, chat_tokenizer):
    ours, our_config, theirs, their_config, model = TRAINERS[step]
    row = FORMS[form]
    given = {"train_dataset": Dataset.from_list([row] * 2), "processing_class": chat_tokenizer}
    if way == "command":
        write_jsonl("file.jsonl", [row] * 2)
        dataset = trained_on(step, ["--dataset_name", "file.jsonl"]).train_dataset
    else:
        dataset = ours(model, args=our_config(**settings("out")), **given).train_dataset
    prompt, completions = dataset[0]["prompt_ids"], dataset[0]["completion_ids"]
    of_trl = theirs(model, args=their_config(**settings("trl")), **given).train_dataset[0]
    # TRL's reward trainer has the whole texts. A turn ends with its end token here, a newline later there.
    before = of_trl.get("prompt_ids", [])
    after = chat_tokenizer("\n")["input_ids"] if "messages" in form else []
    expected = [before + of_trl[name] for name in ("chosen_ids", "rejected_ids")]
    assert [prompt + ids + after for ids in completions] == expected
    # Where TRL has a prompt, and does not cut it inside a word.
    if step == "dpo" and "prompt" in row:
        assert prompt == before


def test_keys_of_configurations_are_options(capsys):
    """Of the right column: each is an option of one of the commands, which says so in its help."""
    known = ""
    for command in ("sft", "reward", "dpo", "ppo-ptx"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        known += capsys.readouterr().out
    rows = table("| LLaMA-Factory | axolotl | OpenRLHF | here |")
    assert len(rows) > 10
    for *_, ours in rows[1:]:
        assert f"--{ours.strip('`')} " in known, ours
