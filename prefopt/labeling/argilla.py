"""Datasets for Argilla 2 and back (docs.argilla.io): the sheet's tasks as records with a `RankingQuestion`.

A question has the same options in every record, so there is one dataset per number of outputs, each a folder as
`rg.Dataset.from_disk` reads it. Ratings and flags are not asked for. What Argilla holds is as blind as a sheet:
shuffled texts, and the numbers of sheet and task as the record's id.

Answers come from the server's own interface. The files that the Python SDK writes are refused: it keeps the options of
a ranking but not their ranks, and the page sends the options in their fixed order, whatever the labeler ranked.

    curl -H "X-Argilla-Api-Key: $KEY" "$URL/api/v1/datasets/$ID/records?include=responses&limit=1000" > answers.json
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.labeling.answers import Answer
from prefopt.labeling.key import Key, as_text
from prefopt.rankings.checks import dense_ranks, shorten

RANKING, NOTES = "ranking", "notes"
_STATUS = {"submitted": "done", "discarded": "skipped", "draft": "started"}


def to_argilla(
    key: Key, guidelines: str | None = None
) -> dict[int, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Settings and records of the dataset for each number of outputs.

    Example:
        >>> from prefopt.labeling.key import blind
        >>> key, _ = blind([{"prompt": "2 + 2?", "completions": ["4", "5"]}], seed=0)
        >>> (settings, (record,)) = to_argilla(key)[2]
        >>> record["id"] == f"{key.sheet}-1", sorted(record["fields"].values())
        (True, ['2 + 2?', '4', '5'])
    """
    found: dict[int, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    for task in key.tasks.values():
        k = len(task.shows)
        _, records = found.setdefault(k, (_settings(k, guidelines), []))
        outputs = {_option(place): as_text(output) for place, output in enumerate(task.outputs, start=1)}
        records.append(
            {
                "id": f"{key.sheet}-{task.id}",
                "fields": {"prompt": as_text(task.prompt), **outputs},
                "metadata": {},
                "suggestions": {},
                "responses": {},
                "vectors": {},
            }
        )
    return dict(sorted(found.items()))


def write_argilla(key: Key, folder: str | Path, guidelines: str | None = None) -> list[Path]:
    """Write one folder per number of outputs into `folder`, each for `rg.Dataset.from_disk`.

    Raises:
        FileExistsError: one of them exists.
    """
    datasets = to_argilla(key, guidelines)
    paths = {k: Path(folder) / f"outputs-{k}" for k in datasets}
    for path in paths.values():
        if path.exists():
            raise FileExistsError(f"{path} is in the way; choose another folder, or move it")
    for k, (settings, records) in datasets.items():
        (paths[k] / ".argilla").mkdir(parents=True)
        dataset = {"name": f"ranking-{key.sheet}-{k}", "guidelines": guidelines, "allow_extra_metadata": True}
        for name, content in (
            (".argilla/dataset.json", dataset),
            (".argilla/settings.json", settings),
            ("records.json", records),
        ):
            (paths[k] / name).write_text(json.dumps(content), encoding="utf-8")
    return list(paths.values())


def read_argilla(path: str | Path) -> list[Answer]:
    """Answers from the records that Argilla's server lists with their responses, for `import_answers`.

    Discarded responses are skips, drafts are unfinished.

    Raises:
        ValueError: "FILE record 12: ...", what is not as described above.
    """
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error.msg}); give the server's list of records") from None
    pages = records if isinstance(records, list) else [records]
    if not all(isinstance(page, Mapping) and isinstance(page.get("items"), list) for page in pages):
        raise UserError(f"{path}: expected records as the server lists them, under 'items'")
    records = [record for page in pages for record in page["items"]]
    total = max((page.get("total") or 0 for page in pages), default=0)
    if len(records) < total:
        raise UserError(
            f"{path}: {len(records)} of {total} records; get the others too (&offset={len(records)}) and give the pages "
            "as one list: jq -s . page*.json"
        )
    return [
        answer
        for number, record in enumerate(records)
        for answer in _answers(record, f"{path} record {record.get('external_id') or number}")
    ]


def _answers(record: Mapping[str, Any], where: str) -> Iterator[Answer]:
    sheet, _, task = str(record.get("external_id") or record.get("id") or "").rpartition("-")
    responses = record.get("responses")
    if isinstance(responses, Mapping):
        if not any(responses.values()):
            return
        raise UserError(
            f"{where}: responses as the Python SDK writes them, without ranks: no ranking can be read from them; list "
            "the records from the server (GET /api/v1/datasets/ID/records?include=responses)"
        )
    if responses is None:
        raise UserError(f"{where}: no 'responses'; list the records with ?include=responses")
    if not sheet:
        raise UserError(
            f"{where}: field 'external_id': expected SHEET-TASK, got {shorten(record.get('external_id'))}; use records "
            "that `prefopt label export --format argilla` wrote"
        )
    k = sum(name.startswith(_option("")) for name in record.get("fields") or {})
    for response in responses:
        status = _STATUS.get(response.get("status"))
        if status is None:
            raise UserError(f"{where}: field 'status': expected one of {', '.join(_STATUS)}, "
                             f"got {shorten(response.get('status'))}")  # fmt: skip
        if not response.get("user_id"):
            raise UserError(
                f"{where}: a response without 'user_id', whose account was deleted; name it there"
            )
        values = response.get("values") or {}
        ranks = _ranks((values.get(RANKING) or {}).get("value") or [], k, where)
        yield Answer(
            sheet=sheet,
            task=task,
            labeler=str(response["user_id"]),
            status=status,
            ranks=dense_ranks(ranks) if None not in ranks else ranks,
            notes=(values.get(NOTES) or {}).get("value") or "",
            started=response.get("inserted_at"),
            saved=response.get("updated_at"),
            skipped={"reason": "discarded in Argilla"} if status == "skipped" else None,
            source=where,
        )


def _ranks(value: list[Any], k: int, where: str) -> list[int | None]:
    if not all(isinstance(one, Mapping) and {"value", "rank"} <= set(one) for one in value):
        raise UserError(
            f"{where}: field {RANKING!r}: expected a value and a rank for each output, got {shorten(value)}; list the "
            "records from the server, as the Python SDK forgets the ranks"
        )
    options = [_option(place) for place in range(1, k + 1)]
    found = {one["value"]: one["rank"] for one in value}
    if len(found) < len(value) or not set(found) <= set(options):
        raise UserError(
            f"{where}: field {RANKING!r}: expected each of {', '.join(options)} at most once, got {shorten(value)}"
        )
    return [found.get(option) for option in options]


def _option(place: int | str) -> str:
    return f"output_{place}"


def _settings(k: int, guidelines: str | None) -> dict[str, Any]:
    options = [{"value": _option(place), "text": f"Output {place}"} for place in range(1, k + 1)]
    names = {"prompt": "Prompt", **{option["value"]: option["text"] for option in options}}
    return {
        "guidelines": guidelines,
        "allow_extra_metadata": True,
        "distribution": {"strategy": "overlap", "min_submitted": 1},
        "fields": [
            {
                "name": name,
                "title": title,
                "required": True,
                "settings": {"type": "text", "use_markdown": False},
            }
            for name, title in names.items()
        ],
        "questions": [
            {
                "name": RANKING,
                "title": "Rank the outputs",
                "description": "Best first; outputs of one rank are tied.",
                "required": True,
                "settings": {"type": "ranking", "options": options},
            },
            {
                "name": NOTES,
                "title": "Notes",
                "description": None,
                "required": False,
                "settings": {"type": "text", "use_markdown": False},
            },
        ],
        "metadata": [],
        "vectors": [],
    }
