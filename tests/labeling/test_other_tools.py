"""Tasks in other tools and back: what labelers there meant is what the rows say, ties and skips included."""

import json
from xml.etree import ElementTree

import pytest

from prefopt.labeling.answers import import_answers
from prefopt.labeling.argilla import read_argilla, to_argilla, write_argilla
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
    return blind(
        ROWS, seed=request.param, screening=[{"prompt": "k", "completions": ["x", "y"], "ranks": [2, 1]}]
    )[0]


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
    assert {row["prompt"]: row for row in found.rows if isinstance(row["prompt"], str)}["2 + 2?"][
        "models"
    ] == [*"abc"]


def test_label_studio_tasks_show_every_text_once_and_nothing_else(key):
    for task in to_label_studio(key):
        row = key.tasks[task["data"]["task"]].row
        assert set(task) == {"data"}
        assert set(task["data"]) == {"sheet", "task", "prompt", "outputs"}
        assert task["data"]["prompt"] == text_of(row["prompt"])
        texts = [
            text_of(c) if isinstance(c, str) else f"assistant:\n{c[0]['content']}" for c in row["completions"]
        ]
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
        annotated(
            tasks[1], buckets_of(meant(key, "2")), was_cancelled=True, completed_by={"email": "ann@x.org"}
        ),
        annotated(tasks[2], {}, result=[]),
        annotated(
            tasks[3], {"ranking": [str(len(meant(key, "4")) - i) for i in range(len(meant(key, "4")))]}
        ),
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


def listed(key, ranks_of, **fields):
    """Records as Argilla's server lists them."""
    items = []
    for k, (_, records) in to_argilla(key).items():
        for record in records:
            ranks = ranks_of(record["id"].split("-")[1])
            ranking = [
                {"value": f"output_{place}", "rank": rank} for place, rank in enumerate(ranks, start=1)
            ]
            assert len(ranking) == k
            response = {"id": "r", "status": "submitted", "user_id": "0f1e", "record_id": "x",
                        "values": {"ranking": {"value": ranking}, "notes": {"value": "well"}},
                        "inserted_at": "2026-01-01T00:00:00", "updated_at": "2026-01-01T00:01:00"}  # fmt: skip
            items.append({"id": "uuid", "external_id": record["id"], "fields": record["fields"], "metadata": {},
                          "responses": [{**response, **fields}]})  # fmt: skip
    return {"items": items, "total": len(items)}


def test_argilla_gives_the_rows_meant(key, tmp_path):
    content = listed(key, lambda task: meant(key, task))
    found, ranks = imported(read_argilla(write(tmp_path / "a.json", content)), key)
    assert ranks == MEANT
    assert [row["expected_ranks"] == row["ranks"] for row in found.screening] == [True]
    assert {(row["labeler"], row["notes"], row["seconds"]) for row in found.rows} == {("0f1e", "well", None)}
    pages = [{"items": [item], "total": len(content["items"])} for item in content["items"]]
    assert imported(read_argilla(write(tmp_path / "a.json", pages)), key)[1] == MEANT
    # Ranks with gaps, as Argilla's page gives them to ties (1, 1, 3), are the same ranking.
    gaps = listed(key, lambda task: [2 * r - 1 for r in meant(key, task)])
    assert imported(read_argilla(write(tmp_path / "a.json", gaps)), key)[1] == MEANT


def test_argilla_datasets_hold_shuffled_texts_and_fit_their_questions(key, tmp_path):
    paths = write_argilla(key, tmp_path / "argilla", "# Rules")
    assert [path.name for path in paths] == ["outputs-2", "outputs-3"]
    seen = []
    for path in paths:
        settings = json.loads((path / ".argilla" / "settings.json").read_text())
        dataset = json.loads((path / ".argilla" / "dataset.json").read_text())
        fields = [field["name"] for field in settings["fields"]]
        (ranking,) = [q for q in settings["questions"] if q["settings"]["type"] == "ranking"]
        assert ["prompt", *(option["value"] for option in ranking["settings"]["options"])] == fields
        assert settings["guidelines"] == dataset["guidelines"] == "# Rules"
        for record in json.loads((path / "records.json").read_text()):
            assert list(record["fields"]) == fields
            assert "models" not in json.dumps(record)
            seen.append(record["id"])
    assert sorted(seen) == sorted(f"{key.sheet}-{task}" for task in key.tasks)
    with pytest.raises(FileExistsError, match="in the way"):
        write_argilla(key, tmp_path / "argilla")


def test_argilla_discards_and_drafts_are_counted(tmp_path):
    key, _ = blind(ROWS, seed=0)
    content = listed(key, lambda task: meant(key, task))
    content["items"][0]["responses"][0].update(status="discarded", values=None)
    content["items"][1]["responses"][0].update(status="draft", values={})
    content["items"][2]["responses"] = []
    report = import_answers(read_argilla(write(tmp_path / "a.json", content)), [key]).report
    assert (report.answers, report.skipped, report.unfinished, report.done) == (2, 1, 1, 0)
    assert report.skip_reasons == {"discarded in Argilla": 1}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["items"][0].update(responses={"ranking": [{"value": ["output_2", "output_1"], "user_id": "u"}]}),
         "Python SDK writes them, without ranks"),
        (lambda c: c["items"][0]["responses"][0]["values"].update(ranking={"value": ["output_1", "output_2"]}),
         "forgets the ranks"),
        (lambda c: c["items"][0].pop("responses"), "include=responses"),
        (lambda c: c["items"][0].update(external_id="7"), "expected SHEET-TASK, got '7'"),
        (lambda c: c["items"][0]["responses"][0].update(status="pending"), "field 'status'"),
        (lambda c: c["items"][0]["responses"][0].update(user_id=None), "without 'user_id'"),
        (lambda c: c["items"][0]["responses"][0]["values"]["ranking"]["value"][0].update(value="output_9"),
         "expected each of output_1, output_2 at most once"),
        (lambda c: c.update(total=9), "3 of 9 records"),
        (lambda c: c.pop("items"), "under 'items'"),
    ],
)  # fmt: skip
def test_what_argilla_did_not_list_for_these_records_is_refused(tmp_path, change, said):
    key, _ = blind(ROWS, seed=0)
    content = listed(key, lambda task: meant(key, task))
    change(content)
    with pytest.raises(ValueError, match=said):
        read_argilla(write(tmp_path / "a.json", content))
