"""Rows as files and other tools have them: parts of a file, cells of a CSV, prompts in several fields."""

import gzip
import json
import logging
import re
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from prefopt.errors import UserError
from prefopt.inference.jsonl import read_jsonl, write_jsonl
from prefopt.rankings.checks import validate_comparisons
from prefopt.rankings.dataset import prepare_comparisons
from prefopt.recipes import data
from prefopt.recipes.common.arguments import DataArguments
from prefopt.recipes.common.rows import check_comparisons, check_fields, evaluation_split, load_rows, stream_rows
from prefopt.recipes.common.sources import load_source

ROWS = [{"prompt": f"question {i}", "chosen": " yes", "rejected": " no"} for i in range(8)]


def written(folder, suffix):
    path = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        write_jsonl(path, ROWS)
    elif suffix == "":
        Dataset.from_list(ROWS).save_to_disk(path)
    else:
        getattr(Dataset.from_list(ROWS), {".csv": "to_csv", ".parquet": "to_parquet"}[suffix])(path)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ""])
def test_a_part_of_a_file_is_that_part(suffix, tmp_path):
    name = written(tmp_path, suffix)
    for split, numbers in {
        "train": range(8),
        "train[:75%]": range(6),
        "train[75%:]": (6, 7),
        "train[2:3]": (2,),
    }.items():
        rows = load_rows(name, key="dataset_name", check=check_comparisons, split=split)
        assert rows["prompt"][:] == [f"question {i}" for i in numbers]
    with pytest.raises(UserError, match="'validation': a file is one split, train; write train, or a part of it"):
        load_rows(name, key="dataset_name", check=check_comparisons, split="validation")


def test_data_commands_and_streams_read_the_part_too(tmp_path, capsys):
    name = written(tmp_path, ".jsonl")
    data.main(["validate", name, "--split", "train[:3]"])
    assert "3 rows of comparisons" in capsys.readouterr().out
    rows = stream_rows(name, key="dataset_name", check=check_comparisons, split="train[7:]")
    assert [row["prompt"] for row in rows] == ["question 7"]


def test_cells_of_a_csv_are_texts(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,rejected,margin,labeler\np,null,NA,1.5,\nq,06,True,,ann\n")
    rows = load_source(str(path), "data")
    assert rows["chosen"][:] == ["null", "06"]
    assert rows["rejected"][:] == ["NA", "True"]
    assert rows["margin"][:] == [1.5, None]
    assert rows["labeler"][:] == [None, "ann"]
    validate_comparisons(rows)


@pytest.mark.parametrize("as_rows", [list, Dataset.from_list])
def test_parts_of_the_prompt_that_are_not_read_are_counted(as_rows, caplog):
    rows = [
        {**ROWS[0], "system": "Be kind."},
        {**ROWS[1], "system": "", "history": [["a", "b"]]},
        {**ROWS[2], "system": "x"},
    ]
    with caplog.at_level(logging.WARNING):
        prepare_comparisons(as_rows([{"system": None, "history": None} | row for row in rows]))
    assert (
        "train: not read, though it seems to belong to the prompt: 'system' of 2 rows, 'history' of 1 rows"
        in caplog.text
    )


def test_prompts_too(tmp_path, caplog):
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Hi", "system": "Be kind."}])
    with caplog.at_level(logging.WARNING):
        load_rows(str(tmp_path / "prompts.jsonl"), key="dataset_name", check=check_fields("prompt"))
    assert "'system' of 1 rows" in caplog.text


@pytest.mark.parametrize(
    ("options", "split"),
    [
        ({"eval_dataset_name": "rows.jsonl"}, None),
        ({"eval_dataset_name": "single"}, None),
        ({"eval_dataset_name": "rows.jsonl", "dataset_test_split": "train[75%:]"}, "train[75%:]"),
        ({"eval_dataset_name": "splits"}, "test"),
        ({"eval_dataset_name": "splits", "dataset_test_split": "validation"}, "validation"),
        ({"eval_dataset_name": "me/rankings"}, "test"),
        # Of the rows trained on there is no other split: they are not evaluation rows by default.
        ({"dataset_name": "single"}, "test"),
    ],
)
def test_the_split_that_evaluation_rows_are_of(options, split, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("rows.jsonl"), ROWS)
    Dataset.from_list(ROWS).save_to_disk("single")
    DatasetDict({name: Dataset.from_list(ROWS) for name in ("validation", "test")}).save_to_disk("splits")
    assert evaluation_split(DataArguments(**options)) == split


def test_the_fields_of_demonstrations_that_are_not_read_are_counted(tmp_path, capsys):
    """Beside a prompt of its own an input is nobody's, whatever the answer is called."""
    row = {"prompt": "Hi", "response": " there", "history": [["a", "b"]], "input": "i", "context": "c"}
    write_jsonl(tmp_path / "rows.jsonl", [row])
    data.main(["validate", str(tmp_path / "rows.jsonl")])
    said = capsys.readouterr().out
    for name in ("history", "input", "context"):
        assert f"but 1 of 1 rows have a field {name!r}, which is not read: write it into the prompt" in said


def turn(role, content):
    return {"role": role, "content": content}


HELLO = [turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "Name a fruit.")]
TOLD = [
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Hello"},
    {"from": "human", "value": "Name a fruit."},
]
TEXTS = {"chosen": "Plum.", "rejected": "No."}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (
            {
                "conversations": TOLD,
                "chosen": {"from": "gpt", "value": "Plum."},
                "rejected": {"from": "gpt", "value": "No."},
            },
            HELLO,
        ),
        ({"messages": HELLO, "chosen": turn("assistant", "Plum."), "rejected": turn("assistant", "No.")}, HELLO),
        ({"instruction": "Name", "input": "a fruit.", **TEXTS}, [turn("user", "Name\na fruit.")]),
        ({"instruction": "Name a fruit.", "input": "", "history": [["Hi", "Hello"]], **TEXTS}, HELLO),
        ({"system": "Be kind.", "question": "Fruit?", **TEXTS}, [turn("system", "Be kind."), turn("user", "Fruit?")]),
        ({"system": "Be kind.", "prompt": "Fruit?", **TEXTS}, [turn("system", "Be kind."), turn("user", "Fruit?")]),
        ({"system": "Be kind.", "prompt": HELLO, **TEXTS}, [turn("system", "Be kind."), *HELLO]),
    ],
)
def test_prompts_in_the_fields_of_other_tools_are_converted_as_promised(row, prompt, tmp_path):
    path, out = tmp_path / "rows.jsonl", tmp_path / "rankings.jsonl"
    write_jsonl(path, [row])
    with pytest.raises(UserError, match=re.escape(f"`prefopt data convert {path} --out rankings.jsonl` reads it")):
        data.main(["validate", str(path)])
    data.main(["convert", str(path), "--out", str(out)])
    (converted,) = read_jsonl(out)
    answers = [a if isinstance(a, str) else a[0]["content"] for a in converted["completions"]]
    assert (converted["prompt"], answers, converted["ranks"]) == (prompt, ["Plum.", "No."], [1, 2])


def test_conversion_keeps_what_the_template_is_given(tmp_path):
    tools = [{"type": "function", "function": {"name": "find"}}]
    write_jsonl(
        tmp_path / "rows.jsonl", [{**ROWS[0], "tools": tools, "chat_template_kwargs": {"enable_thinking": False}}]
    )
    data.main(["convert", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out.jsonl")])
    (row,) = read_jsonl(tmp_path / "out.jsonl")
    assert (row["tools"], row["chat_template_kwargs"]) == (tools, {"enable_thinking": False})


@pytest.mark.parametrize(
    ("row", "note"),
    [
        (
            {"prompt": "A:", "chosen": "His", "rejected": "Her"},
            "have a completion that follows the prompt without a space",
        ),
        ({"prompt": "A:", "completion": "His"}, "have a completion that follows the prompt without a space"),
        ({"prompt": "A:", "chosen": " so", "rejected": " so"}, "have the same text as chosen and rejected"),
        ({"prompt": "A:", "completions": [" a", " a"], "ranks": [1, 2]}, "have a completion twice, with two ranks"),
        ({"prompt": "A:", "completion": " so", "label": False}, "have label false"),
        ({"prompt": "A:", "completion": " so", "context": "c"}, "have a field 'context', which is not read"),
    ],
)
def test_validate_counts_what_may_not_be_meant(row, note, tmp_path, capsys):
    good = {**row, "rejected": " x"} if "rejected" in row else dict(row)
    good |= {"label": True} if "label" in row else {}
    good |= {"completions": [" a", " b"]} if "ranks" in row else {}
    good |= {"context": None} if "context" in row else {}
    good |= {"prompt": "A: "} if "space" in note else {}
    write_jsonl(tmp_path / "rows.jsonl", [good, row])
    # By themselves rows with labels are those of KTO, which are to be converted.
    kind = ["--kind", "demonstrations"] if "label" in row else []
    data.main(["validate", str(tmp_path / "rows.jsonl"), *kind])
    assert f"but 1 of 2 rows {note}" in capsys.readouterr().out


def test_one_odd_dialogue_costs_one_row(tmp_path, capsys):
    good, odd = (f"{before}\n\nHuman: Hi\n\nAssistant: " for before in ("", "Be kind."))
    rows = [{"chosen": start + "Hello!", "rejected": start + "Go away."} for start in (odd, good)]
    for order in (rows, rows[::-1]):
        write_jsonl(tmp_path / "rows.jsonl", order)
        data.main(["convert", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out.jsonl"), "--overwrite"])
        (row,) = read_jsonl(tmp_path / "out.jsonl")
        assert row["prompt"] == [turn("user", "Hi")]
        assert "left out: 1 dialogues that do not begin with a speaker" in capsys.readouterr().out


def broken(kind, path):
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "damaged":
        path.write_bytes(b"PAR1 and more")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz"])
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("missing", "does not exist"),
        ("folder", "is a folder; name a file"),
        ("link", "is a link that leads nowhere"),
        ("loop", "is a link that leads nowhere"),
        ("damaged", "cut off or edited: mend|cut off or of another kind: copy|not a whole gzip file"),
    ],
)
def test_what_is_no_file_of_rows_is_said_once(tmp_path, suffix, kind, told, capsys):
    path = tmp_path / f"rows{suffix}"
    broken(kind, path)
    with pytest.raises(UserError, match=told) as error:
        load_rows(str(path), key="dataset_name", check=check_comparisons)
    assert str(error.value).startswith("dataset_name: ")
    assert str(error.value).count("dataset_name") == 1
    with pytest.raises(UserError, match=told) as error:
        data.main(["validate", str(path)])
    assert str(path) in str(error.value)


def test_a_line_that_cannot_be_read_is_named_once_in_a_conversion(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": "\\n\\nHuman: a\\n\\nAssistant: c"}\n{"cho'
    )
    with pytest.raises(UserError) as error:
        data.main(["convert", str(path), "--out", str(tmp_path / "out.jsonl")])
    assert str(error.value).startswith(f"{path} line 2: not valid JSON")


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "arrow"])
def test_a_damaged_folder_of_rows_is_named(tmp_path, name):
    folder = written(tmp_path, "")
    file = next((tmp_path / "rows").glob("*.arrow")) if name == "arrow" else tmp_path / "rows" / name
    file.write_text("[]")
    with pytest.raises(UserError, match=r"dataset_name: cannot load .*: it is damaged|dataset_name: cannot load"):
        load_rows(folder, key="dataset_name", check=check_comparisons)


def test_rows_in_a_gzip_file_are_trained_on_too(tmp_path):
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    assert len(load_rows(str(tmp_path / "rows.jsonl.gz"), key="dataset_name", check=check_comparisons)) == 8


@pytest.mark.parametrize("name", ["./gone", "/gone/rows", "../gone", "a/b/c"])
def test_a_path_that_leads_nowhere_is_no_question_to_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^dataset_name: there is no file or folder {name}$"):
        load_rows(name, key="dataset_name", check=check_comparisons)
