"""Tasks for Label Studio and back (labelstud.io/tags/ranker): the sheet's tasks, in a tool that a team already runs.

The labeling configuration is a `List` of outputs with a `Ranker` that has one `Bucket` per rank: outputs in one bucket
are tied, whatever their order in it, and what is left in the list is not ranked. Without buckets a Ranker knows no ties;
the answers of such a configuration are read too. Ratings and flags are not asked for. Tried there and back with Label
Studio 1.23.2, by its page and by its API.

What Label Studio holds is as blind as a sheet: shuffled texts and the numbers of sheet and task.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from prefopt.errors import UserError
from prefopt.labeling.answers import Answer
from prefopt.labeling.key import Key, as_text
from prefopt.rankings.checks import dense_ranks, shorten

RANKER, NOTES = "ranking", "notes"
_BUCKET = "rank_"


def to_label_studio(key: Key) -> list[dict[str, Any]]:
    """Tasks for Label Studio's import, one for each task of the key.

    >>> from prefopt.labeling.key import blind
    >>> key, _ = blind([{"prompt": "2 + 2?", "completions": ["4", "5"]}], seed=0)
    >>> (task,) = to_label_studio(key)
    >>> task["data"]["prompt"], sorted(item["body"] for item in task["data"]["outputs"])
    ('2 + 2?', ['4', '5'])
    """
    tasks = []
    for task in key.tasks.values():
        outputs = [
            {"id": str(place), "title": f"Output {place}", "body": as_text(output)}
            for place, output in enumerate(task.outputs, start=1)
        ]
        data = {"sheet": key.sheet, "task": task.id, "prompt": as_text(task.prompt), "outputs": outputs}
        tasks.append({"data": data})
    return tasks


def labeling_config(key: Key) -> str:
    """The labeling configuration for these tasks, to be pasted into the project's settings."""
    most = max(len(task.shows) for task in key.tasks.values())
    words = ["Rank 1 (best)", *(f"Rank {rank}" for rank in range(2, most + 1))]
    buckets = "\n".join(
        f'    <Bucket name="{_BUCKET}{rank}" title={quoteattr(title)}/>' for rank, title in enumerate(words, start=1)
    )
    return f"""<View>
  <Style>.htx-text, .htx-ranker-item {{ white-space: pre-wrap; }}</Style>
  <Header value="Prompt" size="4"/>
  <Text name="prompt" value="$prompt" valueType="text" granularity="word"/>
  <Header value="Drag every output to its rank; outputs of one rank are tied" size="4"/>
  <List name="outputs" value="$outputs" title="Not ranked yet"/>
  <Ranker name="{RANKER}" toName="outputs">
{buckets}
  </Ranker>
  <TextArea name="{NOTES}" toName="prompt" placeholder="Notes" rows="2" maxSubmissions="1"/>
</View>
"""


def read_label_studio(path: str | Path) -> list[Answer]:
    """Answers from Label Studio's JSON export (not JSON-MIN), for `import_answers`.

    Cancelled annotations are skips; an annotation that leaves outputs in the list is unfinished. A UserError names the task
    that is not as described above.
    """
    try:
        tasks = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or "no UTF-8, or nested too deeply"
        raise UserError(f"{path}: not valid JSON ({reason}); give Label Studio's JSON export") from None
    if not isinstance(tasks, list) or not all(isinstance(task, Mapping) and "annotations" in task for task in tasks):
        raise UserError(
            f"{path}: expected a list of tasks with 'annotations'; export in the format JSON, not JSON-MIN"
        )
    named = [(f"{path} task {task.get('id', number)}", task) for number, task in enumerate(tasks)]
    return [answer for where, task in named for answer in _answers(task, where)]


def _answers(task: Mapping[str, Any], where: str) -> Iterator[Answer]:
    data = task.get("data")
    kinds = {"sheet": str, "outputs": list}
    if not isinstance(data, Mapping) or not all(isinstance(data.get(name), kind) for name, kind in kinds.items()):
        raise UserError(
            f"{where}: expected 'data' with 'sheet', 'task' and 'outputs', got {shorten(data)}; import tasks that "
            "`prefopt label export --format label-studio` wrote"
        )
    ids = [str(item["id"]) for item in data["outputs"]]
    for annotation in task["annotations"]:
        results = {result.get("from_name"): result.get("value", {}) for result in annotation.get("result") or []}
        ranks = _ranks(results.get(RANKER, {}).get("ranker"), ids, where)
        notes = results.get(NOTES, {}).get("text") or []
        cancelled = bool(annotation.get("was_cancelled"))
        status = "skipped" if cancelled else "done" if None not in ranks else "started"
        yield Answer(
            sheet=data["sheet"],
            task=str(data.get("task")),
            labeler=_labeler(annotation.get("completed_by"), where),
            status=status,
            ranks=dense_ranks(ranks) if None not in ranks else ranks,
            notes="\n".join([notes] if isinstance(notes, str) else notes),
            seconds=annotation.get("lead_time"),
            started=annotation.get("created_at"),
            saved=annotation.get("updated_at"),
            skipped={"reason": "skipped in Label Studio"} if cancelled else None,
            source=where,
        )


def _ranks(ranked: Any, ids: list[str], where: str) -> list[int | None]:
    """By place: from buckets of ties, or from one list in order."""
    if ranked is None:
        return [None] * len(ids)
    if isinstance(ranked, list):
        ranked = {RANKER: ranked}
    if set(ranked) == {RANKER}:  # a Ranker without buckets
        ranked = {f"{_BUCKET}{rank}": [name] for rank, name in enumerate(ranked[RANKER], start=1)}
    found: dict[str, int] = {}
    for bucket, names in ranked.items():
        if bucket == "_":
            continue
        rank = bucket.removeprefix(_BUCKET)
        if bucket == rank or not rank.isdecimal():
            raise UserError(
                f"{where}: bucket {bucket!r}: expected {_BUCKET}1, {_BUCKET}2, ...; use the labeling configuration "
                "that was written beside the tasks"
            )
        for name in map(str, names):
            if name in found or name not in ids:
                raise UserError(f"{where}: output {name!r}: expected each of {', '.join(ids)} at most once")
            found[name] = int(rank)
    return [found.get(name) for name in ids]


def _labeler(completed_by: Any, where: str) -> str:
    """An account is a number, or an object where the export spells it out."""
    if isinstance(completed_by, Mapping):
        completed_by = completed_by.get("email") or completed_by.get("username") or completed_by.get("id")
    if completed_by is None or isinstance(completed_by, bool) or not str(completed_by).strip():
        raise UserError(f"{where}: annotation without 'completed_by'; export with user details")
    return str(completed_by) if isinstance(completed_by, str) else f"user {completed_by}"
