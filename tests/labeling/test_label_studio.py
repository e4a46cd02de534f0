"""Tasks in Label Studio and back: what labelers there meant is what the rows say, ties and skips included."""

import json
from xml.etree import ElementTree

import pytest

from prefopt.labeling.answers import import_answers
from prefopt.labeling.key import blind
from prefopt.labeling.label_studio import labeling_config, read_label_studio, to_label_studio

ROWS = [
    {"prompt": "2 + 2?", "completions": ["4", "5", "four"], "models": list("abc")},
    {"prompt": "Say hi", "completions": ["Hi", "Hi", "Go away\n<script>", "Hello"], "use_case": "chat"},
    {
        "prompt": [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hi"}],
        "completions": [[{"role": "assistant", "content": c}] for c in ("a", "b")],
    },
]
MEANT = [[1, 2, 1], [2, 2, 3, 1], [2, 1]]  # ranks of the completions


@pytest.fixture(params=range(3))
def key(request):
    return blind(ROWS, seed=request.param, screening=[{"prompt": "k", "completions": ["x", "y"], "ranks": [2, 1]}])[0]


def meant(key, task):
    """Ranks by place shown of a labeler who means MEANT, and what is expected of the screening task."""
    row = dict(key.tasks[task].row)
    ranks = next((m for r, m in zip(ROWS, MEANT, strict=True) if r["prompt"] == row["prompt"]), [2, 1])
    return [ranks[places[0]] for places in key.tasks[task].shows]


def imported(answers, key):
    found = import_answers(answers, [key])
    ranks = {json.dumps(row["prompt"]): row["ranks"] for row in found.rows}
    return found, [ranks.get(json.dumps(row["prompt"])) for row in ROWS]


def text_of(value):
    return value if isinstance(value, str) else "\n\n".join(f"{m['role']}:\n{m['content']}" for m in value)


def buckets_of(ranks):
    found = {"_": [], **{f"rank_{rank}": [] for rank in range(1, 5)}}
    for place, rank in enumerate(ranks, start=1):
        found[f"rank_{rank}"].insert(0, str(place))
    return found


def annotated(task, ranked, **fields):
    results = [{"id": "r1", "from_name": "ranking", "to_name": "outputs", "type": "ranker", "value": {"ranker": ranked}},
               {"id": "r2", "from_name": "notes", "to_name": "prompt", "type": "textarea",
                "value": {"text": ["well", "so"]}}]  # fmt: skip
    annotation = {"id": 7, "completed_by": 3, "was_cancelled": False, "lead_time": 41.5, "result": results,
                  "created_at": "2026-01-01T00:00:00Z", "updated_at": "2026-01-01T00:01:00Z"}  # fmt: skip
    return {"id": 12, "data": task["data"], "annotations": [{**annotation, **fields}], "predictions": []}


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_label_studio_gives_the_rows_meant(key, tmp_path):
    tasks = to_label_studio(key)
    done = [annotated(t, buckets_of(meant(key, t["data"]["task"]))) for t in tasks]
    found, ranks = imported(read_label_studio(write(tmp_path / "a.json", done)), key)
    assert ranks == MEANT
    assert [row["expected_ranks"] == row["ranks"] for row in found.screening] == [True]
    for row in found.rows:
        assert (row["labeler"], row["seconds"], row["notes"]) == ("user 3", 41.5, "well\nso")
        assert (row["ratings"], row["flags"]) == (None, None)
    assert {row["prompt"]: row for row in found.rows if isinstance(row["prompt"], str)}["2 + 2?"]["models"] == [*"abc"]


def test_label_studio_tasks_show_every_text_once_and_nothing_else(key):
    for task in to_label_studio(key):
        row = key.tasks[task["data"]["task"]].row
        assert set(task) == {"data"}
        assert set(task["data"]) == {"sheet", "task", "prompt", "outputs"}
        assert task["data"]["prompt"] == text_of(row["prompt"])
        texts = [text_of(c) if isinstance(c, str) else f"assistant:\n{c[0]['content']}" for c in row["completions"]]
        assert sorted(item["body"] for item in task["data"]["outputs"]) == sorted(set(texts))
        assert "models" not in json.dumps(task)
    config = ElementTree.fromstring(labeling_config(key))
    assert [b.get("name") for b in config.iter("Bucket")] == ["rank_1", "rank_2", "rank_3"]
    names = {element.get("name") for element in config.iter()}
    for element in config.iter():
        assert element.get("toName") in names | {None}
        if (value := element.get("value") or "").startswith("$"):
            assert value[1:] in to_label_studio(key)[0]["data"]


def test_label_studio_skips_and_half_done_are_counted_and_plain_rankers_are_read(key, tmp_path):
    tasks = to_label_studio(key)
    half = buckets_of(meant(key, "1"))
    half["_"] = [half["rank_1"].pop()]
    content = [
        annotated(tasks[0], half),
        annotated(tasks[1], buckets_of(meant(key, "2")), was_cancelled=True, completed_by={"email": "ann@x.org"}),
        annotated(tasks[2], {}, result=[]),
        annotated(tasks[3], {"ranking": [str(len(meant(key, "4")) - i) for i in range(len(meant(key, "4")))]}),
    ]
    answers = read_label_studio(write(tmp_path / "a.json", content))
    assert [a.status for a in answers] == ["started", "skipped", "started", "done"]
    assert [a.labeler for a in answers] == ["user 3", "ann@x.org", "user 3", "user 3"]
    assert answers[3].ranks == list(range(len(meant(key, "4")), 0, -1))
    report = import_answers(answers, [key]).report
    assert (report.done, report.skipped, report.unfinished) == (1, 1, 2)
    assert report.skip_reasons == {"skipped in Label Studio": 1}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update(data={"prompt": "p"}), "task 12: expected 'data' with 'sheet'"),
        (lambda t: t.pop("annotations"), "not JSON-MIN"),
        (lambda t: t["annotations"][0].pop("completed_by"), "task 12: annotation without 'completed_by'"),
        (lambda t: t["annotations"][0]["result"][0]["value"].update(ranker={"ads": ["1"]}), "bucket 'ads'"),
        (lambda t: t["annotations"][0]["result"][0]["value"].update(ranker={"rank_1": ["9"]}), "output '9'"),
        (
            lambda t: t["annotations"][0]["result"][0]["value"].update(ranker={"rank_1": ["1", "1"]}),
            "at most once",
        ),
    ],
)
def test_what_label_studio_did_not_write_for_these_tasks_is_refused(tmp_path, change, said):
    key, _ = blind(ROWS, seed=0)
    task = annotated(to_label_studio(key)[0], buckets_of([1, 2, 3]))
    change(task)
    with pytest.raises(ValueError, match=said):
        read_label_studio(write(tmp_path / "a.json", [task]))
