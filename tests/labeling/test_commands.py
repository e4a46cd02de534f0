"""The commands beyond the sheet: agreement, next, and the way through other tools."""

import json

import pytest
import torch

from prefopt import cli
from prefopt.inference.jsonl import read_jsonl, write_jsonl
from prefopt.inference.scoring import score_rows
from prefopt.labeling.key import read_key
from prefopt.models.checkpoints import save_reward_model

ROWS = [{"prompt": f"p{i}", "completions": [f"a{i}", f"b{i}", f"c{i}"], "id": i} for i in range(4)]


def said_by(capsys, *arguments):
    assert cli.main(["label", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_agreement_reads_what_import_wrote(tmp_path, capsys):
    samples, sheet = tmp_path / "samples.jsonl", tmp_path / "sheet.html"
    write_jsonl(samples, ROWS)
    write_jsonl(tmp_path / "known.jsonl", [{"prompt": "k", "completions": ["x", "y"], "ranks": [1, 2]}])
    said_by(capsys, "export", samples, "--out", sheet, "--screening", tmp_path / "known.jsonl", "--group", "train")
    key = read_key(tmp_path / "sheet.key.jsonl")
    for name, best in (("ann", "a"), ("bob", "b")):
        lines = [{"format": "prefopt-answers", "version": 1, "sheet": key.sheet, "labeler": name}]
        for task in key.tasks.values():
            ranks = [1 if text[0] in (best, "x") else 2 for text in task.outputs]
            lines.append({"task": task.id, "status": "done", "seconds": 20, "ranks": ranks})
        if name == "bob":
            lines[-1].update(status="skipped", skipped={"reason": "rude"}, ranks=None)
            lines[-1]["ranks"] = [None] * len(task.outputs)
        write_jsonl(tmp_path / f"answers-{name}.jsonl", lines)
    rankings = tmp_path / "rankings.jsonl"
    answers = [tmp_path / f"answers-{name}.jsonl" for name in ("ann", "bob")]
    said_by(capsys, "import", *answers, "--out", rankings)
    assert json.loads((tmp_path / "rankings.report.json").read_text())["skipped_by"] == {"bob": 1}
    said = said_by(capsys, "agreement", rankings, "--out", tmp_path / "agreement.json")
    found = json.loads((tmp_path / "agreement.json").read_text())
    # a > b = c against b > a = c: only a and b are untied in both, and there they differ, in every shared prompt.
    shared = len(read_jsonl(rankings)) - 4
    assert (found["all_pairs"]["value"], found["all_pairs"]["n"]) == (0.0, shared)
    assert found["by_groups"]["within train"]["n"] == shared
    assert found["labelers"]["bob"]["skipped"] == 1
    screened = read_jsonl(tmp_path / "rankings.screening.jsonl")
    assert sum(one["screening_tasks"] for one in found["labelers"].values()) == len(screened) >= 1
    assert "ann & bob: 0.000" in said
    assert "1 skipped" in said


@pytest.fixture
def reward_models(tmp_path, reward_model, tokenizer):
    paths = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.nn.init.normal_(reward_model.score.weight)
        paths.append(tmp_path / f"rm{seed}")
        save_reward_model(reward_model, paths[-1])
        tokenizer.save_pretrained(paths[-1])
    return paths


def test_next_takes_the_margins_of_the_reward_model(tmp_path, capsys, reward_model, tokenizer, reward_models):
    samples, labeled, out = (tmp_path / f"{name}.jsonl" for name in ("samples", "labeled", "next"))
    write_jsonl(samples, ROWS)
    write_jsonl(labeled, [{"prompt": "p2", "completions": ["x", "y"], "ranks": [1, 2]}])
    options = ["--reward_model", reward_models[1], "--labeled", labeled, "--out", out, "--k", 2]
    said = said_by(capsys, "next", samples, *options, "--n", 1, "--random_share", 0)
    assert "4 prompts, 1 of them labeled already; chose 1: 1 by margin, 0 at random" in said
    (row,) = read_jsonl(out)
    left = [r for r in ROWS if r["prompt"] != "p2"]
    scores = score_rows(reward_model.eval(), tokenizer, left)  # the last one saved
    margin, prompt, pair = min(
        (abs(s[i] - s[j]), r["prompt"], [i, j])
        for r, s in zip(left, scores, strict=True)
        for i, j in ((0, 1), (0, 2), (1, 2))
    )
    assert (row["prompt"], row["outputs"]) == (prompt, pair)
    p = 1 / (1 + torch.tensor(margin, dtype=torch.float64).neg().exp())
    assert row["uncertainty"] == pytest.approx(-(p * p.log2() + (1 - p) * (1 - p).log2()).item(), abs=1e-6)
    assert row["id"] == int(prompt[1])

    both = ["--reward_model", *reward_models, "--out", out, "--k", 3, "--by", "disagreement", "--overwrite"]
    said = said_by(capsys, "next", samples, *both, "--n", 4, "--random_share", 0.5)
    assert "chose 4: 2 by disagreement, 2 at random" in said
    said_by(capsys, "export", out, "--out", tmp_path / "sheet.html")
    shown = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert "disagreement" not in shown.split('id="sheet"')[-1]
    key = read_key(tmp_path / "sheet.key.jsonl")
    assert {task.row["chosen"] for task in key.tasks.values()} == {"random", "disagreement"}


def test_samples_of_best_of_n_are_exported_and_chosen_from(tmp_path, capsys, reward_models):
    kept = {"completion": " b", "truncated": True, "ids": [4], "score": 2.0, "mean_score": 1.5}
    rows = [
        {
            "prompt": f"p{i}",
            **kept,
            "completions": [" a", " b"],
            "completions_truncated": [False, True],
            "scores": [1, 2],
        }
        for i in range(2)
    ]
    write_jsonl(tmp_path / "best.jsonl", rows)
    said_by(capsys, "export", tmp_path / "best.jsonl", "--out", tmp_path / "sheet.html")
    options = ["--reward_model", reward_models[0], "--out", tmp_path / "next.jsonl"]
    said_by(capsys, "next", tmp_path / "best.jsonl", *options)
    for row in read_jsonl(tmp_path / "next.jsonl"):
        assert (row["completions"], row["truncated"]) == ([" a", " b"], [False, True])
        assert "completion" not in row


def test_label_studio_there_and_back(tmp_path, capsys):
    samples, out = tmp_path / "samples.jsonl", tmp_path / "studio.json"
    write_jsonl(samples, ROWS)
    said = said_by(capsys, "export", samples, "--format", "label-studio", "--out", out)
    assert "for Label Studio" in said
    assert "4 tasks" in said
    assert "<Ranker" in (tmp_path / "studio.xml").read_text()
    assert "<h1>" in (tmp_path / "studio.instructions.html").read_text()
    done = []
    for task in json.loads(out.read_text()):
        order = sorted(task["data"]["outputs"], key=lambda output: output["body"])  # a, b, c
        buckets = {
            "_": [],
            "rank_1": [order[1]["id"]],
            "rank_2": [order[0]["id"], order[2]["id"]],
            "rank_3": [],
        }
        result = {
            "from_name": "ranking",
            "to_name": "outputs",
            "type": "ranker",
            "value": {"ranker": buckets},
        }
        annotation = {"completed_by": {"email": "ann@x.org"}, "result": [result], "lead_time": 9.0}
        done.append({"data": task["data"], "annotations": [annotation]})
    (tmp_path / "export.json").write_text(json.dumps(done))
    rankings = tmp_path / "rankings.jsonl"
    said_by(capsys, "import", tmp_path / "export.json", "--format", "label-studio", "--out", rankings)
    rows = read_jsonl(rankings)
    assert [(row["id"], row["ranks"], row["labeler"]) for row in rows] == [
        (i, [2, 1, 2], "ann@x.org") for i in range(4)
    ]
    with pytest.raises(SystemExit, match=r"ending in \.json"):
        cli.main(["label", "export", str(samples), "--format", "label-studio", "--out", str(tmp_path / "x.html")])


def test_no_command_writes_over_what_it_reads_nor_leaves_what_is_out_of_date(tmp_path, capsys):
    samples, sheet, known = tmp_path / "samples.jsonl", tmp_path / "sheet.html", tmp_path / "known.jsonl"
    write_jsonl(samples, ROWS)
    write_jsonl(known, [{"prompt": "k", "completions": ["x", "y"], "ranks": [1, 2]}])
    said_by(capsys, "export", samples, "--out", sheet, "--screening", known)
    key = read_key(tmp_path / "sheet.key.jsonl")
    head = {"format": "prefopt-answers", "version": 1, "sheet": key.sheet, "labeler": "ann"}
    done = [{"task": task.id, "status": "done", "seconds": 9, "ranks": list(range(1, len(task.shows) + 1))}
            for task in key.tasks.values()]  # fmt: skip
    answers, rankings = tmp_path / "answers.jsonl", tmp_path / "rankings.jsonl"
    write_jsonl(answers, [head, *done])
    before = {path: path.read_bytes() for path in (samples, answers, tmp_path / "sheet.key.jsonl")}
    for words in (
        ["import", answers, "--out", answers],
        ["import", answers, "--out", tmp_path / "sheet.key.jsonl"],
        ["next", samples, "--reward_model", "rm", "--out", samples],
    ):
        with pytest.raises(SystemExit, match="is also read; choose another name"):
            cli.main(["label", *map(str, words)])
    assert {path: path.read_bytes() for path in before} == before

    said_by(capsys, "import", answers, "--out", rankings)
    assert "screening tasks, right on" in said_by(capsys, "agreement", rankings)
    write_jsonl(answers, [head, *(line for line in done if not key.tasks[line["task"]].is_screening)])
    imported = {path: path.read_bytes() for path in tmp_path.glob("rankings.*")}
    with pytest.raises(SystemExit, match=r"rankings\.screening\.jsonl is of an earlier import.*--overwrite"):
        cli.main(["label", "import", str(answers), "--out", str(rankings)])
    assert {path: path.read_bytes() for path in tmp_path.glob("rankings.*")} == imported
    said_by(capsys, "import", answers, "--out", rankings, "--overwrite")
    assert "screening" not in said_by(capsys, "agreement", rankings)
    with pytest.raises(SystemExit, match="all 4 prompts are labeled already"):
        cli.main(["label", "next", str(samples), "--reward_model", "rm", "--labeled", str(rankings)])
    (tmp_path / "rankings.report.json").write_text("[]")
    with pytest.raises(SystemExit, match=r"rankings\.report\.json: not the report"):
        cli.main(["label", "agreement", str(rankings)])
    (tmp_path / "rankings.report.json").unlink()
    row = {**ROWS[0], "ranks": [1, 2, 3], "labeler": "ann"}
    for rows, said in (
        ([], "no rows to compare"),
        ([row, {**row, "seconds": "slow"}], "row 1: field 'seconds': expected a number"),
        ([{**row, "group": 7}], "row 0: field 'group': expected a name"),
    ):
        write_jsonl(rankings, rows)
        with pytest.raises(SystemExit, match=said):
            cli.main(["label", "agreement", str(rankings)])
    write_jsonl(rankings, [row])
    write_jsonl(known, [{**row, "expected_ranks": [1, 2, 3], "labeler": None}])
    with pytest.raises(SystemExit, match=r"known\.jsonl row 0: field 'labeler'"):
        cli.main(["label", "agreement", str(rankings), "--screening", str(known)])


def test_mistakes_are_named_before_anything_is_loaded(tmp_path):
    samples, broken = tmp_path / "samples.jsonl", tmp_path / "broken.jsonl"
    write_jsonl(samples, ROWS)
    write_jsonl(broken, [{"prompt": "p", "completions": "abc"}])
    for arguments, words in [
        (["agreement"], "rankings is required"),
        (["agreement", samples], "row 0: field 'ranks'"),
        (["agreement", samples, "--raters", "x"], "raters"),
        (["next", samples], "reward_model is required"),
        (["next", samples, "--reward_model", "rm", "--by", "disagreement"], "two reward models or more"),
        (["next", samples, "--reward_model", "rm", "--k", 1], "k from 2"),
        (["next", samples, "--reward_model", "rm", "--random_share", 2], "between 0 and 1"),
        (["next", broken, "--reward_model", "rm"], "row 0: field 'completions'"),
        (["next", samples, "--reward_model", tmp_path / "rm"], "there is no folder"),
        (["import", samples, "--format", "label-studio", "--key", samples], "expected a key|not valid JSON"),
    ]:
        with pytest.raises(SystemExit, match=words):
            cli.main(["label", *map(str, arguments)])
