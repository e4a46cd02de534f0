"""Answers come back as the rows that were meant; what is doubtful is counted and what is broken stops with its place."""

import json
import random
from itertools import permutations

import pytest

from prefopt import cli
from prefopt.errors import UserError
from prefopt.labeling.answers import Answer, import_answers, read_answers
from prefopt.labeling.flags import FLAGS
from prefopt.labeling.key import blind, read_key, write_key
from prefopt.rankings.checks import validate_comparisons
from prefopt.rankings.dataset import prepare_comparisons

ROWS = [
    {"prompt": "2 + 2?", "completions": ["4", "5", "four"], "truncated": [False, True, False], "models": list("abc")},
    {"prompt": "Say hi", "completions": ["Hi", "Hi", "Go away", "Hi"], "use_case": "chat"},
]  # fmt: skip


def answer_of(key, task, *, labeler="ann", ranks, ratings=None, flags=None, **fields):
    """The answer of somebody who means these things of the row's completions, in the order shown to them."""
    shows = key.tasks[task].shows

    def by_place(values):
        return None if values is None else [values[places[0]] for places in shows]

    fields = {"status": "done", "seconds": 30.0, "saved": "2026-01-01T00:00:00Z", **fields}
    return Answer(
        key.sheet,
        task,
        labeler,
        ranks=by_place(ranks),
        ratings=by_place(ratings),
        flags=by_place(flags),
        **fields,
    )


def test_blinding_is_undone_whatever_the_order():
    seen = set()
    for seed in range(40):
        key, left_out = blind(ROWS, seed=seed)
        seen.add(key.tasks["1"].shows)
        assert left_out == 0
        flags = [["hallucination"], [], ["expresses_opinion", "satisfies_constraint"]]
        answer = answer_of(key, "1", ranks=[2, 3, 2], ratings=[5, 1, 5], flags=flags, notes="n")
        (row,) = import_answers([answer], [key]).rows
        assert row == {
            **ROWS[0],
            "ranks": [1, 2, 1],
            "labeler": "ann",
            "group": None,
            "ratings": [5, 1, 5],
            "flags": [{flag: flag in said for flag in FLAGS} for said in flags],
            "seconds": 30.0,
            "notes": "n",
            "sheet": key.sheet,
            "task": "1",
        }
    assert seen == {tuple((i,) for i in order) for order in permutations(range(3))}


def test_equal_texts_are_shown_once_and_share_what_is_said():
    key, _ = blind(ROWS, seed=0)
    assert sorted(key.tasks["2"].outputs) == ["Go away", "Hi"]
    answer = answer_of(key, "2", ranks=[1, 1, 2, 1], ratings=[6, 6, 1, 6])
    (row,) = import_answers([answer], [key]).rows
    assert (row["ranks"], row["ratings"]) == ([1, 1, 2, 1], [6, 6, 1, 6])
    key, left_out = blind([*ROWS, {"prompt": "p", "completions": ["same", "same"]}], seed=0)
    assert (len(key.tasks), left_out) == (2, 1)


def test_the_same_seed_gives_the_same_sheet_and_none_a_new_one():
    assert blind(ROWS, seed=5)[0] == blind(ROWS, seed=5)[0]
    assert blind(ROWS, seed=5)[0].sheet != blind(ROWS, seed=5, group="train")[0].sheet
    assert blind(ROWS)[0].seed != blind(ROWS)[0].seed


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "p", "completions": list("abcdefghij")}], ["rows row 0", "at most 9", "got 10"]),
        ([*ROWS, {"prompt": "p"}], ["rows row 2", "'completions'"]),
        ([{"prompt": "p", "completions": ["a", ""]}], ["row 0", "completions[1]"]),
        ([{"prompt": "p", "completions": ["a", "a"]}], ["2 different completions"]),
        ([], ["2 different completions"]),
    ],
)
def test_rows_that_cannot_be_ranked_stop_the_export(rows, said):
    with pytest.raises(ValueError, match="rows") as error:
        blind(rows, seed=0, source="rows")
    assert all(words in str(error.value) for words in said)


def test_screening_tasks_are_mixed_in_and_come_back_apart():
    known = [{"prompt": f"known {i}", "completions": ["bad", "good"], "ranks": [2, 1]} for i in range(4)]
    rows = [{"prompt": f"p{i}", "completions": ["a", "b"]} for i in range(8)]
    key, _ = blind(rows, seed=1, screening=known)
    order = [task.prompt for task in key.tasks.values()]
    assert [p for p in order if p.startswith("p")] == [row["prompt"] for row in rows]
    assert sorted(p for p in order if p.startswith("k")) == [row["prompt"] for row in known]
    assert order[8:] != [row["prompt"] for row in known]
    answers = [answer_of(key, task, ranks=[1, 2]) for task in key.tasks]
    imported = import_answers(answers, [key])
    assert len(imported.rows) == imported.report.rows == 8
    assert [(row["ranks"], row["expected_ranks"]) for row in imported.screening] == [([1, 2], [2, 1])] * 4
    assert not any("expected_ranks" in row for row in imported.rows)
    for ranks in ([1, 1], [2, 1, 1]):
        with pytest.raises(ValueError, match="screening row 0: field 'ranks'"):
            blind(rows, seed=1, screening=[{**known[0], "ranks": ranks}])
    with pytest.raises(ValueError, match="screening row 0: field 'ranks': expected a known answer"):
        blind(rows, seed=1, screening=[{"prompt": "p", "completions": ["a", "b", "a"], "ranks": [1, 2, 2]}])


def test_what_is_doubtful_is_counted_and_nothing_is_lost():
    key, _ = blind(ROWS, seed=2)
    shown = len("2 + 2?") + len("4") + len("5") + len("four")
    old, new = {"saved": "2026-01-01T00:00:00Z"}, {"saved": "2026-01-02T00:00:00Z"}
    answers = [
        answer_of(key, "1", ranks=[1, 2, 3], ratings=[3, 7, 3], **new),  # one of three pairs against the ratings
        answer_of(key, "1", ranks=[3, 2, 1], ratings=[3, 7, 3], **old),  # older: gives way
        answer_of(key, "1", ranks=[1, 2, 3], ratings=[3, 7, 3], **new),  # the same again
        answer_of(key, "1", labeler="bob", ranks=[1, 1, 1], ratings=[4, 4, 4], seconds=shown / 72 * 0.99),
        answer_of(key, "1", labeler="cy", ranks=[1, 2, 2], ratings=[6, 5, 4], seconds=shown / 72 * 1.01),
        answer_of(key, "2", labeler="bob", ranks=[None] * 4, status="skipped", skipped={"reason": "rude"}),
        answer_of(key, "2", labeler="cy", ranks=[1, 1, None, 1], status="started"),
    ]
    expected = [["ann", [1, 2, 3]], ["bob", [1, 1, 1]], ["cy", [1, 2, 2]]]
    for order in range(5):
        random.Random(order).shuffle(answers)
        imported = import_answers(answers, [key])
        report = imported.report
        assert sorted([row["labeler"], row["ranks"]] for row in imported.rows) == expected
        assert report.answers == len(answers)
        assert report.answers == (report.done + report.skipped + report.unfinished + report.repeated + report.revised)
        assert (report.done, report.rows, report.skipped, report.unfinished) == (3, 3, 1, 1)
        assert report.repeated + report.revised == 2
        assert (report.contradictory, report.contradictory_pairs, report.pairs) == (1, 1, 3 + 0 + 2)
        assert report.contradictory_answers == ["ann task 1"]
        assert (report.too_fast, report.too_fast_answers, report.all_tied) == (1, ["bob task 1"], 1)
        assert report.skip_reasons == {"rude": 1}
        assert report.unanswered == {f"ann (sheet {key.sheet})": 1, f"cy (sheet {key.sheet})": 1}
        said = "\n".join(report.lines())
        for words in (
            "7 answers",
            "rude 1",
            "unfinished",
            "faster than one can read",
            "1 of 5 pairs",
            "all outputs tied",
        ):
            assert words in said
    validate_comparisons(imported.rows)


def test_several_labelers_and_sheets_of_the_same_samples_give_rows_alike():
    keys = [blind(ROWS, seed=seed, group=group)[0] for seed, group in ((1, "train"), (2, "heldout"))]
    answers = [
        answer_of(key, "1", labeler=name, ranks=[1, 3, 2]) for key, name in zip(keys, ("ann", "bob"), strict=True)
    ]
    rows = import_answers(answers, keys).rows
    assert [(row["labeler"], row["group"], row["ranks"]) for row in rows] == [
        ("ann", "train", [1, 3, 2]),
        ("bob", "heldout", [1, 3, 2]),
    ]
    assert rows[0]["completions"] == rows[1]["completions"] == ROWS[0]["completions"]


def lines_of(key, labeler="ann", **changed):
    task = {"task": "1", "status": "done", "seconds": 9.5, "ratings": [1, 2, 3], "flags": [[], [], []],
            "ranks": [1, 2, 3], "notes": "", "skipped": None, "saved": "2026-01-01T00:00:00Z"}  # fmt: skip
    head = {"format": "prefopt-answers", "version": 1, "sheet": key.sheet, "labeler": labeler}
    return [{**head, **{k: v for k, v in changed.items() if k in head}},
            {**task, **{k: v for k, v in changed.items() if k not in head}}]  # fmt: skip


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ranks": [1, 2]}, "line 2: field 'ranks': expected 3"),
        ({"ranks": [1, 2, 4]}, "line 2: field 'ranks': expected whole numbers from 1 to 3"),
        ({"ranks": [1, 2, None]}, "line 2: field 'ranks'"),
        ({"ranks": [1, 2, True]}, "line 2: field 'ranks'"),
        ({"ranks": None}, "line 2: field 'ranks'"),
        ({"ratings": [0, 2, 3]}, "line 2: field 'ratings': expected whole numbers from 1 to 7"),
        ({"ratings": [1.5, 2, 3]}, "line 2: field 'ratings'"),
        ({"flags": [[], ["nonsense"], []]}, "line 2: field 'flags': expected lists of names among"),
        ({"flags": [[]]}, "line 2: field 'flags': expected 3 lists"),
        ({"status": "finished"}, "line 2: field 'status': expected one of done, skipped, started"),
        ({"seconds": -1}, "line 2: field 'seconds'"),
        ({"seconds": float("nan")}, "line 2: field 'seconds'"),
        ({"seconds": float("inf")}, "line 2: field 'seconds'"),
        ({"task": "9"}, "line 2: field 'task': sheet .* has no task '9'"),
        ({"task": 1}, "line 2: field 'task'"),
        ({"notes": 5}, "line 2: field 'notes'"),
        ({"skipped": "no"}, "line 2: field 'skipped'"),
        ({"sheet": "other"}, "line 2: no key for sheet 'other'"),
        ({"labeler": " "}, "line 1: field 'labeler'"),
        ({"version": 2}, "line 1: expected format"),
    ],
)
def test_a_broken_answer_names_file_line_and_field(tmp_path, changed, said):
    key, _ = blind(ROWS, seed=0)
    path = write(tmp_path / "answers.jsonl", lines_of(key, **changed))
    with pytest.raises(ValueError, match=said) as error:
        import_answers(read_answers(path), [key])
    assert "answers.jsonl" in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "no answers"), ("{", "line 1: not valid JSON"), ("[1]", "line 1"), ('{"task": "1"}', "first line")],
)
def test_a_file_of_something_else_is_refused(tmp_path, text, said):
    path = tmp_path / "answers.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_answers(path)


def test_joined_files_are_read_like_single_ones(tmp_path):
    key, _ = blind(ROWS, seed=0)
    joined = write(tmp_path / "answers.jsonl", [*lines_of(key), *lines_of(key, labeler="bob")])
    assert [answer.labeler for answer in read_answers(joined)] == ["ann", "bob"]


def test_a_file_that_was_cut_off_is_noticed_also_between_two_lines(tmp_path):
    key, _ = blind(ROWS, seed=0)
    head, answer = lines_of(key)
    whole = [
        {**head, "answers": 2},
        answer,
        {**answer, "task": "2"},
        {**head, "labeler": "bob", "answers": 1},
        answer,
    ]
    assert len(read_answers(write(tmp_path / "answers.jsonl", whole))) == 3
    for cut, said in (
        (whole[:2], "expected 2 answers of ann.* got 1"),
        (whole[:4], "expected 1 answers of bob.* got 0"),
    ):
        with pytest.raises(ValueError, match=said):
            read_answers(write(tmp_path / "answers.jsonl", cut))
    text = "".join(json.dumps(line) + "\n" for line in whole)
    (tmp_path / "answers.jsonl").write_text(text[:-30])
    with pytest.raises(ValueError, match=r"line 5: not valid JSON .* cut off"):
        read_answers(tmp_path / "answers.jsonl")


def test_what_windows_and_mail_make_of_a_file_is_read_or_refused(tmp_path):
    key, _ = blind(ROWS, seed=0)
    text = "".join(json.dumps(line) + "\r\n" for line in lines_of(key))
    path = tmp_path / "answers (1).jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [answer.ranks for answer in read_answers(path)] == [[1, 2, 3]]
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(ValueError, match=r"answers \(1\)\.jsonl: not UTF-8 text"):
        read_answers(path)


def test_two_devices_give_the_newest_finished_answer_and_alike_names_are_reported():
    key, _ = blind(ROWS, seed=0)
    early, late = {"saved": "2026-01-01T00:00:00Z"}, {"saved": "2026-01-02T00:00:00Z"}
    answers = [
        answer_of(key, "1", ranks=[1, 2, 3], **early),
        answer_of(key, "1", ranks=[1, 3, None], status="started", **late),  # only opened again
        answer_of(key, "2", ranks=[1, 1, 2, 1], **early),
        answer_of(key, "2", ranks=[2, 2, 1, 2], **late),
        answer_of(key, "1", labeler="Ann", ranks=[3, 2, 1], **early),
        answer_of(key, "1", labeler="a nn", ranks=[3, 2, 1], **early),
    ]
    for order in (answers, answers[::-1]):
        found = import_answers(order, [key])
        assert sorted([row["labeler"], row["task"], row["ranks"]] for row in found.rows) == [
            ["Ann", "1", [3, 2, 1]],
            ["a nn", "1", [3, 2, 1]],
            ["ann", "1", [1, 2, 3]],
            ["ann", "2", [2, 2, 1, 2]],
        ]
        report = found.report
        assert (report.answers, report.done, report.unfinished, report.revised) == (6, 4, 0, 2)
        assert sorted(report.revised_answers) == ["ann task 1", "ann task 2"]
        assert report.similar_names == ["Ann / a nn / ann"]
        assert "one person? Ann / a nn / ann" in "\n".join(report.lines())


def test_half_a_character_has_no_place_in_a_sheet():
    with pytest.raises(UserError, match=r"samples row 1: field 'completions\[1\]': .*half of a character"):
        blind([ROWS[0], {"prompt": "p", "completions": ["a", "cut \ud83d"]}], seed=1)


def test_a_key_survives_the_file_and_no_other_key_is_written_over_it(tmp_path):
    chat = {
        "prompt": [{"role": "user", "content": "\u202e \u2028 猫"}],
        "completions": [[{"role": "assistant", "content": c}] for c in "ab"],
    }
    key, _ = blind([*ROWS, chat], seed=None, screening=[{**ROWS[0], "ranks": [1, 2, 1]}], group="train")
    path = tmp_path / "sheet.key.jsonl"
    write_key(key, path)
    assert read_key(path) == key
    write_key(key, path)
    with pytest.raises(FileExistsError, match="answers are still to come"):
        write_key(blind(ROWS, seed=1)[0], path)
    assert read_key(path) == key
    text = path.read_text()
    for broken in (
        text.replace('"shows": [[', '"shows": [[7, ', 1),
        text.replace('"row"', '"rows"', 1),
        "{}",
        "",
    ):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"sheet\.key\.jsonl"):
            read_key(path)


def test_the_command_line_from_samples_to_rows_that_train(tmp_path, capsys, monkeypatch):
    samples = write(tmp_path / "samples.jsonl", [*ROWS, {"prompt": "p", "completions": ["same", "same"]}])
    known = write(tmp_path / "known.jsonl", [{"prompt": "k", "completions": ["a", "b"], "ranks": [1, 2]}])
    guide = tmp_path / "guide.md"
    guide.write_text("# Our *own* rules\n<script>alert(1)</script>")
    sheet = tmp_path / "sheet.html"
    options = [
        "--out",
        str(sheet),
        "--screening",
        str(known),
        "--instructions",
        str(guide),
        "--group",
        "train",
    ]
    assert cli.main(["label", "export", str(samples), *options]) == 0
    said = capsys.readouterr().out
    assert "3 tasks, 1 of them screening" in said
    key = read_key(tmp_path / "sheet.key.jsonl")
    assert "<h1>Our <em>own</em> rules</h1>" in sheet.read_text(encoding="utf-8")
    files = []
    for labeler in ("ann", "bob"):
        lines = [{"format": "prefopt-answers", "version": 1, "sheet": key.sheet, "labeler": labeler}]
        for task in key.tasks.values():
            k = len(task.shows)
            lines.append({"task": task.id, "status": "done", "seconds": 60, "ranks": list(range(1, k + 1)),
                          "ratings": [7] + [4] * (k - 1), "flags": [[]] * k})  # fmt: skip
        files.append(str(write(tmp_path / f"answers-{labeler}.jsonl", lines)))
    out = tmp_path / "rankings.jsonl"
    assert cli.main(["label", "import", *files, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "6 answers: 6 done, of them 4 rows to train on and 2 to screening tasks (ann 3, bob 3)" in said
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["labeler"] for row in rows] == ["ann", "ann", "bob", "bob"]
    assert [row["models"] for row in rows if "models" in row] == [list("abc")] * 2
    assert len(prepare_comparisons(rows_dataset(rows))) == 4
    screening = [json.loads(line) for line in (tmp_path / "rankings.screening.jsonl").read_text().splitlines()]
    assert [row["expected_ranks"] for row in screening] == [[1, 2]] * 2

    with pytest.raises(SystemExit, match=r"sheet\.key\.jsonl is in the way"):
        cli.main(["label", "export", str(samples), "--out", str(sheet)])
    assert read_key(tmp_path / "sheet.key.jsonl") == key
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sheet.key.jsonl").unlink()
    for arguments, words in [
        (["label"], "expected a command"),
        (["label", "exprot"], "exprot"),
        (["label", "export"], "samples is required"),
        (["label", "export", str(samples), "--out", "sheet.pdf"], "ending in .html"),
        (["label", "export", str(samples), "--sead", "1"], "did you mean 'seed'"),
        (["label", "import"], "answers is required"),
        (["label", "import", files[0]], "no .key.jsonl"),
        (["label", "import", files[0], "--key", str(samples)], "expected a key"),
    ]:
        with pytest.raises(SystemExit, match=words):
            cli.main(arguments)


def rows_dataset(rows):
    from datasets import Dataset

    names = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
