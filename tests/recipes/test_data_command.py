"""`prefopt data`: convert, validate, stats, split."""

import csv
import gzip
import json
import subprocess
import sys
from collections import Counter
from datetime import datetime, timedelta

import pytest
from datasets import Dataset, DatasetDict

from prefopt import cli
from prefopt.errors import UserError
from prefopt.inference.jsonl import read_jsonl, write_jsonl
from prefopt.rankings.checks import validate_comparisons
from prefopt.recipes.common.arguments import ComparisonArguments
from prefopt.recipes.common.rows import load_comparisons, load_rows
from prefopt.trainers.reward.config import RankedRewardConfig

SAID = "\n\nHuman: Name a fruit.\n\nAssistant:"
HH = [
    {"chosen": f"{SAID} Plum.", "rejected": f"{SAID} No."},
    {"chosen": f"{SAID} Pear.", "rejected": SAID},
    {"chosen": f"{SAID} Fig.", "rejected": f"{SAID} Stone."},
]
RANKED = [
    {
        "prompt": "p1",
        "completions": ["aaaa", "bb", "c"],
        "ranks": [1, 2, 2],
        "labeler": "ann",
        "ratings": [7, 2, 1],
    },
    {"prompt": "p1", "completions": ["aaaa", "bb", "c"], "ranks": [2, 1, 3], "labeler": "bob"},
    {"prompt": "p22", "completions": ["dd", "dd"], "ranks": [1, 1], "labeler": "ann"},
    {
        "prompt": "p3",
        "completions": ["e", "ff", "gg"],
        "ranks": [1, 2, 3],
        "labeler": "bob",
        "flags": [{}, {"rude": True}, {}],
    },
]


def run(capsys, *arguments):
    assert cli.main(["data", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(*arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", *map(str, arguments)])
    return str(caught.value)


@pytest.fixture
def ranked(tmp_path):
    path = tmp_path / "ranked.jsonl"
    write_jsonl(path, RANKED)
    return path


def test_convert_detects_the_format_and_counts(tmp_path, capsys):
    source, out = tmp_path / "hh.jsonl", tmp_path / "out" / "rankings.jsonl"
    write_jsonl(source, HH)
    said = run(capsys, "convert", source, "--out", out)
    rows = read_jsonl(out)
    validate_comparisons(rows)
    assert [row["completions"] for row in rows] == [["Plum.", "No."], ["Fig.", "Stone."]]
    assert "3 rows in the format hh-rlhf (Anthropic/hh-rlhf)" in said
    assert "left out: 1 empty completions, 1 rows with fewer than two completions left" in said
    assert f"{out} (2 rows)" in said


def test_convert_reads_csv_parquet_and_gz(tmp_path, capsys):
    table = [
        {"prompt": "p1", "completions": '["a", "b", "c"]', "ranking": "C > A = B"},
        {"prompt": "p2", "completions": '["d", "e"]', "ranking": "A > B"},
    ]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    Dataset.from_list(table).to_parquet(str(tmp_path / "t.parquet"))
    with gzip.open(tmp_path / "t.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in table))
    for options in (["t.csv"], ["t.parquet"], ["t.jsonl.gz"], ["t.csv", "--streaming"]):
        out = tmp_path / "out.jsonl"
        run(capsys, "convert", tmp_path / options[0], *options[1:], "--out", out)
        assert [(row["completions"], row["ranks"]) for row in read_jsonl(out)] == [
            (["a", "b", "c"], [2, 2, 1]),
            (["d", "e"], [1, 2]),
        ]
        out.unlink()


def test_the_default_name_does_not_write_over_labels(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl("hh.jsonl", HH)
    run(capsys, "convert", "hh.jsonl")
    write_jsonl("rankings.jsonl", [{**row, "labeler": "ann"} for row in read_jsonl("rankings.jsonl")])
    before = (tmp_path / "rankings.jsonl").read_bytes()
    assert "is there already" in refused("convert", "hh.jsonl")
    assert (tmp_path / "rankings.jsonl").read_bytes() == before
    assert "--overwrite" in refused("convert", "hh.jsonl", "--out", "rankings.jsonl")
    run(capsys, "convert", "hh.jsonl", "--overwrite")
    assert (tmp_path / "rankings.jsonl").read_bytes() != before


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
@pytest.mark.parametrize("where", [["--config_name", "helpful"], ["--data_dir", "helpful"]])
def test_a_hub_dataset_by_split_and_configuration(tmp_path, capsys, streaming, where):
    """A folder laid out as a Hub repository: `load_dataset` reads it the same way, without the network."""
    repository, out = tmp_path / "hub" / "hh", tmp_path / "out.jsonl"
    for split, rows in (("train", HH[:1]), ("test", HH[2:])):
        write_jsonl(repository / "helpful" / f"{split}.jsonl", rows)
    card = "---\nconfigs:\n- config_name: helpful\n  data_dir: helpful\n---\n"
    (repository / "README.md").write_text(card if where[0] == "--config_name" else "")
    run(capsys, "convert", repository, *where, "--split", "test", *streaming, "--out", out)
    assert [row["completions"] for row in read_jsonl(out)] == [["Fig.", "Stone."]]


def test_a_hub_dataset_behind_a_script_is_pointed_to_its_copy(tmp_path):
    repository = tmp_path / "webgpt"
    repository.mkdir()
    (repository / "webgpt.py").write_text("raise AssertionError('never run')")
    said = refused("convert", repository)
    assert "Dataset scripts are no longer supported, but found webgpt.py" in said
    assert "--revision refs/convert/parquet --data_dir default" in said


def test_a_folder_of_save_to_disk(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    DatasetDict({"test": Dataset.from_list(HH)}).save_to_disk(str(tmp_path / "saved"))
    run(capsys, "convert", tmp_path / "saved", "--split", "test", "--max_rows", 1, "--out", out)
    assert len(read_jsonl(out)) == 1


def test_convert_leaves_no_file_of_bad_or_useless_rows(tmp_path):
    source, out = tmp_path / "hh.jsonl", tmp_path / "out.jsonl"
    write_jsonl(source, [HH[0], {"chosen": f"{SAID} Plum.", "rejected": None}])
    assert f"{source} row 1: field 'rejected': expected a text, got None" in refused("convert", source, "--out", out)
    write_jsonl(source, [HH[1]])
    assert "no comparison in 1 rows. Left out: 1 empty completions" in refused("convert", source, "--out", out)
    assert not out.exists()
    assert "no known format has the columns text" in refused("convert", _one(tmp_path, {"text": "t"}), "--out", out)
    assert "does not exist" in refused("convert", tmp_path / "none.csv")
    assert "none.jsonl does not exist" in refused("convert", tmp_path / "none.jsonl")
    assert "unknown key in the command line: 'fromat' (did you mean 'format'?)" in refused(
        "convert", source, "--fromat", "x"
    )
    assert "max_rows is 0" in refused("convert", source, "--max_rows", 0)
    assert "data is required" in refused("convert")
    assert "expected a command, got 'conv'" in refused("conv")


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("data", ["convert", "validate", "stats", "split"]),
        ("label", ["export", "import", "agreement", "next"]),
    ],
)
def test_help_lists_the_commands(capsys, command, names):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[1:]] == names


def test_more_files_than_a_command_reads_are_refused(ranked):
    assert "too many arguments: other.jsonl; options begin with --" in refused("stats", ranked, "other.jsonl")


def test_convert_keeps_dates(tmp_path, capsys):
    source, out = tmp_path / "t.parquet", tmp_path / "out.jsonl"
    row = {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2], "at": datetime(2022, 3, 4)}
    Dataset.from_list([row]).to_parquet(str(source))
    run(capsys, "convert", source, "--out", out)
    assert read_jsonl(out)[0]["at"] == "2022-03-04T00:00:00"


def test_columns_that_json_has_not_are_written(tmp_path, capsys):
    source, out = tmp_path / "t.parquet", tmp_path / "out.jsonl"
    row = {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2], "spent": timedelta(seconds=31), "digest": b"\0"}
    Dataset.from_list([{**row, "score": float("nan")}, {**row, "prompt": "q", "score": 1.0}]).to_parquet(str(source))
    run(capsys, "convert", source, "--out", out)
    run(capsys, "split", source, "--out", tmp_path / "split", "--validation", 0, "--test", 0.5)
    kept = [{name: row[name] for name in ("spent", "digest", "score")} for row in read_jsonl(out)]
    assert kept == [{"spent": 31.0, "digest": "AA==", "score": None}, {"spent": 31.0, "digest": "AA==", "score": 1.0}]
    # What `datasets` cannot read, such as NaN, is not written.
    assert Dataset.from_json(str(out), cache_dir=str(tmp_path / "cache")).num_rows == 2


HALF = "Nice \ud83d"
HALVES = [
    {"prompt": HALF, "completions": ["a", "b"], "ranks": [1, 2]},
    {"prompt": "p", "completions": ["a", HALF], "ranks": [1, 2]},
    {"prompt": [{"role": "user", "content": HALF}], "chosen": "a", "rejected": "b"},
    {"prompt": "p", "completion": HALF},
    {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": HALF}]},
    {"prompt": HALF},
    {"text": HALF},
]


@pytest.mark.parametrize("row", HALVES, ids=lambda row: " ".join(row))
def test_half_of_a_character_is_named(tmp_path, row):
    good = json.loads(json.dumps(row).replace("\\ud83d", "!"))
    message = refused("validate", _one(tmp_path, good, row))
    assert "row 1: field '" in message
    assert r"half of a character (a lone surrogate) in 'Nice \ud83d'" in message


def test_a_row_with_half_of_a_character_is_one_row(tmp_path, capsys):
    good, out = {"prompt": "p", "chosen": "a", "rejected": "b"}, tmp_path / "out.jsonl"
    told = run(capsys, "convert", _one(tmp_path, good, {**good, "chosen": HALF}), "--out", out)
    assert "left out: 1 rows with half of a character" in told
    assert len(read_jsonl(out)) == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [(HALF, "half of a character"), (2**70, "no column can hold 1180591620717411303424 (Python int too large")],
)
def test_training_names_the_row_of_a_value_that_no_column_can_hold(tmp_path, value, message):
    good = {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2], "note": "n" if value == HALF else 7}
    path = _one(tmp_path, good, {**good, "note": value})
    with pytest.raises(UserError, match="row 1: field 'note': ") as caught:
        load_rows(str(path), key="dataset_name", check=validate_comparisons)
    assert message in str(caught.value)


def _one(tmp_path, *rows):
    path = tmp_path / "one.jsonl"
    write_jsonl(path, rows)
    return path


def test_convert_by_another_rating_and_with_ties(tmp_path, capsys):
    completions = [{"response": t, "fine-grained_score": 3, "overall_score": s} for t, s in (("a", 5), ("b", 9))]
    source, out = _one(tmp_path, {"instruction": "p", "completions": completions}), tmp_path / "out.jsonl"
    assert "1 rows in which all completions tie" in refused("convert", source, "--out", out)
    run(capsys, "convert", source, "--out", out, "--rating", "overall_score")
    assert read_jsonl(out)[0]["ranks"] == [2, 1]
    run(capsys, "convert", source, "--out", out, "--keep_tied", "true", "--overwrite")
    assert read_jsonl(out)[0]["ranks"] == [1, 1]
    by = ["--rating", "overall_score", "--tie_margin"]
    assert "1 rows in which all completions tie" in refused("convert", source, "--out", out, *by, 4, "--overwrite")
    assert "tie_margin is -1.0; expected at least 0" in refused("convert", source, "--out", out, *by, -1)


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        (RANKED, "comparisons"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b"}], "comparisons"),
        ([{"prompt": "p", "completion": "c"}], "demonstrations"),
        ([{"prompt": "p"}], "prompts"),
        ([{"prompt": [{"role": "user", "content": "p"}]}], "prompts"),
        (
            [{"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]}],
            "conversations",
        ),
        ([{"text": "t"}], "texts"),
    ],
)
def test_validate_rows_of_each_kind(tmp_path, capsys, rows, kind):
    assert f"{len(rows)} rows of {kind}, all as they should be" in run(capsys, "validate", _one(tmp_path, *rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [RANKED[0], {**RANKED[3], "ranks": [1, 3, 3]}],
            "row 1: field 'ranks': expected dense ranks, got [1, 3, 3]",
        ),
        ([{"prompt": "p", "completion": ""}], "row 0: field 'completion': expected a non-empty string"),
        ([{"prompt": "p"}, {"prompt": ""}], "row 1: field 'prompt': expected a text or messages"),
        ([{"text": "t"}, {"text": None}], "row 1: field 'text': expected a text, got None"),
        ([{"messages": [{"role": "user", "content": "p"}]}], "row 0: "),
        (
            [RANKED[0], {**RANKED[3], "prompt": [{"role": "user", "content": "p"}]}],
            "row 1: expected text with text as in the first rows, got messages with text; train on chat rows",
        ),
        (HH, "rows in the format hh-rlhf; `prefopt data convert "),
        ([{"question": "?"}], "expected a column completions, chosen, "),
        ([], "no rows"),
    ],
)
def test_validate_names_the_first_bad_row(tmp_path, rows, message):
    assert message in refused("validate", _one(tmp_path, *rows))


def test_validate_all_counts_problems_by_kind(tmp_path, capsys):
    rows = [
        RANKED[0],
        {**RANKED[0], "completions": ["a", "", "c"]},
        {**RANKED[0], "ranks": [1, 3, 3]},
        {**RANKED[0], "completions": ["a", "b", ""]},
    ]
    said = refused("validate", _one(tmp_path, *rows), "--all")
    assert "3 of 4 rows of comparisons are not as they should be" in said
    assert capsys.readouterr().out.splitlines() == [
        "2 rows: field 'completions[...]': expected a non-empty string; the first is row 1: field 'completions[1]': "
        "expected a non-empty string, got ''; drop it, or write the EOS token for an answer that ends at once",
        "1 rows: field 'ranks': expected dense ranks; the first is row 2: field 'ranks': expected dense ranks, got "
        "[1, 3, 3]; write [1, 2, 2] for the same order",
    ]


def test_validate_as_another_kind(tmp_path):
    said = refused("validate", _one(tmp_path, {"prompt": "p", "text": "t"}), "--kind", "demonstrations")
    assert "row 0: field 'completion': expected a value, got nothing" in said


def test_stats(tmp_path, capsys, ranked):
    other, out = tmp_path / "other.jsonl", tmp_path / "stats.json"
    write_jsonl(other, [{"prompt": "p1"}, {"prompt": "p9"}])
    said = run(capsys, "stats", ranked, "--against", other, "--out", out)
    found = json.loads(out.read_text())
    assert found["rows"] == 4
    assert (found["prompts"], found["repeated_prompts"], found["rows_of_repeated_prompts"]) == (3, 1, 2)
    assert found["k"] == {"2": 1, "3": 3}
    assert (found["pairs"], found["tied_pairs"]) == (3 + 3 + 1 + 3, 1 + 0 + 1 + 0)
    assert found["rows_without_comparison"] == found["rows_with_repeated_completions"] == 1
    # Strict pairs of different length: in row 0 a > b and a > c, in row 1 b > a, b > c and a > c, in row 3 e > ff and e > gg.
    assert (found["longer_wins"], found["longer_wins_pairs"]) == ((2 + 2 + 0) / 7, 7)
    assert found["lengths"]["characters of the prompt"] == {
        "n": 4,
        "mean": 9 / 4,
        "median": 2,
        "p95": 3,
        "max": 3,
    }
    assert found["lengths"]["characters of a completion"]["mean"] == (7 + 7 + 4 + 5) / 11
    assert found["rows_with"] == {"ratings": 1, "flags": 1}
    assert found["ratings"] == [1, 7]
    assert found["labelers"] == {"ann": 2, "bob": 2}
    assert found["prompts_of_several_labelers"] == 1
    # Of p1 neither ties a and b, nor a and c: ann and bob differ about the first, and agree about the second.
    assert found["agreement"]["agreement of labelers on untied pairs"]["value"] == 1 / 2
    assert found["shared"] == {str(other): {"prompts": 1, "rows": 2}}
    assert "the longer completion wins" in said
    assert "57.1% of 7 pairs" in said
    assert "agreement of labelers on untied pairs" in said


def test_stats_of_preferences_demonstrations_and_texts(tmp_path, capsys):
    out = tmp_path / "stats.json"
    run(capsys, "stats", _one(tmp_path, {"prompt": "p", "chosen": "aaa", "rejected": "b"}), "--out", out)
    found = json.loads(out.read_text())
    assert (found["k"], found["longer_wins"], found["agreement"]) == ({"2": 1}, 1.0, {})
    said = run(capsys, "stats", _one(tmp_path, {"prompt": "p", "completion": "c" * 7}))
    assert "mean 7" in said
    assert "pairs" not in said
    assert "characters of the text" in run(capsys, "stats", _one(tmp_path, {"text": "t"}))


def test_stats_counts_tokens_as_training_does(tmp_path, capsys, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    out = tmp_path / "stats.json"
    row = {"prompt": "the cat", "completions": ["the dog the dog", "cat"], "ranks": [1, 2]}
    run(capsys, "stats", _one(tmp_path, row), "--tokenizer", tmp_path / "tokenizer", "--out", out)
    lengths = json.loads(out.read_text())["lengths"]
    prompt = len(tokenizer("the cat")["input_ids"])
    ends = [len(tokenizer(f"the cat{text}")["input_ids"]) + 1 - prompt for text in row["completions"]]  # and EOS
    assert lengths["tokens of the prompt"]["max"] == prompt
    assert lengths["tokens of a completion"]["mean"] == sum(ends) / 2
    assert lengths["tokens of both"]["max"] == prompt + max(ends)


def test_messages_as_json_in_a_csv_are_messages(tmp_path, capsys):
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    cells = {"prompt": [user], "chosen": [answer], "rejected": [{**answer, "content": "b"}], "margin": 2}
    for name, row in (("pairs", cells), ("chats", {"messages": [user, answer]})):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([row, [json.dumps(cell) for cell in row.values()]])
    assert "1 rows of comparisons, all as" in run(capsys, "validate", tmp_path / "pairs.csv")
    assert "1 rows of conversations, all as" in run(capsys, "validate", tmp_path / "chats.csv")
    rows = load_rows(str(tmp_path / "pairs.csv"), key="dataset_name", check=validate_comparisons)
    assert rows.to_list() == [cells]
    # A text of JSON in a file that has lists may be meant.
    said = run(capsys, "validate", _one(tmp_path, {"prompt": json.dumps([user])}))
    assert "but 1 of 1 rows have messages as JSON in 'prompt', which are read as one text" in said


def test_stats_has_the_notes_of_validate(tmp_path, capsys, chat_tokenizer):
    chat_tokenizer.save_pretrained(tmp_path / "tokenizer")
    glued = {"prompt": "A:", "completions": ["His", "No"], "ranks": [1, 2], "system": "Be kind."}
    rows = [glued, {**glued, "prompt": "B:", "completions": [" a", " a"]}, {**glued, "prompt": "C: ", "system": None}]
    path, out = _one(tmp_path, *rows), tmp_path / "stats.json"
    said = run(capsys, "stats", path, "--out", out)
    assert [line for line in said.splitlines() if line.startswith("but")] == [
        line for line in run(capsys, "validate", path).splitlines() if line.startswith("but")
    ]
    counts = {note.partition(" ")[2][:30]: count for note, count in json.loads(out.read_text())["notes"].items()}
    assert counts == {
        "a completion that follows the ": 1,
        "a field 'system', which is not": 2,
        "a completion twice, with two r": 1,
    }
    chat = [{"role": "user", "content": "one<|im_end|>"}]
    rows = [{"prompt": chat, "completion": "a"}, {"prompt": [{"role": "user", "content": "b"}], "completion": "a"}]
    said = run(capsys, "stats", _one(tmp_path, *rows), "--tokenizer", tmp_path / "tokenizer")
    assert "but 1 of 2 rows have a special token of the tokenizer written in a message" in said


def test_stats_of_other_splits(tmp_path, capsys):
    rows = [{"prompt": name, "completion": "c"} for name in "abc"]
    DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[2:])}).save_to_disk(
        str(tmp_path / "saved")
    )
    said = run(capsys, "stats", tmp_path / "saved", "--against_split", "test")
    assert "shared with split test" in said
    assert "1 prompts, in 1 (33.3%) of the rows" in said


def test_stats_stops_at_a_bad_row(tmp_path):
    said = refused("stats", _one(tmp_path, RANKED[0], {**RANKED[0], "ranks": [1, 3, 3]}))
    assert "row 1: field 'ranks': expected dense ranks" in said
    assert "--all` counts all of them" in said


def test_stats_starts_without_the_heavy_libraries(ranked):
    """Torch, transformers and datasets take longer to import than thousands of rows to count."""
    code = (
        "import sys; from prefopt import cli; cli.main(sys.argv[1:]); "
        "print(sorted({'torch', 'transformers', 'datasets', 'scipy'} & set(sys.modules)))"
    )
    write_jsonl(ranked, RANKED[1:])  # no prompt of two labelers, whose agreement takes scipy
    done = subprocess.run(
        [sys.executable, "-c", code, "data", "stats", str(ranked)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def users(n, rows_each):
    return [
        {"prompt": f"prompt {u}-{i}", "completions": ["a", "b"], "ranks": [1, 2], "user": f"u{u}"}
        for u in range(n)
        for i in range(rows_each)
    ]


def test_split_keeps_each_user_on_one_side(tmp_path, capsys):
    source, out = tmp_path / "all.jsonl", tmp_path / "split"
    rows = users(20, 5)
    write_jsonl(source, rows)
    said = run(capsys, "split", source, "--by", "user", "--validation", 0.1, "--test", 0.2, "--out", out)
    sides = {name: read_jsonl(out / f"{name}.jsonl") for name in ("train", "validation", "test")}
    assert {name: len(side) for name, side in sides.items()} == {"train": 70, "validation": 10, "test": 20}
    of_users = [{row["user"] for row in side} for side in sides.values()]
    assert sum(map(len, of_users)) == len(set.union(*of_users)) == 20
    assert Counter(row["prompt"] for side in sides.values() for row in side) == Counter(r["prompt"] for r in rows)
    assert "train.jsonl: 70 rows (user: 14 different)" in said
    again = tmp_path / "again"
    run(capsys, "split", source, "--by", "user", "--validation", 0.1, "--test", 0.2, "--out", again)
    assert read_jsonl(again / "test.jsonl") == sides["test"]
    options = ["--by", "user", "--validation", 0.1, "--test", 0.2, "--out", again]
    run(capsys, "split", source, *options, "--seed", 1, "--overwrite")
    assert read_jsonl(again / "test.jsonl") != sides["test"]


def test_split_by_prompt_without_validation(tmp_path, capsys):
    source, out = tmp_path / "all.jsonl", tmp_path / "split"
    write_jsonl(source, [{**row, "labeler": name} for row in users(1, 10) for name in ("ann", "bob")])
    run(capsys, "split", source, "--validation", 0, "--test", 0.2, "--out", out)
    train, test = read_jsonl(out / "train.jsonl"), read_jsonl(out / "test.jsonl")
    assert (len(train), len(test)) == (16, 4)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert not (out / "validation.jsonl").exists()
    said = run(
        capsys, "split", source, "--by", "labeler", "--validation", 0, "--test", 0.2, "--out", out, "--overwrite"
    )
    assert "10 of its prompts are in train too, of another labeler" in said


def test_split_takes_at_most_so_many_prompts_of_a_user(tmp_path, capsys):
    source, out = tmp_path / "all.jsonl", tmp_path / "split"
    rows = users(2, 6) + users(3, 2)[4:]
    write_jsonl(source, rows + rows[:6])  # each prompt of u0 in two rows
    options = ["--by", "user", "--max_per_user", 4, "--validation", 0, "--test", 0.3, "--out", out]
    said = run(capsys, "split", source, *options)
    kept = [row for name in ("train", "test") for row in read_jsonl(out / f"{name}.jsonl")]
    assert Counter(row["user"] for row in kept) == {"u0": 8, "u1": 4, "u2": 2}
    assert len({row["prompt"] for row in kept if row["user"] == "u0"}) == 4
    assert "left out: 6 of 20 rows, which are over 4 prompts of their user" in said


def test_split_takes_one_of_prompts_that_begin_alike(tmp_path, capsys):
    source, out = tmp_path / "all.jsonl", tmp_path / "split"

    def row(prompt):
        return {"prompt": prompt, "completions": ["a", "b"], "ranks": [1, 2]}

    system = {"role": "system", "content": "You are a careful assistant."}
    alike = ["Summarize the text: one", "Summarize the text: two", "Summarize", "Write a poem of four lines"]
    write_jsonl(source, [row(p) for p in [*alike, alike[0]]])
    said = run(capsys, "split", source, "--dedupe_prefix", 15, "--validation", 0, "--test", 0.3, "--out", out)
    kept = [one["prompt"] for name in ("train", "test") for one in read_jsonl(out / f"{name}.jsonl")]
    assert sorted(kept) == sorted([alike[0], alike[2], alike[3], alike[0]])
    assert "left out: 1 of 5 rows, which share 15 first characters of the prompt with an earlier one" in said
    short = [row([system, {"role": "user", "content": p}]) for p in alike]
    short.append(row([{"role": "system", "content": "Be rude."}, {"role": "user", "content": alike[2]}]))
    write_jsonl(source, short)
    run(capsys, "split", source, "--dedupe_prefix", 15, "--validation", 0, "--test", 0.3, "--out", out, "--overwrite")
    assert sum(len(read_jsonl(out / f"{name}.jsonl")) for name in ("train", "test")) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--by", "user"], "row 0: field 'user': expected a value to split by, got nothing; fill it, or"),
        (
            ["--by", "labeler"],
            "field 'labeler': expected at least 3 different values, one for each of train, validation, test",
        ),
        (["--test", 1.5], "validation 0.05 and test 1.5: expected shares of 0 or more, below 1"),
        (["--max_per_user", 0], "max_per_user is 0; expected 1 or more"),
    ],
)
def test_split_refuses(ranked, options, message):
    assert message in refused("split", ranked, *options)


def test_every_side_gets_a_user_even_if_two_have_nearly_all_rows(tmp_path, capsys):
    source, out = tmp_path / "all.jsonl", tmp_path / "split"
    write_jsonl(source, users(2, 50) + users(3, 1)[2:])
    run(capsys, "split", source, "--by", "user", "--out", out)
    assert all(read_jsonl(out / f"{name}.jsonl") for name in ("train", "validation", "test"))


def test_training_says_how_to_convert(tmp_path):
    source = _one(tmp_path, *HH)
    args = RankedRewardConfig(output_dir=str(tmp_path / "rm"), use_cpu=True, report_to="none")
    with pytest.raises(UserError, match=r"rows in the format hh-rlhf: `prefopt data convert .*one\.jsonl --out"):
        load_comparisons(ComparisonArguments(dataset_name=str(source)), args)


def test_a_file_that_is_missing_or_not_utf8_or_broken_is_named(tmp_path):
    assert refused("validate", tmp_path / "no.jsonl") == f"error: file {tmp_path / 'no.jsonl'} does not exist"
    path = tmp_path / "latin1.jsonl"
    path.write_bytes('{"prompt": "Zoë"}\n'.encode("latin1"))
    assert refused("validate", path) == f"error: {path}: not UTF-8 text (it has the byte 0xeb); save it as UTF-8"
    path = tmp_path / "commas.csv"
    path.write_text("prompt,chosen,rejected\na,b,c\nd,e, f, g\n")
    assert "Expected 3 fields in line 3, saw 4" in refused("validate", path)


def test_what_is_read_is_not_written_over(tmp_path, ranked):
    before = ranked.read_bytes()
    assert "is also read" in refused("convert", ranked, "--out", ranked)
    for name in ("rows.csv", "rows.TSV", "rows.parquet", "rows.arrow"):
        for command in ("convert", "stats"):
            assert "nothing is written as a table; name a .jsonl or .json" in refused(
                command, ranked, "--out", tmp_path / name
            )
        assert not (tmp_path / name).exists()
    train = tmp_path / "train.jsonl"
    train.write_bytes(before)
    assert "is also read" in refused("split", train, "--out", tmp_path)
    assert ranked.read_bytes() == train.read_bytes() == before
